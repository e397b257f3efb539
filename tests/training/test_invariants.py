"""What the seam into `transformers.Trainer` promises: the same update however it is cut, and honest logs.

Each of these was wrong in the obvious implementation, or hangs on a private hook of the library.
"""

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerCallback

from llm_itemtok.artifacts import read_json
from llm_itemtok.model.load import add_lora, with_item_tokens
from llm_itemtok.training.arguments import CHECKPOINTING
from llm_itemtok.training.callbacks import StopOnSignal, read_log
from llm_itemtok.training.next_token import MODEL_INPUTS
from llm_itemtok.vocab import init
from tests.process_pairs import run_alone_and_in_pair
from tests.tiny import KINDS, tiny_codes, tiny_lm, tiny_tokenizer
from tests.training.runs import TASKS, make_trainer, weights

TERMS = [f"loss/{task}" for task in TASKS]


def training_lines(folder: Path) -> list[dict[str, float]]:
    return [line for line in read_log(folder / "metrics.jsonl") if "loss" in line]


def without_times(folder: Path) -> list[dict[str, float]]:
    return [line for line in read_log(folder / "metrics.jsonl") if "train_runtime" not in line]


def assert_close(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda text, at=name: f"{at}: {text}", **tolerance)


EVERY_KIND = pytest.mark.parametrize("family", KINDS)


@pytest.mark.parametrize("steps", [2, 6])
@EVERY_KIND
def test_eight_accumulated_batches_of_one_are_one_batch_of_eight(tmp_path, family, steps):
    """Also beyond an epoch, which has 40 examples."""
    runs = {}
    for batch, accumulation in ((8, 1), (1, 8), (2, 4)):
        folder = tmp_path / f"{batch}x{accumulation}"
        trainer = make_trainer(folder, batch=batch, accumulation=accumulation, steps=steps, family=family)
        before = weights(trainer)
        trainer.train()
        runs[batch] = weights(trainer), training_lines(folder)
        assert all(not torch.equal(before[name], value) for name, value in runs[batch][0].items())
    for batch in (1, 2):
        assert_close(runs[batch][0], runs[8][0], atol=1e-6, rtol=0)
        for ours, theirs in zip(runs[batch][1], runs[8][1], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)


@EVERY_KIND
def test_the_logged_loss_is_the_weighted_mean_over_the_step(tmp_path, family):
    trainer = make_trainer(tmp_path, batch=3, accumulation=2, steps=1, family=family)
    batches = [trainer.data_collator([trainer.train_dataset[i] for i in rows]) for rows in (range(3), range(3, 6))]
    total, weight = 0.0, 0.0
    with torch.no_grad():
        for batch in batches:
            nll = trainer.model(**{name: batch[name] for name in MODEL_INPUTS if name in batch})
            total += float((nll * batch["loss_weights"]).sum())
            weight += float(batch["loss_weights"].sum())
    trainer.train()
    (line,) = training_lines(tmp_path)
    assert line["loss"] == pytest.approx(total / weight, rel=1e-5)


@pytest.mark.parametrize("logging_steps", [1, 3])
def test_the_logged_terms_sum_to_the_logged_loss_with_evaluations_in_between(tmp_path, logging_steps):
    every_step = make_trainer(tmp_path / "1", accumulation=2, steps=7, every=2)
    every_step.train()
    trainer = make_trainer(tmp_path / "n", accumulation=2, steps=7, every=2, logging_steps=logging_steps)
    trainer.train()
    lines, single = training_lines(tmp_path / "n"), training_lines(tmp_path / "1")
    assert [line["step"] for line in lines] == [step for step in range(1, 8) if step % logging_steps == 0]
    for line in lines:
        assert sum(line[name] for name in TERMS) == pytest.approx(line["loss"], rel=1e-5)
        steps = range(int(line["step"]) - logging_steps, int(line["step"]))
        for name in ("loss", *TERMS):
            assert line[name] == pytest.approx(sum(single[step][name] for step in steps) / logging_steps, rel=1e-4)


def test_every_line_of_the_log_has_a_step_and_validation_stands_under_its_own_name(tmp_path):
    trainer = make_trainer(tmp_path, steps=4, every=2, validate=lambda: {"ndcg@10": 0.25, "recall@10": 0.5})
    trainer.train()
    lines = read_log(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 2, 3, 4, 4, 4]
    for line in (lines[0], lines[1], lines[3], lines[4]):
        assert set(line) == {"step", "epoch", "loss", "grad_norm", "learning_rate", *TERMS}
    for line in (lines[2], lines[5]):
        assert {name: line[name] for name in line if name not in ("step", "epoch")} == {
            "validation/ndcg@10": 0.25, "validation/recall@10": 0.5
        }  # fmt: skip
    assert "train_runtime" in lines[6]


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
@EVERY_KIND
def test_a_resumed_run_is_the_straight_run(tmp_path, family, optim):
    """Weights, log, dropout and the order of a second epoch: bit by bit."""
    settings = {
        "family": family,
        "steps": 16,
        "every": 7,
        "dropout": 0.2,
        "optim": optim,
        "train_sampling_strategy": "random",
    }
    straight = make_trainer(tmp_path / "straight", **settings)
    straight.train()
    folder = tmp_path / "resumed"
    make_trainer(folder, **settings).train()
    resumed = make_trainer(folder, **settings)
    with torch.no_grad():
        for parameter in resumed.model.parameters():
            parameter.zero_()  # everything must come from the checkpoint
    resumed.train(resume_from_checkpoint=str(folder / "checkpoints" / "checkpoint-7"))
    assert resumed.state.global_step == 16
    assert_close(weights(resumed), weights(straight), atol=0, rtol=0)
    assert without_times(folder) == without_times(tmp_path / "straight")


@pytest.mark.parametrize("family", ["qwen3", "t5"])
def test_a_resumed_run_with_lora_is_the_straight_run(tmp_path, family):
    def model():
        lm, _ = add_lora(tiny_lm(family), rank=2, alpha=4, dropout=0.1, rslora=False, seed=0)
        return with_item_tokens(lm, tiny_tokenizer(), tiny_codes(), lambda v, t: init.normal(v, t, seed=0))

    straight = make_trainer(tmp_path, model=model(), family=family, steps=4, every=2)
    straight.train()
    held = load_file(tmp_path / "checkpoints" / "checkpoint-2" / "model.safetensors")
    assert all("lora_" in name or name == "rows.input_rows" for name in held)
    resumed = make_trainer(tmp_path, model=model(), family=family, steps=4, every=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "checkpoint-2"))
    assert_close(weights(resumed), weights(straight), atol=0, rtol=0)


def test_the_best_checkpoint_goes_by_validation_ndcg_and_patience_stops(tmp_path):
    scores = iter([0.1, 0.5, 0.3, 0.4, 0.9])
    seen = []

    def validate():
        seen.append(weights(trainer))
        return {"ndcg@10": next(scores), "recall@10": 1 / len(seen)}

    trainer = make_trainer(
        tmp_path, steps=9, every=1, validate=validate, callbacks=(EarlyStoppingCallback(early_stopping_patience=2),)
    )
    trainer.train()
    assert (trainer.state.global_step, len(seen)) == (4, 4)
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.5, 2)
    assert_close(weights(trainer), seen[1], atol=0, rtol=0)


def test_a_trainer_without_validation_cannot_evaluate(tmp_path):
    with pytest.raises(ValueError, match="must be made with `validate` to evaluate, was: None"):
        make_trainer(tmp_path).evaluate()


class Terminate(TrainerCallback):
    """Sends this process SIGTERM in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_ends_the_step_writes_a_checkpoint_and_the_run_can_go_on(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    straight = make_trainer(tmp_path / "straight", steps=6, every=4)
    straight.train()
    folder = tmp_path / "stopped"
    stop = StopOnSignal()
    stopped = make_trainer(folder, steps=6, every=4, callbacks=(stop, Terminate(3)))
    stopped.train()
    assert stop.stopped
    assert stopped.state.global_step == 3
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint-3"]
    assert signal.getsignal(signal.SIGTERM) is before
    resumed = make_trainer(folder, steps=6, every=4, callbacks=(StopOnSignal(),))
    resumed.train(resume_from_checkpoint=str(folder / "checkpoints" / "checkpoint-3"))
    assert_close(weights(resumed), weights(straight), atol=0, rtol=0)
    # The summary line of the interrupted run must not stay in the middle of the log.
    assert without_times(folder) == without_times(tmp_path / "straight")
    assert ["train_runtime" in line for line in read_log(folder / "metrics.jsonl")].index(True) == 8


@EVERY_KIND
def test_activation_checkpointing_trains_the_same(tmp_path, family):
    """And does compute the layers anew."""
    runs, calls = [], []
    for checkpointing in (False, True):
        trainer = make_trainer(tmp_path / str(checkpointing), steps=2, family=family, **{CHECKPOINTING: checkpointing})
        attention = next(each for each in trainer.model.modules() if "attention" in type(each).__name__.lower())
        seen = []
        attention.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        trainer.train()
        runs.append(weights(trainer))
        calls.append(len(seen))
    assert calls == [2, 4]
    assert_close(*runs, atol=1e-7, rtol=0)


def test_rows_of_like_length_can_be_batched_together(tmp_path):
    trainer = make_trainer(tmp_path, train_sampling_strategy="group_by_length", steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.slow
@EVERY_KIND
@pytest.mark.parametrize("states", ["kept", "anew"])
def test_two_processes_train_as_one(tmp_path, family, states):
    """gloo on the loopback; an untied model, whose base head gets no gradient; with states computed anew, too."""
    one, two = [tmp_path / "one", 4, 2, family, states], [tmp_path / "two", 2, 2, family, states]
    run_alone_and_in_pair("tests.training.runs", one, two, two)
    one, two = tmp_path / "one", tmp_path / "two"
    assert_close(load_file(two / "weights.safetensors"), load_file(one / "weights.safetensors"), atol=1e-7, rtol=1e-5)
    assert (two / "effort.json").read_text() == (one / "effort.json").read_text()
    assert len(training_lines(two)) == 3
    assert read_json(two / "sent.json") == [False] * 3  # each process has the buffers, and they change alike
    for ours, theirs in zip(without_times(two), without_times(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
