"""The section `objective` of a recipe; `settings.py` holds the others, and says how to read it."""

from dataclasses import dataclass
from typing import Annotated, Literal

from llm_itemtok.settings import Dropout, NotNegative, Positive
from llm_itemtok.strict import Only, Within

Share = Annotated[float, Within(above=0, high=1)]


@dataclass(frozen=True, kw_only=True)
class PlainTarget:
    """Every token counts the same."""

    kind: Literal["plain"]
    """The usual cross-entropy."""


@dataclass(frozen=True, kw_only=True)
class FrontTarget:
    """Front-greater: tokens count by how far they narrow the item down."""

    kind: Literal["front"]
    """By the drop of what is open after a token; `gains` says of what."""
    gains: Literal["level", "prefix", "entropy"] = "level"
    """Of mean distances of item vectors, by level (released) or by prefix; or of the entropy of the item, by level."""


@dataclass(frozen=True, kw_only=True)
class FrequencyTarget:
    """Tokens count by how rarely they are a training target."""

    kind: Literal["frequency"]
    """One over the effective number of samples; its share in the mix grows."""
    beta: Annotated[float, Within(low=0, below=1)] = 0.997
    """Tokens seen more than about 3 / (1 - beta) times are all alike; released: 0.997 for LLaMA, 0.9 for T5."""
    over: Literal["item", "batch"] = "item"
    """Normalise over each item, as released, so that none outweighs others; or over the batch, favouring rare items."""


@dataclass(frozen=True, kw_only=True)
class PositionTarget:
    """Control: tokens count less from first to last."""

    kind: Literal["position"]
    """In even steps."""
    last: Share = 0.5
    """Weight of an item's last token, the first having 1."""


@dataclass(frozen=True, kw_only=True)
class InformationGainTarget:
    """Control: tokens that leave the choice of item as open as before count less (IGD, arXiv:2506.13229)."""

    kind: Literal["information-gain"]
    """By the entropy of the item after each prefix, items being as likely as they are often a training target."""
    without: Share = 0.1
    """Weight of a token without gain, the others having 1."""


@dataclass(frozen=True, kw_only=True)
class CounterfactualTarget:
    """Control: also fits the effect of the history, logits with it less those without (CFT, arXiv:2410.22809)."""

    kind: Literal["counterfactual"]
    """Takes another pass over the target items, about as long as the first."""
    weight: NotNegative = 0.1
    """Of the cross-entropy by the effect, beside the usual one."""
    last: Share = 0.5
    """Weight of an item's last token in both, the first having 1."""


Target = PlainTarget | FrontTarget | FrequencyTarget | PositionTarget | InformationGainTarget | CounterfactualTarget


@dataclass(frozen=True, kw_only=True)
class NextTokenObjective:
    """What is minimised: the likelihood of the next token."""

    kind: Literal["next-token"] = "next-token"
    """Cross-entropy of each target token."""
    normaliser: Literal["level", "items", "vocab", "children"] = "level"
    """The softmax of an item token runs over its level, all item tokens, the vocabulary, or what leads to an item."""
    label_smoothing: Dropout = 0.0
    """Share of the target's probability that is spread over the others."""


@dataclass(frozen=True, kw_only=True)
class TokenWeightedObjective:
    """What is minimised: likelihoods in which tokens count by what they tell, mixed (arXiv:2601.17787)."""

    kind: Literal["token-weighted"] = "token-weighted"
    """One or several weighted cross-entropies; with several, their shares change as training goes on."""
    normaliser: Literal["level", "items", "vocab", "children"] = "level"
    """The softmax of an item token runs over its level, all item tokens, the vocabulary, or what leads to an item."""
    label_smoothing: Dropout = 0.0
    """Share of the target's probability that is spread over the others."""
    targets: tuple[Target, ...] = (
        PlainTarget(kind="plain"),
        FrontTarget(kind="front"),
        FrequencyTarget(kind="frequency"),
    )
    """Weighted cross-entropies to mix, such as [{kind: plain}, {kind: front}, {kind: frequency}]; one is not mixed."""
    curriculum: Literal["pace", "none"] = "pace"
    """Let the share of `frequency` grow and those of the others fall by `pace`; or leave it to what is learned."""
    pace: Annotated[Positive, Only("curriculum", ("pace",))] = 5.0e-5
    """Per optimiser step: shares are level after 0.69 / pace of them; released: 2.0e-5 to 5.0e-5 per micro-batch."""
    mix: Literal["learned", "frozen"] = "learned"
    """Whether shares are learned besides, as log-weights added to the curriculum's."""
    bound: Annotated[Positive, Only("mix", ("learned",))] = 1.0
    """Learned log-weights stay within plus and minus this: left alone they drift to the smallest loss; released: 20."""


Objective = NextTokenObjective | TokenWeightedObjective
