"""What the one-loop backends share: a solution u of A u = v that moves a little at every call, and batches in turn.

Other implicit backends solve A u = v at each outer step. Here u is carried in the state and follows weights,
hyperparameters and batches as they move, at one or a few products a call. What lives here is the state that is shared
(``OneLoopBackend``), what one product tells of u (``measured``), and curvature whose every product is of another batch
(``InTurn``). How far u moves, and on which samples, is in each backend's file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor

from hyperopt_implicit.backend import State, Status
from hyperopt_implicit.implicit import ImplicitBackend, Solution
from hyperopt_implicit.members_solver import dots, norms
from hyperopt_implicit.operators import LinearOperator, LossHessian
from hyperopt_implicit.spectrum import largest_eigenvalue
from hyperopt_implicit.vectors import (
    Params,
    add,
    clone,
    dot,
    is_finite,
    norm,
    precision,
    same_shapes,
    scale_,
    zeros_like,
)

if TYPE_CHECKING:
    from pydantic import Field

    from hyperopt_implicit.problem import BilevelProblem

LIMIT = 10.0
"""The relative residual above which u is lost: ten times worse than u = 0. Sampling alone can take it above 1."""

_ROUNDING = 100.0  # residual, in units of rounding, below which nothing is left to solve
_NULL = 8.0  # curvature, in units of rounding, that cannot be told from none


@dataclass(frozen=True)
class OneLoopBackend(ImplicitBackend):
    """u moves by steps u ← u − ρ(A u − v) from where the last call left it; a subclass says how many, and on which A.

    The state holds ``solution``, the u to begin with, and what ``step_size="auto"`` knows of the spectrum. Where there
    is no u yet, or one of other shapes, it begins at ρ·v: one step from zero, which takes no product.
    """

    step_size: Annotated[
        Literal["auto"] | Annotated[float, Field(gt=0)],
        Field(description="ρ; 'auto' takes the inverse of the largest eigenvalue, estimated as training moves"),
    ] = "auto"

    def linearise(self, problem: BilevelProblem, training_batches: Sequence[Any]) -> LossHessian:
        if self.batches == "averaged" or len(training_batches) == 1:
            return super().linearise(problem, training_batches)
        one = super().linearise
        return InTurn(lambda batch: one(problem, [batch]), training_batches)

    def rate(self, operator: LinearOperator, vector: Params, state: State) -> tuple[float, State]:
        """ρ, and what is known of the spectrum, to be carried."""
        if self.step_size != "auto":
            return self.step_size, {}
        largest, spectrum = largest_eigenvalue(operator, vector, state)
        return 1.0 / largest if largest > 0.0 else 1.0, spectrum

    def start(self, vector: Params, state: State, rate: float) -> Params:
        """The u that was carried, or ρ·v; not to be changed in place."""
        last: Params = state.get("solution", {})
        if same_shapes(last, vector) and is_finite(last):
            return last
        return scale_(clone(vector), rate)


@dataclass(frozen=True)
class Measured:
    """What one product A u tells of u.

    Attributes:
        solution: u.
        residual: v − Au, the way to go.
        size: ‖v − Au‖/‖v‖.
        status: ``converged`` at the level of rounding, ``negative curvature`` where ⟨u, Au⟩ < 0, ``diverged`` where the
            size is above ``LIMIT``, ``truncated`` otherwise.
        lost: whether u is too far off to go on from.
    """

    solution: Params
    residual: Params
    size: float
    status: Status
    lost: bool

    def report(self, iterations: int, spectrum: State, carried: Params | None = None) -> Solution:
        """The solution to return: u, or zero where u has failed and is worse than that; a lost one is not carried."""
        value, size = self.solution, self.size
        if self.status.failed and size > 1.0:  # never so where it is NaN
            value, size = zeros_like(value), 1.0
        state = spectrum if self.lost or carried is None else {**spectrum, "solution": carried}
        return Solution(value, self.status, iterations, size, state)


def measured(solution: Params, product: Params, vector: Params, *, grown: bool = False) -> Measured:
    """How good u is, from A u and v; ``grown`` where the iteration behind it is known to have grown beyond bounds."""
    residual = add(vector, product, -1.0)
    size, length = norm(residual) / norm(vector), norm(solution) * norm(product)
    status, lost = _judged(size, dot(solution, product), length, precision(vector), grown)
    return Measured(solution, residual, size, status, lost)


@dataclass(frozen=True)
class MeasuredMember:
    """What :class:`Measured` tells of one of many: size, status, and whether it is lost."""

    size: float
    status: Status
    lost: bool


def members_measured(solutions: Tensor, products: Tensor, vectors: Tensor) -> list[MeasuredMember]:
    """How good the u of each member is, from A u and v, a row a member; of one without v, zero."""
    found, eps = [], torch.finfo(vectors.dtype).eps
    sizes, lengths = norms(vectors - products), norms(vectors)
    curvatures, beside = dots(solutions, products), zip(norms(solutions), norms(products), strict=True)
    for size, length, curvature, (u, au) in zip(sizes, lengths, curvatures, beside, strict=True):
        relative = size / length if length else 0.0
        found.append(MeasuredMember(relative, *_judged(relative, curvature, u * au, eps, False)))
    return found


def _judged(size: float, curvature: float, length: float, rounding: float, grown: bool) -> tuple[Status, bool]:
    lost = grown or not size <= LIMIT
    if not math.isfinite(size):
        return Status.NON_FINITE, lost
    if curvature < -_NULL * rounding * length:
        return Status.NEGATIVE_CURVATURE, lost
    if lost:
        return Status.DIVERGED, lost
    return (Status.CONVERGED if size <= _ROUNDING * rounding else Status.TRUNCATED), lost


class InTurn(LossHessian):
    """The curvature of one batch after another: each product is with the next of them, from the first on, in a ring.

    One graph is held at a time, and built anew at every product. The mixed derivative is that of the last product's
    batch. Random layers draw once for each look at a batch.

    Args:
        linearise: makes the curvature of one batch.
        batches: at least one.

    Attributes:
        loss: L, averaged over the looks so far.
    """

    def __init__(self, linearise: Callable[[Any], LossHessian], batches: Sequence[Any]) -> None:
        self._linearise, self._batches = linearise, batches
        self._look()
        self.loss = self._current.loss

    def __matmul__(self, vector: Params) -> Params:
        """A·vector, on the next batch."""
        self._turn()
        return self._current @ vector

    def multiply_and_mix(self, vector: Params) -> Params:
        """A·vector and the mixed derivative, on the next batch."""
        self._turn()
        return self._current.multiply_and_mix(vector)

    def mixed(self, vector: Params) -> Params:
        """(∂²L/∂λ∂w)·vector, on the batch of the last product."""
        return self._current.mixed(vector)

    def _turn(self) -> None:
        if self.products:
            del self._current  # or its graph would be held while the next one is built
            self._look()
            self.loss += (self._current.loss - self.loss) / (self.products + 1)
        self.products += 1

    def _look(self) -> None:
        self._current = self._linearise(self._batches[self.products % len(self._batches)])
        self.gradient = self._current.gradient
