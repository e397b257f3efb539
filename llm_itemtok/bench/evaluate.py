"""E and S: whole catalogues ranked for many users, end to end.

E1: full-ranking Recall and NDCG of 22,363 users with histories as long as Beauty's, softmax over the level, against the
protocol of public code: `generate`, 8 users at a time as they come, softmax over the vocabulary, a trie of
dictionaries, token ids looked up one by one. S1: the pass
that re-assigns item tokens asks for the beams of every item, from a prompt of 64 tokens. The usual way is measured on a
few dozen, since it would take hours.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from llm_itemtok.bench import subjects
from llm_itemtok.bench.measure import Result, at_least, cpu_seconds, one_thread
from llm_itemtok.bench.usual import DictTrie, generate_items
from llm_itemtok.data.splits import Cases
from llm_itemtok.decoding.beams import beam_search
from llm_itemtok.decoding.tree import TreeDecoder
from llm_itemtok.evaluation.full_ranking import rank_cases
from llm_itemtok.evaluation.metrics import metrics_from_ranks
from llm_itemtok.model.prompts import Prompts
from llm_itemtok.vocab.trie import ItemTrie

USERS, ITEMS, BEAM, HISTORY = 22_363, 12_101, 20, 20
SHAPE = subjects.Shape(layers=2, width=128, heads=4, inner=344, vocabulary=8192)
BATCH, FEW = 8, 48
PASS_ITEMS, PASS_FEW, PASS_TOKENS = 1024, 32, 64


class Evaluation:
    """One model, catalogue and log, ranked in both ways."""

    def __init__(self) -> None:
        self.model = subjects.item_model(SHAPE, subjects.codes(ITEMS))
        self.plain = subjects.plain_model(self.model)
        vocab = self.model.vocab
        self.paths = vocab.paths.numpy()
        self.trie, self.dict_trie = ItemTrie(vocab.codes), DictTrie(iter(self.paths.tolist()))
        self.rows = {tuple(path): row for row, path in enumerate(self.paths.tolist())}
        self.prompts = Prompts(subjects.tokenizer(), vocab)
        sequences = subjects.sequences(USERS, ITEMS, longest=HISTORY + 1)
        self.cases = Cases(
            users=tuple(str(user) for user in range(USERS)),
            offsets=np.cumsum([0, *(len(sequence) - 1 for sequence in sequences)]),
            items=np.concatenate([sequence[:-1] for sequence in sequences]),
            targets=np.array([sequence[-1] for sequence in sequences]),
            ties=np.zeros(USERS, dtype=bool),
        )

    def usual(self, cases: Cases) -> dict[str, float]:
        """Rank and measure as public code does."""
        ranks = []
        histories = [self.prompts.history(history) for history in cases.histories()]
        for begin in range(0, len(cases), BATCH):
            found = self._generate(histories[begin : begin + BATCH])
            for items, target in zip(found, cases.targets[begin : begin + BATCH].tolist(), strict=True):
                ranks.append(items.index(target) + 1 if target in items else 0)
        return metrics_from_ranks(np.array(ranks, dtype=np.float64))

    def ours(self, cases: Cases) -> dict[str, float]:
        """Rank and measure as every run does."""
        ranking = rank_cases(
            self.model, self.trie, self.prompts, cases, beam=BEAM, history_length=HISTORY, normaliser="level"
        )
        return metrics_from_ranks(ranking.ranks)

    def usual_pass(self, prompts: Sequence[np.ndarray]) -> None:
        """Ask for the beams of items, as public code does."""
        for begin in range(0, len(prompts), BATCH):
            self._generate(prompts[begin : begin + BATCH])

    def our_pass(self, prompts: Sequence[np.ndarray]) -> None:
        """Ask for the beams of items."""
        decoder = TreeDecoder(self.model)
        for begin in range(0, len(prompts), 64):
            beam_search(decoder, self.trie, prompts[begin : begin + 64], beam=BEAM)

    def _generate(self, prompts: Sequence[np.ndarray]) -> list[list[int]]:
        found, _ = generate_items(self.plain, self.dict_trie, prompts, beam=BEAM, levels=self.paths.shape[1])
        return [[self.rows[tuple(path)] for path in user] for user in found.tolist()]


def evaluate(repeats: int = 2) -> Iterator[Result]:
    """E1 and S1."""
    with one_thread():
        run = Evaluation()
        baseline = f"generate, {BATCH} at a time, trie of dictionaries"
        few = run.cases.head(FEW, seed=0)
        (usual_s,) = cpu_seconds(lambda: run.usual(few), repeats=repeats)
        (everybody,) = cpu_seconds(lambda: run.ours(run.cases), repeats=1)
        yield _rates("E1", 12, baseline, "users", (len(few), usual_s), (len(run.cases), everybody))
        prompts = subjects.prompts(run.model.vocab, PASS_ITEMS, PASS_TOKENS)
        usual_s, ours_s = cpu_seconds(
            lambda: run.usual_pass(prompts[:PASS_FEW]), lambda: run.our_pass(prompts), repeats=repeats
        )
        yield _rates("S1", 10, baseline, "items", (PASS_FEW, usual_s), (PASS_ITEMS, ours_s))


def _rates(
    name: str, target: float, baseline: str, unit: str, usual: tuple[int, float], ours: tuple[int, float]
) -> Result:
    """Ratio of two rates, each from a count and seconds."""
    rates = [count / seconds for count, seconds in (usual, ours)]
    named = {f"baseline_{unit}_per_second": rates[0], f"{unit}_per_second": rates[1], f"baseline_{unit}": usual[0]}
    return at_least(name, rates[1] / rates[0], target, named, baseline=baseline)
