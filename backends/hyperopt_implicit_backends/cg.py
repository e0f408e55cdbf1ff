"""``cg``: the linear system of the implicit function theorem by conjugate gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from hyperopt_implicit.backend import Card, State, Status
from hyperopt_implicit.implicit import ImplicitBackend, Solution, first_iterate
from hyperopt_implicit.operators import LinearOperator
from hyperopt_implicit.vectors import Params, add_, clone, dot, norm, precision, scale_

_NULL = 8  # curvature, in units of rounding, that cannot be told from none


@dataclass(frozen=True)
class ConjugateGradient(ImplicitBackend):
    """Conjugate gradients: the most accuracy for a given number of products where the Hessian is positive definite.

    The error in the A-norm falls at least as fast as 2·((√κ − 1)/(√κ + 1))^k with κ the condition number, and reaches
    zero after as many products as A has distinct eigenvalues. With ``warm_start`` it begins at the last
    outer step's solution, which halves the products or better once training has settled.

    A direction p with ⟨p, Ap⟩ < 0 ends it: the iterate reached so far is returned with status ``negative curvature``,
    or ``singular`` where the curvature is zero to rounding. ``damping`` above the size of the most negative eigenvalue
    avoids that, at the price of a bias.

    Cost: one product an iteration, one more for a warm start; memory for four vectors, one of them carried.

    References:
        Hestenes, Stiefel, "Methods of Conjugate Gradients for Solving Linear Systems", J. Res. NBS 49, 1952.
        Pedregosa, "Hyperparameter Optimization with Approximate Gradient", ICML 2016, algorithm 1.

    Example:
        >>> import hyperopt_implicit as hi
        >>> hi.get_backend("cg", max_iterations=5)
        ConjugateGradient(damping=0.0, curvature='hessian', tolerance=0.001, max_iterations=5, warm_start=True)
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

    def solve(self, operator: LinearOperator, vector: Params, state: State, /) -> Solution:
        size = norm(vector)
        rounding = precision(vector)
        target = max(self.tolerance, rounding) * size
        last = state.get("solution") if self.warm_start else None
        solution, residual, steepest = first_iterate(operator, vector, last)
        direction = clone(residual)
        squared = dot(residual, residual)
        status, iterations = Status.TRUNCATED, 0
        while iterations < self.max_iterations and math.sqrt(squared) > target:
            product = operator @ direction
            curvature = dot(direction, product)
            if not math.isfinite(curvature):
                status = Status.NON_FINITE
                break
            quotient = curvature / dot(direction, direction)
            steepest = max(steepest, quotient)
            flat = _NULL * rounding * steepest
            if quotient <= flat:  # a step along a flat direction would be made of rounding errors
                status = Status.SINGULAR if quotient >= -flat else Status.NEGATIVE_CURVATURE
                break
            step = squared / curvature
            add_(solution, direction, step)
            add_(residual, product, -step)
            previous, squared = squared, dot(residual, residual)
            add_(scale_(direction, squared / previous), residual)
            iterations += 1
        if status is Status.TRUNCATED and math.sqrt(squared) <= target:
            status = Status.CONVERGED
        carried = {"solution": solution} if self.warm_start and status is not Status.NON_FINITE else {}
        return Solution(solution, status, iterations, norm(residual) / size, carried)
