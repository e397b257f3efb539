"""ROW: a step that trains item rows, against PEFT's layer for new tokens and against LoRA without any.

Forward and backward of a Llama with LoRA on every linear layer, a softmax over the whole vocabulary and a loss at every
position, so that all ways do the same arithmetic but for the item rows. Ours and PEFT's see the same item tokens, and
their gradients are checked to be the same; LoRA alone has a table of the same length in which nothing is trained.
ROW-mb is what a step holds beyond what LoRA alone does, as a share of what PEFT's does.

Training by levels, which is the default, makes no logits over the vocabulary at all; its time and memory stand in the
details.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from llm_itemtok.bench import subjects
from llm_itemtok.bench.measure import Result, at_least, at_most, cpu_seconds, one_thread, peak_mb
from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.model.load import add_lora
from llm_itemtok.model.rows import input_table

ITEMS = 12_000
USERS, TOKENS = 16, 64
WIDE_USERS = 4
WIDE = subjects.Shape(layers=2, width=1024, heads=16, inner=3072, vocabulary=subjects.LLM_VOCABULARY)
"""Two layers as wide as those of the smallest Qwen3, and its vocabulary."""

RANK, ALPHA = 16, 32
SLOWER = 1.1
"""How much longer than LoRA alone a step may take."""


class Step:
    """One training step in every way, on one batch."""

    def __init__(self, shape: subjects.Shape, users: int) -> None:
        """Build it with a random model of this shape."""
        self.model = subjects.item_model(shape, subjects.codes(ITEMS)).train()
        self.plain = subjects.plain_model(self.model).train()
        self.peft = _with_new_tokens(self.model)
        for lm in (self.model.lm, self.plain):
            add_lora(lm, rank=RANK, alpha=ALPHA, dropout=0.0, rslora=False, seed=0)
        vocab = self.model.vocab
        self.ids = torch.from_numpy(np.stack(subjects.prompts(vocab, users, TOKENS + 1)))
        self.levels = (torch.arange(TOKENS).expand(users, -1) + 1) % vocab.num_levels

    def ours(self) -> None:
        """Item rows beside the table."""
        self._nll("vocab").mean().backward()

    def by_level(self) -> None:
        """The same rows under the default normaliser."""
        self._nll("level").mean().backward()

    def alone(self) -> None:
        """LoRA, and no new tokens."""
        _cross_entropy(self.plain, self.ids).backward()

    def theirs(self) -> None:
        """PEFT's layer for new tokens, in a table that was resized."""
        _cross_entropy(self.peft, self.ids).backward()

    def largest_difference(self) -> float:
        """Largest difference of an item row's gradient between ours and PEFT's, as a share of the largest gradient."""
        self.ours()
        self.theirs()
        ours = self.model.rows.input_rows.grad
        theirs = next(p.grad for name, p in self.peft.named_parameters() if "trainable_tokens_delta" in name)
        assert ours is not None
        assert theirs is not None
        return float((ours - theirs).abs().max() / theirs.abs().max())

    def _nll(self, normaliser: str) -> Tensor:
        self.model.normaliser = "vocab" if normaliser == "vocab" else "level"
        nll: Tensor = self.model(input_ids=self.ids[:, :-1], labels=self.ids[:, 1:], levels=self.levels)
        return nll


def _cross_entropy(lm: PreTrainedModel | PeftModel, ids: Tensor) -> Tensor:
    """Mean loss of every token after the first; nothing else keeps the logits."""
    return F.cross_entropy(lm(input_ids=ids[:, :-1], use_cache=False).logits.flatten(0, 1), ids[:, 1:].flatten())


def _with_new_tokens(model: ItemTokenModel) -> PeftModel:
    """The same weights in a resized table, with LoRA and the item tokens trained as PEFT does it."""
    ids = list(range(model.vocab.first_id, model.vocab.first_id + model.vocab.num_tokens))
    lm = subjects.plain_model(model).train()
    name = next(name for name, module in lm.named_modules() if module is input_table(lm))
    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        r=RANK,
        lora_alpha=ALPHA,
        trainable_token_indices={name.rsplit(".", 1)[-1]: ids},
    )
    peft_model = get_peft_model(lm, config)
    assert isinstance(peft_model, PeftModel)
    return peft_model


def rows(repeats: int = 10) -> Iterator[Result]:
    """ROW-time and ROW-mb."""
    with one_thread():
        yield _time("ROW-time-9k", Step(subjects.SMALL, USERS), 1.0, repeats)
        yield _time("ROW-time-152k", Step(WIDE, WIDE_USERS), 1.5, -(-repeats // 3))
    yield _memory()


def _time(name: str, step: Step, target: float, repeats: int) -> Result:
    difference = step.largest_difference()
    theirs, ours, alone, by_level = cpu_seconds(step.theirs, step.ours, step.alone, step.by_level, repeats=repeats)
    details = {
        "largest_difference": difference,
        "of_lora_alone": ours / alone,
        "baseline_s": theirs,
        "ours_s": ours,
        "lora_alone_s": alone,
        "by_level_s": by_level,
    }
    result = at_least(name, theirs / ours, target, details, baseline="PEFT's trainable tokens")
    return replace(result, met=result.met and difference <= 1e-4 and ours <= SLOWER * alone)


def _memory() -> Result:
    """What a step holds at its widest beyond LoRA alone."""
    megabytes = {f"{way}_mb": peak_mb(prepare_step, way) for way in ("alone", "theirs", "ours", "by_level")}
    alone, theirs, ours, _ = megabytes.values()
    share = (ours - alone) / (theirs - alone)
    return at_most("ROW-mb-152k", share, 0.1, megabytes, baseline="PEFT's trainable tokens")


def prepare_step(way: str) -> Callable[[], object]:
    """One step of a fresh process."""
    step = Step(WIDE, WIDE_USERS)
    call: Callable[[], object] = getattr(step, way)
    return call
