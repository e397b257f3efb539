"""Batches worked out by hand, one for each task, and the loss made of them."""

import numpy as np
import pytest
import torch

from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.model.prompts import Prompts
from llm_itemtok.training.collator import Collator
from llm_itemtok.training.next_token import NextToken
from llm_itemtok.vocab.item_vocab import ItemVocab
from llm_itemtok.vocab.text_vocab import resolved
from tests.tiny import text_codes, tiny_tokenizer

CODES = ItemCodes(np.array([[0, 1], [1, 0], [2, 1]]), (3, 2))
A, B = 21, 24  # token ids of <a_0> and <b_0>
RED, LAMP, OLD, UNK, START, END = 3, 10, 6, 0, 1, 2


def collator(answer_start: int | None = None) -> Collator:
    tokenizer = tiny_tokenizer()
    vocab = ItemVocab.add_to(tokenizer, CODES)
    assert vocab.first_id == A
    return Collator(Prompts(tokenizer, vocab, ["red lamp", "", "old"], answer_start=answer_start), 2)


def example(task: int, items: list[int], first: int = 0, weight: float = 1.0) -> dict:
    return {"task": task, "items": items, "first": first, "weight": weight, "length": len(items)}


def test_a_history_with_every_item_a_target():
    batch = collator()([example(0, [2, 0])])
    assert batch["input_ids"].tolist() == [[START, A + 2, B + 1, A]]
    assert batch["labels"].tolist() == [[A + 2, B + 1, A, B + 1]]
    assert batch["levels"].tolist() == [[0, 1, 0, 1]]
    assert batch["loss_weights"].tolist() == [[1, 1, 1, 1]]
    assert batch["tasks"].tolist() == [0]


def test_a_history_with_its_last_item_a_target():
    batch = collator()([example(0, [2, 1, 0], first=2, weight=0.5)])
    assert batch["labels"].tolist() == [[0, 0, 0, 0, A, B + 1]]
    assert batch["levels"].tolist() == [[-1, -1, -1, -1, 0, 1]]
    assert batch["loss_weights"].tolist() == [[0, 0, 0, 0, 0.5, 0.5]]


def test_title_to_item():
    batch = collator()([example(1, [2], weight=2.0)])
    assert batch["input_ids"].tolist() == [[START, UNK, UNK, OLD, UNK, UNK, A + 2]]
    assert batch["labels"].tolist() == [[0, 0, 0, 0, 0, A + 2, B + 1]]
    assert batch["levels"].tolist() == [[-1, -1, -1, -1, -1, 0, 1]]
    assert batch["loss_weights"].tolist() == [[0, 0, 0, 0, 0, 2, 2]]


def test_item_to_title():
    batch = collator()([example(2, [0])])
    assert batch["input_ids"].tolist() == [[START, UNK, UNK, A, B + 1, UNK, UNK, RED, LAMP]]
    assert batch["labels"].tolist() == [[0, 0, 0, 0, 0, 0, RED, LAMP, END]]
    assert batch["levels"].tolist() == [[-1, -1, -1, -1, -1, -1, 2, 2, 2]]
    assert batch["loss_weights"].tolist() == [[0, 0, 0, 0, 0, 0, 1, 1, 1]]


def test_for_an_encoder_decoder_what_is_read_and_what_is_written_are_rows_of_their_own():
    examples = [
        example(0, [2, 1, 0], first=2, weight=0.5),
        example(0, [1, 2], first=1),
        example(1, [2]),
        example(2, [0]),
    ]
    batch = collator(answer_start=UNK)(examples)
    assert batch["context_ids"].tolist() == [
        [A + 2, B + 1, A + 1, B, END, 0, 0],
        [A + 1, B, END, 0, 0, 0, 0],
        [UNK, UNK, OLD, UNK, UNK, END, 0],
        [UNK, UNK, A, B + 1, UNK, UNK, END],
    ]
    assert batch["context_seen"].sum(1).tolist() == [5, 3, 6, 7]
    assert batch["input_ids"].tolist() == [[UNK, A, 0], [UNK, A + 2, 0], [UNK, A + 2, 0], [UNK, RED, LAMP]]
    assert batch["labels"].tolist() == [[A, B + 1, 0], [A + 2, B + 1, 0], [A + 2, B + 1, 0], [RED, LAMP, END]]
    assert batch["levels"].tolist() == [[0, 1, -1], [0, 1, -1], [0, 1, -1], [2, 2, 2]]
    assert batch["loss_weights"].tolist() == [[0.5, 0.5, 0], [1, 1, 0], [1, 1, 0], [1, 1, 1]]


def test_an_encoder_never_reads_a_target():
    with pytest.raises(AssertionError):
        collator(answer_start=UNK)([example(0, [2, 0])])


def test_shorter_rows_are_padded_on_the_right_without_targets():
    batch = collator()([example(0, [2, 0, 1]), example(0, [1]), example(1, [0], weight=0.5)])
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "input_ids": (3, 8), "labels": (3, 8), "levels": (3, 8), "loss_weights": (3, 8), "tasks": (3,)
    }  # fmt: skip
    assert batch["levels"][1].tolist() == [0, 1, -1, -1, -1, -1, -1, -1]
    assert batch["loss_weights"][1].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert bool(((batch["levels"] >= 0) == (batch["loss_weights"] > 0)).all())
    assert batch["tasks"].tolist() == [0, 0, 1]
    dtypes = {name: value.dtype for name, value in batch.items()}
    assert dtypes.pop("loss_weights") == torch.float32
    assert set(dtypes.values()) == {torch.int64}


def test_new_item_tokens_are_rendered_from_the_next_batch_on():
    collate = collator()
    before = collate([example(0, [0])])["labels"]
    tokenizer = tiny_tokenizer()
    codes = ItemCodes(np.array([[2, 0], [1, 0], [2, 1]]), (3, 2))
    collate.prompts = Prompts(tokenizer, ItemVocab.add_to(tokenizer, codes))
    assert (before.tolist(), collate([example(0, [0])])["labels"].tolist()) == ([[A, B + 1]], [[A + 2, B]])


class Fixed(torch.nn.Module):
    """Stands in for a model: the loss of a place is its number in the row, over 10."""

    def forward(self, input_ids, labels, levels):
        return torch.arange(input_ids.shape[1]).expand(input_ids.shape) / 10


def test_the_loss_is_the_weighted_mean_over_all_targets_of_the_step():
    collate, objective = collator(), NextToken(["next-item", "title-to-item", "item-to-title"])
    batch = collate([example(0, [2, 0]), example(0, [1, 0], first=1), example(1, [2], weight=2.0)])
    share = objective.denominators(batch)
    assert {name: float(value) for name, value in share.items()} == {"weight": 4 + 2 + 2 * 2}
    terms = objective(Fixed(), batch, {"weight": torch.tensor(20.0)})
    assert {name: pytest.approx(float(value)) for name, value in terms.items()} == {
        "next-item": (0 + 0.1 + 0.2 + 0.3 + 0.2 + 0.3) / 20,
        "title-to-item": 2 * (0.5 + 0.6) / 20,
        "item-to-title": 0.0,
    }


def test_every_task_has_a_term_in_every_batch():
    """Processes of one run must log the same terms, whatever their batches hold."""
    batch = collator()([example(1, [0])])
    objective = NextToken(["next-item", "title-to-item"])
    terms = objective(Fixed(), batch, objective.denominators(batch))
    assert list(terms) == ["next-item", "title-to-item"]
    assert float(terms["next-item"]) == 0


def test_identifiers_of_unlike_lengths_stand_one_after_the_other_without_gaps():
    """What a row is made of where items end at unlike levels: words and end tokens, each with its place in its item."""
    tokenizer = tiny_tokenizer()
    vocab = resolved(tokenizer, text_codes(["red lamp", "old"]))
    collate = Collator(Prompts(tokenizer, vocab, ["red lamp", "old"]), vocab.num_levels)
    batch = collate([example(0, [0, 1, 0], first=1), example(2, [1])])
    assert batch["input_ids"][0].tolist() == [START, RED, LAMP, END, OLD, END, RED, LAMP]
    assert batch["labels"][0].tolist() == [0, 0, 0, OLD, END, RED, LAMP, END]
    assert batch["levels"][0].tolist() == [-1, -1, -1, 0, 1, 0, 1, 2]
    assert batch["labels"][1, :7].tolist() == [0, 0, 0, 0, 0, 0, OLD]
    batch = Collator(Prompts(tokenizer, vocab, answer_start=UNK), 3)([example(0, [0, 1], first=1)])
    assert batch["context_ids"].tolist() == [[RED, LAMP, END, END]]
    assert (batch["input_ids"].tolist(), batch["labels"].tolist()) == ([[UNK, OLD]], [[OLD, END]])
    assert batch["levels"].tolist() == [[0, 1]]
