"""Which examples a step reads: each once an epoch on any number of processes, in an order that a resume finds again."""

import json

import pytest

from llm_itemtok.training.order import ORDER_FILE, own_share
from tests.process_pairs import run_alone_and_in_pair
from tests.training.order_runs import remembering
from tests.training.runs import weights
from tests.training.test_invariants import assert_close, without_times


def test_one_process_has_all_that_is_left():
    assert [own_share(examples, 8) for examples in (40, 41, 47)] == [8, 1, 7]


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
@pytest.mark.parametrize("saved", [3, 5, 7])
def test_a_run_resumed_anywhere_in_an_epoch_reads_what_the_straight_one_does(tmp_path, strategy, saved):
    """5 steps an epoch: in the first one, at its end, and in the second. Dropout uses random numbers up in between."""
    settings = {"strategy": strategy, "family": "llama", "batch": 8, "steps": 12, "every": saved}
    straight, read = remembering(tmp_path, **settings)
    straight.train()
    resumed, again = remembering(tmp_path, **settings)
    checkpoint = tmp_path / "checkpoints" / f"checkpoint-{saved}"
    assert (checkpoint / ORDER_FILE).is_file() == (strategy == "group_by_length")
    before = without_times(tmp_path)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert again.rows == read.rows[saved:]
    assert without_times(tmp_path) == before
    assert_close(weights(resumed), weights(straight), atol=0, rtol=0)


def test_an_order_by_length_is_another_in_each_epoch(tmp_path):
    trainer, objective = remembering(tmp_path, "group_by_length", "llama", 8, steps=10)
    trainer.train()
    epochs = [[row for step in objective.rows[part] for row in step] for part in (slice(5), slice(5, 10))]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])


@pytest.mark.slow
def test_two_processes_read_each_step_what_one_does_and_nothing_twice(tmp_path):
    """Of the 40 examples 8 are left for an epoch's last step, the first process's, or 16, of which it has 12."""
    pair = [tmp_path / "two", 4]
    run_alone_and_in_pair("tests.training.order_runs", [tmp_path / "one", 8], pair, pair)
    one, first, second = (
        json.loads((tmp_path / name).read_text(encoding="utf-8")) for name in ("one/0.json", "two/0.json", "two/1.json")
    )
    for kind, found in one.items():
        assert first[kind]["targets"] == second[kind]["targets"] == found["targets"], kind
        pairs = [sorted(here + there) for here, there in zip(first[kind]["rows"], second[kind]["rows"], strict=True)]
        steps = [sorted(rows) for rows in found["rows"]]
        shares = [[len(step) for step in process[kind]["rows"]] for process in (first, second)]
        assert shares == ([[16, 8] * 3, [16, 0] * 3] if kind.startswith("llama") else [[12, 12] * 3, [12, 4] * 3]), kind
        for epoch in range(3):
            read = pairs[2 * epoch] + pairs[2 * epoch + 1]
            assert sorted(read) == sorted(steps[2 * epoch] + steps[2 * epoch + 1]), kind
        # By length, a later epoch's order hangs on how many random numbers dropout has used, which differs.
        same = 1 if kind.endswith("group_by_length") else 3
        assert pairs[: 2 * same] == steps[: 2 * same], kind
