"""Short, real runs with token weights, out of those of `runs.py`; as a script, one process of a distributed one."""

import sys
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from llm_itemtok.training import token_weights
from llm_itemtok.training.collator import WithTargetItems
from llm_itemtok.training.token_weighting import FollowSteps, Target, TokenWeighted
from llm_itemtok.training.trainer import ItemTokenTrainer
from tests.training.runs import TASKS, make_trainer, weights

COUNTS = np.random.default_rng(5).integers(0, 30, 60).astype(float)
VECTORS = np.random.default_rng(6).normal(size=(60, 5))


def evenly(codes):
    """Weights of 1."""
    return token_weights.position(codes, last=1.0)


def by_gain(codes):
    return token_weights.front(codes, token_weights.level_gains(codes, VECTORS))


def by_rarity(codes):
    return token_weights.frequency(codes, COUNTS, beta=0.9, over="batch")


def by_place(codes):
    return token_weights.position(codes, last=0.5)


MIX = (Target("plain", evenly), Target("front", by_gain), Target("frequency", by_rarity, rising=True))
EFFECT = (Target("counterfactual", by_place, effect=0.1),)


def weigh(trainer: ItemTokenTrainer, targets=MIX, *, pace=0.3, bound=1.0) -> ItemTokenTrainer:
    """Give a trainer of `make_trainer` token weights."""
    model, collator = trainer.model, trainer.data_collator
    trainer.objective = TokenWeighted(
        [*TASKS], targets, vocab=lambda: model.vocab, pace=pace, bound=bound, empty=collator.prompts.history([]),
        answer_start=model.answer_start,
    )  # fmt: skip
    trainer.data_collator = WithTargetItems(collator)
    model.mix = trainer.objective.mix
    trainer.callback_handler.callbacks.insert(0, FollowSteps(trainer.objective))
    return trainer


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    cut = {"batch": int(sys.argv[2]), "accumulation": int(sys.argv[3])}
    run = weigh(make_trainer(target, **cut, steps=3, every=2, tied=False, family=sys.argv[4]), (*MIX, *EFFECT))
    run.train()
    if run.args.should_save:
        save_file(weights(run), target / "weights.safetensors")
