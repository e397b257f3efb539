"""What is kept is measured once, by whichever process comes first; the others wait for it, and a lost lock harms none.

Two threads stand for two processes: each opens the lock file for itself, and to the system that is all there is to it.
"""

import threading

import numpy as np
import pytest
from filelock import FileLock

from llm_itemtok.evaluation.kept import Measured, measured_once

SIZES = (2, 1)


def measured(rank=1.0):
    return Measured(np.array([rank, 2.5]), np.array([3.0]), {"decay": 0.5}, 1.25)


def never():
    raise AssertionError("this was measured before")


def equal(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_what_is_kept_is_read_whole(tmp_path):
    path = tmp_path / "new" / "knn.json"

    assert equal(measured_once(path, "k", SIZES, measured, never), measured())
    assert equal(measured_once(path, "k", SIZES, never, never), measured())


def test_a_second_process_waits_and_takes_what_the_first_measured(tmp_path):
    path, said, found = tmp_path / "knn.json", [], []
    waits = threading.Event()

    def say(line):
        said.append(line)
        waits.set()

    second = threading.Thread(target=lambda: found.append(measured_once(path, "k", SIZES, never, say)))

    def measure():
        second.start()
        assert waits.wait(timeout=10)
        return measured()

    measured_once(path, "k", SIZES, measure, never)
    second.join(timeout=10)

    assert equal(*found, measured())
    assert said == ["  another process is measuring knn; waiting for it …"]


def test_who_fails_lets_the_next_one_measure(tmp_path):
    path = tmp_path / "knn.json"
    with pytest.raises(ZeroDivisionError):
        measured_once(path, "k", SIZES, lambda: 1 / 0, never)

    with FileLock(path.with_suffix(".lock")).acquire(timeout=0):
        pass
    assert equal(measured_once(path, "k", SIZES, lambda: measured(7.0), never), measured(7.0))


def test_what_is_kept_is_read_while_another_process_holds_the_lock(tmp_path):
    """The lock is for measuring, not for reading."""
    path = tmp_path / "knn.json"
    measured_once(path, "k", SIZES, measured, never)

    with FileLock(path.with_suffix(".lock")):
        assert equal(measured_once(path, "k", SIZES, never, never), measured())


@pytest.mark.parametrize(("key", "sizes"), [("other", SIZES), ("k", (2, 2)), ("k", (3, 1))])
def test_what_is_about_something_else_is_not_taken(tmp_path, key, sizes):
    path = tmp_path / "knn.json"
    measured_once(path, "k", SIZES, measured, never)

    assert equal(measured_once(path, key, sizes, lambda: measured(9.0), never), measured(9.0))
