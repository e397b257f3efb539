"""The metrics log, progress lines, and the signal that stops a run."""

import json
import signal
from types import SimpleNamespace

from transformers import TrainerControl, TrainerState

from llm_itemtok.training.callbacks import MetricsLog, Progress, StopOnSignal, read_log

ARGUMENTS = SimpleNamespace(world_size=1)  # all that the callbacks read of them


def state(step: int, *, first: bool = True) -> TrainerState:
    return TrainerState(global_step=step, epoch=step / 4, max_steps=20, is_world_process_zero=first)


def test_a_log_begins_empty_and_grows_by_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 9, "loss": 1.0}\n')
    log = MetricsLog(path)
    log.on_train_begin(ARGUMENTS, state(0), TrainerControl())
    assert path.read_text() == ""
    log.on_log(ARGUMENTS, state(1), TrainerControl(), logs={"loss": 2.0, "total_flos": 7.0})
    log.on_log(ARGUMENTS, state(2), TrainerControl(), logs={})
    log.on_log(ARGUMENTS, state(2), TrainerControl(), logs={"validation/ndcg@10": 0.5})
    assert read_log(path) == [
        {"step": 1, "epoch": 0.25, "loss": 2.0},
        {"step": 2, "epoch": 0.5, "validation/ndcg@10": 0.5},
    ]


def test_a_loss_that_is_no_number_is_written_as_null(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.on_log(ARGUMENTS, state(1), TrainerControl(), logs={"loss": float("nan"), "grad_norm": 2.0})
    (line,) = read_log(log.path)
    assert line["loss"] is None
    assert line["grad_norm"] == 2.0


def test_a_resumed_log_keeps_whole_lines_up_to_its_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.0},
        {"step": 2, "train_runtime": 1.0},
        {"step": 3, "loss": 1.0},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    assert len(read_log(path)) == 4
    MetricsLog(path).on_train_begin(ARGUMENTS, state(2), TrainerControl())
    assert read_log(path) == lines[:2]


def test_a_resumed_run_without_a_log_starts_one(tmp_path):
    MetricsLog(tmp_path / "metrics.jsonl").on_train_begin(ARGUMENTS, state(2), TrainerControl())
    assert read_log(tmp_path / "metrics.jsonl") == []


def test_only_the_first_process_writes(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.on_train_begin(ARGUMENTS, state(0, first=False), TrainerControl())
    log.on_log(ARGUMENTS, state(1, first=False), TrainerControl(), logs={"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_progress_says_a_validation_at_once_and_a_loss_when_it_is_time():
    said: list[str] = []
    progress = Progress(said.append, every_seconds=3600)
    progress.on_train_begin(ARGUMENTS, state(5), TrainerControl())
    progress.on_log(ARGUMENTS, state(6), TrainerControl(), logs={"loss": 2.0})
    assert said == []
    scores = {"validation/ndcg@10": 0.12345, "validation/recall@10": 0.5}
    progress.on_log(ARGUMENTS, state(10), TrainerControl(), logs=scores)
    assert said == ["  step 10 of 20: validation Recall@10 0.5000, NDCG@10 0.1235; about 0.0 min left"]
    progress.every_seconds = 0
    progress.on_log(ARGUMENTS, state(11), TrainerControl(), logs={"loss": 2.0})
    progress.on_log(ARGUMENTS, state(12, first=False), TrainerControl(), logs={"loss": 2.0})
    assert said[1:] == ["  step 11 of 20: loss 2.000; about 0.0 min left"]


def test_a_signal_asks_for_a_checkpoint_and_the_end_after_the_step():
    before = signal.getsignal(signal.SIGTERM)
    stop, control = StopOnSignal(), TrainerControl()
    stop.on_train_begin(ARGUMENTS, state(0), control)
    control = stop.on_step_end(ARGUMENTS, state(1), control)
    assert (control.should_save, control.should_training_stop, stop.stopped) == (False, False, False)
    signal.raise_signal(signal.SIGTERM)
    control = stop.on_step_end(ARGUMENTS, state(2), control)
    assert control.should_save
    assert control.should_training_stop
    stop.on_train_end(ARGUMENTS, state(2), control)
    assert signal.getsignal(signal.SIGTERM) is before
