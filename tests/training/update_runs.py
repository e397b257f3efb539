"""Short, real trainings whose item tokens are updated, for the tests."""

import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import distributed

from llm_itemtok.decoding.scoring import score_items
from llm_itemtok.items.base import Quantizer
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.collisions import extra_level
from llm_itemtok.items.quality import quality
from llm_itemtok.items.recode import recode
from llm_itemtok.items.rqvae import RQVAE
from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.model.prompts import Prompts
from llm_itemtok.training.collator import Collator
from llm_itemtok.training.examples import build
from llm_itemtok.training.late_binding import LateBinding
from llm_itemtok.training.quantizer_optimizer import QuantizerOptimizer
from llm_itemtok.training.self_improve import Search, SearchMaterial, SelfImprove
from llm_itemtok.training.trainer import ItemTokenTrainer
from llm_itemtok.training.updates import Method, Moment, Proposal, Rules, Updates
from llm_itemtok.training.versions import Versions
from llm_itemtok.vocab.trie import ItemTrie
from tests.tiny import ENCODER_DECODERS, WORDS, tiny_codes, tiny_item_model
from tests.training.runs import make_trainer

NUM_ITEMS = 60
TEXTS = [
    " ".join(WORDS[(row + step) % len(WORDS)] for step in range(3)) if row % 10 else "" for row in range(NUM_ITEMS)
]


class Shuffle:
    """Gives items each other's codes, some items or all of them, every few steps: harmful where nothing else is."""

    def __init__(self, every: int, share: float = 1.0) -> None:
        self.every, self.share = every, share

    def due(self, step: int) -> bool:
        return step > 0 and step % self.every == 0

    def propose(self, moment: Moment) -> Proposal:
        table = moment.model.vocab.codes.table
        rng = np.random.default_rng(moment.step)
        rows = rng.choice(len(table), size=round(self.share * len(table)), replace=False)
        new = table.copy()
        new[rows] = table[np.roll(rows, 1)]
        unknown = np.full(len(table), np.nan, dtype=np.float32)
        return Proposal(new, unknown, unknown, {"collisions": 0.25})


def tiny_quantizer() -> tuple[Quantizer, np.ndarray, ItemCodes]:
    """A trained quantizer of two levels, the item vectors, and the codes that it gives, with an extra level."""
    vectors = np.random.default_rng(0).normal(size=(NUM_ITEMS, 5)).astype(np.float32)
    tokenizer = RQVAE(levels=2, codebook_size=5, widths=(8,), latent_dimensions=3, epochs=4, warmup_epochs=2)
    codes = extra_level(tokenizer.fit(vectors), size=12)
    return tokenizer.quantizer, vectors, codes


class Rebuild:
    """Trains the quantizer of the model to rebuild the item vectors, a step a round, and recodes every other round."""

    def __init__(self, every: int, vectors: np.ndarray, killed_at: int | None = None) -> None:
        self.every, self.vectors, self.killed_at = every, vectors, killed_at
        self.optimizer: QuantizerOptimizer | None = None
        self.begun: dict | None = None

    def due(self, step: int) -> bool:
        return step > 0 and step % self.every == 0

    def propose(self, moment: Moment) -> Proposal | None:
        model = moment.model
        if self.optimizer is None:
            self.optimizer = QuantizerOptimizer(model.quantizer, learning_rate=0.05, weight_decay=0.01)
            if self.begun is not None:
                self.optimizer.load_state(self.begun)
        with self.optimizer.learning() as parameters:
            found = model.quantizer(torch.from_numpy(self.vectors))
            loss = (found.reconstruction_loss + found.codebook_loss).mean()
            self.optimizer.step(torch.autograd.grad(loss, parameters))
        if moment.step == self.killed_at:
            raise Killed
        if moment.step % (2 * self.every):
            return None
        found = recode(model.quantizer, self.vectors, model.vocab.codes)
        unknown = np.full(len(found.table), np.nan, dtype=np.float32)
        return Proposal(found.table, unknown, unknown, {"collisions": found.collisions})

    def state(self) -> dict:
        return {} if self.optimizer is None else self.optimizer.state()

    def load_state(self, state: dict) -> None:
        self.begun = state if state else None


class Killed(Exception):
    """Stands for a process that is killed."""


class KilledAt(Shuffle):
    """The same, but killed in the middle of the work of a step."""

    def __init__(self, step: int, *args: float) -> None:
        super().__init__(*args)
        self.step = step

    def propose(self, moment: Moment) -> Proposal:
        if moment.step == self.step:
            raise Killed
        return super().propose(moment)


def likelihood(model: ItemTokenModel, prompts: Prompts) -> float:
    """How well a model knows a few titles: a metric that a shuffle of all codes ruins."""
    rows = np.arange(1, 9)
    trie = ItemTrie(model.vocab.codes)
    model.eval()
    scores = score_items(model, trie, [prompts.title_to_item(int(row))[0] for row in rows], list(rows[:, None]))
    return math.exp(float(np.mean(scores)))


def make_updating(
    folder: Path,
    method: Method,
    rules: Rules,
    *,
    family: str = "llama",
    model: ItemTokenModel | None = None,
    validate: Callable[[], dict[str, float]] | None = None,
    say: Callable[[str], None] = lambda _line: None,
    **settings: object,
) -> ItemTokenTrainer:
    """The trainer of `make_trainer`, with updates; `codes/v0` is written where a run would have it."""
    own, tokenizer = tiny_item_model(family)
    model = own if model is None else model
    model.hold_codes()
    binding = LateBinding(model)
    prompts = Prompts(tokenizer, binding.placeholders(), TEXTS, answer_start=model.answer_start)
    validate = validate or (lambda: {"ndcg@10": likelihood(model, prompts)})
    trainer = make_trainer(folder, model=model, family=family, validate=validate, **settings)
    trainer.data_collator, trainer.bind = Collator(prompts, 3), binding
    versions = Versions(folder, [f"item {row}" for row in range(NUM_ITEMS)])
    model.vocab.codes.save(versions.path(0))
    trainer.updates = Updates(
        method, rules, model=model, validate=validate, versions=versions, describe=described, say=say
    )
    trainer.add_callback(trainer.updates)
    return trainer


def described(codes: ItemCodes) -> dict:
    return quality(codes)


def optimizer_state(trainer: ItemTokenTrainer) -> dict[str, torch.Tensor]:
    """A copy of what the optimiser holds, flat."""
    state = trainer.optimizer.state_dict()["state"]
    return {f"{number} {name}": torch.as_tensor(value).clone() for number, own in state.items()
            for name, value in own.items() if value is not None}  # fmt: skip


def make_self_improving(
    family: str, search: Search, *, codes: ItemCodes | None = None, distinct_titles: bool = False, every: int = 2
) -> tuple[ItemTokenModel, SelfImprove]:
    """A tiny model in evaluation mode, and the method over a few examples of it; the last items are in none."""
    codes = tiny_codes() if codes is None else codes
    model, tokenizer = tiny_item_model(family, codes=codes)
    binding = LateBinding(model)
    texts = WORDS[: codes.num_items] if distinct_titles else TEXTS
    prompts = Prompts(tokenizer, binding.placeholders(), texts, answer_start=model.answer_start)
    rng = np.random.default_rng(0)
    known = codes.num_items - 4
    sequences = [rng.integers(0, known, size=rng.integers(2, 12)) for _ in range(22)]
    kind = "windows" if family in ENCODER_DECODERS else "all-positions"
    tasks = {"next-item": 1.0, "title-to-item": 0.3}
    text_rows = np.flatnonzero([bool(text) for text in texts])
    table = build(sequences, kind=kind, history_length=9, tasks=tasks, text_rows=text_rows)
    vectors = rng.normal(size=(codes.num_items, 5)).astype(np.float32)
    collate = Collator(prompts, codes.num_levels)
    return model, SelfImprove(every, search, SearchMaterial(prompts, text_rows, table, collate, binding, vectors))


if __name__ == "__main__":
    if "WORLD_SIZE" in os.environ:
        distributed.init_process_group("gloo")
    found = {}
    for source in ("generate", "embeddings", "both"):
        search = Search(source=source, candidates=5, vectors_weight=0.5, batch_size=4, outliers=0.5)
        model, method = make_self_improving(sys.argv[2], search)
        candidates = method.candidates(model, 0)
        proposal = method.propose(Moment(model, torch.optim.SGD(model.parameters()), 0, 0.0))
        found |= {f"{source} {name}": value for name, value in vars(candidates).items()}
        found[f"{source} table"] = proposal.table
    np.savez(f"{sys.argv[1]}.npz", **found)
