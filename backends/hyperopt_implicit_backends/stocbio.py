"""``stocbio``: a truncated Neumann series in which each factor is the curvature of another batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from hyperopt_implicit.backend import Card, State
from hyperopt_implicit.implicit import Solution
from hyperopt_implicit.one_loop import LIMIT, OneLoopBackend, measured
from hyperopt_implicit.operators import LinearOperator
from hyperopt_implicit.vectors import Params, add, add_, clone, norm, precision, scale_


@dataclass(frozen=True)
class StocBio(OneLoopBackend):
    """Stochastic Neumann series with a fresh batch for every factor: right on average for the average of the losses.

    With K = ``terms`` and A_j the curvature of the j-th training batch, in a ring if there are fewer than K,

        u = ρ Σ_{k<K} Π_{j=1..k} (I − ρ A_j) v,     hypergradient   ∂F/∂λ − (∂²L_K/∂λ∂w) u.

    For batches drawn independently of each other the expectation of a product is the product of the expectations, so
    E[u] = ρ Σ_{k<K} (I − ρ E[A])^k v: unbiased for the Neumann series of the average loss, whatever the noise. What is
    left is its truncation, (I − ρ E[A])^K A⁻¹v, at most (1 − ρ·λ_min)^K of the solution for ρ ≤ 1/λ_max. Residual and
    mixed derivative are those of the K-th batch, which no factor has used, so the mixed term is unbiased as well.
    Independence takes K training batches (``hessian_batches`` of :func:`hyperopt_implicit.optimize`) and a ρ that does
    not depend on them, so a number of one's own; a loader that shuffles draws without replacement, which is close to
    it. On a single batch this is ``neumann`` with its batch drawn anew at each call.

    Every call starts cold: nothing is carried but what ``step_size="auto"`` knows of the spectrum (eight products at
    the first call, one at each after that, on the next batches in turn), so no call depends on the calls before it.
    That suits λ that jumps, restarts, and short runs. Where λ moves slowly, ``soba`` and ``amigo`` use earlier work
    instead, and have no bias left.

    The sum ends early where nothing is left of the product, or where it has grown to ten times ‖v‖; the status is then
    ``diverged``, or ``negative curvature`` where ⟨u, Au⟩ < 0, and a value worse than zero is replaced by zero.

    In the paper w takes D steps of SGD before each call; here they are the inner optimizer's (``inner_steps``).

    Cost: ``terms`` products, the last of which measures the residual, one more with ``step_size="auto"``, and one
    gradient with its graph for each where there are several batches; memory for three vectors and the graph of one.

    References:
        Ji, Yang, Liang, "Bilevel Optimization: Convergence Analysis and Enhanced Design", ICML 2021, algorithm 3.

    Example:
        >>> import hyperopt_implicit as hi
        >>> hi.get_backend("stocbio", terms=20, step_size=0.1)
        StocBio(damping=0.0, curvature='hessian', step_size=0.1, terms=20)
    """

    terms: Annotated[int, Field(ge=1, description="number of terms K of the series")] = 10

    batches: ClassVar[Literal["averaged", "sampled"]] = "sampled"
    card: ClassVar[Card] = Card(
        family="one-loop",
        gives="a truncated series, unbiased for that of the average loss; the bias falls like (1 − λ_min/λ_max)^K",
        cost="K products (K = terms), 1 more for the step size",
        memory="3",
        conditions="independent batches, A positive definite on average, ρ < 2/λ_max",
        use="small batches and no memory of earlier calls",
        paper="Ji et al. 2021",
    )

    def solve(self, operator: LinearOperator, vector: Params, state: State, /) -> Solution:
        rate, spectrum = self.rate(operator, vector, state)
        factor, solution = vector, scale_(clone(vector), rate)
        start = norm(vector)
        terms, grown = 1, False
        while terms < self.terms:
            factor = add(factor, operator @ factor, -rate)
            size = norm(factor)
            grown = not size <= LIMIT * start
            if grown or size <= precision(vector) * start:
                break
            add_(solution, factor, rate)
            terms += 1
        return measured(solution, operator.multiply_and_mix(solution), vector, grown=grown).report(terms, spectrum)
