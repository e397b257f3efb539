"""The section `update` of a recipe; `settings.py` holds the others, and says how to read it."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from llm_itemtok.settings import Count, CountOrNone, NotNegative, Positive
from llm_itemtok.strict import Only, Unless, Within

Share = Annotated[float, Within(above=0, high=1)]
Fraction = Annotated[float, Within(low=0, high=1)]


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
    whiten: Annotated[Fraction, Only("source", ("embeddings", "both"))] = 0.5
    """How far directions of states and item vectors are made to count alike: 0 not at all, 1 fully."""
    shrinkage: Annotated[NotNegative, Only("source", ("embeddings", "both")), Unless("vectors_weight", (0.0,))] = 30.0
    """Beside item vectors, the mean of n states of an item counts by n / (n + shrinkage); 0: those of all alike."""
    iterations: Annotated[CountOrNone, Only("source", ("embeddings", "both"))] = 5
    """Steps by which codebooks follow the states before codes are read off them."""
    rows: Literal["keep", "refresh"] = "keep"
    """Vectors of codewords that lost most of their items: kept, or begun anew from those that their new items had."""


@dataclass(frozen=True, kw_only=True)
class BilevelUpdate:
    """The quantizer is trained beside the model, by what its codes do to a model one step ahead (BLOGER)."""

    kind: Literal["bilevel"] = "bilevel"
    """Steps of the quantizer at intervals, after each of which codes are read anew (arXiv:2510.21242)."""
    every: Every = field(default_factory=lambda: Every(epochs=1.0))
    """When the quantizer takes a step: {steps: N} or {epochs: N}."""
    rounds: CountOrNone = 0
    """Steps of the quantizer at most; item tokens stay after the last one. 0 goes on as long as training does."""
    look_ahead: NotNegative | None = None
    """Length of the model's step ahead; null for the trainer's learning rate then, 0 for joint training without."""
    order: Annotated[Literal[1, 2], Unless("look_ahead", (0.0,))] = 2
    """Whether the gradient goes through the step ahead (2), or takes the model there as it is (1)."""
    surgery: Literal["projection", "bloger-release", "none"] = "projection"
    """What is done where recommendation pulls against reconstruction: projection, what the release does, nothing."""
    weight: NotNegative = 0.5
    """Of the gradient of reconstruction, which recommendation has weight 1 beside."""
    learning_rate: NotNegative = 1e-4
    """Of the quantizer's AdamW, constant."""
    weight_decay: NotNegative = 1e-4
    """Of the same, for encoder and decoder; codebooks have none."""
    codebook: NotNegative = 1.0
    """Weight of the terms that keep codewords and latent vectors together, beside the error of rebuilt vectors."""
    commitment: NotNegative = 0.25
    """Weight of the encoder's side of these terms."""
    residual: Literal["paper", "release"] = "paper"
    """How probabilities below the first level reach the encoder: through what is left over, or, as released, not."""
    gradient: Literal["mixture", "own"] = "mixture"
    """What learns of an item that is read: all codewords of a level by their probability, as published, or its own."""
    margin: NotNegative = 0.0
    """An item keeps a codeword whose squared distance is at most 1 + this times the least; 0 takes the nearest."""
    batch_size: CountOrNone = 0
    """Examples of a step of the quantizer; 0 for as many as a step of the training has."""


@dataclass(frozen=True, kw_only=True)
class AlternateUpdate:
    """Quantizer and model learn in turns, tied together by two alignments (ETEGRec)."""

    kind: Literal["alternate"] = "alternate"
    """An epoch of the quantizer between epochs of the model; codes are read anew after each (arXiv:2409.05546)."""
    every: Every = field(default_factory=lambda: Every(epochs=1.0))
    """How long the model learns between turns of the quantizer: the paper's cycle, less one epoch."""
    rounds: Count = 20
    """Turns of the quantizer at most; after the cycle of the last one item tokens stay, and the alignments end."""
    schedule: Literal["turns", "joint"] = "turns"
    """`joint` is a control: the quantizer learns at every step, and codes are read anew where its turns would be."""
    first: Annotated[bool, Only("schedule", ("turns",))] = True
    """Whether training begins with a turn of the quantizer, as released, or with the model."""
    sequence: NotNegative = 3.0e-4
    """Weight of the alignment of histories with the items that follow, by their codes; 0 leaves it out."""
    preference: NotNegative = 1.0e-4
    """Weight of the alignment of predictions with rebuilt item vectors, by cosine; 0 leaves it out."""
    quantizer_sequence: NotNegative | None = None
    """Weight of the former in the quantizer's turn; null for the same as in the model's, as in the paper."""
    quantizer_preference: NotNegative | None = None
    """Weight of the latter in the quantizer's turn; null for the same as in the model's, as in the paper."""
    losses: Literal["sums", "means"] = "sums"
    """Of the quantizer's own loss, over dimensions, and of the alignment of histories, over levels: paper, release."""
    temperature: Annotated[Positive, Unless("preference", (0.0,))] = 0.07
    """What these cosines are divided by."""
    pool: Literal["mean", "last"] = "mean"
    """What stands for a history in a decoder-only model: the mean of its states, or the last one."""
    variant: Literal["paper", "release"] = "paper"
    """The first alignment: the equations; or as released, far codewords likely, the first level alone teaching."""
    warmup: NotNegative = 5.0
    """Epochs of the model at the beginning without alignments."""
    patience: CountOrNone = 0
    """Validations in a row without a better NDCG@10 after which item tokens stay; 0 waits for the last turn."""
    converged: Annotated[float, Within(low=0, below=1)] = 0.0
    """A turn that moves less than this share of the items is the last one; 0 leaves it out."""
    learning_rate: NotNegative = 1e-4
    """Of the quantizer's AdamW, times a factor: up to 1 over the first turn, while falling to 0 over all that fit."""
    weight_decay: NotNegative = 0.05
    """Of the same, for encoder and decoder; codebooks have none."""
    commitment: NotNegative = 0.25
    """Weight of the term that keeps the encoder near its codewords."""
    margin: NotNegative = 0.0
    """An item keeps a codeword whose squared distance is at most 1 + this times the least; 0 takes the nearest."""
    batch_size: Count = 256
    """Examples of a step of the quantizer."""


Update = FixedUpdate | SelfImproveUpdate | BilevelUpdate | AlternateUpdate
