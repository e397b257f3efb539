"""Item vectors of several sources in one space: each with its say, and with directions that count more alike.

Shape letters: N items, D dimensions.
"""

from collections.abc import Sequence

import numpy as np

from llm_itemtok.errors import DataError
from llm_itemtok.items.vectors import unit_rows

_ROUNDING = 1e-6
"""Of the largest variance: what less there is of a direction is not whitened further."""


def concatenate(
    parts: Sequence[np.ndarray], weights: Sequence[float], *, components: int = 0, measured: int | None = None
) -> np.ndarray:
    """Put vectors of several sources side by side, each with its say.

    Each source is centred and scaled as a whole, so that its items lie at a mean squared distance of 1 from their mean,
    then multiplied by its weight; its dimensions keep their proportions, because in most sources the last ones are
    noise. An item whose vector is zero in a source is unknown to it: it takes no part in the scaling, and stays at
    zero, which is the mean of the known ones.

    Args:
        parts: float32 `[N, D_p]`, at least one source.
        weights: one a source, above 0. Squared, they are the shares in squared distances between items.
        components: principal components to keep of the whole; 0 keeps all dimensions.
        measured: the first items, by which alone the sources are centred, scaled and turned; all when None.

    Returns:
        float32 `[N, D]`, D the sum of the sources' dimensions, or `components` if that is less.

    Raises:
        DataError: if sources and weights do not fit each other, or a number is out of range.
    """
    if not parts or len(parts) != len(weights) or min(weights) <= 0 or components < 0:
        raise DataError(
            "vectors of several sources need one weight above 0 a source, and 0 or more components, was: "
            f"{len(parts)} sources, weights {list(weights)}, {components} components"
        )
    sizes = [len(part) for part in parts]
    if len(set(sizes)) > 1:
        raise DataError(f"all sources must have vectors for the same items, was: {', '.join(map(str, sizes))} of them")
    whole = np.concatenate(
        [weight * _standardised(part, measured) for part, weight in zip(parts, weights, strict=True)],
        axis=1,
        dtype=np.float64,
    )
    if 0 < components < whole.shape[1]:
        centred = whole - whole[:measured].mean(axis=0)
        directions = np.linalg.eigh(centred[:measured].T @ centred[:measured])[1][:, ::-1][:, :components]
        # A direction and its opposite serve alike; the one whose largest entry is positive is taken.
        largest = np.take_along_axis(directions, np.abs(directions).argmax(axis=0)[None], axis=0)
        whole = centred @ (directions * np.where(largest < 0, -1.0, 1.0))
    return whole.astype(np.float32)


def whitened(vectors: np.ndarray, share: float) -> np.ndarray:
    """Let principal directions count more alike, and all items the same.

    Vectors that a network learned lie in a narrow cone and spread along a few directions, which then decide alone who
    is near whom. Here a direction of variance v is left with `v ** (1 - share)`; then rows are scaled to length 1.

    Args:
        vectors: float32 `[N, D]`; an item of zeros is unknown: it takes no part, and stays at zero.
        share: in `[0, 1]`; 1 gives all directions the same variance, the noisiest ones too.

    Returns:
        float32 `[N, D]`, in other axes than before.

    Raises:
        DataError: if the share is out of range.
    """
    if not 0 <= share <= 1:
        raise DataError(f"the share of whitening must be in [0, 1], was: {share}")
    known = vectors.any(axis=1)
    found = np.zeros(vectors.shape, dtype=np.float32)
    if not known.any():
        return found
    centred = vectors[known] - vectors[known].mean(axis=0, dtype=np.float64)
    variances, directions = np.linalg.eigh(centred.T @ centred / len(centred))
    if variances[-1] > 0:
        # What lies below is rounding, which would be blown up to a direction like the others.
        relative = np.maximum(variances / variances[-1], _ROUNDING)
        found[known] = unit_rows(centred @ (directions * relative ** (-share / 2)))
    return found


def _standardised(part: np.ndarray, measured: int | None) -> np.ndarray:
    known = np.abs(part).max(axis=1) > 0
    looked_at = np.flatnonzero(known[:measured])
    if not len(looked_at):
        return part.astype(np.float64)
    centred = np.where(known[:, None], part.astype(np.float64) - part[looked_at].mean(axis=0, dtype=np.float64), 0.0)
    spread = np.sqrt(np.square(centred[looked_at]).sum(axis=1).mean())
    return centred / spread if spread > 0 else centred
