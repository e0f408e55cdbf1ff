"""A preconditioner for the linear system that the inner optimizer has already paid for.

What a solver does with it is in ``conjugate_gradients.py``; which backends offer it derive from
:class:`PreconditionedBackend`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

import torch

from hyperopt_implicit.backend import State
from hyperopt_implicit.errors import BackendError
from hyperopt_implicit.implicit import ImplicitBackend, Solution, Solve
from hyperopt_implicit.operators import LinearOperator
from hyperopt_implicit.vectors import Params

if TYPE_CHECKING:
    from pydantic import Field

    from hyperopt_implicit.problem import BilevelProblem

FLOOR = 1e-2
"""The least entry, as a share of the root mean square: weights that never had a gradient have a moment of zero."""


@dataclass(frozen=True)
class PreconditionedBackend(ImplicitBackend):
    """An implicit backend whose solver can be given the diagonal M of a preconditioner."""

    preconditioner: Annotated[
        Literal["adam"] | None, Field(description="'adam' scales by the root of the inner optimizer's second moment")
    ] = field(default=None, kw_only=True)

    @abstractmethod
    def solve_scaled(
        self, operator: LinearOperator, vector: Params, state: State, diagonal: Params | None, /
    ) -> Solution:
        """Solve A u = v as ``solve`` does, preconditioned by the diagonal M; None is the identity."""

    def solve(self, operator: LinearOperator, vector: Params, state: State, /) -> Solution:
        return self.solve_scaled(operator, vector, state, None)

    def solver(self, problem: BilevelProblem) -> Solve:
        if self.preconditioner is None:
            return self.solve
        diagonal = adam_preconditioner(problem)
        return lambda operator, vector, state: self.solve_scaled(operator, vector, state, diagonal)

    def check(self, problem: BilevelProblem) -> None:
        super().check(problem)
        if self.preconditioner is not None and not keeps_second_moments(problem.optimizer):
            raise BackendError(
                "preconditioner='adam' takes the second moment that Adam, AdamW, NAdam and RAdam keep; the inner "
                f"optimizer is {type(problem.optimizer).__name__}. Leave the option out."
            )


def second_moments(problem: BilevelProblem) -> Params | None:
    """The preconditioner where the inner optimizer is of Adam's kind; None where it is another."""
    return adam_preconditioner(problem) if keeps_second_moments(problem.optimizer) else None


def adam_preconditioner(problem: BilevelProblem) -> Params | None:
    """The square root of Adam's second moment, scaled to a mean square of 1; None before the optimizer's first step.

    Near a minimum, gradients of samples have a second moment that goes with the curvature, so that its root evens out
    the eigenvalues of H. The moment of a parameter that never had a gradient is zero.
    """
    state = problem.optimizer.state
    moments = {
        name: state.get(p, {}).get("exp_avg_sq", torch.zeros_like(p)).detach() for name, p in problem.params.items()
    }
    mean = sum(float(m.sum()) for m in moments.values()) / sum(m.numel() for m in moments.values())
    if not 0.0 < mean < float("inf"):
        return None
    return {name: (moment / mean).sqrt().clamp_min(FLOOR) for name, moment in moments.items()}


def keeps_second_moments(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer is one of Adam's kind."""
    return isinstance(optimizer, torch.optim.Adam | torch.optim.NAdam | torch.optim.RAdam)
