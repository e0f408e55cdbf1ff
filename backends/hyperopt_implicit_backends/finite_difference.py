"""``finite_difference``: one step of gradient descent looked ahead, its mixed derivative by a central difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from hyperopt_implicit.backend import Backend, Card, Hypergradient, State, Status
from hyperopt_implicit.first_order import (
    TrainingDerivatives,
    ValidationDerivatives,
    mixed_difference,
    present_weights,
    scaled,
    step_sizes,
)
from hyperopt_implicit.vectors import add, is_finite, norm

if TYPE_CHECKING:
    from hyperopt_implicit.problem import BilevelProblem


@dataclass(frozen=True)
class FiniteDifference(Backend):
    """One step of gradient descent looked ahead, with its second derivative replaced by a difference (DARTS).

    With w' = w − ξ ∂L/∂w(w, λ) and v = ∂F/∂w(w', λ),

        dF/dλ ≈ ∂F/∂λ(w', λ) − ξ [∂L/∂λ(w + hv, λ) − ∂L/∂λ(w − hv, λ)] / 2h,    h = epsilon/‖v‖.

    This is the derivative of F after one plain step, what ``unrolled`` gives for one step of SGD on one batch, with H⁻¹
    of the implicit function theorem replaced by ξI. It keeps the size of ξ: the second term is about ξ times its true
    size where H is near the identity, and points elsewhere where the curvature is uneven: at a minimum of L its error
    relative to the theorem is that of a Neumann series of one term. With ``lookahead=False`` F is taken at w itself,
    which saves one gradient. Several training batches are averaged, in the step as in the difference.

    ξ is ``step_size``; ``"lr"`` is the inner optimizer's learning rate, group by group (v is then multiplied by each
    group's own). Momentum and adaptive rates are not looked at: for these see ``sama``. Weight decay that the optimizer
    couples to the gradient is part of the step. F is taken with the running statistics as they are.

    The weights move by ``epsilon`` in all to either side. The difference errs by epsilon²/6 times the derivative
    ∂⁴L/∂λ∂w³ along v/‖v‖, and by rounding of relative size eps/epsilon (eps = 6·10⁻⁸ in float32); both relative to
    ξ‖v‖. It is exact but for rounding where ∂L/∂λ is at most quadratic in w, as for a weight decay. Large models
    with weights of large norm bear a larger epsilon.

    Cost: three gradients of L (two with ``lookahead=False``), one of F and a forward of each, no second derivative;
    memory for four vectors.

    References:
        Liu, Simonyan, Yang, "DARTS: Differentiable Architecture Search", ICLR 2019, equations 7 and 8.

    Example:
        >>> import hyperopt_implicit as hi
        >>> hi.get_backend("finite_difference", step_size=0.1)
        FiniteDifference(step_size=0.1, epsilon=0.01, lookahead=True)
    """

    step_size: Annotated[
        Literal["lr"] | Annotated[float, Field(gt=0)],
        Field(description="ξ; 'lr' takes the inner optimizer's learning rate, group by group"),
    ] = "lr"
    epsilon: Annotated[float, Field(gt=0, description="how far the weights move to either side, in norm")] = 0.01
    lookahead: Annotated[bool, Field(description="take F one step ahead; without, at the present weights")] = True

    needs_second_derivative: ClassVar[bool] = False

    card: ClassVar[Card] = Card(
        family="first-order",
        gives="the derivative of one gradient step: H⁻¹ replaced by ξI; the difference errs by O(ε²)",
        cost="3 gradients of L",
        memory="4",
        conditions="none; biased where the curvature is uneven",
        use="operators without a second derivative, architecture search",
        paper="Liu, Simonyan, Yang 2019",
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
        validation = ValidationDerivatives(problem, validation_batch)
        weights, sizes = present_weights(problem), step_sizes(problem, self.step_size)
        if self.lookahead:
            here = training.at(weights)
            training_loss, validation_loss = here.loss, validation.loss_at(weights)
            _, vector, direct = validation.at(add(weights, scaled(here.inner, sizes), -1.0))
        else:
            training_loss = training.loss_at(weights)
            validation_loss, vector, direct = validation.at(weights)
        size = norm(vector)
        gradients, status = direct, Status.CONVERGED  # where F does not depend on w, this is all
        if not math.isfinite(size):
            status = Status.NON_FINITE
        elif size > 0.0:
            status = Status.TRUNCATED
            mixed = mixed_difference(training, weights, scaled(vector, sizes), self.epsilon)
            gradients = add(direct, mixed, -1.0)
        return Hypergradient(
            gradients=gradients,
            status=status if is_finite(gradients) and math.isfinite(training_loss) else Status.NON_FINITE,
            iterations=1,
            residual=None,
            hvps=0,
            validation_loss=validation_loss,
            training_loss=training_loss,
            state=state,
        )
