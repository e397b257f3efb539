"""What happens beside training: the metrics log of the run folder, progress lines, and stopping on a signal."""

import json
import math
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llm_itemtok.artifacts import write_text


class MetricsLog(TrainerCallback):
    """Append every line that the trainer logs to `metrics.jsonl`, whatever else it reports to.

    Lines after the step that a run is resumed from belong to the interrupted run and are dropped, and so is the
    summary that a run writes when it stops, so that a resumed run leaves the log of an uninterrupted one; but the first
    losses after it are means over the steps since the checkpoint, where that lies between two lines.
    """

    def __init__(self, path: Path) -> None:
        """Write to `path`."""
        self.path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keep the lines up to the step that training starts from."""
        if state.is_world_process_zero:
            kept = read_log(self.path) if state.global_step and self.path.exists() else []
            lines = [line for line in kept if line["step"] <= state.global_step and "train_runtime" not in line]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Append one line: `step`, `epoch`, and what was logged."""
        if state.is_world_process_zero and logs:
            # JSON knows no NaN; a number that is none is written as null, which the report tells.
            values = {name: value if math.isfinite(value) else None for name, value in logs.items()}
            values = {name: value for name, value in values.items() if not name.startswith("total_")}
            line = {"step": state.global_step, "epoch": state.epoch, **values}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read `metrics.jsonl`; a last line cut short by a kill is passed over."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


class Progress(TrainerCallback):
    """Say how far training is, what the loss and the last validation were, and how long it will still take.

    One line every few seconds at most, so that it reads well in a terminal, in a file and in the log of a cluster.
    """

    def __init__(self, say: Callable[[str], None], *, every_seconds: float = 20.0) -> None:
        """Pass lines to `say`."""
        self.say = say
        self.every_seconds = every_seconds
        self._began = self._last = 0.0
        self._first_step = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock."""
        self._began = self._last = time.monotonic()
        self._first_step = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Say a validation at once, a loss when it is time."""
        if not state.is_world_process_zero or not logs:
            return
        now = time.monotonic()
        if "validation/ndcg@10" in logs:
            measured = (
                f"validation Recall@10 {logs['validation/recall@10']:.4f}, NDCG@10 {logs['validation/ndcg@10']:.4f}"
            )
        elif "loss" in logs and now - self._last >= self.every_seconds:
            measured = f"loss {logs['loss']:.3f}"
        else:
            return
        self._last = now
        done = state.global_step - self._first_step
        left = (now - self._began) / max(1, done) * (state.max_steps - state.global_step)
        self.say(f"  step {state.global_step:,} of {state.max_steps:,}: {measured}; about {left / 60:.1f} min left")


class StopOnSignal(TrainerCallback):
    """On SIGTERM, finish the optimiser step, write a checkpoint and stop.

    Attributes:
        stopped: whether that has happened.
    """

    def __init__(self) -> None:
        """Install nothing yet; training does."""
        self.stopped = False
        self._before: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take the signal over; outside the main thread, where Python allows no handler, leave it alone."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._remember)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Ask for a checkpoint and the end, on all processes as soon as one was signalled."""
        if args.world_size > 1:
            signalled = torch.tensor(float(self.stopped), device=args.device)
            torch.distributed.all_reduce(signalled, torch.distributed.ReduceOp.MAX)
            self.stopped = bool(signalled.item())
        if self.stopped:
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Give the signal back."""
        self.release()

    def release(self) -> None:
        """Give the signal back, also after training raised; does nothing the second time."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _remember(self, _number: int, _frame: FrameType | None) -> None:
        self.stopped = True
