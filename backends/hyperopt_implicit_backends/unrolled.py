"""``unrolled``: the validation loss differentiated through the inner training steps themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from hyperopt_implicit.backend import Backend, Card, Hypergradient, State, Status
from hyperopt_implicit.errors import BackendError
from hyperopt_implicit.inner_loop import Trajectory
from hyperopt_implicit.operators import validation_gradients
from hyperopt_implicit.optimizers import check_tunable
from hyperopt_implicit.vectors import add_, is_finite

if TYPE_CHECKING:
    from hyperopt_implicit.problem import BilevelProblem


@dataclass(frozen=True)
class Unrolled(Backend):
    """Reverse-mode differentiation through the inner optimizer's steps; sees its hyperparameters too.

    With w_{t+1} = Φ(w_t, λ), dF/dλ = ∂F/∂λ + Σ_t (∂Φ/∂λ)ᵀ p_{t+1} where p_T = ∂F/∂w and p_t = (∂Φ/∂w)ᵀ p_{t+1}. It is
    exact for the steps taken, converged or not, and treats the weights at their beginning as given. Φ is the update of
    torch.optim's own functional forms: SGD (momentum, Nesterov, weight decay), Adam, AdamW, RMSprop, Adagrad, NAdam,
    RAdam, Adadelta.

    ``last=k`` differentiates the last k steps only: memory for k iterates, and an error that falls like the
    contraction of training over k steps (Shaban et al., proposition 3.1). It keeps the direction for weight decays and
    loss weights, but can get the sign of a learning rate's gradient wrong.

    Cost: each step differentiated takes about one Hessian-vector product more than a plain step; memory for one iterate
    (parameters and optimizer state) a step and the graph of a single step.

    References:
        Maclaurin, Duvenaud, Adams, "Gradient-based Hyperparameter Optimization through Reversible Learning", ICML 2015.
        Franceschi et al., "Forward and Reverse Gradient-Based Hyperparameter Optimization", ICML 2017, section 3.
        Shaban et al., "Truncated Back-propagation for Bilevel Optimization", AISTATS 2019.

    Example:
        >>> import hyperopt_implicit as hi
        >>> hi.get_backend("unrolled", last=5)
        Unrolled(last=5)
    """

    last: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Field(description="differentiate only the last so many steps; all if None"),
    ] = None

    differentiates: ClassVar[Literal["solution", "trajectory"]] = "trajectory"

    card: ClassVar[Card] = Card(
        family="unrolled",
        gives="the derivative of the steps taken, to rounding; of the last k with last=k",
        cost="1 product and 1 gradient a step",
        memory="1 and the optimizer's state, a step",
        conditions="none; a step's second derivative",
        use="options of the optimizer, short training, training that does not converge",
        paper="Maclaurin et al. 2015, Franceschi et al. 2017",
    )

    def check(self, problem: BilevelProblem) -> None:
        super().check(problem)
        check_tunable(problem.optimizer, problem.hyperparameters.names("optimizer"))

    def check_steps(self, steps: int) -> None:
        if self.last is not None and self.last > steps:
            raise BackendError(
                f"last must be at most the number of inner steps; last={self.last} was asked for, of {steps}. Lower "
                "it, train for more inner steps between outer steps, or leave it out to differentiate all of them."
            )

    def hypergradient(
        self,
        problem: BilevelProblem,
        training_batches: Sequence[Any],
        validation_batch: Any,
        state: State,
        /,
    ) -> Hypergradient:
        trajectory = Trajectory(problem, training_batches, keep=self.last)
        end = trajectory.endpoint
        validation_loss, vector, direct = validation_gradients(problem, validation_batch, end.params, end.buffers)
        gradients, steps, status = direct, 0, Status.NON_FINITE
        if trajectory.is_finite and is_finite(vector):
            through, steps = trajectory.pull_back(vector)
            gradients = add_(through, direct)
            if is_finite(gradients):
                status = Status.CONVERGED if steps == len(training_batches) else Status.TRUNCATED
        return Hypergradient(
            gradients=gradients,
            status=status,
            iterations=steps,
            residual=None,
            hvps=steps,
            validation_loss=validation_loss,
            training_loss=sum(trajectory.losses) / len(trajectory.losses),
            state=state,
            endpoint=end,
        )
