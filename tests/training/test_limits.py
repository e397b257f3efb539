"""What ends a training is told with what to change: a loss that is no number, memory or disk that is full."""

import errno

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

from llm_itemtok.errors import RecipeError, TrainingError
from llm_itemtok.training.limits import limits
from tests.training.runs import make_trainer


@pytest.fixture
def arguments(tmp_path):
    return TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=8, use_cpu=True, report_to=[])


def test_memory_that_is_not_to_be_had_is_told_with_the_batch(arguments, tmp_path):
    with (
        pytest.raises(TrainingError, match=r"batches of 8; halve `trainer.per_device_train_batch_size`"),
        limits(arguments, tmp_path),
    ):
        torch.empty(1 << 50)  # the allocator itself refuses


def test_a_full_disk_is_told_as_such(arguments, tmp_path):
    with (
        pytest.raises(TrainingError, match="is full; make room and go on with `--resume`"),
        limits(arguments, tmp_path),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), OSError(errno.EACCES, "denied"), RecipeError("wrong")]
)
def test_other_errors_pass_through(arguments, tmp_path, error):
    with pytest.raises(type(error)) as raised, limits(arguments, tmp_path):
        raise error
    assert raised.value is error


class _Break(TrainerCallback):
    """Makes one weight infinite after some steps."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step == self.step:
            with torch.no_grad():
                model.rows.input_rows[0, 0] = torch.inf


@pytest.mark.parametrize(
    ("logging_steps", "broken", "says"),
    [
        (1, 5, "the loss `next-item` must stay finite, was: nan at step 6"),
        (100, 5, "the loss `next-item` must stay finite, was: nan at step 6"),
        (100, 6, "the weights must stay finite, was: nan at step 6"),
    ],
)
def test_what_is_no_number_ends_training_before_a_checkpoint_holds_it(tmp_path, logging_steps, broken, says):
    trainer = make_trainer(tmp_path, steps=12, every=2, logging_steps=logging_steps, callbacks=(_Break(broken),))
    with pytest.raises(TrainingError, match=says):
        trainer.train()
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("checkpoint-*/model.safetensors"))
    assert len(kept) == 2
    for path in (tmp_path / "checkpoints").glob("checkpoint-*/model.safetensors"):
        assert all(bool(value.isfinite().all()) for value in load_file(path).values())


def test_a_gradient_that_is_no_number_ends_training(tmp_path):
    trainer = make_trainer(tmp_path, steps=4, max_grad_norm=1.0)
    trainer.model.rows.input_rows.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(TrainingError, match=r"the gradient must stay finite, was: (nan|inf) at step 1"):
        trainer.train()
