"""D: beams over the trie against `generate`, and against the physical floor.

D1: 16 users, 80 tokens, 20 beams, 4 levels of 256 codewords, 12,000 items, a Llama of 4 layers and width 256 with 9,216
tokens. D2: the same with the vocabulary of a large model, 4 users. D3: D1 against the better loop. D4: the share of the
floor's time in ours: the least arithmetic that any exact beam search needs, at the rate of a plain matrix product.
T5-decode: D1 with an encoder–decoder, a T5 of 4 and 4 layers of the same width.

`exact` is the normaliser `vocab`: the same rankings as `generate`, which is checked. `level` is how item tokens are
trained and decoded by default.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np

from llm_itemtok.bench import subjects
from llm_itemtok.bench.measure import (
    Result,
    at_least,
    at_most,
    cpu_seconds,
    gemm_gflops,
    multiply,
    one_thread,
    peak_mb,
)
from llm_itemtok.bench.usual import DictTrie, generate_items, one_prefill
from llm_itemtok.decoding.beams import beam_search
from llm_itemtok.decoding.choice import decoder_for
from llm_itemtok.model.likelihood import Normaliser
from llm_itemtok.vocab.trie import ItemTrie

ITEMS, TOKENS, BEAM = 12_000, 80, 20
GENERATE, BETTER = "generate with a prefix function over a trie of dictionaries", "one prefill, repeated cache"


class Decoding:
    """One model, catalogue and batch of histories, decoded in every way."""

    def __init__(self, shape: subjects.Shape, users: int) -> None:
        """Build it with a random model of this shape and this many users."""
        self.shape = shape
        self.model = subjects.item_model(shape, subjects.codes(ITEMS))
        self.plain = subjects.plain_model(self.model)
        vocab = self.model.vocab
        self.paths = vocab.paths.numpy()
        self.trie, self.dict_trie = ItemTrie(vocab.codes), DictTrie(iter(self.paths.tolist()))
        self.prompts = subjects.prompts(vocab, users, TOKENS)
        self.first_ids = [vocab.first_id + start for start in vocab.level_starts]

    def usual(self) -> np.ndarray:
        """Rank with `generate`; catalogue rows `[B, K]`."""
        found, _ = generate_items(self.plain, self.dict_trie, self.prompts, beam=BEAM, levels=self.paths.shape[1])
        rows = {tuple(path): row for row, path in enumerate(self.paths.tolist())}
        return np.array([[rows[tuple(path)] for path in user] for user in found.tolist()])

    def better(self) -> np.ndarray:
        """Rank with one prefill and a repeated cache."""
        return one_prefill(self.plain, self.trie, self.first_ids, np.stack(self.prompts), beam=BEAM)

    def ours(self, normaliser: Normaliser) -> np.ndarray:
        """Rank with tree-shaped beams."""
        return beam_search(decoder_for(self.model), self.trie, self.prompts, beam=BEAM, normaliser=normaliser).items

    def exact(self) -> np.ndarray:
        """Rank as `generate` does."""
        return self.ours("vocab")

    def level(self) -> np.ndarray:
        """Rank as item tokens are trained."""
        return self.ours("level")


def decode(repeats: int = 4) -> Iterator[Result]:
    """D1 to D4, and T5-decode."""
    with one_thread():
        yield from _small(repeats)
        yield from _large(repeats)
        yield from _encoder_decoder(repeats)


def _small(repeats: int) -> Iterator[Result]:
    run = Decoding(subjects.SMALL, users=16)
    agreement = float((run.usual() == run.exact()).mean())
    better_agreement = float((run.better() == run.exact()).mean())
    calls = (run.usual, run.better, run.exact, run.level, multiply)
    usual, better, exact, level, gemm = cpu_seconds(*calls, repeats=repeats)
    users = len(run.prompts)
    seconds = {"usual_s": usual, "better_s": better, "exact_s": exact, "level_s": level}
    speed = {"users_per_second": users / exact, "same_ranking": agreement}
    yield _equal("D1-exact", usual / exact, 10, agreement, {**speed, **seconds}, GENERATE)
    yield at_least("D1-level", usual / level, 14, {"users_per_second": users / level, **seconds}, baseline=GENERATE)
    memory = {f"{way}_mb": peak_mb(_prepared, way) for way in ("usual", "exact", "level")}
    yield at_most("D1-memory", memory["exact_mb"] / memory["usual_mb"], 1 / 6, memory, baseline=GENERATE)
    yield _equal("D3-exact", better / exact, 1.4, better_agreement, seconds, BETTER)
    yield at_least("D3-level", better / level, 2, seconds, baseline=BETTER)
    least = subjects.floor_gflop(run.shape, users=users, tokens=TOKENS, beam=BEAM, levels=subjects.LEVELS)
    rate = gemm_gflops(gemm)
    floor = {"floor_gflop": least, "gemm_gflops": rate, **seconds}
    yield at_least("D4", least / rate / level, 0.7, floor, unit="share", baseline="the floor's time")


def _large(repeats: int) -> Iterator[Result]:
    run = Decoding(subjects.LARGE_VOCABULARY, users=4)
    agreement = float((run.usual() == run.exact()).mean())
    usual, exact, level = cpu_seconds(run.usual, run.exact, run.level, repeats=repeats)
    details = {"same_ranking": agreement, "usual_s": usual, "exact_s": exact, "level_s": level}
    yield _equal("D2-exact", usual / exact, 3.5, agreement, details, GENERATE)
    yield at_least("D2-level", usual / level, 28, details, baseline=GENERATE)


def _encoder_decoder(repeats: int) -> Iterator[Result]:
    run = Decoding(subjects.ENCODER_DECODER, users=16)
    agreement = float((run.usual() == run.exact()).mean())
    usual, exact, level = cpu_seconds(run.usual, run.exact, run.level, repeats=repeats)
    users = len(run.prompts)
    details = {
        "users_per_second": users / exact, "same_ranking": agreement, "level_speed": usual / level,
        "usual_s": usual, "exact_s": exact, "level_s": level,
    }  # fmt: skip
    yield _equal("T5-decode", usual / exact, 4, agreement, details, GENERATE)


def _equal(
    name: str, value: float, target: float, agreement: float, details: Mapping[str, float], baseline: str
) -> Result:
    """A speed that counts only if the rankings are those of the baseline."""
    result = at_least(name, value, target, details, baseline=baseline)
    return replace(result, met=result.met and agreement == 1.0)


def _prepared(way: str) -> Callable[[], object]:
    """D1 in one way, warmed up on one short history: for a fresh process whose memory is measured."""
    run = Decoding(subjects.SMALL, users=16)
    call: Callable[[], object] = getattr(run, way)
    everybody, run.prompts = run.prompts, [prompt[:8] for prompt in run.prompts[:1]]
    call()
    run.prompts = everybody
    return call
