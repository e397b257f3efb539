"""Base model by Hub id or path, made ready for item tokens: LoRA or full training, and the item rows beside it.

What an adapter can be put on is PEFT's to say: it is tried, and its refusal is told as ours. Weights in 4 bits (QLoRA)
are frozen and computed with in bfloat16. PEFT's preparation for them is left out: it would copy the tables to float32,
and neither its frozen weights nor its gradients into the first layer are missing here, where item rows are trained.
"""

from collections.abc import Callable
from importlib.util import find_spec
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
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file

from llm_itemtok.errors import ItemTokError, UnsupportedModelError
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.model.families import refuse_type, refuse_unsupported
from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.model.likelihood import Normaliser
from llm_itemtok.model.rows import ItemRows, input_table, output_head
from llm_itemtok.vocab.item_vocab import ItemVocab
from llm_itemtok.vocab.text_vocab import extended

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "auto": "auto"}


def load_base(
    name: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    quantization: str = "none",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a language model, decoder-only or encoder–decoder, and its tokenizer.

    Args:
        name: Hub id or local folder.
        revision: Hub revision.
        dtype: `float32`, `bfloat16` or `auto` (as the checkpoint has it).
        quantization: `none`, or `nf4` to hold the linear layers of the body in 4 bits.
        trust_remote_code: run code that comes with the model; only for sources you trust.

    Raises:
        UnsupportedModelError: for a family that the tests do not cover, and where 4 bits are not to be had.
        ItemTokError: when there is no such model, or the library cannot read it.
    """
    where = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, **where)
        refuse_type(config, name)
        if quantization == "nf4":
            refuse_four_bits(config)
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
        lm = load_lm(name, config, dtype=dtype, quantization=quantization, **where)
    except ItemTokError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a type that the library does not know, or code not trusted
        if (Path(name) / "adapter_config.json").is_file() and not (Path(name) / "config.json").is_file():
            raise ItemTokError(
                f"`model.name` must be a whole model, was: {name}, an adapter beside its base; make it whole by "
                "`itemtok merge`"
            ) from error
        raise ItemTokError(
            f"`model.name` must be a folder with a safetensors model or a Hub id that can be reached, was: {name}\n"
            f"  {str(error).splitlines()[0]}"
        ) from error
    refuse_unsupported(lm)
    return lm, tokenizer


def auto_class(config: PreTrainedConfig) -> Any:
    """The library's class for models of a configuration's kind, decoder-only or encoder–decoder."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def load_lm(
    name: str | Path, config: PreTrainedConfig, *, dtype: str, quantization: str = "none", **where: Any
) -> PreTrainedModel:
    """Load a language model whose configuration has been read.

    Args:
        name: Hub id or local folder.
        config: read from there.
        dtype: `float32`, `bfloat16` or `auto` (as the checkpoint has it).
        quantization: `none`, or `nf4` to hold the linear layers of the body in 4 bits.
        where: further arguments of `from_pretrained`, such as `revision`.

    Raises:
        ItemTokError: if an adapter lies beside the model: the library would load it unasked, over the weights or, if it
            names another base, in their place.
    """
    if find_adapter_config_file(str(name), revision=where.get("revision")) is not None:
        raise ItemTokError(
            f"a whole model must have no adapter beside it, found: adapter_config.json in {name}; move it away, or "
            "make model and adapter one by `itemtok merge`"
        )
    if quantization == "nf4":
        where["quantization_config"] = _nf4()
    lm: PreTrainedModel = auto_class(config).from_pretrained(name, dtype=DTYPES[dtype], use_safetensors=True, **where)
    module: Any
    for module in lm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes packs 4-bit weights anew on the first answer of some processors. DoRA and a merge read them,
            # and would take the packed ones for what they were.
            module.support_avx512bf16_for_cpu = False
    if config.is_encoder_decoder:
        # T5's configuration says that the head is tied whatever the checkpoint holds (Flan-T5, mT5: a head of its
        # own), and `resize_token_embeddings` would go by it and throw that head away.
        lm.config.tie_word_embeddings = output_head(lm).weight is input_table(lm).weight
    return lm


def _nf4() -> BitsAndBytesConfig:
    """Linear layers in 4 bits as QLoRA has them, computed with in bfloat16; tables and norms stay as they are."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def refuse_four_bits(config: PreTrainedConfig) -> None:
    """Raise `UnsupportedModelError` where a model of this kind cannot be held in 4 bits, or nothing here can do it."""
    if config.model_type == "gpt2":
        raise UnsupportedModelError(
            "`model.quantization: nf4` must have linear layers of the usual form, and GPT-2 stores its own transposed: "
            "written out of 4 bits they would not be GPT-2's; write `quantization: none`"
        )
    if find_spec("bitsandbytes") is None:
        raise UnsupportedModelError(
            "`model.quantization: nf4` needs the package bitsandbytes, which is not installed here; "
            "`pip install 'llm-itemtok[quantization]'`, or write `quantization: none`"
        )


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
    lm: PreTrainedModel, *, rank: int, alpha: int, dropout: float, rslora: bool, seed: int, dora: bool = False
) -> tuple[PreTrainedModel, PeftModel]:
    """Put LoRA on every linear layer of the body, in place, and freeze the rest.

    Args:
        lm: the base model.
        rank: of the adapters.
        alpha: their output is multiplied by `alpha / rank`.
        dropout: on their input.
        rslora: multiply by `alpha / sqrt(rank)` instead.
        seed: of the initial weights.
        dora: train the length of each weight's columns besides (DoRA).

    Returns:
        The same model with LoRA inside, and PEFT's view of it, which can save or merge the adapter.

    Raises:
        UnsupportedModelError: if PEFT has no such adapter for a layer of this model, with its reason.
    """
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="SEQ_2_SEQ_LM" if lm.config.is_encoder_decoder else "CAUSAL_LM",
        target_modules="all-linear",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_rslora=rslora,
        use_dora=dora,
        fan_in_fan_out=lm.config.model_type == "gpt2",  # GPT-2 stores its linear layers transposed
    )
    try:
        peft_model = get_peft_model(lm, config)
    except (ValueError, NotImplementedError) as error:  # PEFT's two ways to refuse a layer
        raise UnsupportedModelError(
            f"`model.lora` must be what PEFT can put on every linear layer of {type(lm).__name__}, was: "
            f"dora {str(dora).lower()}, dropout {dropout:g}; PEFT says: {str(error).splitlines()[0]} Set `dora: "
            "false` and `dropout: 0.0`, of which packed experts take neither, or choose another `model.name`"
        ) from error
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
    one_table: bool = False,
    known: bool = False,
) -> ItemTokenModel:
    """Extend tokenizer and model by the item tokens of a code table, if its codewords need any.

    Args:
        lm: the base model, with or without LoRA inside.
        tokenizer: gets the item tokens added.
        codes: the items' codes.
        initial_rows: maps the vocabulary and the base table `[V, D]` to rows `[T, D]` (`vocab.init`).
        normaliser: see `model.likelihood`.
        label_smoothing: in `[0, 1)`.
        input_dropout: share of each input embedding dropped while training.
        output_dropout: share of each final state dropped while training.
        one_table: read and write item tokens by the same rows, whatever the base does with its own.
        known: the tokenizer has the item tokens already, and the base rows for them.
    """
    vocab = extended(tokenizer, codes, known=known)
    rows = ItemRows(
        # Float32 whatever the base has: small updates of few rows would be rounded away in bfloat16.
        initial_rows(vocab, input_table(lm).weight.detach()).float(),
        first_id=vocab.first_id,
        tied=one_table or bool(lm.config.tie_word_embeddings),
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
