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
_SMALL = 1e-12
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
    if not (isinstance(monotone, bool) or monotone == "clamp"):  # 1 == True, but is not
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
    if monotone and not _rises(module):
        raise AuxiliaryError(
            f"a monotone combiner needs an activation that never falls ({', '.join(_RISING)}); {type(module).__name__} "
            "is not known to be one. Choose one of these, or set monotone=False."
        )
    return module


def _rises(module: nn.Module) -> bool:
    """Whether it is one of the known kinds, and was not made to fall by its options."""
    slopes = [getattr(module, name, 1.0) for name in ("negative_slope", "alpha", "beta")]
    return type(module) in _RISING.values() and all(slope >= 0 for slope in slopes)


@torch.no_grad()
def normalise_(layer: nn.Module, dim: int | None = 0) -> None:
    """Train length and direction of a layer's weight apart; dim None has one length for the whole weight."""
    start = layer.weight.detach().clone()  # type: ignore[operator]
    normalise(layer, "weight", dim=dim)  # type: ignore[arg-type]
    if not bool(start.any()):  # the zero vector has no direction: let it grow along all entries alike
        length, direction = layer.parametrizations.weight.parameters()  # type: ignore[union-attr]
        length.zero_()
        direction.fill_(1.0)


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
        normalise_(layer)
    if monotone is True:
        parametrize.register_parametrization(layer, "weight", Softplus())
    return layer


@torch.no_grad()
def clamp_(layer: nn.Module) -> None:
    """Put the negative weights of a layer to zero; of a normalised one, its lengths and directions."""
    if parametrize.is_parametrized(layer, "weight"):
        length, direction = layer.parametrizations.weight.parameters()  # type: ignore[union-attr]
        length.clamp_(min=0.0)
        direction.clamp_(min=_SMALL)  # a direction of zeros could not be normalised
    else:
        layer.weight.clamp_(min=0.0)  # type: ignore[operator]
