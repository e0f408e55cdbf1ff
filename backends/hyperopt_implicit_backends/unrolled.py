"""``unrolled``: the validation loss differentiated through the inner training steps themselves."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ByteSize, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from hyperopt_implicit.backend import Backend, Card, Hypergradient, State, Status
from hyperopt_implicit.errors import BackendError
from hyperopt_implicit.inner_loop import InnerSteps
from hyperopt_implicit.messages import warn
from hyperopt_implicit.operators import validation_gradients
from hyperopt_implicit.optimizers import check_tunable, update_rule
from hyperopt_implicit.reversal import Plan, fewest_slots
from hyperopt_implicit.trajectory import Trajectory
from hyperopt_implicit.vectors import add_, is_finite

if TYPE_CHECKING:
    from hyperopt_implicit.problem import BilevelProblem


def _in_bytes(value: Any) -> Any:
    """``"50 MB"`` as a number."""
    if value is None or value == "auto":
        return value
    try:
        size = 0 if isinstance(value, bool) else TypeAdapter(ByteSize).validate_python(value)
    except ValidationError:
        size = 0
    if size < 1:
        raise PydanticCustomError(
            "memory", "must be a positive number of bytes, a string such as '50 MB', 'auto', or None"
        )
    return int(size)


@dataclass(frozen=True)
class Unrolled(Backend):
    """Reverse-mode differentiation through the inner optimizer's steps; sees its hyperparameters too.

    With w_{t+1} = Φ(w_t, λ), dF/dλ = ∂F/∂λ + Σ_t (∂Φ/∂λ)ᵀ p_{t+1} where p_T = ∂F/∂w and p_t = (∂Φ/∂w)ᵀ p_{t+1}. It is
    exact for the steps taken, converged or not, and treats the weights at their beginning as given. Φ is the update of
    torch.optim's own functional forms: SGD (momentum, Nesterov, weight decay), Adam, AdamW (amsgrad too), Adamax,
    NAdam, RAdam, RMSprop, Adagrad, Adadelta, ASGD and Rprop. Where a second moment is zero, the derivative of its root
    is taken as zero. Rprop looks at signs only, so that what L depends on has no influence but across jumps: its
    derivative is zero almost everywhere, and only that with respect to its learning rate, where it starts, is not.

    The steps are differentiated one at a time, last to first, and no graph is longer than one step. Each needs the
    iterate that it began with: weights, the optimizer's state, buffers and the state of the generators. ``memory`` is
    what the iterates may take, the one that walks included; from it follows what is kept:

    - all of them, where they fit, or with None;
    - else as many as fit, and the rest are found again by training on from the nearest one. With T steps and s
      iterates the binomial schedule takes the fewest steps again that are possible: r(T + 1) − C(s + r, r − 1) − T,
      with r the smallest for which C(s + r, s) > T;
    - with ``"auto"`` the fewest with which no step is taken again more than once, about √(2T).

    ``folder`` keeps all on disk instead, in a temporary directory there that is removed at the end, whatever happens.
    A step that is taken again draws the same random numbers and moves the same running statistics by the same
    operations: the result is the same whatever is kept, to the bit where the operations are deterministic. ``plan``
    says beforehand what would be.

    ``last=k`` differentiates the last k steps only: memory for k iterates, and an error that falls like the
    contraction of training over k steps (Shaban et al., proposition 3.1). It keeps the direction for weight decays and
    loss weights, but can get the sign of a learning rate's gradient wrong.

    Cost: each step differentiated takes about one Hessian-vector product more than two plain steps, and each step taken
    again, which ``hvps`` does not count, one gradient. Memory for the iterates kept, and beside them for the endpoint,
    p, and the graph of a single step: what a gradient of L with its graph takes, about four times the activations of
    one batch.

    References:
        Maclaurin, Duvenaud, Adams, "Gradient-based Hyperparameter Optimization through Reversible Learning", ICML 2015.
        Franceschi et al., "Forward and Reverse Gradient-Based Hyperparameter Optimization", ICML 2017, section 3.
        Shaban et al., "Truncated Back-propagation for Bilevel Optimization", AISTATS 2019.
        Griewank, Walther, "Algorithm 799: revolve", ACM Transactions on Mathematical Software 2000.

    Example:
        >>> import hyperopt_implicit as hi
        >>> hi.get_backend("unrolled", memory="50 MB")
        Unrolled(last=None, memory=50000000, folder=None)
    """

    last: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Field(description="differentiate only the last so many steps; all if None"),
    ] = None
    memory: Annotated[
        int | Literal["auto"] | None,
        BeforeValidator(_in_bytes),
        Field(description="what the iterates may take, in bytes or as '50 MB'; 'auto': about √(2T) of T; all if None"),
    ] = None
    folder: Annotated[
        str | None, Field(description="keep the iterates on disk, in a temporary directory in this folder")
    ] = None

    differentiates: ClassVar[Literal["solution", "trajectory"]] = "trajectory"

    card: ClassVar[Card] = Card(
        family="unrolled",
        gives="the derivative of the steps taken, to rounding; of the last k with last=k",
        cost="1 product and 1 gradient a step, and at most 1 gradient more with memory='auto'",
        memory="1 and the optimizer's state, a step; about √(2T) of them for T steps with memory='auto'",
        conditions="none; a step's second derivative",
        use="options of the optimizer, short training, training that does not converge",
        paper="Maclaurin et al. 2015, Franceschi et al. 2017",
    )

    def check(self, problem: BilevelProblem) -> None:
        super().check(problem)
        tuned = problem.hyperparameters.names("optimizer")
        check_tunable(problem.optimizer, tuned)
        self._check_space(problem)
        if self.last is not None and "lr" in tuned:
            warn(
                f"last={self.last} leaves out how the learning rate acted in the steps before, and gives the gradient "
                "of 'lr' the wrong sign or a fraction of its size where training is longer. Leave last out; "
                "memory='auto' differentiates all steps in little memory."
            )
        if update_rule(problem.optimizer).signs_only and problem.hyperparameters.names("loss"):
            warn(
                f"{type(problem.optimizer).__name__} looks at the signs of gradients only: through its steps, the "
                "derivative with respect to hyperparameters of the losses is zero almost everywhere. Use another "
                "inner optimizer, or 'evolution', which sees across the jumps."
            )

    def check_steps(self, steps: int) -> None:
        if self.last is not None and self.last > steps:
            raise BackendError(
                f"last must be at most the number of inner steps; last={self.last} was asked for, of {steps}. Lower "
                "it, train for more inner steps between outer steps, or leave it out to differentiate all of them."
            )

    def plan(self, problem: BilevelProblem, steps: int) -> Plan:
        """How many iterates would be kept for so many inner steps, and how many steps taken again.

        Raises:
            BackendError: there is no room for them.
        """
        length = steps if self.last is None else min(self.last, steps)
        size = self._check_space(problem)
        if self.folder is not None:
            free = shutil.disk_usage(self.folder).free
            if length * size > free:
                raise BackendError(
                    f"folder must have room for the iterates of all steps; {length} of {_words(size)} take "
                    f"{_words(length * size)}, and {self.folder!r} has {_words(free)} left. Take another folder, or "
                    "memory= in its place, which keeps fewer."
                )
        slots = length
        if self.memory == "auto":
            slots = fewest_slots(length)
        elif self.memory is not None:
            slots = self.memory // size - (length < steps)  # one walks; the first of those kept may be the model itself
        return Plan(length, min(slots, length))

    def _check_space(self, problem: BilevelProblem) -> int:
        """Whether there is any room for iterates, and what one of them takes, where that matters."""
        if self.folder is None and not isinstance(self.memory, int):
            return 0
        size = InnerSteps(problem).iterate_bytes()
        if self.folder is not None and self.memory is not None:
            raise BackendError(
                f"memory and folder exclude each other: iterates are kept in memory or on disk; got "
                f"memory={self.memory!r} and folder={self.folder!r}. Leave one of them out."
            )
        if self.folder is not None and not (self.folder and Path(self.folder).is_dir()):
            raise BackendError(
                f"folder must be a directory that exists; got {self.folder!r}. Make it, or name another."
            )
        if isinstance(self.memory, int) and self.memory < 2 * size:
            raise BackendError(
                "memory must hold at least two iterates, one that is kept and one that walks; an iterate of this "
                f"problem (weights, optimizer state, buffers, generators) takes {_words(size)}, and memory is "
                f"{_words(self.memory)}. Give at least memory={2 * size}, or folder= to keep iterates on disk."
            )
        return size

    def hypergradient(
        self,
        problem: BilevelProblem,
        training_batches: Sequence[Any],
        validation_batch: Any,
        state: State,
        /,
    ) -> Hypergradient:
        plan = self.plan(problem, len(training_batches))
        with Trajectory(problem, training_batches, self.last, slots=plan.slots, folder=self.folder) as trajectory:
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


def _words(size: int) -> str:
    """A number of bytes as a reader takes it in."""
    units = [(1e9, "GB"), (1e6, "MB"), (1e3, "kB")]
    return next((f"{size / unit:.4g} {name}" for unit, name in units if size >= unit), f"{size} bytes")
