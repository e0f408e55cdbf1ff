"""``heavy_ball``: one product an outer step, by a solution with momentum that follows the outer steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hyperopt_implicit.backend import Card, State, Status
from hyperopt_implicit.conjugate_gradients import Iterations, conjugate_gradients
from hyperopt_implicit.implicit import Solution
from hyperopt_implicit.members_conjugate_gradients import members_conjugate_gradients
from hyperopt_implicit.members_solver import (
    MembersOperator,
    MembersSolution,
    SolveMembers,
    carried,
    chosen,
    norms,
    weights,
)
from hyperopt_implicit.one_loop import Measured, measured, members_measured
from hyperopt_implicit.operators import LinearOperator
from hyperopt_implicit.preconditioner import PreconditionedBackend
from hyperopt_implicit.vectors import (
    Params,
    add,
    add_,
    clone,
    divide,
    is_finite,
    norm,
    precision,
    same_shapes,
    scale_,
    zeros_like,
)

if TYPE_CHECKING:
    from hyperopt_implicit.problem import BilevelProblem

_MARGIN = 1.05  # few conjugate gradients underestimate the largest eigenvalue by 2 to 4 %
_SLACK = 0.2  # of the smallest: more momentum than on a system at rest, since the lag falls like its root
_COLD, _WARM = 0.01, 0.25  # what conjugate gradients are to reach, as a share of the tolerance
_MEMORY = 0.9  # how fast bounds are forgotten that are not met again


@dataclass(frozen=True)
class HeavyBall(PreconditionedBackend):
    """Heavy ball on A u = v with u carried along: one product an outer step, and the mixed derivative with it.

    The first call solves by conjugate gradients, whose coefficients also give Ritz values: estimates of the extreme
    eigenvalues of A, from inside. h is 1.05 times the largest, and l a fifth of the smallest. From there on, with A, v
    and ∂²L/∂λ∂w of the present weights,

        hypergradient   ∂F/∂λ − (∂²L/∂λ∂w) u_t
        d_{t+1} = β d_t − ρ(A u_t − v),     u_{t+1} = u_t + d_{t+1}
        ρ = 4/(√h + √l)²,     β = ((√h − √l)/(√h + √l))²,

    with A u_t and (∂²L/∂λ∂w) u_t from **one** backward through the graph of the training gradient. u_t is therefore one
    step behind: it was made for the weights of the last outer step. The residual ‖A u_t − v‖/‖v‖ that is reported is
    that of the u_t used, measured on the present system.

    On a system at rest the error falls like √β a product, up to a factor t; the iteration is stable while all
    eigenvalues of A are in (0, h + l). Where A⁻¹v moves by a steady δ an outer step, as it does in training, u_t trails
    by √(h·l)/μ·δ in an eigendirection of eigenvalue μ: that is why l is taken five times smaller than the smallest Ritz
    value, for a lag that is less than half. ``products=n`` makes n steps a call, for systems that move faster: the lag,
    averaged over the steps of a call, is √(h·l)/μ·δ/n, and l is n²/5 times the smallest Ritz value, but not above it.
    Two steps a call lag as one does, and come to rest in a quarter of the calls; beyond that the lag falls like 1/n.

    Where the residual is above ``tolerance``, or A turns out to have changed so much that the iteration grows, the
    system is solved anew by conjugate gradients from the best there is, which also renews the bounds; where it is
    always above, this is ``cg`` with a warm start. Give it the same batches, or all the data, at each call: on
    mini-batches momentum amplifies the noise (take ``soba``). λ should move slowly beside the inner training.

    ``preconditioner="adam"`` replaces A and v by M⁻¹A and M⁻¹v with M the square root of the second moment that the
    inner optimizer keeps.

    Cost: ``products`` products, the mixed derivative included; conjugate gradients at the first call and where the
    tolerance is missed. Memory for five vectors, two of them carried.

    References:
        Polyak, "Some methods of speeding up the convergence of iteration methods", USSR Computational Mathematics and
            Mathematical Physics 4(5), 1964.
        Dagréou, Ablin, Vaiter, Moreau, "A framework for bilevel optimization that enables stochastic and global
            variance reduction algorithms", NeurIPS 2022, for the solution that moves with the outer steps.

    Example:
        >>> import hyperopt_implicit as hi
        >>> hi.get_backend("heavy_ball").products
        1
    """

    products: Annotated[int, Field(ge=1, description="steps on the linear system at each call, one product each")] = 1
    tolerance: Annotated[
        float, Field(gt=0, description="above this relative residual, solve anew by conjugate gradients")
    ] = 0.05
    max_iterations: Annotated[
        int, Field(ge=1, description="iterations of conjugate gradients at most, where they are needed")
    ] = 40

    card: ClassVar[Card] = Card(
        family="one-loop",
        gives="the theorem's value, one outer step behind; the residual is measured",
        cost="1 product, the mixed derivative included",
        memory="5",
        conditions="A positive definite; the same batches at each call; λ moves slowly",
        use="many outer steps on the whole data: the cheapest there is",
        paper="Polyak 1964",
    )

    def solve_scaled(
        self, operator: LinearOperator, vector: Params, state: State, diagonal: Params | None, /
    ) -> Solution:
        u: Params = state.get("solution", {})
        d: Params = state.get("displacement", {})
        if not (same_shapes(u, vector) and is_finite(u)):
            return self._anew(operator, vector, {}, diagonal, None)
        if not same_shapes(d, vector):  # u is another method's, and nothing is known of the spectrum
            return self._anew(operator, vector, {}, diagonal, measured(u, operator @ u, vector))
        rate, momentum = coefficients(state["smallest"], state["largest"], self.products)
        for _ in range(self.products - 1):
            u, d = _step(u, d, add(vector, operator @ u, -1.0), rate, momentum, diagonal)
        seen = measured(u, operator.multiply_and_mix(u), vector)
        if seen.lost or seen.size > self.tolerance:
            return self._anew(operator, vector, state, diagonal, seen)
        u, d = _step(u, d, seen.residual, rate, momentum, diagonal)
        going = {**state, "solution": u, "displacement": d}
        return Solution(seen.solution, seen.status, self.products, seen.size, going)

    def _anew(
        self, operator: LinearOperator, vector: Params, state: State, diagonal: Params | None, seen: Measured | None
    ) -> Solution:
        """By conjugate gradients, from u where that is nearer than zero; with bounds for the steps to come."""
        size = norm(vector)
        warm = seen is not None and seen.size < 1.0
        depth = _WARM if warm and state else _COLD  # deep enough for bounds, where there are none
        steepest = 0.0
        if seen is not None and warm:
            steepest = norm(add(vector, seen.residual, -1.0)) / norm(seen.solution)
        found = conjugate_gradients(
            operator,
            vector,
            (clone(seen.solution), seen.residual) if seen is not None and warm else None,
            target=max(depth * self.tolerance, precision(vector)) * size,
            iterations=self.max_iterations,
            steepest=steepest,
            preconditioner=diagonal,
        )
        return Solution(found.solution, found.status, found.count, found.size / size, begin(found, state))

    def members_solver(self, problems: Sequence[BilevelProblem]) -> SolveMembers | None:
        return self._solve_members if self.preconditioner is None else None

    def _solve_members(
        self, operator: MembersOperator, vectors: Tensor, states: Sequence[State], alive: Sequence[bool]
    ) -> MembersSolution:
        count = len(vectors)
        known, u = carried(states, "solution", vectors)
        sound = [math.isfinite(x) for x in norms(u)]
        known = [k and s and here for k, s, here in zip(known, sound, alive, strict=True)]
        moving, d = carried(states, "displacement", vectors)
        moving = [k and m for k, m in zip(known, moving, strict=True)]
        u, d = chosen(known, u), chosen(moving, d)
        rates, momenta = [0.0] * count, [0.0] * count
        for i, state in enumerate(states):
            if moving[i]:
                rates[i], momenta[i] = coefficients(state["smallest"], state["largest"], self.products)
        rate, momentum = weights(rates, u), weights(momenta, u)
        for _ in range(self.products - 1 if any(moving) else 0):
            residual = vectors - chosen(moving, operator.multiply(u, moving))
            d = torch.addcmul(d * momentum, residual, rate)
            u = u + d
        if any(known):
            product = chosen(known, operator.multiply(u, known, mix=all(moving)))
            seen = members_measured(u, product, vectors)
            lost, sizes = [each.lost for each in seen], [each.size for each in seen]
            statuses, residual = [each.status for each in seen], vectors - product
        else:
            lost, sizes = [True] * count, [1.0] * count
            statuses, residual = [Status.TRUNCATED] * count, vectors
        anew = [
            here and not (m and not gone and not size > self.tolerance)
            for here, m, gone, size in zip(alive, moving, lost, sizes, strict=True)
        ]
        d = torch.addcmul(d * momentum, residual, rate)
        after = u + d
        found_states: list[State] = [
            {**state, "solution": row, "displacement": step} if m else {}
            for state, row, step, m in zip(states, after.unbind(0), d.unbind(0), moving, strict=True)
        ]
        iterations, residuals = [self.products] * count, list[float | None](sizes)
        if not any(anew):
            return MembersSolution(u, statuses, iterations, residuals, found_states)
        warm = [a and k and size < 1.0 for a, k, size in zip(anew, known, sizes, strict=True)]
        starts, lengths, slopes = norms(vectors), norms(u), norms(vectors - residual)
        found = members_conjugate_gradients(
            operator,
            vectors,
            (chosen(warm, u), chosen(warm, residual, vectors)),
            going=anew,
            targets=[
                max((_WARM if w and m else _COLD) * self.tolerance, torch.finfo(u.dtype).eps) * start
                for w, m, start in zip(warm, moving, starts, strict=True)
            ],
            iterations=self.max_iterations,
            steepest=[slope / x if w else 0.0 for slope, x, w in zip(slopes, lengths, warm, strict=True)],
        )
        for i in range(count):
            if anew[i]:
                statuses[i], iterations[i] = found.statuses[i], found.counts[i]
                residuals[i] = found.sizes[i] / starts[i]
                before = states[i] if moving[i] else {}
                bounds = found.bounds(i)
                found_states[i] = {}
                if not statuses[i].failed and bounds[0] > 0.0:
                    found_states[i] = {
                        "solution": found.solution[i].clone(),
                        "displacement": torch.zeros_like(found.solution[i]),
                        **remembered(*bounds, before),
                    }
        return MembersSolution(chosen(anew, found.solution, u), statuses, iterations, residuals, found_states)


def begin(found: Iterations, state: State) -> State:
    """What to carry after conjugate gradients; the bounds of before are remembered for a while."""
    if found.status.failed or not found.smallest > 0.0:  # never so where there was no iteration
        return {}
    return {
        "solution": clone(found.solution),
        "displacement": zeros_like(found.solution),
        **remembered(found.smallest, found.largest, state),
    }


def remembered(smallest: float, largest: float, state: State) -> State:
    """Bounds on the eigenvalues, beside those of before."""
    return {
        "smallest": min(smallest, state.get("smallest", math.inf) / _MEMORY),
        "largest": max(largest, state.get("largest", 0.0) * _MEMORY),
    }


def coefficients(smallest: float, largest: float, products: int = 1) -> tuple[float, float]:
    """ρ and β from Ritz values, for so many steps in each of which the system moves."""
    low, high = math.sqrt(min(_SLACK * products**2, 1.0) * smallest), math.sqrt(_MARGIN * largest)
    return 4.0 / (high + low) ** 2, ((high - low) / (high + low)) ** 2


def _step(
    u: Params, d: Params, residual: Params, rate: float, momentum: float, diagonal: Params | None
) -> tuple[Params, Params]:
    force = residual if diagonal is None else divide(residual, diagonal)
    d = add_(scale_(clone(d), momentum), force, rate)
    return add(u, d), d
