"""Validation while training: the whole catalogue is ranked for cases held out, under the item tokens of now."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from llm_itemtok.config import RunConfig
from llm_itemtok.data.splits import Cases
from llm_itemtok.decoding.scoring import score_items
from llm_itemtok.evaluation.full_ranking import rank_cases
from llm_itemtok.evaluation.metrics import metrics_from_ranks
from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.model.likelihood import Normaliser
from llm_itemtok.model.prompts import Prompts
from llm_itemtok.processes import added_up, dealt
from llm_itemtok.update_settings import SelfImproveUpdate
from llm_itemtok.vocab.item_vocab import ItemVocab
from llm_itemtok.vocab.trie import ItemTrie

RULES: Mapping[str, tuple[bool, ...]] = {"keep": (True,), "drop": (False,), "choose": (True, False)}
"""What `evaluation.repeats` leaves open: whether items of a history may come out."""
WAYS: Mapping[bool, str] = {True: "keep", False: "drop"}


def decode_normaliser(config: RunConfig) -> Normaliser:
    """What beams are normalised over: as in training unless the recipe says otherwise."""
    chosen = config.evaluation.decode_normaliser
    return config.objective.normaliser if chosen == "same" else chosen


def measure_all(
    config: RunConfig,
    model: ItemTokenModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Cases,
    log: Callable[[str], None],
) -> tuple[Mapping[str, float], bool, dict[str, Any]]:
    """Rank all validation cases, in each way that the recipe leaves open.

    Every process of a run must call it: they share the cases.

    Returns:
        Metrics; whether items of the history may come out (`evaluation.repeats`), which they may where validation is to
        choose and NDCG@10 is no higher without them; and where it chose, `{"repeats": {"keep": NDCG@10, "drop": ...}}`.
    """
    ways = RULES[config.evaluation.repeats]
    found = {way: Validation(config, model, tokenizer, cases, everybody=True, repeats=way)() for way in ways}
    chosen = max(found, key=lambda way: found[way]["ndcg@10"])
    if len(found) == 1:
        return found[chosen], chosen, {}
    kept, dropped = (found[way]["ndcg@10"] for way in ways)
    log(
        f"  items of a history are {'kept among' if chosen else 'left out of'} the answers: validation NDCG@10 "
        f"{kept:.4f} with them, {dropped:.4f} without"
    )
    return found[chosen], chosen, {"repeats": {WAYS[way]: found[way]["ndcg@10"] for way in ways}}


class Validation:
    """Measures a model on the validation cases: a seeded sample of them if the recipe says so, or everybody.

    Trie and prompts follow the model's item tokens. Where processes share the work, all of them must call it.
    """

    def __init__(
        self,
        config: RunConfig,
        model: ItemTokenModel,
        tokenizer: PreTrainedTokenizerBase,
        cases: Cases,
        *,
        everybody: bool = False,
        repeats: bool = True,
    ) -> None:
        """Measure `model` as `config` says; without `repeats`, items of a history are left out of its list."""
        users = 0 if everybody else config.evaluation.validation_users
        self._config, self._model, self._tokenizer, self._repeats = config, model, tokenizer, repeats
        self._sample = cases.head(users or len(cases), config.seed)
        update = config.update
        self._with_likelihood = isinstance(update, SelfImproveUpdate) and update.gate == "likelihood"
        self._vocab: ItemVocab | None = None

    def __call__(self) -> Mapping[str, float]:
        """Metrics by name; with `likelihood`, mean log-probability of the targets in nats, where updates go by it."""
        config = self._config
        if self._model.vocab is not self._vocab:
            self._vocab = self._model.vocab
            self._trie = ItemTrie(self._vocab.codes)
            self._prompts = Prompts.of(self._model, self._tokenizer)
        ranking = rank_cases(
            self._model,
            self._trie,
            self._prompts,
            self._sample,
            beam=config.evaluation.beam,
            history_length=config.examples.history_length,
            normaliser=decode_normaliser(config),
            mask_seen=config.evaluation.mask_seen,
            repeats=self._repeats,
            batch_size=config.evaluation.batch_size,
        )
        metrics = metrics_from_ranks(ranking.ranks)
        return metrics | {"likelihood": self._likelihood()} if self._with_likelihood else metrics

    def _likelihood(self) -> float:
        """Mean log-probability of the targets, each of the whole item, exact."""
        config, histories = self._config, self._sample.histories()
        scores = np.zeros(len(histories), dtype=np.float32)
        order = np.argsort([len(history) for history in histories], kind="stable")
        for cases in dealt(order, config.evaluation.batch_size):
            found = score_items(
                self._model,
                self._trie,
                [self._prompts.history(histories[case][-config.examples.history_length :]) for case in cases],
                [self._sample.targets[[case]] for case in cases],
                normaliser=decode_normaliser(config),
            )
            scores[cases] = np.concatenate(found)
        return float(added_up(scores, self._model.device).mean(dtype=np.float64))
