"""``neumann``: the inverse Hessian as a truncated Neumann series."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from hyperopt_implicit.backend import State, Status
from hyperopt_implicit.implicit import ImplicitBackend, Solution
from hyperopt_implicit.operators import LinearOperator
from hyperopt_implicit.vectors import Params, add_, clone, dot, norm, precision, same_shapes, scale_, zeros_like

_COLD_POWER_ITERATIONS = 8
_ROUNDING = 1.0 + 1e-6  # growth of the residual that float32 rounding alone can cause


@dataclass(frozen=True)
class Neumann(ImplicitBackend):
    """Truncated Neumann series: fixed cost, a bias that shrinks geometrically.

    u_K = α Σ_{k<K} (I − αH)^k v, which converges to H⁻¹v where H is positive definite and 0 < α < 2/λ_max, with error
    at most (1 − α·λ_min)^K for α ≤ 1/λ_max. Stopping early damps the directions of small curvature, which is why few
    terms behave well far from convergence.

    With ``step_size="auto"``, α = 1/λ_max with λ_max from power iteration: eight products at the first call, one at
    each call after that, carried from step to step so that it follows the training; where it was underestimated so far
    that the series would grow, α is lowered on the way at no further cost.

    The residual after K terms is (I − αH)^K v and is known exactly from the K-th product. It can only shrink while H is
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
        Neumann(terms=20, step_size=0.1, tolerance=0.0, measure_residual=True)
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

    def solve(self, hessian: LinearOperator, vector: Params, state: State, /) -> Solution:
        if self.step_size == "auto":
            largest, state = _largest_eigenvalue(hessian, vector, state)
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
            product = hessian @ residual
            add_(residual, product, -step_size)
            length = norm(residual)
            if not length < size:  # never so while H is positive definite and α < 2/λ_max: look before going on
                add_(residual, product, step_size)
                status, step_size = self._cause_of_growth(residual, product, step_size, length <= size * _ROUNDING)
                if status is not Status.TRUNCATED:
                    break
                add_(residual, product, -step_size)
                length = norm(residual)
            # u ← u + α·(r of before), which r − αHr has overwritten; not earlier, for a step taken back leaves errors
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


def _largest_eigenvalue(hessian: LinearOperator, vector: Params, state: State) -> tuple[float, State]:
    """The largest absolute eigenvalue by power iteration, from where the last call stopped; ‖Hx‖ never exceeds it."""
    last: Params = state.get("eigenvector", {})
    warm = same_shapes(last, vector)
    direction = last
    if not warm:
        # the right-hand side alone could be orthogonal to the leading eigenvector; a fixed ripple makes that improbable
        direction = clone(vector)
        ripple = norm(vector) / max(sum(x.numel() for x in vector.values()), 1) ** 0.5
        for tensor in direction.values():
            tensor.add_(
                ripple
                * torch.cos(torch.arange(tensor.numel(), device=tensor.device).mul(1.7)).view_as(tensor).to(tensor)
            )
    eigenvalue = 0.0
    for _ in range(1 if warm else _COLD_POWER_ITERATIONS):
        direction = scale_(clone(direction), 1.0 / norm(direction))
        product = hessian @ direction
        size = norm(product)
        if not 0.0 < size < float("inf"):
            return max(eigenvalue, 0.0), {}
        eigenvalue, direction = size, product
    return eigenvalue, {
        "eigenvector": scale_(clone(direction), 1.0 / norm(direction)),
        "largest_eigenvalue": eigenvalue,
    }
