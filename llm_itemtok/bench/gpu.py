"""G: large models on a GPU, in bfloat16, with random weights of their true shapes.

G1: beams for as many users as fill the GPU, Qwen3-0.6B and 1.7B, 80 tokens, 20 beams, 4 levels, against `generate`.
G2: a shape of which others have published times: Qwen3-1.7B, 8 users, 1,000 or 5,000 tokens, 256 beams, 3 levels, in
milliseconds. G3: training the item tokens and LoRA of Qwen3-0.6B, targets a second against one example per target.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from llm_itemtok.bench import subjects
from llm_itemtok.bench.decode import GENERATE
from llm_itemtok.bench.measure import Result, at_least, at_most
from llm_itemtok.bench.train import Training
from llm_itemtok.bench.usual import DictTrie, generate_items
from llm_itemtok.decoding.beams import beam_search
from llm_itemtok.decoding.tree import TreeDecoder
from llm_itemtok.errors import ItemTokError
from llm_itemtok.training.effort import training_flops
from llm_itemtok.vocab.trie import ItemTrie

QWEN3 = {
    "0.6b": subjects.Shape(28, 1024, 16, 3072, subjects.LLM_VOCABULARY, 8, 128, "qwen3"),
    "1.7b": subjects.Shape(28, 2048, 16, 6144, subjects.LLM_VOCABULARY, 8, 128, "qwen3"),
}
ITEMS = 12_000
PUBLISHED = {1000: 199.3, 5000: 685.4}
"""Milliseconds of SGLang's beam search on an H100, published with NVIDIA's recsys-examples (sid-gr-inference)."""
GOALS = {1000: 130.0, 5000: 400.0}
FLOOR_SHARE, TRAINING_SHARE = 0.4, 0.35
"""Least shares of the time of G1 and G3 that the arithmetic of the floor should take at the device's rate."""


def gpu(repeats: int = 5) -> Iterator[Result]:
    """G1 to G3.

    Raises:
        ItemTokError: if there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ItemTokError("this benchmark needs a CUDA device, and torch finds none; the other groups need none")
    rate = gemm_tflops("cuda", repeats)
    for name, shape in QWEN3.items():
        yield beams(f"G1-{name}", shape, "cuda", rate, repeats=repeats)
    for tokens in PUBLISHED:
        yield long_histories(tokens, QWEN3["1.7b"], "cuda", repeats=repeats)
    yield training(QWEN3["0.6b"], "cuda", rate, repeats=repeats)


def seconds(device: str, call: Callable[[], object], repeats: int) -> float:
    """Least wall seconds of a call that leaves nothing running on the device, after one to warm up."""
    best = float("inf")
    for turn in range(repeats + 1):
        _finish(device)
        began = time.perf_counter()
        call()
        _finish(device)
        if turn:
            best = min(best, time.perf_counter() - began)
    return best


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def gemm_tflops(device: str, repeats: int, side: int = 8192) -> float:
    """Rate of a plain matrix product in bfloat16, in TFLOP/s."""
    left, right = torch.randn(2, side, side, dtype=torch.bfloat16, device=device)
    return 2 * side**3 / seconds(device, lambda: left @ right, repeats) / 1e12


def beams(
    name: str,
    shape: subjects.Shape,
    device: str,
    rate: float,
    *,
    repeats: int,
    users: int = 256,
    usual_users: tuple[int, ...] = (8, 32, 64),
) -> Result:
    """One model of G1: users a second against `generate` at its best batch size, and the floor's share of the time."""
    model = subjects.item_model(shape, subjects.codes(ITEMS), dtype=torch.bfloat16, device=device)
    plain = subjects.plain_model(model)
    trie = ItemTrie(model.vocab.codes).to(model.device)
    paths = DictTrie(iter(model.vocab.paths.tolist()))
    prompts = subjects.prompts(model.vocab, users, 80)
    decoder = TreeDecoder(model)
    ours = seconds(device, lambda: beam_search(decoder, trie, prompts, beam=20), repeats) / users
    usual = {}
    for few in usual_users:
        call = partial(generate_items, plain, paths, prompts[:few], beam=20, levels=4)
        usual[few] = seconds(device, call, 1) / few
    floor = subjects.floor_gflop(shape, users=1, tokens=80, beam=20, levels=subjects.LEVELS)
    best = min(usual.values())
    share = floor / 1e3 / rate / ours
    details = {
        "users_per_second": 1 / ours,
        "batch": users,
        "baseline_users_per_second": {f"batch {few}": 1 / each for few, each in usual.items()},
        "floor_share": share,
        "gemm_tflops": rate,
        "device": _name(device),
    }
    result = at_least(name, best / ours, 15, details, baseline=GENERATE)
    return replace(result, met=result.met and share >= FLOOR_SHARE)


def long_histories(
    tokens: int, shape: subjects.Shape, device: str, *, repeats: int, beam: int = 256, num_items: int = 1_000_000
) -> Result:
    """One history length of G2."""
    levels = subjects.LEVELS[:3]
    model = subjects.item_model(shape, subjects.codes(num_items, levels), dtype=torch.bfloat16, device=device)
    trie = ItemTrie(model.vocab.codes).to(model.device)
    prompts = subjects.prompts(model.vocab, 8, tokens)
    decoder = TreeDecoder(model)
    milliseconds = 1e3 * seconds(device, lambda: beam_search(decoder, trie, prompts, beam=beam), repeats)
    details = {
        "floor_gflop": subjects.floor_gflop(shape, users=8, tokens=tokens, beam=beam, levels=levels),
        "device": _name(device),
    }
    baseline = f"SGLang on an H100, as published: {PUBLISHED[tokens]} ms"
    return at_most(f"G2-{tokens}", milliseconds, GOALS[tokens], details, unit="ms", baseline=baseline)


def training(shape: subjects.Shape, device: str, rate: float, *, repeats: int, users: int = 64) -> Result:
    """G3."""
    run = Training(shape, users=users, dtype=torch.bfloat16, device=device, lora=True)
    usual, ours = seconds(device, run.usual, 1), seconds(device, run.ours, repeats)
    share = training_flops(run.model, run.positions) / 1e12 / rate / ours
    details = {
        "targets_per_second": run.targets / ours,
        "baseline_targets_per_second": run.targets / usual,
        "floor_share": share,
        "gemm_tflops": rate,
        "device": _name(device),
    }
    baseline = "one example per target, padded, logits at every position"
    result = at_least("G3", usual / ours, 10, details, baseline=baseline)
    return replace(result, met=result.met and share >= TRAINING_SHARE)


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device
