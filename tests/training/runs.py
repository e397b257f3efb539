"""Short, real training runs for the tests; as a script, one process of a distributed one."""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from llm_itemtok.artifacts import write_json
from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.training.arguments import CHECKPOINTING, build_arguments
from llm_itemtok.training.callbacks import MetricsLog
from llm_itemtok.training.collator import Collator
from llm_itemtok.training.examples import build
from llm_itemtok.training.next_token import NextToken
from llm_itemtok.training.trainer import ItemTokenTrainer
from tests.tiny import ENCODER_DECODERS, tiny_item_model, tiny_prompts

TASKS = {"next-item": 1.0, "title-to-item": 0.3, "item-to-title": 0.1}


def make_trainer(
    folder: Path,
    *,
    batch: int = 4,
    accumulation: int = 1,
    steps: int = 4,
    logging_steps: int = 1,
    every: int = 0,
    dropout: float = 0.0,
    validate: Callable[[], Mapping[str, float]] | None = None,
    callbacks: tuple = (),
    tied: bool = True,
    model: ItemTokenModel | None = None,
    family: str = "llama",
    kind_of_trainer: type[ItemTokenTrainer] = ItemTokenTrainer,
    **settings: object,
) -> ItemTokenTrainer:
    """A trainer over 40 examples of unequal length and weight in a fixed order; validates and saves `every` steps."""
    own, tokenizer = tiny_item_model(family, tied=tied)
    model = own if model is None else model
    model.input_dropout.p = dropout
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 60, size=rng.integers(1, 12)) for _ in range(22)]
    kind = "windows" if family in ENCODER_DECODERS else "all-positions"
    table = build(sequences, kind=kind, history_length=9, tasks=TASKS, text_rows=np.arange(1, 9))
    table = table.select(rng.permutation(len(table))[:40])
    arguments = build_arguments(
        {
            "optim": "sgd",
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "max_steps": steps,
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "logging_steps": logging_steps,
            "train_sampling_strategy": "sequential",
            "dataloader_pin_memory": False,
            "use_cpu": True,
            **settings,
        },
        output_dir=folder / "checkpoints",
        seed=3,
    )
    if every:
        arguments = dataclasses.replace(
            arguments, eval_strategy="steps", eval_steps=every, save_strategy="steps", save_steps=every,
            load_best_model_at_end=validate is not None, metric_for_best_model="ndcg@10", greater_is_better=True,
            restore_callback_states_from_checkpoint=True,
        )  # fmt: skip
        validate = validate or (lambda: {"ndcg@10": 0.5})
    trainer = kind_of_trainer(
        model=model,
        args=arguments,
        train_dataset=table,
        eval_dataset=table.select([0]),
        data_collator=Collator(tiny_prompts(own, tokenizer), 3),
        objective=NextToken([*TASKS]),
        validate=validate,
        callbacks=[MetricsLog(folder / "metrics.jsonl"), *callbacks],
    )
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    return trainer


def weights(trainer: ItemTokenTrainer) -> dict[str, torch.Tensor]:
    """A copy of everything trained."""
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


class SentBuffers(TrainerCallback):
    """Remembers at each step's end whether buffers are sent to the other processes; empty in one process."""

    def __init__(self) -> None:
        self.trainer: ItemTokenTrainer | None = None
        self.sent: list[bool] = []

    def on_step_end(self, args, state, control, **kwargs):
        if isinstance(self.trainer.model_wrapped, DistributedDataParallel):
            self.sent.append(self.trainer.model_wrapped.broadcast_buffers)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    cut = {"batch": int(sys.argv[2]), "accumulation": int(sys.argv[3]), CHECKPOINTING: sys.argv[5] == "anew"}
    watch = SentBuffers()
    run = make_trainer(target, **cut, steps=3, every=2, tied=False, family=sys.argv[4], callbacks=[watch])
    watch.trainer = run
    run.train()
    if run.args.should_save:
        save_file(weights(run), target / "weights.safetensors")
        write_json(target / "effort.json", {"targets": run.effort.targets})
        write_json(target / "sent.json", watch.sent)
