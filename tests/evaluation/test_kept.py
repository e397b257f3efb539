"""What is kept is measured once; that processes wait for each other, and damage, are tested with `artifacts`."""

import numpy as np
import pytest

from llm_itemtok.evaluation.kept import Measured, measured_once


def measured(rank=1.0):
    return Measured(np.array([rank, 2.5]), np.array([3.0]), {"decay": 0.5}, 1.25)


def never(*_):
    raise AssertionError("this was measured before")


def equal(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_what_is_kept_is_read_whole_and_by_its_key(tmp_path):
    assert equal(measured_once(tmp_path / "new", "k", measured, never), measured())
    found = measured_once(tmp_path / "new", "k", never, never)
    assert equal(found, measured())
    assert found.test.dtype == found.validation.dtype == np.float64
    assert equal(measured_once(tmp_path / "new", "other", lambda: measured(9.0), never), measured(9.0))


def test_who_fails_keeps_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        measured_once(tmp_path, "k", lambda: 1 / 0, never)
    assert equal(measured_once(tmp_path, "k", measured, never), measured())


def test_what_cannot_be_written_is_measured_once_all_the_same(tmp_path, monkeypatch):
    """A folder that cannot be made, and a disk that is full when all is measured."""
    (tmp_path / "file").write_text("")
    said, calls = [], []

    def measure():
        calls.append(1)
        return measured()

    assert equal(measured_once(tmp_path / "file", "k", measure, said.append), measured())
    full = OSError(28, "No space left on device")
    monkeypatch.setattr("llm_itemtok.evaluation.kept.write_json", lambda *_: (_ for _ in ()).throw(full))
    assert equal(measured_once(tmp_path / "disk", "k", measure, said.append), measured())
    assert len(calls) == 2
    assert ["could not be written" in line for line in said] == [True, True]
