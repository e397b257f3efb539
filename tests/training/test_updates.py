"""Rounds of updates: what is refused leaves no trace, what is accepted is everywhere, and a kill changes nothing."""

import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from llm_itemtok.artifacts import UPDATES
from llm_itemtok.errors import ArtifactError
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.training.callbacks import read_log
from llm_itemtok.training.fresh_rows import refresh_rows
from llm_itemtok.training.late_binding import LateBinding
from llm_itemtok.training.updates import TRIAL_FILE, Proposal, Rules
from tests.tiny import KINDS, tiny_codes, tiny_item_model
from tests.training.runs import make_trainer, weights
from tests.training.test_invariants import assert_close, without_times
from tests.training.update_runs import Killed, KilledAt, Shuffle, make_updating, optimizer_state

EVERY_KIND = pytest.mark.parametrize("family", KINDS)
ADAM = {"optim": "adamw_torch", "learning_rate": 0.01, "weight_decay": 0.01}
GATED = Rules(rounds=2, gate="ndcg@10", adapt=3, patience=5)
OPEN = Rules(rounds=3, gate=None)
TIMES = ("pass_seconds", "training_seconds", "pass_share")


def rounds(folder):
    """Lines of the rounds, without what differs from machine to machine."""
    lines = [json.loads(line) for line in (folder / UPDATES).read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def versions(folder):
    """Every file of every version, byte by byte."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted((folder / "codes").rglob("*.*"))}


class Watch(TrainerCallback):
    """Copies of everything before and after each step."""

    def __init__(self, trainer):
        self.trainer, self.seen = trainer, {}
        trainer.callback_handler.callbacks.append(self)

    def on_step_end(self, args, state, control, **_):
        self.seen[state.global_step] = (weights(self.trainer), optimizer_state(self.trainer))


@EVERY_KIND
def test_without_rounds_the_training_is_that_of_fixed_codes_bit_for_bit(tmp_path, family):
    """Late binding, held codes and all: same weights, same log."""
    settings = {"family": family, "steps": 6, "every": 3, "dropout": 0.2, **ADAM}
    measure = lambda: {"ndcg@10": 0.5}  # noqa: E731
    fixed = make_trainer(tmp_path / "fixed", validate=measure, **settings)
    fixed.train()
    updating = make_updating(
        tmp_path / "updating", Shuffle(2), Rules(rounds=0, gate=None), validate=measure, **settings
    )
    updating.train()
    found = weights(updating)
    assert torch.equal(found.pop("item_codes"), torch.from_numpy(updating.model.vocab.codes.table.copy()))
    assert_close(found, weights(fixed), atol=0, rtol=0)
    assert without_times(tmp_path / "updating") == without_times(tmp_path / "fixed")
    assert rounds(tmp_path / "updating") == []


@EVERY_KIND
def test_a_harmful_proposal_is_refused_told_and_rolled_back_bit_for_bit(tmp_path, family):
    """Weights, codes and what the optimiser holds; the schedule and the count of steps go on."""
    said = []
    rules = Rules(rounds=1, gate="ndcg@10", adapt=2)
    trainer = make_updating(tmp_path, Shuffle(12), rules, family=family, steps=14, say=said.append,
                            **ADAM | {"lr_scheduler_type": "linear"})  # fmt: skip
    watch, before = Watch(trainer), trainer.model.vocab.codes
    trainer.train()
    (line,) = rounds(tmp_path)
    assert (line["step"], line["decided"], line["accepted"], line["version"]) == (12, 14, False, 0)
    assert (line["moves"], line["share"], line["collisions"]) == (60, 1.0, 0.25)
    assert line["after"] < line["before"]
    assert_close(watch.seen[14][0], watch.seen[12][0], atol=0, rtol=0)
    assert_close(watch.seen[14][1], watch.seen[12][1], atol=0, rtol=0)
    assert not torch.equal(watch.seen[13][0]["item_codes"], watch.seen[12][0]["item_codes"])
    assert trainer.model.vocab.codes == before
    assert [path.name for path in (tmp_path / "codes").iterdir()] == ["v0"]
    assert trainer.lr_scheduler.last_epoch == trainer.state.global_step == 14
    assert "refused and rolled back" in said[1]


@EVERY_KIND
def test_what_is_accepted_is_a_version_with_a_trace_and_the_next_batch_has_it(tmp_path, family):
    trainer = make_updating(
        tmp_path, Shuffle(2, 0.1), OPEN, family=family, steps=5, every=1,
        validate=lambda: {"ndcg@10": trainer.state.global_step}, **ADAM,
    )  # fmt: skip
    seen = []
    inner = trainer.bind

    def bind(batch):
        bound = inner(batch)
        vocab = trainer.model.vocab
        items = inner.items(batch["labels"])
        first = (items >= 0) & (batch["levels"] == 0)
        assert torch.equal(bound["labels"][first], vocab.paths[items[first], 0])
        seen.append(vocab.codes.sha256)
        return bound

    trainer.bind = bind
    before = trainer.model.vocab.codes
    trainer.train()
    first, second = (ItemCodes.load(tmp_path / "codes" / f"v{number}") for number in (1, 2))
    assert seen == [before.sha256] * 2 + [first.sha256] * 2 + [second.sha256]
    assert trainer.model.vocab.codes == second
    assert second.provenance["update"] == {"round": 2, "step": 4}
    assert second.provenance["collisions"]["collision_rate_before"] == 0.25
    trace = pq.read_table(tmp_path / "codes/v1/trace.parquet").to_pylist()
    rows = np.flatnonzero((before.table != first.table).any(axis=1))
    assert [entry["item"] for entry in trace] == [f"item {row}" for row in rows]
    assert [entry["old"] for entry in trace] == before.table[rows].tolist()
    assert [entry["new"] for entry in trace] == first.table[rows].tolist()
    assert {entry["why"] for entry in trace} == {"to a code that another item left"}
    assert {entry["likelihood_before"] for entry in trace} == {None}
    assert [line["accepted"] for line in rounds(tmp_path)] == [True, True]


def test_rounds_without_a_gate_become_one_version_at_the_next_checkpoint(tmp_path):
    """Every checkpoint's codes are a version, and a round costs no more than a line."""
    described = []
    trainer = make_updating(tmp_path, Shuffle(1, 0.1), Rules(rounds=9, gate=None), steps=6, every=3,
                            validate=lambda: {"ndcg@10": trainer.state.global_step})  # fmt: skip
    inner = trainer.updates._describe
    trainer.updates._describe = lambda codes: described.append(codes) or inner(codes)
    before = trainer.model.vocab.codes
    trainer.train()
    lines = rounds(tmp_path)
    assert [(line["round"], line["step"], line["version"]) for line in lines] == [
        (1, 1, 1), (2, 2, 1), (3, 3, 2), (4, 4, 2), (5, 5, 2),
    ]  # fmt: skip
    found = [ItemCodes.load(tmp_path / "codes" / f"v{number}") for number in (1, 2)]
    assert described == found
    assert trainer.model.vocab.codes == found[1]
    trace = pq.read_table(tmp_path / "codes/v1/trace.parquet").to_pylist()
    rows = np.flatnonzero((before.table != found[0].table).any(axis=1))
    assert [entry["item"] for entry in trace] == [f"item {row}" for row in rows]
    assert len(rows) > lines[0]["moves"]
    assert [level["used"] for level in lines[-1]["levels"]] == [6, 5, 4]
    usage = inner(trainer.model.vocab.codes)["levels"]
    assert [level["entropy_bits"] for level in lines[-1]["levels"]] == pytest.approx(
        [level["entropy_bits"] for level in usage]
    )


def test_accepted_codes_come_back_with_the_best_weights(tmp_path):
    """The best checkpoint is that of step 3, before the second update."""
    scores = {1: 0.1, 2: 0.2, 3: 0.9, 4: 0.3, 5: 0.4, 6: 0.5}
    trainer = make_updating(
        tmp_path, Shuffle(2, 0.1), OPEN, steps=6, every=1,
        validate=lambda: {"ndcg@10": scores[trainer.state.global_step]},
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == 3
    assert trainer.updates.version == 2
    assert trainer.model.vocab.codes == ItemCodes.load(tmp_path / "codes/v1")


def test_a_trial_is_never_the_best_checkpoint_nor_a_step_towards_stopping(tmp_path):
    def validate():
        return {"ndcg@10": 0.9 if trainer.updates.on_trial and trainer.state.global_step < 7 else 0.5}

    trainer = make_updating(
        tmp_path, Shuffle(4), Rules(rounds=1, gate="ndcg@10", adapt=3, tolerance=-0.1), steps=9, every=1,
        validate=validate, callbacks=(EarlyStoppingCallback(early_stopping_patience=6),),
    )  # fmt: skip
    trainer.train()
    log = read_log(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in log if "trial/ndcg@10" in line] == [5, 6]
    assert [line["step"] for line in log if "validation/ndcg@10" in line] == [1, 2, 3, 4, 7, 8, 9]
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.5, 1)
    assert trainer.state.global_step == 9  # the sixth validation without a better one, trials not counted, is that of 9
    assert not rounds(tmp_path)[0]["accepted"]


def test_a_gate_can_ask_for_a_gain_or_allow_a_loss_and_patience_ends_the_rounds(tmp_path):
    def accepted(name, after, checkpoint=None, **rules):
        folder = tmp_path / name
        trainer = make_updating(
            folder, Shuffle(2, 0.1), Rules(gate="likelihood", adapt=1, **rules), steps=12,
            validate=lambda: {"ndcg@10": 0.5, "likelihood": after if trainer.updates.on_trial else -10.0},
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=checkpoint and str(folder / "checkpoints" / checkpoint))
        return [line["accepted"] for line in rounds(folder)]

    assert accepted("equal", -10.0, rounds=2) == [True, True]
    assert accepted("less", -10.1, rounds=9, patience=3) == [False] * 3
    assert accepted("less", -10.1, "checkpoint-5", rounds=9, patience=3) == [False] * 3  # with two of them behind it
    assert accepted("tolerated", -10.1, rounds=1, tolerance=0.02) == [True]
    assert accepted("gain", -9.95, rounds=1, tolerance=-0.01) == [False]


def test_the_end_of_a_trial_is_measured_and_saved_whenever_it_comes(tmp_path):
    """Step 7 is no step of validation, which are 5, 10, 12."""
    rules = Rules(rounds=1, gate="ndcg@10", adapt=3)
    make_updating(tmp_path, Shuffle(4), rules, steps=12, every=5, validate=lambda: {"ndcg@10": 0.5}).train()
    assert rounds(tmp_path)[0]["decided"] == 7
    log = read_log(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in log if "validation/ndcg@10" in line] == [7, 10, 12]
    assert (tmp_path / "checkpoints" / "checkpoint-7").is_dir()


@pytest.mark.parametrize("refresh", [True, False])
def test_rows_begin_anew_in_a_round_where_the_rules_say_so(tmp_path, refresh):
    """At a learning rate of 0, only that can change them."""
    trainer = make_updating(
        tmp_path, Shuffle(2), Rules(rounds=1, gate=None, refresh=refresh), steps=3, learning_rate=0.0
    )
    old, rows = trainer.model.vocab.codes, trainer.model.rows.state_dict()
    before = {name: each.clone() for name, each in rows.items()}
    trainer.train()
    (line,) = rounds(tmp_path)
    expected, _ = tiny_item_model()
    expected.rows.load_state_dict(before)
    count = refresh_rows(expected, torch.optim.SGD(expected.rows.parameters()), old, trainer.model.vocab.codes)
    assert count > 0
    assert line["refreshed"] == (count if refresh else 0)
    after = trainer.model.rows.state_dict()
    assert_close(dict(after), dict(expected.rows.state_dict()) if refresh else before, atol=0, rtol=0)


class Telling(Shuffle):
    """The same, with log-likelihoods that bear the item's row and the step."""

    def propose(self, moment):
        found = super().propose(moment)
        rows = np.arange(len(found.table), dtype=np.float32)
        return Proposal(found.table, -100.0 * moment.step - rows, -rows, found.facts)


class KilledTelling(Telling, KilledAt):
    """The same, but killed in the middle of the work of a step."""


@pytest.mark.parametrize("rules", [Rules(rounds=2, gate=None), Rules(rounds=1, gate="ndcg@10", adapt=1)])
def test_a_trace_says_how_likely_an_items_codes_were_before_and_after(tmp_path, rules):
    """Without a gate, of the last round that moved it; both rounds come before the first checkpoint."""
    trainer = make_updating(tmp_path, Telling(2, 0.3), rules, steps=6, every=5, validate=lambda: {"ndcg@10": 0.5})
    trainer.train()
    trace = pq.read_table(tmp_path / "codes/v1/trace.parquet").to_pylist()
    assert len(trace) > 5
    steps = {round((entry["likelihood_after"] - entry["likelihood_before"]) / 100) for entry in trace}
    assert steps == ({2, 4} if rules.gate is None else {2})
    assert all(entry["item"] == f"item {-entry['likelihood_after']:.0f}" for entry in trace)


def test_no_round_begins_that_cannot_end(tmp_path):
    trainer = make_updating(tmp_path, Shuffle(4), GATED, steps=6, validate=lambda: {"ndcg@10": 0.5})
    trainer.train()
    assert rounds(tmp_path) == []
    assert not trainer.updates.on_trial


def test_a_training_killed_in_the_middle_of_a_pass_goes_on_as_if_nothing_had_been(tmp_path):
    settings = {"steps": 12, "every": 3, "dropout": 0.2, "train_sampling_strategy": "random", **ADAM}
    straight = make_updating(tmp_path / "straight", Shuffle(4, 0.1), OPEN, **settings)
    straight.train()
    folder = tmp_path / "killed"
    killed = make_updating(folder, KilledAt(8, 4, 0.1), OPEN, **settings)
    with pytest.raises(Killed):
        killed.train()
    resumed = make_updating(folder, Shuffle(4, 0.1), OPEN, **settings)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoints" / "checkpoint-6"))
    assert_close(weights(resumed), weights(straight), atol=0, rtol=0)
    assert without_times(folder) == without_times(tmp_path / "straight")
    assert rounds(folder) == rounds(tmp_path / "straight")
    assert versions(folder) == versions(tmp_path / "straight")
    assert len(rounds(folder)) == 2


@pytest.mark.parametrize("accepted", [True, False])
@EVERY_KIND
def test_a_training_killed_inside_a_trial_goes_on_as_if_nothing_had_been(tmp_path, family, accepted):
    """The checkpoint of step 5 lies between the start of the trial, at 4, and its end, at 7."""
    settings = {"steps": 12, "every": 5, "dropout": 0.2, "train_sampling_strategy": "random", "family": family, **ADAM}
    rules = Rules(rounds=2, gate="ndcg@10", adapt=3, tolerance=100.0 if accepted else -100.0)
    straight = make_updating(tmp_path / "straight", Telling(4, 0.3), rules, **settings)
    straight.train()
    folder = tmp_path / "killed"
    killed = make_updating(folder, KilledTelling(8, 4, 0.3), rules, **settings)
    with pytest.raises(Killed):
        killed.train()
    checkpoint = folder / "checkpoints" / "checkpoint-5"
    assert (checkpoint / TRIAL_FILE).is_file()
    resumed = make_updating(folder, Telling(4, 0.3), rules, **settings)
    with torch.no_grad():
        for parameter in resumed.model.parameters():
            parameter.zero_()
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_close(weights(resumed), weights(straight), atol=0, rtol=0)
    assert without_times(folder) == without_times(tmp_path / "straight")
    assert rounds(folder) == rounds(tmp_path / "straight")
    assert versions(folder) == versions(tmp_path / "straight")
    assert [line["accepted"] for line in rounds(folder)] == [accepted] * 2
    assert all(math.isfinite(line["after"]) for line in rounds(folder))


def test_a_checkpoint_of_a_trial_without_what_it_may_go_back_to_is_refused(tmp_path):
    settings = {"steps": 9, "every": 5}
    rules = Rules(rounds=1, gate="ndcg@10", adapt=3)
    make_updating(tmp_path, Shuffle(4), rules, **settings).train()
    checkpoint = tmp_path / "checkpoints" / "checkpoint-5"
    (checkpoint / TRIAL_FILE).unlink()
    again = make_updating(tmp_path, Shuffle(4), rules, **settings)
    with pytest.raises(ArtifactError, match="must hold what its trial may go back to"):
        again.train(resume_from_checkpoint=str(checkpoint))


def test_a_model_that_holds_its_codes_brings_them_along_and_another_has_no_such_entry():
    model, _ = tiny_item_model()
    assert "item_codes" not in model.state_dict()
    model.hold_codes()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = model.vocab.codes
    model.take_codes(tiny_codes(seed=3))
    assert model.vocab.codes == tiny_codes(seed=3)
    assert torch.equal(model.state_dict()["item_codes"], torch.from_numpy(tiny_codes(seed=3).table.copy()))
    missing = model.load_state_dict(state, strict=False)
    assert missing.missing_keys == []
    assert model.vocab.codes == before
    binding = LateBinding(model)
    assert int(binding.placeholders().paths.min()) == binding.first
