"""Runs of a test module in one process, and in two that talk by gloo on the loopback."""

import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

PATIENCE = 900.0
"""Seconds to wait for what comes to an end on every machine, however slow; only what hangs takes so long."""
PLAIN = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
"""Environment of a process that has one thread and no accelerator."""
PORTS = (20_000 + (os.getpid() * 997 + place) % 10_000 for place in itertools.count())
"""Below those that the system gives to who asks for any, which others would be given before a process listens."""

RUN = """
import runpy, sys
from llm_itemtok.processes import leave

del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
leave()
"""
"""Runs a module, and ends what it talked by, as a run does."""


def free_port() -> int:
    """A port of the loopback that nobody listens on now, another one each time."""
    for port in itertools.islice(PORTS, 1000):
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no port of a thousand is free")


def pair() -> list[dict[str, str]]:
    """Environments of the two processes of a group that talks by gloo on the loopback, the main one first."""
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{**PLAIN, **group, "RANK": place, "LOCAL_RANK": place} for place in "01"]


def start(program: Sequence[object], settings: dict[str, str]) -> subprocess.Popen[str]:
    """Start `python` with these arguments and additions to the environment; its standard error is for `ended`."""
    return subprocess.Popen(
        [sys.executable, *map(str, program)],
        env={**os.environ, **settings},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_alone_and_in_pair(module: str, alone: Sequence[object], first: Sequence[object], second: Sequence[object]):
    """Run a module, as `python -m` does, three times at once: alone, and twice as the processes of one group."""
    runs = zip((alone, first, second), (PLAIN, *pair()), strict=True)
    finish([start(["-c", RUN, module, *arguments], settings) for arguments, settings in runs])


def run_in_two_processes(recipe: Path, *arguments: str) -> list[tuple[int, str]]:
    """Exit status and standard error of each process of `itemtok run`, the main one first."""
    return ended([start(["-m", "llm_itemtok", "run", recipe, *arguments], settings) for settings in pair()])


def finish(processes: Sequence[subprocess.Popen[str]]) -> None:
    """Wait for all to end, and well."""
    found = ended(processes)
    assert not any(status for status, _ in found), "\n".join(f"status {status}: {said}" for status, said in found)


def ended(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Wait for all to end, and give the exit status of each and what it said; none is left behind, whatever happens.

    What is still running after `PATIENCE` is killed.
    """
    end, found = time.monotonic() + PATIENCE, []
    try:
        for process in processes:
            try:
                out, errors = process.communicate(timeout=max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                out, errors = process.communicate()
            found.append((process.returncode, errors or out or ""))
    finally:
        for process in processes:
            process.kill()
            process.communicate()  # waits, and closes what it was listened to by
    return found
