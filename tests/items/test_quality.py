"""The quality report: numbers by hand, and a verdict that names the fault."""

import json
import math

import numpy as np
import pytest
import torch

from llm_itemtok.errors import DataError
from llm_itemtok.items import quality as module
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.collisions import extra_level
from llm_itemtok.items.findings import findings
from llm_itemtok.items.quality import estimated_errors, figures_table, quality, reconstruction_error, vector_pairs
from llm_itemtok.items.random_codes import RandomCodes
from llm_itemtok.items.residual_kmeans import ResidualKMeans, ResidualKMeansQuantizer


def grouped(num=160, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(8, 6))
    return (centres[np.arange(num) % 8] + 0.1 * rng.normal(size=(num, 6))).astype(np.float32)


def test_level_numbers_by_hand():
    """Level 0 is used 2, 1, 1, 0: entropy 0.5 * 1 + 2 * 0.25 * 2 = 1.5 bits."""
    report = quality(ItemCodes([[0, 0], [0, 0], [1, 0], [2, 0]], (4, 1)))
    first, second = report["levels"]
    assert first == {
        "name": "level-0", "size": 4, "used": 3, "dead": 1, "usage": 0.75, "entropy_bits": 1.5,
        "perplexity": pytest.approx(2**1.5), "largest_prefix": 2, "counts_only": False,
    }  # fmt: skip
    assert (second["entropy_bits"], second["perplexity"], second["usage"]) == (0.0, 1.0, 1.0)
    assert math.copysign(1, second["entropy_bits"]) == 1
    assert report["collision_rate"] == 0.5
    assert not report["unique"]


def test_collision_rate_is_the_one_before_resolution():
    codes = extra_level(ItemCodes([[0], [0], [1], [2]], (4,)))
    report = quality(codes)
    assert report["collision_rate"] == 0.5
    assert report["unique"]
    assert [level["counts_only"] for level in report["levels"]] == [False, True]


def test_what_an_update_has_moved_is_counted_anew_where_a_level_counts():
    """Its own rate is that of the few items that wanted one code, and says nothing of the level that counts."""
    before = extra_level(ItemCodes([[0], [0], [1], [2]], (4,)))
    told = {"collisions": {**before.provenance["collisions"], "collision_rate_before": 0.0}}
    moved = ItemCodes([[0, 0], [2, 1], [2, 2], [2, 0]], before.sizes, provenance=told)
    report = quality(moved)
    assert report["collision_rate"] == 0.75
    assert "idle level" not in [finding.rule for finding in findings(report, {})]


def test_neighbours_and_chance_by_hand():
    """Two pairs of opposite directions: with one neighbour looked up each, all share; 2 of 6 pairs share by chance."""
    vectors = np.array([[1, 0], [1, 0.1], [-1, 0], [-1, 0.1]], dtype=np.float32)
    report = quality(ItemCodes([[0], [0], [1], [1]], (2,)), vectors)
    # All three other items are neighbours here, one of them in the same group.
    assert report["neighbours"] == [{"depth": 1, "share": pytest.approx(1 / 3), "chance": pytest.approx(1 / 3)}]


def test_reconstruction_error_by_hand():
    """0 and 4 around the mean 2 have squared deviations 8; rebuilt as 0 and 3 they are off by 1: an eighth."""
    quantizer = ResidualKMeansQuantizer(levels=1, codebook_size=2, dimensions=1)
    quantizer.codebooks.data = torch.tensor([[[0.0], [3.0]]])
    vectors = np.array([[0.0], [4.0]], dtype=np.float32)
    codes = ItemCodes([[0], [1]], (2,))
    assert quality(codes, vectors, quantizer)["reconstruction_error"] == pytest.approx(1 / 8)
    assert quality(extra_level(codes), vectors, quantizer)["reconstruction_error"] == pytest.approx(1 / 8)


def test_learned_codes_keep_neighbours_together_and_random_ones_do_not():
    learned = quality(ResidualKMeans(levels=2, codebook_size=8).fit(grouped()), grouped())
    random = quality(RandomCodes(levels=2, codebook_size=16).fit(grouped()), grouped())
    assert learned["neighbours"][0]["share"] > 0.9
    assert random["neighbours"][0]["share"] < 2 * random["neighbours"][0]["chance"]
    assert "prefixes mean little" in random["verdict"]


def test_the_verdict_names_collapse_dead_codewords_and_collisions():
    collapsed = ItemCodes([[0, 0]] * 50 + [[1, word] for word in range(8)], (8, 16))
    verdict = quality(collapsed)["verdict"]
    assert "collapsed: level-0 is used as if it had 1 of its 8 codewords" in verdict
    assert "8 of the 16 codewords of level-1 stand for no item" in verdict
    assert "86.2% of the items shared their code" in verdict
    assert "not unique" in verdict


def test_the_verdict_names_a_deeper_level_on_which_items_crowd():
    crowded = ItemCodes([[row % 8, 0 if row % 64 < 56 else row % 8] for row in range(512)], (8, 8))
    assert "crowded: level-1 is used as if it had 2 of its 8 codewords" in quality(crowded)["verdict"]


def test_the_verdict_is_the_doctors():
    """One set of thresholds: what the one finds in a table, the other says."""
    crowded = ItemCodes([[row % 8, 0 if row % 64 < 56 else row % 8] for row in range(512)], (8, 8))
    report = quality(crowded)
    assert all(f"{found.rule}: {found.what}; {found.change}" in report["verdict"] for found in findings(report, {}))


def test_neighbours_looked_for_block_by_block_are_the_same(monkeypatch):
    vectors = grouped(300)
    items, neighbours = vector_pairs(vectors)
    for columns in (7, 100, 299):
        monkeypatch.setattr(module, "COLUMNS", columns)
        for found, expected in zip(vector_pairs(vectors), (items, neighbours), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_neighbours_that_are_known_are_not_looked_for_again():
    codes = ResidualKMeans(levels=2, codebook_size=8).fit(grouped())
    assert quality(codes, grouped(), near=vector_pairs(grouped())) == quality(codes, grouped())
    for other, share in ((8, 1.0), (1, 0.0)):  # of the group of item 0, and of another
        pairs = (np.array([0]), np.array([other]))
        assert quality(codes, grouped(), near=pairs)["neighbours"][0]["share"] == share


def test_codes_without_a_quantizer_are_judged_by_estimated_codebooks():
    """For residual k-means at its optimum, those are its own."""
    tokenizer = ResidualKMeans(levels=2, codebook_size=8)
    codes = tokenizer.fit(grouped())
    before, after = estimated_errors(codes, extra_level(codes), grouped())
    assert before == after == pytest.approx(reconstruction_error(codes, grouped(), tokenizer.quantizer), rel=1e-3)
    moved = ItemCodes((codes.table + 1) % 8, codes.sizes)
    assert estimated_errors(codes, moved, grouped())[1] > 1.0 > before
    assert estimated_errors(codes, codes, np.ones((160, 3), np.float32)) == (0.0, 0.0)


def test_the_verdict_on_even_and_unique_codes_is_good():
    codes = RandomCodes(levels=2, codebook_size=4).deal(16)
    assert quality(codes)["verdict"].startswith("Good")
    assert quality(extra_level(codes))["verdict"].startswith("Look at: idle level")


def test_the_report_is_plain_json_and_prints_as_a_table():
    tokenizer = ResidualKMeans(levels=2, codebook_size=8)
    report = quality(extra_level(tokenizer.fit(grouped())), grouped(), tokenizer.quantizer)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    lines = figures_table(report).splitlines()
    assert lines[0].split()[:4] == ["level", "size", "used", "usage"]
    assert [line.split()[0] for line in lines[1:4]] == ["level-0", "level-1", "extra"]
    assert len({len(line) for line in lines[:4]}) == 1
    assert "collision rate before resolution" in lines[6]


def test_a_catalogue_of_one_item_has_a_report():
    report = quality(ItemCodes([[0]], (4,)), np.ones((1, 2), np.float32))
    assert report["neighbours"] == []


def test_vectors_and_quantizers_that_do_not_fit_are_refused():
    codes = ItemCodes([[0], [1]], (2,))
    with pytest.raises(DataError, match="one vector a code, 2 of them, was: 3"):
        quality(codes, np.ones((3, 2), np.float32))
    quantizer = ResidualKMeansQuantizer(levels=2, codebook_size=2, dimensions=2)
    with pytest.raises(DataError, match="same levels"):
        quality(codes, np.eye(2, dtype=np.float32), quantizer)
