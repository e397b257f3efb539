"""Baselines fit what is in training, are tuned on validation, never look elsewhere, and are measured once."""

import dataclasses
import json
from functools import partial

import numpy as np
import pytest
import torch

from llm_itemtok import sasrec
from llm_itemtok.data.splits import Cases, Split
from llm_itemtok.errors import RecipeError
from llm_itemtok.evaluation import baselines
from llm_itemtok.evaluation.baselines import (
    BASELINES,
    ItemKNN,
    Markov,
    Popularity,
    evaluate_baselines,
    fingerprint,
    rank_targets,
    validated,
)
from llm_itemtok.evaluation.metrics import METRIC_KEYS, metrics_from_ranks
from llm_itemtok.evaluation.neighbours import nearest

ALL = baselines._Candidates(mask_seen=False, repeats=True)


def make_cases(histories, targets):
    offsets = np.cumsum([0, *map(len, histories)])
    return Cases(
        users=tuple(f"u{i}" for i in range(len(targets))),
        offsets=offsets.astype(np.int64),
        items=np.array([item for history in histories for item in history], dtype=np.int64),
        targets=np.array(targets, dtype=np.int64),
        ties=np.zeros(len(targets), dtype=bool),
    )


def make_split(train, test=((), ()), num_items=5, validation=(([0],), (1,))):
    offsets = np.cumsum([0, *map(len, train)])
    return Split(
        kind="leave-last-out",
        train_users=tuple(f"u{i}" for i in range(len(train))),
        train_offsets=offsets.astype(np.int64),
        train_items=np.array([item for sequence in train for item in sequence], dtype=np.int64),
        validation=make_cases(*validation),
        test=make_cases(*test),
        counts={},
        num_items=num_items,
    )


def histories(*rows):
    return [np.array(row, dtype=np.int64) for row in rows]


def test_popularity_is_the_count_in_training():
    scores = Popularity.fit(make_split([[0, 1], [1, 1, 2]])).scores(histories([4], []))

    assert scores.dtype == np.float32
    assert scores.tolist() == [[1, 3, 1, 0, 0]] * 2


def test_markov_counts_neighbours_within_a_user_only():
    """0→1 twice, 1→2 once, 2→2 once; the pair 2→0 where the second user begins is no step of anyone."""
    markov = Markov.fit(make_split([[0, 1, 2, 2], [0, 1]]), settle_by_popularity=False)

    scores = markov.scores(histories([3, 0], [1], [2], [2, 1, 4], []))

    assert scores.dtype == np.float32
    assert scores.tolist() == [[0, 2, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 0, 0], [0] * 5, [0] * 5]


def test_markov_bears_users_without_training_items():
    """Users of one or no item have no step, wherever they stand, and join nothing with their neighbours."""
    markov = Markov.fit(make_split([[], [3], [], [0, 1], [2], []]), settle_by_popularity=False)

    assert markov.transitions.toarray().sum() == 1
    assert markov.scores(histories([0])).tolist() == [[0, 1, 0, 0, 0]]


def test_markov_of_an_empty_log_knows_nothing():
    assert Markov.fit(make_split([[]])).scores(histories([0], [1])).tolist() == [[0] * 5] * 2


def test_a_bare_chain_that_does_not_know_the_last_item_ranks_in_the_middle():
    """All five items are tied at 0: rank 1 + 4/2."""
    markov = Markov.fit(make_split([[0, 1]]), settle_by_popularity=False)

    assert rank_targets(markov, make_cases([[4]], [2]), mask_seen=False).tolist() == [3.0]


def test_popularity_settles_ties_of_the_chain_and_nothing_else():
    """After 0 came 1 twice, 2 and 3 once each; 3 is the most popular item, then 0. So 1, 3, 2, then 0, then 4."""
    train = [[0, 1], [0, 1], [0, 2], [0, 3], *[[3]] * 9]
    markov = Markov.fit(make_split(train))

    ranks = rank_targets(markov, make_cases([[0]] * 5, [1, 3, 2, 0, 4]), mask_seen=False)

    assert ranks.tolist() == [1, 2, 3, 4, 5]


def test_a_chain_that_does_not_know_the_last_item_falls_back_to_popularity():
    split = make_split([[0, 1], [1, 2]])
    cases = make_cases([[4], []] * 5, np.repeat(range(5), 2))

    ranks = rank_targets(Markov.fit(split), cases, mask_seen=False)

    assert ranks.tolist() == rank_targets(Popularity.fit(split), cases, mask_seen=False).tolist()


def test_masking_the_seen_moves_the_target_up_and_never_hides_it():
    """Counts 3, 2, 1, 0, 0. Target 2 stands third, first once 0 and 1 are masked; a seen target is still ranked."""
    popularity = Popularity(np.array([3, 2, 1, 0, 0]))
    cases = make_cases([[0, 1], [2]], [2, 2])

    assert rank_targets(popularity, cases, mask_seen=False).tolist() == [3.0, 3.0]
    assert rank_targets(popularity, cases, mask_seen=True).tolist() == [1.0, 3.0]


def test_the_batch_does_not_change_ranks():
    rng = np.random.default_rng(0)
    markov = Markov.fit(make_split([rng.integers(0, 30, size=20) for _ in range(20)], num_items=30))
    cases = make_cases([rng.integers(0, 30, size=rng.integers(0, 6)) for _ in range(23)], rng.integers(0, 30, size=23))

    whole = rank_targets(markov, cases, mask_seen=True)

    assert whole.tolist() == rank_targets(markov, cases, mask_seen=True, batch=4).tolist()
    assert len(set(whole)) > 5


def test_no_cases_have_no_ranks():
    assert rank_targets(Popularity(np.ones(3)), make_cases([], []), mask_seen=True).shape == (0,)


def test_likeness_is_the_cosine_of_the_sets_of_users():
    """Item 0 has 3 users, 1 has 2, 2 has 1, 3 has 1: 0 and 1 share two users, 0 and 2 one, 1 and 2 one, 3 none.

    That a user came back to an item, or in which order, does not count.
    """
    knn = ItemKNN.fit(make_split([[0, 1, 0], [2, 1, 0], [0], [3]]))

    expected = np.zeros((5, 5))
    expected[0, 1] = expected[1, 0] = 2 / np.sqrt(6)
    expected[0, 2] = expected[2, 0] = 1 / np.sqrt(3)
    expected[1, 2] = expected[2, 1] = 1 / np.sqrt(2)
    np.testing.assert_allclose(knn.similarity.toarray(), expected, rtol=1e-6)
    np.testing.assert_allclose(
        ItemKNN.fit(make_split([[0, 1, 0], [2, 1, 0], [0], [3]]), shrink=2).similarity.toarray()[0, :3],
        [0, 2 / (np.sqrt(6) + 2), 1 / (np.sqrt(3) + 2)],
        rtol=1e-6,
    )


def test_an_item_speaks_for_its_nearest_only():
    """The cut is the same whether made at once or from longer lists, and keeps the popular one of equal neighbours."""
    split = make_split([[0, 1], [0, 2], [2], [0, 3], [0, 3]], num_items=4)

    one = ItemKNN.fit(split, neighbours=1).similarity
    two = ItemKNN.fit(split, neighbours=2).similarity

    assert one[[0]].nonzero()[1].tolist() == [3]
    assert sorted(two[[0]].nonzero()[1].tolist()) == [1, 3]  # 1/sqrt(4) beats 1/sqrt(8)
    assert (nearest(two, 1).toarray() == one.toarray()).all()


def test_newer_items_of_a_history_weigh_more():
    """0 is like 1 alone and 2 is like 3 alone, both fully; a step back halves the weight."""
    split = make_split([[0, 1], [2, 3]], num_items=5)
    knn = ItemKNN.fit(split, decay=0.5)

    scores = knn.scores(histories([0, 2], [2, 4, 0], [4], []))

    np.testing.assert_allclose(scores, [[0, 0.5, 0, 1, 0], [0, 1, 0, 0.25, 0], [0] * 5, [0] * 5], atol=1e-4)
    assert scores.dtype == np.float32


def test_neighbours_without_a_say_leave_it_to_popularity():
    """An unknown item, or no history, tells nothing: what is left are training counts."""
    split = make_split([[0, 1], [1, 2]])
    cases = make_cases([[4], []] * 5, np.repeat(range(5), 2))

    ranks = rank_targets(ItemKNN.fit(split), cases, mask_seen=False)

    assert ranks.tolist() == rank_targets(Popularity.fit(split), cases, mask_seen=False).tolist()


def test_without_repeats_all_others_stand_before_the_history():
    scores = ItemKNN.fit(make_split([[0, 1], [0, 1, 2]]), repeats=False).scores(histories([0, 1], [1], []))

    assert set(scores[0].argsort()[:2].tolist()) == {0, 1}
    assert scores[1].argmin() == 1
    assert scores[2].min() >= 0


@pytest.mark.parametrize("repeats", [True, False])
def test_scores_of_neighbours_do_not_depend_on_the_company(repeats):
    """Neither on how long the other histories are; and without repeats the seen keep the order that they had."""
    rng = np.random.default_rng(0)
    split = make_split([rng.integers(0, 30, size=12) for _ in range(40)], num_items=30)
    rows = [rng.integers(0, 30, size=length) for length in (0, 1, 3, 8, 20, 5000)]

    together = ItemKNN.fit(split, repeats=repeats).scores(rows)

    bare = ItemKNN.fit(split).scores(rows)
    for row, scores, unmoved in zip(rows, together, bare, strict=True):
        assert scores.tolist() == ItemKNN.fit(split, repeats=repeats).scores([row])[0].tolist()
        seen = np.unique(row)
        assert (scores[seen].argsort(kind="stable") == unmoved[seen].argsort(kind="stable")).all()


def test_seen_items_that_are_hardly_alike_are_told_apart():
    """0 and 1 stand by their likeness, the newer one's neighbour first; 2 and 3 have no neighbours and stand by
    popularity; 4 has nothing."""
    split = make_split([[0, 1], [0, 1], [0], *[[2]] * 3, *[[3]] * 100])
    scores = ItemKNN.fit(split, repeats=False).scores(histories([4, 3, 2, 0, 1]))[0]

    assert (-scores).argsort().tolist() == [0, 1, 3, 2, 4]
    assert len(set(scores.tolist())) == 5
    assert np.isfinite(scores).all()


def test_neighbours_are_tuned_on_validation_and_on_nothing_else():
    """Users go back to a or on to what is new: the validation cases alone say which, and test cases say nothing."""
    train = [[0, 1], [1, 0], [2, 3], [3, 2]] * 5 + [[0, 4], [3, 4]]
    seen = (([0, 1], [3, 2]), (0, 3))
    new = (([0, 1], [3, 2]), (4, 4))

    settings = {}
    for name, validation in (("seen", seen), ("new", new)):
        for test in (seen, new):
            split = make_split(train, test=test, validation=validation)
            settings.setdefault(name, []).append(
                ItemKNN.tune(split, partial(validated, mask_seen=False), lambda _: None)[1]
            )

    assert settings["seen"][0] == settings["seen"][1]
    assert settings["new"][0] == settings["new"][1]
    assert set(settings["seen"][0]) == set(ItemKNN.GRID)
    assert settings["seen"][0]["repeats"]
    assert not settings["new"][0]["repeats"]


@pytest.fixture
def quick_sasrec(monkeypatch):
    """Two settings that differ in what they learn, on networks that train in a moment."""
    small = {"width": 8, "layers": 1, "heads": 1, "max_length": 8, "batch_targets": 32, "steps": 30, "every": 15}
    monkeypatch.setattr(baselines, "SASREC_SETTINGS", ({**small, "dropout": 0.9}, {**small, "dropout": 0.0}))


def walks(num_users=60, num_items=10):
    """A split by leave-last-out of users who walk around a circle of items."""
    paths = [[(start + step) % num_items for step in range(5)] for start in np.arange(num_users) % num_items]
    return make_split(
        [path[:3] for path in paths],
        validation=([path[:3] for path in paths], [path[3] for path in paths]),
        test=([path[:4] for path in paths], [path[4] for path in paths]),
        num_items=num_items,
    )


def test_sasrec_is_chosen_on_validation_and_never_on_test(quick_sasrec):
    """Other test targets leave the network, and so the ranks of all other cases, as they were."""
    split = walks()
    moved = dataclasses.replace(split, test=dataclasses.replace(split.test, targets=(split.test.targets + 5) % 10))

    one, other = (
        evaluate_baselines(["sasrec"], part, part.test, mask_seen=False, seed=0)["sasrec"] for part in (split, moved)
    )

    assert one["validation"] == other["validation"]
    assert one["settings"] == other["settings"]
    assert one["settings"]["dropout"] == 0.0
    assert one["test"] != other["test"]


def test_sasrec_is_trained_where_it_is_asked_to_be(quick_sasrec, monkeypatch):
    """That there is a GPU is no reason to take it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    split = walks()

    scorer, _ = BASELINES["sasrec"].fit(split, partial(validated, mask_seen=False), "cpu", lambda _: None)

    assert isinstance(scorer, sasrec.SASRec)
    assert scorer.items.weight.device.type == "cpu"
    keys = {baselines._key("sasrec", split, split.test, ALL, device) for device in ("cpu", "cuda:0")}
    assert len(keys) == 2


@pytest.mark.gpu
def test_sasrec_is_measured_on_a_gpu_and_kept_apart(tmp_path, quick_sasrec):
    split = walks()
    for device in ("cpu", "cuda"):
        assert measure(split, tmp_path, "sasrec", device=device)["test"]["recall@10"] > 0

    assert len(kept_files(tmp_path)) == 2


def test_evaluation_returns_the_part_of_metrics_json():
    """The chain 0→1 is right about both users; popularity has 0 first in a tie with 1 at two, so rank 1.5."""
    split = make_split([[0, 1], [0, 1]], test=([[0], [0]], [1, 1]))

    results = evaluate_baselines(["markov", "popularity"], split, split.test, mask_seen=False, seed=3)

    assert list(results) == ["markov", "popularity"]
    assert results["markov"]["test"]["recall@1"] == 1
    assert results["popularity"]["test"]["recall@1"] == 0
    assert results["popularity"]["test"]["mrr@20"] == pytest.approx(1 / 1.5)
    for name, result in results.items():
        assert result["fingerprint"] == fingerprint(name)
        assert tuple(result["test"]) == tuple(result["ci95"]) == tuple(result["validation"]) == METRIC_KEYS
        assert result["settings"] == {}
        assert result["segments"] == {}


def test_baselines_do_not_see_validation_or_test_targets():
    """Only the training part is fitted: moving targets about changes no score."""
    train = [[0, 1], [1, 2]]
    one, other = (make_split(train, test=([[0]], [at]), validation=([[0]], [7 - at])) for at in (3, 4))

    for fit in (Popularity.fit, Markov.fit, ItemKNN.fit):
        assert fit(one).scores(histories([0], [1])).tolist() == fit(other).scores(histories([0], [1])).tolist()


def test_an_unknown_baseline_is_named_with_those_there_are():
    with pytest.raises(RecipeError, match=r"takes popularity, markov, item-knn, sasrec, was: popularty"):
        evaluate_baselines(["markov", "popularty"], make_split([[0]]), make_cases([], []), mask_seen=False, seed=0)


def test_segments_are_measured_as_the_models_are():
    split = make_split([[0, 1], [0, 1]], test=([[0], [2]], [1, 4]))
    masks = {"first": np.array([True, False]), "none": np.array([False, False])}

    segments = evaluate_baselines(["markov"], split, split.test, False, 0, masks=masks)["markov"]["segments"]

    assert segments["first"]["users"] == segments["first"]["recall@1"] == 1
    assert segments["none"] == {"users": 0}


def there_and_back(again):
    """Training goes round a circle of ten items, mostly backwards; cases go forwards, and `again` says how they end."""
    walks = [[(start + step) % 10 for step in range(6)] for start in range(10)]
    cases = [walk[:5] for walk in walks], [walk[3] if again else walk[5] for walk in walks]
    return make_split([*walks, *(walk[::-1] for walk in walks * 2)], cases, 10, cases)


@pytest.mark.parametrize("again", [True, False])
def test_where_the_model_may_leave_out_the_history_a_baseline_does_if_that_validates_better(again):
    split = there_and_back(again)
    ours = {
        repeats: evaluate_baselines(["markov", "item-knn"], split, split.test, False, 0, repeats=repeats)
        for repeats in (True, False)
    }
    assert "repeats" not in ours[True]["markov"]["settings"]
    assert ours[False]["markov"]["settings"] == {"repeats": again}
    better = max(
        (rank_targets(Markov.fit(split), split.test, False, repeats) for repeats in (True, False)),
        key=lambda ranks: -ranks.mean(),
    )
    assert ours[False]["markov"]["test"] == metrics_from_ranks(better)
    assert ours[False]["item-knn"]["settings"] == ours[True]["item-knn"]["settings"]  # which choose that anyway


def test_without_repeats_a_target_of_the_history_stands_behind_all_others():
    cases = make_cases([[0, 1], [0, 1]], [1, 2])
    popularity = Popularity(np.array([5, 9, 1, 1, 0]))
    assert rank_targets(popularity, cases, mask_seen=False).tolist() == [1, 3.5]
    assert rank_targets(popularity, cases, mask_seen=False, repeats=False).tolist() == [4.5, 1.5]
    assert rank_targets(popularity, cases, mask_seen=True).tolist() == [1, 1.5]


# What is kept


def measure(split, cache, name="item-knn", mask_seen=False, seed=0, **extra):
    return evaluate_baselines([name], split, split.test, mask_seen, seed, cache=cache, **extra)[name]


def kept_files(folder):
    return list(folder.glob("*/*/ranks.json"))


def test_a_baseline_is_measured_once(tmp_path, quick_sasrec):
    """The second answer is the first in all its parts, the seconds it took included, and nothing is written."""
    split = walks()
    for name in ("item-knn", "sasrec", "popularity"):
        lines = []
        first = measure(split, tmp_path / name, name, log=lines.append)
        (file,) = kept_files(tmp_path / name)
        written, said = file.stat().st_mtime_ns, len(lines)

        assert measure(split, tmp_path / name, name, log=lines.append) == first
        assert file.stat().st_mtime_ns == written
        assert len(lines) == said > 0
        assert measure(split, None, name)["test"] == first["test"]


def test_intervals_and_segments_are_made_anew_from_what_is_kept(tmp_path):
    split = walks()
    first = measure(split, tmp_path)
    (file,) = kept_files(tmp_path)
    written = file.stat().st_mtime_ns

    other = measure(split, tmp_path, seed=1, masks={"all": np.ones(60, dtype=bool)})

    assert other["segments"]["all"] == {"users": 60, **first["test"]}
    assert file.stat().st_mtime_ns == written


def test_anything_that_decides_the_ranks_asks_for_a_new_measurement(tmp_path):
    """Training, either kind of case, masking, and the version of the code."""
    split = walks()
    shifted = {
        part: dataclasses.replace(getattr(split, part), targets=(getattr(split, part).targets + 1) % 10)
        for part in ("validation", "test")
    }
    measure(split, tmp_path)
    measure(dataclasses.replace(split, train_items=(split.train_items + 1) % 10), tmp_path)
    measure(dataclasses.replace(split, validation=shifted["validation"]), tmp_path)
    measure(dataclasses.replace(split, test=shifted["test"]), tmp_path)
    measure(split, tmp_path, mask_seen=True)
    measure(split, tmp_path, repeats=False)
    measure(dataclasses.replace(split, num_items=11), tmp_path)

    assert len(kept_files(tmp_path)) == 7


def newer_version(monkeypatch):
    newer = BASELINES["item-knn"]._replace(version=1000)
    monkeypatch.setattr(baselines, "BASELINES", {**BASELINES, "item-knn": newer})


def longer_grid(monkeypatch):
    monkeypatch.setattr(ItemKNN, "GRID", {**ItemKNN.GRID, "decay": (*ItemKNN.GRID["decay"], 0.9)})


def other_beginning(monkeypatch):
    """Settings are tried one after the other, so their order counts."""
    monkeypatch.setattr(ItemKNN, "GRID", dict(reversed(ItemKNN.GRID.items())))


def other_settings(monkeypatch):
    monkeypatch.setattr(baselines, "SASREC_SETTINGS", (*baselines.SASREC_SETTINGS, {"dropout": 0.2}))


def other_default_of_training(monkeypatch):
    monkeypatch.setitem(sasrec.fit.__kwdefaults__, "learning_rate", 1e-3)


def other_default_of_the_network(monkeypatch):
    monkeypatch.setitem(sasrec.SASRec.__init__.__kwdefaults__, "width", 128)


def other_default_of_the_chain(monkeypatch):
    monkeypatch.setitem(Markov.fit.__func__.__kwdefaults__, "settle_by_popularity", False)


def fewer_tuning_cases(monkeypatch):
    monkeypatch.setattr(baselines, "_TUNING_CASES", 100)


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (newer_version, ["item-knn"]),
        (longer_grid, ["item-knn"]),
        (other_beginning, ["item-knn"]),
        (other_settings, ["sasrec"]),
        (other_default_of_training, ["sasrec"]),
        (other_default_of_the_network, ["sasrec"]),
        (other_default_of_the_chain, ["markov"]),
        (fewer_tuning_cases, ["item-knn", "sasrec"]),
    ],
)
def test_a_fingerprint_tells_what_decides_its_baseline(monkeypatch, change, changed):
    """What was kept before such a change must not be taken for what would be measured now."""
    split = walks()

    def keys():
        return {name: (fingerprint(name), baselines._key(name, split, split.test, ALL, "cpu")) for name in BASELINES}

    before = keys()
    change(monkeypatch)
    after = keys()

    assert len({found for pair in before.values() for found in pair}) == 2 * len(BASELINES)
    for name in BASELINES:
        same = [one == other for one, other in zip(before[name], after[name], strict=True)]
        assert same == [name not in changed] * 2, name


def test_what_is_decided_otherwise_is_measured_anew(tmp_path, monkeypatch):
    """Settings that are tried no longer cannot come back out of the cache."""
    split = walks()
    measure(split, tmp_path)
    monkeypatch.setattr(ItemKNN, "GRID", {**ItemKNN.GRID, "decay": (0.25,)})
    result = measure(split, tmp_path)

    assert result["settings"]["decay"] == 0.25
    assert len(kept_files(tmp_path)) == 2


def test_what_is_no_longer_as_it_was_written_is_measured_again(tmp_path):
    split = walks()
    first = measure(split, tmp_path)
    (file,) = kept_files(tmp_path)
    written = file.read_text()
    file.write_text(written.replace("1.0", "2.0"))

    assert measure(split, tmp_path)["test"] == first["test"]
    assert json.loads(file.read_text())["test"] == json.loads(written)["test"]


def test_a_folder_that_cannot_be_written_is_said_and_does_no_harm(tmp_path):
    (tmp_path / "file").write_text("")
    lines = []

    result = measure(walks(), tmp_path / "file", log=lines.append)

    assert result["test"] == measure(walks(), None)["test"]
    assert sum("could not be written" in line for line in lines) == 1
