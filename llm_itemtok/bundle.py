"""The files of a bundle: what they hold, whether they belong together, and the model they make.

`recommender.py` knows what a bundle answers; here is what it is on disk. Its own two files are `generation.json` (how
to decode) and `items.jsonl` (the catalogue with codes); the others are of the forms that plain libraries read.

The list of files is closed: what else lies in the folder, such as predictions or a log of training, is neither pushed
to the Hub nor downloaded from it. No code that a bundle brings is run here, whoever made it: only the base model of an
adapter may, where the caller says so.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_args

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from llm_itemtok import artifacts, custom_generate, hub
from llm_itemtok.artifacts import FORMAT_VERSION, ITEMS, RECIPE, read_json, sha256_of_arrays, write_bytes
from llm_itemtok.decoding import dense
from llm_itemtok.decoding.dense import Rescorer
from llm_itemtok.errors import ArtifactError, HubError, ItemTokError
from llm_itemtok.items import codes as item_codes
from llm_itemtok.items.base import QUANTIZER_FILE, Quantizer
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.listing import read_listing
from llm_itemtok.items.quantizers import read_quantizer
from llm_itemtok.model import export, item_network
from llm_itemtok.model.item_lm import ItemTokenModel, Reads
from llm_itemtok.model.likelihood import Normaliser
from llm_itemtok.model.load import DTYPES, load_base, load_lm
from llm_itemtok.vocab.item_vocab import ItemVocab
from llm_itemtok.vocab.text_vocab import resolved

GENERATION, CARD = "generation.json", "README.md"
CUSTOM_GENERATE = "custom_generate"
"""Folder of the code that `transformers` runs for users without this package."""

_INDEX = "model.safetensors.index.json"
_WEIGHTS = {"merged": ("model.safetensors", _INDEX), "adapter": (export.ADAPTER_WEIGHTS,)}
"""By layout: one of these must be there."""
_SHARDS = f"model-{'[0-9]' * 5}-of-{'[0-9]' * 5}.safetensors"
_LAYOUTS = {
    "merged": ("config.json", "generation_config.json", *_WEIGHTS["merged"], _SHARDS),
    "adapter": (export.ADAPTER_CONFIG, export.ADAPTER_WEIGHTS),
}
"""By layout: files that the other one does not have."""
FILES = (
    CARD,
    GENERATION,
    ITEMS,
    item_codes.FILE_NAME,
    QUANTIZER_FILE,
    dense.FILE_NAME,
    item_network.FILE_NAME,
    f"{CUSTOM_GENERATE}/generate.py",
    f"{CUSTOM_GENERATE}/requirements.txt",
    *_LAYOUTS["merged"],
    *_LAYOUTS["adapter"],
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja"),
)
"""Patterns of the names that a bundle may hold."""


@dataclass(frozen=True)
class Generation:
    """How a bundle is decoded.

    Attributes:
        layout: `merged` (a whole model) or `adapter` (PEFT files beside a base model elsewhere).
        base: Hub id or path of the base model, for `adapter`; None for `merged`, which needs none.
        revision: of the base model.
        normaliser: over what item scores are normalised.
        training_normaliser: the one of the loss.
        beam: beams kept at every level.
        history_length: most recent items read.
        mask_seen: whether items of the history are left out; when measured, a target among them is a candidate still.
        catalog_sha256: of the catalogue that the codes belong to.
        codes_sha256: of the codes.
        dtype: of the base model's weights, for `adapter`: `float32`, `bfloat16` or `auto`.
        protocol: how the data were split, as the recipe's `data` section says it, without places and names.
        format_version: of the bundle.
        quantization: of the base model, for `adapter`: `none` or `nf4`.
        items_sha256: of the item ids by row; empty in bundles of earlier versions.
        vectors: what item vectors were made of, as the recipe's `vectors` section says it, without places; new items
            must have vectors of that kind. Empty where the codes were made without, and in bundles of earlier versions.
        reads: how items stand in what the model reads (`ItemTokenModel.reads`); `tokens` in earlier versions' bundles.
        dense_share: share of the dense model's log-probability in an item's score, in [0, 1]; at 0 it is not asked.
        repeats: whether items of the history may come out; if not, a target among them is missed when measured.
    """

    layout: str
    base: str | None
    revision: str | None
    normaliser: Normaliser
    training_normaliser: Normaliser
    beam: int
    history_length: int
    mask_seen: bool
    catalog_sha256: str
    codes_sha256: str
    dtype: str = "auto"
    protocol: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    quantization: str = "none"
    items_sha256: str = ""
    vectors: dict[str, Any] = field(default_factory=dict)
    reads: Reads = "tokens"
    dense_share: float = 0.0
    repeats: bool = True

    def __post_init__(self) -> None:
        """Raise `ArtifactError` for the first setting that is not of its kind."""
        _check_settings(vars(self))

    @property
    def leaves_out_seen(self) -> bool:
        """Whether items of a history are no answers to it, for either reason."""
        return self.mask_seen or not self.repeats


_YOUNGER = ("quantization", "items_sha256", "vectors", "reads", "dense_share", "repeats")
"""Settings that bundles of earlier versions lack."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "layout": ("merged", "adapter"),
    "normaliser": get_args(Normaliser),
    "training_normaliser": get_args(Normaliser),
    "dtype": tuple(DTYPES),
    "quantization": ("none", "nf4"),
    "reads": get_args(Reads),
}
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(("base", "revision"), ((str, type(None)), "a text or null")),
    **dict.fromkeys(("catalog_sha256", "codes_sha256", "items_sha256"), ((str,), "a text")),
    **dict.fromkeys(("protocol", "vectors"), ((dict,), "a JSON object")),
    **dict.fromkeys(("mask_seen", "repeats"), ((bool,), "true or false")),
}
_COUNTS = ("beam", "history_length")


def locate(path: str | Path, revision: str | None = None) -> Path:
    """Folder of a bundle: itself, `model/` below it, or a download.

    Args:
        path: folder (a bundle, or a run folder that holds one as `model/`), or Hub id, which may say its revision as
            `OWNER/NAME@REVISION`.
        revision: branch, tag or commit of the Hub repository; the one in `path`, or else the main branch, when None.

    Raises:
        ArtifactError: if there is no bundle, there are two revisions, or one of a folder.
    """
    folder = Path(path)
    for candidate in (folder, folder / "model"):
        if (candidate / GENERATION).is_file():
            return candidate
        artifacts.refuse_aside(candidate)
    if (folder / RECIPE).is_file():
        raise ArtifactError(f"{folder}: this run has no model yet; its stage `train` must finish first (`itemtok run`)")
    if folder.exists() or isinstance(path, Path):
        raise ArtifactError(
            f"{folder}: a bundle must be a folder with {GENERATION}, which is missing; "
            "name one that a run wrote (`runs/NAME` or `runs/NAME/model`) or a Hub id"
        )
    repo, _, named = path.partition("@")
    if named and revision is not None:
        raise ArtifactError(f"{path}: the revision must be said once, was: {named} and {revision}")
    if named and Path(repo).exists():
        raise ArtifactError(f"{path}: a revision must be one of a Hub repository, but {repo} is a folder here")
    downloaded = hub.pull(repo if named else path, ours=FILES, revision=named or revision)
    if not (downloaded / GENERATION).is_file():
        raise ArtifactError(f"{path}: a bundle must hold {GENERATION}, which this Hub repository lacks")
    return downloaded


@dataclass(frozen=True)
class Parts:
    """A bundle without its model.

    Attributes:
        generation: how to decode.
        tokenizer: with the item tokens.
        vocab: the item tokens and codes.
        items: id, title and code of each item, by row.
        quantizer: that gave the codes; None where there is none, and in bundles of earlier versions.
        rescorer: the dense model that scores items as well; None where there is none.
    """

    generation: Generation
    tokenizer: PreTrainedTokenizerBase
    vocab: ItemVocab
    items: list[dict[str, str]]
    quantizer: Quantizer | None
    rescorer: Rescorer | None


def read(folder: Path) -> Parts:
    """Read everything but the model.

    Raises:
        ArtifactError: if it is no bundle, a newer one, or its parts do not belong together.
    """
    generation = read_generation(folder / GENERATION)
    codes = ItemCodes.load(folder)
    if codes.sha256 != generation.codes_sha256:
        raise ArtifactError(
            f"{folder}: item codes and generation.json must belong together, but the codes' hash is "
            f"{codes.sha256[:12]} and {generation.codes_sha256[:12]} is expected; were files mixed from two runs?"
        )
    with _readable(folder, "the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    vocab = resolved(tokenizer, codes)
    items = read_items(folder / ITEMS, vocab)
    if generation.items_sha256 not in ("", items_sha256([item["id"] for item in items])):
        raise ArtifactError(
            f"{folder}: {ITEMS} and generation.json must belong together, but the items are those of another "
            "catalogue; were files mixed from two runs?"
        )
    rescorer = Rescorer.load(folder) if generation.dense_share > 0 or (folder / dense.FILE_NAME).is_file() else None
    return Parts(generation, tokenizer, vocab, items, read_quantizer(folder), rescorer)


def items_sha256(item_ids: Sequence[str]) -> str:
    """Hash the item ids of a catalogue, by row."""
    return sha256_of_arrays(json.dumps(list(item_ids)))


def files(folder: Path) -> dict[str, Path]:
    """The files of a bundle by their names in it, nothing else that lies there, weights of its own layout only.

    Raises:
        ArtifactError: if the model's weights, or parts of them, are missing, or a file is a link to another place.
    """
    generation = read_generation(folder / GENERATION)
    layout, beyond = generation.layout, generation.reads != "tokens"
    others = _LAYOUTS["adapter" if layout == "merged" else "merged"] + (() if beyond else (item_network.FILE_NAME,))
    ours = {name: path for name, path in _found(folder).items() if _is_ours(name) and not _matches(name, others)}
    if "model.safetensors" in ours:  # the libraries read it first; shards beside it are those of another time
        ours = {name: path for name, path in ours.items() if name != _INDEX and not _matches(name, (_SHARDS,))}
    wanted = _WEIGHTS[layout]
    if not ours.keys() & set(wanted):
        raise ArtifactError(f"{folder}: a bundle must hold its model's weights, {' or '.join(wanted)}, found: none")
    if beyond and item_network.FILE_NAME not in ours:
        raise ArtifactError(f"{folder}: a bundle of this model must hold {item_network.FILE_NAME}, which is missing")
    if _INDEX in ours:
        parts = set(_parts(ours[_INDEX]))
        if missing := sorted(parts - ours.keys()):
            raise ArtifactError(f"{folder}: all parts of the model must be there, these are missing: {missing}")
        ours = {name: path for name, path in ours.items() if name in parts or not _matches(name, (_SHARDS,))}
    here = folder.resolve()
    if links := sorted(name for name, path in ours.items() if path.resolve() != here / name):
        raise ArtifactError(
            f"{folder}: the files of a bundle must lie in it, these are links to another place: {links}; put the files "
            "there, such as by `cp -rL`"
        )
    return dict(sorted(ours.items()))


def _found(folder: Path) -> dict[str, Path]:
    """Every file below a folder by its name there; what folders that are links hold is left out, but for our one."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()}
    return found | {f"{CUSTOM_GENERATE}/{path.name}": path for path in (folder / CUSTOM_GENERATE).glob("*")}


def _parts(index: Path) -> list[str]:
    """Names of the files that an index of shards names.

    Raises:
        ArtifactError: if it is no such index, or one of them lies elsewhere.
    """
    content = read_json(index)
    parts = content.get("weight_map") if isinstance(content, dict) else None
    names = [str(name) for name in parts.values()] if isinstance(parts, dict) else []
    if not names or not all(_matches(name, (_SHARDS, "model.safetensors")) for name in names):
        raise ArtifactError(f"{index}: an index must name parts such as model-00001-of-00002.safetensors beside it")
    return names


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _is_ours(name: str) -> bool:
    return _matches(name, FILES)


def refuse_others(folder: Path, what: str = "a bundle") -> None:
    """Raise `ArtifactError` where a bundle would be written over something else: the whole folder is replaced.

    Args:
        folder: where it is to stand.
        what: is to stand there, for the message.
    """
    is_bundle = (folder / GENERATION).is_file()
    names = _found(folder) if folder.is_dir() else [folder.name] if folder.exists() else []
    if found := sorted(name for name in names if not is_bundle or not _is_ours(name)):
        raise ArtifactError(
            f"{folder}: {what} must go into a new folder or replace a bundle, found: other files {found[:3]}; choose "
            "another folder, or move them away"
        )


def refuse_unshareable(generation: Generation) -> None:
    """Raise `HubError` for a bundle that would be of no use elsewhere: an adapter beside a folder of this machine."""
    base = generation.base
    if generation.layout == "adapter" and base is not None and not hub.is_id(base):
        raise HubError(
            f"an adapter on the Hub must have a base model on the Hub, was: the folder {base}; push the whole model "
            "(`--merged`, `merged=True`)"
        )


def write_custom_generate(folder: Path) -> None:
    """Write the code that lets plain `transformers` decode the bundle."""
    source = Path(custom_generate.__file__).parent
    for name in ("generate.py", "requirements.txt"):
        write_bytes(folder / CUSTOM_GENERATE / name, (source / name).read_bytes())


def read_generation(path: Path) -> Generation:
    """Read how a bundle is decoded.

    Raises:
        ArtifactError: if the file is not such a description, or of a newer version.
    """
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise ArtifactError(f"{path}: a bundle's settings must be a JSON object, was: {str(settings)[:80]}")
    version = settings.get("format_version", 0)
    if type(version) is not int:
        raise ArtifactError(f"{path}: `format_version` must be a whole number, was: {str(version)[:80]!r}")
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"{path}: bundle format {version} is newer than this version reads ({FORMAT_VERSION}); update llm-itemtok"
        )
    left_out = {name for name in _YOUNGER if name not in settings}
    wrong = sorted(({field.name for field in fields(Generation)} ^ settings.keys()) - left_out)
    if wrong:
        raise ArtifactError(f"{path}: a bundle's settings must be all known and all there, these are not: {wrong}")
    try:
        return Generation(**settings)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error


def _check_settings(settings: Mapping[str, Any]) -> None:
    def check(name: str, right: bool, must: str) -> None:
        if not right:
            raise ArtifactError(f"`{name}` must be {must}, was: {str(settings[name])[:80]!r}")

    for name, choices in _CHOICES.items():
        check(name, settings[name] in choices, " or ".join(choices))
    for name, (kinds, must) in _KINDS.items():
        check(name, isinstance(settings[name], kinds), must)
    for name in _COUNTS:
        check(name, type(settings[name]) is int and settings[name] >= 1, "a whole number of at least 1")
    share = settings["dense_share"]
    is_number = isinstance(share, int | float) and type(share) is not bool
    check("dense_share", is_number and 0 <= share <= 1, "a number in [0, 1]")


def read_items(path: Path, vocab: ItemVocab) -> list[dict[str, str]]:
    """Id, title and code of each item; the codes must be those of `vocab`, row by row."""
    items = read_listing(path, ("id", "title", "code"))
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
    with _readable(folder, "the model"):
        peft_model = None
        if generation.layout == "adapter":
            model, peft_model = _load_adapter(folder, vocab, generation, trust_remote_code)
        else:
            model = _load_merged(folder, vocab, generation)
        item_network.load(model, folder, generation.reads)
        return model, peft_model


@contextmanager
def _readable(folder: Path, what: str) -> Iterator[None]:
    """Tell what a library cannot read as one message."""
    try:
        yield
    except (ItemTokError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        broken = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)
        if not isinstance(error, broken) and type(error) is not Exception:  # as `tokenizers` raise them
            raise
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ArtifactError(
            f"{folder}: {what} of a bundle must be as it was saved and need no code of its own, which is never run, "
            f"but it cannot be read; was a file cut short?\n  {said[:300]}"
        ) from error


def _load_merged(folder: Path, vocab: ItemVocab, generation: Generation) -> ItemTokenModel:
    """The whole model: its item rows are read out of its tables."""
    if not (folder / "model.safetensors").is_file() and (folder / _INDEX).is_file():
        _parts(folder / _INDEX)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    lm = load_lm(folder, config, dtype="auto", trust_remote_code=False)
    normaliser, one_table = generation.training_normaliser, generation.reads == "items"
    return export.from_merged(lm, vocab, folder, normaliser=normaliser, one_table=one_table)


def _load_adapter(
    folder: Path, vocab: ItemVocab, generation: Generation, trust_remote_code: bool
) -> tuple[ItemTokenModel, PeftModel]:
    """The base model with the adapter's LoRA inside and the item rows beside it."""
    if generation.base is None:
        raise ArtifactError(f"{folder / GENERATION}: an adapter must name its base model, was: null")
    lm, _ = load_base(
        generation.base,
        revision=generation.revision,
        dtype=generation.dtype,
        quantization=generation.quantization,
        trust_remote_code=trust_remote_code,
    )
    normaliser, one_table = generation.training_normaliser, generation.reads == "items"
    return export.from_adapter(lm, vocab, folder, normaliser=normaliser, one_table=one_table)
