"""``identity``: a multiple of the identity in the place of the inverse Hessian."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from hyperopt_implicit.backend import Card, State, Status
from hyperopt_implicit.errors import BackendError
from hyperopt_implicit.implicit import ImplicitBackend, Solution, Solve
from hyperopt_implicit.members_solver import MembersOperator, MembersSolution, SolveMembers, norms
from hyperopt_implicit.operators import LinearOperator
from hyperopt_implicit.vectors import Params, add, is_finite, norm

if TYPE_CHECKING:
    from hyperopt_implicit.problem import BilevelProblem


@dataclass(frozen=True)
class Identity(ImplicitBackend):
    """H ≈ I/α: no products at all, and a hypergradient that looks one step of training ahead.

    u = α v / (1 + α δ), with α the ``step_size`` and δ the ``damping``, so that

        dF/dλ ≈ ∂F/∂λ − α (∂²L/∂λ∂w) ∂F/∂w.

    With ``step_size="lr"``, α is the inner optimizer's present learning rate, group by group, and this is the
    derivative of F through one step of SGD, w' = w − α ∂L/∂w, but for ∂F/∂w being taken at w and not at w'; at a
    minimum of L both are the same, and with w' it is T1−T2 (``finite_difference`` has the lookahead). Momentum and
    preconditioners of the inner optimizer are left out. A number sets the scale of the second term against the direct
    one; where F does not depend on λ directly, it only scales the outer learning rate.

    The relative error of u, I − αH applied to the solution, has norm max |1 − αλ|, which is below one only for
    0 < αλ < 2 on every eigenvalue λ that matters; the bias stays however long training goes on, so the status is always
    ``truncated``. It is the first term of the Neumann series. Take it where a hypergradient must cost no more than a
    gradient, and 'neumann' with a few terms where it may cost a little more.

    Cost: no product, only the mixed derivative; no vector beside u. The residual is not measured;
    ``measure_residual=True`` spends one product on it.

    References:
        Luketina, Berglund, Greff, Raiko, "Scalable Gradient-Based Tuning of Continuous Regularization Hyperparameters",
            ICML 2016, section 2.

    Example:
        >>> import hyperopt_implicit as hi
        >>> hi.get_backend("identity", step_size="lr")
        Identity(damping=0.0, curvature='hessian', step_size='lr', measure_residual=False)
    """

    step_size: Annotated[
        Literal["lr"] | Annotated[float, Field(gt=0)],
        Field(description="α, the inverse of the curvature assumed; 'lr' takes the inner optimizer's learning rate"),
    ] = 1.0
    measure_residual: Annotated[bool, Field(description="spend a product on measuring the residual")] = False

    card: ClassVar[Card] = Card(
        family="implicit",
        gives="one term: H⁻¹ replaced by α; the relative error of u is up to max |1 − αλ|",
        cost="no products",
        memory="1",
        conditions="0 < αλ < 2 for the direction to be near; biased always",
        use="nothing may cost more than a gradient; T1−T2",
        paper="Luketina et al. 2016",
    )

    def solver(self, problem: BilevelProblem) -> Solve:
        if self.step_size != "lr":
            return self.solve
        rates = _rates(problem)
        return lambda operator, vector, state: self._scaled(operator, vector, state, rates)

    def solve(self, operator: LinearOperator, vector: Params, state: State, /) -> Solution:
        if self.step_size == "lr":
            raise BackendError(
                "step_size='lr' takes the learning rate from the inner optimizer of a BilevelProblem, and there is "
                "none here. Give a number, for instance step_size=0.1."
            )
        return self._scaled(operator, vector, state, dict.fromkeys(vector, self.step_size))

    def _scaled(self, operator: LinearOperator, vector: Params, state: State, rates: dict[str, float]) -> Solution:
        value = {name: x * (rates[name] / (1.0 + rates[name] * self.damping)) for name, x in vector.items()}
        status, residual = Status.TRUNCATED, None
        if self.measure_residual:
            left = add(operator @ value, vector, -1.0)
            residual = norm(left) / norm(vector)
            if not is_finite(left):
                status = Status.NON_FINITE
        return Solution(value, status, 1, residual, state)

    def members_solver(self, problems: Sequence[BilevelProblem]) -> SolveMembers:
        def solve(
            operator: MembersOperator, vectors: Tensor, states: Sequence[State], alive: Sequence[bool]
        ) -> MembersSolution:
            return self._scaled_members(operator, vectors, states, alive, problems)

        return solve

    def _scaled_members(
        self,
        operator: MembersOperator,
        vectors: Tensor,
        states: Sequence[State],
        alive: Sequence[bool],
        problems: Sequence[BilevelProblem],
    ) -> MembersSolution:
        factors = []
        for problem in problems:
            rates = _rates(problem) if self.step_size == "lr" else dict.fromkeys(operator.columns, self.step_size)
            factors.append([rates[name] / (1.0 + rates[name] * self.damping) for name in operator.columns])
        factor = torch.tensor(factors, dtype=torch.float64).to(vectors.device, vectors.dtype)
        counts = torch.tensor(list(operator.columns.values()), device=vectors.device)
        value = vectors * factor.repeat_interleave(counts, dim=1)
        statuses, residuals = [Status.TRUNCATED] * len(vectors), list[float | None]([None] * len(vectors))
        if self.measure_residual:
            left, sizes = norms(operator.multiply(value, alive) - vectors), norms(vectors)
            for i in range(len(vectors)):
                residuals[i] = left[i] / sizes[i] if sizes[i] else 0.0
                if not math.isfinite(left[i]):
                    statuses[i] = Status.NON_FINITE
        return MembersSolution(value, statuses, [1] * len(vectors), residuals, list(states))


def _rates(problem: BilevelProblem) -> dict[str, float]:
    """The learning rate of each parameter, downwards."""
    return {
        name: float(group["lr"]) * (-1.0 if group.get("maximize") else 1.0)
        for group, names in problem.parameter_groups
        for name in names
    }
