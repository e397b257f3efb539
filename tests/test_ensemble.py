"""Several models answer as one: by the mean of their exact log-probabilities, over what any of them found."""

import json
from pathlib import Path

import numpy as np
import pytest

from llm_itemtok.cli import main
from llm_itemtok.data.splits import Cases
from llm_itemtok.ensemble import Ensemble, load
from llm_itemtok.errors import ArtifactError
from llm_itemtok.evaluation.metrics import ranks_from_scores
from tests.recursive import recursive_model
from tests.test_recommender import HISTORIES, IDS, made_of, merged
from tests.tiny import tiny_codes


def unlike() -> Ensemble:
    """A decoder, an encoder–decoder and a recursive head, with item codes of their own."""
    recursive = recursive_model(codes=tiny_codes(seed=2), seed=1)
    return Ensemble(
        [
            merged("llama"),
            merged("t5", codes=tiny_codes(sizes=(9, 8), seed=3), normaliser="children"),
            made_of(*recursive, reads=recursive[0].reads),
        ]
    )


def means(ensemble: Ensemble, history: list[str]) -> np.ndarray:
    return np.mean([member.score(history, IDS) for member in ensemble.members], axis=0)


def test_a_wide_beam_finds_what_the_mean_of_all_log_probabilities_says():
    ensemble = unlike()
    for history, items in zip(HISTORIES, ensemble.recommend_batch(HISTORIES, 60), strict=True):
        by_item = dict(zip(IDS, means(ensemble, history), strict=True))
        assert [item.item_id for item in items] == sorted(IDS, key=by_item.__getitem__, reverse=True)
        assert [item.score for item in items] == pytest.approx([by_item[item.item_id] for item in items], abs=1e-4)
        assert ensemble.score(history, IDS) == pytest.approx(list(by_item.values()), abs=1e-4)


def test_what_one_member_finds_alone_is_scored_by_all():
    # With one beam each, the members offer three items at most; each gets the mean, whoever found it.
    ensemble = unlike()
    ensemble = Ensemble([member.with_generation(beam=1) for member in ensemble.members])
    for history in HISTORIES:
        offered = {member.recommend(history, 1)[0].item_id for member in ensemble.members}
        best = ensemble.recommend(history, 1)[0]
        by_item = dict(zip(IDS, means(ensemble, history), strict=True))
        assert best.item_id == max(offered, key=by_item.__getitem__)
        assert best.score == pytest.approx(by_item[best.item_id], abs=1e-4)


def test_a_model_beside_itself_answers_as_it_does_alone():
    alone = merged()
    together = Ensemble([alone, alone])
    for one, two in zip(alone.recommend_batch(HISTORIES, 12), together.recommend_batch(HISTORIES, 12), strict=True):
        assert [item.item_id for item in one] == [item.item_id for item in two]
        assert [item.score for item in one] == pytest.approx([item.score for item in two], abs=1e-4)


def test_lists_hold_for_all_members():
    ensemble = unlike()
    allowed, denied = IDS[10:20], IDS[15:60]
    items = ensemble.recommend(HISTORIES[0], 20, allow=allowed, deny=denied)
    assert sorted(item.item_id for item in items) == IDS[10:15]
    assert ensemble.recommend(HISTORIES[0], 5, allow=[]) == []


@pytest.mark.parametrize("mask_seen", [False, True])
def test_ranks_are_those_of_the_whole_catalogue(mask_seen):
    members = [member.with_generation(beam=60, mask_seen=mask_seen) for member in unlike().members]
    ensemble = Ensemble(members)
    histories = [np.array([3, 7, 3]), np.array([5]), np.array([1, 2, 8, 9])]
    cases = Cases(
        users=("a", "b", "c"),
        offsets=np.array([0, 3, 4, 8]),
        items=np.concatenate(histories),
        targets=np.array([7, 30, 44]),
        ties=np.zeros(3, dtype=bool),
    )
    ranking = ensemble.rank(cases, batch_size=2)
    scores = np.stack([means(ensemble, [IDS[row] for row in history]) for history in histories])
    seen = np.stack([np.isin(np.arange(len(IDS)), history) for history in histories])
    assert ranking.ranks.tolist() == ranks_from_scores(scores, cases.targets, seen if mask_seen else None).tolist()
    assert ranking.decoder == "encoder-decoder tree+recursive+tree"


def test_models_that_do_not_go_together_are_refused():
    alone = merged()
    with pytest.raises(ArtifactError, match="at least 2 models, was: 1"):
        Ensemble([alone])
    with pytest.raises(ArtifactError, match="model 1 and model 3 differ: 60 and 50 items, 50 in both"):
        Ensemble([alone, alone, merged(codes=tiny_codes(num_items=50))])
    with pytest.raises(ArtifactError, match="model 1 has False and model 2 has True"):
        Ensemble([alone, alone.with_generation(mask_seen=True)])


def test_the_command_line_asks_models_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, member in zip("ab", unlike().members[:2], strict=True):
        member.save_pretrained(tmp_path / name)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    expected = [item.item_id for item in load([a, b]).recommend(["item-3"], 4)]
    capsys.readouterr()
    (tmp_path / "history.txt").write_text("item-3\n", encoding="utf-8")
    assert main(["recommend", a, "--with", b, "--history", f"@{tmp_path / 'history.txt'}", "-k", "4", "--json"]) == 0
    assert [item["item_id"] for item in json.loads(capsys.readouterr().out)["items"]] == expected
