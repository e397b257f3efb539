"""A disk that is full while a checkpoint is written: told, nothing half-written is gone on from, and room mends it."""

import shutil
import subprocess

import pytest

from tests.chaos.child import Run
from tests.chaos.test_kills import RECIPE, left

pytestmark = pytest.mark.chaos


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 8 MB in memory; where mounting is not allowed there is none."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small disk must be mounted for this: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_told_and_going_on_after_room_is_made_ends_as_ever(tmp_path, small_disk):
    """The room grows from run to run, so that the disk is full in a stage before training, in it, and behind it."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    straight = Run(recipe, tmp_path / "straight")
    assert straight.end() == 0, straight.said()
    ballast, out = small_disk / "ballast", small_disk / "run"
    said = []
    for room in range(64, 1024, 64):
        free = shutil.disk_usage(small_disk).free
        with ballast.open("wb") as file:
            file.write(b"." * max(0, free - room * 2**10))
        run = Run(recipe, out, said=tmp_path / "run.txt")
        status = run.end()
        ballast.unlink()
        if status == 0:
            break
        assert status in (1, 2), run.said()
        said.append(run.said().splitlines()[-1])
    else:
        raise AssertionError(said)
    assert said[0] == "itemtok: failed: the disk is full; make room and go on (a training with `--resume`)"
    assert all("is full; make room" in line for line in said), said
    assert any("checkpoints, but is full; make room and go on with `--resume`" in line for line in said), said
    assert left(out) == left(tmp_path / "straight")
