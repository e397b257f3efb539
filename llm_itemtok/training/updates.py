"""Updates of item tokens while a model is trained: one protocol, whatever the method.

A method says *when* item tokens may change, and *proposes* new codes; everything else is done here, the same for all:

    when → propose (and assign) → migrate → adapt → accept or roll back

A *round* begins between two optimiser steps: after the step's validation and checkpoint, so that a checkpoint never
lies inside the work of a round. With a gate, the validation metric under the old codes is noted, training goes on with
the new ones for some steps (the *trial*), and the metric must not have fallen; if it has, weights, codes and optimiser
go back to what they were, bit for bit, while the schedule and the count of steps go on. Without a gate a proposal is
accepted at once; such rounds may come often, so their codes become a version where the next checkpoint is written, many
rounds' changes in one. After `patience` rounds in a row that changed nothing, or were refused, there are no more.

Written for three users, all of which go by steps. Self-improvement (SIIT) proposes rarely and has a gate. A method that
trains a quantizer by gradients of its own every M steps (BLOGER) does so in `propose`, and has no gate; one that
alternates with the recommender (ETEGRec) proposes where a cycle begins. What they train belongs to the one composite
module, so that snapshots and checkpoints hold it.

Decisions:
- A checkpoint of a trial is never the best one, and its validation is no step towards stopping early: what may be
  rolled back is not chosen. The validation where the trial ends counts again, under whatever holds from then on.
- A checkpoint holds the codes with the weights (`ItemTokenModel.hold_codes`), and beside them where the rounds stand,
  and what a trial may go back to. The library would bring a callback's state back by making a new callback of it, which
  has neither method nor gate; hence files of our own. What a method keeps beside the model's weights, such as the
  moments of its own optimiser, is in one of them (`Stateful`).
- No round begins that cannot end before training does.
- All processes go through this together and come to the same decisions; codes are those of the main process.

Shape letters: N items, L levels.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llm_itemtok.artifacts import read_json, write_bytes, write_json
from llm_itemtok.errors import ArtifactError
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.processes import of_main
from llm_itemtok.training.fresh_rows import refresh_rows
from llm_itemtok.training.snapshot import Snapshot
from llm_itemtok.training.versions import Moves, Versions, usage_of

STATE_FILE, TRIAL_FILE, METHOD_FILE = "updates.json", "updates.safetensors", "updates.method.safetensors"
"""In a checkpoint: where the rounds stand; what a trial may go back to; what the method keeps."""


@dataclass(frozen=True)
class Moment:
    """Where a training is, between two of its steps.

    Attributes:
        model: unwrapped; `vocab.codes` are the codes in use.
        optimizer: of the training.
        step: optimiser steps done.
        epoch: the same in epochs; a whole number where one has just ended.
    """

    model: ItemTokenModel
    optimizer: torch.optim.Optimizer
    step: int
    epoch: float


@dataclass(frozen=True)
class Proposal:
    """New codes.

    Attributes:
        table: int32 `[N, L]`, distinct rows.
        before: float32 `[N]`, log-likelihood of each item's old code, in nats; NaN where the method has none.
        after: float32 `[N]`, that of its new code.
        facts: figures about the proposal for the log, plain JSON values; `collisions` is the share of items that shared
            the code they wanted with another.
    """

    table: np.ndarray
    before: np.ndarray
    after: np.ndarray
    facts: Mapping[str, Any] = field(default_factory=dict)


class Method(Protocol):
    """A way to update item tokens."""

    def due(self, step: int) -> bool:
        """Whether item tokens may change after so many steps; asked between any two of them, on all processes."""
        ...

    def propose(self, moment: Moment) -> Proposal | None:
        """Make new codes, unique and of the same level sizes; may use gradients, and train what is its own.

        Called on all processes, which must come to the same; leaves the state of random numbers as it was. The model's
        mode may be changed.

        Returns:
            The codes; None, which is no round, where it was time to train but not yet to change codes.
        """
        ...


@runtime_checkable
class Stateful(Method, Protocol):
    """A method that keeps something from round to round beside the model; it must have no gate."""

    def state(self) -> Mapping[str, Tensor]:
        """What a checkpoint must hold of it; asked between two steps, never inside a round."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave, on the processor; the model has its weights of then already."""
        ...


@dataclass(frozen=True)
class Rules:
    """How rounds are judged.

    Attributes:
        rounds: at most so many.
        gate: validation metric that must not fall; None accepts everything at once.
        adapt: optimiser steps of a trial, at least 1.
        tolerance: share of the metric that may be lost; below 0, share that must be gained.
        patience: rounds without an accepted change, in a row, after which there are no more; 0 never ends.
        refresh: whether rows of codewords whose meaning moved begin anew (`fresh_rows`).
    """

    rounds: int
    gate: str | None
    adapt: int = 1
    tolerance: float = 0.0
    patience: int = 0
    refresh: bool = False


@dataclass
class _Standing:
    """Where the rounds stand; what a checkpoint holds, but for what a trial goes back to."""

    version: int = 0
    rounds: int = 0
    without_change: int = 0
    seconds: float = 0.0  # of training since the last round ended
    trial: dict[str, Any] | None = None


@dataclass
class _Trial:
    """What a trial may go back to, and what it brought."""

    snapshot: Snapshot
    old: ItemCodes
    moves: Moves


@dataclass
class _Unwritten:
    """What changed since the newest version was written, without a gate."""

    old: ItemCodes  # those of that version
    before: np.ndarray  # float32 [N], as in a proposal, of the last round that moved an item
    after: np.ndarray


class Updates(TrainerCallback):
    """Carries rounds of updates out; see the module."""

    def __init__(
        self,
        method: Method,
        rules: Rules,
        *,
        model: ItemTokenModel,
        validate: Callable[[], Mapping[str, float]],
        versions: Versions,
        describe: Callable[[ItemCodes], Mapping[str, Any]],
        say: Callable[[str], None] = lambda _line: None,
    ) -> None:
        """Prepare for a training.

        Args:
            method: when, and what.
            rules: how it is judged.
            model: unwrapped, holding its codes.
            validate: measures the model as it is; the same on all processes.
            versions: where accepted codes are written.
            describe: codes → their quality, as JSON; called on the main process only.
            say: called with progress lines.
        """
        assert rules.gate is None or not isinstance(method, Stateful), "what a method keeps cannot be taken back"
        self.method = method
        self.rules = rules
        self.versions = versions
        self._model = model
        self._validate = validate
        self._describe = describe
        self._say = say
        self._standing = _Standing()
        self._trial: _Trial | None = None
        self._unwritten: _Unwritten | None = None
        self._measured: tuple[int, Mapping[str, float]] | None = None
        self._began = time.perf_counter()

    @property
    def on_trial(self) -> bool:
        """Whether the codes in use may be taken back."""
        return self._trial is not None

    @property
    def version(self) -> int:
        """The newest version that was accepted, and written."""
        return self._standing.version

    def validate(self, step: int) -> Mapping[str, float]:
        """Measure the model after a step; once, however often it is asked."""
        if self._measured is None or self._measured[0] != step:
            self._measured = (step, self._validate())
        return self._measured[1]

    # ------------------------------------------------------------------------------------------------- the hooks

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Begin at the beginning, or where the checkpoint stood."""
        self._standing, self._trial, self._unwritten, self._measured = _Standing(), None, None, None
        if state.global_step:
            self._load(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")
        if state.is_world_process_zero:
            # A round that began right after a checkpoint bears its step, so steps do not tell; a trial has no line yet.
            self.versions.rewind(self._standing.version, self._standing.rounds - int(self.on_trial))
        self._began = time.perf_counter()

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer | None = None,
        **_: Any,
    ) -> None:
        """Begin a round, if it is time."""
        assert optimizer is not None
        if self._may_begin(state) and self.method.due(state.global_step):
            self._begin(Moment(self._model, optimizer, state.global_step, float(state.epoch or 0.0)), state)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer | None = None,
        **_: Any,
    ) -> TrainerControl:
        """Judge a trial that has come to its end, and have the training measured and saved as it is then."""
        assert optimizer is not None
        trial = self._standing.trial
        if trial is not None and state.global_step == trial["until"]:
            self._judge(optimizer, state)
            control.should_evaluate = control.should_save = True
        return control

    # ------------------------------------------------------------------------------------------------- a round

    def _may_begin(self, state: TrainerState) -> bool:
        standing, rules = self._standing, self.rules
        if standing.trial is not None or standing.rounds >= rules.rounds:
            return False
        if rules.patience and standing.without_change >= rules.patience:
            return False
        return rules.gate is None or state.global_step + rules.adapt <= state.max_steps

    def _begin(self, moment: Moment, state: TrainerState) -> None:
        """Propose, and migrate."""
        standing, gate, old = self._standing, self.rules.gate, self._model.vocab.codes
        measured = {} if gate is None else dict(self.validate(moment.step))
        trained = self._lap()
        snapshot = None if gate is None else Snapshot.take(self._model, moment.optimizer)
        proposal = self.method.propose(moment)
        seconds = self._lap()
        if proposal is None:
            standing.seconds = trained + seconds
            return
        standing.rounds += 1
        new = ItemCodes(of_main(proposal.table, self._model.device), old.sizes, names=old.names)
        assert new.is_injective, "a method must never put two items on one code"
        rows = np.flatnonzero((new.table != old.table).any(axis=1))
        line = {
            "round": standing.rounds,
            "step": moment.step,
            "epoch": moment.epoch,
            "moves": len(rows),
            "share": len(rows) / new.num_items,
            "churn": (new.table != old.table).mean(axis=0).tolist(),
            **proposal.facts,
            "metric": gate,
            "before": None if gate is None else measured[gate],
            "after": None,
            "pass_seconds": round(seconds, 3),
            "training_seconds": round(trained, 3),
        }
        self._say(
            f"  round {line['round']} at step {moment.step:,}: {len(rows):,} of {new.num_items:,} items "
            f"({line['share']:.1%}) get another code, found in {seconds:.1f} s"
        )
        if not len(rows):
            self._end(line, state, accepted=False)
            return
        self._model.take_codes(new.with_provenance(**_provenance(old, line)))
        line["refreshed"] = refresh_rows(self._model, moment.optimizer, old, new) if self.rules.refresh else 0
        self._measured = None
        if snapshot is None:
            self._note(old, rows, proposal)
            self._end(line, state, accepted=True)
        else:
            moves = Moves(rows, proposal.before[rows].astype(np.float32), proposal.after[rows].astype(np.float32))
            self._trial = _Trial(snapshot, old, moves)
            standing.trial = {"until": moment.step + self.rules.adapt, "measured": measured, "line": line}

    def _note(self, old: ItemCodes, rows: np.ndarray, proposal: Proposal) -> None:
        """Remember what an update without a gate changed, until it is written."""
        if self._unwritten is None:
            unknown = np.full(old.num_items, np.nan, dtype=np.float32)
            self._unwritten = _Unwritten(old, unknown, unknown.copy())
        self._unwritten.before[rows] = proposal.before[rows]
        self._unwritten.after[rows] = proposal.after[rows]

    def _judge(self, optimizer: torch.optim.Optimizer, state: TrainerState) -> None:
        """Accept what is on trial, or go back."""
        assert self._trial is not None
        assert self._standing.trial is not None
        assert self.rules.gate is not None
        line, measured = self._standing.trial["line"], self._standing.trial["measured"]
        before, after = line["before"], float(self.validate(state.global_step)[self.rules.gate])
        accepted = after >= before - self.rules.tolerance * abs(before)
        line["after"] = after
        line["training_seconds"] = round(line["training_seconds"] + self._lap(), 3)
        self._say(
            f"  round {line['round']} {'accepted' if accepted else 'refused and rolled back'}: {self.rules.gate} "
            f"{before:.4f} → {after:.4f}"
        )
        snapshot, old = self._trial.snapshot, self._trial.old
        self._end(line, state, accepted=accepted)
        if not accepted:
            snapshot.restore(self._model, optimizer)
            self._model.take_codes(old)
            self._measured = (state.global_step, measured)  # the model is again the one that was measured then

    def _lap(self) -> float:
        """Seconds since this was asked last, those before a resume included; begins to count anew."""
        now = time.perf_counter()
        passed = self._standing.seconds + now - self._began
        self._standing.seconds, self._began = 0.0, now
        return passed

    def _end(self, line: dict[str, Any], state: TrainerState, *, accepted: bool) -> None:
        """Write down how a round ended, under the codes that it proposed."""
        standing, trial, gated = self._standing, self._trial, self.rules.gate is not None
        standing.trial, self._trial = None, None
        standing.without_change = 0 if accepted else standing.without_change + 1
        standing.version += int(accepted and gated)
        codes = self._model.vocab.codes
        if state.is_world_process_zero:
            quality = self._describe(codes) if gated else {"levels": usage_of(codes)}
            line |= {
                "accepted": accepted,
                "decided": state.global_step,
                # Without a gate, the one that the next checkpoint writes.
                "version": standing.version + int(self._unwritten is not None),
                "pass_share": line["pass_seconds"] / max(line["training_seconds"], 1e-3),
                "levels": [
                    {name: level[name] for name in ("name", "used", "entropy_bits")} for level in quality["levels"]
                ],
                "neighbours": quality.get("neighbours", []),
            }
            if accepted and trial is not None:
                self.versions.write(standing.version, trial.old, codes, trial.moves, quality)
            self.versions.tell(line)
        self._lap()

    # ------------------------------------------------------------------------------------------------- checkpoints

    def save(self, folder: Path, *, writes: bool) -> None:
        """Write into a checkpoint what resuming needs, and as a version what rounds without a gate have changed.

        Args:
            folder: of the checkpoint.
            writes: whether this process is the one that does; all of them call this.
        """
        self._standing.seconds = self._lap()
        self._write_version(writes=writes)
        if not writes:
            return
        if isinstance(self.method, Stateful):
            kept = {name: value.contiguous() for name, value in self.method.state().items()}
            write_bytes(folder / METHOD_FILE, safetensors.torch.save(kept))
        if self._trial is not None:
            beside = {name: torch.from_numpy(each) for name, each in vars(self._trial.moves).items()}
            self._trial.snapshot.save(folder / TRIAL_FILE, beside)
        write_json(folder / STATE_FILE, asdict(self._standing))

    def _write_version(self, *, writes: bool) -> None:
        changed, codes = self._unwritten, self._model.vocab.codes
        self._unwritten = None
        if changed is None or codes == changed.old:  # items may have come back to where they were
            return
        self._standing.version += 1
        if writes:
            rows = np.flatnonzero((codes.table != changed.old.table).any(axis=1))
            moves = Moves(rows, changed.before[rows], changed.after[rows])
            self.versions.write(self._standing.version, changed.old, codes, moves, self._describe(codes))

    def _load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        self._standing = _Standing(**read_json(folder / STATE_FILE))
        if isinstance(self.method, Stateful):
            self.method.load_state(safetensors.torch.load_file(_there(folder / METHOD_FILE, "what its method keeps")))
        if self._standing.trial is None:
            return
        snapshot, beside = Snapshot.load(_there(folder / TRIAL_FILE, "what its trial may go back to"))
        old = ItemCodes.load(self.versions.path(self._standing.version))
        self._trial = _Trial(snapshot, old, Moves(**{name: value.numpy() for name, value in beside.items()}))
        codes = self._model.vocab.codes
        self._model.take_codes(codes.with_provenance(**_provenance(old, self._standing.trial["line"])))


def _there(path: Path, what: str) -> Path:
    """A file that a checkpoint must have."""
    if not path.is_file():
        raise ArtifactError(
            f"{path}: the checkpoint must hold {what}, but the file is missing; go on from another checkpoint"
        )
    return path


def _provenance(old: ItemCodes, line: Mapping[str, Any]) -> dict[str, Any]:
    """Where the codes of a round come from: those before, and what collided before resolution this time."""
    entries: dict[str, Any] = {"update": {"round": line["round"], "step": line["step"]}}
    if "collisions" in line:
        entries["collisions"] = {**old.provenance.get("collisions", {}), "collision_rate_before": line["collisions"]}
    return {**old.provenance, **entries}
