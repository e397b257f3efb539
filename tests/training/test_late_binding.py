"""Placeholders: the same batch as rendering with tokens, and never an old one."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from llm_itemtok.model.prompts import Prompts
from llm_itemtok.training.collator import Collator
from llm_itemtok.training.examples import TASKS
from llm_itemtok.training.late_binding import LateBinding
from tests.tiny import KINDS, tiny_codes, tiny_item_model, tiny_prompts

EVERY_KIND = pytest.mark.parametrize("family", KINDS)


def examples(encoded):
    items = np.array([3, 40, 3, 59])
    first = len(items) - 1 if encoded else 0
    return [
        {"task": TASKS.index("next-item"), "items": items, "first": first, "weight": 1.0},
        *({"task": task, "items": np.array([7]), "first": 0, "weight": 0.5} for task in (1, 2)),
    ]


def prepared(family, **settings):
    model, tokenizer = tiny_item_model(family, **settings)
    early = tiny_prompts(model, tokenizer)
    binding = LateBinding(model)
    texts = [" ".join(["red", "lamp", "old"])] * 60
    late = Prompts(tokenizer, binding.placeholders(), texts, answer_start=model.answer_start)
    early = Prompts(tokenizer, model.vocab, texts, answer_start=model.answer_start)
    return model, tokenizer, binding, Collator(early, 3), Collator(late, 3)


@pytest.mark.parametrize("padding", [0, 40])
@EVERY_KIND
def test_a_bound_batch_is_the_batch_that_was_rendered_with_tokens(family, padding):
    model, _, binding, early, late = prepared(family, padding=padding)
    wanted, found = early(examples(early.prompts.encoded)), binding(late(examples(early.prompts.encoded)))
    assert_close(found, wanted, atol=0, rtol=0)
    loss = [model(**{name: batch[name] for name in batch if name not in ("loss_weights", "tasks")}).detach()
            for batch in (wanted, found)]  # fmt: skip
    assert torch.equal(*loss)


@EVERY_KIND
def test_a_batch_that_was_made_before_an_update_has_the_tokens_of_after_it(family):
    model, tokenizer, binding, early, late = prepared(family)
    rows = examples(early.prompts.encoded)
    batch = late(rows)
    binding(batch)
    model.take_codes(tiny_codes(seed=5))
    texts = [" ".join(["red", "lamp", "old"])] * 60
    fresh = Collator(Prompts(tokenizer, model.vocab, texts, answer_start=model.answer_start), 3)
    assert_close(binding(batch), fresh(rows), atol=0, rtol=0)
    assert not torch.equal(fresh(rows)["labels"], early(rows)["labels"])


@EVERY_KIND
def test_a_batch_tells_which_item_a_label_belongs_to(family):
    _, _, binding, early, late = prepared(family)
    batch = late(examples(early.prompts.encoded))
    items = binding.items(batch["labels"])
    assert items[0][batch["levels"][0] == 0].tolist() == ([59] if early.prompts.encoded else [3, 40, 3, 59])
    assert (items[2][batch["levels"][2] == 3] == -1).all()


@EVERY_KIND
def test_inputs_can_name_items_and_levels_while_labels_are_tokens_of_now(family):
    """What a model needs that looks items up itself: -1 - (item * L + level) in place of each item token."""
    model, _, binding, early, late = prepared(family)
    rendered = late(examples(early.prompts.encoded))
    hard, named = binding(rendered), LateBinding(model, names=True)(rendered)
    for name, value in named.items():
        if name not in ("input_ids", "context_ids"):
            assert torch.equal(value, hard[name])
            continue
        items = binding.items(rendered[name])
        assert torch.equal(value < 0, items >= 0)
        assert torch.equal(value[items < 0], hard[name][items < 0])
        places = -1 - value[items >= 0]
        assert torch.equal(places // 3, items[items >= 0])
        assert torch.equal(model.vocab.paths[places // 3, places % 3], hard[name][items >= 0])
