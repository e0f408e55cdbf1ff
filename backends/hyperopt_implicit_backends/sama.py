"""``sama``: the inner optimizer's own update, adaptive rates included, in the place of the inverse Hessian."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from hyperopt_implicit.backend import Backend, Card, Hypergradient, State, Status
from hyperopt_implicit.errors import BackendError, ProblemError
from hyperopt_implicit.first_order import (
    TrainingDerivatives,
    ValidationDerivatives,
    mixed_difference,
    present_weights,
    update_adjoint,
)
from hyperopt_implicit.optimizers import update_rule
from hyperopt_implicit.vectors import add, is_finite, norm

if TYPE_CHECKING:
    from hyperopt_implicit.problem import BilevelProblem


@dataclass(frozen=True)
class Sama(Backend):
    """One update of the inner optimizer as it is, adaptive rates included, without second derivatives of the loss.

    With w ← w − Φ(g) the optimizer's next update from its present state, g = ∂L/∂w and v = ∂F/∂w at the present w,

        dF/dλ ≈ ∂F/∂λ − [∂L/∂λ(w + hu, λ) − ∂L/∂λ(w − hu, λ)] / 2h,    u = (∂Φ/∂g)ᵀ v,    h = alpha/‖u‖:

    the base Jacobian of the implicit function theorem is replaced by the identity, preconditioned by the optimizer.
    For SGD, u = lr·v, and the result is that of ``finite_difference`` with ``lookahead=False``. For Adam, with m and s
    the moments after the update, m̂ = m/(1 − β1^t) and ŝ = s/(1 − β2^t),

        ∂Φ/∂g = lr [ (1 − β1)/(1 − β1^t) / (√ŝ + ε) − m̂ (1 − β2) g / ((1 − β2^t) √ŝ (√ŝ + ε)²) ],

    entry by entry. Momentum counts with its newest summand only. The derivative is taken through torch.optim's own
    functional forms: SGD, Adam, AdamW, Adamax, RMSprop, Adagrad, NAdam, RAdam, Adadelta, ASGD. Where Adam, RMSprop or
    Adagrad have no state yet, their first update is nearly a multiple of sign(g), whose derivative, and so u, is close
    to zero: train first.

    It is biased like a Neumann series of one term: the size is that of one update, and the direction is that of the
    theorem where the preconditioner is near H⁻¹. The difference errs by alpha²/6 times ∂⁴L/∂λ∂w³ along u/‖u‖, and by
    rounding of relative size eps/alpha, both relative to ‖u‖. The paper has alpha = 1 for networks whose weights are
    of large norm; the default here is accurate for small ones too, in float32 as in float64.

    Left out of the paper's algorithm: the further move of the base parameters along v at each outer step (here a
    hypergradient never moves the model), and the overlap of communication with computation under data parallelism.

    Cost: three gradients of L and one of F, no second derivative; memory for four vectors and a copy of the optimizer's
    state.

    References:
        Choe et al., "Making Scalable Meta Learning Practical", NeurIPS 2023, section 3 and algorithm 1.

    Example:
        >>> import hyperopt_implicit as hi
        >>> hi.get_backend("sama")
        Sama(alpha=0.01)
    """

    alpha: Annotated[float, Field(gt=0, description="how far the weights move to either side, in norm")] = 0.01

    needs_second_derivative: ClassVar[bool] = False

    card: ClassVar[Card] = Card(
        family="first-order",
        gives="the derivative of the optimizer's next update: H⁻¹ replaced by ∂Φ/∂g; the difference errs by O(α²)",
        cost="3 gradients of L",
        memory="4 and the optimizer's state",
        conditions="an optimizer with a differentiable update, and with state; biased",
        use="large models trained by Adam",
        paper="Choe et al. 2023",
    )

    def check(self, problem: BilevelProblem) -> None:
        super().check(problem)
        try:
            known = not update_rule(problem.optimizer).signs_only  # whose derivative is zero
        except ProblemError:
            known = False
        if not known:
            raise BackendError(
                "backend 'sama' differentiates the inner optimizer's update, which must be that of SGD, Adam, AdamW, "
                "Adamax, RMSprop, Adagrad, NAdam, RAdam, Adadelta or ASGD of torch.optim; got "
                f"{type(problem.optimizer).__name__}. Use one of these, or 'finite_difference', which looks at the "
                "learning rate only."
            )

    def hypergradient(
        self,
        problem: BilevelProblem,
        training_batches: Sequence[Any],
        validation_batch: Any,
        state: State,
        /,
    ) -> Hypergradient:
        training = TrainingDerivatives(problem, training_batches)
        weights = present_weights(problem)
        here = training.at(weights)
        validation_loss, vector, direct = ValidationDerivatives(problem, validation_batch).at(weights)
        size = norm(vector)
        gradients, status = direct, Status.CONVERGED  # where F does not depend on w, this is all
        if not math.isfinite(size):
            status = Status.NON_FINITE
        elif size > 0.0:
            status = Status.TRUNCATED
            direction = update_adjoint(problem, weights, here, vector)
            gradients = add(direct, mixed_difference(training, weights, direction, self.alpha), -1.0)
        return Hypergradient(
            gradients=gradients,
            status=status if is_finite(gradients) and math.isfinite(here.loss) else Status.NON_FINITE,
            iterations=1,
            residual=None,
            hvps=0,
            validation_loss=validation_loss,
            training_loss=here.loss,
            state=state,
        )
