"""A model whose weights are sharded over processes by FSDP2, and made whole again where parts of it are called.

Accelerate shards what the trainer gives it: each block of the base model is gathered when it is called, and everything
else, such as tables and item rows, when the whole model is. Two things that this project does are not foreseen by that.

Which rows and heads get a gradient depends on the batch: no text target, no gradient of the head over words. DDP finds
that out, but FSDP2 sends the gradients that there are, so processes with unlike batches would send unlike ones. Here
the processes agree, batch by batch, on what any of them uses, and whoever does not use it gives it a gradient of zero.
What nobody uses has none, so no weight decay either, as under DDP.

Decoding calls parts of the model, and the processes call them unlike often, as each decodes its own cases. So for
validation all weights are gathered before, and sharded again behind it.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.training.trainer import ItemTokenTrainer


class ShardedTrainer(ItemTokenTrainer):
    """An `ItemTokenTrainer` whose model Accelerate shards; it starts from one that is whole."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take the same arguments."""
        super().__init__(*args, **kwargs)
        assert isinstance(self.model, ItemTokenModel)
        prepare_sharding(self.model)
        if self.args.bf16:
            # Accelerate would add up gradients over processes, and hand losses out, in bfloat16; DDP does neither.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32
            )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Rank the validation cases with all weights at hand; as `ItemTokenTrainer.evaluate`."""
        with self._gathered():
            return super().evaluate(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model whole; as `ItemTokenTrainer.save_model`, which looks at all weights."""
        with self._gathered():
            super().save_model(output_dir, _internal_call)

    def _gathered(self) -> AbstractContextManager[None]:
        assert self.model is not None
        return gathered(self.model, reshard_after_forward=self.accelerator.state.fsdp_plugin.reshard_after_forward)


def prepare_sharding(model: ItemTokenModel) -> None:
    """Make a model ready for Accelerate to shard: name its blocks, and let its processes use the same parameters."""
    blocks = set(getattr(model.lm, "_no_split_modules", None) or ())
    there = {type(part).__name__ for part in model.modules()}
    model._no_split_modules = sorted(blocks & there)  # type: ignore[assignment]  # where Accelerate looks for them
    model.register_forward_hook(_use_alike)  # before Accelerate's own, which begins with the output of this one


@contextmanager
def gathered(model: nn.Module, *, reshard_after_forward: bool) -> Iterator[None]:
    """Hold all weights on every process; nothing happens to a model that is not sharded.

    All processes must enter and leave together; in between they may call any part, as often as each needs to.

    Args:
        model: that has trained for a step at least, so that it knows its parts.
        reshard_after_forward: what blocks do in training; the rest of the model stays whole between the passes.
    """
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(reshard_after_forward and part is not model, recurse=False)
            part.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Whether Accelerate has sharded a model."""
    return isinstance(model, FSDPModule)


def _use_alike(model: nn.Module, _inputs: Any, output: Any) -> Any:
    """Let the result hang on every trained parameter that it hangs on in some process; the value stays the same."""
    if not (torch.is_grad_enabled() and is_sharded(model)):
        return output
    nll, *told = output if isinstance(output, tuple) else (output,)
    found = _leaves([nll, *(value for part in told for value in part.values())])
    # Blocks are sharded again by now, and use all that they have; what is whole is the rest.
    parts = [part for part in model.parameters() if part.requires_grad and not hasattr(part, "device_mesh")]
    used = torch.tensor([id(part) in found for part in parts], dtype=torch.int32, device=nll.device)
    somewhere = used.clone()
    distributed.all_reduce(somewhere, distributed.ReduceOp.MAX)
    for part in (part for part, lacks in zip(parts, (somewhere - used).tolist(), strict=True) if lacks):
        nll = nll + part.flatten()[0].float() * 0
    return (nll, *told) if told else nll


def _leaves(values: list[Tensor]) -> set[int]:
    """Ids of the parameters that some values hang on."""
    seen: set[Any] = set()
    found, open_nodes = set(), [value.grad_fn for value in values if value.grad_fn is not None]
    while open_nodes:
        node = open_nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found.add(id(leaf))
        open_nodes += [after for after, _ in node.next_functions if after is not None]
    return found
