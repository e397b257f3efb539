"""The section `update` of a recipe; `settings.py` holds the others, and says how to read it."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from llm_itemtok.settings import Count, CountOrNone, NotNegative, Positive
from llm_itemtok.strict import Only, Unless, Within

Share = Annotated[float, Within(above=0, high=1)]


@dataclass(frozen=True, kw_only=True)
class FixedUpdate:
    """Item tokens stay what they are while the model is trained."""

    kind: Literal["fixed"] = "fixed"
    """They do not change."""


@dataclass(frozen=True, kw_only=True)
class Every:
    """When rounds of updates begin: after every so many steps, or epochs; one of the two."""

    steps: Count | None = None
    """Optimiser steps from one beginning to the next."""
    epochs: Positive | None = None
    """The same in epochs."""


@dataclass(frozen=True, kw_only=True)
class SelfImproveUpdate:
    """The model that is trained gives items better codes, at intervals (SIIT, arXiv:2412.17171; a reconstruction)."""

    kind: Literal["self-improve"] = "self-improve"
    """Rounds of asking the model, trying out, and keeping or taking back."""
    source: Literal["embeddings", "generate", "both", "random"] = "embeddings"
    """What says how likely codes are: learnt states, the model reading titles, both; `random` is a control."""
    every: Every = field(default_factory=lambda: Every(epochs=5.0))
    """When rounds begin: {steps: N} or {epochs: N}, counted from the start of training."""
    rounds: Count = 3
    """Rounds at most; one that could not end before training does is not begun."""
    gate: Literal["ndcg@10", "likelihood", "none"] = "ndcg@10"
    """Validation metric that must not fall, `likelihood` that of the targets; `none` accepts every round at once."""
    adapt: Annotated[Positive, Unless("gate", ("none",))] = 1.0
    """Epochs of training with the new codes before they are judged."""
    tolerance: Annotated[float, Within(above=-1, below=1), Unless("gate", ("none",))] = 0.0
    """Share of the gate's metric that may be lost; a negative one must be gained."""
    patience: CountOrNone = 2
    """Rounds in a row that changed nothing, or were refused, after which there are no more; 0 never ends."""
    scope: Literal["outliers", "all"] = "outliers"
    """Who may move: the items whose code conflicts most with what the model has learnt, or all."""
    outliers: Annotated[Share, Only("scope", ("outliers",))] = 0.1
    """Share of the items that may move in a round, the most conflicting ones."""
    max_moves: Annotated[Share, Only("scope", ("all",))] = 1.0
    """Share of the items that may move in a round at most, the most confident ones."""
    price: Annotated[NotNegative, Unless("source", ("random",))] = 0.0
    """Nats of log-likelihood that a move must be worth."""
    assignment: Annotated[Literal["greedy", "matching"], Unless("source", ("random",))] = "greedy"
    """Who gets a code that several want: the most confident, or whoever makes the sum of all the best."""
    candidates: Annotated[Count, Unless("source", ("random",))] = 10
    """Codes looked at for each item and source."""
    groups: Annotated[Count, Only("source", ("generate", "both"))] = 1
    """Groups of beams, each kept apart from those before it by `diversity`; a divisor of `candidates`."""
    diversity: Annotated[NotNegative, Only("source", ("generate", "both"))] = 0.0
    """Nats taken off a codeword for each beam of the groups before that has it."""
    usage_penalty: Annotated[NotNegative, Only("source", ("generate", "both"))] = 0.0
    """Nats taken off codewords that e times as many items use as the mean."""
    contexts: Annotated[CountOrNone, Only("source", ("embeddings", "both"))] = 20
    """Predictions of each item that are read, as far as training has so many; 0 reads all examples."""
    vectors_weight: Annotated[NotNegative, Only("source", ("embeddings", "both"))] = 0.0
    """Weight of the item vectors beside the states; 0 leaves them out."""
    iterations: Annotated[CountOrNone, Only("source", ("embeddings", "both"))] = 5
    """Steps by which codebooks follow the states before codes are read off them."""
    rows: Literal["keep", "refresh"] = "keep"
    """Vectors of codewords that lost most of their items: kept, or begun anew from those that their new items had."""


Update = FixedUpdate | SelfImproveUpdate
