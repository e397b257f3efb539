"""What a training took is counted from what it saw: the same however it is cut, interrupted or spread."""

import pytest

from llm_itemtok.model.load import add_lora, with_item_tokens
from llm_itemtok.training.effort import Effort, training_flops
from llm_itemtok.training.examples import TASKS
from llm_itemtok.vocab import init
from tests.tiny import KINDS, tiny_codes, tiny_item_model, tiny_lm, tiny_tokenizer
from tests.training.runs import make_trainer


@pytest.mark.parametrize("family", KINDS)
def test_every_target_item_of_an_epoch_counts_once_whatever_the_batches(tmp_path, family):
    trainer = make_trainer(tmp_path, batch=4, accumulation=3, steps=4, family=family)  # 40 examples: one epoch
    items = [
        len(example["items"]) - example["first"]
        for example in trainer.train_dataset
        if TASKS[example["task"]] != "item-to-title"
    ]
    trainer.train()
    assert trainer.effort.targets == sum(items)
    assert trainer.effort.positions > sum(items) * 2
    assert (trainer.effort.context_positions > trainer.effort.positions) is (family == "t5")
    assert trainer.effort.seconds > 0


@pytest.mark.parametrize("family", KINDS)
def test_a_resumed_training_counts_what_the_straight_one_counts(tmp_path, family):
    straight = make_trainer(tmp_path, steps=16, every=7, family=family)
    straight.train()
    resumed = make_trainer(tmp_path, steps=16, every=7, family=family)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "checkpoint-7"))
    assert resumed.effort is not straight.effort
    for name in ("targets", "positions", "context_positions"):
        assert getattr(resumed.effort, name) == getattr(straight.effort, name)
    assert resumed.effort.seconds_before > 0


def test_state_is_what_a_checkpoint_needs_to_make_an_equal_one():
    effort = Effort()
    effort.targets, effort.positions, effort.seconds_before = 3, 9, 1.5
    state = effort.state()
    again = Effort(**state["args"])
    for name, value in state["attributes"].items():
        setattr(again, name, value)
    assert (again.targets, again.positions, again.seconds) == (3, 9, 1.5)


def test_flops_by_hand():
    """6 a trained weight and position, 4 a frozen one; the base model's head and tables do not count."""
    model, _ = tiny_item_model()
    body = sum(p.numel() for name, p in model.lm.base_model.named_parameters() if p.ndim == 2 and "embed" not in name)
    assert training_flops(model, 10) == pytest.approx(6 * body * 10)
    for parameter in model.lm.parameters():
        parameter.requires_grad_(False)
    assert training_flops(model, 10) == pytest.approx(4 * body * 10)


def test_flops_of_an_encoder_decoder_by_hand():
    """What works on the context costs by its length, the rest by that of the answer."""
    model, _ = tiny_item_model("t5")
    square, inner = 16 * 32, 16 * 32  # width by 4 heads of 8, and width by inner width
    read = 2 * (4 * square + 2 * inner) + 2 * 2 * square  # two blocks, and keys and values of two cross-attentions
    written = 2 * (6 * square + 2 * inner)
    assert training_flops(model, 10, 70) == pytest.approx(6 * (70 * read + 10 * written))


def test_lora_costs_less_than_full_training():
    full, _ = tiny_item_model()
    lm, _ = add_lora(tiny_lm("llama"), rank=1, alpha=1, dropout=0.0, rslora=False, seed=0)
    lora = with_item_tokens(lm, tiny_tokenizer(), tiny_codes(), lambda v, t: init.normal(v, t, seed=0))
    assert training_flops(lora, 10) < training_flops(full, 10)
