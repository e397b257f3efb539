"""Base model by Hub id or path, made ready for item tokens: LoRA or full training, and the item rows beside it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llm_itemtok.errors import ItemTokError, UnsupportedModelError
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.model.item_lm import SUPPORTED_FAMILIES, ItemTokenModel, Normaliser, refuse_unsupported
from llm_itemtok.model.rows import ItemRows, input_table, output_head
from llm_itemtok.vocab.item_vocab import ItemVocab

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "auto": "auto"}


def load_base(
    name: str | Path, *, revision: str | None = None, dtype: str = "float32", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a language model, decoder-only or encoder–decoder, and its tokenizer.

    Args:
        name: Hub id or local folder.
        revision: Hub revision.
        dtype: `float32`, `bfloat16` or `auto` (as the checkpoint has it).
        trust_remote_code: run code that comes with the model; only for sources you trust.

    Raises:
        UnsupportedModelError: for a family that the tests do not cover.
        ItemTokError: when there is no such model, or the library cannot read it.
    """
    where = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, **where)
        if config.model_type not in SUPPORTED_FAMILIES:
            raise UnsupportedModelError(
                f"the base model must be one of the tested families {', '.join(SUPPORTED_FAMILIES)}, "
                f"but `{name}` is of type {config.model_type}; choose another `model.name`"
            )
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
        lm = load_lm(name, config, dtype=dtype, **where)
    except UnsupportedModelError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a type that the library does not know, or code not trusted
        raise ItemTokError(
            f"`model.name` must be a folder with a safetensors model or a Hub id that can be reached, was: {name}\n"
            f"  {str(error).splitlines()[0]}"
        ) from error
    refuse_unsupported(lm)
    return lm, tokenizer


def auto_class(config: PreTrainedConfig) -> Any:
    """The library's class for models of a configuration's kind, decoder-only or encoder–decoder."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def load_lm(name: str | Path, config: PreTrainedConfig, *, dtype: str, **where: Any) -> PreTrainedModel:
    """Load a language model whose configuration has been read.

    Args:
        name: Hub id or local folder.
        config: read from there.
        dtype: `float32`, `bfloat16` or `auto` (as the checkpoint has it).
        where: further arguments of `from_pretrained`, such as `revision`.
    """
    lm: PreTrainedModel = auto_class(config).from_pretrained(name, dtype=DTYPES[dtype], use_safetensors=True, **where)
    if config.is_encoder_decoder:
        # T5's configuration says that the head is tied whatever the checkpoint holds (Flan-T5, mT5: a head of its
        # own), and `resize_token_embeddings` would go by it and throw that head away.
        lm.config.tie_word_embeddings = output_head(lm).weight is input_table(lm).weight
    return lm


def start_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that every prompt begins with: the tokenizer's BOS, or its EOS where it has none (Qwen).

    Raises:
        ItemTokError: if it has neither.
    """
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise ItemTokError("the tokenizer must have a BOS or an EOS token to begin a prompt with, but it has neither")


def add_lora(
    lm: PreTrainedModel, *, rank: int, alpha: int, dropout: float, rslora: bool, seed: int
) -> tuple[PreTrainedModel, PeftModel]:
    """Put LoRA on every linear layer of the body, in place, and freeze the rest.

    Returns:
        The same model with LoRA inside, and PEFT's view of it, which can save or merge the adapter.
    """
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="SEQ_2_SEQ_LM" if lm.config.is_encoder_decoder else "CAUSAL_LM",
        target_modules="all-linear",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_rslora=rslora,
        fan_in_fan_out=lm.config.model_type == "gpt2",  # GPT-2 stores its linear layers transposed
    )
    peft_model = get_peft_model(lm, config)
    assert isinstance(peft_model, PeftModel)
    return lm, peft_model


def with_item_tokens(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    codes: ItemCodes,
    initial_rows: Callable[[ItemVocab, Tensor], Tensor],
    *,
    normaliser: Normaliser = "level",
    label_smoothing: float = 0.0,
    input_dropout: float = 0.0,
    output_dropout: float = 0.0,
) -> ItemTokenModel:
    """Extend tokenizer and model by the item tokens of a code table.

    Args:
        lm: the base model, with or without LoRA inside.
        tokenizer: gets the item tokens added.
        codes: the items' codes.
        initial_rows: maps the vocabulary and the base table `[V, D]` to rows `[T, D]` (`vocab.init`).
        normaliser: see `model.item_lm`.
        label_smoothing: in `[0, 1)`.
        input_dropout: share of each input embedding dropped while training.
        output_dropout: share of each final state dropped while training.
    """
    vocab = ItemVocab.add_to(tokenizer, codes)
    rows = ItemRows(
        # Float32 whatever the base has: small updates of few rows would be rounded away in bfloat16.
        initial_rows(vocab, input_table(lm).weight.detach()).float(),
        first_id=vocab.first_id,
        tied=bool(lm.config.tie_word_embeddings),
    )
    return ItemTokenModel(
        lm,
        rows,
        vocab,
        normaliser=normaliser,
        label_smoothing=label_smoothing,
        input_dropout=input_dropout,
        output_dropout=output_dropout,
    )
