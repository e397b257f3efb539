"""Baselines on the same split, candidates and histories as the model.

Decisions. Baselines are fitted on the training interactions of the split and on nothing else; their settings are chosen
on its validation cases, never on test; when they are ranked on test cases they see the same history as the model does,
validation item included. Ties count half (`metrics.ranks_from_scores`), which a chain of counts pays dearly for,
because most items never followed the last one and most of the others did so once. So ties are settled by popularity, as
anyone who ships it would: on the Beauty table that is Recall@10 .0656 in place of .0584 for a chain of bare counts, and
a gain over a baseline left weak is none.

What was measured once is kept (`evaluate_baselines(cache=…)`), because arms and seeds of an experiment share their
baselines. Kept are ranks (`kept.py`), under a hash of everything that decides them: the split, and the `fingerprint` of
the baseline, in which settings and defaults are counted and only other changes of code need a new version, set by hand.
Averages, intervals and segments are made anew.

A scorer is anything with `scores(histories) -> float32 [B, N]`.

Shape letters in this file: B cases of a batch, C cases in all, N items of the catalogue.
"""

import inspect
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol, final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array

from llm_itemtok import sasrec
from llm_itemtok.artifacts import sha256_of_arrays
from llm_itemtok.data.splits import Cases, Split
from llm_itemtok.errors import RecipeError
from llm_itemtok.evaluation.kept import Measured, measured_once
from llm_itemtok.evaluation.metrics import bootstrap, metrics_from_ranks, ranks_from_scores
from llm_itemtok.evaluation.neighbours import nearest, similar_items
from llm_itemtok.evaluation.segments import segment_metrics

Log = Callable[[str], None]
"""Called with a line of progress."""
Validate = Callable[["Scorer", Cases], float]
"""Says how good a scorer is on some cases; higher is better."""

_MAX_SCORES = 2**26
"""Scores held at a time (256 MB as float32): a batch is cut to it when the catalogue is large."""
_TUNING_CASES = 10_000
"""Validation cases that settings are chosen on, at most: a sample drawn with a fixed seed."""


class Scorer(Protocol):
    """Something that scores every item of the catalogue after a history."""

    def scores(self, histories: Sequence[NDArray[np.int64]]) -> NDArray[np.float32]:
        """Return float32 [B, N], higher is better; histories are catalogue rows in time order, possibly empty."""
        ...


@final
class Popularity:
    """Score an item by how often it occurs in training, whatever the history."""

    def __init__(self, counts: NDArray[np.int64]) -> None:
        """Keep the training interactions of each item, int64 [N]."""
        self.counts = counts

    @classmethod
    def fit(cls, split: Split) -> "Popularity":
        """Count the training interactions of each item."""
        return cls(split.item_counts())

    def scores(self, histories: Sequence[NDArray[np.int64]]) -> NDArray[np.float32]:
        """Return the counts for every history: float32 [B, N], a read-only view of one row."""
        return np.broadcast_to(self.counts.astype(np.float32), (len(histories), len(self.counts)))


@final
class Markov:
    """First-order Markov chain: score an item by how often it followed the history's last item in training.

    The unfactorised chain of Rendle et al. 2010 (doi:10.1145/1772690.1772773), section 4.1, for one item a step.
    Dividing by the row's total would not change a ranking, so counts are left as they are.
    """

    def __init__(self, transitions: csr_array, settle: NDArray[np.float32]) -> None:
        """Keep how often column follows row, float32 [N, N], and what settles ties, float32 [N] in [0, 1)."""
        self.transitions = transitions
        self.settle = settle

    @classmethod
    def fit(cls, split: Split, *, settle_by_popularity: bool = True) -> "Markov":
        """Count neighbouring pairs inside the training sequence of each user.

        Args:
            split: whose training part is counted.
            settle_by_popularity: order items of equal counts by their training interactions; without it they stay
                tied, and an unknown last item scores every item 0.
        """
        items = split.train_items
        within = np.ones(max(len(items) - 1, 0), dtype=bool)
        # The pair that ends where a user's sequence begins joins two users. Empty sequences repeat an offset.
        starts = split.train_offsets[1:-1]
        within[starts[(starts > 0) & (starts < len(items))] - 1] = False
        before, after = items[:-1][within], items[1:][within]
        ones = np.ones(len(before), dtype=np.float32)
        transitions = csr_array((ones, (before, after)), shape=(split.num_items, split.num_items))
        return cls(transitions, _popularity(split) * np.float32(settle_by_popularity))

    def scores(self, histories: Sequence[NDArray[np.int64]]) -> NDArray[np.float32]:
        """Return the transition counts from each last item, ties settled: float32 [B, N]."""
        scores = np.tile(self.settle, (len(histories), 1))
        known = [case for case, history in enumerate(histories) if len(history)]
        if known:
            last = np.array([histories[case][-1] for case in known], dtype=np.int64)
            scores[known] += self.transitions[last].toarray()
        return scores


@final
class ItemKNN:
    """Item neighbours: score an item by its likeness to the items of the history, newer ones counting more.

    Two items are alike by the cosine of the sets of training users who touched them (Sarwar et al. 2001,
    doi:10.1145/371920.372071), and each item of the history speaks for its nearest neighbours only (Deshpande and
    Karypis 2004, doi:10.1145/963770.963776). Ours differs in the weight of `decay` a step back in time; the papers'
    histories have no order. Written on scipy because the package `implicit` is no longer well kept.
    """

    GRID: Mapping[str, tuple[Any, ...]] = {
        "repeats": (True, False),
        "decay": (0.7, 0.3, 0.5, 0.85, 1.0),
        "neighbours": (100, 20, 50, 200, 500, 1000),
        "shrink": (0.0, 3.0, 10.0, 30.0, 100.0),
    }
    """What `tune` chooses from, the first of each being where it begins."""

    def __init__(
        self, similarity: csr_array, settle: NDArray[np.float32], *, decay: float = 0.7, repeats: bool = True
    ) -> None:
        """Keep what each item's neighbours are.

        Args:
            similarity: float32 [N, N], a row for each item of a history, with its nearest neighbours only.
            settle: float32 [N] in [0, 1): what orders items of equal scores.
            decay: weight of an item of the history over that of the next newer one, in (0, 1].
            repeats: whether users return to items; if not, all others stand before those of the history.
        """
        self.similarity = similarity
        self.settle = settle * np.float32(1e-4)  # at most what a cosine of .0001 with the newest item is worth
        self.decay, self.repeats = decay, repeats

    @classmethod
    def fit(
        cls, split: Split, *, neighbours: int = 100, shrink: float = 0.0, decay: float = 0.7, repeats: bool = True
    ) -> "ItemKNN":
        """Find the neighbours of each item.

        Args:
            split: whose training part is used.
            neighbours: of an item, at most.
            shrink: is added to the cosine's denominator, so that likeness which few users bear out counts less.
            decay: as in the constructor.
            repeats: as in the constructor.
        """
        settle = _popularity(split)
        return cls(similar_items(split, settle, neighbours, shrink), settle, decay=decay, repeats=repeats)

    @classmethod
    def tune(cls, split: Split, validate: Validate, log: Log) -> "tuple[ItemKNN, dict[str, Any]]":
        """Choose settings on validation cases by NDCG@10, one setting at a time, twice round.

        Returns:
            The baseline and its settings: the keys of `GRID`.
        """
        cases, settle = split.validation.head(_TUNING_CASES, seed=0), _popularity(split)
        seen: dict[tuple[Any, ...], float] = {}

        @lru_cache(maxsize=2)  # of the best setting and the one that is tried: of a large catalogue they are large
        def similar(shrink: float) -> csr_array:
            return similar_items(split, settle, max(cls.GRID["neighbours"]), shrink)

        def make(setting: Mapping[str, Any]) -> ItemKNN:
            similarity = nearest(similar(setting["shrink"]), setting["neighbours"])
            return cls(similarity, settle, decay=setting["decay"], repeats=setting["repeats"])

        def score(setting: Mapping[str, Any]) -> float:
            key = tuple(setting.values())
            if key not in seen:
                seen[key] = validate(make(setting), cases)
            return seen[key]

        best = {name: values[0] for name, values in cls.GRID.items()}
        for name, values in [*cls.GRID.items()] * 2:
            best = max(({**best, name: value} for value in (best[name], *values)), key=score)
        told = ", ".join(f"{name} {json.dumps(value)}" for name, value in best.items())
        log(f"  item-knn: {told}; chosen of {len(seen)} settings")
        return make(best), best

    def scores(self, histories: Sequence[NDArray[np.int64]]) -> NDArray[np.float32]:
        """Return the weighted sums of likeness, ties settled: float32 [B, N]."""
        offsets = np.cumsum([0, *(len(history) for history in histories)])
        items = np.concatenate([*histories, np.zeros(0, dtype=np.int64)])
        ages = np.repeat(offsets[1:], np.diff(offsets)) - np.arange(len(items)) - 1
        shape = (len(histories), len(self.settle))
        weights = csr_array(((self.decay**ages).astype(np.float32), items, offsets), shape=shape)
        scores: NDArray[np.float32] = (weights @ self.similarity).toarray() + self.settle
        if not self.repeats:
            # Scores are not negative, so their reciprocals put them below all others and in the same order. To take a
            # large number off instead would round away what tells them apart.
            seen = seen_items(histories, shape[1])
            scores[seen] = -1 / (scores[seen] + np.finfo(np.float32).tiny)
        return scores


def validated(scorer: Scorer, cases: Cases, mask_seen: bool, repeats: bool = True) -> float:
    """Say how good a scorer is: NDCG@10, and a thousandth of the NDCG without a cutoff, for where hits are few."""
    ranks = rank_targets(scorer, cases, mask_seen, repeats)
    return metrics_from_ranks(ranks)["ndcg@10"] + 1e-3 * float(np.mean(1 / np.log2(ranks + 1)))


def sasrec_interval(split: Split) -> int:
    """Say after how many steps to validate: five epochs of a small log, which soon overfits, below one of a large."""
    return int(np.clip(5 * len(split.train_items) / 1024, 50, 300))


def _popularity(split: Split) -> NDArray[np.float32]:
    """Training interactions of each item as float32 [N] in [0, 1), which settles ties of whole numbers."""
    counts = split.item_counts()
    return (counts / (counts.max(initial=0) + 1)).astype(np.float32)


SASREC_SETTINGS: Sequence[Mapping[str, Any]] = ({"dropout": 0.5}, {"dropout": 0.3})
"""What the SASRec baseline chooses from on validation; all else as `sasrec.fit` has it."""


def _tune_sasrec(split: Split, validate: Validate, device: str, log: Log) -> tuple[Scorer, dict[str, Any]]:
    """Train one SASRec a setting and keep the one that validates best.

    Its seed is fixed, not the recipe's: one result then serves every seed of an experiment.
    """
    cases = split.validation.head(_TUNING_CASES, seed=0)
    said = time.monotonic()

    def watched(model: sasrec.SASRec) -> float:
        nonlocal said
        score = validate(model, cases)
        if time.monotonic() - said > 60:  # a sign of life, not a curve
            said = time.monotonic()
            log(f"  sasrec: validation NDCG@10 {score:.4f}")
        return score

    every = sasrec_interval(split)
    best, chosen = None, {}
    for setting in SASREC_SETTINGS:
        settings = {"every": every, "device": device, **setting}
        fitted = sasrec.fit(split.train_sequences(), split.num_items, validate=watched, seed=0, **settings)
        log(f"  sasrec, dropout {setting['dropout']}: validation NDCG@10 {fitted.score:.4f} after {fitted.step} steps")
        if best is None or fitted.score > best.score:
            best, chosen = fitted, {**setting, "steps": fitted.step}
    assert best is not None
    return best.model, chosen


class Baseline(NamedTuple):
    """How a baseline comes about."""

    version: int
    """To be raised whenever its ranks can change by more than what `settings` says: what was kept of older versions is
    then not used."""
    fit: Callable[[Split, Validate, str, Log], tuple[Scorer, dict[str, Any]]]
    """From a split, what it is tuned by, the device to train on and a log: the baseline fitted, and the settings that
    were chosen on validation."""
    settings: Callable[[], Sequence[Any]] = tuple
    """Says what settings are tried and what defaults stand for the others; JSON values, in the order they are tried."""


BASELINES: Mapping[str, Baseline] = {
    "popularity": Baseline(1, lambda split, _validate, _device, _log: (Popularity.fit(split), {})),
    "markov": Baseline(
        1, lambda split, _validate, _device, _log: (Markov.fit(split), {}), lambda: (_defaults(Markov.fit),)
    ),
    "item-knn": Baseline(
        2,
        lambda split, validate, _device, log: ItemKNN.tune(split, validate, log),
        lambda: (ItemKNN.GRID, _TUNING_CASES),
    ),
    "sasrec": Baseline(
        1,
        _tune_sasrec,
        lambda: (SASREC_SETTINGS, _TUNING_CASES, _defaults(sasrec.fit), _defaults(sasrec.SASRec)),
    ),
}
"""The baselines that `evaluation.baselines` of a recipe may name."""


def fingerprint(name: str) -> str:
    """Hash what decides a baseline apart from the data: its version, the settings tried and the defaults of the rest.

    Args:
        name: a key of `BASELINES`.

    Returns:
        16 hexadecimal digits.
    """
    baseline = BASELINES[name]
    return sha256_of_arrays(name, str(baseline.version), json.dumps(baseline.settings()))[:16]


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """The arguments of a function that have a default, and that."""
    arguments = inspect.signature(function).parameters.values()
    return {argument.name: argument.default for argument in arguments if argument.default is not argument.empty}


def rank_targets(
    scorer: Scorer, cases: Cases, mask_seen: bool, repeats: bool = True, batch: int = 512
) -> NDArray[np.float64]:
    """Rank the target of each case among all items of the catalogue.

    Args:
        scorer: a baseline, or a model that scores whole catalogues.
        cases: histories and targets.
        mask_seen: leave the items of the history out of the candidates, the target excepted.
        repeats: whether users return to items; if not, those of the history stand last, the target with them.
        batch: cases scored at a time, at most; fewer when the catalogue is large.

    Returns:
        float64 [C], in steps of one half, at least 1.

    Raises:
        ValueError: if the scorer returns NaN or scores of another shape.
    """
    ranks = np.zeros(len(cases))
    start, step = 0, 1  # one case first: it tells the size of the catalogue
    while start < len(cases):
        stop = min(start + step, len(cases))
        histories = [cases.history(case) for case in range(start, stop)]
        scores = scorer.scores(histories)
        exclude = seen_items(histories, scores.shape[1]) if mask_seen and repeats else None
        if not repeats:
            scores = np.where(seen_items(histories, scores.shape[1]), -np.inf, scores)
        ranks[start:stop] = ranks_from_scores(scores, cases.targets[start:stop], exclude)
        start, step = stop, max(1, min(batch, _MAX_SCORES // scores.shape[1]))
    return ranks


def evaluate_baselines(
    names: Sequence[str],
    split: Split,
    cases: Cases,
    mask_seen: bool,
    seed: int,
    *,
    repeats: bool = True,
    device: str | torch.device = "cpu",
    masks: Mapping[str, NDArray[np.bool_]] | None = None,
    cache: Path | None = None,
    log: Log = lambda _line: None,
) -> dict[str, dict[str, Any]]:
    """Fit and measure baselines: the `baselines` part of `metrics.json`.

    Args:
        names: keys of `BASELINES`, in the order of the result.
        split: whose training part the baselines are fitted on, and whose validation cases they are tuned on.
        cases: what they are measured on, as a rule `split.test`.
        mask_seen: as in `rank_targets`.
        seed: of the bootstrap. Baselines do not depend on it.
        repeats: False where the model leaves out items of the history. Baselines then may, too: what validates better.
        device: where the baselines that are networks are trained and ranked.
        masks: segments of `cases`, as `segment_metrics` takes them; none without.
        cache: folder in which ranks are kept and looked for; None keeps nothing. Processes that share it measure
            nothing twice: one waits for the other.
        log: called with lines of progress.

    Returns:
        `{name: {"test": {metric: value}, "ci95": {metric: [low, high]}, "segments": {segment: {...}}, "validation":
        {metric: value}, "settings": {what was chosen on validation}, "seconds": to tune, fit and rank, "fingerprint":
        as `fingerprint` gives it}}`.

    Raises:
        RecipeError: if a name is no baseline.
    """
    unknown = [name for name in names if name not in BASELINES]
    if unknown:
        raise RecipeError(f"`evaluation.baselines` takes {', '.join(BASELINES)}, was: {', '.join(unknown)}")
    results = {}
    for name in names:
        measured = _measured(name, split, cases, _Candidates(mask_seen, repeats), str(device), cache, log)
        results[name] = {
            "test": metrics_from_ranks(measured.test),
            "ci95": bootstrap(measured.test, seed=seed),
            "segments": segment_metrics(measured.test, masks or {}),
            "validation": metrics_from_ranks(measured.validation),
            "settings": measured.settings,
            "seconds": measured.seconds,
            "fingerprint": fingerprint(name),
        }
    return results


class _Candidates(NamedTuple):
    mask_seen: bool
    repeats: bool


def _measured(
    name: str, split: Split, cases: Cases, candidates: _Candidates, device: str, cache: Path | None, log: Log
) -> Measured:
    """Measure a baseline, or find what was kept when it was measured before."""

    def judge(scorer: Scorer, cases: Cases) -> tuple[float, bool]:
        ways = {True, candidates.repeats}
        return max((validated(scorer, cases, candidates.mask_seen, way), way) for way in ways)

    def measure() -> Measured:
        log(f"  baseline {name} …")
        started = time.perf_counter()
        scorer, settings = BASELINES[name].fit(split, lambda scorer, cases: judge(scorer, cases)[0], device, log)
        repeats = True
        if not candidates.repeats:
            repeats = judge(scorer, split.validation.head(_TUNING_CASES, seed=0))[1]
            settings = {**settings, "repeats": settings.get("repeats", True) and repeats}
        test, validation = (
            rank_targets(scorer, part, candidates.mask_seen, repeats) for part in (cases, split.validation)
        )
        return Measured(test, validation, settings, round(time.perf_counter() - started, 3))

    if cache is None:
        return measure()
    return measured_once(cache / name, _key(name, split, cases, candidates, device), measure, log)


def _key(name: str, split: Split, cases: Cases, candidates: _Candidates, device: str) -> str:
    """Hash everything that decides the ranks of a baseline."""
    way = "" if candidates.repeats else f" or without repeats, by {_TUNING_CASES}"  # no choice in what was kept first
    facts = f"{name} {fingerprint(name)} {split.num_items} {candidates.mask_seen}{way}"
    if name == "sasrec":  # whose arithmetic is torch's, and not the same on every kind of device
        facts += f" torch {torch.__version__} {torch.device(device).type}"
    parts = (part for of in (split.validation, cases) for part in (of.offsets, of.items, of.targets))
    return sha256_of_arrays(facts, split.train_offsets, split.train_items, *parts)


def seen_items(histories: Sequence[NDArray[np.int64]], num_items: int) -> NDArray[np.bool_]:
    """Mark the items of each history: bool [B, N]."""
    seen = np.zeros((len(histories), num_items), dtype=bool)
    for case, history in enumerate(histories):
        seen[case, history] = True
    return seen
