"""Runs of `itemtok` side by side, each in one process or in several that talk by gloo on the loopback.

Forked from a server that has imported the libraries, as starting Python takes longer than the runs do.
"""

import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import llm_itemtok.pipeline.run  # noqa: F401  # what takes its time, once for all processes
from llm_itemtok.cli import main
from tests.process_pairs import PATIENCE, free_port

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.equality"])


def carry_out(said: Path, *runs: tuple[int, Sequence[object]]) -> None:
    """Start all runs at once, and wait; all must end well, and none is left behind.

    Args:
        said: file for what they say.
        runs: of each, number of processes, and what `itemtok` takes.
    """
    processes = []
    for number, arguments in runs:
        port = free_port()
        for place in range(number):
            launched = {} if number == 1 else _launched(place, number, port)
            process = SERVER.Process(target=_work, args=(said, launched, [*map(str, arguments)]))
            process.start()
            processes.append(process)
    try:
        for process in processes:
            process.join(PATIENCE)
            assert process.exitcode == 0, f"status {process.exitcode}\n{said.read_text(encoding='utf-8')}"
    finally:
        for process in processes:
            process.kill()
            process.join()


def _launched(place: int, number: int, port: int) -> dict[str, str]:
    """What a launcher tells one of some processes."""
    group = {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
    return group | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(place), "LOCAL_RANK": str(place)}


def _work(said: Path, launched: dict[str, str], arguments: list[str]) -> None:
    with said.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(launched)
    torch.set_num_threads(1)
    status = main(arguments)
    # What is to be shown is written; a process of a group was seen to abort as the interpreter took its threads down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def flat(value, place=""):
    """The leaves of nested values by their places."""
    if isinstance(value, dict):
        return {at: leaf for name, part in value.items() for at, leaf in flat(part, f"{place}.{name}").items()}
    if isinstance(value, list):
        return flat(dict(enumerate(value)), place)
    return {place: value}
