import hashlib
import json
import os
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from llm_itemtok import artifacts
from llm_itemtok.errors import ArtifactError


def test_hash_depends_on_content_shape_and_dtype_but_not_on_memory_layout():
    table = np.arange(6, dtype=np.int32).reshape(2, 3)
    same = artifacts.sha256_of_arrays(table)
    assert artifacts.sha256_of_arrays(np.asfortranarray(table)) == same
    assert artifacts.sha256_of_arrays(table.astype(">i4")) == same
    assert artifacts.sha256_of_arrays(table[:, :]) == same
    others = [
        artifacts.sha256_of_arrays(table.reshape(3, 2)),
        artifacts.sha256_of_arrays(table.astype(np.int64)),
        artifacts.sha256_of_arrays(table + 1),
        artifacts.sha256_of_arrays(table.tobytes()),
        artifacts.sha256_of_arrays(*table),
    ]
    assert len({same, *others}) == 6


def test_hash_keeps_the_boundaries_between_its_parts():
    assert artifacts.sha256_of_arrays("ab", "c") != artifacts.sha256_of_arrays("a", "bc")
    assert artifacts.sha256_of_arrays(b"ab") != artifacts.sha256_of_arrays("ab")


def test_hash_refuses_arrays_of_objects():
    with pytest.raises(TypeError, match="only arrays of numbers"):
        artifacts.sha256_of_arrays(np.array(["a", None], dtype=object))


def test_hash_of_a_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "f").write_bytes(b"content")
    assert artifacts.sha256_of_file(tmp_path / "f") == hashlib.sha256(b"content").hexdigest()


def test_json_comes_back_as_it_was_with_numpy_as_plain_numbers(tmp_path):
    path = tmp_path / "new" / "folder" / "x.json"
    artifacts.write_json(path, {"b": np.float32(0.5), "a": np.arange(2), "t": (1, None, "é"), "n": np.bool_(True)})
    assert artifacts.read_json(path) == {"b": 0.5, "a": [0, 1], "t": [1, None, "é"], "n": True}
    assert list(artifacts.read_json(path)) == ["b", "a", "t", "n"]
    assert path.read_text(encoding="utf-8").endswith("}\n")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), np.float32("-inf")])
def test_json_refuses_numbers_it_cannot_hold_and_names_their_place(tmp_path, number):
    with pytest.raises(ArtifactError, match=r"x\.json: `test\.ndcg\[1\]` must be a finite number.*was: -?(nan|inf)"):
        artifacts.write_json(tmp_path / "x.json", {"test": {"ndcg": [0.5, number]}})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_content_and_no_litter(tmp_path):
    path = tmp_path / "x.json"
    artifacts.write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        artifacts.write_json(path, {"new": object()})
    assert artifacts.read_json(path) == {"old": 1}
    with pytest.raises(IsADirectoryError):
        artifacts.write_text(tmp_path, "text")
    assert list(tmp_path.iterdir()) == [path]


def test_written_files_are_readable_as_the_umask_allows(tmp_path):
    mask = os.umask(0o022)
    try:
        artifacts.write_text(tmp_path / "x", "text")
        with artifacts.atomic_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(mask)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,\n "b"', r"x\.json:2: not JSON"),
        (b"", r"x\.json:1: not JSON"),
        (b"\xff\xfe", r"x\.json: JSON must be UTF-8"),
        (b"[" * 100_000, r"x\.json: JSON must have numbers and depths that can be read: maximum recursion"),
        (b"1" * 5000, r"x\.json: JSON must have numbers and depths that can be read: Exceeds the limit"),
    ],
)
def test_broken_json_is_answered_with_its_place(tmp_path, content, message):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        artifacts.read_json(tmp_path / "x.json")


def test_missing_json_and_a_folder_in_its_place_are_told_apart(tmp_path):
    with pytest.raises(ArtifactError, match=r"must be here, found: nothing"):
        artifacts.read_json(tmp_path / "none.json")
    with pytest.raises(ArtifactError, match=r"must be here, found: a folder"):
        artifacts.read_json(tmp_path)


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path):
    target = tmp_path / "codes" / "v0"
    for content in ("first", "second"):
        with artifacts.atomic_folder(target) as folder:
            (folder / content).write_text(content)
            (folder / "sub").mkdir()
            (folder / "sub" / "deep").write_text(content)
            assert not (target / content).exists()
        assert sorted(path.name for path in target.iterdir()) == [content, "sub"]
    assert [path.name for path in target.parent.iterdir()] == ["v0"]


def _fill_and_fail(target):
    with artifacts.atomic_folder(target) as folder:
        (folder / "half").write_text("half")
        raise KeyError("stopped half-way")


def test_a_folder_whose_filling_fails_leaves_the_old_one(tmp_path):
    target = tmp_path / "model"
    with artifacts.atomic_folder(target) as folder:
        (folder / "old").write_text("old")
    with pytest.raises(KeyError):
        _fill_and_fail(target)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in target.iterdir()] == ["old"]


def test_names_of_the_run_folder_are_the_contract():
    names = ["RECIPE", "ENVIRONMENT", "METRICS_LOG", "METRICS", "CODES", "PREDICTIONS", "MODEL", "REPORT", "STAGES"]
    assert [getattr(artifacts, name) for name in names] == [
        "recipe.yaml", "environment.json", "metrics.jsonl", "metrics.json", "codes", "predictions.parquet", "model",
        "report.html", "stages.json",
    ]  # fmt: skip
    assert json.dumps(artifacts.FORMAT_VERSION) == "1"


def test_what_a_kill_left_half_written_is_removed_and_nothing_else(tmp_path):
    artifacts.write_text(tmp_path / "codes" / "v0" / "quality.json", "{}")
    (tmp_path / ".hidden").touch()
    others = {".hidden", ".run-0.lock", ".env.template", ".vimrc.original", ".app.settings"}
    for name in others:
        (tmp_path / name).touch()
    handle, _ = tempfile.mkstemp(dir=tmp_path / "codes", prefix=".stages.json.itemtok-new.")
    os.close(handle)
    os.mkdir(tempfile.mkdtemp(dir=tmp_path, prefix=".model.itemtok-new.") + "/inside")
    artifacts.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.rglob("*")} == {*others, "codes", "v0", "quality.json"}


def test_a_kill_between_the_old_folder_and_the_new_one_loses_neither_name_nor_content(tmp_path, monkeypatch):
    """The old one has stepped aside by then; it comes back with the clean-up."""
    target = tmp_path / "model"
    with artifacts.atomic_folder(target) as folder:
        (folder / "old").write_text("old")
    moves = []

    def killed(source, place):
        moves.append(source)
        if len(moves) > 1:  # the new folder, and then the way back
            raise KeyboardInterrupt
        os.rename(source, place)

    monkeypatch.setattr(artifacts.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt), artifacts.atomic_folder(target) as folder:
        (folder / "new").write_text("new")
    assert not target.exists()
    artifacts.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (target / "old").read_text() == "old"


def test_links_and_the_folder_one_stands_in_are_written_where_they_are(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    for number, place in enumerate(("../link", ".")):
        with artifacts.atomic_folder(place) as folder:
            (folder / "file").write_text(str(number))
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "elsewhere" / "file").read_text() == str(number)
        monkeypatch.chdir(tmp_path / "elsewhere")  # the one of before was exchanged


def test_versions_of_codes_are_told_by_their_numbers(tmp_path):
    assert artifacts.code_versions(tmp_path) == []
    for name in ("v10", "v2", "v0", "v1.bak", "vocab", "v"):
        (tmp_path / "codes" / name).mkdir(parents=True)
    assert [number for number, _ in artifacts.code_versions(tmp_path)] == [0, 2, 10]


def test_what_is_being_written_is_told_by_its_name(tmp_path):
    with artifacts.atomic_folder(tmp_path / "model") as writing:
        assert artifacts.is_leftover(writing)
    assert not artifacts.is_leftover(tmp_path / "model")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ITEMTOK_CACHE", str(tmp_path / "cache"))
    return artifacts.cache_folder()


def filler(calls, text="content"):
    def fill(folder):
        calls.append(text)
        (folder / "a").write_text(text)
        (folder / "b").write_text("b")

    return fill


def test_a_kept_folder_is_filled_once_for_a_key(cache):
    calls = []
    first = artifacts.kept_folder(cache / "kind", "0" * 64, filler(calls))
    assert artifacts.kept_folder(cache / "kind", "0" * 64, filler(calls)) == first
    assert first.parent == cache / "kind"
    assert artifacts.kept_folder(cache / "kind", "1" * 64, filler(calls, "other")) != first
    assert calls == ["content", "other"]
    assert (first / "a").read_text() == "content"


@pytest.mark.parametrize(
    "damage", ["a file gone", "a file changed", "the note gone", "the note cut", "the note empty", "another note"]
)
def test_a_kept_folder_that_is_not_as_it_was_written_is_filled_anew(cache, damage):
    calls = []
    place = artifacts.kept_folder(cache / "kind", "0" * 64, filler(calls))
    if damage == "a file gone":
        (place / "b").unlink()
    elif damage == "a file changed":
        (place / "a").write_text("cont")
    elif damage == "the note gone":
        (place / artifacts.CONTENT).unlink()
    else:
        (place / artifacts.CONTENT).write_text({"the note cut": '{"a": ', "the note empty": "{}"}.get(damage, "[1]"))
    assert artifacts.kept_folder(cache / "kind", "0" * 64, filler(calls)) == place
    assert calls == ["content"] * 2
    assert (place / "b").read_text() == "b"


def test_where_filling_fails_nothing_is_kept_and_the_next_one_begins_anew(cache):
    def fail(folder):
        (folder / "a").write_text("half")
        raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        artifacts.kept_folder(cache / "kind", "0" * 64, fail)
    (cache / "kind" / f".{'0' * 32}.itemtok-new.abcdefgh").mkdir()  # of a process that was killed
    calls = []
    place = artifacts.kept_folder(cache / "kind", "0" * 64, filler(calls))
    assert calls == ["content"]
    assert {path.name for path in place.parent.iterdir()} == {place.name, f"{place.name}.lock"}


def test_who_needs_what_another_makes_waits_and_says_so(cache):
    begun, release, calls, said = threading.Event(), threading.Event(), [], []

    def slowly(folder):
        begun.set()
        assert release.wait(60)
        filler(calls)(folder)

    def say(line):
        said.append(line)
        release.set()

    with ThreadPoolExecutor() as threads:
        one = threads.submit(artifacts.kept_folder, cache / "kind", "0" * 64, slowly)
        assert begun.wait(60)
        other = threads.submit(artifacts.kept_folder, cache / "kind", "0" * 64, filler(calls), say)
        assert one.result() == other.result()
    assert calls == ["content"]
    assert "which another process makes" in said[0]
