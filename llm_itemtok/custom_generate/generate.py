"""Beam search that can only end in items: `model.generate(..., custom_generate=REPO, trust_remote_code=True)`.

This file stands in the repository of a recommender with item tokens and is all that is needed to decode it: it reads
`item_codes.safetensors` (the code of every item) and `generation.json` (how to decode), and depends on torch,
transformers and safetensors alone.

Decisions:
- The beams are those of `transformers`; only a processor of log-probabilities is added. It knows the codes as sorted
  arrays, one a level: the number of a prefix is its place in them, and a child of it is found by looking up
  `number of the prefix * codewords of the level + codeword`. No state is kept between steps but the prompt's length.
- Log-probabilities are normalised over what `generation.json` says: `level` (the tokens that can stand at this place of
  a code), `items` (all item tokens), `vocab` (the whole vocabulary) or `children` (the codewords that may follow).
- How the model's makers like it to write changes nothing: of its own configuration only tokens with a role are taken,
  and of the caller's arguments those that cannot change which items come out. Others are refused by name.
- Codes and model must be of one run: their hashes are compared at each call, and where the item tokens begin.
- More beams than items are never asked for: `transformers` would fill the places up with paths of no item.
"""

import copy
import functools
import json
import string
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.utils import cached_file

SETTINGS, CODES = "generation.json", "item_codes.safetensors"
TOKENIZER = "tokenizer_config.json"

_TAKEN = ("input_ids", "attention_mask", "return_dict_in_generate", "output_scores", "use_cache", "synced_gpus")
"""What may be given besides `generate`'s own arguments: nothing that could change which items come out."""
_PASSED_OVER = ("token_type_ids", "custom_generate", "trust_remote_code")
"""What some tokenizers make and no recommender reads, and what has been heard once this code runs."""
_MODELS_OWN = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
"""All that is taken from the model's own `generation_config.json`: the rest is how its makers like it to write."""


def generate(
    model: Any,
    inputs: Tensor | None = None,
    *,
    num_beams: int | None = None,
    num_return_sequences: int = 1,
    bundle: str | None = None,
    revision: str | None = None,
    **given: Any,
) -> Any:
    """Continue histories by items.

    Args:
        model: the recommender; with an adapter, the base model that PEFT put it into.
        inputs: token ids `[B, S]` of the histories, or `input_ids` among the others. A decoder-only model's rows are
            padded on the left.
        num_beams: paths kept at every level; the number in `generation.json` when None.
        num_return_sequences: items of each history, best first, R; the whole catalogue where that has fewer.
        bundle: folder or repository of `item_codes.safetensors`; the one the model came from when None.
        revision: of that repository; the commit the model came from when None.
        **given: as for `generate`: `attention_mask`, `return_dict_in_generate`, `output_scores`, `use_cache`.

    Returns:
        As from `generate`: ids `[B * R, S + L]` (`[B * R, 1 + L]` of an encoder–decoder), whose last L are the tokens
        of an item; with `return_dict_in_generate=True` also `sequences_scores`, log-probabilities of the items.

    Raises:
        ValueError: if there are no item codes or other ones than the model's, the tokenizer is another one than the
            model's, another way of decoding is asked for, or rows of a decoder-only model are padded on the right.
    """
    own = {name: given.pop(name) for name in _TAKEN if given.get(name) is not None}
    if wrong := sorted(
        name for name, value in given.items() if value is not None and name not in (*_TAKEN, *_PASSED_OVER)
    ):
        taken = ", ".join(("inputs", "num_beams", "num_return_sequences", "bundle", "revision", *_TAKEN))
        raise ValueError(
            f"items are found by plain beam search over paths of one length, which takes {taken}; "
            f"leave these out: {wrong}"
        )
    _check(model, own.get("attention_mask"), num_beams, num_return_sequences)
    if bundle is None:
        bundle, revision = model.config._name_or_path, revision or getattr(model.config, "_commit_hash", None)
    settings, items = _read(str(bundle), revision, getattr(model.config, "item_codes_sha256", None))
    _refuse_other_place(getattr(model.config, "item_tokens_first_id", None), items, str(bundle))
    returned = min(num_return_sequences, len(items))
    plain = GenerationConfig(
        do_sample=False,
        num_beams=min(max(num_beams or settings["beam"], returned), len(items)),
        num_return_sequences=returned,
        max_new_tokens=len(items.sizes),
        length_penalty=0.0,  # every path is equally long, and its score is its log-probability
        **_own_tokens(model, items),
    )
    # The library fills whatever a configuration leaves open from the model's own. A shallow copy shares every weight.
    view = copy.copy(model)
    view.generation_config = plain
    # By the class: where the model was loaded with `trust_remote_code=True`, `model.generate` is this function.
    return GenerationMixin.generate(
        view,
        inputs,
        generation_config=plain,
        logits_processor=LogitsProcessorList([ItemsOnly(items, settings["normaliser"])]),
        **own,
    )


def _check(model: Any, mask: Tensor | None, num_beams: int | None, num_return_sequences: int) -> None:
    """Raise `ValueError` for numbers below 1, and for rows that a decoder-only model would go on after padding."""
    for name, number in (("num_beams", num_beams), ("num_return_sequences", num_return_sequences)):
        if number is not None and number < 1:
            raise ValueError(f"`{name}` must be at least 1, was: {number}")
    if mask is not None and not model.config.is_encoder_decoder and mask.shape[-1] and not bool(mask[:, -1].all()):
        raise ValueError(
            "rows of a decoder-only model must be padded on the left, but `attention_mask` ends in 0; "
            'set `tokenizer.padding_side = "left"`'
        )


def _refuse_other_place(trained_from: int | None, items: "Items", bundle: str) -> None:
    """Raise `ValueError` if a model's item rows belong to other token ids; one that does not say is taken."""
    if trained_from not in (None, items.first_ids[0]):
        raise ValueError(
            f"{bundle}: the model and the tokenizer must belong together, but the model's item tokens begin at id "
            f"{trained_from} and the tokenizer's at {items.first_ids[0]}; were files mixed from two runs?"
        )


def _own_tokens(model: Any, items: "Items") -> dict[str, Any]:
    """Tokens that the model's own configuration names, without item tokens: none of those ends or fills a row."""
    found = {name: getattr(model.generation_config, name, None) for name in _MODELS_OWN}
    ends = found["eos_token_id"]
    ends = [ends] if isinstance(ends, int) else list(ends or ())
    span = range(items.first_ids[0], items.first_ids[-1] + items.sizes[-1])
    found["eos_token_id"] = [token for token in ends if token not in span] or None
    return {name: value for name, value in found.items() if value is not None}


class Items:
    """The codes of a catalogue as token ids, one sorted array of prefixes a level.

    Attributes:
        sizes: codewords of each level.
        first_ids: token id of codeword 0 of each level.
        prefixes: per level, int64 `[P]`, ascending: place of the prefix one level above `* size + codeword`.
    """

    def __init__(self, table: Tensor, sizes: list[int], first_ids: list[int]) -> None:
        """Number the prefixes of a table of codes, int `[N, L]`."""
        self.sizes = sizes
        self.first_ids = first_ids
        self.prefixes: list[Tensor] = []
        numbers = torch.zeros(len(table), dtype=torch.long)
        for level, size in enumerate(sizes):
            found, numbers = torch.unique(numbers * size + table[:, level], return_inverse=True)
            self.prefixes.append(found)

    def __len__(self) -> int:
        """Number of items."""
        return len(self.prefixes[-1])

    def to(self, device: torch.device) -> "Items":
        """The same on a device; these are shared between calls, and stay where they are."""
        moved = copy.copy(self)
        moved.prefixes = [found.to(device) for found in self.prefixes]
        return moved

    def may_follow(self, path: Tensor) -> Tensor:
        """Whether each codeword of the next level goes on towards an item.

        Args:
            path: int64 `[B, T]`, the tokens since the prompt, fewer than there are levels.

        Returns:
            bool `[B, size]`, all False for tokens that begin no item's code.
        """
        numbers = torch.zeros(len(path), 1, dtype=torch.long, device=path.device)
        real = torch.ones_like(numbers, dtype=torch.bool)
        for level in range(path.shape[1]):
            codewords = path[:, level : level + 1] - self.first_ids[level]
            numbers, found = self._look_up(level, numbers * self.sizes[level] + codewords)
            real &= found & (codewords >= 0) & (codewords < self.sizes[level])
        size = self.sizes[path.shape[1]]
        codewords = torch.arange(size, device=path.device)
        return self._look_up(path.shape[1], numbers * size + codewords)[1] & real

    def _look_up(self, level: int, prefixes: Tensor) -> tuple[Tensor, Tensor]:
        """Places of prefixes in the sorted array, and whether they are there."""
        known = self.prefixes[level]
        places = torch.searchsorted(known, prefixes).clamp_(max=len(known) - 1)
        return places, known[places] == prefixes


class ItemsOnly(LogitsProcessor):
    """Leaves the tokens that go on towards an item, with log-probabilities under the normaliser."""

    def __init__(self, items: Items, normaliser: str) -> None:
        self.items = items
        self.normaliser = normaliser
        self.prompt: int | None = None  # tokens of it, known at the first step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Normalise and mask the log-probabilities `[B, V]` of the next token after rows of ids `[B, S]`."""
        if self.prompt is None:
            self.prompt = input_ids.shape[1]
            self.items = self.items.to(scores.device)
        path = input_ids[:, self.prompt :]
        legal = self.items.may_follow(path)
        first, size = self.items.first_ids[path.shape[1]], self.items.sizes[path.shape[1]]
        steps = scores[:, first : first + size]
        whole = {
            "level": steps,
            "items": scores[:, self.items.first_ids[0] : self.items.first_ids[-1] + self.items.sizes[-1]],
            "vocab": scores,
            "children": steps.masked_fill(~legal, -torch.inf),
        }[self.normaliser]
        steps = (steps - whole.logsumexp(-1, keepdim=True)).masked_fill(~legal, -torch.inf)
        only = torch.full_like(scores, -torch.inf)
        only[:, first : first + size] = steps
        return only


def _read(bundle: str, revision: str | None, trained_with: str | None) -> tuple[dict[str, Any], Items]:
    """How a bundle is decoded, and its items.

    Args:
        bundle: folder or repository.
        revision: of the repository.
        trained_with: hash of the codes that the model says it was trained with; None where it does not say.
    """
    try:
        files = [cached_file(bundle, name, revision=revision) for name in (SETTINGS, CODES, TOKENIZER)]
    except OSError as error:
        raise ValueError(
            f"{bundle}: {SETTINGS} and {CODES} must be there, found: {str(error).splitlines()[0]}; "
            "where the model is a base model with an adapter, name the adapter's repository: bundle=REPO"
        ) from error
    settings_file, codes, tokenizer = map(str, files)
    settings = json.loads(Path(settings_file).read_text(encoding="utf-8"))
    with safe_open(codes, framework="pt") as file:
        sha256 = json.loads(file.metadata()["item_codes"])["sha256"]
    for what, other in (("the model", trained_with), (SETTINGS, settings["codes_sha256"])):
        if other not in (None, sha256):
            raise ValueError(
                f"{bundle}: {what} and {CODES} must belong together, but {what} is of the codes {other[:12]} and these "
                f"are {sha256[:12]}; were files mixed from two runs, or the model loaded before they were exchanged?"
            )
    written = Path(tokenizer).stat().st_mtime_ns
    return settings, _items(bundle, revision, str(Path(codes).resolve()), sha256, written)


@functools.lru_cache(maxsize=4)
def _items(bundle: str, revision: str | None, codes: str, sha256: str, written: int) -> Items:
    """The items of a file of codes; its hash and the tokenizer's age are there so that an exchanged file is read."""
    with safe_open(codes, framework="pt") as file:
        header = json.loads(file.metadata()["item_codes"])
        table = file.get_tensor("table").long()
    tokenizer = AutoTokenizer.from_pretrained(bundle, revision=revision, trust_remote_code=False)
    spelled = [f"<{string.ascii_lowercase[level]}_0>" for level in range(len(header["sizes"]))]
    known = tokenizer.get_vocab()
    if not known.keys() >= set(spelled):
        raise ValueError(f"{bundle}: the tokenizer must have the item tokens {spelled}, but it does not")
    return Items(table, header["sizes"], [known[token] for token in spelled])
