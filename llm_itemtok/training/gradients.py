"""Two gradients of the same parameters that pull in different directions, and what can be done about it.

Surgery works tensor by tensor: where the gradient of one task, x, points against that of another, g, which has
precedence, x is changed. `projection` takes away what of x lies along g, so what is left of x does g no harm:

    x <- x - <x, g> / ||g||^2 g        where <x, g> < 0

Source: gradient surgery as in PCGrad, Yu et al. 2020 (arXiv:2001.06782), in one direction as in BLOGER
(arXiv:2510.21242). The released code of BLOGER does something else, `bloger-release`: it divides g by the lengths of
its *rows*, to G, and takes away <x, G> G without dividing by ||G||^2. For a vector that is the projection. A matrix
with R rows has ||G||^2 = R, so R times too much is taken away, and what is left points along the rows of g with a
length that has nothing to do with x: <x', G> = (1 - R) <x, G>. It is kept because published numbers may rest on it.
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Surgery = Literal["projection", "bloger-release", "none"]


class Conflict(NamedTuple):
    """How two gradients go together."""

    share: float
    """Of the tensors that both reach, those where the inner product is below 0, in `[0, 1]`; 0 where there is none."""
    cosines: dict[str, float]
    """Of each of these tensors, in `[-1, 1]`."""


def projected(x: Tensor, g: Tensor) -> Tensor:
    """Take away from `x` what goes against `g`, of the same shape; unchanged where nothing does, or `g` is zero."""
    product = (x * g).sum()
    length = g.square().sum()
    return torch.where((product < 0) & (length > 0), x - product / length.clamp(min=_tiny(g)) * g, x)


def released(x: Tensor, g: Tensor) -> Tensor:
    """What the released code of BLOGER makes of `x` where it goes against `g`; see the module.

    Rows are those of the last dimension; a vector is one row.
    """
    rows = g / g.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return torch.where((x * g).sum() < 0, x - (x * rows).sum() * rows, x)


def kept(x: Tensor, _g: Tensor) -> Tensor:
    """Leave `x` as it is."""
    return x


SURGERIES: Mapping[Surgery, Callable[[Tensor, Tensor], Tensor]] = {
    "projection": projected,
    "bloger-release": released,
    "none": kept,
}
"""What each name does to a gradient `x`, given another, `g`."""


def conflict(x: Mapping[str, Tensor], g: Mapping[str, Tensor]) -> Conflict:
    """Compare two gradients tensor by tensor.

    Args:
        x: name → gradient.
        g: the same names and shapes; tensors where either is zero everywhere are left out.
    """
    both = [name for name in x if x[name].any() and g[name].any()]
    cosines = {name: cosine(x[name], g[name]) for name in both}
    against = sum(value < 0 for value in cosines.values())
    return Conflict(against / len(both) if both else 0.0, cosines)


def cosine(x: Tensor, g: Tensor) -> float:
    """Cosine of the angle between two tensors of one shape, neither of them zero."""
    one, other = x.double().flatten(), g.double().flatten()
    return float(one @ other / (one.norm() * other.norm()))


def _tiny(g: Tensor) -> float:
    return torch.finfo(g.dtype).tiny
