"""A dense model beside the language model: what it finds, how scores are mixed, what its file must be."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from llm_itemtok.decoding.dense import FILE_NAME, Both, Rescorer, best_known
from llm_itemtok.errors import ArtifactError
from llm_itemtok.sasrec import SASRec

ITEMS = 7
HISTORIES = [np.array([], dtype=np.int64), np.array([3]), np.array([0, 6, 2, 2])]


@pytest.fixture
def rescorer() -> Rescorer:
    torch.manual_seed(0)
    network = SASRec(ITEMS, width=8, max_length=4, dropout=0.5)
    with torch.no_grad():
        network.items.weight.normal_()
    return Rescorer(network, "of these items")


def test_probabilities_of_all_items_add_up_to_one(rescorer: Rescorer) -> None:
    dense = rescorer.log_probs(HISTORIES)
    assert dense.shape == (3, ITEMS)
    np.testing.assert_allclose(np.exp(dense).sum(axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(np.diff(dense - rescorer.network.scores(HISTORIES), axis=1), 0.0, atol=1e-5)


def test_items_that_came_later_are_passed_over_in_a_history(rescorer: Rescorer) -> None:
    with_new = [np.append(history, ITEMS + 2) for history in HISTORIES]
    np.testing.assert_array_equal(rescorer.log_probs(with_new), rescorer.log_probs(HISTORIES))


def test_the_best_known_items_obey_both_lists() -> None:
    dense = np.log(np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]], dtype=np.float32))
    assert [set(rows.tolist()) for rows in best_known(dense, 2)] == [{0, 1}, {2, 3}]
    allowed = [np.array([1, 3, 9]), None]
    excluded = [None, np.array([3, 9])]
    assert [set(rows.tolist()) for rows in best_known(dense, 2, allowed, excluded)] == [{1, 3}, {1, 2}]
    assert [set(rows.tolist()) for rows in best_known(dense, 9)] == [{0, 1, 2, 3}] * 2
    nobody = [np.array([], dtype=np.int64)] * 2
    assert [len(rows) for rows in best_known(dense, 2, nobody)] == [0, 0]


def test_scores_are_mixed_by_share_and_of_an_unknown_item_it_has_no_opinion() -> None:
    own = [np.array([-1.0, -2.0, -3.0], dtype=np.float32)]
    dense = np.array([[-4.0, -8.0]], dtype=np.float32)
    both = Both([np.array([0, 1, 5])], own, dense)
    np.testing.assert_array_equal(both.mixed(0.0)[0], own[0])
    unknown = -np.log(2)  # one of the two that it knows
    np.testing.assert_allclose(both.mixed(0.25)[0], [-1.75, -3.5, 0.75 * -3.0 + 0.25 * unknown], rtol=1e-6)
    np.testing.assert_allclose(both.mixed(1.0)[0], [-4.0, -8.0, unknown], rtol=1e-6)


def test_it_answers_the_same_after_saving_and_loading(rescorer: Rescorer, tmp_path: Path) -> None:
    rescorer.save(tmp_path)
    state = torch.get_rng_state()
    again = Rescorer.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert again.items_sha256 == "of these items"
    np.testing.assert_array_equal(again.log_probs(HISTORIES), rescorer.log_probs(HISTORIES))
    first = (tmp_path / FILE_NAME).read_bytes()
    again.save(tmp_path)
    assert (tmp_path / FILE_NAME).read_bytes() == first


def test_files_that_are_none_are_refused(rescorer: Rescorer, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="this is missing"):
        Rescorer.load(tmp_path)
    path = rescorer.save(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match="not a readable safetensors file"):
        Rescorer.load(tmp_path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ArtifactError, match="not of a dense model"):
        Rescorer.load(tmp_path)
    header = {"format": "llm_itemtok.rescorer", "format_version": 1, "num_items": ITEMS + 1, "width": 8}
    for also, message in (
        ({"format_version": 99}, "format 99"),
        ({}, "belong together"),
        ({"layers": 2, "heads": 2, "max_length": 4, "items_sha256": ""}, "belong together"),
        ({"layers": 10**12, "heads": 2, "max_length": 4}, "belong together: 1,000,000,000,000 layers"),
        ({"layers": 2, "heads": 2, "max_length": 4, "num_items": 10**14}, "belong together"),
    ):
        tensors = dict(rescorer.network.state_dict())
        save_file(tensors, path, metadata={"rescorer": json.dumps({**header, **also})})
        with pytest.raises(ArtifactError, match=message):
            Rescorer.load(tmp_path)
