"""The truth, computed the slow way: dense Hessians, one long graph, Newton's method. What fast code is compared with.

Everything here forms matrices of the size of the model, squared, and is meant for tests and for small problems in
float64. It shares nothing with the backends but the problem's two functional losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperopt_implicit.inner_loop import train_step
from hyperopt_implicit.operators import LinearOperator
from hyperopt_implicit.problem import BilevelProblem
from hyperopt_implicit.vectors import Params


def flatten(x: Params) -> Tensor:
    """All entries in one vector, in the order of the names, without their graph."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in x.values()]) if x else torch.zeros(0)


def unflatten(flat: Tensor, like: Params) -> Params:
    """The inverse of :func:`flatten`; the pieces are views of ``flat``."""
    pieces = flat.split([tensor.numel() for tensor in like.values()])
    return {name: piece.view(like[name].shape) for name, piece in zip(like, pieces, strict=True)}


class DenseOperator(LinearOperator):
    """A matrix [n, n] as a linear operator on vectors with n entries in all; counts its products.

    Example:
        >>> import torch
        >>> DenseOperator(2 * torch.eye(3)) @ {"w": torch.ones(3)}
        {'w': tensor([2., 2., 2.])}
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def __matmul__(self, vector: Params) -> Params:
        self.products += 1
        return unflatten(self.matrix @ flatten(vector), vector)


@dataclass(frozen=True)
class Derivatives:
    """Of the training loss at the model's weights: L, ∂L/∂w [n], H [n, n] and ∂²L/∂w∂λ [n, m]."""

    loss: Tensor
    gradient: Tensor
    hessian: Tensor
    mixed: Tensor


def dense_derivatives(problem: BilevelProblem, training_batches: Sequence[Any]) -> Derivatives:
    """First and second derivatives of the training loss averaged over batches, formed row by row; n backwards."""
    with torch.enable_grad():
        w, λ = _leaves(problem)
        params, hparams = unflatten(w, problem.params), unflatten(λ, problem.hparams)
        losses = [problem.functional_training_loss(params, hparams, batch) for batch in training_batches]
        loss = torch.stack(losses).mean()
        (gradient,) = torch.autograd.grad(loss, w, create_graph=True)
        rows = [
            torch.autograd.grad(g, [w, λ], retain_graph=True, allow_unused=True, materialize_grads=True)
            for g in gradient
        ]
    return Derivatives(
        loss=loss.detach(),
        gradient=gradient.detach(),
        hessian=torch.stack([row[0] for row in rows]),
        mixed=torch.stack([row[1] for row in rows]),
    )


def implicit_hypergradient(problem: BilevelProblem, training_batches: Sequence[Any], validation_batch: Any) -> Params:
    """∂F/∂λ − (∂²L/∂λ∂w) H⁺ ∂F/∂w at the model's present weights, with H formed and inverted on its range."""
    with torch.enable_grad():
        w, λ = _leaves(problem)
        params, hparams = unflatten(w, problem.params), unflatten(λ, problem.hparams)
        loss = problem.functional_validation_loss(params, hparams, validation_batch)
        v, direct = torch.autograd.grad(loss, [w, λ], allow_unused=True, materialize_grads=True)
    training = dense_derivatives(problem, training_batches)
    u = torch.linalg.pinv(training.hessian, hermitian=True) @ v
    return unflatten(direct - training.mixed.T @ u, problem.hparams)


def unrolled_hypergradient(problem: BilevelProblem, training_batches: Sequence[Any], validation_batch: Any) -> Params:
    """dF/dλ through one step of plain gradient descent a batch, from the model's present weights, in a single graph.

    The inner optimizer must be SGD without momentum; its learning rate and weight decay may be hyperparameters.
    """
    options = {**problem.optimizer.param_groups[0], **problem.hyperparameters("optimizer")}
    hparams = problem.hparams
    state = problem.inner_state()
    params = {name: p.requires_grad_() for name, p in state.params.items()}
    buffers = state.buffers
    with torch.enable_grad():
        for batch in training_batches:
            buffers = {name: b.clone() for name, b in buffers.items()}
            loss = problem.functional_training_loss(params, hparams, batch, buffers)
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True, allow_unused=True)
            params = {
                name: p if g is None else p - options["lr"] * (g + options["weight_decay"] * p)
                for (name, p), g in zip(params.items(), grads, strict=True)
            }
        loss = problem.functional_validation_loss(params, hparams, validation_batch, buffers)
        grads = torch.autograd.grad(loss, list(hparams.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(hparams, grads, strict=True))


def finite_differences(function: Callable[[], float], at: Params, *, step: float = 1e-3) -> Params:
    """The gradient of a function of live tensors, which are moved one entry at a time and put back.

    Four evaluations an entry: [f(x − 2h) − 8f(x − h) + 8f(x + h) − f(x + 2h)] / 12h, with an error of order h⁴.
    """
    gradient = {name: torch.zeros_like(x) for name, x in at.items()}
    for name, x in at.items():
        flat = x.detach().reshape(-1)
        for i in range(len(flat)):
            here = flat[i].item()
            for offset, weight in ((-2, 1.0), (-1, -8.0), (1, 8.0), (2, -1.0)):
                flat[i] = here + offset * step
                gradient[name].reshape(-1)[i] += weight * function() / (12.0 * step)
            flat[i] = here
    return gradient


def retrained_differences(problem: BilevelProblem, training_batches: Sequence[Any], validation_batch: Any) -> Params:
    """dF/dλ through plain training steps on a copy, by finite differences; what reaches F through buffers included."""
    twin = problem.copy()
    start = twin.inner_state()

    def trained() -> float:
        twin.load_inner_state(start)
        twin.sync_optimizer()
        for batch in training_batches:
            train_step(twin, batch, twin.hyperparameters.values())
        return float(twin.validation_loss(validation_batch))

    return finite_differences(trained, twin.hparams)


def _leaves(problem: BilevelProblem) -> tuple[Tensor, Tensor]:
    w, λ = flatten(problem.params), flatten(problem.hparams)
    return w.requires_grad_(), λ.to(w).requires_grad_()


@torch.no_grad()
def train_to_minimum(
    problem: BilevelProblem, training_batches: Sequence[Any], *, tolerance: float = 1e-13, max_steps: int = 100
) -> float:
    """Train the model, in place, until ‖∂L/∂w‖ ≤ tolerance: Newton's method with the negative part of H mirrored.

    Returns:
        The norm of the gradient that is left.
    """
    left = float("inf")
    for _ in range(max_steps):
        here = dense_derivatives(problem, training_batches)
        left = float(here.gradient.norm())
        if left <= tolerance:
            break
        eigenvalues, eigenvectors = torch.linalg.eigh(here.hessian)
        curvature = eigenvalues.abs().clamp(min=1e-10 * float(eigenvalues.abs().max()))
        step = eigenvectors @ ((eigenvectors.T @ here.gradient) / curvature)
        _descend(problem, training_batches, step, here)
    return left


def _descend(problem: BilevelProblem, training_batches: Sequence[Any], step: Tensor, here: Derivatives) -> None:
    """w ← w − t·step with the first t of 1, ½, ¼, … that lowers the loss, or else the gradient."""
    start = flatten(problem.params).clone()
    for halvings in range(30):
        for name, x in unflatten(start - step * 0.5**halvings, problem.params).items():
            problem.params[name].copy_(x)
        losses = [
            problem.functional_training_loss(problem.params, problem.hparams, batch) for batch in training_batches
        ]
        if torch.stack(losses).mean() <= here.loss + 1e-14 * here.loss.abs():
            return
