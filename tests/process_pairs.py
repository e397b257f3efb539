"""Runs of a test module in one process, and in two that talk by gloo on the loopback."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence

RUN = """
import runpy, sys
from llm_itemtok.processes import leave

del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
leave()
"""
"""Runs a module, and ends what it talked by, as a run does."""


def free_port() -> int:
    """A port of the loopback that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def run_alone_and_in_pair(module: str, alone: Sequence[object], first: Sequence[object], second: Sequence[object]):
    """Run a module, as `python -m` does, three times at once: alone, and twice as the processes of one group."""
    port = free_port()
    plain = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    pair = plain | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, module, *map(str, arguments)],
            env={**os.environ, **settings},
            stderr=subprocess.PIPE,
            text=True,
        )
        for arguments, settings in (
            (alone, plain),
            (first, pair | {"RANK": "0", "LOCAL_RANK": "0"}),
            (second, pair | {"RANK": "1", "LOCAL_RANK": "1"}),
        )
    ]
    finish(processes)


def finish(processes: Sequence[subprocess.Popen]):
    """Wait for all to end well; whatever happens, none is left behind."""
    try:
        for process in processes:
            _, errors = process.communicate(timeout=200)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
            process.communicate()  # waits, and closes what it was listened to by
