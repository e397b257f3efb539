"""A trained model in the forms that plain `transformers` and `peft` load.

`merged`: LoRA folded in, the item rows written into tables of the usual form. `adapter`: PEFT's own files, LoRA weights
and the item rows as trainable tokens, a few megabytes beside a base model that stays where it is. The training modules
are never changed by an export.
"""

import copy
import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Embedding
from transformers import PreTrainedModel

from llm_itemtok.artifacts import write_json
from llm_itemtok.errors import ArtifactError
from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.model.rows import input_table, output_head

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ROWS = "token_adapter.trainable_tokens_delta"  # PEFT's name; the values are absolute rows, not differences


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
    if model.rows.output_rows is not None:
        output_head(lm).weight[first:after] = model.rows.output_rows.to(lm.dtype)
    return lm


def merged(model: ItemTokenModel, peft_model: PeftModel | None) -> PreTrainedModel:
    """Copy the language model, with LoRA merged and the item rows in its tables.

    Args:
        model: the trained model.
        peft_model: PEFT's view of `model.lm` if it has LoRA, else None.
    """
    lm = copy.deepcopy(model.lm) if peft_model is None else copy.deepcopy(peft_model).merge_and_unload()
    return fold_rows(lm, model).eval()


def save_adapter(
    model: ItemTokenModel, peft_model: PeftModel, folder: Path, *, base: str, revision: str | None
) -> None:
    """Write LoRA weights and item rows as a PEFT adapter with trainable tokens.

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
    sides = _token_modules(model)
    for name, rows in sides.items():
        tensors[f"base_model.model.{name}.{_ROWS}"] = rows.detach().cpu().clone()  # the format takes no tensor twice
    config = copy.deepcopy(peft_model.peft_config["default"])
    assert isinstance(config, LoraConfig)
    config.base_model_name_or_path = base
    config.revision = revision
    config.inference_mode = True
    config.trainable_token_indices = {name.rsplit(".", 1)[-1]: ids for name in sides}
    settings = config.to_dict()
    for name, value in settings.items():
        if isinstance(value, set):  # its order would differ from run to run
            settings[name] = sorted(value)
    write_json(folder / ADAPTER_CONFIG, json.loads(json.dumps(settings, default=str)))
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


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


def load_adapter(folder: Path) -> tuple[LoraConfig, dict[str, Tensor], Tensor, Tensor | None]:
    """Read what `save_adapter` wrote.

    Returns:
        LoRA settings without trainable tokens, LoRA weights, input rows `[T, D]`, and output rows or None.

    Raises:
        ArtifactError: if the files are not such an adapter.
    """
    config = LoraConfig.from_pretrained(str(folder))
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    rows = {name: tensors.pop(name) for name in list(tensors) if name.endswith(_ROWS)}
    output = [value for name, value in rows.items() if ".lm_head." in name]
    inputs = [value for name, value in rows.items() if ".lm_head." not in name]
    if not inputs or len(output) > 1 or any(not torch.equal(inputs[0], copy) for copy in inputs[1:]):
        raise ArtifactError(
            f"{folder / ADAPTER_WEIGHTS}: an adapter must hold one table of item rows for the input and at most one "
            f"for the output, found: {sorted(rows)}; was it written by another program?"
        )
    config.trainable_token_indices = None
    config.inference_mode = False
    return config, tensors, inputs[0], output[0] if output else None
