"""Streaming gives what memory would, and leaves no trace of the blocks."""

import numpy as np
import pytest

from llm_itemtok.errors import DataError
from llm_itemtok.items import streaming
from llm_itemtok.items.residual_kmeans import ResidualKMeans
from llm_itemtok.items.streaming import draw_rows, read_blocks, read_rows


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(500, 6)).astype(np.float32)


@pytest.fixture
def mapped(x, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK", 64)
    np.save(tmp_path / "vectors.npy", x)
    return np.load(tmp_path / "vectors.npy", mmap_mode="r")


def test_blocks_are_the_whole_in_order(x, mapped):
    for source in (x, mapped, mapped[100:], mapped[:, ::2], mapped[::3], np.asfortranarray(x)):
        blocks = list(read_blocks(source))
        np.testing.assert_array_equal(np.concatenate([content for _, content in blocks]), source)
        assert [rows.start for rows, _ in blocks] == list(range(0, len(source), 64))


def test_rows_of_a_file_are_the_rows_of_the_array(x, mapped):
    rows = np.array([0, 3, 63, 64, 65, 200, 499])
    np.testing.assert_array_equal(read_rows(mapped, rows), x[rows])
    np.testing.assert_array_equal(read_rows(x, rows), x[rows])


def test_codes_of_a_file_are_those_of_the_array(x, mapped):
    tokenizer = ResidualKMeans(levels=2, codebook_size=8, components=4, sample=300, seed=1)
    codes = tokenizer.fit(x)
    assert ResidualKMeans(levels=2, codebook_size=8, components=4, sample=300, seed=1).fit(mapped) == codes
    np.testing.assert_array_equal(tokenizer.quantizer.encode_blocks(mapped), codes.table)
    assert codes.provenance["tokenizer"]["sample"] == 300


def test_a_sample_of_everything_changes_nothing(x):
    plain, whole = (ResidualKMeans(levels=2, codebook_size=8, sample=size) for size in (None, 500))
    assert plain.fit(x) == whole.fit(x)


def test_codebooks_are_fitted_on_the_sample_alone(x):
    changed = x.copy()
    others = np.setdiff1d(np.arange(500), draw_rows(500, 100, seed=0))
    changed[others] += 10
    fitted = []
    for vectors in (x, changed):
        tokenizer = ResidualKMeans(levels=1, codebook_size=8, sample=100)
        tokenizer.fit(vectors)
        fitted.append(tokenizer.quantizer.codebooks.detach().numpy())
    np.testing.assert_array_equal(*fitted)


def test_a_sample_has_no_row_twice_and_ascends():
    rows = draw_rows(1000, 400, seed=0)
    assert len(np.unique(rows)) == 400
    assert (np.diff(rows) > 0).all()
    assert draw_rows(5, 9, seed=0).tolist() == [0, 1, 2, 3, 4]
    assert not np.array_equal(rows, draw_rows(1000, 400, seed=1))


def test_broken_numbers_deep_in_a_file_are_found(x, tmp_path):
    x[450, 2] = np.nan
    np.save(tmp_path / "broken.npy", x)
    with pytest.raises(DataError, match="finite numbers"):
        ResidualKMeans(levels=1, codebook_size=8, sample=100).fit(np.load(tmp_path / "broken.npy", mmap_mode="r"))


def test_samples_out_of_range_are_refused():
    with pytest.raises(DataError, match="`sample` must be at least 1, or none given, was: 0"):
        ResidualKMeans(sample=0)
    with pytest.raises(DataError, match="at least 1 item, was: 0"):
        draw_rows(5, 0, seed=0)
