"""How good item codes are: numbers for every level, a table, and a verdict in words, by the rules of `findings`.

Decisions:
- Computed from the table (and vectors and quantizer where given), never from training logs: codes from anywhere are
  judged alike.
- The collision rate is the one *before* resolution, from the provenance when the codes have been resolved.
- A level that only counts within a code (`extra-level`) is listed but not judged: it is meant to be nearly all zeros.
- Of identifiers in existing words (`tokenizer.kind: numeric`, `title`) neither room, use nor dead codewords are told or
  judged: their levels hold exactly the words that stand there, and most sequences of words name nothing.
- Neighbour preservation is read against chance, because a level with few codewords in use puts everything together.

Shape letters in this file: N items, L levels, K codewords a level, Q queries.
"""

from typing import Any

import numpy as np
import torch

from llm_itemtok.errors import DataError
from llm_itemtok.items.base import Quantizer, check_vectors
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.findings import findings
from llm_itemtok.items.residual import estimate_codebooks, sum_of_codewords

NEIGHBOURS = 10
"""Nearest items by cosine whose prefixes are compared."""

MAX_QUERIES = 2_000
"""Items, drawn at random with a fixed seed, whose neighbours are looked up."""


COLUMNS = 65_536
"""Items that neighbours are looked for in at a time, which bounds the memory it takes."""

Pairs = tuple[np.ndarray, np.ndarray]
"""Rows of items and of their neighbours, int64 `[P]` each."""


def quality(
    codes: ItemCodes,
    vectors: np.ndarray | None = None,
    quantizer: Quantizer | None = None,
    *,
    near: Pairs | None = None,
) -> dict[str, Any]:
    """Measure item codes.

    Args:
        codes: N items on L levels, collisions resolved or not.
        vectors: float32 `[N, D]`, the vectors the codes were made of; adds `neighbours`.
        quantizer: that gave the codes; with vectors, adds `reconstruction_error`.
        near: what `vector_pairs` says of the vectors, where that is known already.

    Returns:
        Plain JSON values: `items`, `capacity` (if codewords are existing words, in its place `words`, the mean length
        of an identifier), `collision_rate` (before resolution), `unique` (now), `levels` (a list of `level_quality`),
        `neighbours` (a list of `neighbour_preservation`, prefix length 1 and 2), `reconstruction_error` (squared error
        as a share of the variance of the vectors: 0 exact, 1 no better than the mean), and `verdict`, a sentence or
        more.

    Raises:
        DataError: if vectors or quantizer do not fit the codes.
    """
    report: dict[str, Any] = {
        "items": codes.num_items,
        **({"capacity": codes.capacity} if codes.words is None else {"words": float(codes.lengths.mean())}),
        "collision_rate": _rate_before(codes),
        "unique": codes.is_injective,
        "levels": [level_quality(codes, level) for level in range(codes.num_levels)],
    }
    if vectors is not None:
        vectors = check_vectors(vectors)
        if len(vectors) != codes.num_items:
            raise DataError(f"there must be one vector a code, {codes.num_items:,} of them, was: {len(vectors):,}")
        near = vector_pairs(vectors) if near is None else near
        report["neighbours"] = neighbour_preservation(codes, near, depths=range(1, min(2, codes.num_levels) + 1))
        if quantizer is not None:
            report["reconstruction_error"] = reconstruction_error(codes, vectors, quantizer)
    report["verdict"] = verdict(report)
    return report


def _rate_before(codes: ItemCodes) -> float:
    """Share of items that share their code before resolution; where a level counts, the levels before it tell."""
    if codes.num_describing_levels < codes.num_levels:  # read off the table: updates move items, extensions add some
        groups = codes.prefix_groups(codes.num_describing_levels)
        return float((np.bincount(groups)[groups] > 1).mean())
    return float(codes.provenance.get("collisions", {}).get("collision_rate_before", codes.collision_rate))


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
    return {
        "name": codes.names[level],
        "size": codes.sizes[level],
        "used": used,
        "dead": codes.sizes[level] - used,
        "usage": used / codes.sizes[level],
        "entropy_bits": entropy,
        "perplexity": 2.0**entropy,
        "largest_prefix": int(codes.prefix_counts(level + 1)[1].max()),
        "counts_only": level >= codes.num_describing_levels,
    }


def neighbour_preservation(codes: ItemCodes, near: Pairs, *, depths: range) -> list[dict[str, float]]:
    """Share of an item's nearest items that have the same prefix.

    Args:
        codes: N items.
        near: items and their neighbours; none where nothing is near anything.
        depths: lengths of prefix to compare.

    Returns:
        For each length: `depth`, `share` over the pairs, and `chance`, the share among all pairs of items. Empty
        without pairs.
    """
    items, neighbours = near
    if not len(items):
        return []
    result = []
    for depth in depths:
        groups = codes.prefix_groups(depth)
        counts = np.bincount(groups)
        pairs = (counts * (counts - 1)).sum() / (codes.num_items * (codes.num_items - 1))
        share = (groups[neighbours] == groups[items]).mean()
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
    for rows in torch.from_numpy(queries).split(256):
        best = torch.empty(len(rows), 0)
        found = torch.empty(len(rows), 0, dtype=torch.int64)
        for start in range(0, len(directions), COLUMNS):
            cosine = directions[rows] @ directions[start : start + COLUMNS].T
            own = (rows >= start) & (rows < start + COLUMNS)
            cosine[own, rows[own] - start] = -torch.inf
            values, columns = cosine.topk(min(num, cosine.shape[1]), dim=1)
            values, columns = torch.cat([best, values], dim=1), torch.cat([found, columns + start], dim=1)
            best, places = values.topk(min(num, values.shape[1]), dim=1)
            found = columns.gather(1, places)
        nearest.append(found)
    return torch.cat(nearest).numpy()


@torch.no_grad()
def estimated_errors(before: ItemCodes, after: ItemCodes, vectors: np.ndarray) -> tuple[float, float]:
    """What `reconstruction_error` would be of codes without a quantizer, before and after collisions are resolved.

    Codebooks are estimated from the vectors and the codes before (`residual.estimate_codebooks`), and serve for both:
    resolution may change what a code is given to, not what it stands for.

    Args:
        before: N items on L levels.
        after: the same items, on these levels and perhaps one that only counts.
        vectors: float32 `[N, D]`.
    """
    x_ND = torch.from_numpy(vectors)
    old = torch.tensor(before.table, dtype=torch.int64)
    codebooks = estimate_codebooks(x_ND, old, max(before.sizes))
    new = torch.tensor(after.table[:, : before.num_levels], dtype=torch.int64)
    variance = float((x_ND - x_ND.mean(dim=0)).square().sum())
    if variance == 0:
        return 0.0, 0.0
    errors = [float((sum_of_codewords(kept, codebooks) - x_ND).square().sum()) / variance for kept in (old, new)]
    return errors[0], errors[1]


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
    """What these numbers mean, in words: what the doctor finds in them, the worst first; or that there is nothing."""
    facts = {"neighbours": {"vectors": report["neighbours"]}} if report.get("neighbours") else {}
    found = findings(report, facts)
    if found:
        return "Look at: " + "; ".join(f"{one.rule}: {one.what}; {one.change}" for one in found) + "."
    used = "identifiers are unique" if "words" in report else "codewords are well used and few items collide"
    return f"Good: {used}."


def figures_table(report: dict[str, Any]) -> str:
    """The figures of `quality` as text: one line a level, then the figures of the whole.

    Args:
        report: what `quality` returned.
    """
    header: tuple[str, ...] = ("level", "size", "used", "usage", "entropy", "perplexity", "dead", "largest prefix")
    rows: list[tuple[str, ...]] = [
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
    if "words" in report:
        header, *rows = [tuple(row[column] for column in (0, 2, 4, 5, 7)) for row in (header, *rows)]
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    if "words" in report:
        lines += [
            "",
            f"{report['items']:,} items, named by existing words, {report['words']:.1f} each with the end token; "
            "room, usage and dead codewords mean nothing here and are left out",
        ]
    else:
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
