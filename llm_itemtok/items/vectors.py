"""Item vectors: one float32 vector an item, from its text or from a file.

Decisions:
- Functions, one a source, all `texts -> float32 [N, D]` in catalogue order. Which one to call is the caller's business.
  Those from interactions are in `collaborative`.
- An item without text gets the zero vector: it is known to be nothing, not guessed. `num_without_text` counts them.
- `tfidf_svd` needs no download and no network; the others load what the user names.

Shape letters in this file: N items, D dimensions.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
import pyarrow.types as types
import safetensors
import torch
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from llm_itemtok.data import values
from llm_itemtok.data.catalog import Catalog
from llm_itemtok.data.parquet import table_of_arrow
from llm_itemtok.errors import DataError
from llm_itemtok.items.base import LARGEST, Progress, rows_beyond

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def num_without_text(texts: Sequence[str]) -> int:
    """Number of items that nothing is known about, whose vectors will be zero."""
    return sum(not text.strip() for text in texts)


def tfidf_svd(
    texts: Sequence[str],
    *,
    dimensions: int = 256,
    max_features: int = 50_000,
    seed: int = 0,
    others: Sequence[str] = (),
) -> np.ndarray:
    """Latent semantic analysis: TF-IDF of words and word pairs, reduced by a truncated SVD.

    Args:
        texts: one text an item, may be empty.
        dimensions: D, at least 1. A catalogue whose texts span fewer dimensions fills up with zeros.
        max_features: at most so many words and pairs are looked at, the most frequent ones.
        seed: of the randomised SVD; the same seed gives the same vectors.
        others: M further texts, of which nothing is learned: what no item of `texts` says, they do not say either.

    Returns:
        float32 `[N + M, D]`, rows of length 1, or 0 for an item without any known word.

    Raises:
        DataError: if no text holds a word, or a number is below 1.

    Source: Deerwester et al. 1990; scikit-learn's `TfidfVectorizer` (sublinear) and `TruncatedSVD`.
    """
    if dimensions < 1 or max_features < 1:
        raise DataError(f"`dimensions` and `max_features` must be at least 1, was: {dimensions} and {max_features}")
    vectorizer = TfidfVectorizer(
        token_pattern=r"(?u)\b\w+\b",  # single characters too: "7" may be all that tells two parts of a series apart
        ngram_range=(1, 2),
        sublinear_tf=True,
        max_features=max_features,
        dtype=np.float32,
    )
    if not any(map(vectorizer.build_analyzer(), texts)):
        raise DataError(
            f"none of the {len(texts):,} items has a word of text, so there is nothing to make vectors of; give "
            "titles in the items file, or use `vectors.kind: file`, or `tokenizer.kind: random`"
        )
    weights = vectorizer.fit_transform(texts)
    more = vectorizer.transform(others) if others else weights[:0]
    if weights.shape[1] <= dimensions:
        reduced = [weights.toarray(), more.toarray()]  # fewer words than dimensions: nothing to reduce
    else:
        reduction = TruncatedSVD(min(dimensions, len(texts)), n_iter=7, random_state=seed)
        reduced = [reduction.fit_transform(weights), *([reduction.transform(more)] if others else [])]
    vectors = np.zeros((len(texts) + len(others), dimensions), dtype=np.float32)
    vectors[:, : reduced[0].shape[1]] = np.concatenate(reduced)
    return unit_rows(vectors)


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Scale the rows of float `[N, D]` to length 1; zero rows stay zero."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)


def sentence_transformers(
    texts: Sequence[str], *, model: str, batch_size: int = 64, progress: Progress | None = None
) -> np.ndarray:
    """Sentence embeddings by a sentence-transformers model.

    Args:
        texts: one text an item, may be empty.
        model: Hub id or path.
        batch_size: texts embedded at a time.
        progress: called after each batch.

    Returns:
        float32 `[N, D]`, rows of length 1, zero for empty texts.

    Raises:
        DataError: if the package is not installed, or the model gives something else than finite numbers.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise DataError(
            "`vectors.kind: sentence-transformers` needs the package of that name; install it with "
            "`pip install llm-itemtok[sentence-transformers]`, or use `vectors.kind: tfidf-svd`"
        ) from error
    try:
        encoder = SentenceTransformer(model, trust_remote_code=False, model_kwargs={"use_safetensors": True})
    except (OSError, ValueError) as error:
        raise DataError(
            f"`vectors.model` must be a folder or a Hub id of a sentence-transformers model that can be reached, was: "
            f"{model}\n  {str(error).splitlines()[0]}"
        ) from error

    def embed(batch: list[str]) -> np.ndarray:
        return encoder.encode(batch, batch_size=batch_size, convert_to_numpy=True, show_progress_bar=False)

    return unit_rows(_in_batches(texts, embed, batch_size, progress))


def language_model(
    texts: Sequence[str],
    *,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    batch_size: int = 16,
    max_tokens: int = 512,
    progress: Progress | None = None,
) -> np.ndarray:
    """Mean of a language model's last hidden states over the tokens of an item's text.

    Args:
        texts: one text an item, may be empty.
        model: a causal model, or an encoder-decoder, of which the encoder is used. Evaluated as it is, where it is.
        tokenizer: of the model.
        batch_size: texts embedded at a time.
        max_tokens: longer texts are cut.
        progress: called after each batch.

    Returns:
        float32 `[N, D]`, D the model's width; zero for empty texts. Not scaled.
    """
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model.base_model

    def embed(batch: list[str]) -> np.ndarray:
        ids = tokenizer(batch, truncation=True, max_length=max_tokens)["input_ids"]
        # Padded here, on the right, because a tokenizer may have no padding token and may pad on the left. A text that
        # the tokenizer makes nothing of is one padding token to the model, and adds nothing to the mean below.
        padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row or [0]) for row in ids], batch_first=True)
        lengths = torch.tensor([[len(row)] for row in ids])
        positions = torch.arange(padded.shape[1])
        mask, counted = (positions < lengths.clamp(min=1)).to(model.device), (positions < lengths).to(model.device)
        states = encoder(input_ids=padded.to(model.device), attention_mask=mask.long()).last_hidden_state.float()
        means = (states * counted[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return means.cpu().numpy()

    training = model.training
    model.eval()
    with torch.inference_mode():
        vectors = _in_batches(texts, embed, batch_size, progress)
    model.train(training)
    return vectors


def _in_batches(
    texts: Sequence[str], embed: Callable[[list[str]], np.ndarray], batch_size: int, progress: Progress | None
) -> np.ndarray:
    """Embed the non-empty texts, longest first so that a batch pads little and memory runs out at once if at all."""
    rows = sorted((row for row, text in enumerate(texts) if text.strip()), key=lambda row: (-len(texts[row]), row))
    if not rows:
        raise DataError(
            f"none of the {len(texts):,} items has text, so there is nothing to embed; give titles in the items file, "
            "or use `vectors.kind: file`, or `tokenizer.kind: random`"
        )
    vectors = np.empty((0, 0), dtype=np.float32)
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        embedded = embed([texts[row] for row in batch])
        if start == 0:
            vectors = np.zeros((len(texts), embedded.shape[1]), dtype=np.float32)
        vectors[batch] = embedded
        if progress is not None:
            progress(min(start + batch_size, len(rows)), len(rows))
    return vectors


def from_file(path: str | Path, catalog: Catalog) -> np.ndarray:
    """Vectors made elsewhere.

    Args:
        path: `.npy` or `.safetensors` with one array `[N, D]` in the order of the items file, or `.parquet` with the
            columns `item_id` (joined to the catalogue, so any order, and more items than needed) and `vector`.
        catalog: the items, N of them.

    Returns:
        float32 `[N, D]` in catalogue order.

    Raises:
        DataError: if there is no such file, or it cannot be read, or count, shape, dtype, a value or an id is not as
            above.
    """
    path = Path(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise DataError(f"{path}: a file of item vectors must be here, found: {found}")
    readers = {".npy": _read_npy, ".safetensors": _read_safetensors}
    if path.suffix == ".parquet":
        vectors = _read_parquet(path, catalog)
    elif path.suffix in readers:
        vectors = readers[path.suffix](path)
        if len(vectors) != len(catalog):
            raise DataError(
                f"{path}: item vectors must be one a row of the items file, {len(catalog):,} of them, was: "
                f"{len(vectors):,}; use parquet with `item_id` and `vector` to join by id"
            )
    else:
        raise DataError(
            f"{path}: item vectors must be .npy, .safetensors or .parquet, was: {path.suffix or 'no suffix'}"
        )
    broken = rows_beyond(vectors)
    if len(broken):
        raise DataError(
            f"{path}: item vectors must be finite numbers of at most {LARGEST:.0e}; {len(broken):,} of "
            f"{len(vectors):,} hold NaN, infinity or a larger number, the first that of item "
            f"{catalog.item_ids[broken[0]]!r}"
        )
    return vectors


def _as_matrix(array: np.ndarray, path: Path) -> np.ndarray:
    if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "fiu":
        raise DataError(
            f"{path}: item vectors must be one array of numbers of the shape (items, dimensions), was: {array.dtype} "
            f"of shape {array.shape}"
        )
    with np.errstate(over="ignore"):  # a number beyond float32 becomes infinite and is reported with its item
        return array.astype(np.float32)


def _read_npy(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as file:  # as a stream, or a file of several arrays would be opened as such
            array = np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(f"{path}: not a readable .npy file of numbers: {error}") from error
    return _as_matrix(array, path)


def _read_safetensors(path: Path) -> np.ndarray:
    try:
        # Through torch: numpy has no bfloat16.
        with safetensors.safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if len(names) != 1:
                raise DataError(f"{path}: must hold one tensor, the item vectors, was: {len(names)} ({names[:5]})")
            tensor = file.get_tensor(names[0])
    except safetensors.SafetensorError as error:
        raise DataError(f"{path}: not a readable safetensors file: {error}") from error
    return _as_matrix((tensor.float() if tensor.is_floating_point() else tensor).numpy(), path)


def _read_parquet(path: Path, catalog: Catalog) -> np.ndarray:
    try:
        schema = pyarrow.parquet.read_schema(path)
        missing = [name for name in ("item_id", "vector") if name not in schema.names]
        if missing:
            raise DataError(f"{path}: column {missing[0]!r} is missing; found: {', '.join(schema.names)}")
        kind = schema.field("vector").type
        is_list = any(check(kind) for check in (types.is_list, types.is_large_list, types.is_fixed_size_list))
        if not is_list or not (types.is_floating(kind.value_type) or types.is_integer(kind.value_type)):
            raise DataError(f"{path}: column 'vector' must hold lists of numbers, was: {kind}")
        table = pyarrow.parquet.read_table(path, columns=["item_id", "vector"])
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from error
    # The ids by the rule of the items file's: a float 7.0 is the item `7`.
    ids = table_of_arrow(str(path), table.select(["item_id"]), {"item_id": "item_id"}, schema.names)
    item_ids, rows = values.ids(ids, "item_id")
    if len(item_ids) < len(rows):
        item_id = item_ids[int(np.argmax(np.bincount(rows)))]
        raise DataError(f"{path}: each item must have one vector, but item {item_id!r} has several")
    position = {item_id: row for row, item_id in enumerate(item_ids)}
    absent = [item_id for item_id in catalog.item_ids if item_id not in position]
    if absent:
        raise DataError(
            f"{path}: every item must have a vector; {len(absent):,} of {len(catalog):,} have none, e.g. "
            f"{', '.join(map(repr, absent[:3]))}. Ids in the file look like {', '.join(map(repr, list(position)[:3]))}"
        )
    wanted = np.full(len(table), -1)
    wanted[[position[item_id] for item_id in catalog.item_ids]] = np.arange(len(catalog))
    return _lists_as_matrix(table["vector"], wanted, path)


def _lists_as_matrix(column: pyarrow.ChunkedArray, wanted: np.ndarray, path: Path) -> np.ndarray:
    """Lists of numbers, float32 `[N, D]`, straight from Arrow's flat values; list `r` is row `wanted[r]`, -1 for none.

    As Python objects the numbers would take 24 bytes each and more.
    """
    lengths = pyarrow.compute.fill_null(pyarrow.compute.list_value_length(column), 0).to_numpy()
    if len(found := np.unique(lengths)) != 1:
        raise DataError(f"{path}: all vectors must have one length, was: {', '.join(map(str, found[:5].tolist()))}")
    matrix = np.empty((int(wanted.max()) + 1, int(found[0])), dtype=np.float32)
    if not matrix.shape[1]:
        return _as_matrix(matrix, path)  # says what is wrong with it
    start = 0
    for chunk in column.chunks:
        rows = wanted[start : start + len(chunk)]
        start += len(chunk)
        if (rows >= 0).any():
            numbers = chunk.flatten().to_numpy(zero_copy_only=False).reshape(len(chunk), -1)
            matrix[rows[rows >= 0]] = _as_matrix(numbers[rows >= 0], path)
    return matrix
