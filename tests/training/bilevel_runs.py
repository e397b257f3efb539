"""Short, real trainings whose quantizer is trained beside, for the tests; as a script, one process of a pair."""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import distributed

from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.model.prompts import Prompts
from llm_itemtok.model.soft_inputs import SoftInputs
from llm_itemtok.model.state import hold_quantizer
from llm_itemtok.training.bilevel import Bilevel, UpperLevel, UpperMaterial
from llm_itemtok.training.collator import Collator
from llm_itemtok.training.examples import build
from llm_itemtok.training.late_binding import LateBinding
from llm_itemtok.training.next_token import NextToken
from llm_itemtok.training.trainer import ItemTokenTrainer
from llm_itemtok.training.updates import Moment, Rules
from tests.tiny import ENCODER_DECODERS, tiny_item_model
from tests.training.update_runs import TEXTS, make_updating, tiny_quantizer

OPEN = Rules(rounds=100, gate=None)


def soft_model(family: str, residual: str = "paper", **settings: object) -> tuple[ItemTokenModel, np.ndarray]:
    """A tiny model that mixes its inputs by a tiny quantizer, and the item vectors."""
    quantizer, vectors, codes = tiny_quantizer()
    model, _ = tiny_item_model(family, codes=codes, **settings)
    hold_quantizer(model, quantizer)
    model.soft = SoftInputs(quantizer, torch.from_numpy(vectors), straight_through_residual=residual == "release")
    return model, vectors


def make_bilevel(
    family: str, upper: UpperLevel, *, double: bool = False, every: int = 1, **settings: object
) -> tuple[ItemTokenModel, Bilevel]:
    """A tiny model, and the method over a few examples of it, next items only."""
    model, vectors = soft_model(family, **settings)
    if double:
        model.double()
        vectors = vectors.astype(np.float64)
        model.soft = SoftInputs(model.quantizer, torch.from_numpy(vectors))
    _, tokenizer = tiny_item_model(family, codes=model.vocab.codes)
    binding = LateBinding(model, names=True)
    prompts = Prompts(tokenizer, binding.placeholders(), TEXTS, answer_start=model.answer_start)
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 60, size=rng.integers(3, 9)) for _ in range(16)]
    kind = "windows" if family in ENCODER_DECODERS else "all-positions"
    table = build(sequences, kind=kind, history_length=8, tasks={"next-item": 1.0}, text_rows=np.arange(1, 9))
    objective = NextToken(["next-item"])
    material = UpperMaterial(table, Collator(prompts, model.vocab.num_levels), binding, objective, vectors)
    return model, Bilevel(every, upper, material, model)


def make_training(
    folder: Path, upper: UpperLevel, every: int = 2, every_save: int = 0, family: str = "llama", **settings: object
) -> ItemTokenTrainer:
    """The trainer of `make_updating` with the method; validates and saves `every_save` steps."""
    model, vectors = soft_model(family)
    trainer = make_updating(folder, None, OPEN, model=model, family=family, every=every_save, **settings)
    trainer.bind = LateBinding(model, names=True)
    material = UpperMaterial(trainer.train_dataset, trainer.data_collator, trainer.bind, trainer.objective, vectors)
    trainer.updates.method = Bilevel(every, upper, material, model)
    return trainer


def moment(model: ItemTokenModel, step: int = 3, rate: float = 0.5) -> Moment:
    """A training whose optimiser trains all that is trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Moment(model, torch.optim.SGD(trained, lr=rate), step, 1.0)


if __name__ == "__main__":
    if "WORLD_SIZE" in os.environ:
        distributed.init_process_group("gloo")
    found = {}
    for kind in ("llama", "t5"):
        own, method = make_bilevel(kind, UpperLevel(batch_size=14, piece=4, learning_rate=0.05))
        own.input_dropout.p = 0.2
        for number in (3, 4):
            proposal = method.propose(moment(own, number))
            found[f"{kind} table {number}"] = proposal.table
            found[f"{kind} losses {number}"] = np.array(list(proposal.facts["losses"].values()))
        found |= {f"{kind} {name}": value.numpy() for name, value in own.quantizer.state_dict().items()}
    np.savez(f"{sys.argv[1]}.npz", **found)
