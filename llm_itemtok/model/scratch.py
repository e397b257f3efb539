"""`model.name: scratch`: a small language model with a SentencePiece tokenizer, made from the catalogue's text.

For quickstarts, tests and experiments of CPU size, where no pre-trained model is at hand. The tokenizer is a
SentencePiece unigram model over the item texts; the model is a small Llama, Qwen3, GPT-2 or T5 pre-trained on the same
texts for a few epochs, so that title words mean something before item tokens do. A catalogue without text gets a
tokenizer of three special tokens and no pre-training.

T5 is pre-trained by prefix language modelling (Raffel et al. 2020, arXiv:1910.10683, section 3.3.1): its encoder reads
a text up to a random place, its decoder goes on from there.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any

import sentencepiece
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import (
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    T5Config,
)

from llm_itemtok.errors import ItemTokError
from llm_itemtok.model.load import auto_class
from llm_itemtok.model.prompts import encode_text

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
SPACE = "▁"
"""How a space before a word is written in pieces."""


def train_tokenizer(texts: Sequence[str], *, vocab_size: int, letters: str = "") -> PreTrainedTokenizerBase:
    """Train a SentencePiece unigram tokenizer.

    Args:
        texts: item texts; empty ones are passed over.
        vocab_size: pieces at most; fewer when the texts do not hold that many.
        letters: that get a piece of their own, on top of these, where the texts give them none.

    Returns:
        A fast tokenizer with `<unk>`, `<s>` (BOS) and `</s>` (EOS, also used for padding) as ids 0, 1 and 2. Letters
        that make up less than 0.05% of the texts together are `<unk>`.

    Raises:
        ItemTokError: if the texts have more letters than `vocab_size` pieces.
    """
    pieces: list[tuple[str, float]] = [(UNK, 0.0), (BOS, 0.0), (EOS, 0.0)]
    texts = [text for text in texts if text.strip()]
    if texts:
        trained = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=trained,
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                model_type="unigram",
                character_coverage=0.9995,
                max_sentence_length=8192,  # bytes; longer texts would be passed over in silence
                num_threads=1,  # more would make the pieces depend on the machine
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ItemTokError(
                f"`model.scratch.vocab_size` must have room for every letter of the item texts, was: {vocab_size}; "
                f"set a larger one\n  {error}"
            ) from error
        processor = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
        pieces += [(processor.id_to_piece(i), processor.get_score(i)) for i in range(3, processor.get_piece_size())]
    if letters:
        known, last = {piece for piece, _ in pieces}, min(score for _, score in pieces)
        pieces += [(letter, last - 1.0) for letter in (SPACE, *letters) if letter not in known]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token=UNK, bos_token=BOS, eos_token=EOS, pad_token=EOS, model_max_length=2048
    )


def build_model(
    tokenizer: PreTrainedTokenizerBase,
    *,
    family: str,
    layers: int,
    width: int,
    heads: int,
    dropout: float,
    seed: int,
    max_positions: int = 2048,
    decoder_layers: int = 0,
    head_dim: int = 0,
    inner: int = 0,
) -> PreTrainedModel:
    """Build a randomly initialised model for a tokenizer.

    Args:
        tokenizer: gives the size of the text vocabulary and the special ids.
        family: `llama`, `qwen3`, `gpt2` or `t5`.
        layers: transformer blocks; of T5, those of the encoder.
        width: model width, a multiple of `heads`.
        heads: attention heads.
        dropout: attention dropout; for GPT-2 and T5 also on residuals and embeddings.
        seed: of the initial weights.
        max_positions: longest sequence; T5 knows distances only, and has no longest.
        decoder_layers: blocks of T5's decoder; 0 for as many as the encoder has.
        head_dim: of T5's heads; 0 for `width / heads`.
        inner: width of T5's feed-forward part; 0 for four times `width`.

    Returns:
        A float32 language model with a tied head.
    """
    config: PreTrainedConfig
    if family == "gpt2":
        config = GPT2Config(
            n_layer=layers,
            n_embd=width,
            n_head=heads,
            n_positions=max_positions,
            attn_pdrop=dropout,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            **_tokens(tokenizer),
        )
    elif family == "t5":
        config = T5Config(
            num_layers=layers,
            num_decoder_layers=decoder_layers or layers,
            d_model=width,
            num_heads=heads,
            d_kv=head_dim or width // heads,
            d_ff=inner or 4 * width,
            dropout_rate=dropout,
            **_tokens(tokenizer),
        )
        config.decoder_start_token_id = tokenizer.bos_token_id
    else:
        kinds = {"llama": LlamaConfig, "qwen3": Qwen3Config}
        config = kinds[family](
            num_hidden_layers=layers,
            hidden_size=width,
            intermediate_size=-(-8 * width // 96) * 32,  # Llama's ratio of 8/3, in steps of 32
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=width // heads,
            attention_dropout=dropout,
            max_position_embeddings=max_positions,
            **_tokens(tokenizer),
        )
    torch.manual_seed(seed)
    model: PreTrainedModel = auto_class(config).from_config(config, dtype=torch.float32)
    return model


def _tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a configuration says of the vocabulary and the head."""
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
    }


def pretrain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    epochs: int,
    seed: int,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    progress: Callable[[int, int, float], None] | None = None,
) -> None:
    """Teach the model the catalogue's language, in place: next-token prediction on each item's text.

    A plain loop: it runs for seconds to a minute, has nothing to resume, and is cached as a whole.

    Args:
        model: as `build_model` made it.
        tokenizer: as `train_tokenizer` made it.
        texts: item texts; empty ones are passed over.
        epochs: passes over the texts.
        seed: of the order.
        batch_size: texts a step.
        learning_rate: of AdamW, decayed linearly to zero.
        progress: called with (step, steps, loss in nats per token).
    """
    rows = [
        torch.tensor([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id])
        for ids in encode_text(tokenizer, [text for text in texts if text.strip()])
    ]
    steps = epochs * -(-len(rows) // batch_size)
    if steps == 0:
        return
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model.train()
    step = 0
    for _ in range(epochs):
        for chosen in torch.randperm(len(rows), generator=generator).split(batch_size):
            loss = _text_loss(model, [rows[int(row)] for row in chosen], generator)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step += 1
            if progress is not None:
                progress(step, steps, loss.item())
    if not bool(torch.isfinite(loss)):
        raise ItemTokError(f"pre-training must end with a finite loss, was: {loss.item()}; lower `model.scratch` sizes")
    model.eval()


def _text_loss(model: PreTrainedModel, rows: list[Tensor], generator: torch.Generator) -> Tensor:
    """Mean loss of texts' tokens, each text with its start and its end token."""
    contexts, labels = rows, rows
    if model.config.is_encoder_decoder:
        # A text of n tokens is cut before one of them, or before its end token: there is always something to write.
        cuts = [int(torch.randint(1, len(row), (), generator=generator)) for row in rows]
        contexts = [torch.cat([row[1:cut], row[-1:]]) for row, cut in zip(rows, cuts, strict=True)]
        labels = [row[cut:] for row, cut in zip(rows, cuts, strict=True)]
    arguments = {
        "input_ids": torch.nn.utils.rnn.pad_sequence(contexts, batch_first=True, padding_value=0),
        "labels": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100),
    }
    if model.config.is_encoder_decoder:
        lengths = torch.tensor([len(context) for context in contexts])
        arguments["attention_mask"] = (torch.arange(int(lengths.max())) < lengths.unsqueeze(1)).long()
    loss: Tensor = model(**arguments).loss
    return loss
