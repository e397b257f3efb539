"""A group of benchmarks: run it, and write its lines for people."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from llm_itemtok.bench.decode import decode
from llm_itemtok.bench.evaluate import evaluate
from llm_itemtok.bench.gpu import gpu
from llm_itemtok.bench.measure import Result
from llm_itemtok.bench.recursive import recursive
from llm_itemtok.bench.rows import rows
from llm_itemtok.bench.tokenize import tokenize
from llm_itemtok.bench.train import train
from llm_itemtok.bench.trie import trie

GROUPS: Mapping[str, Callable[[], Iterator[Result]]] = {
    "decode": decode,
    "train": train,
    "rows": rows,
    "trie": trie,
    "evaluate": evaluate,
    "tokenize": tokenize,
    "recursive": recursive,
    "gpu": gpu,
}
"""What `itemtok bench` measures, by group."""


def bench(group: str, log: Callable[[str], None]) -> list[Result]:
    """Measure a group.

    Args:
        group: one of `GROUPS`.
        log: called with a line as each result is there.

    Raises:
        ItemTokError: if the group needs hardware that is not there.
    """
    results = []
    for result in GROUPS[group]():
        log(line(result))
        results.append(result)
    return results


def line(result: Result) -> str:
    """One result, in a line."""
    verdict = "met" if result.met else "MISSED"
    against = f"  against {result.baseline}" if result.baseline else ""
    return f"{result.id:<13} {result.value:>8.4g} {result.unit:<6} target {result.target:<7.4g} {verdict:<7}{against}"


def details(results: Sequence[Result]) -> str:
    """Everything else that was measured, a line a result."""
    return "\n".join(
        f"{result.id:<13} " + ", ".join(f"{name} {_short(value)}" for name, value in result.details.items())
        for result in results
    )


def _short(value: object) -> str:
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{name} {_short(part)}" for name, part in value.items()) + ")"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
