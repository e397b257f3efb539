"""`ItemTokenModel`: a language model whose vocabulary holds item tokens.

Everything trainable lives in this one module, so that the trainer, its checkpoints and any distributed wrapper see it
all: the base model (with LoRA inside, or fully trainable) and the item rows. `forward` returns the negative
log-likelihood of every target token, which is all an objective needs; the decoder reads hidden states and level
log-probabilities.

Two kinds of models are one class. A decoder-only model reads a row that holds context and targets. An encoder–decoder
model reads the context by its encoder, once and both ways; its decoder's row holds the targets alone, and its states
are what everything below the body works on. Embeddings, rows, normalisers (`model/likelihood.py`) know no difference.

Rows are right-padded and carry no padding mask: under causal attention no real position ever sees what stands to its
right, so padding cannot change a result, and the attention kernels keep their fast causal path. An encoder looks both
ways, so what it reads does carry one.

How items stand in what the model reads (`Reads`): as the tokens of their paths, `tokens`; as these, the last of which
also says which item it is and carries an embedding of the item's own, `named`; or as one vector, `items`, by which a
recursive network is guided (`model/recursive.py`). An id below 0 says which item it is: -1 - row.

Shape letters: B rows, S positions, C context positions of an encoder, D model width, T item tokens, L levels, U items.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_itemtok.errors import ItemTokError
from llm_itemtok.items.base import Quantizer
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.model import state
from llm_itemtok.model.families import answer_start, refuse_unsupported
from llm_itemtok.model.item_embeddings import ItemEmbeddings, Named
from llm_itemtok.model.likelihood import Normaliser, OfCodes, PlainNormaliser, items_nll
from llm_itemtok.model.recursive import Recursion
from llm_itemtok.model.rows import ItemRows, embedding_scale, input_table, output_head
from llm_itemtok.model.soft_inputs import SoftInputs
from llm_itemtok.vocab.item_vocab import ItemVocab
from llm_itemtok.vocab.text_vocab import TextVocab

Reads = Literal["tokens", "named", "items"]

CACHED_PIECE, PIECE = 2048, 16384
"""Words of the vocabulary whose logits are held at once where only the sum over all of them is wanted: on a processor
as many as its caches hold, on an accelerator so many that their number does not matter."""


class ItemTokenModel(nn.Module):
    """A language model and its item rows.

    Attributes:
        lm: the base model; the vocabulary it was loaded with is never resized.
        rows: the item tokens' vectors.
        vocab: the current item vocabulary. An update of the item tokens puts another over the same tokens into its
            place (`take_codes`), and so does a state dict of a model that holds its codes (`hold_codes`).
        normaliser: over what an item token's probability is normalised in training.
        label_smoothing: in `[0, 1)`, share of the target spread evenly over the normaliser's tokens.
        own: embeddings of the items' own, which their last tokens carry; None for most models.
        recursion: the network of a recursive model; None for one that reads and writes item tokens.
        mix: what an objective learns besides, such as the weights of its terms; None for most objectives.
        beside: what else an objective makes of the states, with what it learns for it; None for most objectives.
        quantizer: behind the codes, where updates of the item tokens train it (`state.hold_quantizer`).
        soft: mixes the item tokens that are read, so that gradients reach the quantizer; None for most models.
        tree_masks: what `decoding.tree.takes_tree_masks` found, by attention implementation and dtype.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        rows: ItemRows,
        vocab: ItemVocab,
        *,
        normaliser: Normaliser = "level",
        label_smoothing: float = 0.0,
        input_dropout: float = 0.0,
        output_dropout: float = 0.0,
    ) -> None:
        """Wrap a base model.

        Raises:
            UnsupportedModelError: for a family that the tests do not cover.
            ItemTokError: if items are named in existing words, and the normaliser is not `vocab`.
        """
        super().__init__()
        refuse_unsupported(lm)
        if isinstance(vocab, TextVocab) and normaliser != "vocab":
            raise ItemTokError(f"identifiers in existing words take the normaliser `vocab` only, was: {normaliser}")
        self.lm = lm
        self.rows = rows
        self.vocab = vocab
        self.normaliser: Normaliser = normaliser
        self.label_smoothing = label_smoothing
        self.own: ItemEmbeddings | None = None
        self.recursion: Recursion | None = None
        self.mix: nn.Module | None = None
        self.beside: nn.Module | None = None
        self.quantizer: Quantizer | None = None
        self.soft: SoftInputs | None = None
        self._of_codes = OfCodes()
        self.tree_masks: dict[tuple[str, torch.dtype], bool] = {}
        self.input_dropout = nn.Dropout(input_dropout)
        self.output_dropout = nn.Dropout(output_dropout)
        self.register_state_dict_post_hook(state.keep_trained)
        self.register_load_state_dict_post_hook(state.expect_trained)
        self.register_load_state_dict_post_hook(state.follow_codes)
        self.register_load_state_dict_post_hook(state.forget_quantizer)

    def hold_codes(self) -> None:
        """Let the item codes travel with the weights: in the state dict, so in checkpoints, and back out of it."""
        self.register_buffer(state.CODES, torch.from_numpy(self.vocab.codes.table.copy()).to(self.device))

    def take_codes(self, codes: ItemCodes) -> None:
        """Let the item tokens spell other codes, of the same level sizes, from now on."""
        self.vocab = self.vocab.with_codes(codes)
        if state.CODES in self._buffers:
            self.get_buffer(state.CODES).copy_(torch.from_numpy(codes.table.copy()))

    @property
    def device(self) -> torch.device:
        """Where the item rows are."""
        return self.rows.input_rows.device

    @property
    def config(self) -> Any:
        """The base model's configuration."""
        return self.lm.config

    @property
    def reads(self) -> Reads:
        """How items stand in what the model reads; see the module."""
        if self.recursion is not None:
            return "items"
        return "tokens" if self.own is None else "named"

    @property
    def answer_start(self) -> int | None:
        """Token id that the decoder of an encoder–decoder begins with; None for a decoder-only model."""
        return answer_start(self.lm)

    def activation_checkpointing_enable(self, **settings: Any) -> None:
        """Trade time for memory in the body; called by `transformers.Trainer`, until 5.22 by the second name."""
        getattr(self.lm, "activation_checkpointing_enable", self.lm.gradient_checkpointing_enable)(**settings)

    gradient_checkpointing_enable = activation_checkpointing_enable

    def codebooks(self) -> list[Tensor]:
        """Rows of the item tokens that states are multiplied with, level by level `[K, D]`."""
        return list(self.rows.head().split(list(self.vocab.codes.sizes)))

    def codes_of(self, items: Tensor) -> Tensor:
        """Codes int64 `[n, L]` of items, int64 `[n]`, on their device."""
        return self._of_codes.table(self.vocab.codes, items.device)[items]

    def named(self, *ids: Tensor | None) -> Named | None:
        """What stands for the items that ids below 0 name; None for a model to which no id names one."""
        if self.reads == "tokens":
            return None
        rows = torch.cat([-1 - part[part < 0] for part in ids if part is not None]).unique()
        codes = self.codes_of(rows)
        logits: list[Tensor] = []
        if self.recursion is not None:
            vectors, logits = self.recursion.item_side(rows, codes, self.codebooks())
        else:
            assert self.own is not None
            vectors = self.rows.input_rows[codes[:, -1] + self.vocab.level_starts[-1]] + self.own(rows)
        return Named(rows, vectors * embedding_scale(input_table(self.lm)).to(vectors.device), logits)

    def _embed(self, ids: Tensor, named: Named | None) -> Tensor:
        """Input embeddings `[..., D]` of token ids and of named items, which may have been looked up before."""
        if self.reads == "tokens":
            if self.soft is not None:
                return self.soft.embed(ids, self.rows, input_table(self.lm), self.vocab, self.codes_of)
            return self.rows.embed(ids, input_table(self.lm))
        found = self.named(ids) if named is None else named
        assert found is not None
        embeds = self.rows.embed(ids.clamp(min=0), input_table(self.lm))
        places = torch.searchsorted(found.rows, -1 - ids[ids < 0])
        return embeds.masked_scatter((ids < 0).unsqueeze(-1), found.vectors[places].to(embeds.dtype))

    def read(self, context_ids: Tensor, context_seen: Tensor, named: Named | None = None) -> Tensor:
        """Run the encoder of an encoder–decoder.

        Args:
            context_ids: int64 `[B, C]`.
            context_seen: int64 `[B, C]`, 0 where there is padding, else 1.
            named: what `named` found for these ids, where it was asked before.

        Returns:
            States `[B, C, D]`, for the body as `encoder_hidden_states`, beside the mask.
        """
        embeds = self._embed(context_ids, named)
        states: Tensor = self.lm.get_encoder()(
            inputs_embeds=self.input_dropout(embeds), attention_mask=context_seen
        ).last_hidden_state
        return states

    def hidden(self, input_ids: Tensor, named: Named | None = None, **body_arguments: Any) -> Any:
        """Run the body: of an encoder–decoder, its decoder.

        Args:
            input_ids: int64 `[B, S]`.
            named: what `named` found for these ids, where it was asked before.
            body_arguments: passed to the body, such as `attention_mask`, `position_ids`, `past_key_values`; to a
                decoder that follows an encoder also `encoder_hidden_states` and `encoder_attention_mask`.

        Returns:
            The body's output; its `last_hidden_state` is `[B, S, D]`, after the final norm, as the head takes it.
        """
        embeds = self._embed(input_ids, named)
        if self.answer_start is None:
            return self.lm.base_model(inputs_embeds=self.input_dropout(embeds), **body_arguments)
        assert "encoder_hidden_states" in body_arguments  # without them a decoder passes its cross-attention over
        output = self.lm.get_decoder()(inputs_embeds=self.input_dropout(embeds), **body_arguments)
        if getattr(self.config, "scale_decoder_outputs", False):
            # T5 with a tied head divides by the scale that its table has and a head of its own would not.
            output.last_hidden_state = output.last_hidden_state * self.config.d_model**-0.5
        return output

    def item_logits(self, hidden: Tensor, level: int | None = None) -> Tensor:
        """Multiply hidden states `[..., D]` with the rows of one level, or of all levels when None: `[..., K]`."""
        # Beside training always in float32: in bfloat16 a tenth of the neighbours in a list would be equal.
        hidden = hidden if torch.is_grad_enabled() else hidden.float()
        head = self.rows.head()
        if level is not None:
            start = self.vocab.level_starts[level]
            head = head[start : start + self.vocab.codes.sizes[level]]
        return self._finished(F.linear(hidden, head.to(hidden.dtype)))

    def vocab_logits(self, hidden: Tensor) -> Tensor:
        """Logits over the extended vocabulary `[..., max(V, first_id + T)]`, in the order of token ids.

        Item tokens that fell into the padding of the base table replace its columns there. Ids between the table's end
        and the first item token have logit 0: some tokenizers have more tokens than their model has rows (Gemma 3).
        """
        base = self._finished(output_head(self.lm)(hidden))
        first, after, width = self.rows.first_id, self.rows.first_id + len(self.rows), base.shape[-1]
        # Only what must be cut is cut: the gradient of each cut is another tensor as wide as the vocabulary.
        parts = [base if first >= width else base[..., :first], self.item_logits(hidden)]
        if first > width:
            parts.insert(1, base.new_zeros((*base.shape[:-1], first - width)))
        if after < width:
            parts.append(base[..., after:])
        return torch.cat(parts, dim=-1)

    def level_log_probs(self, hidden: Tensor, level: int, normaliser: PlainNormaliser) -> Tensor:
        """Log-probabilities of a level's codewords.

        Args:
            hidden: `[..., D]`, states at positions whose next token is an item token of `level`.
            level: in `[0, num_levels)`.
            normaliser: over what they are normalised.

        Returns:
            float32 `[..., sizes[level]]`.
        """
        if isinstance(self.vocab, TextVocab):
            return self._word_log_probs(self.vocab, hidden, level, normaliser)
        if normaliser == "level":
            return self.item_logits(hidden, level).float().log_softmax(-1)
        items = self.item_logits(hidden).float()
        total = items.logsumexp(-1)
        if normaliser == "vocab":
            total = torch.logaddexp(total, self._text_logsumexp(hidden))
        start = self.vocab.level_starts[level]
        return items[..., start : start + self.vocab.codes.sizes[level]] - total.unsqueeze(-1)

    def _word_log_probs(self, vocab: TextVocab, hidden: Tensor, level: int, normaliser: PlainNormaliser) -> Tensor:
        """As `level_log_probs`, where codewords are existing words; 0 for the codeword of items that have ended."""
        head = output_head(self.lm).weight[vocab.level_ids(level, hidden.device)]
        logits = self._finished(F.linear(hidden.float(), head.float()))
        ended = vocab.ended[level]
        if normaliser == "vocab":
            log_probs = logits - self._text_logsumexp(hidden).unsqueeze(-1)
        elif normaliser == "level":
            if ended is not None:
                logits[..., ended] = -torch.inf
            log_probs = logits.log_softmax(-1)
        else:
            raise ItemTokError(f"items named in words are normalised over `vocab` or `children`, was: {normaliser}")
        if ended is not None:
            log_probs[..., ended] = 0
        return log_probs

    def _text_logsumexp(self, hidden: Tensor) -> Tensor:
        """Logarithm of the summed exponentials `[...]` of all logits but the item tokens'.

        Goes through the vocabulary in pieces, so that its logits never stand in memory at once: with a large language
        model's vocabulary they would be most of what decoding holds.
        """
        table = output_head(self.lm).weight
        first, after = self.rows.first_id, self.rows.first_id + len(self.rows)
        spans = ((0, min(first, len(table))), (after, len(table)))
        size = CACHED_PIECE if table.device.type == "cpu" else PIECE
        pieces = [table[at : min(at + size, end)] for start, end in spans for at in range(start, end, size)]
        sums = [self._finished(F.linear(hidden, piece)).float().logsumexp(-1) for piece in pieces]
        if first > len(table):  # ids of the tokenizer alone, whose logits are 0 (see `vocab_logits`)
            sums.append(torch.full_like(sums[0], math.log(first - len(table))))
        return torch.stack(sums).logsumexp(0)

    def _finished(self, logits: Tensor) -> Tensor:
        """What the model makes of products of states and head: Granite divides them, Gemma-2 caps them."""
        scale = getattr(self.config, "logits_scaling", None)
        if scale is not None:
            logits = logits / scale
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        levels: Tensor,
        context_ids: Tensor | None = None,
        context_seen: Tensor | None = None,
        blank_ids: Tensor | None = None,
        blank_places: Tensor | None = None,
        blank_context: Tensor | None = None,
        beside: Mapping[str, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Negative log-likelihood of every target token.

        Args:
            input_ids: int64 `[B, S]`, right-padded.
            labels: int64 `[B, S]`, the token id that follows each position; read only where `levels >= 0`. Of a
                recursive model `[B, S * L]`: each position has room for all tokens of an item.
            levels: int64, beside `labels`: the level of the label, `num_levels` for a text token, -1 where there is no
                target. With the normaliser `children`, an item's targets are all of its tokens, in a row.
            context_ids: int64 `[B, C]`, what an encoder reads; None for a decoder-only model.
            context_seen: int64 `[B, C]`, 0 where there is padding, else 1.
            blank_ids: int64 `[U, P]`, right-padded rows of items that have no history before them; None where the
                effect of histories is not asked for.
            blank_places: int64 `[B, S]`: which position of `blank_ids`, counted row by row, predicts the same token
                without the history, -1 where none does.
            blank_context: int64 `[1, C']`, what an encoder reads where there is no history.
            beside: what the module `beside` takes, besides states `[B, S, D]`, those of the encoder (or None) and
                `context_seen` (or None).

        Returns:
            float32, beside `labels`, in nats; 0 where there is no target. With `blank_ids` `[2, B, S]`, the second by
            the effect of the history: the softmax of the logits with it less those without. Where parts of the model
            have more to tell, that as well, by name: here, so that a distributed wrapper knows that their parameters
            are used. `mix` is what that module computes; `alignment`, float32 `[B, S]` (`[B, C]` of an encoder), how
            unlikely the item side of a recursive network finds the code of the item read there, mean over the levels.
        """
        named = self.named(input_ids, context_ids)
        hidden, context = self.states(input_ids, context_ids, context_seen, named)
        nll = self._nll(hidden, labels, levels)
        if blank_ids is not None and blank_places is not None:
            if blank_context is not None:
                blank_context = blank_context.expand(len(blank_ids), -1)
            seen = None if blank_context is None else torch.ones_like(blank_context)
            blank = self.states(blank_ids, blank_context, seen)[0].flatten(0, 1)[blank_places.clamp(min=0)]
            levels = levels.masked_fill(blank_places < 0, -1)
            nll = torch.stack([nll, self._nll(hidden, labels, levels, blank)])
        told: dict[str, Tensor] = {}
        if self.mix is not None:
            told["mix"] = self.mix()
        if self.recursion is not None and self.recursion.aligns and named is not None:
            told["alignment"] = self._alignment(named, input_ids if context_ids is None else context_ids)
        if self.beside is not None and beside is not None:
            told |= self.beside(hidden, context, context_seen, **beside)
        return (nll, told) if told else nll

    def states(
        self, input_ids: Tensor, context_ids: Tensor | None, context_seen: Tensor | None, named: Named | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Final states `[B, S, D]`, and before them those of an encoder `[B, C, D]`, if there is one; see `forward`."""
        context: dict[str, Tensor] = {}
        if context_ids is not None and context_seen is not None:
            context = {
                "encoder_hidden_states": self.read(context_ids, context_seen, named),
                "encoder_attention_mask": context_seen,
            }
        states: Tensor = self.hidden(input_ids, named, use_cache=False, **context).last_hidden_state
        return self.output_dropout(states), context.get("encoder_hidden_states")

    def _alignment(self, named: Named, ids: Tensor) -> Tensor:
        """NLL of the codes of named items `[B, S]`; 0 elsewhere, and for an item without embedding to go by."""
        assert self.recursion is not None
        mean = items_nll(named.logits, self.codes_of(named.rows)).mean(1) * self.recursion.items.has(named.rows)
        places = torch.searchsorted(named.rows, -1 - ids[ids < 0])
        return mean.new_zeros(ids.shape).masked_scatter(ids < 0, mean[places])

    def _nll(self, hidden: Tensor, labels: Tensor, levels: Tensor, blank: Tensor | None = None) -> Tensor:
        """NLL `[B, S]` by states `[B, S, D]`; with others, `blank`, by the difference of their logits."""
        if self.recursion is not None:
            return self._recursive_nll(self.recursion, hidden, labels, levels)
        nll = hidden.new_zeros(labels.shape, dtype=torch.float32)
        groups = range(self.vocab.num_levels + 1)
        if self.normaliser == "children":
            self._fill_items(nll, hidden, labels, levels, blank)
            groups = groups[-1:]
        if self.normaliser == "vocab":  # the same words for all: the table, most of the work, is then read once
            levels, groups = levels.masked_fill(levels >= 0, groups[-1]), groups[-1:]
        for level in groups:
            at = (levels == level).nonzero(as_tuple=True)  # places, for which an accelerator is waited for once
            if len(at[0]):
                nll[at] = self._level_nll(hidden[at], labels[at], level, None if blank is None else blank[at])
        return nll

    def _recursive_nll(self, recursion: Recursion, hidden: Tensor, labels: Tensor, levels: Tensor) -> Tensor:
        """NLL `[B, S * L]` of items' tokens by the recursive network, and of text tokens as everywhere."""
        shape = (*hidden.shape[:2], self.vocab.num_levels)
        nll = hidden.new_zeros(shape, dtype=torch.float32)
        labels, levels = labels.view(shape), levels.view(shape)
        at = (levels[..., 0] == 0).nonzero(as_tuple=True)
        codes = self._codewords(labels[at])
        nll[at] = self._items_nll(recursion.user_side(hidden[at].float(), codes, self.codebooks()), codes)
        at = (levels[..., 0] == self.vocab.num_levels).nonzero(as_tuple=True)
        if len(at[0]):
            nll[..., 0][at] = self._level_nll(hidden[at], labels[..., 0][at], self.vocab.num_levels)
        return nll.flatten(1)

    def _fill_items(self, nll: Tensor, hidden: Tensor, labels: Tensor, levels: Tensor, blank: Tensor | None) -> None:
        """Write the NLL of items' tokens, which stand in a row: all levels of an item together."""
        rows, firsts = (levels == 0).nonzero(as_tuple=True)
        places = rows.unsqueeze(1), firsts.unsqueeze(1) + torch.arange(self.vocab.num_levels, device=firsts.device)
        logits = [self.item_logits(states, level) for level, states in enumerate(hidden[places].unbind(1))]
        if blank is not None:
            without = enumerate(blank[places].unbind(1))
            logits = [logits[level] - self.item_logits(states, level) for level, states in without]
        nll[places] = self._items_nll(logits, self._codewords(labels[places]))

    def _codewords(self, labels: Tensor) -> Tensor:
        """Codewords of items' token ids `[n, L]`."""
        return labels - torch.tensor(self.vocab.level_starts, device=labels.device) - self.vocab.first_id

    def _items_nll(self, logits: list[Tensor], codes: Tensor) -> Tensor:
        trie = self._of_codes.trie(self.vocab.codes, codes.device) if self.normaliser == "children" else None
        return items_nll(logits, codes, trie=trie, smoothing=self.label_smoothing)

    def _level_nll(self, hidden: Tensor, labels: Tensor, level: int, blank: Tensor | None = None) -> Tensor:
        """NLL `[n]` of labels that all belong to one level (or to the text)."""
        logits, first = self._level_logits(hidden, level)
        if blank is not None:
            logits = logits - self._level_logits(blank, level)[0]
        return F.cross_entropy(logits.float(), labels - first, reduction="none", label_smoothing=self.label_smoothing)

    def _level_logits(self, hidden: Tensor, level: int) -> tuple[Tensor, int]:
        """Logits `[n, K]` of what a token of a level (or of the text) is normalised over, and the id of the first."""
        if level == self.vocab.num_levels or self.normaliser == "vocab":
            return self.vocab_logits(hidden), 0
        if self.normaliser == "items":
            return self.item_logits(hidden), self.rows.first_id
        return self.item_logits(hidden, level), self.rows.first_id + self.vocab.level_starts[level]
