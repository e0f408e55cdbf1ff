"""``soba``: one step on the linear system for each outer step, so that weights, solution and λ move at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hyperopt_implicit.backend import Card, State
from hyperopt_implicit.implicit import Solution
from hyperopt_implicit.one_loop import OneLoopBackend, measured
from hyperopt_implicit.operators import LinearOperator
from hyperopt_implicit.vectors import Params, add


@dataclass(frozen=True)
class Soba(OneLoopBackend):
    """Stochastic bilevel algorithm: w, the solution u of A u = v, and λ move at once, each by one step on a sample.

    With u_t carried from call to call and A, v and ∂²L/∂λ∂w those of the batches given,

        hypergradient   ∂F/∂λ − (∂²L/∂λ∂w) u_t
        u_{t+1} = u_t − ρ(A u_t − v),     u_0 = ρ v,

    with both products from one graph. u_0 is one step from zero, which costs nothing.

    At weights and batches that stay the same, u_t is Richardson's iteration: the error shrinks by (1 − ρ·λ_min) a call
    for ρ ≤ 1/λ_max, and the residual reported is exact. With a new sample at each call, u_t settles around A⁻¹v of
    the average loss with a variance proportional to ρ, so a smaller ``step_size`` is more accurate and slower. While
    weights and λ move, u_t follows with a delay of about 1/(ρ·λ_min) calls: let λ move slowly in that time.
    ``step_size="auto"`` is 1/λ_max of the batches given, by power iteration: eight products at the first call, and one
    at each after that, carried on.

    It is the cheapest of those that converge to the theorem's value, and the one for long runs of many small outer
    steps (``inner_steps`` of about 1). The first gradients are far off; in a run of few outer steps take ``cg`` or
    ``amigo``. Where the noise of u is what limits the result and the batches fit in a list, take ``saba``.

    A residual above 10 (sampling can take it above 1) is reported as ``diverged``, the value is then zero and the next
    call starts anew. ⟨u, Au⟩ < 0 is reported as ``negative curvature``; u is carried on, for the average of many
    batches may be positive where one is not.

    In the paper w takes one step of SGD from the same u and λ. Here w is moved by the inner optimizer, before u and λ.

    Cost: one product and one mixed derivative, one more product with ``step_size="auto"``; memory for three vectors,
    one or two of them carried.

    References:
        Dagréou, Ablin, Vaiter, Moreau, "A framework for bilevel optimization that enables stochastic and global
            variance reduction algorithms", NeurIPS 2022.

    Example:
        >>> import hyperopt_implicit as hi
        >>> hi.get_backend("soba", step_size=0.1)
        Soba(damping=0.0, curvature='hessian', step_size=0.1)
    """

    card: ClassVar[Card] = Card(
        family="one-loop",
        gives="the theorem's value in the long run; the error shrinks by (1 − λ_min/λ_max) a call, down to noise ∝ ρ",
        cost="1 product, 1 more for the step size",
        memory="3",
        conditions="A positive definite on average, ρ < 2/λ_max, λ moves slowly",
        use="many small outer steps on mini-batches",
        paper="Dagréou et al. 2022",
    )

    def solve(self, operator: LinearOperator, vector: Params, state: State, /) -> Solution:
        rate, spectrum = self.rate(operator, vector, state)
        solution = self.start(vector, state, rate)
        seen = measured(solution, operator.multiply_and_mix(solution), vector)
        return seen.report(1, spectrum, carried=add(solution, seen.residual, rate))
