"""What of a model stands in its state dict, so in checkpoints and snapshots: what training changes, and nothing else.

Frozen tables are loaded from where they came from, so a checkpoint leaves them out, and does not miss them either. Two
things that no gradient of the training changes are in it all the same: the item codes, where the model holds them, and
the quantizer behind the codes, where updates of item tokens train it.
"""

from typing import Any

import numpy as np
from torch import Tensor, nn

from llm_itemtok.items.base import Quantizer
from llm_itemtok.items.codes import ItemCodes

CODES, QUANTIZER = "item_codes", "quantizer."
"""Name of the buffer of item codes, and of what belongs to the quantizer."""


def forget_quantizer(module: Any, _incompatible: Any) -> None:
    """Let what was computed with another quantizer than the one that was loaded be computed anew."""
    if module.soft is not None:
        module.soft.forget()


def hold_quantizer(module: Any, quantizer: Quantizer) -> None:
    """Let a model hold the quantizer behind its codes, at rest: nothing trains it but what is said to."""
    module.quantizer = quantizer.requires_grad_(False)


def _kept(module: nn.Module) -> set[str]:
    """Names of what a checkpoint holds, once each: no frozen table, no tied copy."""
    names = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    return names | ({CODES} & set(module._buffers)) | {name for name in _all(module) if name.startswith(QUANTIZER)}


def _all(module: nn.Module) -> list[str]:
    return [name for part in (module.named_parameters(), module.named_buffers()) for name, _ in part]


def keep_trained(module: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: object) -> None:
    """Leave what training does not change out of a state dict."""
    kept = {prefix + name for name in _kept(module)}
    for name in [name for name in state if name.startswith(prefix) and name not in kept]:
        del state[name]


def expect_trained(module: nn.Module, incompatible: Any) -> None:
    """Do not call missing what a checkpoint leaves out on purpose."""
    expected = _kept(module)
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if name in expected]


def follow_codes(module: Any, _incompatible: Any) -> None:
    """Let the vocabulary of a model that holds its codes be the one that was loaded."""
    if CODES not in module._buffers:
        return
    before, table = module.vocab.codes, module.get_buffer(CODES).cpu().numpy()
    if not np.array_equal(table, before.table):
        codes = ItemCodes(table, before.sizes, names=before.names, provenance=before.provenance)
        module.vocab = module.vocab.with_codes(codes)
