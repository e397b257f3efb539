"""IR: one vector an item and a recursive head, against item tokens in a row: training, and recommendation.

The backbone is that of D1, a Llama of 4 layers and width 256, over 12,000 items of 4 levels of 256 codewords. Histories
have 20 or 32 items; everybody reads the same ones, and training has a target at every position.

IR-train: samples (targets) a second of a batch of 64 histories, as recipes have them, against our row of item tokens;
Adam is part of the step. IR-memory: the activations of that batch, which are the tensors that the forward pass keeps
for the backward one, as a share of the row's. Beside it in the details stand the growth of a process in both passes,
which differs from run to run, and what a step keeps whatever it reads: weights, gradients and the optimiser's moments.
Of these the recursive model has more, by 12,000 embeddings of 512 numbers. A flattened model with as many
(`scoring.item_embedding`) is measured as well, as `matched`.

IR-beam-K: one user's recommendation with K beams, against our tree of beams; the details give beams in replicated rows,
which is what `generate` does, less its waste.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch

from llm_itemtok.bench import subjects
from llm_itemtok.bench.measure import Result, at_least, at_most, cpu_seconds, one_thread, peak_mb
from llm_itemtok.decoding.beams import beam_search
from llm_itemtok.decoding.recursive import RecursiveDecoder
from llm_itemtok.decoding.replicated import ReplicatedDecoder
from llm_itemtok.decoding.tree import BeamDecoder, TreeDecoder
from llm_itemtok.model.item_embeddings import ItemEmbeddings
from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.model.prompts import Prompts
from llm_itemtok.model.recursive import Recursion
from llm_itemtok.training.collator import Collator
from llm_itemtok.vocab.trie import ItemTrie

ITEMS, EMBEDDING, HIDDEN = 12_000, 512, 512
HISTORIES, BEAMS = (20, 32), {10: 1.3, 20: 1.5, 50: 2.0}
"""Items of a history; beams, and how much faster the recursive head should be."""
USERS = 64
"""Rows of a training step."""
FLATTENED, TREE = "our row of item tokens", "our tree of beams over item tokens"
WAYS = ("recursive", "flattened", "matched")


def model_of(way: str) -> ItemTokenModel:
    """A random model: `recursive`, `flattened`, or `matched`, flattened with embeddings of items of the same size."""
    model = subjects.item_model(subjects.SMALL, subjects.codes(ITEMS))
    if way == "flattened":
        return model
    width, known = subjects.SMALL.width, torch.ones(ITEMS, dtype=torch.bool)
    items = ItemEmbeddings(width, known=known, dimensions=EMBEDDING, silent=way == "matched")
    if way == "matched":
        model.own = items
        return model
    model.recursion = Recursion(items, levels=model.vocab.num_levels, width=width, hidden=HIDDEN)
    model.recursion.fit_scale(model.codebooks(), torch.from_numpy(model.vocab.codes.table.astype(np.int64)))
    return model.eval()


def recursive(repeats: int = 9) -> Iterator[Result]:
    """IR-train, IR-memory and IR-beam for both lengths of history."""
    with one_thread():
        for length in HISTORIES:
            yield from _training(length, max(2, repeats // 3))
            yield from _recommending(length, repeats)


def _training(length: int, repeats: int) -> Iterator[Result]:
    steps = {way: training_step(way, length) for way in WAYS}
    seconds = dict(zip(WAYS, cpu_seconds(*steps.values(), repeats=repeats), strict=True))
    targets = USERS * (length + 1)
    details = {f"{way}_samples_per_second": targets / seconds[way] for way in WAYS}
    details |= {"against_matched": seconds["matched"] / seconds["recursive"]}
    yield at_least(f"IR-train-{length}", seconds["flattened"] / seconds["recursive"], 2, details, baseline=FLATTENED)
    activations = {way: activations_mb(way, length) for way in WAYS}
    share = activations["recursive"] / activations["flattened"]
    details = {f"{way}_activations_mb": value for way, value in activations.items()}
    details |= {f"{way}_growth_mb": peak_mb(activations_of, way, length) for way in WAYS}
    details |= {f"{way}_kept_mb": _kept_mb(way) for way in WAYS}
    yield at_most(f"IR-memory-{length}", share, 0.5, details, baseline=FLATTENED)


def activations_mb(way: str, length: int) -> float:
    """What the forward pass of a batch of histories keeps for the backward one, parameters left out."""
    model = model_of(way).train()
    batch = _batch(model, length, USERS)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(**batch).mean()
    del loss  # only now: what is held must not be freed and its place used again
    return sum(held.values()) / 2**20


def training_step(way: str, length: int) -> Callable[[], object]:
    """Forward and backward of a batch of histories with a target at every position, and Adam."""
    model = model_of(way).train()
    batch = _batch(model, length, USERS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        model(**batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def activations_of(way: str, length: int) -> Callable[[], object]:
    """Forward and backward alone, over gradients that are there already: for a process whose growth is measured."""
    model = model_of(way).train()
    batch = _batch(model, length, USERS)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model(**_batch(model, 2, 1)).mean().backward()  # what a library sets up at its first call is there then

    def step() -> None:
        model(**batch).mean().backward()

    return step


def _batch(model: ItemTokenModel, length: int, users: int) -> dict[str, torch.Tensor]:
    """What the collator makes of random histories of `length` items and one target more."""
    prompts = Prompts.of(model, subjects.tokenizer())
    rng = np.random.default_rng(0)
    rows = [
        {"task": 0, "items": rng.integers(0, ITEMS, size=length + 1), "first": 0, "weight": 1.0} for _ in range(users)
    ]
    batch = Collator(prompts, model.vocab.num_levels)(rows)
    return {name: batch[name] for name in ("input_ids", "labels", "levels")}


def _kept_mb(way: str) -> float:
    """Weights, gradients and the two moments of AdamW."""
    return sum(parameter.numel() for parameter in model_of(way).parameters()) * 4 * 4 / 2**20


def _recommending(length: int, repeats: int) -> Iterator[Result]:
    models = {way: model_of(way) for way in ("recursive", "flattened")}
    trie = ItemTrie(models["flattened"].vocab.codes)
    history = np.random.default_rng(1).integers(0, ITEMS, size=length)
    prompts = {way: [Prompts.of(model, subjects.tokenizer()).history(history)] for way, model in models.items()}
    decoders: dict[str, tuple[BeamDecoder, list[np.ndarray]]] = {
        "recursive": (RecursiveDecoder(models["recursive"]), prompts["recursive"]),
        "tree": (TreeDecoder(models["flattened"]), prompts["flattened"]),
        "replicated": (ReplicatedDecoder(models["flattened"]), prompts["flattened"]),
    }

    def recommend(way: str, beam: int) -> Callable[[], object]:
        decoder, prompt = decoders[way]
        return lambda: beam_search(decoder, trie, prompt, beam=beam)

    for beam, target in BEAMS.items():
        seconds = dict(
            zip(decoders, cpu_seconds(*(recommend(way, beam) for way in decoders), repeats=repeats), strict=True)
        )
        details = {f"{way}_ms": 1000 * value for way, value in seconds.items()}
        details["against_replicated"] = seconds["replicated"] / seconds["recursive"]
        found = at_least(f"IR-beam-{beam}-{length}", seconds["tree"] / seconds["recursive"], target, details)
        yield replace(found, baseline=TREE)
