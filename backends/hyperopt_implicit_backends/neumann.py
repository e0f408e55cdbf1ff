"""``neumann``: the inverse Hessian as a truncated Neumann series."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from hyperopt_implicit.backend import Card, State, Status
from hyperopt_implicit.implicit import ImplicitBackend, Solution
from hyperopt_implicit.members_solver import (
    MembersOperator,
    MembersSolution,
    SolveMembers,
    chosen,
    largest_eigenvalues,
    norms,
    weights,
)
from hyperopt_implicit.operators import LinearOperator
from hyperopt_implicit.spectrum import largest_eigenvalue
from hyperopt_implicit.vectors import Params, add_, clone, dot, norm, precision, zeros_like

if TYPE_CHECKING:
    from hyperopt_implicit.problem import BilevelProblem

_ROUNDING = 1.0 + 1e-6  # growth of the residual that float32 rounding alone can cause


@dataclass(frozen=True)
class Neumann(ImplicitBackend):
    """Truncated Neumann series: fixed cost, a bias that shrinks geometrically.

    u_K = α Σ_{k<K} (I − αA)^k v, which converges to A⁻¹v where A is positive definite and 0 < α < 2/λ_max, with error
    at most (1 − α·λ_min)^K for α ≤ 1/λ_max. Stopping early damps the directions of small curvature, which is why few
    terms behave well far from convergence.

    With ``step_size="auto"``, α = 1/λ_max with λ_max from power iteration: eight products at the first call, one at
    each call after that, carried from step to step so that it follows the training; where it was underestimated so far
    that the series would grow, α is lowered on the way at no further cost.

    The residual after K terms is (I − αA)^K v and is known exactly from the K-th product. It can only shrink while A is
    positive semi-definite and α < 2/λ_max, so the first growth ends the series: the best iterate is returned with
    status ``diverged`` (α too large) or ``negative curvature``.

    Cost: ``terms`` products, plus those of the power iteration; memory for three vectors. The last product only
    measures the residual; ``measure_residual=False`` saves it, and reports the residual before the last term, which is
    larger.

    References:
        Lorraine, Vicol, Duvenaud, "Optimizing Millions of Hyperparameters by Implicit Differentiation", AISTATS 2020,
            equation 5.
        Navon et al., "Auxiliary Learning by Implicit Differentiation", ICLR 2021, algorithm 1.

    Example:
        >>> import hyperopt_implicit as hi
        >>> hi.get_backend({"name": "neumann", "terms": 20, "step_size": 0.1})
        Neumann(damping=0.0, curvature='hessian', terms=20, step_size=0.1, tolerance=0.0, measure_residual=True)
    """

    terms: Annotated[int, Field(ge=1, description="number of terms K of the series")] = 10
    step_size: Annotated[
        Literal["auto"] | Annotated[float, Field(gt=0)],
        Field(description="α; 'auto' takes the inverse of the largest eigenvalue, estimated as training moves"),
    ] = "auto"
    tolerance: Annotated[float, Field(ge=0, description="stop early at this relative residual")] = 0.0
    measure_residual: Annotated[
        bool, Field(description="spend the last product on measuring the residual; without, it is one term behind")
    ] = True

    card: ClassVar[Card] = Card(
        family="implicit",
        gives="a truncated series; the error falls like (1 − λ_min/λ_max)^K",
        cost="K products (K = terms), 1 more for the step size",
        memory="3",
        conditions="A positive definite, α < 2/λ_max; few terms forgive the rest",
        use="nothing is known yet; deep networks",
        paper="Lorraine et al. 2020",
    )

    def solve(self, operator: LinearOperator, vector: Params, state: State, /) -> Solution:
        if self.step_size == "auto":
            largest, state = largest_eigenvalue(operator, vector, state)
            step_size = 1.0 / largest if largest > 0.0 else 1.0
        else:
            step_size = self.step_size
        solution, residual = zeros_like(vector), clone(vector)
        start = size = norm(residual)
        target = max(self.tolerance, precision(vector)) * start
        status, terms = Status.TRUNCATED, 0
        while terms < self.terms and size > target:
            if terms == self.terms - 1 and not self.measure_residual:
                add_(solution, residual, step_size)
                terms += 1
                break
            product = operator @ residual
            add_(residual, product, -step_size)
            length = norm(residual)
            if not length < size:  # never so while A is positive definite and α < 2/λ_max: look before going on
                add_(residual, product, step_size)
                status, step_size = self._cause_of_growth(residual, product, step_size, length <= size * _ROUNDING)
                if status is not Status.TRUNCATED:
                    break
                add_(residual, product, -step_size)
                length = norm(residual)
            # u ← u + α·(r of before), which r − αAr has overwritten; not earlier, for a step taken back leaves errors
            add_(add_(solution, residual, step_size), product, step_size**2)
            del product  # or it would be held, beside the next one, while that is computed
            size = length
            terms += 1
        if status is Status.TRUNCATED and size <= target:
            status = Status.CONVERGED
        return Solution(solution, status, terms, size / start, state)

    def _cause_of_growth(
        self, residual: Params, product: Params, step_size: float, harmless: bool
    ) -> tuple[Status, float]:
        """Why the next residual is not shorter, and the step size to go on with where the status is ``truncated``."""
        curvature, squared = dot(residual, product), dot(product, product)
        if not squared < float("inf"):
            return Status.NON_FINITE, step_size
        if squared == 0.0:  # what is left lies in the null space, and no number of terms removes it
            return Status.SINGULAR, step_size
        if harmless:
            return Status.TRUNCATED, step_size
        if curvature <= 0.0:
            return Status.NEGATIVE_CURVATURE, step_size
        if self.step_size == "auto":  # the largest eigenvalue was underestimated: shorten this residual the most
            return Status.TRUNCATED, curvature / squared
        return Status.DIVERGED, step_size

    def members_solver(self, problems: Sequence[BilevelProblem]) -> SolveMembers:
        return self._solve_members

    def _solve_members(
        self, operator: MembersOperator, vectors: Tensor, states: Sequence[State], alive: Sequence[bool]
    ) -> MembersSolution:
        count = len(vectors)
        if self.step_size == "auto":
            largest, states = largest_eigenvalues(operator, vectors, states, alive)
            steps = [1.0 / x if x > 0.0 else 1.0 for x in largest]
        else:
            steps = [self.step_size] * count
        solution, residual = torch.zeros_like(vectors), vectors
        starts = norms(residual)
        sizes = list(starts)
        targets = [max(self.tolerance, torch.finfo(vectors.dtype).eps) * start for start in starts]
        statuses, terms = [Status.TRUNCATED] * count, [0] * count
        going = [here and size > target for here, size, target in zip(alive, sizes, targets, strict=True)]
        for term in range(self.terms):
            if not any(going):
                break
            if term == self.terms - 1 and not self.measure_residual:
                steps = [step if g else 0.0 for step, g in zip(steps, going, strict=True)]
                solution = torch.addcmul(solution, residual, weights(steps, residual))
                terms = [t + g for t, g in zip(terms, going, strict=True)]
                break
            product = chosen(going, operator.multiply(residual, going))
            shorter = torch.addcmul(residual, product, weights(steps, product), value=-1.0)
            lengths = norms(shorter)
            for i in range(count):
                if going[i] and not lengths[i] < sizes[i]:  # see solve
                    row, pulled = {"": residual[i]}, {"": product[i]}
                    harmless = lengths[i] <= sizes[i] * _ROUNDING
                    statuses[i], steps[i] = self._cause_of_growth(row, pulled, steps[i], harmless)
                    if statuses[i] is Status.TRUNCATED:
                        shorter[i] = residual[i] - steps[i] * product[i]
                        lengths[i] = norms(shorter[i : i + 1])[0]
                    else:
                        going[i] = False
            taken = [step if g else 0.0 for step, g in zip(steps, going, strict=True)]
            solution = torch.addcmul(solution, residual, weights(taken, residual))
            residual = chosen(going, shorter, residual)
            for i in range(count):
                if going[i]:
                    sizes[i] = lengths[i]
                    terms[i] += 1
                    going[i] = sizes[i] > targets[i]
        for i, status in enumerate(statuses):
            if status is Status.TRUNCATED and sizes[i] <= targets[i]:
                statuses[i] = Status.CONVERGED
        residuals: list[float | None] = [s / start if start else 0.0 for s, start in zip(sizes, starts, strict=True)]
        return MembersSolution(solution, statuses, terms, residuals, list(states))
