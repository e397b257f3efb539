"""The item rows written into tables of the usual form: a model that plain `transformers` loads and runs."""

import torch
from transformers import PreTrainedModel

from llm_itemtok.model.item_lm import ItemTokenModel


@torch.no_grad()
def fold_rows(lm: PreTrainedModel, model: ItemTokenModel) -> PreTrainedModel:
    """Resize a model's tables to the extended vocabulary and write the item rows into them, in place.

    Args:
        lm: a causal language model of the base's shape: the base itself, or a copy with LoRA merged in.
        model: whose item rows are written.

    Returns:
        `lm`; its logits over the whole vocabulary equal `model.vocab_logits`.
    """
    first, after = model.rows.first_id, model.rows.first_id + len(model.rows)
    if lm.get_input_embeddings().num_embeddings < after:
        lm.resize_token_embeddings(after, mean_resizing=False)
    lm.get_input_embeddings().weight[first:after] = model.rows.input_rows.to(lm.dtype)
    if model.rows.output_rows is not None:
        lm.get_output_embeddings().weight[first:after] = model.rows.output_rows.to(lm.dtype)
    return lm
