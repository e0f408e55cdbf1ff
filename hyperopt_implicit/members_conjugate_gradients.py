"""Conjugate gradients on the systems of many members: each by its own coefficients, and to its own end.

The rules are those of ``conjugate_gradients.py``, which tells what they are for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperopt_implicit.backend import State, Status
from hyperopt_implicit.conjugate_gradients import NULL
from hyperopt_implicit.members_solver import MembersOperator, carried, chosen, dots, norms, weights
from hyperopt_implicit.spectrum import extreme_eigenvalues


@dataclass
class MembersIterations:
    """Where conjugate gradients arrived, member by member; see ``Iterations``.

    Attributes:
        solution: u, a row a member.
        residual: v − Au.
        sizes: ‖v − Au‖.
        statuses: how they ended.
        counts: the iterations taken.
        diagonals: of the tridiagonal matrix that the coefficients are.
        besides: its other diagonal.
    """

    solution: Tensor
    residual: Tensor
    sizes: list[float]
    statuses: list[Status]
    counts: list[int]
    diagonals: list[list[float]]
    besides: list[list[float]]

    def bounds(self, member: int) -> tuple[float, float]:
        """The extreme Ritz values of a member."""
        return extreme_eigenvalues(self.diagonals[member], self.besides[member])


def first_iterates(
    operator: MembersOperator, vectors: Tensor, states: Sequence[State], alive: Sequence[bool]
) -> tuple[Tensor, Tensor, list[float]]:
    """u, v − Au, and ‖Au‖/‖u‖ of each member: from the last solution where that is nearer than zero."""
    held, last = carried(states, "solution", vectors)
    lengths = norms(last)
    warm = [h and here and x > 0.0 for h, here, x in zip(held, alive, lengths, strict=True)]
    steepest = [0.0] * len(vectors)
    if not any(warm):
        return torch.zeros_like(vectors), vectors.clone(), steepest
    product = operator.multiply(last, warm)
    residual = vectors - product
    sizes, starts, slopes = norms(residual), norms(vectors), norms(product)
    nearer = [w and size < start for w, size, start in zip(warm, sizes, starts, strict=True)]
    for i, near in enumerate(nearer):
        if near:
            steepest[i] = slopes[i] / lengths[i]
    return chosen(nearer, last), chosen(nearer, residual, vectors).clone(), steepest


def members_conjugate_gradients(
    operator: MembersOperator,
    vectors: Tensor,
    start: tuple[Tensor, Tensor],
    *,
    going: Sequence[bool],
    targets: Sequence[float],
    iterations: int,
    steepest: Sequence[float],
) -> MembersIterations:
    """Solve A u = v for each member.

    Args:
        operator: A.
        vectors: v, a row a member; not changed.
        start: where to begin, u and v − Au.
        going: which members to solve for; the others stay where they begin.
        targets: stop at ‖v − Au‖ no larger than this.
        iterations: at most so many.
        steepest: bounds from below on the largest eigenvalues, against which curvature is told from rounding.
    """
    count, rounding = len(vectors), torch.finfo(vectors.dtype).eps
    solution, residual = start
    sizes = norms(residual)
    direction = residual.clone()
    squares = [size * size for size in sizes]
    lengths = list(squares)
    steep, flat = list(steepest), [math.inf] * count
    last = [0.0] * count
    statuses = [Status.TRUNCATED] * count
    counts = [0] * count
    diagonals: list[list[float]] = [[] for _ in range(count)]
    besides: list[list[float]] = [[] for _ in range(count)]
    active = [g and size > target for g, size, target in zip(going, sizes, targets, strict=True)]
    for _ in range(iterations):
        if not any(active):
            break
        product = operator.multiply(direction, active)
        curvatures = dots(direction, product)
        steps = [0.0] * count
        for i in range(count):
            if not active[i]:
                continue
            curvature = curvatures[i]
            if not math.isfinite(curvature):
                statuses[i], active[i] = Status.NON_FINITE, False
                continue
            if squares[i] == 0.0 or lengths[i] == 0.0:  # squares below the range of the dtype
                statuses[i], active[i] = Status.SINGULAR, False
                continue
            quotient = curvature / lengths[i]
            diagonals[i].append(curvature / squares[i] + last[i])
            steep[i], flat[i] = max(steep[i], quotient), min(flat[i], quotient)
            limit = NULL * rounding * steep[i]
            if flat[i] <= limit:
                statuses[i] = Status.SINGULAR if quotient >= -limit else Status.NEGATIVE_CURVATURE
                active[i] = False
                continue
            steps[i] = squares[i] / curvature
        if not any(active):
            break
        product = chosen(active, product)
        along = weights(steps, solution)
        solution = torch.addcmul(solution, direction, along)
        residual = torch.addcmul(residual, product, along, value=-1.0)
        found = norms(residual)
        ratios = [0.0] * count
        for i in range(count):
            if active[i]:
                sizes[i] = found[i]
                previous, squares[i] = squares[i], found[i] * found[i]
                ratios[i] = squares[i] / previous
                last[i] = ratios[i] / steps[i]
                besides[i].append(math.sqrt(ratios[i]) / steps[i])
                lengths[i] = squares[i] + ratios[i] * ratios[i] * lengths[i]
                counts[i] += 1
                active[i] = sizes[i] > targets[i]
        direction = torch.addcmul(residual, direction, weights(ratios, direction))
    for i, status in enumerate(statuses):
        if status is Status.TRUNCATED and sizes[i] <= targets[i]:
            statuses[i] = Status.CONVERGED
    return MembersIterations(solution, residual, sizes, statuses, counts, diagonals, besides)
