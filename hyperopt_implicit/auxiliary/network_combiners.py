"""Combiners that are networks: on the losses of each sample, or on the loss images of dense tasks.

What every combiner has, and the weighted sum, is in ``combiners.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from hyperopt_implicit.auxiliary.combiners import LossCombiner
from hyperopt_implicit.auxiliary.context import Context
from hyperopt_implicit.auxiliary.monotone import Monotone, activation_module, check_monotone, clamp_, constrained
from hyperopt_implicit.errors import AuxiliaryError


class _NetworkCombiner(LossCombiner):
    """ℓ_main + f(ℓ₁, …, ℓ_T) with a layered network f, at every pixel of loss images; the mean over the pixels."""

    def __init__(
        self,
        tasks: int,
        sizes: Sequence[int],
        layer: Callable[..., nn.Linear | nn.Conv2d],
        dropout: nn.Module,
        *,
        main_task: int,
        activation: str | nn.Module,
        skip_connection: bool,
        monotone: Monotone,
        weight_norm: bool,
        context: Context | None,
    ) -> None:
        super().__init__(tasks, main_task=main_task, context=context)
        check_monotone(monotone)
        self.monotone = monotone
        self.skip_connection = skip_connection
        widths = [tasks, *sizes]
        self.layers = nn.ModuleList(
            constrained(layer(i, o), monotone, weight_norm, gain=1.0) for i, o in pairwise(widths)
        )
        self.activation = activation_module(activation, monotone)
        self.dropout = dropout
        self.last = constrained(layer(widths[-1], 1, bias=False), monotone, weight_norm, gain=float(tasks))
        self.shift = None if context is None else nn.Linear(context.size, widths[1], bias=False)

    def per_sample(self, losses: Tensor, context: Tensor | None) -> Tensor:
        hidden = losses
        for i, layer in enumerate(self.layers):
            hidden = layer(hidden)
            if i == 0 and self.shift is not None and context is not None:
                shift = self.shift(context)
                hidden = hidden + shift.reshape(*shift.shape, *[1] * (losses.dim() - 2))
            hidden = self.dropout(self.activation(hidden))
        combined: Tensor = self.last(hidden)[:, 0]
        if self.skip_connection:
            combined = combined + losses[:, self.main_task]
        return combined.reshape(len(losses), -1).mean(dim=1) if combined.dim() > 1 else combined

    @torch.no_grad()
    def project_(self) -> None:
        if self.monotone == "clamp":
            for layer in (*self.layers, self.last):
                clamp_(layer)


class NonlinearCombiner(_NetworkCombiner):
    """A small network on the losses of each sample: ℓ_main + f(ℓ₁, …, ℓ_T).

    Where it is monotone, ∂/∂ℓᵢ ≥ 0 for every task and sample: no step lowers the combined loss by raising one of the
    losses. Biases are free, and so is the way in which a context enters: it shifts the first hidden layer.

    Args:
        tasks: how many tasks, the main one included.
        main_task: the place of the main task among them.
        hidden_sizes: widths of the hidden layers; one number for a single layer.
        activation: ``"softplus"``, ``"tanh"``, ``"sigmoid"``, ``"relu"``, ``"leaky_relu"``, ``"elu"`` or
            ``"identity"``; where monotone is False also ``"gelu"``, ``"silu"``, ``"mish"`` or any module.
        skip_connection: whether the main loss is added to what the network gives.
        dropout: share of hidden units that are dropped, in training mode.
        monotone: True by construction, ``"clamp"`` by clamping after outer steps, False for a free network.
        weight_norm: normalise the weights of each layer (Salimans & Kingma, NeurIPS 2016).
        context: see :class:`Context`.

    References:
        Navon et al., "Auxiliary Learning by Implicit Differentiation", ICLR 2021, section 4.1.

    Example:
        >>> import torch
        >>> from hyperopt_implicit.auxiliary import NonlinearCombiner
        >>> combiner = NonlinearCombiner(3, hidden_sizes=(8, 8))
        >>> losses = torch.rand(5, 3, requires_grad=True)
        >>> (gradient,) = torch.autograd.grad(combiner(losses), losses)
        >>> bool((gradient > 0).all())
        True
    """

    def __init__(
        self,
        tasks: int,
        *,
        main_task: int = 0,
        hidden_sizes: int | Sequence[int] = (16,),
        activation: str | nn.Module = "softplus",
        skip_connection: bool = True,
        dropout: float = 0.0,
        monotone: Monotone = True,
        weight_norm: bool = False,
        context: Context | None = None,
    ) -> None:
        hidden_sizes = _checked_sizes(hidden_sizes, "hidden_sizes")
        _check_dropout(dropout)
        super().__init__(
            tasks,
            hidden_sizes,
            nn.Linear,
            nn.Dropout(dropout),
            main_task=main_task,
            activation=activation,
            skip_connection=skip_connection,
            monotone=monotone,
            weight_norm=weight_norm,
            context=context,
        )


class ConvolutionalCombiner(_NetworkCombiner):
    """A convolutional network on loss images, for dense tasks: mean over the pixels of ℓ_main + f(ℓ₁, …, ℓ_T).

    It sees the losses of the pixels around each pixel, and so can trust a task here and not there.

    Args:
        tasks: how many tasks, the main one included.
        main_task: the place of the main task among them.
        channels: of the hidden layers; one number for a single layer.
        kernel_size: odd, of every layer; images keep their size, with zeros around them.
        activation: as in :class:`NonlinearCombiner`.
        skip_connection: whether the main loss is added to what the network gives.
        dropout: share of hidden channels that are dropped, in training mode.
        monotone: True by construction, ``"clamp"`` by clamping after outer steps, False for a free network.
        weight_norm: normalise the weights of each layer.
        context: shifts the channels of the first hidden layer; see :class:`Context`.

    References:
        Navon et al., "Auxiliary Learning by Implicit Differentiation", ICLR 2021, section 4.1.

    Example:
        >>> import torch
        >>> from hyperopt_implicit.auxiliary import ConvolutionalCombiner
        >>> ConvolutionalCombiner(2, channels=(4,))(torch.rand(3, 2, 8, 8)).shape
        torch.Size([])
    """

    dimensions = 4

    def __init__(
        self,
        tasks: int,
        *,
        main_task: int = 0,
        channels: int | Sequence[int] = (8,),
        kernel_size: int = 3,
        activation: str | nn.Module = "softplus",
        skip_connection: bool = True,
        dropout: float = 0.0,
        monotone: Monotone = True,
        weight_norm: bool = False,
        context: Context | None = None,
    ) -> None:
        channels = _checked_sizes(channels, "channels")
        _check_dropout(dropout)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise AuxiliaryError(f"kernel_size must be odd, so that images keep their size; got {kernel_size}.")
        super().__init__(
            tasks,
            channels,
            partial(nn.Conv2d, kernel_size=kernel_size, padding="same"),
            nn.Dropout2d(dropout),
            main_task=main_task,
            activation=activation,
            skip_connection=skip_connection,
            monotone=monotone,
            weight_norm=weight_norm,
            context=context,
        )


def _checked_sizes(sizes: int | Sequence[int], name: str) -> tuple[int, ...]:
    given = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    if not given or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in given):
        raise AuxiliaryError(f"{name} must hold at least one positive whole number; got {given!r}.")
    return given


def _check_dropout(dropout: float) -> None:
    if not 0.0 <= dropout < 1.0:
        raise AuxiliaryError(f"dropout must be a share of at least 0 and below 1; got {dropout!r}.")
