"""The implicit function theorem, written once.

Every backend that rests on it derives from :class:`ImplicitBackend` and writes one method, ``solve``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from hyperopt_implicit.backend import Backend, Hypergradient, State, Status
from hyperopt_implicit.operators import Hessian, LinearOperator, LossHessian, validation_gradients
from hyperopt_implicit.vectors import Params, add, is_finite, norm

if TYPE_CHECKING:
    from hyperopt_implicit.problem import BilevelProblem


@dataclass(frozen=True)
class Solution:
    """What a solver found for H u = v.

    Attributes:
        value: u.
        status: how the solver ended.
        iterations: its terms or iterations.
        residual: ‖Hu − v‖/‖v‖.
        state: what the solver wants to be given next time.
    """

    value: Params
    status: Status
    iterations: int
    residual: float
    state: State = field(default_factory=dict)


class ImplicitBackend(Backend):
    """dF/dλ = ∂F/∂λ − (∂²L/∂λ∂w) u with H u = v, at the model's present weights (Lorraine et al., AISTATS 2020, eq. 3).

    The theorem holds where ∂L/∂w = 0 and H is invertible; away from a stationary point it gives the gradient of what
    further training would arrive at, to first order.
    """

    @abstractmethod
    def solve(self, hessian: LinearOperator, vector: Params, state: State, /) -> Solution:
        """Solve H u = v, multiplying by H only; neither ``vector`` nor a product may be changed in place."""

    def hypergradient(
        self,
        problem: BilevelProblem,
        training_batches: Sequence[Any],
        validation_batch: Any,
        state: State,
        /,
    ) -> Hypergradient:
        validation_loss, vector, direct = validation_gradients(problem, validation_batch)
        hessian = Hessian(problem, training_batches)
        return self.differentiate(hessian, vector, direct, validation_loss, state)

    def differentiate(
        self, hessian: LossHessian, vector: Params, direct: Params, validation_loss: float, state: State
    ) -> Hypergradient:
        """The theorem itself, from v = ∂F/∂w, the direct term ∂F/∂λ, and H with its mixed derivative."""
        size = norm(vector)
        if not math.isfinite(size):  # a product or a mixed term that is not finite is found below
            status, iterations, residual, gradients = Status.NON_FINITE, 0, float("nan"), direct
        elif size == 0.0:  # F does not depend on w here: nothing to solve
            status, iterations, residual, gradients = Status.CONVERGED, 0, 0.0, direct
        else:
            with torch.no_grad():
                solution = self.solve(hessian, vector, state)
            status, iterations, residual = solution.status, solution.iterations, solution.residual
            state = solution.state
            gradients = add(direct, hessian.mixed(solution.value), -1.0)
        return Hypergradient(
            gradients=gradients,
            status=status if is_finite(gradients) else Status.NON_FINITE,
            iterations=iterations,
            residual=residual,
            hvps=hessian.products,
            validation_loss=validation_loss,
            training_loss=hessian.loss,
            state=state,
        )
