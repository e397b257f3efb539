"""The files of a bundle: what they hold, whether they belong together, and the model they make.

`recommender.py` knows what a bundle answers; here is what it is on disk. Its own two files are `generation.json` (how
to decode) and `items.jsonl` (the catalogue with codes); the others are of the forms that plain libraries read.
"""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from transformers import AutoConfig

from llm_itemtok.artifacts import FORMAT_VERSION, ITEMS, RECIPE, read_json
from llm_itemtok.decoding.beams import DecodeNormaliser
from llm_itemtok.errors import ArtifactError
from llm_itemtok.model import export
from llm_itemtok.model.item_lm import ItemTokenModel, Normaliser
from llm_itemtok.model.load import load_base, load_lm
from llm_itemtok.model.rows import ItemRows, input_table, output_head
from llm_itemtok.vocab.item_vocab import ItemVocab

GENERATION, CARD = "generation.json", "README.md"


@dataclass(frozen=True)
class Generation:
    """How a bundle is decoded.

    Attributes:
        layout: `merged` (a whole model) or `adapter` (PEFT files beside a base model elsewhere).
        base: Hub id or path of the base model, for `adapter`.
        revision: of the base model.
        normaliser: over what item scores are normalised.
        training_normaliser: the one of the loss.
        beam: beams kept at every level.
        history_length: most recent items read.
        mask_seen: whether items of the history are left out.
        catalog_sha256: of the catalogue that the codes belong to.
        codes_sha256: of the codes.
        dtype: of the base model's weights, for `adapter`: `float32`, `bfloat16` or `auto`.
        protocol: how the data were split, as the recipe's `data` section says it, without places and names.
        format_version: of the bundle.
    """

    layout: str
    base: str | None
    revision: str | None
    normaliser: DecodeNormaliser
    training_normaliser: Normaliser
    beam: int
    history_length: int
    mask_seen: bool
    catalog_sha256: str
    codes_sha256: str
    dtype: str = "auto"
    protocol: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


def locate(path: str | Path, revision: str | None) -> Path:
    """Folder of a bundle: itself, `model/` below it, or a download."""
    folder = Path(path)
    for candidate in (folder, folder / "model"):
        if (candidate / GENERATION).is_file():
            return candidate
    if (folder / RECIPE).is_file():
        raise ArtifactError(f"{folder}: this run has no model yet; its stage `train` must finish first (`itemtok run`)")
    if folder.exists() or isinstance(path, Path):
        raise ArtifactError(
            f"{folder}: a bundle must hold {GENERATION}, which is missing; "
            "name a folder that a run wrote (`runs/NAME` or `runs/NAME/model`) or a Hub id"
        )
    try:
        downloaded = Path(snapshot_download(path, revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ArtifactError(
            f"{path}: neither a folder here nor a Hub repository that can be reached\n  {str(error).splitlines()[0]}"
        ) from error
    return locate(downloaded, None)


def read_generation(path: Path) -> Generation:
    """Read how a bundle is decoded.

    Raises:
        ArtifactError: if the file is not such a description, or of a newer version.
    """
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise ArtifactError(f"{path}: a bundle's settings must be a JSON object, was: {str(settings)[:80]}")
    if settings.get("format_version", 0) > FORMAT_VERSION:
        raise ArtifactError(
            f"{path}: bundle format {settings['format_version']} is newer than this version reads ({FORMAT_VERSION}); "
            "update llm-itemtok"
        )
    wrong = sorted({field.name for field in fields(Generation)} ^ settings.keys())
    if wrong:
        raise ArtifactError(f"{path}: a bundle's settings must be all known and all there, these are not: {wrong}")
    if settings["layout"] not in ("merged", "adapter"):
        raise ArtifactError(f"{path}: `layout` must be merged or adapter, was: {settings['layout']!r}")
    return Generation(**settings)


def read_items(path: Path, vocab: ItemVocab) -> list[dict[str, str]]:
    """Id, title and code of each item; the codes must be those of `vocab`, row by row."""
    if not path.is_file():
        raise ArtifactError(f"{path}: a bundle must hold this file, which is missing")
    items = []
    for number, line in enumerate(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"), start=1):
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise ArtifactError(f"{path}:{number}: not JSON: {error.msg}; was the file cut short?") from error
        if not isinstance(item, dict) or not item.keys() >= {"id", "title", "code"}:
            raise ArtifactError(f"{path}:{number}: an item must have an id, a title and a code, was: {line[:80]}")
        items.append(item)
    if [item["code"] for item in items] != [vocab.spell(row) for row in range(vocab.codes.num_items)]:
        raise ArtifactError(
            f"{path}: codes and {ITEMS} must belong together, but their codes differ; were files mixed from two runs?"
        )
    return items


def load_model(
    folder: Path, vocab: ItemVocab, generation: Generation, *, trust_remote_code: bool
) -> tuple[ItemTokenModel, PeftModel | None]:
    """Load a bundle's model, and PEFT's view of it if it is an adapter.

    Args:
        folder: of the bundle.
        vocab: its item tokens.
        generation: its layout and base model.
        trust_remote_code: run code that comes with the base model of an adapter.

    Raises:
        ArtifactError: if an adapter does not name its base model, or its files are of another program.
    """
    if generation.layout == "adapter":
        return _load_adapter(folder, vocab, generation, trust_remote_code)
    return _load_merged(folder, vocab, generation), None


def _load_merged(folder: Path, vocab: ItemVocab, generation: Generation) -> ItemTokenModel:
    """The whole model: its item rows are read out of its tables."""
    lm = load_lm(folder, AutoConfig.from_pretrained(folder), dtype="auto")
    span = slice(vocab.first_id, vocab.first_id + vocab.num_tokens)
    rows = ItemRows(
        input_table(lm).weight[span].detach(),
        first_id=vocab.first_id,
        tied=bool(lm.config.tie_word_embeddings),
    )
    if rows.output_rows is not None:
        with torch.no_grad():
            rows.output_rows.copy_(output_head(lm).weight[span])
    return ItemTokenModel(lm, rows, vocab, normaliser=generation.training_normaliser)


def _load_adapter(
    folder: Path, vocab: ItemVocab, generation: Generation, trust_remote_code: bool
) -> tuple[ItemTokenModel, PeftModel]:
    """The base model with the adapter's LoRA inside and the item rows beside it."""
    if generation.base is None:
        raise ArtifactError(f"{folder / GENERATION}: an adapter must name its base model, was: null")
    lm, _ = load_base(
        generation.base, revision=generation.revision, dtype=generation.dtype, trust_remote_code=trust_remote_code
    )
    config, weights, input_rows, output_rows = export.load_adapter(folder)
    peft_model = get_peft_model(lm, config)
    assert isinstance(peft_model, PeftModel)
    set_peft_model_state_dict(peft_model, weights)
    rows = ItemRows(input_rows, first_id=vocab.first_id, tied=output_rows is None)
    if rows.output_rows is not None and output_rows is not None:
        with torch.no_grad():
            rows.output_rows.copy_(output_rows)
    model = ItemTokenModel(lm, rows, vocab, normaliser=generation.training_normaliser)
    return model, peft_model
