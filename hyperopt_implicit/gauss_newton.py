"""The Gauss-Newton matrix of a training loss, found without being told where the model ends and the loss begins.

The training loss is a function c(z, w, λ) of the model's outputs z(w) and, by way of regularisers, of the weights
themselves. Leaving out the curvature of the model keeps

    G = Jᵀ (∂²c/∂z²) J + Jᵀ ∂²c/∂z∂w + (∂²c/∂w∂z) J + ∂²c/∂w²,    J = ∂z/∂w,

which has no negative eigenvalue where c is convex in (z, w), whatever the model. z is taken where the loss calls the
model: each call's outputs are cut off from the weights, and J is multiplied by on its own (Schraudolph, "Fast Curvature
Matrix-Vector Products for Second-Order Gradient Descent", Neural Computation 2002).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hyperopt_implicit.errors import BackendError
from hyperopt_implicit.operators import Hessian, gradients, mean_training_loss, twice_differentiable
from hyperopt_implicit.randomness import random_states, replaying
from hyperopt_implicit.vectors import Params

if TYPE_CHECKING:
    from hyperopt_implicit.problem import BilevelProblem


class GaussNewton(Hessian):
    """G in the place of H; the mixed derivative with respect to λ is that of the whole loss.

    A product costs two backwards through the model and one through the loss; the first one also builds their graphs, at
    the cost of a forward and two backwards. Random layers draw the same masks there as for the mixed derivative.

    Args:
        problem: whose training loss.
        training_batches: the batches over which the loss is averaged, each with equal weight.
        lowered: the dtype to which autocast lowers the products of the loss; the model's own where None.

    Raises:
        BackendError: at the first product, where the training loss never calls the model itself, or feeds it with its
            own outputs, so that there is no z.
    """

    def __init__(
        self, problem: BilevelProblem, training_batches: Sequence[Any], lowered: torch.dtype | None = None
    ) -> None:
        self._problem, self._batches, self._lowered = problem, training_batches, lowered
        self._random = random_states(problem.device)
        self._parts: Composite | None = None
        super().__init__(problem, training_batches, lowered)

    def multiply_and_mix(self, vector: Params) -> Params:
        """G·vector; the mixed derivative is of another graph."""
        return self @ vector

    def __matmul__(self, vector: Params) -> Params:
        """G·vector."""
        self.products += 1
        if self._parts is None:
            with torch.enable_grad(), replaying(self._random, self._problem.device):
                params = {name: p.detach().requires_grad_() for name, p in self._problem.params.items()}
                hparams = {name: p.detach() for name, p in self._problem.hparams.items()}
                self._parts = Composite(self._problem, params, hparams, self._batches, self._lowered)
        product = self._parts.multiply([vector[name] for name in self._params])
        decays = self._decays
        return {
            name: x + decays[name] * vector[name] if name in decays else x
            for name, x in zip(self._params, product, strict=True)
        }


class Composite:
    """c(z(w), w) in two graphs: z over the weights, and the gradient of c over z and the weights.

    Args:
        problem: whose training loss.
        params: w, which requires grad.
        hparams: λ.
        batches: those over which the loss is averaged.
        lowered: the dtype of autocast, or None.
        buffers: to be used in the place of the model's; not changed.
        fixed: to be used in the place of the model's parameters that are not trained.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        params: Params,
        hparams: Params,
        batches: Sequence[Any],
        lowered: torch.dtype | None,
        buffers: Params | None = None,
        fixed: Params | None = None,
    ) -> None:
        self._weights = list(params.values())
        self._outputs: list[Tensor] = []  # z, with its graph over the weights
        self._cut: list[Tensor] = []  # z, where the graph of c begins
        handle = problem.model.register_forward_hook(lambda module, inputs, outputs: self._intercept(outputs))
        try:
            with twice_differentiable(problem):
                loss = mean_training_loss(problem, {**params, **(fixed or {})}, hparams, batches, lowered, buffers)
        finally:
            handle.remove()
        self._check()
        inputs = [*self._cut, *self._weights]
        self._slopes = list(gradients(loss, dict(enumerate(inputs)), create_graph=True).values())
        # Jᵀg, which is linear in g: differentiated with respect to g it gives J, without rules for forward mode
        self._cotangents = [torch.zeros_like(z).requires_grad_() for z in self._outputs]
        self._pulled = _pull_back(self._outputs, self._weights, self._cotangents, create_graph=True)

    def multiply(self, vector: list[Tensor]) -> list[Tensor]:
        """G·vector."""
        pushed = _pull_back(self._pulled, self._cotangents, vector)
        curved = _pull_back(self._slopes, [*self._cut, *self._weights], [*pushed, *vector])
        back = _pull_back(self._outputs, self._weights, curved[: len(pushed)])
        return [x + y for x, y in zip(back, curved[len(pushed) :], strict=True)]

    def _intercept(self, outputs: Any) -> Any:
        return pytree.tree_map_only(Tensor, self._cut_off, outputs)

    def _cut_off(self, z: Tensor) -> Tensor:
        if not z.requires_grad:
            return z
        self._outputs.append(z)
        self._cut.append(z.detach().requires_grad_())
        return self._cut[-1].clone()  # a loss may change it in place

    def _check(self) -> None:
        if not self._outputs:
            raise BackendError(
                "curvature='gauss_newton' takes the model's outputs from its calls in the training loss, and the "
                "training loss makes none that depends on the weights. Call the model itself there, model(x), not "
                "only parts of it, or use curvature='hessian'."
            )
        ones = [torch.ones_like(z) for z in self._outputs]
        fed_back = torch.autograd.grad(self._outputs, self._cut, ones, retain_graph=True, allow_unused=True)
        if any(x is not None for x in fed_back):
            raise BackendError(
                "curvature='gauss_newton' needs the model's outputs to depend on the weights alone; the training loss "
                "feeds the model with what an earlier call of it returned. Use curvature='hessian'."
            )


def _pull_back(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    along: Sequence[Tensor],
    *,
    create_graph: bool = False,
) -> list[Tensor]:
    """(∂outputs/∂inputs)ᵀ·along, zero where no output depends on an input; graphs are kept."""
    pairs = [(output, x) for output, x in zip(outputs, along, strict=True) if output.requires_grad]
    if not pairs:
        return [torch.zeros_like(x) for x in inputs]
    return list(
        torch.autograd.grad(
            [output for output, _ in pairs],
            list(inputs),
            [x for _, x in pairs],
            create_graph=create_graph,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    )
