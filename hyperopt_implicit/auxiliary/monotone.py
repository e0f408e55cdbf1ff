"""What makes a layer monotone: weights that cannot be negative, and activations that cannot fall.

A composition of both cannot fall in any of its inputs. Weights are kept non-negative in one of two ways: by
construction, as the softplus of what is trained, or by clamping them after each outer step, as AuxiLearn does; the
latter needs somebody to call ``project_``, which the library's outer steps do.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm as normalise

from hyperopt_implicit.errors import AuxiliaryError
from hyperopt_implicit.messages import nearest

Monotone = bool | Literal["clamp"]
"""True: monotone by construction. ``"clamp"``: by clamping after each outer step. False: not monotone."""

_RISING: dict[str, type[nn.Module]] = {
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "identity": nn.Identity,
}
_OTHERS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "silu": nn.SiLU, "mish": nn.Mish}


def inverse_softplus(y: Tensor) -> Tensor:
    """x with softplus(x) = y, for y > 0; exact to rounding for small and for large y."""
    return y + torch.log(-torch.expm1(-y))


class Softplus(nn.Module):
    """A parametrisation of positive tensors: log(1 + eˣ), elementwise."""

    def forward(self, raw: Tensor) -> Tensor:
        return F.softplus(raw)

    def right_inverse(self, value: Tensor) -> Tensor:
        return inverse_softplus(value)


def check_monotone(monotone: Monotone) -> None:
    """Refuse what is not one of the three settings."""
    if monotone not in (True, False, "clamp"):
        raise AuxiliaryError(f"monotone must be True, False or 'clamp'; got {monotone!r}.")


def activation_module(activation: str | nn.Module, monotone: Monotone) -> nn.Module:
    """An activation by name, or as it is; one that can fall is refused where the combiner must be monotone."""
    if isinstance(activation, nn.Module):
        module = activation
    else:
        known = {**_RISING, **_OTHERS}
        if activation not in known:
            raise AuxiliaryError(
                f"activation must be one of {', '.join(known)}, or an nn.Module; got {activation!r}."
                f"{nearest(str(activation), known)}"
            )
        module = known[activation]()
    if monotone and type(module) not in _RISING.values():
        raise AuxiliaryError(
            f"a monotone combiner needs an activation that never falls ({', '.join(_RISING)}); {type(module).__name__} "
            "is not known to be one. Choose one of these, or set monotone=False."
        )
    return module


@torch.no_grad()
def constrained(layer: nn.Linear | nn.Conv2d, monotone: Monotone, weight_norm: bool, gain: float) -> nn.Module:
    """Give a layer its start, and the parametrisations that normalise its weights and keep them positive.

    A monotone layer starts with weights in (½, 3⁄2)·gain/fan_in, so that its output is about ``gain`` times the mean of
    its inputs whatever its width; a free one keeps torch's own start.
    """
    if monotone:
        fan_in = layer.weight[0].numel()
        layer.weight.uniform_(0.5 * gain / fan_in, 1.5 * gain / fan_in)
    if weight_norm:
        normalise(layer, "weight")
    if monotone is True:
        parametrize.register_parametrization(layer, "weight", Softplus())
    return layer


@torch.no_grad()
def clamp_(layer: nn.Module) -> None:
    """Put the negative weights of a layer to zero; of a normalised one, its lengths and directions."""
    if parametrize.is_parametrized(layer, "weight"):
        for p in layer.parametrizations.weight.parameters():  # type: ignore[union-attr]
            p.clamp_(min=0.0)
    else:
        layer.weight.clamp_(min=0.0)  # type: ignore[operator]
