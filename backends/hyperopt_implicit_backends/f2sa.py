"""``f2sa``: the difference between training with and without a little of the validation loss, by first derivatives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from hyperopt_implicit.backend import Backend, Card, Hypergradient, State, Status
from hyperopt_implicit.first_order import (
    Derivatives,
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

_ROUNDING = 1.0 + 1e-6  # growth of the residual that float32 rounding alone can cause


@dataclass(frozen=True)
class _Point:
    """Weights y, and what is known there."""

    weights: Params
    training: Derivatives
    vector: Params
    direct: Params
    slope: Params

    def residual(self, penalty: float) -> float:
        size = norm(self.vector)
        return norm(self.slope) * penalty / size if size > 0.0 else 0.0


@dataclass(frozen=True)
class F2SA(Backend):
    """Penalised weights beside the model's: a fully first-order method whose bias falls like 1/penalty.

    Beside the model's weights w, which its inner optimizer trains on L, it carries weights y that it trains itself on
    L + F/σ by gradient descent, y ← y − step_size·(∂L/∂w(y) + ∂F/∂w(y)/σ), and

        dF/dλ ≈ ∂F/∂λ(y, λ) + σ [∂L/∂λ(y, λ) − ∂L/∂λ(w, λ)].

    With y and w at their minima, y = w − H⁻¹v/σ + O(1/σ²), so that the error is O(1/σ) (lemma 3.1 of the paper): for a
    quadratic F and L it is that of H + (∂²F/∂w²)/σ in the place of H. Where w has not converged, ∂L/∂λ(w) is off and σ
    multiplies it: an error of about σ·(∂²L/∂λ∂w) H⁻¹ ∂L/∂w, without a bound as σ grows. A large penalty therefore
    needs training close to a minimum; the default trades a tenth or so of bias for that. ``penalty_growth`` raises σ
    at each call, as the paper's schedule does.

    y starts at w in the first call and is carried from then on; a call makes ``steps`` steps on the batches that it is
    given, averaged. The residual is ‖∂L/∂w(y) + ∂F/∂w(y)/σ‖·σ/‖∂F/∂w(y)‖: how far y is from its minimum, 1 where y = w
    at a minimum of L. For quadratic losses and w at its minimum it is ‖Au − v‖/‖∂F/∂w(y)‖ for u = σ(w − y) and A the
    matrix above. σ must be so large that L + F/σ curves upwards around y. The status is ``converged`` where it has
    fallen to ``tolerance``, of which the bias is no part, ``diverged`` where the steps made it grow; the best y is
    returned, and the next call starts at w again.

    ``step_size="lr"`` is the inner optimizer's learning rate, group by group, which suits SGD; other optimizers' rates
    are in other units. ``"auto"`` starts from it and goes on with the step ⟨s, r⟩/⟨r, r⟩ of Barzilai and Borwein, from
    the last displacement s and the change r of the gradient; it suits any optimizer and needs far fewer steps.

    The paper trains w by the method itself and samples anew at each step; here w is the model, and the batches are
    those of the call. Weight decay that the inner optimizer couples to the gradient counts as a part of L.

    Cost: ``steps`` + 1 gradients of L and F, one more of L, no second derivative; memory for a dozen vectors, one of
    them carried.

    References:
        Kwon, Kwon, Wright, Nowak, "A Fully First-Order Method for Stochastic Bilevel Optimization", ICML 2023,
            algorithm 1 and lemma 3.1.
        Barzilai, Borwein, "Two-Point Step Size Gradient Methods", IMA J. Numer. Anal. 8, 1988, for ``"auto"``.

    Example:
        >>> import hyperopt_implicit as hi
        >>> hi.get_backend("f2sa", penalty=100.0)
        F2SA(penalty=100.0, penalty_growth=0.0, steps=10, step_size='lr', tolerance=0.0)
    """

    penalty: Annotated[float, Field(gt=0, description="σ, the weight of L against F")] = 10.0
    penalty_growth: Annotated[float, Field(ge=0, description="what each call adds to the penalty for the next")] = 0.0
    steps: Annotated[int, Field(ge=1, description="steps of the penalised weights a call")] = 10
    step_size: Annotated[
        Literal["lr", "auto"] | Annotated[float, Field(gt=0)],
        Field(description="of these steps; 'lr' takes the inner optimizer's learning rate, 'auto' adapts it"),
    ] = "lr"
    tolerance: Annotated[float, Field(ge=0, description="stop early at this relative residual")] = 0.0

    needs_second_derivative: ClassVar[bool] = False

    card: ClassVar[Card] = Card(
        family="first-order",
        gives="the theorem's value with a bias of O(1/σ), and σ times what training has not converged",
        cost="K + 2 gradients of L, K + 1 of F (K = steps)",
        memory="12",
        conditions="H positive definite, w near its minimum",
        use="operators without a second derivative, and more accuracy than one step gives",
        paper="Kwon, Kwon, Wright, Nowak 2023",
    )

    def check(self, problem: BilevelProblem) -> None:
        super().check(problem)
        refuse_ascent(problem, "f2sa")

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
        weights = present_weights(problem)
        at_weights = training.at(weights)
        validation_loss = validation.loss_at(weights)
        calls = int(state.get("calls", 0))
        penalty = self.penalty + calls * self.penalty_growth
        start = carried_weights(state, weights)
        best, status, steps = self._descend(training, validation, start, step_sizes(problem, self._first()), penalty)
        if norm(best.vector) == 0.0:  # F is flat at y, so that what y and w differ by is no response to it
            gradients = best.direct
        else:
            gradients = {
                name: direct + penalty * (best.training.hparams[name] - at_weights.hparams[name])
                for name, direct in best.direct.items()
            }
        if not (is_finite(gradients) and math.isfinite(at_weights.loss + validation_loss)):
            status = Status.NON_FINITE
        carried: State = {"calls": calls + 1}
        if not status.failed:
            carried["weights"] = {name: y.clone() for name, y in best.weights.items()}
        return Hypergradient(
            gradients=gradients,
            status=status,
            iterations=steps,
            residual=best.residual(penalty),
            hvps=0,
            validation_loss=validation_loss,
            training_loss=at_weights.loss,
            state=carried,
        )

    def _first(self) -> float | str:
        return "lr" if self.step_size == "auto" else self.step_size

    def _descend(
        self,
        training: TrainingDerivatives,
        validation: ValidationDerivatives,
        start: Params,
        sizes: dict[str, float],
        penalty: float,
    ) -> tuple[_Point, Status, int]:
        """The point of least residual on the way, how the descent ended, and its number of steps."""
        here = first = best = _evaluate(training, validation, start, penalty)
        target = max(self.tolerance, precision(start) * penalty)
        steps = 0
        while steps < self.steps and here.residual(penalty) > target:
            following = add(here.weights, scaled(here.slope, sizes), -1.0)
            there = _evaluate(training, validation, following, penalty)
            steps += 1
            if not math.isfinite(norm(there.slope)):
                return best, Status.DIVERGED if steps > 1 else Status.NON_FINITE, steps
            if self.step_size == "auto":
                sizes = _adapted(here, there, sizes)
            here = there
            if norm(here.slope) < norm(best.slope):
                best = here
        if best.residual(penalty) <= target:
            return best, Status.CONVERGED, steps
        grown = norm(here.slope) > norm(first.slope) * _ROUNDING
        return best, Status.DIVERGED if grown else Status.TRUNCATED, steps


def _evaluate(
    training: TrainingDerivatives, validation: ValidationDerivatives, weights: Params, penalty: float
) -> _Point:
    derivatives = training.at(weights)
    _, vector, direct = validation.at(weights)
    return _Point(weights, derivatives, vector, direct, add(derivatives.inner, vector, 1.0 / penalty))


def _adapted(here: _Point, there: _Point, sizes: dict[str, float]) -> dict[str, float]:
    """⟨s, r⟩/⟨r, r⟩, the shorter of Barzilai's and Borwein's: directions without curvature have no part in it."""
    displacement = add(there.weights, here.weights, -1.0)
    change = add(there.slope, here.slope, -1.0)
    along, squared = dot(displacement, change), dot(change, change)
    return dict.fromkeys(sizes, along / squared) if along > 0.0 and squared > 0.0 else sizes
