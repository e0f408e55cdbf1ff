"""Conjugate gradients, preconditioned where asked for, and what their coefficients tell of the eigenvalues.

The backends that solve A u = v this way differ in where they begin and when they begin anew; the iteration is here. Its
coefficients are those of the Lanczos process, so that extreme eigenvalues come without a product of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hyperopt_implicit.backend import Status
from hyperopt_implicit.operators import LinearOperator
from hyperopt_implicit.spectrum import extreme_eigenvalues
from hyperopt_implicit.vectors import Params, add_, clone, divide, dot, norm, precision, scale_, zeros_like

NULL = 8  # curvature, in units of rounding, that cannot be told from none


@dataclass(frozen=True)
class Iterations:
    """Where conjugate gradients arrived.

    Attributes:
        solution: u.
        residual: v − Au, as the recursion carries it.
        size: ‖v − Au‖.
        status: ``converged`` at the size asked for, ``truncated`` before it, ``negative curvature``, ``singular`` or
            ``non-finite`` where the iteration could not go on.
        count: the iterations taken.
        smallest: the smallest Ritz value of M⁻¹A, which is at least its smallest eigenvalue; NaN without an iteration.
        largest: the largest, which is at most its largest eigenvalue.
    """

    solution: Params
    residual: Params
    size: float
    status: Status
    count: int
    smallest: float
    largest: float


def conjugate_gradients(
    operator: LinearOperator,
    vector: Params,
    start: tuple[Params, Params] | None = None,
    *,
    target: float,
    iterations: int,
    steepest: float = 0.0,
    preconditioner: Params | None = None,
) -> Iterations:
    """Solve A u = v (Hestenes, Stiefel 1952); one product an iteration; memory for four vectors, or five beside M.

    Args:
        operator: A.
        vector: v; not changed.
        start: where to begin, u and v − Au, both changed; zero where None.
        target: stop at ‖v − Au‖ no larger than this.
        iterations: at most so many.
        steepest: a bound from below on the largest eigenvalue of A, against which curvature is told from rounding.
        preconditioner: the diagonal of M, positive; the identity where None.
    """
    rounding = precision(vector)
    solution, residual = start if start is not None else (zeros_like(vector), clone(vector))
    size = norm(residual)
    scaled = _scaled(residual, preconditioner)
    direction = clone(scaled)
    squared = size * size if preconditioner is None else dot(residual, scaled)
    length = squared  # ⟨p, Mp⟩, by recursion: residuals are orthogonal to the directions before them
    if preconditioner is not None:  # ⟨p, Ap⟩/⟨p, Mp⟩ ≥ ⟨p, Ap⟩/⟨p, p⟩ / max M
        steepest /= max(float(m.max()) for m in preconditioner.values())
    status, diagonal, beside = Status.TRUNCATED, [], []
    count, last, flattest = 0, 0.0, math.inf
    while count < iterations and size > target:
        product = operator @ direction
        curvature = dot(direction, product)
        if not math.isfinite(curvature):
            status = Status.NON_FINITE
            break
        if squared == 0.0 or length == 0.0:  # squares below the range of the dtype
            status = Status.SINGULAR
            break
        quotient = curvature / length
        diagonal.append(curvature / squared + last)
        steepest, flattest = max(steepest, quotient), min(flattest, quotient)
        flat = NULL * rounding * steepest
        if flattest <= flat:  # a step along a flat direction would be, or was, made of rounding errors
            status = Status.SINGULAR if quotient >= -flat else Status.NEGATIVE_CURVATURE
            break
        step = squared / curvature
        add_(solution, direction, step)
        add_(residual, product, -step)
        scaled = _scaled(residual, preconditioner)
        size = norm(residual)
        previous, squared = squared, size * size if preconditioner is None else dot(residual, scaled)
        ratio = squared / previous
        last = ratio / step
        beside.append(math.sqrt(ratio) / step)
        add_(scale_(direction, ratio), scaled)
        length = squared + ratio * ratio * length
        count += 1
    if status is Status.TRUNCATED and size <= target:
        status = Status.CONVERGED
    smallest, largest = extreme_eigenvalues(diagonal, beside)
    return Iterations(solution, residual, size, status, count, smallest, largest)


def _scaled(residual: Params, preconditioner: Params | None) -> Params:
    return residual if preconditioner is None else divide(residual, preconditioner)
