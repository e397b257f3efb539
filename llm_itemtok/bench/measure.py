"""How a benchmark measures.

A benchmark has one value and a target. Speeds are ratios: the baseline's time over ours, both run in this process, in
turns, on one thread, each at its best of several, in processor seconds. So other programs on the machine, and machines,
matter little. The rate of a plain matrix product on the same core, measured in the same turns, says how far from the
hardware's limit a time is. Memory is the growth of a fresh process.

Measured calls are deterministic, on random weights and synthetic data: nothing is downloaded, and nothing is kept.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llm_itemtok.training.effort import resident_peak

GEMM = 1024
"""Side of the square matrices whose product gives the machine's rate."""

_LEFT, _RIGHT = torch.ones(2, GEMM, GEMM)


@dataclass(frozen=True)
class Result:
    """One line of a benchmark.

    Attributes:
        id: such as `D1-exact`.
        value: what was measured.
        unit: of the value; `x` for baseline over ours, `share` for a fraction.
        baseline: what it is measured against, in words; empty where there is nothing.
        target: what the value should reach, or stay below.
        met: whether it does.
        details: everything else that was measured, by name with its unit.
    """

    id: str
    value: float
    unit: str
    baseline: str
    target: float
    met: bool
    details: dict[str, Any] = field(default_factory=dict)


def at_least(
    name: str, value: float, target: float, details: Mapping[str, Any], *, unit: str = "x", baseline: str = ""
) -> Result:
    """A result that is the better the higher."""
    return Result(name, _rounded(value), unit, baseline, target, bool(value >= target), _rounded(details))


def at_most(
    name: str, value: float, target: float, details: Mapping[str, Any], *, unit: str = "share", baseline: str = ""
) -> Result:
    """A result that is the better the lower."""
    return Result(name, _rounded(value), unit, baseline, target, bool(value <= target), _rounded(details))


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, where processor seconds are what the work costs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cpu_seconds(*calls: Callable[[], object], repeats: int) -> list[float]:
    """Run calls in turns and return the least processor seconds of each.

    Args:
        calls: without arguments; each is run `repeats` times.
        repeats: at least 1. A call that is run once has no warm-up: what runs first is then measured cold.
    """
    best = [float("inf")] * len(calls)
    for _ in range(repeats):
        for place, call in enumerate(calls):
            began = time.process_time()
            call()
            best[place] = min(best[place], time.process_time() - began)
    return best


def multiply() -> torch.Tensor:
    """The matrix product of known size whose time gives the machine's rate."""
    return _LEFT @ _RIGHT


def gemm_gflops(seconds: float) -> float:
    """Rate of `multiply` in GFLOP/s, from its seconds."""
    return 2 * GEMM**3 / seconds / 1e9


def peak_mb(prepare: Callable[..., Callable[[], object]], *arguments: object) -> float:
    """Measure by how much a fresh process grows at its widest.

    Args:
        prepare: a function of a module that, given the arguments, prepares and returns the call to be measured.
        arguments: handed to it; they must be plain values.

    Returns:
        Megabytes (2**20 bytes) that the process had at most beyond what it had before the call.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as fresh:
        return fresh.submit(_growth, prepare, arguments).result()


def _growth(prepare: Callable[..., Callable[[], object]], arguments: tuple[object, ...]) -> float:
    """Run in the fresh process: prepare, then measure."""
    torch.set_num_threads(1)
    call = prepare(*arguments)
    before = _reset_peak()
    call()
    return resident_peak() - before


def _reset_peak() -> float:
    """Forget the peak where the system can, and return megabytes resident now (else the peak so far)."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    return resident_peak()


def _rounded(value: Any) -> Any:
    """Four digits that count: more would be noise."""
    if isinstance(value, Mapping):
        return {name: _rounded(part) for name, part in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
