"""Newton's method for the inner problem: how weights at a minimum of the training loss are found to rounding.

Nothing is changed in place: it goes from weights to weights. What is done with a minimum is told elsewhere: in
``minimizer.py``, which differentiates it, and in ``diagnostics/``, which takes finite differences of it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperopt_implicit.backend import get_backend
from hyperopt_implicit.distributed import first_decides
from hyperopt_implicit.implicit import ImplicitBackend
from hyperopt_implicit.operators import LinearOperator, LossHessian, mean_training_loss, twice_differentiable
from hyperopt_implicit.problem import BilevelProblem
from hyperopt_implicit.vectors import Params, add, clone, norm


@dataclass(frozen=True)
class Descent:
    """Where Newton's method arrived.

    Attributes:
        params: the weights.
        hessian: H there, with the loss and its gradient.
        steps: how many were taken.
    """

    params: Params
    hessian: LossHessian
    steps: int

    @property
    def gradient_norm(self) -> float:
        """‖∂L/∂w‖ that is left."""
        return norm(self.hessian.gradient)


def inner_objective(problem: BilevelProblem, params: Params, hparams: Params, batches: Sequence[Any]) -> Tensor:
    """What inner training minimises: L averaged over batches, and ½·decay·‖w‖² of the optimizer's coupled decay."""
    loss = mean_training_loss(problem, params, hparams, batches)
    return loss + _penalty(params, problem.weight_decays)


def _penalty(params: Params, decays: Mapping[str, float]) -> Tensor | float:
    return sum((0.5 * decay * params[name].square().sum() for name, decay in decays.items()), 0.0)


def inner_hessian(problem: BilevelProblem, params: Params, hparams: Params, batches: Sequence[Any]) -> LossHessian:
    """H of :func:`inner_objective` at any weights and hyperparameters, without a graph to either."""
    w = {name: p.detach().requires_grad_() for name, p in params.items()}
    fixed = {name: p.detach() for name, p in hparams.items()}
    with torch.enable_grad(), twice_differentiable(problem):
        return LossHessian(inner_objective(problem, w, fixed, batches), w, {})


def newton(
    hessian_at: Callable[[Params], LossHessian],
    start: Params,
    *,
    target: float,
    scale: float = 1.0,
    max_steps: int = 200,
    seconds: float = math.inf,
) -> Descent:
    """Newton's method with conjugate gradients and a line search on the loss or its gradient.

    A step solves its system to a relative residual of ‖∂L/∂w‖/scale (0.1 at most), so that convergence is quadratic
    at the end and cheap before. It stops where the gradient is down to ``target``, falls no further by rounding, or no
    step lowers loss or gradient.

    Args:
        hessian_at: H at given weights, with the loss and its gradient.
        start: weights to begin with; not changed.
        target: ‖∂L/∂w‖ to stop at.
        scale: the gradient that counts as large.
        max_steps: Newton steps at most.
        seconds: time after which it is given up.
    """
    started, steps, stalled = time.perf_counter(), 0, 0
    params, hessian = clone({name: p.detach() for name, p in start.items()}), hessian_at(start)
    size = norm(hessian.gradient)
    while size > target and steps < max_steps and stalled < 3:
        if not first_decides(time.perf_counter() - started < seconds):
            break
        step = _newton_step(hessian, hessian.gradient, accuracy=min(0.1, size / (scale or 1.0)))
        for halvings in range(12):
            tried = add(params, step, -(0.5**halvings))
            trial = hessian_at(tried)
            found = norm(trial.gradient)
            if trial.loss < hessian.loss or found < size:
                break
        else:
            break
        falls = found < 0.7 * size or trial.loss < hessian.loss - 1e-12 * abs(hessian.loss)
        stalled = 0 if falls else stalled + 1
        params, hessian, size, steps = tried, trial, found, steps + 1
    return Descent(params, hessian, steps)


def conjugate_gradients(tolerance: float, max_iterations: int) -> ImplicitBackend:
    """The backend ``cg``, from zero every time."""
    return dataclasses.replace(_conjugate_gradients(), tolerance=tolerance, max_iterations=max_iterations)  # type: ignore[call-arg]


@functools.cache  # to find it among the entry points takes longer than to solve a small system
def _conjugate_gradients() -> ImplicitBackend:
    solver = get_backend("cg", warm_start=False)
    assert isinstance(solver, ImplicitBackend)
    return solver


@torch.no_grad()
def _newton_step(hessian: LinearOperator, gradient: Params, accuracy: float) -> Params:
    """H⁻¹ ∂L/∂w as far as H curves upwards; the gradient itself where it does not at once."""
    solution = conjugate_gradients(max(accuracy, 1e-8), 250).solve(hessian, gradient, {})
    return solution.value if solution.iterations > 0 else clone(gradient)
