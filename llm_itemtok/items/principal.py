"""Principal components and the scale of vectors, for tokenizers that work in units of the data."""

import numpy as np


def principal_components(vectors: np.ndarray, num: int) -> np.ndarray:
    """Directions of largest variance, largest first.

    Args:
        vectors: float32 `[N, D]`.
        num: number of directions, H, at most D.

    Returns:
        float32 `[D, H]`, orthonormal columns; of the two signs, the one that makes the largest entry positive.
    """
    covariance = np.cov(vectors, rowvar=False, bias=True, dtype=np.float64).reshape(vectors.shape[1], -1)
    directions = np.linalg.eigh(covariance)[1][:, ::-1][:, :num]
    largest = np.take_along_axis(directions, np.abs(directions).argmax(axis=0)[None], axis=0)
    return (directions * np.sign(largest)).astype(np.float32)


def root_mean_square(vectors: np.ndarray) -> float:
    """Root mean square of the centred vectors, 1 when they are all the same: the unit of reconstruction losses."""
    centred = vectors - vectors.mean(axis=0)
    return float(np.sqrt(np.square(centred, out=centred).mean())) or 1.0
