"""Which base models there are, and what to know of their kind: an encoder or none, and what the decoder begins with."""

from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from llm_itemtok.errors import UnsupportedModelError

DECODER_FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "smollm3", "granite",
    "mixtral", "qwen3_moe", "gpt2", "gpt_neox", "opt", "bloom", "falcon",
)  # fmt: skip
ENCODER_DECODER_FAMILIES = ("t5", "mt5")
SUPPORTED_FAMILIES = DECODER_FAMILIES + ENCODER_DECODER_FAMILIES
"""Model types whose training, decoding and export are proven equal to plain `transformers` by the tests."""


def refuse_type(config: PreTrainedConfig, name: Path | str) -> None:
    """Raise `UnsupportedModelError` for a family that the tests do not cover, before its weights are fetched.

    Args:
        config: of the base model.
        name: of the base model, for the message.
    """
    if config.model_type not in SUPPORTED_FAMILIES:
        raise UnsupportedModelError(
            f"the base model must be one of the tested families {', '.join(SUPPORTED_FAMILIES)}, "
            f"but `{name}` is of type {config.model_type}; choose another `model.name`"
        )


def refuse_unsupported(lm: PreTrainedModel) -> None:
    """Raise `UnsupportedModelError` for models whose results the tests do not vouch for."""
    refuse_type(lm.config, type(lm).__name__)
    head = lm.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise UnsupportedModelError(
            f"the output head must have no bias, but that of {type(lm).__name__} has one; choose another `model.name`"
        )


def answer_start(lm: PreTrainedModel) -> int | None:
    """Token id that the decoder of an encoder–decoder begins with; None for a decoder-only model."""
    if not lm.config.is_encoder_decoder:
        return None
    start = lm.config.decoder_start_token_id
    return int(lm.config.pad_token_id if start is None else start)


def of_encoder(name: str) -> bool:
    """Whether a module or parameter of an encoder–decoder works on what the encoder reads, by its dotted name.

    Beside the encoder that is what makes keys and values of its states, in the decoder's cross-attention.
    """
    parts = name.split(".")
    return "encoder" in parts or ("EncDecAttention" in parts and not {"k", "v"}.isdisjoint(parts))
