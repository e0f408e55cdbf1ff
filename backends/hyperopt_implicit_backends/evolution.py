"""``evolution``: differences of the validation loss between trainings at hyperparameters a little apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from hyperopt_implicit.backend import Backend, Card, Hypergradient, State, Status
from hyperopt_implicit.forward_mode import random_directions, seeded_generator
from hyperopt_implicit.inner_loop import InnerSteps, Iterate
from hyperopt_implicit.optimizers import update_rule
from hyperopt_implicit.randomness import random_states, replaying
from hyperopt_implicit.vectors import Params, add, add_, is_finite, zeros_like

if TYPE_CHECKING:
    from hyperopt_implicit.problem import BilevelProblem


@dataclass(frozen=True)
class Evolution(Backend):
    """Antithetic evolution strategies through the inner training: any validation metric, first derivatives of L only.

    With F_T(λ) the validation loss after the steps taken from the present weights at the hyperparameters λ, m scalar
    hyperparameters and k directions ε_i,

        ĝ = (c/k) Σ_i [F_T(λ + σε_i) − F_T(λ − σε_i)]/(2σ) · ε_i,

    c = m for orthonormal directions and c = 1 for independent Gaussian ones, so that the mean of ĝ is dF_T/dλ up to a
    bias of order σ² (none where F_T is quadratic in λ). With g = dF_T/dλ, the variance E‖ĝ − g‖² is then, to the same
    order, (m/k − 1)‖g‖² for orthonormal directions, of which m are enough, and ((m + 1)/k)‖g‖² for Gaussian ones. The
    difference is divided by 2σ: the estimate does not scale with σ.

    F may be any number that a tensor holds: an accuracy, a count, something detached. Where it moves in steps, ĝ is the
    slope of F smoothed over a width of about σ, and σ must be large enough for it to change at all. Too small a σ
    drowns in rounding: in float32, differences of F lie near 1e-7/σ. σ is measured on the unconstrained side: under
    ``positive``, 0.01 is one per cent.

    Both trainings of a pair, and the one at λ itself, draw the same random numbers (dropout masks), which leaves the
    noise out of the difference. Directions come from a generator seeded by ``seed`` and the number of the call;
    ``seed=None`` takes torch's global one, after training has drawn from it. Hyperparameters of the optimizer are seen,
    every numeric option of them, if it is one of torch.optim's functional forms (as for ``unrolled``). Running
    statistics of normalisation layers are those that each training ends with, so that their dependence on λ is seen,
    as it is not by the backends that differentiate.

    Use it for metrics without a gradient, training losses without a second derivative, and rough loss surfaces, with
    few hyperparameters. With a differentiable F and L, ``forward`` and ``unrolled`` are exact and cheaper.

    Cost: 2k + 1 trainings, no Hessian-vector product; memory for one copy of the parameters and the optimizer's state
    beside the model's, and the endpoint. Of orthonormal directions no more than m are taken.

    Departs from the papers: Salimans et al. and Metz et al. draw Gaussian directions; orthonormal ones, by default
    here, have less variance and the same mean up to order σ².

    References:
        Salimans et al., "Evolution Strategies as a Scalable Alternative to Reinforcement Learning", 2017,
            arXiv:1703.03864.
        Metz et al., "Understanding and Correcting Pathologies in the Training of Learned Optimizers", ICML 2019.

    Example:
        >>> import hyperopt_implicit as hi
        >>> hi.get_backend("evolution", sigma=0.1, pairs=4)
        Evolution(sigma=0.1, pairs=4, orthogonal=True, seed=0)
    """

    sigma: Annotated[float, Field(gt=0, description="how far the hyperparameters are moved, σ")] = 0.01
    pairs: Annotated[int, Field(ge=1, description="number of directions k; each is two trainings")] = 8
    orthogonal: Annotated[
        bool, Field(description="orthonormal directions, complete from k = m on; otherwise independent Gaussian ones")
    ] = True
    seed: Annotated[
        Annotated[int, Field(ge=0)] | None,
        Field(description="of the generator of the directions; None takes torch's global one"),
    ] = 0

    differentiates: ClassVar[Literal["solution", "trajectory"]] = "trajectory"
    needs_second_derivative: ClassVar[bool] = False
    needs_validation_gradient: ClassVar[bool] = False

    card: ClassVar[Card] = Card(
        family="first-order",
        gives="an estimate of the derivative of the steps taken; bias of order σ², variance (m/k − 1)‖g‖² with k pairs",
        cost="2k + 1 trainings, no product",
        memory="2 and the optimizer's state",
        conditions="m/k not too large; σ wide enough for F to change",
        use="metrics without a gradient, few hyperparameters",
        paper="Salimans et al. 2017, Metz et al. 2019",
    )

    def check(self, problem: BilevelProblem) -> None:
        super().check(problem)
        update_rule(problem.optimizer)

    def hypergradient(
        self,
        problem: BilevelProblem,
        training_batches: Sequence[Any],
        validation_batch: Any,
        state: State,
        /,
    ) -> Hypergradient:
        call = int(state.get("calls", 0))
        hparams = {name: x.detach() for name, x in problem.hparams.items()}
        before = random_states(problem.device)
        losses, end, validation_loss = _train(problem, hparams, training_batches, validation_batch)
        drawn = random_directions(
            hparams,
            self.pairs,
            orthogonal=self.orthogonal,
            generator=None if self.seed is None else seeded_generator(self.seed, call),
        )
        gradients, status = zeros_like(hparams), Status.NON_FINITE
        if math.isfinite(sum(losses)) and is_finite(end.params):
            for direction in drawn.directions:
                sides = []
                for offset in (self.sigma, -self.sigma):
                    moved = add(hparams, direction, offset)
                    with replaying(before, problem.device):
                        sides.append(_train(problem, moved, training_batches, validation_batch)[2])
                add_(gradients, direction, drawn.scale * (sides[0] - sides[1]) / (2.0 * self.sigma))
            if is_finite(gradients):
                status = Status.CONVERGED if drawn.complete else Status.TRUNCATED
        return Hypergradient(
            gradients=gradients,
            status=status,
            iterations=len(drawn.directions),
            residual=None,
            hvps=0,
            validation_loss=validation_loss,
            training_loss=sum(losses) / len(losses),
            state={"calls": call + 1},
            endpoint=end.inner_state,
        )


def _train(
    problem: BilevelProblem, hparams: Params, training_batches: Sequence[Any], validation_batch: Any
) -> tuple[list[float], Iterate, float]:
    """L before each step, where the steps lead, and F there."""
    losses = []
    for loss, current in InnerSteps(problem).walk(hparams, training_batches):
        losses.append(loss)
        end = current
    with torch.no_grad():
        validation = problem.functional_validation_loss(end.params, hparams, validation_batch, end.buffers)
    return losses, end, float(validation)
