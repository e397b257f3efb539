"""The benchmark of tokenizers compares like with like, and says on how much it measured."""

import numpy as np
import pytest

from llm_itemtok.bench import tokenize


def test_both_ways_cluster_every_level():
    faiss = pytest.importorskip("faiss")
    x = tokenize.points(3000)
    ours, usual = tokenize.residual_kmeans(x, 5), tokenize.residual_faiss(x, 5, faiss)
    assert ours.shape == usual.shape == (3, 3000)
    for labels in (ours, usual):
        assert len(np.unique(labels[0])) > 200


@pytest.mark.parametrize("installed", [True, False])
def test_results_say_what_was_measured(monkeypatch, installed):
    if not installed:
        monkeypatch.setattr(tokenize, "find_spec", lambda name: None)
    found = {result.id: result for result in tokenize.tokenize(scale=2000, streamed=3000)}
    assert list(found) == ["K1", "K1-default", "K2"]
    assert found["K1"].details["points"] == 2000
    assert found["K1-default"].details["points"] == 500
    assert found["K1-default"].details["iterations"] == 50
    assert found["K2"].details["points"] == 3000
    assert all(result.value > 0 for result in found.values())
    if not installed:
        assert "not installed here" in found["K1"].baseline
