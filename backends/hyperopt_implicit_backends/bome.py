"""``bome``: descent on the validation loss under the constraint that the training loss is at its minimum."""

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
    carried_weights,
    present_weights,
    refuse_ascent,
    scaled,
    step_sizes,
)
from hyperopt_implicit.vectors import Params, add, dot, is_finite, norm, precision

if TYPE_CHECKING:
    from hyperopt_implicit.problem import BilevelProblem

_ROUNDING = 1000  # units of rounding below which a difference means nothing


@dataclass(frozen=True)
class Bome(Backend):
    """Descent on F that keeps L at its minimum: the gap in L is differentiated with first derivatives only.

    It carries weights θ of its own, which start at the model's. A call takes θ^(T) from ``steps`` = T steps of gradient
    descent on L from θ, regards it as a constant in the gap q = L(θ, λ) − L(θ^(T), λ), and moves along ∇F + κ∇q, with
    both gradients over (λ, θ) together:

        ∇q = (∂L/∂λ(θ) − ∂L/∂λ(θ^(T)), ∂L/∂w(θ)),    κ = max(η − ⟨∇F, ∇q⟩/‖∇q‖², 0),
        dF/dλ ≈ ∂F/∂λ(θ) + κ [∂L/∂λ(θ) − ∂L/∂λ(θ^(T))],    θ ← θ − step_size·[∂F/∂w(θ) + κ ∂L/∂w(θ)].

    κ is the least that closes the gap at rate η. In the paper one step size moves λ and θ; here θ moves at each call by
    ``step_size``, which the T steps share, and λ by the outer optimizer.

    The model's own weights w are where θ starts, at the first call and after a failure; F and L are reported at them,
    and they are trained on L as with any backend. The number comes from θ, which gets one step a call: the
    hypergradient says nothing until it has moved (at a minimum of L with θ = w, the gap is zero and so is κ, which
    leaves the direct term), and a change of w reaches it only as far as both follow λ.

    At fixed λ the number is biased. A fixed point of θ has ∂F/∂w(θ) + κ ∂L/∂w(θ) = 0, so that θ minimises L + F/κ, with
    κ = η (1 + ‖∂L/∂w(θ)‖²/‖∂L/∂λ(θ) − ∂L/∂λ(θ^(T))‖²) where there is no direct term. θ need not reach it: with a fixed
    step_size it was seen to cycle, with κ·step_size near the limit of stability below. With T small the number is
    smaller as well, by the part of the gap that the T steps leave open. That it decreases F is not guaranteed. Joint
    training settles where this biased number is zero, near the optimum and not at it: on ridge regression F ended
    within 0.4 % of its least value, within 0.1 % with smaller steps. Use it as a coarse method.

    step_size must be below 2/(κ λ_max) for θ, and below 2/λ_max for the T steps (λ_max the largest eigenvalue of H).
    The status is ``diverged`` where the T steps raised L; the direct term alone is then returned, and θ starts at w
    again. Weight decay that the inner optimizer couples to the gradient counts as a part of L.

    Cost: ``steps`` + 2 gradients of L at most, one of F and a forward of it, no second derivative; memory for a dozen
    vectors, one of them carried.

    References:
        Liu, Ye, Wright, Stone, Liu, "BOME! Bilevel Optimization Made Easy: A Simple First-Order Approach", NeurIPS
            2022, algorithm 1.

    Example:
        >>> import hyperopt_implicit as hi
        >>> hi.get_backend("bome", steps=20)
        Bome(eta=0.5, steps=20, step_size='lr')
    """

    eta: Annotated[float, Field(gt=0, description="η, how fast the gap in L is to close")] = 0.5
    steps: Annotated[int, Field(ge=1, description="steps on L that the gap is measured with")] = 10
    step_size: Annotated[
        Literal["lr"] | Annotated[float, Field(gt=0)],
        Field(description="of these steps and of θ; 'lr' takes the inner optimizer's learning rate"),
    ] = "lr"

    needs_second_derivative: ClassVar[bool] = False
    takes_complex_weights: ClassVar[bool] = False

    card: ClassVar[Card] = Card(
        family="first-order",
        gives="a direction along F that closes the gap in L; mostly one of descent, biased at fixed λ",
        cost="K + 2 gradients of L (K = steps)",
        memory="12",
        conditions="step below 2/λ_max and 2/(κ λ_max); many calls, λ moving slowly",
        use="operators without a second derivative, no penalty to choose",
        paper="Liu, Ye, Wright, Stone, Liu 2022",
    )

    def check(self, problem: BilevelProblem) -> None:
        super().check(problem)
        refuse_ascent(problem, "bome")

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
        training_loss, validation_loss = training.loss_at(weights), validation.loss_at(weights)
        start = carried_weights(state, weights)
        here = there = training.at(start)
        _, vector, direct = validation.at(start)
        arrived = start
        for _ in range(self.steps):
            arrived = add(arrived, scaled(there.inner, sizes), -1.0)
            there = training.at(arrived)
        slope = add(here.hparams, there.hparams, -1.0)
        weight = self._weight(here.inner, slope, vector, direct)
        gradients = direct if norm(vector) == 0.0 else add(direct, slope, weight)
        moved = add(start, scaled(add(vector, here.inner, weight), sizes), -1.0)
        if not (is_finite(gradients) and is_finite(moved) and math.isfinite(training_loss + validation_loss)):
            status = Status.NON_FINITE
        elif there.objective - here.objective > precision(start) * _ROUNDING * abs(here.objective):
            status, gradients = Status.DIVERGED, direct
        else:
            status = Status.TRUNCATED
        return Hypergradient(
            gradients=gradients,
            status=status,
            iterations=self.steps,
            residual=None,
            hvps=0,
            validation_loss=validation_loss,
            training_loss=training_loss,
            state={} if status.failed else {"weights": moved},
        )

    def _weight(self, inner: Params, slope: Params, vector: Params, direct: Params) -> float:
        """κ, from ∇q = (inner, slope) and ∇F = (vector, direct)."""
        squared = dot(inner, inner) + dot(slope, slope)
        size = math.hypot(norm(vector), norm(direct))
        if not math.sqrt(squared) > _ROUNDING * precision(vector) * size:  # at a minimum of L, q has no direction
            return 0.0
        return max(self.eta - (dot(vector, inner) + dot(direct, slope)) / squared, 0.0)
