"""A trained model in the forms that plain `transformers` and `peft` load, and back from them.

`merged`: LoRA folded in, the item rows written into tables of the usual form. `adapter`: PEFT's own files, LoRA weights
and the item rows as trainable tokens, a few megabytes beside a base model that stays where it is. The training modules
are never changed by an export.

Rows mean something beside one table of item codes only, and two runs of one recipe have files of the same shapes. So
both forms say which codes they were trained with, where plain libraries pass it over: in `config.json`, or in the
metadata of the adapter's weights.
"""

import copy
import json
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import Embedding, Linear
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from llm_itemtok.artifacts import read_json, write_bytes, write_json
from llm_itemtok.errors import ArtifactError
from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.model.likelihood import Normaliser
from llm_itemtok.model.rows import ItemRows, input_table, output_head
from llm_itemtok.vocab.item_vocab import ItemVocab

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CODES = "item_codes_sha256"
"""Under this name a model says which codes it was trained with."""
FIRST_ID = "item_tokens_first_id"
"""Under this name it says which token id is the first item token's."""
_ROWS = "token_adapter.trainable_tokens_delta"  # PEFT's name; the values are absolute rows, not differences
_MIXED = "were files mixed from two runs?"
_PASSING = ("is_local", "local_files_only", "max_length", "stride", "truncation_strategy",
            "pad_to_multiple_of", "pad_token_type_id", "padding")  # fmt: skip
"""What a tokenizer remembers of how it was loaded and called last."""
_PLAIN = ("task_type", "r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora", "use_dora",
          "base_model_name_or_path", "revision")  # fmt: skip
_NAMES = ("target_modules", "target_parameters")
_PATTERNS = ("rank_pattern", "alpha_pattern")
"""The settings of LoRA that this package writes. PEFT has many more, some of which change the answers unseen."""
_NAME = re.compile(r"[\w.]+")
"""Of a module: what else stands there PEFT takes for a pattern, and a pattern may take any time."""
_NAME_THE_BASE = "name the model that the adapter was trained on as `base` in generation.json"


@torch.no_grad()
def fold_rows(lm: PreTrainedModel, model: ItemTokenModel) -> PreTrainedModel:
    """Resize a model's tables to the extended vocabulary and write the item rows into them, in place.

    Args:
        lm: a language model of the base's shape: a copy of the base, or of the base with LoRA merged in.
        model: whose item rows are written.

    Returns:
        `lm`; its logits over the whole vocabulary equal `model.vocab_logits`.
    """
    first, after = model.rows.first_id, model.rows.first_id + len(model.rows)
    before = input_table(lm).num_embeddings
    if before < after:
        lm.resize_token_embeddings(after, mean_resizing=False)
        input_table(lm).weight[before:first] = 0  # ids of the tokenizer alone, if any
        output_head(lm).weight[before:first] = 0
    input_table(lm).weight[first:after] = model.rows.input_rows.to(lm.dtype)
    output_head(lm).weight[first:after] = model.rows.head().to(lm.dtype)
    return lm


def merged(model: ItemTokenModel, peft_model: PeftModel | None) -> PreTrainedModel:
    """Copy the language model, with LoRA merged and the item rows in its tables.

    Args:
        model: the trained model.
        peft_model: PEFT's view of `model.lm` if it has LoRA, else None.
    """
    lm = copy.deepcopy(model.lm) if peft_model is None else _with_lora_merged(copy.deepcopy(peft_model))
    setattr(lm.config, CODES, model.vocab.codes.sha256)
    setattr(lm.config, FIRST_ID, model.vocab.first_id)
    return fold_rows(lm, model).eval()


def _with_lora_merged(peft_model: PeftModel) -> PreTrainedModel:
    """Merge LoRA, taking the model over.

    Where the base model is in 4 bits its weights are written out first. LoRA was trained beside the rounded weights, so
    it goes into these, and the sum is not rounded again as in PEFT's own merge, which was measured to lose much of it.
    """
    if getattr(peft_model.get_base_model(), "is_quantized", False):
        config, weights = peft_model.peft_config["default"], get_peft_model_state_dict(peft_model)
        peft_model = get_peft_model(peft_model.unload().dequantize(), config)
        set_peft_model_state_dict(peft_model, weights)
    lm: PreTrainedModel = peft_model.merge_and_unload()
    return lm


def save_adapter(
    model: ItemTokenModel, peft_model: PeftModel, folder: Path, *, base: str, revision: str | None
) -> None:
    """Write LoRA weights and item rows, if there are any, as a PEFT adapter with trainable tokens.

    Plain `PeftModel.from_pretrained` loads it onto the base model after `resize_token_embeddings(len(tokenizer))`; on a
    T5 with a head of its own, after `config.tie_word_embeddings = False` before that (`load.load_lm` says why).

    Args:
        model: the trained model.
        peft_model: PEFT's view of `model.lm`.
        folder: existing folder to write into.
        base: Hub id or path of the base model.
        revision: its revision.
    """
    tensors = {name: value.contiguous().cpu() for name, value in get_peft_model_state_dict(peft_model).items()}
    ids = list(range(model.rows.first_id, model.rows.first_id + len(model.rows)))
    sides = _token_modules(model) if ids else {}
    for name, rows in sides.items():
        tensors[f"base_model.model.{name}.{_ROWS}"] = rows.detach().cpu().clone()  # the format takes no tensor twice
    config = copy.deepcopy(peft_model.peft_config["default"])
    assert isinstance(config, LoraConfig)
    config.base_model_name_or_path = base
    config.revision = revision
    config.inference_mode = True
    config.trainable_token_indices = {name.rsplit(".", 1)[-1]: ids for name in sides} or None
    settings = config.to_dict()
    for name, value in settings.items():
        if isinstance(value, set):  # its order would differ from run to run
            settings[name] = sorted(value)
    write_json(folder / ADAPTER_CONFIG, json.loads(json.dumps(settings, default=str)))
    metadata = {"format": "pt", CODES: model.vocab.codes.sha256, FIRST_ID: str(model.vocab.first_id)}
    write_bytes(folder / ADAPTER_WEIGHTS, weights_file(tensors, metadata))


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, *, pad_left: bool) -> None:
    """Write a tokenizer that neither cuts nor pads unless it is told to, whatever it was told before.

    Args:
        tokenizer: stays as it is.
        folder: existing folder to write into.
        pad_left: on which side it pads when told to: decoder-only models go on at the right.
    """
    tokenizer = copy.deepcopy(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    for name in _PASSING:
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.padding_side = "left" if pad_left else "right"
    tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side  # only what stands here is written
    tokenizer.save_pretrained(folder)


def weights_file(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file whose metadata stand in the order given: the library's own order differs from run to run."""
    content = save(tensors, metadata)
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:start]) | {"__metadata__": metadata}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of eight
    return len(header).to_bytes(8, "little") + header + content[start:]


def _token_modules(model: ItemTokenModel) -> dict[str, Tensor]:
    """Names of the modules whose tables PEFT has to extend, with the rows for each.

    PEFT itself carries rows over to whatever is tied to the input table. On an untied model nothing is, in its eyes:
    then the copies of the input table that T5's encoder and decoder hold are named, too.
    """
    names = {module: name for name, module in model.lm.named_modules()}
    table, rows = input_table(model.lm), model.rows
    if rows.output_rows is None:
        return {names[table]: rows.input_rows}
    tables = [name for module, name in names.items() if isinstance(module, Embedding) and module.weight is table.weight]
    return {**dict.fromkeys(tables, rows.input_rows), names[output_head(model.lm)]: rows.output_rows}


def load_adapter(folder: Path) -> tuple[LoraConfig, dict[str, Tensor], Tensor | None, Tensor | None]:
    """Read what `save_adapter` wrote.

    Returns:
        LoRA settings without trainable tokens, LoRA weights, input rows `[T, D]` and output rows; None for those that
        the model does not have.

    Raises:
        ArtifactError: if the files are not such an adapter.
    """
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    config = _lora(folder, widest=max((size for value in tensors.values() for size in value.shape), default=0))
    rows = {name: tensors.pop(name) for name in list(tensors) if name.endswith(_ROWS)}
    output = [value for name, value in rows.items() if ".lm_head." in name]
    inputs = [value for name, value in rows.items() if ".lm_head." not in name]
    expected = bool(_trained_tokens(folder)) == bool(inputs)
    if not expected or len(output) > 1 or any(not torch.equal(inputs[0], copy) for copy in inputs[1:]):
        raise ArtifactError(
            f"{folder / ADAPTER_WEIGHTS}: an adapter must hold one table of item rows for the input and at most one "
            f"for the output, found: {sorted(rows)}; was it written by another program?"
        )
    return config, tensors, inputs[0] if inputs else None, output[0] if output else None


def _lora(folder: Path, *, widest: int) -> LoraConfig:
    """The LoRA settings of an adapter, those that this package writes and no other.

    Args:
        folder: of the adapter.
        widest: the largest size of any of its weights, which no rank is above.

    Raises:
        ArtifactError: if the file holds anything else.
    """
    settings = _adapter_settings(folder)
    given = {name: settings[name] for name in (*_PLAIN, *_NAMES, *_PATTERNS) if settings.get(name)}
    kinds = {**dict.fromkeys(_NAMES, list), **dict.fromkeys(_PATTERNS, dict)}
    right = all(isinstance(given.get(part, kind()), kind) for part, kind in kinds.items())
    if right:
        names = [name for part in kinds for name in given.get(part, ())]
        ranks = [given.get("r"), *given.get("rank_pattern", {}).values()]
        right = all(isinstance(name, str) and _NAME.fullmatch(name) for name in names)
        right &= all(type(rank) is int and 0 < rank <= widest for rank in ranks)
    usual = LoraConfig().to_dict()
    others = {"trainable_token_indices", "inference_mode", "peft_version"}
    strange = sorted(  # settings that this PEFT does not know are of a newer one, and of no effect here
        name for name in (settings.keys() & usual.keys()) - given.keys() - others
        if settings[name] and settings[name] != usual[name]
    )  # fmt: skip
    if strange or not right:
        raise ArtifactError(
            f"{folder / ADAPTER_CONFIG}: an adapter must have settings of LoRA as this package writes them: names of "
            f"layers and ranks that its weights have, found: {f'others {strange[:5]}' if strange else 'other values'}; "
            "was it written by another program?"
        )
    return LoraConfig(**given)


def _adapter_settings(folder: Path) -> dict[str, Any]:
    settings = read_json(folder / ADAPTER_CONFIG)
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise ArtifactError(
            f"{folder / ADAPTER_CONFIG}: an adapter must be of PEFT's kind LORA, found: {str(settings)[:80]}; was it "
            "written by another program?"
        )
    return settings


def from_merged(
    lm: PreTrainedModel, vocab: ItemVocab, folder: Path, *, normaliser: Normaliser = "level", one_table: bool = False
) -> ItemTokenModel:
    """Read the item rows out of the tables of a merged model.

    Args:
        lm: the whole model, as loaded from `folder`; taken over.
        vocab: its item tokens.
        folder: named in messages.
        normaliser: of the training.
        one_table: item tokens are read and written by the same rows, whatever the base does with its own.

    Raises:
        ArtifactError: if the model was trained with other codes, or has no room for the item tokens.
    """
    _refuse_other_codes(getattr(lm.config, CODES, None), vocab, folder)
    span = slice(vocab.first_id, vocab.first_id + vocab.num_tokens)
    if input_table(lm).num_embeddings < span.stop:
        raise ArtifactError(
            f"{folder}: model and tokenizer must belong together, but item tokens have ids up to {span.stop - 1:,} and "
            f"the model's table has {input_table(lm).num_embeddings:,} rows; {_MIXED}"
        )
    _refuse_other_place(getattr(lm.config, FIRST_ID, None), vocab, folder)
    tied = one_table or bool(lm.config.tie_word_embeddings)
    rows = ItemRows(input_table(lm).weight[span].detach(), first_id=vocab.first_id, tied=tied)
    if rows.output_rows is not None:
        with torch.no_grad():
            rows.output_rows.copy_(output_head(lm).weight[span])
    return ItemTokenModel(lm, rows, vocab, normaliser=normaliser)


def from_adapter(
    lm: PreTrainedModel, vocab: ItemVocab, folder: Path, *, normaliser: Normaliser = "level", one_table: bool = False
) -> tuple[ItemTokenModel, PeftModel]:
    """Put an adapter's LoRA into its base model, and the item rows beside it.

    Args:
        lm: the base model; changed in place.
        vocab: the item tokens.
        folder: where `save_adapter` wrote.
        normaliser: of the training.
        one_table: as in `from_merged`.

    Returns:
        The model, and PEFT's view of it.

    Raises:
        ArtifactError: if the adapter is of another program, of other codes, of another tokenizer or of another base.
    """
    config, weights, input_rows, output_rows = load_adapter(folder)
    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
        _refuse_other_codes((file.metadata() or {}).get(CODES), vocab, folder)
    if trained := _trained_tokens(folder):
        _refuse_other_place(trained[0], vocab, folder)
    width = input_table(lm).embedding_dim
    if input_rows is None:  # identifiers in existing words
        input_rows = input_table(lm).weight.new_empty(0, width)
    if len(input_rows) != vocab.num_tokens:
        raise ArtifactError(
            f"{folder}: the adapter must have a row for each of the {vocab.num_tokens} item tokens, was: "
            f"{len(input_rows)}; {_MIXED}"
        )
    tied = one_table or bool(lm.config.tie_word_embeddings)
    if len(input_rows) and (input_rows.shape[1], output_rows is None) != (width, tied):
        raise ArtifactError(
            f"{folder}: adapter and base model must belong together, but the adapter's item rows are "
            f"{input_rows.shape[1]} wide for a head that is {'tied' if output_rows is None else 'untied'}, and the "
            f"base model is {width} wide and {'tied' if tied else 'untied'}; {_NAME_THE_BASE}"
        )
    peft_model = _with_lora(lm, config, weights, folder)
    rows = ItemRows(input_rows, first_id=vocab.first_id, tied=tied)
    if rows.output_rows is not None and output_rows is not None:
        with torch.no_grad():
            rows.output_rows.copy_(output_rows)
    return ItemTokenModel(lm, rows, vocab, normaliser=normaliser), peft_model


def _with_lora(lm: PreTrainedModel, config: LoraConfig, weights: dict[str, Tensor], folder: Path) -> PeftModel:
    """Put LoRA weights into a model, every one of them and no other."""
    problem = ""
    config.base_model_name_or_path = lm.name_or_path or None  # PEFT warns of any other: it is given at saving
    try:
        peft_model = get_peft_model(lm, config)
        found: Any = set_peft_model_state_dict(peft_model, weights)
        absent = [name for name in found.missing_keys if ".lora_" in name]
        if absent or found.unexpected_keys:
            problem = f"{len(absent)} weights of its LoRA are missing, {len(found.unexpected_keys)} are of no layer"
        elif bare := _without_lora(lm):
            problem = f"{len(bare)} layers would go without LoRA, such as {bare[0]}"
    except (ValueError, RuntimeError) as error:  # no such layers, or layers of other sizes
        problem = f"PEFT says: {str(error).strip().splitlines()[-1].strip()}"
    if problem:
        raise ArtifactError(
            f"{folder}: adapter and base model must belong together, but in {type(lm).__name__} {problem}; "
            f"{_NAME_THE_BASE}"
        )
    assert isinstance(peft_model, PeftModel)
    return peft_model


def _without_lora(lm: PreTrainedModel) -> list[str]:
    """Linear layers without LoRA beside others of their name that have it.

    PEFT saves the names of few layers in full, and then says nothing of a base model with more of them.
    """
    adapted = {name for name, module in lm.named_modules() if isinstance(module, LoraLayer)}
    linear = {name for name, module in lm.named_modules() if isinstance(module, Linear | Conv1D)}
    kinds = {name.rsplit(".", 1)[-1] for name in adapted} - {"base_layer"}  # what LoRA itself wraps
    return sorted(name for name in linear - adapted if name.rsplit(".", 1)[-1] in kinds)


def _refuse_other_codes(trained_with: str | None, vocab: ItemVocab, folder: Path) -> None:
    """Raise if a model says that it was trained with other codes; models of earlier versions do not say."""
    if trained_with not in (None, vocab.codes.sha256):
        raise ArtifactError(
            f"{folder}: model and item codes must belong together, but the model was trained with the codes "
            f"{str(trained_with)[:12]} and these are {vocab.codes.sha256[:12]}; {_MIXED}"
        )


def _trained_tokens(folder: Path) -> list[int]:
    """Ids of the tokens that an adapter has rows for, ascending; none where it has no rows."""
    given = _adapter_settings(folder).get("trainable_token_indices") or []
    return sorted({token for ids in (given.values() if isinstance(given, dict) else [given]) for token in ids})


def _refuse_other_place(first_id: int | None, vocab: ItemVocab, folder: Path) -> None:
    """Raise if a model's item rows belong to other token ids; whole models of earlier versions do not say."""
    if vocab.num_tokens > 0 and first_id not in (None, vocab.first_id):
        raise ArtifactError(
            f"{folder}: model and tokenizer must belong together, but the model's item tokens begin at id {first_id} "
            f"and the tokenizer's at {vocab.first_id}; {_MIXED}"
        )
