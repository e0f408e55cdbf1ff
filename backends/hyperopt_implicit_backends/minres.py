"""``minres``: minimal residuals, for a Hessian that need not be positive definite."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from hyperopt_implicit.backend import Card, State, Status
from hyperopt_implicit.implicit import ImplicitBackend, Solution, first_iterate
from hyperopt_implicit.operators import LinearOperator
from hyperopt_implicit.vectors import Params, add, add_, clone, dot, norm, precision, scale_

_NULL = 64  # numbers, in units of rounding, that cannot be told from zero


@dataclass(frozen=True)
class MinimalResidual(ImplicitBackend):
    """MINRES: the shortest residual for a given number of products, where the Hessian may be indefinite.

    After k products u_k minimises ‖v − Au‖ over u_0 + span{r_0, A r_0, …, A^{k−1} r_0}, r_0 = v − A u_0, so the
    residual never grows, whatever the signs of the eigenvalues. At a saddle point of L, where ``cg`` stops at the
    first direction of negative curvature, it goes on to A⁻¹v. (The theorem holds there too, as long as the point is
    stationary; but training does not stay at a saddle point, and the hypergradient is that of the saddle.)

    With κ = max|λ|/min|λ|, the residual is at most 2((√κ − 1)/(√κ + 1))^k of the first where A is definite, and at most
    2((κ − 1)/(κ + 1))^⌊k/2⌋ where it is not. Where A is definite, ``cg`` has the smaller error for the same products.

    The Lanczos matrix is made triangular by rotations, which never break down; the recurrences of conjugate
    residuals, which divide by ⟨r, Ar⟩, do. Where A is singular and v has a part outside its range, the residual comes
    to a halt at that part: two iterations in a row that do not shorten it beyond rounding (an invertible symmetric A
    allows one), or a search direction that A maps to zero within rounding, end it with status ``singular`` and the
    least residual found.

    Departing from the paper, the images A·d of the search directions are carried beside the directions d and the step
    is ⟨r, Ad⟩/⟨Ad, Ad⟩, which equals the paper's in exact arithmetic: the residual that is reported is that of the
    value that is returned, and not the estimate of the rotations.

    Cost: one product an iteration, one more for a warm start, and one more for each direction so nearly flat that
    half of its image's digits are lost to rounding; memory for twelve vectors, one of them carried.

    References:
        Paige, Saunders, "Solution of Sparse Indefinite Systems of Linear Equations", SIAM J. Numer. Anal. 12, 1975,
            section 6.

    Example:
        >>> import hyperopt_implicit as hi
        >>> hi.get_backend("minres", max_iterations=5)
        MinimalResidual(damping=0.0, curvature='hessian', tolerance=0.001, max_iterations=5, warm_start=True)
    """

    tolerance: Annotated[float, Field(ge=0, description="stop at this relative residual")] = 1e-3
    max_iterations: Annotated[int, Field(ge=1, description="iterations at most, one product each")] = 20
    warm_start: Annotated[bool, Field(description="begin at the last outer step's solution")] = True

    card: ClassVar[Card] = Card(
        family="implicit",
        gives="the theorem's value; the residual falls like ((√κ − 1)/(√κ + 1))^k, at worst ((κ − 1)/(κ + 1))^(k/2)",
        cost="k products (k = iterations), 1 more for a warm start",
        memory="12",
        conditions="A invertible; eigenvalues of either sign",
        use="'cg' reports negative curvature, and damping is not wanted",
        paper="Paige & Saunders 1975",
    )

    def solve(self, operator: LinearOperator, vector: Params, state: State, /) -> Solution:
        size = norm(vector)
        rounding = precision(vector)
        target = max(self.tolerance, rounding) * size
        last = state.get("solution") if self.warm_start else None
        solution, residual, steepest = first_iterate(operator, vector, last)
        length, before = norm(residual), math.inf
        basis = _Lanczos(residual, length)
        status, iterations = Status.TRUNCATED, 0
        while iterations < self.max_iterations and length > target:
            pivot, largest = basis.advance(operator)
            if not math.isfinite(pivot):
                status = Status.NON_FINITE
                break
            steepest = max(steepest, largest)
            if pivot <= _NULL * rounding * steepest:  # A maps what is left to nothing
                status = Status.SINGULAR
                break
            direction, image = basis.direction()
            squared = dot(image, image)
            doubt = rounding * steepest * norm(direction) / math.sqrt(squared)  # the relative error of the image
            if not doubt * _NULL < 1.0:  # a step along a flat direction would be made of rounding errors
                status = Status.SINGULAR
                break
            step = dot(residual, image) / squared
            moved = add(solution, direction, step)
            if doubt > math.sqrt(rounding):
                left = add(vector, operator @ moved, -1.0)
                before = length  # and no standstill is allowed
            else:
                left = add(residual, image, -step)
            before, previous, shorter = length, before, norm(left)
            if shorter > target and not shorter < previous * (1.0 - _NULL * rounding):
                status = Status.SINGULAR
                break
            solution, residual, length = moved, left, shorter
            iterations += 1
            if basis.following <= _NULL * rounding * steepest:  # the Krylov space is used up
                basis = _Lanczos(residual, length)
        if status is Status.TRUNCATED and length <= target:
            status = Status.CONVERGED
        carried = {"solution": solution} if self.warm_start and status is not Status.NON_FINITE else {}
        return Solution(solution, status, iterations, length / size, carried)


class _Lanczos:
    """The Lanczos process on A from a first vector, and the rotations that make its matrix triangular.

    A V_k = V_{k+1} T_k and Q_k T_k = R_k. ``direction`` gives the last column of V_k R_k⁻¹ and its image under A;
    images are orthonormal.

    Attributes:
        following: β_{k+1}, the length of the next Lanczos vector before it is scaled.
    """

    def __init__(self, start: Params, length: float) -> None:
        self._vector = scale_(clone(start), 1.0 / length) if length > 0.0 else start
        self._last: Params | None = None
        self._directions: list[tuple[Params, Params]] = []  # the last two, with their images
        self._cosines, self._sines = (-1.0, -1.0), (0.0, 0.0)  # of the last two rotations
        self.following = 0.0

    def advance(self, operator: LinearOperator) -> tuple[float, float]:
        """One product; R_kk, and a bound from below on the largest |λ|."""
        beta = self.following
        self._current, self._product = self._vector, operator @ self._vector
        alpha = dot(self._current, self._product)
        following = add(self._product, self._current, -alpha)
        if self._last is not None:
            add_(following, self._last, -beta)
        self.following = norm(following)
        self._last, self._vector = self._current, following
        if self.following > 0.0:
            scale_(following, 1.0 / self.following)
        (c2, c1), (s2, s1) = self._cosines, self._sines
        self._second = s2 * beta
        rotated = -c2 * beta
        self._first, diagonal = c1 * rotated + s1 * alpha, s1 * rotated - c1 * alpha
        self._pivot = math.hypot(diagonal, self.following)
        if self._pivot > 0.0:
            self._cosines, self._sines = (c1, diagonal / self._pivot), (s1, self.following / self._pivot)
        return self._pivot, math.hypot(alpha, beta, self.following)

    def direction(self) -> tuple[Params, Params]:
        """The next search direction and its image."""
        coefficients = (self._second, self._first)[2 - len(self._directions) :]
        made = []
        for i, vector in enumerate((self._current, self._product)):
            x = clone(vector)
            for coefficient, pair in zip(coefficients, self._directions, strict=True):
                add_(x, pair[i], -coefficient)
            made.append(scale_(x, 1.0 / self._pivot))
        self._directions = [*self._directions[-1:], (made[0], made[1])]
        return made[0], made[1]
