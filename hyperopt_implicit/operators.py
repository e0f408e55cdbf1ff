"""Curvature as a linear operator: linearise the training gradient once, multiply many times.

The Hessian is never formed here. Its products run backward through the stored graph of the training gradient
(reverse over reverse), which covers the most operators; the same graph gives the mixed derivative with respect to λ.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from hyperopt_implicit.vectors import Params, add

if TYPE_CHECKING:
    from hyperopt_implicit.problem import BilevelProblem


Name = TypeVar("Name")


class LinearOperator(ABC):
    """A symmetric linear map on vectors that are shaped like the model's parameters; ``operator @ vector``.

    Attributes:
        products: how often it was multiplied.
    """

    products: int = 0

    @abstractmethod
    def __matmul__(self, vector: Params) -> Params:
        """The product, not to be changed in place: two of its tensors may be the same memory."""

    def multiply_and_mix(self, vector: Params) -> Params:
        """The product, of which the mixed derivative with the same vector comes at no further backward.

        Where an operator can have both from one backward, it keeps the mixed derivative for the ``mixed`` that follows;
        to others it is a product as any.
        """
        return self @ vector


class Damped(LinearOperator):
    """A + δI."""

    def __init__(self, operator: LinearOperator, damping: float) -> None:
        self._operator, self._damping = operator, damping

    def __matmul__(self, vector: Params) -> Params:
        self.products += 1
        return add(self._operator @ vector, vector, self._damping)

    def multiply_and_mix(self, vector: Params) -> Params:
        self.products += 1
        return add(self._operator.multiply_and_mix(vector), vector, self._damping)


def twice_differentiable(problem: BilevelProblem) -> AbstractContextManager[object]:
    """Inside, operators that have a twice differentiable form use it: unfused attention and weight norm."""
    if not problem.has_weight_norm:  # a mode is felt by every operator of the loss, so only where it is needed
        return sdpa_kernel(SDPBackend.MATH)
    stack = ExitStack()
    stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    stack.enter_context(_UnfusedWeightNorm())
    return stack


class _UnfusedWeightNorm(TorchFunctionMode):
    """``torch._weight_norm`` as g·v/‖v‖: its own second derivative is wrong, and silently so (torch 2.13)."""

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch._weight_norm:
            return _weight_norm(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def undifferentiable_operator(error: BaseException) -> str | None:
    """The operator that torch says it cannot differentiate (again), where that is what an error is about."""
    found = re.search(r"derivative for '?(?:aten::)?(\w+?)'? is not implemented", str(error))
    return found.group(1) if found is not None else None


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


class LossHessian(LinearOperator):
    """H = ∂²L/∂w² of a loss that is given with its graph.

    Building it costs one backward that keeps its graph; a product costs one more backward through that graph (about one
    forward and backward of the loss for dense layers, nearly three for convolutions). Memory does not grow with the
    number of products. Random layers drew once, so that all products see the same masks.

    Args:
        loss: L, a scalar.
        params: w, the tensors of the graph with respect to which H is taken.
        hparams: λ, those of the mixed derivative.
        decays: what the inner optimizer adds to ∂L/∂w, by parameter, as a multiple of w; part of H.

    Attributes:
        loss: L, a Python number.
        gradient: ∂L/∂w.
    """

    def __init__(
        self, loss: Tensor, params: Params, hparams: Params, decays: Mapping[str, float] | None = None
    ) -> None:
        self._params, self._hparams, self._decays = params, hparams, decays or {}
        gradient = gradients(loss, params, create_graph=True)
        self.loss = float(loss.detach())
        self.gradient = {name: g.detach() for name, g in gradient.items()}
        # a parameter on which L depends linearly, or not at all, has a gradient without a graph: its row of H is zero
        self._curved = [name for name, g in gradient.items() if g.requires_grad]
        self._outputs = [gradient[name] for name in self._curved]
        self._mixed: tuple[Params, Params] | None = None

    def __matmul__(self, vector: Params) -> Params:
        """H·vector."""
        self.products += 1
        return self._decayed(self._pull_back(vector, list(self._params.values())), vector)

    def multiply_and_mix(self, vector: Params) -> Params:
        """H·vector; :meth:`mixed` of the same vector, not changed in between, is then known."""
        self.products += 1
        grads = self._pull_back(vector, [*self._params.values(), *self._hparams.values()])
        self._mixed = vector, dict(zip(self._hparams, grads[len(self._params) :], strict=True))
        return self._decayed(grads[: len(self._params)], vector)

    def mixed(self, vector: Params) -> Params:
        """(∂²L/∂λ∂w)·vector, shaped like λ."""
        if self._mixed is not None and self._mixed[0] is vector:
            return self._mixed[1]
        return dict(zip(self._hparams, self._pull_back(vector, list(self._hparams.values())), strict=True))

    def _decayed(self, product: Sequence[Tensor], vector: Params) -> Params:
        found = dict(zip(self._params, product, strict=True))
        for name, decay in self._decays.items():
            found[name] = found[name] + decay * vector[name]
        return found

    def _pull_back(self, vector: Params, onto: list[Tensor]) -> Sequence[Tensor]:
        if not self._outputs or not onto:
            return [torch.zeros_like(x) for x in onto]
        return torch.autograd.grad(
            self._outputs,
            onto,
            [vector[name] for name in self._curved],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )


class Hessian(LossHessian):
    """H = ∂²L/∂w² of a problem at its present weights, of the training loss averaged over batches.

    A weight decay that the inner optimizer couples to the gradient is part of what it minimises, and so of H. What a
    product costs is told at :class:`LossHessian`; building this one costs a forward as well.

    Args:
        problem: whose training loss.
        training_batches: the batches over which the loss is averaged, each with equal weight.
        lowered: the dtype to which autocast lowers the products of the loss; the model's own where None.
    """

    def __init__(
        self, problem: BilevelProblem, training_batches: Sequence[Any], lowered: torch.dtype | None = None
    ) -> None:
        params = {name: p.detach().requires_grad_() for name, p in problem.params.items()}
        hparams = {name: p.detach().requires_grad_() for name, p in problem.hparams.items()}
        with torch.enable_grad(), twice_differentiable(problem):  # the caller may be inside torch.no_grad()
            loss = mean_training_loss(problem, params, hparams, training_batches, lowered)
            super().__init__(loss, params, hparams, problem.weight_decays)


def mean_training_loss(
    problem: BilevelProblem,
    params: Params,
    hparams: Params,
    batches: Sequence[Any],
    lowered: torch.dtype | None = None,
    buffers: Params | None = None,
) -> Tensor:
    """L(w, λ) averaged over batches, each with equal weight; with its graph.

    Args:
        problem: whose training loss.
        params: w.
        hparams: λ.
        batches: at least one.
        lowered: the dtype to which autocast lowers products; the model's own where None.
        buffers: to be used in the place of the model's; not changed.
    """
    with nullcontext() if lowered is None else torch.autocast(problem.device.type, lowered):
        losses = [
            problem.functional_training_loss(
                params, hparams, batch, None if buffers is None else {name: b.clone() for name, b in buffers.items()}
            )
            for batch in batches
        ]
    return losses[0] if len(losses) == 1 else torch.stack(losses).mean()


def validation_gradients(
    problem: BilevelProblem,
    validation_batch: Any,
    at: Params | None = None,
    buffers: Params | None = None,
    lowered: torch.dtype | None = None,
) -> tuple[float, Params, Params]:
    """F, v = ∂F/∂w and the direct term ∂F/∂λ, at the weights ``at`` or else the model's present ones.

    Products of F are lowered by autocast to the dtype ``lowered`` where that is given.

    Autograd may hand out one tensor for two inputs that only enter as a sum, so none of them may be changed in place.
    """
    params = {name: p.detach().requires_grad_() for name, p in (problem.params if at is None else at).items()}
    hparams = {name: p.detach().requires_grad_() for name, p in problem.hparams.items()}
    inputs = {("w", name): p for name, p in params.items()} | {("λ", name): p for name, p in hparams.items()}
    with torch.enable_grad():
        with nullcontext() if lowered is None else torch.autocast(problem.device.type, lowered):
            loss = problem.functional_validation_loss(params, hparams, validation_batch, buffers)
        derivatives = gradients(loss, inputs, create_graph=False)
    return (
        float(loss.detach()),
        {name: derivatives["w", name] for name in params},
        {name: derivatives["λ", name] for name in hparams},
    )


def gradients(
    loss: Tensor, inputs: dict[Name, Tensor], *, create_graph: bool, retain_graph: bool | None = None
) -> dict[Name, Tensor]:
    """∂loss/∂inputs, zero where the loss does not depend on an input; graphs are kept as by autograd.grad."""
    if not loss.requires_grad:
        return {name: torch.zeros_like(x) for name, x in inputs.items()}
    grads = torch.autograd.grad(
        loss,
        list(inputs.values()),
        create_graph=create_graph,
        retain_graph=retain_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(inputs, grads, strict=True))
