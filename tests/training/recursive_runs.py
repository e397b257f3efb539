"""Short, real runs of models that know items beyond their tokens; as a script, one process of a distributed one."""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import distributed

from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.training.collator import Collator
from llm_itemtok.training.examples import build
from llm_itemtok.training.late_binding import LateBinding
from llm_itemtok.training.recursive import Aligned
from llm_itemtok.training.self_improve import Search, SearchMaterial, SelfImprove
from llm_itemtok.training.trainer import ItemTokenTrainer
from llm_itemtok.training.updates import Moment
from tests.recursive import named_model, recursive_model
from tests.tiny import ENCODER_DECODERS, tiny_prompts
from tests.training.runs import make_trainer, weights
from tests.training.weighted import weigh


def made(kind: str, family: str) -> tuple[ItemTokenModel, object]:
    """A model of a kind: `recursive`, `aligned`, `weighted` (aligned, too) or `named`."""
    if kind == "named":
        return named_model(family)
    return recursive_model(family, guidance="both", aligns=kind in ("aligned", "weighted"))


def make(
    folder: Path, kind: str, *, family: str = "llama", weight: float = 0.5, **settings: object
) -> ItemTokenTrainer:
    """A trainer of `make_trainer` for a model of that kind; the alignment weighs `weight`."""
    model, tokenizer = made(kind, family)
    trainer = make_trainer(folder, model=model, family=family, **settings)
    trainer.data_collator = Collator(tiny_prompts(model, tokenizer), 3)
    if kind == "weighted":
        weigh(trainer)
    if kind in ("aligned", "weighted"):
        trainer.objective = Aligned(trainer.objective, weight)
    return trainer


def make_self_improving(kind: str, family: str, search: Search) -> tuple[ItemTokenModel, SelfImprove]:
    """A model, and the method over a few examples of it."""
    model, tokenizer = made(kind, family)
    binding = LateBinding(model)
    prompts = tiny_prompts(model, tokenizer)
    prompts._paths = binding.placeholders().paths.numpy()
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 50, size=rng.integers(2, 12)) for _ in range(22)]
    text_rows = np.arange(1, 9)
    table = build(
        sequences,
        kind="windows" if family in ENCODER_DECODERS else "all-positions",
        history_length=9,
        tasks={"next-item": 1.0, "title-to-item": 0.3},
        text_rows=text_rows,
    )
    return model, SelfImprove(2, search, SearchMaterial(prompts, text_rows, table, Collator(prompts, 3), binding))


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    cut = {"batch": int(sys.argv[2]), "accumulation": int(sys.argv[3])}
    run = make(target, sys.argv[4], **cut, steps=3, every=2, family=sys.argv[5])
    run.train()
    if run.args.should_save:
        save_file(weights(run), target / "weights.safetensors")
    if sys.argv[4] == "recursive":
        found = {}
        for source in ("generate", "embeddings", "both"):
            small = Search(source=source, candidates=5, batch_size=4, outliers=0.5)
            asked, method = make_self_improving("recursive", sys.argv[5], small)
            proposal = method.propose(Moment(asked, torch.optim.SGD(asked.parameters()), 0, 0.0))
            found[source] = proposal.table
        if run.args.should_save:
            np.savez(target / "tables.npz", **found)
    if "WORLD_SIZE" in os.environ:
        distributed.barrier()
