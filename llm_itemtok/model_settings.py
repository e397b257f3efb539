"""The section `model` of a recipe; `settings.py` holds the others, and says how to read it."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from llm_itemtok.settings import Count, CountOrNone, Dropout
from llm_itemtok.strict import PATH, Only, Unless, Within

ALL_POSITIONS_REASON = (
    "`examples.kind: all-positions` needs a decoder-only model: an encoder looks both ways, so within one row it would "
    "read each target before the model predicts it; use `examples.kind: windows`, which has one row for every target"
)
"""Why an encoder–decoder model is refused with it; said where the kind of the model becomes known."""

LOST_STEPS = (
    "`model.adapter: none` trains all weights, and most steps are too small for weights of 16 bits; write "
    "`model.dtype: float32`, with `trainer.bf16: true` for the arithmetic, or `adapter: lora`"
)
"""Why such weights are refused; the type that a model was saved in is known when it is loaded."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters, through PEFT, on all linear layers; the item rows are trained besides."""

    rank: Count = 16
    """Rank of the adapters."""
    alpha: Count = 32
    """Scale: the adapter's output is multiplied by alpha / rank."""
    dropout: Dropout = 0.05
    """Dropout on the adapter's input."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead."""
    dora: bool = False
    """Train each weight's lengths apart from its directions (DoRA, arXiv:2402.09353); nearer to full, and slower."""


@dataclass(frozen=True, kw_only=True)
class Scratch:
    """A small language model made on the spot, with its own text vocabulary, pre-trained on the item texts."""

    family: Literal["llama", "qwen3", "gpt2", "t5"] = "llama"
    """Architecture; `t5` is an encoder–decoder, the others are decoder-only."""
    layers: Count = 4
    """Transformer blocks; of `t5`, those of the encoder."""
    decoder_layers: Annotated[CountOrNone, Only("family", ("t5",))] = 0
    """Blocks of the decoder; 0 is as many as the encoder has."""
    width: Count = 128
    """Hidden dimensions; a multiple of `heads` unless `head_dim` is given."""
    heads: Count = 4
    """Attention heads a block."""
    head_dim: Annotated[CountOrNone, Only("family", ("t5",))] = 0
    """Dimensions of a head; 0 is `width` / `heads`."""
    inner: Annotated[CountOrNone, Only("family", ("t5",))] = 0
    """Dimensions inside the feed-forward part; 0 is four times `width`."""
    vocab_size: Annotated[int, Within(low=300)] = 4000
    """Text tokens at most; a small catalogue gets fewer."""
    pretrain_epochs: CountOrNone = 3
    """Passes over the item texts before item tokens are added; 0 leaves the model random."""
    dropout: Dropout = 0.1
    """Inside the blocks, while training."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """The language model."""

    name: Annotated[str, PATH] = "scratch"
    """Hub id, folder, or `scratch`; `${NAME}` stands for an environment variable."""
    adapter: Literal["lora", "none"] = "none"
    """Train low-rank adapters and the item rows, or (`none`) the whole model, rows of text tokens included."""
    lora: Annotated[Lora, Only("adapter", ("lora",))] = field(default_factory=Lora)
    """Settings of `adapter: lora`."""
    scratch: Annotated[Scratch, Only("name", ("scratch",))] = field(default_factory=Scratch)
    """Settings of `name: scratch`."""
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Type of the weights; `auto` is the one they were saved in."""
    quantization: Annotated[Literal["none", "nf4"], Only("adapter", ("lora",)), Unless("name", ("scratch",))] = "none"
    """`nf4` holds the base model's linear layers in 4 bits (QLoRA, arXiv:2305.14314); needs bitsandbytes."""
    trust_remote_code: Annotated[bool, Unless("name", ("scratch",))] = False
    """Run code that comes with the model."""
    revision: Annotated[str | None, Unless("name", ("scratch",))] = None
    """Branch, tag or commit of the Hub repository."""
    input_dropout: Dropout = 0.0
    """Dropout on the input embeddings, while training."""
    output_dropout: Dropout = 0.0
    """Dropout on the last hidden states, while training."""
