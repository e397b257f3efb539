"""How good item codes are: numbers for every level, a table, and a verdict in words.

Decisions:
- Computed from the table (and vectors and quantizer where given), never from training logs: codes from anywhere are
  judged alike.
- The collision rate is the one *before* resolution, from the provenance when the codes have been resolved.
- A level that only counts within a code (`extra-level`) is listed but not judged: it is meant to be nearly all zeros.
- Neighbour preservation is read against chance, because a level with few codewords in use puts everything together.

Shape letters in this file: N items, L levels, K codewords a level, Q queries.
"""

from typing import Any

import numpy as np
import torch

from llm_itemtok.errors import DataError
from llm_itemtok.items.base import Quantizer, check_vectors
from llm_itemtok.items.codes import ItemCodes

NEIGHBOURS = 10
"""Nearest items by cosine whose prefixes are compared."""

MAX_QUERIES = 2_000
"""Items, drawn at random with a fixed seed, whose neighbours are looked up."""


def quality(codes: ItemCodes, vectors: np.ndarray | None = None, quantizer: Quantizer | None = None) -> dict[str, Any]:
    """Measure item codes.

    Args:
        codes: N items on L levels, collisions resolved or not.
        vectors: float32 `[N, D]`, the vectors the codes were made of; adds `neighbours`.
        quantizer: that gave the codes; with vectors, adds `reconstruction_error`.

    Returns:
        Plain JSON values: `items`, `capacity`, `collision_rate` (before resolution), `unique` (now), `levels` (a list
        of `level_quality`), `neighbours` (a list of `neighbour_preservation`, prefix length 1 and 2),
        `reconstruction_error` (squared error as a share of the variance of the vectors: 0 exact, 1 no better than
        the mean), and `verdict`, a sentence or more.

    Raises:
        DataError: if vectors or quantizer do not fit the codes.
    """
    before = codes.provenance.get("collisions", {})
    report: dict[str, Any] = {
        "items": codes.num_items,
        "capacity": codes.capacity,
        "collision_rate": before.get("collision_rate_before", codes.collision_rate),
        "unique": codes.is_injective,
        "levels": [level_quality(codes, level) for level in range(codes.num_levels)],
    }
    if vectors is not None:
        vectors = check_vectors(vectors)
        if len(vectors) != codes.num_items:
            raise DataError(f"there must be one vector a code, {codes.num_items:,} of them, was: {len(vectors):,}")
        report["neighbours"] = neighbour_preservation(codes, vectors, depths=range(1, min(2, codes.num_levels) + 1))
        if quantizer is not None:
            report["reconstruction_error"] = reconstruction_error(codes, vectors, quantizer)
    report["verdict"] = verdict(report)
    return report


def level_quality(codes: ItemCodes, level: int) -> dict[str, Any]:
    """Measure one level.

    Returns:
        `name`; `size`, its capacity K; `used` and `dead`, codewords with and without items; `usage`, the share used;
        `entropy_bits` of the codewords' shares of the items, at most log2 K; `perplexity`, 2 to the entropy: the number
        of evenly used codewords that would be as uncertain; `largest_prefix`, items under the fullest prefix that ends
        at this level; `counts_only`, whether the level only counts within a code.
    """
    counts = np.bincount(codes.table[:, level], minlength=codes.sizes[level])
    shares = counts[counts > 0] / codes.num_items
    entropy = float(-(shares * np.log2(shares)).sum()) + 0.0  # + 0.0: no minus zero
    used = len(shares)
    policy = codes.provenance.get("collisions", {})
    return {
        "name": codes.names[level],
        "size": codes.sizes[level],
        "used": used,
        "dead": codes.sizes[level] - used,
        "usage": used / codes.sizes[level],
        "entropy_bits": entropy,
        "perplexity": 2.0**entropy,
        "largest_prefix": int(codes.prefix_counts(level + 1)[1].max()),
        "counts_only": policy.get("policy") == "extra-level" and level >= policy["levels_before"],
    }


def neighbour_preservation(codes: ItemCodes, vectors: np.ndarray, *, depths: range) -> list[dict[str, float]]:
    """Share of an item's nearest items, by cosine, that have the same prefix.

    Args:
        codes: N items.
        vectors: float32 `[N, D]`.
        depths: lengths of prefix to compare.

    Returns:
        For each length: `depth`, `share` over the neighbours of up to `MAX_QUERIES` items, and `chance`, the share
        among all pairs of items. Empty with fewer than two items.
    """
    if codes.num_items < 2:
        return []
    queries = np.arange(codes.num_items)
    if codes.num_items > MAX_QUERIES:
        queries = np.sort(np.random.default_rng(0).choice(codes.num_items, MAX_QUERIES, replace=False))
    nearest = _nearest_items(vectors, queries, min(NEIGHBOURS, codes.num_items - 1))
    result = []
    for depth in depths:
        groups = codes.prefix_groups(depth)
        counts = np.bincount(groups)
        pairs = (counts * (counts - 1)).sum() / (codes.num_items * (codes.num_items - 1))
        share = (groups[nearest] == groups[queries, None]).mean()
        result.append({"depth": depth, "share": float(share), "chance": float(pairs)})
    return result


def vector_pairs(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest items by cosine of up to `MAX_QUERIES` items, drawn at random with a fixed seed.

    Args:
        vectors: float32 `[N, D]`; items whose vector is zero are near nothing and are not asked about.

    Returns:
        Rows of items and of their neighbours, int64 `[P]` each, an item's nearest first.
    """
    queries = np.flatnonzero(np.abs(vectors).max(axis=1) > 0)
    if len(queries) > MAX_QUERIES:
        queries = np.sort(np.random.default_rng(0).choice(queries, MAX_QUERIES, replace=False))
    if len(vectors) < 2 or not len(queries):
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    nearest = _nearest_items(vectors, queries, min(NEIGHBOURS, len(vectors) - 1))
    return np.repeat(queries, nearest.shape[1]), nearest.reshape(-1)


def _nearest_items(vectors: np.ndarray, queries: np.ndarray, num: int) -> np.ndarray:
    """Rows `[Q, num]` of the items with the largest cosine to each query, the query itself left out."""
    directions = torch.nn.functional.normalize(torch.from_numpy(vectors), dim=1)
    nearest = []
    for rows in torch.from_numpy(queries).split(256):  # bounds the memory to 256 * N floats
        cosine = directions[rows] @ directions.T
        cosine[torch.arange(len(rows)), rows] = -torch.inf
        nearest.append(cosine.topk(num, dim=1).indices)
    return torch.cat(nearest).numpy()


@torch.no_grad()
def reconstruction_error(codes: ItemCodes, vectors: np.ndarray, quantizer: Quantizer) -> float:
    """Squared error of the vectors rebuilt from codes (levels that only count left out) over their variance.

    Args:
        codes: N items, on the levels of the quantizer and perhaps more.
        vectors: float32 `[N, D]`.
        quantizer: that gave the codes.

    Returns:
        0 where codes rebuild the vectors exactly, 1 where they do no better than the mean would.

    Raises:
        DataError: if codes and quantizer do not fit each other.
    """
    if codes.num_levels < quantizer.num_levels or codes.sizes[0] != quantizer.num_codewords:
        raise DataError(
            f"codes and quantizer must have the same levels, was: {codes.sizes} and {quantizer.num_levels} levels of "
            f"{quantizer.num_codewords}"
        )
    x_ND = torch.from_numpy(vectors)
    kept = torch.tensor(codes.table[:, : quantizer.num_levels], dtype=torch.int64)
    variance = (x_ND - x_ND.mean(dim=0)).square().sum()
    error = (quantizer.decode(kept) - x_ND).square().sum()
    return float(error / variance) if variance > 0 else 0.0


def verdict(report: dict[str, Any]) -> str:
    """What the numbers mean, in words: the worst fault first, each with what to change; or that there is none.

    Thresholds are rules of thumb: 5 % collisions and 95 % usage are what a well trained RQ-VAE reaches on the field's
    data sets; half the entropy of even use is where beams begin to crowd under a few prefixes.
    """
    findings = []
    judged = [level for level in report["levels"] if not level["counts_only"]]
    for number, level in enumerate(judged):
        possible = min(level["size"], report["items"])
        if level["perplexity"] < 0.5 * possible and level["size"] > 1 and number == 0:
            findings.append(
                f"collapsed at {level['name']}: {level['perplexity']:.0f} of {level['size']} codewords' worth of use; "
                "lower `codebook_size`, or fit by residual k-means"
            )
        elif level["used"] < 0.95 * possible:
            findings.append(
                f"{level['dead']} of {level['size']} codewords of {level['name']} are dead; lower `codebook_size`"
            )
        elif level["perplexity"] < 0.25 * possible and level["size"] > 1:
            findings.append(
                f"items crowd at {level['name']}: {level['perplexity']:.0f} of {level['size']} codewords' worth of "
                "use; fit by RQ-VAE, or on fewer dimensions"
            )
    if report["collision_rate"] > 0.05:
        findings.append(
            f"{report['collision_rate']:.1%} of items shared their code before resolution; add a level, raise "
            "`codebook_size`, or give vectors that tell items apart"
        )
    for row in report.get("neighbours", [])[:1]:
        if row["share"] < 2 * row["chance"]:
            findings.append(
                f"prefixes carry little meaning: {row['share']:.1%} of nearest items share the first codeword, "
                f"{row['chance']:.1%} would by chance"
            )
    if not report["unique"]:
        findings.append("codes are not unique: resolve collisions before training")
    if not findings:
        return "Good: codewords are well used and few items collide."
    return "Look at: " + "; ".join(findings) + "."


def quality_table(report: dict[str, Any]) -> str:
    """The result of `quality` as text: what `figures_table` says, then the verdict.

    Args:
        report: what `quality` returned.
    """
    return f"{figures_table(report)}\n{report['verdict']}"


def figures_table(report: dict[str, Any]) -> str:
    """The figures of `quality` as text: one line a level, then the figures of the whole.

    Args:
        report: what `quality` returned.
    """
    header = ("level", "size", "used", "usage", "entropy", "perplexity", "dead", "largest prefix")
    rows = [
        (
            level["name"],
            f"{level['size']:,}",
            f"{level['used']:,}",
            f"{level['usage']:.1%}",
            f"{level['entropy_bits']:.2f} bits",
            f"{level['perplexity']:,.1f}",
            f"{level['dead']:,}",
            f"{level['largest_prefix']:,}",
        )
        for level in report["levels"]
    ]
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    lines += ["", f"{report['items']:,} items, room for {report['capacity']:,} codes"]
    state = "unique now" if report["unique"] else "not resolved"
    lines.append(f"collision rate before resolution: {report['collision_rate']:.2%} ({state})")
    for row in report.get("neighbours", []):
        lines.append(
            f"nearest items with the same first {row['depth']} of the code: {row['share']:.1%} (by chance "
            f"{row['chance']:.2%})"
        )
    if "reconstruction_error" in report:
        lines.append(f"reconstruction error: {report['reconstruction_error']:.1%} of the variance")
    return "\n".join(lines)
