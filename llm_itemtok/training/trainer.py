"""The one place where this project touches `transformers.Trainer`.

What to optimise is an `Objective`; the trainer sums its denominators over the optimiser step, adds its terms up, logs
each under its own name, and leaves the rest to Hugging Face. Validation is an injected function that ranks the whole
catalogue, so that early stopping and the best checkpoint go by the metric that users see.

Three hooks below are private to Hugging Face; the tests in `tests/training/test_invariants.py` and `test_order.py` are
what makes depending on them safe.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sized
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, Sampler
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from llm_itemtok.errors import TrainingError
from llm_itemtok.model.item_embeddings import ITEM_TABLES
from llm_itemtok.training.effort import Effort, batch_counts
from llm_itemtok.training.objective import Objective
from llm_itemtok.training.order import BLANK, KeepOrder, LengthGrouped, own_share
from llm_itemtok.training.updates import Updates


class ItemTokenTrainer(Trainer):
    """A `Trainer` whose loss is an `Objective` and whose evaluation is full ranking."""

    def __init__(
        self,
        *args: Any,
        objective: Objective,
        validate: Callable[[], Mapping[str, float]] | None = None,
        bind: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None,
        updates: Updates | None = None,
        **kwargs: Any,
    ) -> None:
        """Take Hugging Face's arguments and ours.

        Args:
            args: of `transformers.Trainer`.
            objective: what to minimise.
            validate: returns validation metrics.
            bind: puts the item tokens of now into a batch that has placeholders (`late_binding`).
            updates: of item tokens; None where they stay what they are.
            kwargs: of `transformers.Trainer`.
        """
        super().__init__(*args, **kwargs)
        self.add_callback(Effort())
        if updates is not None:
            self.add_callback(updates)
        self.objective: Objective = objective
        self.validate = validate
        self.bind = bind
        self.updates = updates
        # Terms are divided by the whole step's denominators: the trainer must not divide by accumulation again.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._terms: dict[str, list[Tensor]] = defaultdict(list)
        self._terms_start = 0  # global step at which `_terms` began to fill; Trainer moves its own mark before `log`
        self._order: KeepOrder | None = None

    @property
    def effort(self) -> Effort:
        """What training took so far; a resume puts another one into its place."""
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, Effort))

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As the library's, without the items' own embeddings: few steps move one, and every step would shrink it."""
        names: list[str] = super().get_decay_parameter_names(model)
        return [name for name in names if not name.endswith(ITEM_TABLES)]

    def compute_loss(  # type: ignore[override]  # what Hugging Face calls a count are our totals
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Callable[[], Mapping[str, Tensor]] | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        """Sum the objective's terms, and remember each for the next log line."""
        if isinstance(model, DistributedDataParallel) and self.args.ddp_broadcast_buffers is None:
            # Codes and item vectors were shared when it was wrapped, and change alike everywhere: a whole catalogue's
            # would be sent at every step.
            model.broadcast_buffers = False
        totals = self.objective.denominators(inputs) if num_items_in_batch is None else num_items_in_batch()
        terms = self.objective(model, inputs if self.bind is None else self.bind(inputs), totals)
        if model.training:
            if not self._terms:
                self._terms_start = self.state.global_step
            for name, value in terms.items():
                self._terms[name].append(value.detach())
        loss = torch.stack(list(terms.values())).sum()
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to a training line the mean of each loss term since the last one, as `loss/<name>`."""
        if "loss" in logs:
            steps = max(1, self.state.global_step - self._terms_start)
            logs |= {f"loss/{name}": total / steps for name, total in self._finite_terms().items()}
            self._terms.clear()
            if "grad_norm" in logs and not math.isfinite(logs["grad_norm"]) and not self.args.fp16:
                raise self._diverged("gradient", float(logs["grad_norm"]))  # fp16 passes such steps over
        super().log(logs, start_time)

    def _finite_terms(self) -> dict[str, float]:
        """Sum of each loss term since the last line, of all processes.

        Raises:
            TrainingError: if one is no finite number.
        """
        sums = {name: self.accelerator.gather(torch.stack(part).sum()).mean() for name, part in self._terms.items()}
        totals = {name: float(value) for name, value in sums.items()}
        for name, value in totals.items():
            if not math.isfinite(value):
                raise self._diverged(f"loss `{name}`", value)
        return totals

    def _diverged(self, what: str, value: float) -> TrainingError:
        """Say what to change; nothing of it has gone into a checkpoint."""
        args = self.args
        half = ", train in bf16 instead of fp16" if args.fp16 else ""
        return TrainingError(
            f"the {what} must stay finite, was: {value} at step {self.state.global_step:,}, epoch "
            f"{self.state.epoch or 0:.2f}; lower `trainer.learning_rate` (was {args.learning_rate:g}), lengthen "
            f"`trainer.warmup_steps` (was {args.warmup_steps:g}), lower `trainer.max_grad_norm` (was "
            f"{args.max_grad_norm:g}){half}, or look for numbers out of range in the item vectors. Checkpoints are of "
            "before"
        )

    def evaluate(self, *_args: Any, **_kwargs: Any) -> dict[str, float]:
        """Rank the validation cases; log `validation/<metric>`, or `trial/<metric>` while item tokens are on trial.

        Returns:
            The metrics as `eval_<metric>`, the spelling by which Hugging Face finds the best checkpoint; NaN, which is
            never the best, for a model that may be rolled back.

        Raises:
            ValueError: if the trainer was made without `validate`.
        """
        if self.validate is None:
            raise ValueError("the trainer must be made with `validate` to evaluate, was: None")
        metrics = self.validate() if self.updates is None else self.updates.validate(self.state.global_step)
        if self.updates is not None and self.updates.on_trial:
            self.log({f"trial/{name}": value for name, value in metrics.items()})
            self.control.should_evaluate = False  # as `on_evaluate` does, which would count towards stopping early
            return {f"eval_{name}": math.nan for name in metrics}
        self.log({f"validation/{name}": value for name, value in metrics.items()})
        named = {f"eval_{name}": value for name, value in metrics.items()}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        return named

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; in a checkpoint also where updates stand, before anything could find the checkpoint whole.

        Raises:
            TrainingError: if the loss or a weight is no finite number any more.
        """
        self._finite_terms()
        assert self.model is not None
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        broken = torch.stack([~part.detach().isfinite().all() for part in trained if part.numel()]).sum()
        if int(self.accelerator.gather(broken).sum()):
            raise self._diverged("weights", math.nan)
        super().save_model(output_dir, _internal_call)
        if self.updates is not None and output_dir is not None:
            self.updates.save(Path(output_dir), writes=self.args.should_save)
        if self._order is not None and output_dir is not None and self.args.should_save:
            self._order.save(Path(output_dir))

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Any]:
        """Collect the micro-batches of a step, and promise its totals; each example counts once an epoch."""
        batches = list(islice(epoch_iterator, num_batches))
        if batches and self.accelerator.gradient_state.end_of_dataloader:
            batches[-1] = self._without_repeats(batches[-1])
        return batches, self._get_num_items_in_batch(batches, device)

    def _without_repeats(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Leave out of an epoch's last batch what the library has completed it with."""
        args = self.args
        if args.world_size == 1 or args.dataloader_drop_last or args.train_sampling_strategy == "batch_rebalance":
            return batch
        assert isinstance(self.train_dataset, Sized)
        own = own_share(len(self.train_dataset), args.train_batch_size)
        if own:
            return {name: value[:own] for name, value in batch.items()}
        device = batch["input_ids"].device
        return {name: value.to(device) for name, value in self.data_collator([BLANK]).items()}

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        """As the library's; an order by length is that of all processes, and kept in checkpoints."""
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            sampler = LengthGrouped(sampler.batch_size * self.args.world_size, sampler.lengths, self.args.device)
            self._order = KeepOrder(sampler)
            self.add_callback(self._order)
        return sampler

    def _get_num_items_in_batch(  # type: ignore[override]
        self, batch_samples: list[dict[str, Tensor]], device: torch.device
    ) -> Callable[[], dict[str, Tensor]] | None:
        """Count a step, and promise its totals: they are summed when its first loss asks for them.

        The library calls this before a step begins, where item tokens may change, and denominators with them.
        """
        if not batch_samples:
            return None
        counts = batch_counts(batch_samples).to(device)
        self.effort.add(self.accelerator.gather(counts).view(-1, len(counts)).sum(0))
        return cache(partial(self._totals, batch_samples, device))

    def _totals(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
        """Sum the objective's denominators over the optimiser step: every micro-batch, every process.

        Gradients are averaged over processes afterwards, so the sum is divided by their number.
        """
        totals: dict[str, Tensor] = {}
        for batch in batch_samples:
            for name, value in self.objective.denominators(batch).items():
                totals[name] = totals.get(name, torch.zeros((), device=device)) + value.to(device)
        return {
            name: self.accelerator.gather(value).sum() / self.accelerator.num_processes
            for name, value in totals.items()
        }
