"""``amigo``: a few steps of stochastic gradient descent on the linear system, from where the last call left off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from hyperopt_implicit.backend import Card, State, Status
from hyperopt_implicit.implicit import Solution
from hyperopt_implicit.one_loop import OneLoopBackend, measured
from hyperopt_implicit.operators import LinearOperator
from hyperopt_implicit.vectors import Params, add


@dataclass(frozen=True)
class Amigo(OneLoopBackend):
    """Amortised implicit gradients: a few steps of SGD on ½uᵀAu − vᵀu at each call, from the solution of the last one.

    With u_0 carried from the last call (at the first, u_0 = ρ v, which costs nothing) and K = ``steps``,

        u_{k+1} = u_k − ρ(A_k u_k − v),     hypergradient   ∂F/∂λ − (∂²L_K/∂λ∂w) u_K,

    where A_k is the curvature of the k-th training batch, in a ring if there are fewer than K + 1 (``hessian_batches``
    says how many there are; with one, all steps use its one graph and nothing is random). Residual and mixed derivative
    are those of the batch after the last step, so a sample that u does not depend on if there are K + 1.

    On one batch the error shrinks by (1 − ρ·λ_min)^K a call for ρ ≤ 1/λ_max. On samples it does so on average, down
    to a variance proportional to ρ. Since the solution moves little between outer steps, a fixed K keeps the error as
    small as the steps of λ are, where a cold start (``stocbio``, ``neumann``) keeps a bias of (1 − ρ·λ_min)^K.
    ``step_size="auto"`` is 1/λ_max by power iteration: eight products at the first call, one at each after that, each
    on the next batch in turn; where batches differ much, or hold few rows, a smaller number of one's own is safer.

    Between ``soba`` (one step, cheapest) and ``cg`` (an accurate solve of one batch's system): take it where batches
    are small and u must follow a λ that moves fast. Steps end early where nothing is left to solve, or where the
    residual passes 10; the status is then ``diverged`` (or ``negative curvature`` where ⟨u, Au⟩ < 0), a value worse
    than zero is replaced by zero, and the next call starts anew.

    In the paper the inner problem is warm-started in the same way, by SGD; here it is the inner optimizer's.

    Cost: ``steps`` + 1 products, one more with ``step_size="auto"``, and one gradient with its graph for each where
    there are several batches; memory for three vectors and the graph of one batch.

    References:
        Arbel, Mairal, "Amortized Implicit Differentiation for Stochastic Bilevel Optimization", ICLR 2022.

    Example:
        >>> import hyperopt_implicit as hi
        >>> hi.get_backend("amigo", steps=5)
        Amigo(damping=0.0, curvature='hessian', step_size='auto', steps=5)
    """

    steps: Annotated[int, Field(ge=1, description="steps K on the linear system at each call")] = 10

    batches: ClassVar[Literal["averaged", "sampled"]] = "sampled"
    card: ClassVar[Card] = Card(
        family="one-loop",
        gives="the theorem's value; the error shrinks by (1 − λ_min/λ_max)^K a call, down to noise ∝ ρ on samples",
        cost="K + 1 products (K = steps), 1 more for the step size",
        memory="3",
        conditions="A positive definite on average, ρ < 2/λ_max",
        use="small batches, and λ moves too fast for one step",
        paper="Arbel, Mairal 2022",
    )

    def solve(self, operator: LinearOperator, vector: Params, state: State, /) -> Solution:
        rate, spectrum = self.rate(operator, vector, state)
        solution = self.start(vector, state, rate)
        seen, steps = measured(solution, operator @ solution, vector), 0
        while steps < self.steps and not seen.lost and seen.status is not Status.CONVERGED:
            solution = add(solution, seen.residual, rate)
            seen, steps = measured(solution, operator @ solution, vector), steps + 1
        return seen.report(steps, spectrum, carried=solution)
