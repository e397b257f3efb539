"""Real, tiny models built from configuration: what the tests run on instead of mocks or downloads."""

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.model.load import with_item_tokens
from llm_itemtok.model.prompts import Prompts
from llm_itemtok.vocab import init

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3", "gpt2")
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
    if family == "gpt2":
        config = GPT2Config(
            n_layer=2, n_embd=16, n_head=2, n_positions=128, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
            **shared, **changes,
        )  # fmt: skip
    else:
        kinds = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "gemma3": Gemma3TextConfig}
        layout = {
            "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 128,
        }  # fmt: skip
        if family == "gemma3":
            layout |= {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
        config = kinds[family](**{**layout, **shared, **changes})
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
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
    return Prompts(tokenizer, model.vocab, texts)
