"""G: large models on a GPU, in bfloat16, with random weights of their true shapes.

G1: beams for as many users as fill the GPU, Qwen3-0.6B and 1.7B, 80 tokens, 20 beams, 4 levels, against `generate`.
G2: a shape of which others have published times: Qwen3-1.7B, 8 users, 1,000 or 5,000 tokens, 256 beams, 3 levels, in
milliseconds. G3: training the item tokens and LoRA of Qwen3-0.6B, targets a second against one example per target.
"""

import time
from collections.abc import Callable, Iterator

import torch

from llm_itemtok.bench import subjects
from llm_itemtok.bench.decode import GENERATE
from llm_itemtok.bench.measure import Result, at_least, at_most
from llm_itemtok.bench.train import Training
from llm_itemtok.bench.usual import DictTrie, generate_items
from llm_itemtok.decoding.beams import beam_search
from llm_itemtok.decoding.tree import TreeDecoder
from llm_itemtok.errors import ItemTokError
from llm_itemtok.vocab.trie import ItemTrie

QWEN3 = {
    "0.6b": subjects.Shape(28, 1024, 16, 3072, subjects.LLM_VOCABULARY, 8, 128, "qwen3"),
    "1.7b": subjects.Shape(28, 2048, 16, 6144, subjects.LLM_VOCABULARY, 8, 128, "qwen3"),
}
ITEMS = 12_000
PUBLISHED = {1000: 199.3, 5000: 685.4}
"""Milliseconds of SGLang's beam search on an H100, published with NVIDIA's recsys-examples (sid-gr-inference)."""
GOALS = {1000: 130.0, 5000: 400.0}


def gpu(repeats: int = 5, users: int = 256, usual_users: int = 8) -> Iterator[Result]:
    """G1 to G3.

    Raises:
        ItemTokError: if there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ItemTokError("this benchmark needs a CUDA device, and torch finds none; the other groups need none")
    rate = gemm_tflops(repeats)
    for name, shape in QWEN3.items():
        yield beams(f"G1-{name}", shape, rate, users=users, usual_users=usual_users, repeats=repeats)
    for tokens in PUBLISHED:
        yield long_histories(tokens, repeats)
    yield training(repeats)


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Least wall seconds of a call that leaves nothing running on the device, after one to warm up."""
    best = float("inf")
    for turn in range(repeats + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        if turn:
            best = min(best, time.perf_counter() - began)
    return best


def gemm_tflops(repeats: int, side: int = 8192) -> float:
    """Rate of a plain matrix product in bfloat16, in TFLOP/s."""
    left, right = torch.randn(2, side, side, dtype=torch.bfloat16, device="cuda")
    return 2 * side**3 / seconds(lambda: left @ right, repeats) / 1e12


def beams(name: str, shape: subjects.Shape, rate: float, *, users: int, usual_users: int, repeats: int) -> Result:
    """One model of G1: users a second against `generate`, and the floor's share of the time."""
    model = subjects.item_model(shape, subjects.codes(ITEMS), dtype=torch.bfloat16, device="cuda")
    plain = subjects.plain_model(model)
    trie = ItemTrie(model.vocab.codes).to(model.device)
    paths = DictTrie(iter(model.vocab.paths.tolist()))
    prompts = subjects.prompts(model.vocab, users, 80)
    decoder = TreeDecoder(model)
    ours = seconds(lambda: beam_search(decoder, trie, prompts, beam=20), repeats) / users
    few = prompts[:usual_users]
    usual = seconds(lambda: generate_items(plain, paths, few, beam=20, levels=4), 1) / usual_users
    floor = subjects.floor_gflop(shape, users=1, tokens=80, beam=20, levels=subjects.LEVELS)
    details = {
        "users_per_second": 1 / ours,
        "baseline_users_per_second": 1 / usual,
        "floor_share": floor / 1e3 / rate / ours,
        "gemm_tflops": rate,
        "device": torch.cuda.get_device_name(),
    }
    return at_least(name, usual / ours, 15, details, baseline=GENERATE)


def long_histories(tokens: int, repeats: int) -> Result:
    """One history length of G2."""
    shape, levels = QWEN3["1.7b"], subjects.LEVELS[:3]
    model = subjects.item_model(shape, subjects.codes(1_000_000, levels), dtype=torch.bfloat16, device="cuda")
    trie = ItemTrie(model.vocab.codes).to(model.device)
    prompts = subjects.prompts(model.vocab, 8, tokens)
    decoder = TreeDecoder(model)
    milliseconds = 1e3 * seconds(lambda: beam_search(decoder, trie, prompts, beam=256), repeats)
    details = {
        "floor_gflop": subjects.floor_gflop(shape, users=8, tokens=tokens, beam=256, levels=levels),
        "device": torch.cuda.get_device_name(),
    }
    baseline = f"SGLang as published: {PUBLISHED[tokens]} ms"
    return at_most(f"G2-{tokens}", milliseconds, GOALS[tokens], details, unit="ms", baseline=baseline)


def training(repeats: int) -> Result:
    """G3."""
    run = Training(QWEN3["0.6b"], users=64, dtype=torch.bfloat16, device="cuda", lora=True)
    usual, ours = seconds(run.usual, 1), seconds(run.ours, repeats)
    details = {
        "targets_per_second": run.targets / ours,
        "baseline_targets_per_second": run.targets / usual,
        "device": torch.cuda.get_device_name(),
    }
    baseline = "one example per target, padded, logits at every position"
    return at_least("G3", usual / ours, 10, details, baseline=baseline)
