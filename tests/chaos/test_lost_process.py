"""A process of several that is killed: the others end, with a word, and going on ends as if it had lived."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.chaos.test_kills import RECIPE, left

FLAGS = ("--resume", "--set", "trainer.max_steps=60", "--set", "evaluation.every=0.4")
"""More steps, so that the kill falls among them."""


def start(recipe, out, *flags):
    """Two processes of one training that talk by gloo on the loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    pair = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    plain = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "llm_itemtok", "run", str(recipe), "--out", str(out), *FLAGS, *flags],
            env={**os.environ, **plain, **pair, "RANK": place, "LOCAL_RANK": place},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for place in "01"
    ]


def ended(processes):
    """Exit status and standard error of each; none is left behind."""
    try:
        errors = [process.communicate(timeout=600)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, errors, strict=True)]


@pytest.mark.chaos
def test_a_killed_process_ends_the_others_and_the_run_goes_on_to_the_same_end(tmp_path):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    assert [status for status, _ in ended(start(recipe, tmp_path / "straight"))] == [0, 0]

    out = tmp_path / "run"
    processes = start(recipe, out)
    while not list(out.glob("checkpoints/checkpoint-*/checksums.json")) and processes[1].poll() is None:
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGKILL)
    (status, said), (killed, _) = ended(processes)
    assert killed == -signal.SIGKILL
    assert status == 2, said
    assert "all processes of a training must live, but another one is gone" in said

    assert [status for status, _ in ended(start(recipe, out))] == [0, 0]
    assert left(out) == left(tmp_path / "straight")
