"""Item vectors: one row an item, zero where nothing is known, and files that fit or are refused."""

import builtins

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.torch
import torch
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from llm_itemtok.data.catalog import Catalog
from llm_itemtok.errors import DataError
from llm_itemtok.items import vectors as module
from llm_itemtok.items.vectors import (
    from_file,
    language_model,
    num_without_text,
    sentence_transformers,
    tfidf_svd,
)

TEXTS = ["red shoe", "red shoes for men", "blue hat", "", "blue hat, large", "red shoe 7"]
MATRIX = np.arange(6, dtype=np.float32).reshape(3, 2)


def catalog(*ids):
    num = len(ids)
    return Catalog(ids, ("",) * num, ((),) * num, ("",) * num, ("",) * num)


ABC = catalog("a", "b", "c")


def test_tfidf_rows_have_length_one_or_zero_and_alike_texts_are_near():
    x = tfidf_svd(TEXTS, dimensions=4)
    assert x.shape == (6, 4)
    assert x.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), [1, 1, 1, 0, 1, 1], atol=1e-5)
    assert x[0] @ x[5] > x[0] @ x[2]
    assert x[2] @ x[4] > x[2] @ x[1]


def test_tfidf_repeats_itself():
    np.testing.assert_array_equal(tfidf_svd(TEXTS, dimensions=3, seed=1), tfidf_svd(TEXTS, dimensions=3, seed=1))


def test_tfidf_of_a_tiny_catalogue_fills_up_with_zeros():
    x = tfidf_svd(["one word", "other"], dimensions=64)  # four words and pairs
    assert x.shape == (2, 64)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=1e-5)
    assert not x[:, 4:].any()
    x = tfidf_svd(["one two three four five", "six"], dimensions=4)  # ten, but two items span two dimensions
    assert x.shape == (2, 4)
    np.testing.assert_allclose(x @ x.T, np.eye(2), atol=1e-5)
    assert tfidf_svd(["7"], dimensions=2).tolist() == [[1.0, 0.0]]


def test_tfidf_tells_single_characters_apart():
    x = tfidf_svd(["part 7", "part 8"], dimensions=2)
    assert x[0] @ x[1] < 0.99


@pytest.mark.parametrize("texts", [["", ""], ["!!", "  "], []])
def test_tfidf_without_any_word_is_refused(texts):
    with pytest.raises(DataError, match=r"has a word of text.*`tokenizer.kind: random`"):
        tfidf_svd(texts)
    with pytest.raises(DataError, match="at least 1, was: 0 and 50000"):
        tfidf_svd(TEXTS, dimensions=0)


def test_items_without_text_are_counted():
    assert num_without_text(["a", "", "  ", "b"]) == 2


def test_batches_put_rows_back_in_order_and_leave_empty_texts_zero():
    seen, progress = [], []

    def embed(batch):
        seen.append(batch)
        return np.array([[len(text), 1] for text in batch], dtype=np.float32)

    x = module._in_batches(["bb", "", "dddd", "a", " "], embed, 2, lambda done, total: progress.append((done, total)))
    assert x.tolist() == [[2, 1], [0, 0], [4, 1], [1, 1], [0, 0]]
    assert seen == [["dddd", "bb"], ["a"]]
    assert progress == [(2, 3), (3, 3)]
    with pytest.raises(DataError, match="none of the 2 items has text"):
        module._in_batches(["", " "], embed, 2, None)


class Words:
    """A tokenizer of words: its ids are their lengths; it makes nothing of dashes."""

    def __call__(self, texts, *, truncation, max_length):
        assert truncation
        return {"input_ids": [[len(word) for word in text.split() if word != "-"][:max_length] for text in texts]}


def tiny_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20, n_positions=16)).train()


def tiny_t5():
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(num_layers=1, num_heads=2, d_model=8, d_ff=8, d_kv=4, vocab_size=20, decoder_start_token_id=0)
    )


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_t5])
def test_language_model_vectors_are_means_over_tokens_whatever_the_padding(make):
    model = make()
    was_training = model.training
    texts = ["a bb ccc", "dddd", "", "-", "a bb ccc dddd eeeee"]
    x = language_model(texts, model=model, tokenizer=Words(), batch_size=4, max_tokens=4)
    assert x.dtype == np.float32
    assert x.shape == (5, 8)
    assert not x[2:4].any()
    assert model.training == was_training
    model.eval()
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model.transformer
    with torch.no_grad():
        alone = encoder(input_ids=torch.tensor([[1, 2, 3]])).last_hidden_state[0].mean(dim=0)
        cut = encoder(input_ids=torch.tensor([[1, 2, 3, 4]])).last_hidden_state[0].mean(dim=0)
    np.testing.assert_allclose(x[0], alone.numpy(), atol=1e-5)
    np.testing.assert_allclose(x[4], cut.numpy(), atol=1e-5)


def test_a_missing_sentence_transformers_names_the_way_to_install_it(monkeypatch):
    real_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sentence_transformers"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"pip install llm-itemtok\[sentence-transformers\]"):
        sentence_transformers(["x"], model="any")


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_npy_and_safetensors_are_read_in_the_order_of_the_items_file(tmp_path):
    np.save(tmp_path / "x.npy", MATRIX.astype(np.float64))
    safetensors.torch.save_file({"any name": torch.from_numpy(MATRIX).bfloat16()}, tmp_path / "x.safetensors")
    for name in ("x.npy", "x.safetensors"):
        x = from_file(tmp_path / name, ABC)
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, MATRIX)


def test_parquet_is_joined_by_id_and_may_hold_more(tmp_path):
    path = write_parquet(
        tmp_path / "x.parquet", item_id=["c", "x", "a", "b"], vector=[[4.0, 5], [9, 9], [0, 1], [2, 3]]
    )
    np.testing.assert_array_equal(from_file(path, ABC), MATRIX)


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.list_(pyarrow.float64()), pyarrow.large_list(pyarrow.float32()), pyarrow.list_(pyarrow.float16()),
        pyarrow.list_(pyarrow.int8()), pyarrow.list_(pyarrow.float32(), 2),
    ],
)  # fmt: skip
def test_parquet_lists_of_any_kind_and_in_any_chunks_give_the_same_matrix(tmp_path, kind):
    lists = pyarrow.array(MATRIX.astype(kind.value_type.to_pandas_dtype()).tolist() * 3, kind)
    column = pyarrow.chunked_array([lists[:2], lists[2:2], lists[2:7], lists[7:]])
    item_id = pyarrow.array([*"abcuvwxyz"])
    pyarrow.parquet.write_table(
        pyarrow.table({"vector": column, "other": range(9), "item_id": item_id}), tmp_path / "x.parquet",
        row_group_size=2,
    )  # fmt: skip
    np.testing.assert_array_equal(from_file(tmp_path / "x.parquet", ABC), MATRIX)
    found = from_file(tmp_path / "x.parquet", catalog("z", "a", "v"))
    assert (found.dtype, found.tolist()) == (np.float32, MATRIX[[2, 0, 1]].tolist())


def test_numbers_of_which_no_squares_can_be_summed_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.array([[1.0], [1e25], [2.0]]))
    with pytest.raises(DataError, match=r"of at most 1e.12; 1 of 3 .* the first that of item 'b'"):
        from_file(tmp_path / "x.npy", ABC)


def test_parquet_ids_may_be_numbers(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", item_id=[2, 10], vector=[[1.0], [2.0]])
    assert from_file(path, catalog("10", "2")).tolist() == [[2.0], [1.0]]
    path = write_parquet(tmp_path / "y.parquet", item_id=[2.0, 10.0], vector=[[1.0], [2.0]])  # as pandas makes of them
    assert from_file(path, catalog("10", "2")).tolist() == [[2.0], [1.0]]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (MATRIX[:2], "one a row of the items file, 3 of them, was: 2"),
        (MATRIX[0], r"shape \(items, dimensions\), was: float32 of shape \(2,\)"),
        (MATRIX[:, :0], r"shape \(3, 0\)"),
        (np.array([[1], [np.nan], [2]]), "finite.*1 of 3 hold NaN.*item 'b'"),
        (np.array([[1], [2], [np.inf]]), "item 'c'"),
        (np.array([[1], [1e300], [2]]), "or a larger number.*item 'b'"),
        (np.array([["x"], ["y"], ["z"]]), "array of numbers"),
        (np.array([[1j], [1], [1]]), "was: complex128"),
    ],
)
def test_arrays_that_do_not_fit_the_catalogue_are_refused(tmp_path, array, message):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(DataError, match=message):
        from_file(tmp_path / "x.npy", ABC)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"item_id": ["a", "b"], "vector": [[1.0], [2.0]]},
            "1 of 3 have none, e.g. 'c'. Ids in the file look like 'a'",
        ),
        ({"item_id": ["a", "b", "a"], "vector": [[1.0]] * 3}, "item 'a' has several"),
        ({"item_id": ["a", "b", "c"]}, "column 'vector' is missing; found: item_id"),
        ({"id": ["a"], "vector": [[1.0]]}, "column 'item_id' is missing"),
        ({"item_id": ["a", "b", "c"], "vector": [[1.0], [2.0, 3.0], None]}, "one length, was: 0, 1, 2"),
        ({"item_id": ["a", "b", "c"], "vector": [[1.0], [None], [2.0]]}, "NaN.*item 'b'"),
        ({"item_id": ["a", "b", "c"], "vector": [1.0, 2.0, 3.0]}, "column 'vector' must hold lists of numbers, was: d"),
        ({"item_id": ["a", "b", "c"], "vector": [["x"], ["y"], ["z"]]}, "lists of numbers, was: list"),
    ],
)
def test_parquet_that_does_not_fit_the_catalogue_is_refused(tmp_path, columns, message):
    with pytest.raises(DataError, match=message):
        from_file(write_parquet(tmp_path / "x.parquet", **columns), ABC)


@pytest.mark.parametrize("suffix", ["npy", "safetensors", "parquet"])
def test_broken_and_missing_files_are_refused(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    with pytest.raises(DataError, match="must be here, found: nothing"):
        from_file(path, ABC)
    for content in (b"", b"nonsense that is long enough to be something"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="not a readable"):
            from_file(path, ABC)


def test_a_damaged_page_and_several_arrays_are_refused(tmp_path):
    columns = {"item_id": ["a", "b", "c"], "vector": np.random.default_rng(0).random((3, 999)).tolist()}
    path = write_parquet(tmp_path / "x.parquet", **columns)
    content = bytearray(path.read_bytes())
    content[40:4000] = bytes(3960)
    path.write_bytes(content)
    with pytest.raises(DataError, match="not a readable parquet file"):
        from_file(path, ABC)
    with (tmp_path / "x.npy").open("wb") as file:
        np.savez(file, a=MATRIX, b=MATRIX)
    with pytest.raises(DataError, match=r"not a readable \.npy file"):
        from_file(tmp_path / "x.npy", ABC)


def test_pickles_several_tensors_and_other_formats_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.array([{}, {}, {}]), allow_pickle=True)
    with pytest.raises(DataError, match="not a readable"):
        from_file(tmp_path / "x.npy", ABC)
    safetensors.torch.save_file({"a": torch.zeros(3, 2), "b": torch.zeros(3, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(DataError, match="must hold one tensor, the item vectors, was: 2"):
        from_file(tmp_path / "x.safetensors", ABC)
    (tmp_path / "x.csv").touch()
    with pytest.raises(DataError, match=r"must be .npy, .safetensors or .parquet, was: .csv"):
        from_file(tmp_path / "x.csv", ABC)


def test_vectors_of_further_items_change_nothing_of_those_that_are_there():
    """Neither words nor spread of what comes later are learned from, and equal texts have equal vectors."""
    texts = ["red garden rose", "blue garden rose", "red river", "deep blue river stone"]
    known = module.tfidf_svd(texts, dimensions=3)
    both = module.tfidf_svd(texts, dimensions=3, others=["red river", "unheard words"])
    np.testing.assert_array_equal(both[:4], known)
    np.testing.assert_allclose(both[4], known[2], atol=1e-5)
    assert not both[5].any()
