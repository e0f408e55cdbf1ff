"""``cg``: the linear system of the implicit function theorem by conjugate gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hyperopt_implicit.backend import Card, State, Status
from hyperopt_implicit.conjugate_gradients import conjugate_gradients
from hyperopt_implicit.implicit import Solution, first_iterate
from hyperopt_implicit.members_conjugate_gradients import first_iterates, members_conjugate_gradients
from hyperopt_implicit.members_solver import MembersOperator, MembersSolution, SolveMembers, norms
from hyperopt_implicit.operators import LinearOperator
from hyperopt_implicit.preconditioner import PreconditionedBackend
from hyperopt_implicit.vectors import Params, norm, precision

if TYPE_CHECKING:
    from hyperopt_implicit.problem import BilevelProblem


@dataclass(frozen=True)
class ConjugateGradient(PreconditionedBackend):
    """Conjugate gradients: the most accuracy for a given number of products where the Hessian is positive definite.

    The error in the A-norm falls at least as fast as 2·((√κ − 1)/(√κ + 1))^k with κ the condition number, and reaches
    zero after as many products as A has distinct eigenvalues. With ``warm_start`` it begins at the last
    outer step's solution, which halves the products or better once training has settled.

    A direction p with ⟨p, Ap⟩ < 0 ends it: the iterate reached so far is returned with status ``negative curvature``,
    or ``singular`` where the curvature is zero to rounding. ``damping`` above the size of the most negative eigenvalue
    avoids that, at the price of a bias.

    ``preconditioner="adam"`` solves M⁻¹A u = M⁻¹v with M the square root of the second moment that the inner optimizer
    keeps (Adam, AdamW, NAdam, RAdam), at no product. It pays where A is badly conditioned, and costs iterations where
    it is not.

    Cost: one product an iteration, one more for a warm start; memory for four vectors, one of them carried, and for two
    more with a preconditioner.

    References:
        Hestenes, Stiefel, "Methods of Conjugate Gradients for Solving Linear Systems", J. Res. NBS 49, 1952.
        Pedregosa, "Hyperparameter Optimization with Approximate Gradient", ICML 2016, algorithm 1.

    Example:
        >>> import hyperopt_implicit as hi
        >>> hi.get_backend("cg", max_iterations=5).tolerance
        0.001
    """

    tolerance: Annotated[float, Field(ge=0, description="stop at this relative residual")] = 1e-3
    max_iterations: Annotated[int, Field(ge=1, description="iterations at most, one product each")] = 20
    warm_start: Annotated[bool, Field(description="begin at the last outer step's solution")] = True

    card: ClassVar[Card] = Card(
        family="implicit",
        gives="the theorem's value; the error falls like ((√κ − 1)/(√κ + 1))^k",
        cost="k products (k = iterations), 1 more for a warm start",
        memory="4",
        conditions="A positive definite",
        use="training gets near a minimum; convex losses, decay",
        paper="Pedregosa 2016",
    )

    def solve_scaled(
        self, operator: LinearOperator, vector: Params, state: State, diagonal: Params | None, /
    ) -> Solution:
        size = norm(vector)
        last = state.get("solution") if self.warm_start else None
        solution, residual, steepest = first_iterate(operator, vector, last)
        found = conjugate_gradients(
            operator,
            vector,
            (solution, residual),
            target=max(self.tolerance, precision(vector)) * size,
            iterations=self.max_iterations,
            steepest=steepest,
            preconditioner=diagonal,
        )
        carried = {"solution": found.solution} if self.warm_start and found.status is not Status.NON_FINITE else {}
        return Solution(found.solution, found.status, found.count, found.size / size, carried)

    def members_solver(self, problems: Sequence[BilevelProblem]) -> SolveMembers | None:
        return self._solve_members if self.preconditioner is None else None

    def _solve_members(
        self, operator: MembersOperator, vectors: Tensor, states: Sequence[State], alive: Sequence[bool]
    ) -> MembersSolution:
        sizes = norms(vectors)
        last = states if self.warm_start else [{} for _ in states]
        solution, residual, steepest = first_iterates(operator, vectors, last, alive)
        found = members_conjugate_gradients(
            operator,
            vectors,
            (solution, residual),
            going=alive,
            targets=[max(self.tolerance, torch.finfo(vectors.dtype).eps) * size for size in sizes],
            iterations=self.max_iterations,
            steepest=steepest,
        )
        carried: list[State] = [
            {"solution": row} if self.warm_start and status is not Status.NON_FINITE else {}
            for row, status in zip(found.solution.unbind(0), found.statuses, strict=True)
        ]
        residuals: list[float | None] = [x / size if size else 0.0 for x, size in zip(found.sizes, sizes, strict=True)]
        return MembersSolution(found.solution, found.statuses, found.counts, residuals, carried)
