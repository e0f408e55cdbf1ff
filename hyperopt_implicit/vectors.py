"""Arithmetic on ``dict[str, Tensor]`` as one long vector: what the solvers are written in.

Names are carried along and never reordered: both operands of every function hold the same names in the same order.
Functions that end in an underscore change their first argument.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Params = dict[str, Tensor]


def clone(x: Params) -> Params:
    """A copy that shares no memory."""
    return {name: tensor.clone() for name, tensor in x.items()}


def zeros_like(x: Params) -> Params:
    """The zero vector of the same shape."""
    return {name: torch.zeros_like(tensor) for name, tensor in x.items()}


def dot(x: Params, y: Params) -> float:
    """⟨x, y⟩ as a Python number (on a GPU this waits for the device, once)."""
    return math.fsum(_numbers([torch.dot(x[name].reshape(-1), y[name].reshape(-1)) for name in x]))


def norm(x: Params) -> float:
    """‖x‖₂ as a Python number."""
    return math.hypot(*_numbers(torch._foreach_norm(tuple(x.values()))))


def cosine(x: Params, y: Params) -> float:
    """⟨x, y⟩/(‖x‖·‖y‖) in float64; 1 where both are zero, and 0 where one is."""
    x, y = ({name: tensor.double() for name, tensor in each.items()} for each in (x, y))
    size, other = norm(x), norm(y)
    return dot(x, y) / (size * other) if size > 0.0 and other > 0.0 else float(size == other)


def add(x: Params, y: Params, scale: float = 1.0) -> Params:
    """x + scale·y."""
    return dict(zip(x, torch._foreach_add(list(x.values()), list(y.values()), alpha=scale), strict=True))


def add_(x: Params, y: Params, scale: float = 1.0) -> Params:
    """x ← x + scale·y."""
    torch._foreach_add_(tuple(x.values()), tuple(y.values()), alpha=scale)
    return x


def scale_(x: Params, factor: float) -> Params:
    """x ← factor·x."""
    torch._foreach_mul_(list(x.values()), factor)
    return x


def divide(x: Params, y: Params) -> Params:
    """x/y, element by element."""
    return dict(zip(x, torch._foreach_div(list(x.values()), list(y.values())), strict=True))


def precision(x: Params) -> float:
    """The relative rounding error of a vector of this kind; no residual below it can be told from zero."""
    return max(torch.finfo(tensor.dtype).eps for tensor in x.values())


def is_finite(x: Params) -> bool:
    """Whether no element is NaN or infinite (nor so large that its square is)."""
    return math.isfinite(norm(x))


def same_shapes(x: Params, y: Params) -> bool:
    """Whether both have the same names in the same order, and shapes, so that one can stand in for the other."""
    return list(x) == list(y) and all(x[name].shape == y[name].shape for name in x)


def _numbers(scalars: Sequence[Tensor]) -> list[float]:
    if scalars and scalars[0].is_cuda:
        return torch.stack(list(scalars)).tolist()
    return [scalar.item() for scalar in scalars]
