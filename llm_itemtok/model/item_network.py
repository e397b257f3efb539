"""What a model knows of items beyond their tokens, as a file: the recursive network, or embeddings of items' own.

One file beside the others of a bundle. No plain library reads it, so such a bundle loads through this package only.
Rows of embeddings mean items by their place, and codewords mean something beside one table of codes only: the file says
which codes it was trained with, as the other weights do.

The file of a recursive network holds the item tokens' rows, too, which are its codebooks: in float32, as they were
trained, whatever the weights beside it have; and one table of them, whether or not the base has two.
"""

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from llm_itemtok.artifacts import write_bytes
from llm_itemtok.errors import ArtifactError
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.model.export import CODES, weights_file
from llm_itemtok.model.item_embeddings import ItemEmbeddings
from llm_itemtok.model.item_lm import ItemTokenModel, Reads
from llm_itemtok.model.recursive import Mixing, Recursion
from llm_itemtok.model.rows import ItemRows

FILE_NAME = "item_network.safetensors"
_ROWS = "rows"


def save(model: ItemTokenModel, folder: Path) -> None:
    """Write the file; of a model that reads tokens alone, nothing.

    Args:
        model: the trained model.
        folder: existing folder to write into.
    """
    part = _part(model)
    if part is None:
        return
    tensors = {name: value.detach().contiguous().cpu() for name, value in part.state_dict().items()}
    settings: dict[str, Any] = {"reads": model.reads, "items": _embeddings(part).settings}
    if isinstance(part, Recursion):
        tensors[_ROWS] = model.rows.input_rows.detach().float().cpu().clone()
        settings |= {"hidden": part.hidden, "mixing": part.mixing}
    metadata = {"format": "pt", CODES: model.vocab.codes.sha256, "settings": json.dumps(settings)}
    write_bytes(folder / FILE_NAME, weights_file(tensors, metadata))


def load(model: ItemTokenModel, folder: Path, reads: Reads) -> None:
    """Give a model what `save` wrote; nothing to one that reads tokens alone.

    Args:
        model: as its other files make it; changed in place.
        folder: of the bundle.
        reads: what it should read, as the bundle says.

    Raises:
        ArtifactError: if the file is missing, of another kind, of other codes or of a model of another width.
    """
    if reads == "tokens":
        return
    path = folder / FILE_NAME
    if not path.is_file():
        raise ArtifactError(f"{folder}: a bundle whose model reads `{reads}` must hold {FILE_NAME}, which is missing")
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    settings, tensors, codes = _settings(metadata, path), load_file(path), model.vocab.codes
    if settings["reads"] != reads or metadata.get(CODES) != codes.sha256:
        raise ArtifactError(
            f"{path}: it must be of a model that reads `{reads}`, with the item codes beside it, found: one that reads "
            f"`{settings['reads']}`, with the codes {str(metadata.get(CODES))[:12]} where {codes.sha256[:12]} is "
            "expected; were files mixed from two runs?"
        )
    items, width = settings["items"], model.rows.input_rows.shape[1]
    own = ItemEmbeddings(
        width,
        known=torch.zeros(codes.num_items, dtype=torch.bool),
        dimensions=items["dimensions"],
        vectors=torch.ones(codes.num_items, items["vector_dimensions"]) if items["vector_dimensions"] else None,
    )
    if reads == "named":
        _fill(own, tensors, path)
        model.own = own
        return
    rows = tensors.pop(_ROWS, torch.empty(0, 0))
    if rows.shape != model.rows.input_rows.shape:
        raise ArtifactError(
            f"{path}: network and model must belong together, but its item rows are {tuple(rows.shape)} and those of "
            f"the model {tuple(model.rows.input_rows.shape)}; were files mixed from two runs?"
        )
    mixing: Mixing = settings["mixing"]
    recursion = Recursion(own, levels=codes.num_levels, width=width, hidden=settings["hidden"], mixing=mixing)
    _fill(recursion, tensors, path)
    model.recursion = recursion
    model.rows = ItemRows(rows, first_id=model.rows.first_id, tied=True)


def extend(model: ItemTokenModel, codes: ItemCodes, vectors: np.ndarray | None = None) -> None:
    """Give a model codes of more items than it has, and what it reads of these.

    Args:
        model: changed in place.
        codes: of the items it has, and of M more.
        vectors: float32 `[M, V]`, item vectors of the new ones, for a model that reads such; a new item without one,
            or in a model that reads none, has no embedding.

    Raises:
        ArtifactError: if the vectors have another width than those that the model reads.
    """
    part = _part(model)
    more = codes.num_items - model.vocab.codes.num_items
    if part is not None:
        items = _embeddings(part)
        width = items.settings["vector_dimensions"]
        if width and vectors is not None and vectors.shape[1] != width:
            raise ArtifactError(
                f"vectors of new items must have {width} dimensions, as those that the model reads, was: "
                f"{vectors.shape[1]}; make them as those of the old items were made"
            )
        read = np.zeros((more, width), dtype=np.float32) if vectors is None else vectors
        items.extend(more, torch.from_numpy(read).to(items.known.device) if width else None)
    model.take_codes(codes)


def _part(model: ItemTokenModel) -> Recursion | ItemEmbeddings | None:
    return model.own if model.recursion is None else model.recursion


def _embeddings(part: Recursion | ItemEmbeddings) -> ItemEmbeddings:
    return part.items if isinstance(part, Recursion) else part


def _settings(metadata: dict[str, str], path: Path) -> dict[str, Any]:
    """The settings in a file's metadata."""
    try:
        settings: dict[str, Any] = json.loads(metadata["settings"])
        counts = [settings["items"][name] for name in ("dimensions", "vector_dimensions")]
        if settings["reads"] == "items":
            counts.append(settings["hidden"])
            known = settings["mixing"] in get_args(Mixing)
        else:
            known = settings["reads"] == "named"
        right = known and all(type(count) is int and count >= 0 for count in counts) and any(counts[:2])
    except (KeyError, TypeError, json.JSONDecodeError):
        right = False
    if not right:
        raise ArtifactError(
            f"{path}: the file must say what network it holds, found: {str(metadata.get('settings'))[:80]!r}; was it "
            "written by another program?"
        )
    return settings


def _fill(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load all weights of a module, and no other."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise ArtifactError(
            f"{path}: the weights must be those of the network that the file describes, for this model and catalogue, "
            f"but {str(error).strip().splitlines()[-1].strip()}; were files mixed from two runs?"
        ) from error
