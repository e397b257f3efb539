"""A process of several that is killed: the others end, with a word, and going on ends as if it had lived."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.chaos.test_kills import RECIPE, left
from tests.process_pairs import PLAIN, ended, pair, start
from tests.test_architecture import ROOT

FLAGS = ("--resume", "--set", "trainer.max_steps=240", "--set", "evaluation.every=0.4")
"""Far more steps, so that the kill falls among them."""
RESTARTS = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""As docs/distributed.md says: without it processes that are started again may look for those before them."""


def start_both(recipe, out):
    """Two processes of one training."""
    program = ["-m", "llm_itemtok", "run", recipe, "--out", out, *FLAGS]
    return [start(program, settings) for settings in pair()]


def wait_for_checkpoint(out, process):
    """Until there is a whole one, or the process has ended."""
    while not list(out.glob("checkpoints/checkpoint-*/checksums.json")) and process.poll() is None:
        time.sleep(0.02)


@pytest.mark.chaos
def test_a_killed_process_ends_the_others_and_the_run_goes_on_to_the_same_end(tmp_path):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    assert [status for status, _ in ended(start_both(recipe, tmp_path / "straight"))] == [0, 0]

    out = tmp_path / "run"
    processes = start_both(recipe, out)
    wait_for_checkpoint(out, processes[1])
    processes[1].send_signal(signal.SIGKILL)
    (status, said), (killed, _) = ended(processes)
    assert killed == -signal.SIGKILL
    assert status == 2, said
    assert "all processes of a training must live, but another one is gone" in said

    assert [status for status, _ in ended(start_both(recipe, out))] == [0, 0]
    assert left(out) == left(tmp_path / "straight")


@pytest.mark.chaos
def test_torchrun_starts_the_processes_again_and_the_run_ends_as_ever(tmp_path):
    """One process is killed; the launcher ends the other and starts both anew, which go on from the checkpoint."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    script = str(ROOT / "scripts" / "train.py")

    def launch(out):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
        return subprocess.Popen(
            [sys.executable, *launcher, script, "--config", str(recipe), "--out", str(out), *FLAGS],
            env={**os.environ, **PLAIN, **RESTARTS, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    ((status, said),) = ended([launch(tmp_path / "straight")])
    assert status == 0, said

    launcher = launch(tmp_path / "run")
    wait_for_checkpoint(tmp_path / "run", launcher)
    workers = [child for child in psutil.Process(launcher.pid).children() if script in child.cmdline()]
    workers[1].send_signal(signal.SIGKILL)
    ((status, said),) = ended([launcher])
    assert status == 0, said
    assert "resumed from checkpoint-" in said
    assert left(tmp_path / "run") == left(tmp_path / "straight")
