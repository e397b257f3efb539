"""K1, K2: item codes for catalogues of millions.

K1: residual k-means, 3 levels of 256 codewords on vectors of 128 dimensions, iterations that look at every point, rate
over that of faiss. `K1` is the clustering alone, 10 iterations and the labels that the next level needs; `K1-default`
is what a recipe with `tokenizer.kind: residual-kmeans` runs, from vectors to codes: checks, at most 50 iterations,
codes read off the finished codebooks; on a quarter of the points. The product has one implementation and no faiss in
it: an optional package that took over where it is installed would give other codes on other machines. Where faiss is
not installed, its rate is taken to be a fixed share of the machine's matrix product, as was measured beside it, and the
baseline says so.

K2: codes on 3 levels for vectors that lie in a file, block by block: seconds for ten million on one thread, and by how
much a process grows. Fewer are measured, in a file that is deleted again, and the time is scaled up: it is a sum over
blocks. What grows with the number of items is the codes alone, 12 bytes an item.

Points lie around some hundred centres, as item vectors do, with most of their variance of their own.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm_itemtok.bench.measure import (
    GEMM,
    Result,
    at_least,
    at_most,
    cpu_seconds,
    gemm_gflops,
    multiply,
    one_thread,
    peak_mb,
)
from llm_itemtok.items.kmeans import kmeans, take_away
from llm_itemtok.items.residual_kmeans import ResidualKMeans, ResidualKMeansQuantizer

DIMENSIONS, LEVELS, CODEWORDS, ITERATIONS = 128, 3, 256, 10
STREAMED = 10_000_000

FAISS_SHARE = 0.75
"""Arithmetic of faiss 1.15 in k-means over that of a matrix product of 1,024 squared, on one core of an EPYC 9004."""


def tokenize(scale: int = 1_000_000, streamed: int = 2_000_000) -> Iterator[Result]:
    """K1 and K2.

    Args:
        scale: points that are clustered, at least 256.
        streamed: points that are read from a file.
    """
    with one_thread():
        yield from _clustering(scale)
        yield _streaming(streamed)


def points(num: int, seed: int = 0) -> np.ndarray:
    """Made-up item vectors, float32 `[num, 128]`."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((300, DIMENSIONS), dtype=np.float32)
    own = rng.standard_normal((num, DIMENSIONS), dtype=np.float32)
    own += 0.7 * centres[rng.integers(len(centres), size=num)]
    return own


def _clustering(scale: int) -> Iterator[Result]:
    multiplying = cpu_seconds(multiply, repeats=5)[0]
    vectors = points(scale)
    yield _against_faiss("K1", 0.6, vectors, ITERATIONS, partial(residual_kmeans, vectors, ITERATIONS), multiplying)
    product = ResidualKMeans(levels=LEVELS, codebook_size=CODEWORDS)
    vectors = vectors[: max(CODEWORDS, scale // 4)]
    yield _against_faiss("K1-default", 0.95, vectors, product.iterations, partial(product.fit, vectors), multiplying)


def _against_faiss(
    name: str, target: float, vectors: np.ndarray, iterations: int, ours: Callable[[], object], multiplying: float
) -> Result:
    """Time a call once, and faiss with as many iterations beside it."""
    own = cpu_seconds(ours, repeats=1)[0]
    if find_spec("faiss") is None:
        work = 2 * len(vectors) * CODEWORDS * DIMENSIONS * iterations * LEVELS
        usual = work / (FAISS_SHARE * 2 * GEMM**3) * multiplying
        baseline = f"faiss, not installed here: taken to run at {FAISS_SHARE:.0%} of a matrix product"
    else:
        faiss = import_module("faiss")  # a baseline, never part of the product
        faiss.omp_set_num_threads(1)
        usual = cpu_seconds(partial(residual_faiss, vectors, iterations, faiss), repeats=1)[0]
        baseline = f"faiss {faiss.__version__}"
    million_iterations = len(vectors) * LEVELS * iterations / 1e6
    details = {
        "points": len(vectors),
        "dimensions": DIMENSIONS,
        "iterations": iterations,
        "ours_s": own,
        "baseline_s": usual,
        "mpoints_per_s_iteration": million_iterations / own,
        "baseline_mpoints_per_s_iteration": million_iterations / usual,
        "gemm_gflops": gemm_gflops(multiplying),
    }
    return at_least(name, usual / own, target, details, baseline=baseline)


def residual_kmeans(vectors: np.ndarray, iterations: int) -> np.ndarray:
    """Labels of each level by our k-means, int64 `[L, N]`."""
    residual, labels = vectors.copy(), []
    for level in range(LEVELS):
        found = kmeans(residual, CODEWORDS, iterations=iterations, seed=level)
        take_away(residual, found.centres, found.labels)
        labels.append(found.labels)
    return np.stack(labels)


def residual_faiss(vectors: np.ndarray, iterations: int, faiss: Any) -> np.ndarray:
    """Labels of each level by the k-means of faiss on all points, int64 `[L, N]`."""
    residual, labels = vectors.copy(), []
    for level in range(LEVELS):
        everybody = len(vectors) // CODEWORDS + 1
        found = faiss.Kmeans(DIMENSIONS, CODEWORDS, niter=iterations, seed=level, max_points_per_centroid=everybody)
        found.train(residual)
        nearest = found.index.search(residual, 1)[1][:, 0]
        take_away(residual, found.centroids, nearest)
        labels.append(nearest)
    return np.stack(labels)


def _streaming(streamed: int) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vectors.npy"
        file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(streamed, DIMENSIONS))
        for start in range(0, streamed, 100_000):
            file[start : start + 100_000] = points(min(100_000, streamed - start), seed=start)
        del file
        began = time.process_time()
        coding(str(path))()
        seconds = time.process_time() - began
        grew = peak_mb(coding, str(path))
    details = {
        "points": streamed,
        "measured_s": seconds,
        "mpoints_per_s": streamed / seconds / 1e6,
        "file_mb": streamed * DIMENSIONS * 4 / 2**20,
        "grew_mb": grew,
        "grew_mb_of_10m": grew + (STREAMED - streamed) * LEVELS * 4 / 2**20,
    }
    return at_most("K2", seconds * STREAMED / streamed, 120, details, unit="s")


def coding(path: str) -> Callable[[], object]:
    """Prepare to code the vectors of a file with codebooks of random codewords."""
    quantizer = ResidualKMeansQuantizer(levels=LEVELS, codebook_size=CODEWORDS, dimensions=DIMENSIONS)
    generator = torch.Generator().manual_seed(0)
    for level in range(LEVELS):
        quantizer.codebooks.data[level] = torch.randn(CODEWORDS, DIMENSIONS, generator=generator) * 0.7**level
    quantizer.encode(torch.zeros(1, DIMENSIONS))  # what is loaded at the first call is no growth
    return partial(quantizer.encode_blocks, np.load(path, mmap_mode="r"))
