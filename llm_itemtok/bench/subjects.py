"""What is measured: random models of true shapes, random catalogues and histories of the lengths that logs have."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    T5Config,
)

from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.model.export import merged
from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.model.load import auto_class
from llm_itemtok.model.rows import ItemRows
from llm_itemtok.vocab.item_vocab import ItemVocab

LEVELS = (256, 256, 256, 256)


@dataclass(frozen=True)
class Shape:
    """Size of a Llama-type or T5-type model.

    Attributes:
        layers: of the body; of a T5, of its encoder and of its decoder each.
        width: of the hidden states.
        heads: of attention, for queries.
        inner: width of the feed-forward part.
        vocabulary: tokens before the item tokens.
        key_value_heads: as many as `heads` when 0.
        head_dim: `width / heads` when 0.
        family: `llama`, `qwen3` or `t5`.
    """

    layers: int
    width: int
    heads: int
    inner: int
    vocabulary: int
    key_value_heads: int = 0
    head_dim: int = 0
    family: str = "llama"

    @property
    def attention_width(self) -> int:
        """Heads times their width."""
        return self.heads * (self.head_dim or self.width // self.heads)

    @property
    def key_value_width(self) -> int:
        """Numbers that a layer's keys hold for each position, and its values."""
        return self.attention_width // self.heads * (self.key_value_heads or self.heads)

    @property
    def body_parameters(self) -> int:
        """Weights of the linear layers, without embeddings."""
        attention = 2 * self.width * (self.attention_width + self.key_value_width)
        return self.layers * (attention + 3 * self.width * self.inner)


SMALL = Shape(layers=4, width=256, heads=4, inner=688, vocabulary=8192)
"""The model of most benchmarks; with 1,024 item tokens the vocabulary has 9,216."""

ENCODER_DECODER = Shape(layers=4, width=256, heads=4, inner=1024, vocabulary=8192, family="t5")
"""A T5 as wide, of 4 and 4 layers."""

LLM_VOCABULARY = 151_936
"""Of the Qwen3 family."""

LARGE_VOCABULARY = replace(SMALL, vocabulary=LLM_VOCABULARY)
"""The same body under the vocabulary of a large model."""

START = 1
"""Token id that every prompt begins with."""


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that knows its special tokens and nothing else; item tokens need no more."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": START, "</s>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def codes(num_items: int, sizes: tuple[int, ...] = LEVELS, seed: int = 0) -> ItemCodes:
    """Distinct random codes."""
    space = int(np.prod([np.int64(size) for size in sizes]))
    rng = np.random.default_rng(seed)
    flat = np.unique(rng.integers(0, space, size=min(2 * num_items + 100, 50 * space)))
    flat = rng.permutation(flat)[:num_items]
    return ItemCodes(np.stack(np.unravel_index(flat, sizes), axis=1), sizes)


def item_model(
    shape: Shape, item_codes: ItemCodes, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> ItemTokenModel:
    """A random model with item tokens after its text vocabulary, in evaluation mode, normaliser `level`."""
    torch.manual_seed(0)
    lm = auto_class(config := _config(shape)).from_config(config, dtype=dtype)
    vocab = ItemVocab(item_codes, first_id=shape.vocabulary)
    rows = ItemRows(torch.randn(vocab.num_tokens, shape.width) * 0.02, first_id=vocab.first_id, tied=True)
    return ItemTokenModel(lm, rows, vocab).to(device).eval()


def _config(shape: Shape) -> PreTrainedConfig:
    """A configuration of the library with these sizes."""
    if shape.family == "t5":
        config = T5Config(
            num_layers=shape.layers,
            d_model=shape.width,
            num_heads=shape.heads,
            d_kv=shape.head_dim or shape.width // shape.heads,
            d_ff=shape.inner,
            vocab_size=shape.vocabulary,
            eos_token_id=2,
            pad_token_id=0,
        )
        config.decoder_start_token_id = START  # the library reads it, but declares no field
        return config
    kind = Qwen3Config if shape.family == "qwen3" else LlamaConfig
    return kind(
        num_hidden_layers=shape.layers,
        hidden_size=shape.width,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads or shape.heads,
        head_dim=shape.head_dim or shape.width // shape.heads,
        intermediate_size=shape.inner,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        bos_token_id=START,
        eos_token_id=2,
        pad_token_id=0,
    )


def plain_model(model: ItemTokenModel) -> PreTrainedModel:
    """The same weights as a plain language model with a longer table, as plain `transformers` has them."""
    return merged(model, None)


def prompts(vocab: ItemVocab, users: int, tokens: int, seed: int = 0) -> list[np.ndarray]:
    """Histories of equal length: random item paths, cut to `tokens` ids each."""
    rng = np.random.default_rng(seed)
    items = rng.integers(0, vocab.codes.num_items, size=(users, -(-tokens // vocab.num_levels)))
    return [vocab.paths[torch.from_numpy(row)].flatten()[:tokens].numpy() for row in items]


def floor_gflop(shape: Shape, *, users: int, tokens: int, beam: int, levels: tuple[int, ...]) -> float:
    """Least arithmetic of an exact beam search through whole layers, in GFLOP.

    Every history is read once, causally; each beam once at every level but the last, which needs no pass; logits over
    the codewords of the level alone.

    Args:
        shape: of the model.
        users: histories.
        tokens: of each history.
        beam: kept at every level.
        levels: codewords of each level.
    """
    attention = 2 * shape.layers * shape.attention_width
    history = 2 * shape.body_parameters * tokens + attention * tokens * (tokens + 1)
    beams = (len(levels) - 1) * beam * 2 * shape.body_parameters
    beams += 2 * attention * beam * sum(tokens + level for level in range(1, len(levels)))
    logits = 2 * shape.width * (levels[0] + beam * sum(levels[1:]))
    return users * (history + beams + logits) / 1e9


def sequences(users: int, num_items: int, *, longest: int = 20, seed: int = 0) -> list[np.ndarray]:
    """Users' catalogue rows, as long as in Amazon's Beauty log: 5 or more, few long ones, mean about 9."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(4 + rng.geometric(1 / 5.1, size=users), longest)
    return [rng.integers(0, num_items, size=length) for length in lengths]
