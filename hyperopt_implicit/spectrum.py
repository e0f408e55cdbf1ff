"""What is known of an operator's eigenvalues: estimated by a few products, and followed from call to call."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from hyperopt_implicit.backend import State
from hyperopt_implicit.operators import LinearOperator
from hyperopt_implicit.vectors import Params, add_, clone, dot, norm, precision, same_shapes, scale_

COLD_POWER_ITERATIONS = 8
_ROUNDING = 100.0  # units of it, in a product, that are not taken for a direction


def largest_eigenvalue(operator: LinearOperator, vector: Params, state: State) -> tuple[float, State]:
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
    for _ in range(1 if warm else COLD_POWER_ITERATIONS):
        direction = scale_(clone(direction), 1.0 / norm(direction))
        product = operator @ direction
        size = norm(product)
        if not 0.0 < size < float("inf"):
            return max(eigenvalue, 0.0), {}
        eigenvalue, direction = size, product
    return eigenvalue, {
        "eigenvector": scale_(clone(direction), 1.0 / norm(direction)),
        "largest_eigenvalue": eigenvalue,
    }


def lanczos(operator: LinearOperator, vector: Params, products: int) -> tuple[float, float]:
    """The extreme Ritz values of a symmetric operator, definite or not, after so many products from a vector.

    They lie between its extreme eigenvalues and approach them from inside: six products miss the largest one by 2 to
    4 %. NaN where a product is not finite. Memory for three vectors (Golub, Van Loan, "Matrix Computations", section
    10.1; the vectors are not made orthogonal again, which leaves the extremes right).
    """
    diagonal, beside, rounding = [], [], _ROUNDING * precision(vector)
    previous, size = None, 0.0
    current = scale_(clone(vector), 1.0 / norm(vector))
    for _ in range(products):
        following = clone(operator @ current)
        diagonal.append(dot(current, following))
        add_(following, current, -diagonal[-1])
        if previous is not None:
            add_(following, previous, -size)
        size = norm(following)
        beside.append(size)
        if not size > rounding * max(map(abs, [*diagonal, *beside[:-1]])):  # an invariant space: the rest is rounding
            break
        previous, current = current, scale_(following, 1.0 / size)
    return extreme_eigenvalues(diagonal, beside)


def extreme_eigenvalues(diagonal: Sequence[float], beside: Sequence[float]) -> tuple[float, float]:
    """Of a symmetric tridiagonal matrix, from its diagonal and the one beside it; NaN where there is none."""
    if not diagonal or not all(map(math.isfinite, [*diagonal, *beside])):
        return math.nan, math.nan
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    for i, x in enumerate(beside[: len(diagonal) - 1]):
        matrix[i, i + 1] = matrix[i + 1, i] = x
    values = torch.linalg.eigvalsh(matrix)
    return float(values[0]), float(values[-1])
