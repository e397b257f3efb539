"""Real, tiny models built from configuration: what the tests run on instead of mocks or downloads."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    MT5Config,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    T5Config,
)

from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.text_codes import Split, TextCodes
from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.model.load import auto_class, with_item_tokens
from llm_itemtok.model.prompts import Prompts
from llm_itemtok.vocab import init

_GROUPED = {
    "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 128,
}  # fmt: skip
_GROUPED_8 = {**_GROUPED, "head_dim": 8}
_PLAIN = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 128}
_MIXED = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {**_GROUPED_8, "num_experts_per_tok": 2}
_UPPER = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}

# Few buckets, so that a handful of places reaches the wide ones; heads wider than the model, as TIGER has; and weights
# of the size that the others have.
_ENCODED = {
    "num_layers": 2, "d_model": 16, "d_ff": 32, "num_heads": 4, "d_kv": 8, "relative_attention_num_buckets": 4,
    "relative_attention_max_distance": 12, "dropout_rate": 0.0, "decoder_start_token_id": 0, "initializer_factor": 0.1,
}  # fmt: skip

_CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, object]]] = {
    "llama": (LlamaConfig, _GROUPED_8),
    "qwen2": (Qwen2Config, _GROUPED_8),
    "qwen3": (Qwen3Config, _GROUPED_8),
    "gemma3": (Gemma3TextConfig, {**_GROUPED_8, **_MIXED}),
    "gpt2": (
        GPT2Config,
        {
            "n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 128,
            "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        },
    ),
    "qwen2-window": (Qwen2Config, {**_GROUPED_8, **_UPPER}),
    "qwen3-window": (Qwen3Config, {**_GROUPED_8, **_UPPER}),
    "mistral": (MistralConfig, {**_GROUPED_8, "sliding_window": None}),
    "mistral-window": (MistralConfig, {**_GROUPED_8, "sliding_window": 6}),
    "mixtral": (MixtralConfig, {**_EXPERTS, "num_local_experts": 4}),
    "qwen3-moe": (Qwen3MoeConfig, {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 16}),
    "mixtral-window": (MixtralConfig, {**_EXPERTS, "num_local_experts": 4, "sliding_window": 6}),
    "qwen3-moe-window": (
        Qwen3MoeConfig,
        {
            **_EXPERTS, "num_experts": 4, "moe_intermediate_size": 16,
            "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0,
        },
    ),
    "gemma": (GemmaConfig, _GROUPED_8),
    # Caps low enough for tiny logits to feel them.
    "gemma2": (
        Gemma2Config,
        {
            **_GROUPED_8, **_MIXED, "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
        },
    ),
    "phi3": (Phi3Config, _GROUPED),
    "phi3-window": (Phi3Config, {**_GROUPED, "sliding_window": 6}),
    "olmo2": (Olmo2Config, _GROUPED),
    "smollm3": (SmolLM3Config, {**_GROUPED, "no_rope_layers": [1, 0]}),
    "smollm3-window": (
        SmolLM3Config, {**_GROUPED, "no_rope_layers": [1, 0], "use_sliding_window": True, "sliding_window": 6}
    ),
    "granite": (
        GraniteConfig,
        {
            **_GROUPED, "logits_scaling": 1.7, "embedding_multiplier": 3.0, "residual_multiplier": 0.7,
            "attention_multiplier": 0.3,
        },
    ),
    "opt": (OPTConfig, {**_PLAIN, "ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.0}),
    # As the 350M checkpoint: narrower embeddings, norms behind the layers.
    "opt-narrow": (
        OPTConfig,
        {**_PLAIN, "ffn_dim": 32, "word_embed_proj_dim": 8, "do_layer_norm_before": False, "dropout": 0.0},
    ),
    "gpt-neox": (GPTNeoXConfig, {**_PLAIN, "intermediate_size": 32}),
    "bloom": (BloomConfig, {"n_layer": 2, "hidden_size": 16, "n_head": 2}),
    "falcon": (FalconConfig, _PLAIN),
    # As the 40B and later checkpoints, and as the RefinedWeb ones.
    "falcon-grouped": (FalconConfig, {**_PLAIN, "num_kv_heads": 1, "new_decoder_architecture": True}),
    "falcon-alibi": (
        FalconConfig, {**_PLAIN, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
    ),
    "t5": (T5Config, _ENCODED),
    "flan-t5": (T5Config, {**_ENCODED, "feed_forward_proj": "gated-gelu", "num_decoder_layers": 1}),
    "mt5": (MT5Config, {**_ENCODED, "num_layers": 3, "num_decoder_layers": 2}),
}  # fmt: skip

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3", "gpt2", "t5")
"""For tests of what no family changes much."""
KINDS = ("llama", "t5")
"""One family of each kind: decoder-only, encoder–decoder."""
ALL_FAMILIES = tuple(_CONFIGS)
ENCODER_DECODERS = ("t5", "flan-t5", "mt5")
DECODERS = tuple(family for family in _CONFIGS if family not in ENCODER_DECODERS)
"""For proofs that a family's numbers are those of plain `transformers`."""


def slowly(families: Sequence[str]) -> list:
    """Parameters for tests, those beyond the cheap families marked as slow."""
    return [family if family in FAMILIES else pytest.param(family, marks=pytest.mark.slow) for family in families]


MOST_SLOWLY = slowly(ALL_FAMILIES)
WORDS = [
    "red",
    "blue",
    "green",
    "old",
    "new",
    "big",
    "small",
    "lamp",
    "chair",
    "table",
    "title",
    "item",
    "music",
    "film",
    "story",
    "one",
    "two",
    "three",
]


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """Word-level tokenizer with three special tokens."""
    vocab = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def tiny_lm(family: str, *, tied: bool = True, padding: int = 0, seed: int = 0, **changes: object) -> PreTrainedModel:
    """Two layers, 16 wide; `padding` adds unused rows to the table, as Qwen's checkpoints have."""
    shared = {
        "vocab_size": 3 + len(WORDS) + padding,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": tied,
    }
    kind, layout = _CONFIGS[family]
    config = kind(**{**layout, **shared, **changes})
    torch.manual_seed(seed)
    lm = auto_class(config).from_config(config, dtype=torch.float32)
    if family in ENCODER_DECODERS and not tied:
        # Their configurations call every head tied; what a checkpoint holds decides (`model.load.load_lm`).
        lm.lm_head.weight = torch.nn.Parameter(lm.lm_head.weight.clone())
        lm.config.tie_word_embeddings = False
    with torch.no_grad():
        for parameter in lm.parameters():
            # The usual 0.02 gives nearly uniform predictions; wider ones make rankings decided, not accidental.
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return lm.eval()


def tiny_codes(num_items: int = 60, sizes: tuple[int, ...] = (6, 5, 4), seed: int = 0) -> ItemCodes:
    """Distinct random codes."""
    rng = np.random.default_rng(seed)
    flat = rng.choice(int(np.prod(sizes)), size=num_items, replace=False)
    table = np.stack(np.unravel_index(flat, sizes), axis=1).astype(np.int32)
    return ItemCodes(table, sizes, provenance={"kind": "test"})


def text_codes(titles: Sequence[str], split: Split | None = None) -> ItemCodes:
    """Titles as identifiers in words of the tiny tokenizer, a word a digit."""
    digits = dict(zip("0123456789", WORDS[8:], strict=False))
    tokenizer = tiny_tokenizer()

    def cut(texts: Sequence[str]) -> list[list[str]]:
        spelt = [" ".join(map(digits.get, text)) if text.isdigit() else text for text in texts]
        return [tokenizer.convert_ids_to_tokens(ids) for ids in tokenizer(spelt, add_special_tokens=False)["input_ids"]]

    return TextCodes(split or cut, end="</s>", unknown="<unk>").of_titles(titles, max_tokens=5)


def tiny_item_model(
    family: str = "llama", *, codes: ItemCodes | None = None, seed: int = 0, **changes: object
) -> tuple[ItemTokenModel, PreTrainedTokenizerBase]:
    """A tiny model with item tokens, in evaluation mode, and its tokenizer (with `extra_tokens` the model lacks)."""
    normaliser = changes.pop("normaliser", "level")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"extra{number}" for number in range(changes.pop("extra_tokens", 0))])
    lm = tiny_lm(family, seed=seed, **changes)
    model = with_item_tokens(
        lm,
        tokenizer,
        tiny_codes() if codes is None else codes,
        lambda vocab, table: init.normal(vocab, table, seed=seed),
        normaliser=normaliser,
    )
    return model.eval(), tokenizer


def tiny_prompts(model: ItemTokenModel, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """Prompts whose item texts are three words; every tenth item has none."""
    texts = [" ".join(WORDS[(row + step) % len(WORDS)] for step in range(3)) if row % 10 else "" for row in range(60)]
    return Prompts.of(model, tokenizer, texts)


def plain_class(family: str) -> type:
    """The library's class that a user loads a family with."""
    return AutoModelForSeq2SeqLM if family in ENCODER_DECODERS else AutoModelForCausalLM


def context(lm: PreTrainedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What an encoder reads beside rows of ids `[B, S]`, the second row with padding; nothing for a decoder-only model.

    Names are those of `ItemTokenModel.forward`.
    """
    if not lm.config.is_encoder_decoder:
        return {}
    seen = torch.ones_like(ids)
    seen[1:2, -3:] = 0
    return {"context_ids": ids.flip(1), "context_seen": seen}


def hidden(model: ItemTokenModel, ids: torch.Tensor) -> torch.Tensor:
    """States `[B, S, D]` of rows of ids `[B, S]`, behind `context`."""
    read = context(model.lm, ids)
    if read:
        read = {"encoder_hidden_states": model.read(**read), "encoder_attention_mask": read["context_seen"]}
    return model.hidden(ids, use_cache=False, **read).last_hidden_state


def logits(lm: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits `[B, S, V]` of rows of ids `[B, S]`, behind `context`, as plain `transformers` has them."""
    read = context(lm, ids)
    if not read:
        return lm(input_ids=ids, use_cache=False).logits
    return lm(
        input_ids=read["context_ids"], attention_mask=read["context_seen"], decoder_input_ids=ids, use_cache=False
    ).logits


def states(model: ItemTokenModel, prompts: Sequence[np.ndarray], rows: torch.Tensor) -> torch.Tensor:
    """States `[B, L, D]` before each of L tokens `[B, L]` behind B prompts of one length: plain passes over whole rows.

    No cache, no mask, no tree, no padding.
    """
    contexts = torch.from_numpy(np.stack(prompts))
    if model.answer_start is None:
        ids = torch.cat([contexts, rows[:, :-1]], dim=1)
        return model.hidden(ids, use_cache=False).last_hidden_state[:, contexts.shape[1] - 1 :]
    seen = torch.ones_like(contexts)
    ids = torch.cat([torch.full_like(rows[:, :1], model.answer_start), rows[:, :-1]], dim=1)
    return model.hidden(
        ids, use_cache=False, encoder_hidden_states=model.read(contexts, seen), encoder_attention_mask=seen
    ).last_hidden_state
