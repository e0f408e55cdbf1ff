"""Arithmetic on ``dict[str, Tensor]`` as one long vector: what the solvers are written in.

Names are carried along and never reordered: both operands of every function hold the same names in the same order.
Functions that end in an underscore change their first argument.
"""

from __future__ import annotations

import math

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
    """⟨x, y⟩ as a Python number (on a GPU this waits for the device)."""
    products = [torch.dot(x[name].reshape(-1), y[name].reshape(-1)) for name in x]
    return float(products[0] if len(products) == 1 else torch.stack(products).sum())


def norm(x: Params) -> float:
    """‖x‖₂ as a Python number."""
    return math.sqrt(dot(x, x))


def add_(x: Params, y: Params, scale: float = 1.0) -> Params:
    """x ← x + scale·y."""
    torch._foreach_add_(list(x.values()), list(y.values()), alpha=scale)
    return x


def scale_(x: Params, factor: float) -> Params:
    """x ← factor·x."""
    torch._foreach_mul_(list(x.values()), factor)
    return x


def is_finite(x: Params) -> bool:
    """Whether no element is NaN or infinite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in x.values())


def same_shapes(x: Params, y: Params) -> bool:
    """Whether both have the same names and shapes, so that one can stand in for the other."""
    return x.keys() == y.keys() and all(x[name].shape == y[name].shape for name in x)
