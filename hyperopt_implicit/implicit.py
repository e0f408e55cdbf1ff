"""The implicit function theorem, written once.

Every backend that rests on it derives from :class:`ImplicitBackend` and writes one method, ``solve``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch

from hyperopt_implicit.backend import Backend, Hypergradient, State, Status
from hyperopt_implicit.compiled import compiled
from hyperopt_implicit.gauss_newton import GaussNewton
from hyperopt_implicit.low_precision import (
    LowPrecision,
    Refinement,
    can_lower,
    check_bfloat16,
    refined,
    speedup_or_warning,
)
from hyperopt_implicit.members_solver import SolveMembers
from hyperopt_implicit.operators import Damped, Hessian, LinearOperator, LossHessian, validation_gradients
from hyperopt_implicit.vectors import Params, add, clone, is_finite, norm, same_shapes, zeros_like

if TYPE_CHECKING:
    from pydantic import Field

    from hyperopt_implicit.problem import BilevelProblem


@dataclass(frozen=True)
class Solution:
    """What a solver found for A u = v.

    Attributes:
        value: u.
        status: how the solver ended.
        iterations: its terms or iterations.
        residual: ‖Au − v‖/‖v‖; None where it was not measured.
        state: what the solver wants to be given next time.
    """

    value: Params
    status: Status
    iterations: int
    residual: float | None
    state: State = field(default_factory=dict)


Solve = Callable[[LinearOperator, Params, State], Solution]


def first_iterate(operator: LinearOperator, vector: Params, last: Params | None) -> tuple[Params, Params, float]:
    """Where an iterative solver begins: u, v − Au, and ‖Au‖/‖u‖, a bound from below on the largest eigenvalue.

    u is the last outer step's solution where that is nearer than zero, at the price of one product; else it is zero.
    """
    if last is not None and same_shapes(last, vector) and norm(last) > 0.0:
        product = operator @ last
        residual = add(vector, product, -1.0)
        if norm(residual) < norm(vector):
            return clone(last), residual, norm(product) / norm(last)
    return zeros_like(vector), clone(vector), 0.0


@dataclass(frozen=True)
class ImplicitBackend(Backend):
    """dF/dλ = ∂F/∂λ − (∂²L/∂λ∂w) u with A u = v, at the model's present weights (Lorraine et al., AISTATS 2020, eq. 3).

    A is the Hessian H of the training loss, or its Gauss-Newton matrix, with ``damping`` on the diagonal. The theorem
    holds with A = H where ∂L/∂w = 0 and H is invertible; away from a stationary point it gives the gradient of what
    further training would arrive at, to first order.

    ``precision="bfloat16"`` takes the products under autocast, for a float32 model on a device that multiplies in
    bfloat16; a model in float64 stays in it, and so do F and ∂F/∂w in the model's own dtype. With ``refinements`` above
    0, one float32 product, or two where a solution is carried from the last call, correct v for what rounding does to
    the product, tell the residual of the float32 system and, where rounding is what is left of it, have it solved anew
    up to so many times; the mixed derivative is then in float32 as well. It pays from about ten products a call. With 0
    there is no float32 product, the error has a floor of some tenths of a percent (a few percent for convolutions), and
    the residual is that of the system in bfloat16. ``"auto"`` is 1, and 0 for one-loop backends, whose few products a
    float32 one would outweigh; where products are with batches in turn, it is always 0. ``"bfloat16_throughout"`` takes
    F and ∂F/∂w under autocast as well, which is cheaper where validation batches are large; the F reported is then off
    by about 10⁻³ of it.

    ``compile=True`` traces the product once for each kind of batch, cuts the trace where it depends on the vector, and
    compiles both halves: 4 to 34 s of processor time each time where it was measured, which paid after 3,000 to 30,000
    products, and soonest in large models. It gains most with bfloat16. Where the loss cannot be traced, or the compiled
    product is not faster, a warning says so and the products are as without it. A number that the loss computes outside
    of tensors (a step count, a schedule) is a constant of the trace. The gradient is compared with that of autograd at
    calls 1, 2, 4, 8 and 16 with a kind of batch and at every 20th, and a difference ends compiling with a warning; but
    from a change until then, for at most 20 calls, results are those of the old number. Make such a number part of
    the batch, or a buffer of the model, as a tensor.
    """

    takes_complex_weights: ClassVar[bool] = False

    damping: Annotated[float, Field(ge=0, description="δ, added to the diagonal of the curvature")] = field(
        default=0.0, kw_only=True
    )
    curvature: Annotated[
        Literal["hessian", "gauss_newton"],
        Field(
            description="the matrix that is solved with; 'gauss_newton' has no negative eigenvalues for convex losses"
        ),
    ] = field(default="hessian", kw_only=True)
    precision: Annotated[
        Literal["full", "bfloat16", "bfloat16_throughout"],
        Field(
            description="of the products; 'bfloat16' is faster where the device has it; 'bfloat16_throughout': of F too"
        ),
    ] = field(default="full", kw_only=True, repr=False)
    refinements: Annotated[
        Literal["auto"] | Annotated[int, Field(ge=0)],
        Field(description="with bfloat16, solves against float32 residuals at most; 'auto' is 1, and 0 in one loop"),
    ] = field(default="auto", kw_only=True, repr=False)
    compile: Annotated[
        bool,
        Field(
            description="compile the products; takes seconds to tens of seconds, and pays after thousands of products"
        ),
    ] = field(default=False, kw_only=True, repr=False)

    def check(self, problem: BilevelProblem) -> None:
        super().check(problem)
        if self.precision != "full":
            check_bfloat16(problem)

    @abstractmethod
    def solve(self, operator: LinearOperator, vector: Params, state: State, /) -> Solution:
        """Solve A u = v, multiplying by A only; neither ``vector`` nor a product may be changed in place."""

    def solver(self, problem: BilevelProblem) -> Solve:
        """The solver for a problem: ``solve``, unless a method wants to know more than A and v."""
        return self.solve

    def members_solver(self, problems: Sequence[BilevelProblem]) -> SolveMembers | None:
        """The solver for many problems at once, by the rules of ``solve`` for each; None where there is none.

        A class that changes how it solves changes this one with it, or else a population runs it one by one.
        """
        return None

    def hypergradient(
        self,
        problem: BilevelProblem,
        training_batches: Sequence[Any],
        validation_batch: Any,
        state: State,
        /,
    ) -> Hypergradient:
        low = self.precision != "full" and can_lower(problem)
        throughout = torch.bfloat16 if low and self.precision == "bfloat16_throughout" else None
        validation_loss, vector, direct = validation_gradients(problem, validation_batch, lowered=throughout)
        solve, speedup = self.solver(problem), math.nan
        if low:
            speedup = speedup_or_warning(problem, training_batches, state, self._kind)
        hessian = self.linearise(problem, training_batches)
        if isinstance(hessian, LowPrecision):
            tolerance = getattr(self, "tolerance", 0.0)
            solve = refined(solve, hessian, Refinement(self.damping, self._refinements(), tolerance, speedup))
        return self.differentiate(hessian, vector, direct, validation_loss, state, solve)

    def linearise(self, problem: BilevelProblem, training_batches: Sequence[Any]) -> LossHessian:
        """The curvature that was asked for, without its damping, of the training loss averaged over batches."""
        kind = self._kind
        if self.precision != "full" and can_lower(problem):
            return LowPrecision(problem, lambda dtype: self._curvature(kind, problem, training_batches, dtype))
        return self._curvature(kind, problem, training_batches, None)

    @property
    def _kind(self) -> type[Hessian]:
        return GaussNewton if self.curvature == "gauss_newton" else Hessian

    def _curvature(
        self, kind: type[Hessian], problem: BilevelProblem, batches: Sequence[Any], lowered: torch.dtype | None
    ) -> LossHessian:
        if not self.compile or (lowered is None and self.precision != "full"):  # float32 products beside others are few
            return kind(problem, batches, lowered)
        return compiled(
            problem, batches, lowered, lambda: kind(problem, batches, lowered), gauss_newton=kind is GaussNewton
        )

    def _refinements(self) -> int:
        if self.refinements != "auto":
            return self.refinements
        return 0 if self.card is not None and self.card.family == "one-loop" else 1

    def damped(self, operator: LinearOperator) -> LinearOperator:
        """A, from H or from the Gauss-Newton matrix."""
        return Damped(operator, self.damping) if self.damping else operator

    def differentiate(
        self,
        hessian: LossHessian,
        vector: Params,
        direct: Params,
        validation_loss: float,
        state: State,
        solve: Solve | None = None,
    ) -> Hypergradient:
        """The theorem itself, from v = ∂F/∂w, the direct term ∂F/∂λ, and H with its mixed derivative."""
        size = norm(vector)
        if not math.isfinite(size):  # a product or a mixed term that is not finite is found below
            solution = Solution(vector, Status.NON_FINITE, 0, float("nan"), state)
            gradients = direct
        elif size == 0.0:  # F does not depend on w here: nothing to solve
            solution = Solution(vector, Status.CONVERGED, 0, 0.0, state)
            gradients = direct
        else:
            with torch.no_grad():
                solution = (solve or self.solve)(self.damped(hessian), vector, state)
            gradients = add(direct, hessian.mixed(solution.value), -1.0)
        return Hypergradient(
            gradients=gradients,
            status=solution.status if is_finite(gradients) else Status.NON_FINITE,
            iterations=solution.iterations,
            residual=solution.residual,
            hvps=hessian.products,
            validation_loss=validation_loss,
            training_loss=hessian.loss,
            state=solution.state,
        )
