"""`itemtok export`: a whole model beside a list of what it may say, for servers that decode items under constraints.

The folder is a bundle with a merged model (servers take no adapters with new tokens), and besides:

- `serving.json`: where the item tokens stand in the vocabulary, what a prompt begins with, how the model was trained.
- for `flashrec`, `catalogue.json`: `{"12,3,7": [ids of items]}`, codewords separated by commas. FlashRec counts the
  token of a codeword up from the first item token, level by level, as `serving.json` says it to be told.
- for `paths`, `paths.json`: the token ids of every item and, in the same order, the items' ids; for whatever takes a
  list of allowed sequences or checks what came out against one.

Decisions:
- FlashRec takes messages of a chat, and makes its prompt with the chat template of the tokenizer. A model of item
  tokens knows no chat, so the template written here puts the start token before what the messages say, nothing else.
- `config.json` says the base of the rotary positions as older programs read it, too: they would go on with a default.
- These servers decode decoder-only models.
"""

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from llm_itemtok import bundle
from llm_itemtok.artifacts import atomic_folder, read_json, write_json, write_text
from llm_itemtok.errors import ArtifactError, UnsupportedModelError
from llm_itemtok.items.files import export_codes
from llm_itemtok.model.prompts import Prompts
from llm_itemtok.pipeline.push import card_of
from llm_itemtok.recommender import Recommender

Format = Literal["flashrec", "paths"]

SERVING, CATALOGUE, PATHS = "serving.json", "catalogue.json", "paths.json"
_FLASHREC_MODELS = ("qwen3",)
_OLDER_CLASS = "PreTrainedTokenizerFast"
"""What versions of `transformers` before 5 call a tokenizer that is all in `tokenizer.json`."""


def export(model: str | Path, out: Path, format: Format) -> Path:
    """Write a model for a server.

    Args:
        model: run folder, bundle or Hub id.
        out: folder to write, new or one that was written by this function.
        format: of the list of items.

    Returns:
        `out`, written whole or not at all.

    Raises:
        ArtifactError: if there is no bundle at `model`, its parts do not belong together, or `out` is in use.
        UnsupportedModelError: if such servers cannot serve the model.
    """
    _refuse_place(out)
    folder = bundle.locate(model)
    recommender = Recommender.from_pretrained(folder, device="cpu").merged()
    _refuse_model(recommender, format)
    with atomic_folder(out) as new:
        recommender.save_pretrained(new, card=card_of(recommender, folder))
        _for_older_readers(new, recommender.model.config)
        if format == "flashrec":
            export_codes(recommender.model.vocab.codes, recommender.item_ids, new / CATALOGUE, "catalogue")
            _write_template(new, recommender)
        else:
            paths = {"item_ids": recommender.item_ids, "token_ids": recommender.model.vocab.paths.tolist()}
            write_text(new / PATHS, json.dumps(paths, ensure_ascii=False) + "\n")
        write_json(new / SERVING, _serving(recommender))
    return out


def _refuse_place(out: Path) -> None:
    """Raise `ArtifactError` where other files than those of an export would be lost: the whole folder is replaced."""
    if not out.exists():
        return
    found = [path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()]
    found = found if out.is_dir() else [out.name]
    if (out / SERVING).is_file():
        ours = (*bundle.FILES, SERVING, CATALOGUE, PATHS)
        found = [name for name in found if not any(fnmatchcase(name, pattern) for pattern in ours)]
    if found:
        raise ArtifactError(
            f"{out}: an export must go into a new folder or replace an export, found: other files {sorted(found)[:3]}; "
            "choose another folder, or move them away"
        )


def _refuse_model(recommender: Recommender, format: Format) -> None:
    config, vocab = recommender.model.config, recommender.model.vocab
    if vocab.num_tokens == 0:
        raise UnsupportedModelError(
            "a server can be given items of item tokens only, but these are named in words of the language model, of "
            "any number; train with another `tokenizer.kind` than `numeric` and `title`"
        )
    if recommender.model.reads != "tokens":
        raise UnsupportedModelError(
            "a server reads item tokens alone, but this model knows items beyond them (`scoring`), by a network that "
            "no server has; serve it with this package (`itemtok recommend`), or train with `scoring.kind: tokens` and "
            "no `scoring.item_embedding`"
        )
    if recommender.generation.dense_share > 0:
        raise UnsupportedModelError(
            "a server asks the language model alone, but a dense model has a share of "
            f"{recommender.generation.dense_share:g} in this one's scores (`rescoring`), so it would rank otherwise "
            "than was measured; serve it with this package (`itemtok recommend`), or train with `rescoring.kind: none`"
        )
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"these servers decode decoder-only models, was: {config.model_type}; serve it with this package "
            "(`itemtok recommend`) or with `custom_generate`"
        )
    if format == "flashrec" and config.model_type not in _FLASHREC_MODELS:
        raise UnsupportedModelError(
            f"FlashRec serves models of the type {' or '.join(_FLASHREC_MODELS)}, was: {config.model_type}; use "
            "`--format paths` and another server"
        )


def _prompts(recommender: Recommender) -> Prompts:
    return Prompts.of(recommender.model, recommender.tokenizer)


def _serving(recommender: Recommender) -> dict[str, Any]:
    """What a server, or whoever asks it, has to be told."""
    vocab, generation = recommender.model.vocab, recommender.generation
    return {
        "items": len(recommender.item_ids),
        "levels": vocab.num_levels,
        "level_sizes": list(vocab.codes.sizes),
        "first_item_token": vocab.first_id,
        "last_item_token": vocab.first_id + vocab.num_tokens - 1,
        "start_token": _prompts(recommender).start,
        "history_length": generation.history_length,
        "mask_seen": generation.leaves_out_seen,
        "beam": generation.beam,
        "training_normaliser": generation.training_normaliser,
        "codes_sha256": generation.codes_sha256,
    }


def _write_template(folder: Path, recommender: Recommender) -> None:
    """Let the tokenizer make prompts of messages: the start token, then their contents as they are."""
    tokenizer: PreTrainedTokenizerBase = recommender.tokenizer
    start = str(tokenizer.convert_ids_to_tokens(_prompts(recommender).start))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = read_json(folder / "tokenizer_config.json")
    settings["chat_template"] = (
        "{{ " + json.dumps(start) + " }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    )
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = _OLDER_CLASS
    write_json(folder / "tokenizer_config.json", settings)


def _for_older_readers(folder: Path, config: Any) -> None:
    """Say the base of rotary positions where it stood in configurations before version 5 of `transformers`."""
    settings = read_json(folder / "config.json")
    rope = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" in rope and "rope_theta" not in settings:
        write_json(folder / "config.json", settings | {"rope_theta": rope["rope_theta"]})
