"""What became of each task in a run: its weight, its loss, which way its gradient points, and a verdict in a sentence.

The figures of it are drawn in ``task_figures.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from hyperopt_implicit.auxiliary import task_figures
from hyperopt_implicit.auxiliary.combiners import LossCombiner
from hyperopt_implicit.errors import AuxiliaryError
from hyperopt_implicit.history import OuterStep
from hyperopt_implicit.hyperparameters import Value
from hyperopt_implicit.messages import nearest
from hyperopt_implicit.operators import gradients, validation_gradients
from hyperopt_implicit.problem import BilevelProblem, evaluating
from hyperopt_implicit.randomness import AllGenerators
from hyperopt_implicit.report import Report
from hyperopt_implicit.vectors import Params, dot, norm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TURNED_DOWN = 1 / 3  # of the weight at the start
_OPPOSED = 0.05  # a cosine below minus this is more than the noise of a batch


@dataclass(frozen=True)
class TaskReading:
    """The tasks at one outer step; each list has one entry for each task.

    Attributes:
        step: the outer step.
        losses: mean loss on the training batch.
        weights: derivative of the combined loss with respect to the mean loss: the task's weight, for a weighted sum.
        cosines: of the gradients of task and validation loss, on the parameters that the validation loss uses; NaN
            where a task does not touch them.
    """

    step: int
    losses: list[float]
    weights: list[float]
    cosines: list[float]


@dataclass(frozen=True)
class TaskVerdict:
    """What a run found of an auxiliary task.

    Attributes:
        task: its name.
        verdict: ``"helps"``, ``"ignored"`` or ``"harmful"``.
        start: its weight at the first reading, relative to the main task's.
        end: at the last one.
        cosine: mean cosine of its gradient with that of the validation loss.
    """

    task: str
    verdict: Literal["helps", "ignored", "harmful"]
    start: float
    end: float
    cosine: float

    def __str__(self) -> str:
        towards = "with" if self.cosine > _OPPOSED else "against" if self.cosine < -_OPPOSED else "across"
        return (
            f"{self.task}: {self.verdict}; weight {self.start:.2g} → {self.end:.2g}, gradient {towards} the main "
            f"task's (cosine {self.cosine:+.2f})"
        )


class TaskReport(Report):
    """Watches the tasks of an auxiliary-learning run; pass it to ``optimize(…, callbacks=[report])``.

    The MLflow run then has the weight, loss and cosine of each task as metrics, figures of them and of the learned loss
    surface, and the verdicts in its description. Watching changes nothing in the run: the model is read in eval mode on
    one batch. A reading costs a backward pass a task.

    A verdict goes by the weight, relative to the main task's, at the first and last reading, and by the mean cosine. A
    task is **harmful** where its weight fell below a third of its start and the cosine is negative, or the cosine is
    below −0.05; **ignored** where the weight fell as far without that, or has not risen and the cosine is below 0.05;
    else it **helps**. That is what the run did with a task; whether it was of use, only a comparison tells.

    Args:
        losses: ``losses(model, batch)``, the losses of all tasks on a training batch, main task included, as the
            combiner takes them: ``[batch, tasks]``, or ``[batch, tasks, height, width]``.
        tasks: their names.
        main_task: the place of the main one.
        hyperparameter: the combiner's name, or that of a tensor of weights, one for each task or for each auxiliary
            task; may be left out where only one can be meant.
        context: ``context(batch)``, the keywords for a combiner that is conditioned on inputs or labels.
        every: outer steps between readings.
        training_batch: on which to read; the first of the problem's training data by default.
        validation_batch: likewise.

    Attributes:
        readings: one :class:`TaskReading` for each outer step that was read.

    Raises:
        AuxiliaryError: names and losses do not fit together, or no hyperparameter fits them; at the first reading.

    Example:
        >>> import torch, hyperopt_implicit as hi
        >>> x, y = torch.randn(40, 3), torch.randn(40, 2)
        >>> def losses(model, rows):
        ...     return (model(x[rows]) - y[rows]) ** 2
        >>> @hi.hyperparameter("combiner", init=hi.auxiliary.LinearCombiner(2))
        ... def training_loss(model, rows, *, combiner):
        ...     return combiner(losses(model, rows))
        >>> problem = hi.BilevelProblem(
        ...     torch.nn.Linear(3, 2), training_loss, lambda model, rows: losses(model, rows)[:, 0].mean(),
        ...     training_data=[slice(20)], validation_data=[slice(20, 40)],
        ...     optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        >>> report = hi.auxiliary.TaskReport(losses, tasks=["main", "other"])
        >>> _ = hi.optimize(problem, outer_steps=3, callbacks=[report], tracking=False)
        >>> print(*report.verdicts())
        other: ignored; weight 1 → 1, gradient across the main task's (cosine +0.00)
    """

    def __init__(
        self,
        losses: Callable[[Any, Any], Tensor],
        tasks: Sequence[str],
        *,
        main_task: int = 0,
        hyperparameter: str | None = None,
        context: Callable[[Any], Mapping[str, Tensor]] | None = None,
        every: int = 1,
        training_batch: Any = None,
        validation_batch: Any = None,
    ) -> None:
        if len(tasks) < 2 or len(set(tasks)) < len(tasks):
            raise AuxiliaryError(f"tasks must be the names of at least two tasks, all different; got {list(tasks)!r}.")
        if not 0 <= main_task < len(tasks):
            raise AuxiliaryError(
                f"main_task must be the place of the main task among {len(tasks)}, from 0 to {len(tasks) - 1}; got "
                f"{main_task!r}."
            )
        if every < 1:
            raise AuxiliaryError(f"every must be a whole number of at least 1; got {every!r}.")
        self.tasks = list(tasks)
        self.main_task = main_task
        self.readings: list[TaskReading] = []
        self._losses = losses
        self._name = hyperparameter
        self._context = context
        self._every = every
        self._batches = {"training_data": training_batch, "validation_data": validation_batch}
        self._drawn: set[str] = set()
        self._combiner: Value | None = None
        self._shape: tuple[int, ...] = ()

    def __call__(self, step: OuterStep, problem: BilevelProblem) -> None:
        """Read, where it is this step's turn."""
        if step.step % self._every == 0:
            self.read(problem, step.step)

    def read(self, problem: BilevelProblem, step: int) -> TaskReading:
        """Read the tasks of a problem as it stands, in a loop of one's own."""
        if not isinstance(problem, BilevelProblem):
            raise AuxiliaryError(
                "TaskReport reads a BilevelProblem, with its data and hyperparameters; got "
                f"{type(problem).__name__}. Build one around the model."
            )
        batch, validation_batch = (self._batch(problem, role) for role in self._batches)
        _, reference, _ = validation_gradients(problem, validation_batch)
        reference = {name: g for name, g in reference.items() if bool(g.any())}
        params = {name: problem.params[name] for name in reference}
        with evaluating(problem.model), torch.enable_grad():
            losses = self._losses(problem.model, batch)
            self._check(losses)
            means = _by_task(losses).mean(dim=1)
            cosines = [
                _cosine(gradients(mean, params, create_graph=False, retain_graph=True), reference) for mean in means
            ]
        self._combiner = self._weighted_by(problem)
        self._shape = tuple(losses.shape)
        context = {} if self._context is None else dict(self._context(batch))
        weights = _weights(self._combiner, losses.detach(), self.main_task, context)
        self.readings.append(TaskReading(step, means.tolist(), weights.tolist(), cosines))
        return self.readings[-1]

    def verdicts(self) -> list[TaskVerdict]:
        """A verdict for each auxiliary task; empty before the first reading."""
        if not self.readings:
            return []
        return [self._verdict(i) for i in range(len(self.tasks)) if i != self.main_task]

    def metrics(self) -> dict[str, float]:
        if not self.readings:
            return {}
        last = self.readings[-1]
        columns = {"weight": last.weights, "loss": last.losses, "cosine": last.cosines}
        return {
            f"task/{task}/{what}": values[i] for i, task in enumerate(self.tasks) for what, values in columns.items()
        }

    def figures(self) -> dict[str, Figure]:
        if not self.readings:
            return {}
        drawn = {"tasks": task_figures.trajectories(self.readings, self.tasks)}
        if isinstance(self._combiner, LossCombiner) and self._context is None:
            drawn["loss_surface"] = task_figures.loss_surface(
                self._combiner, self.readings, self.tasks, self.main_task, self._shape
            )
            drawn["loss_gradients"] = task_figures.loss_gradients(
                self._combiner, self.readings, self.tasks, self._shape
            )
        return drawn

    def lines(self) -> list[str]:
        return [str(verdict) for verdict in self.verdicts()]

    def state_dict(self) -> dict[str, Any]:
        """The readings, and the batches on which they are made; saved with a run, and what is not plain is left out."""
        return {
            "readings": [asdict(each) for each in self.readings],
            "shape": self._shape,
            "batches": {role: self._batches[role] for role in self._drawn if _is_plain(self._batches[role])},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.readings = [TaskReading(**each) for each in state["readings"]]
        self._shape = state["shape"]
        self._drawn = set(state["batches"])
        self._batches.update(state["batches"])

    def _verdict(self, i: int) -> TaskVerdict:
        start, end = (
            _ratio(each.weights[i], each.weights[self.main_task]) for each in (self.readings[0], self.readings[-1])
        )
        seen = [each.cosines[i] for each in self.readings if not math.isnan(each.cosines[i])]
        cosine = sum(seen) / len(seen) if seen else 0.0
        verdict: Literal["helps", "ignored", "harmful"]
        if end <= _TURNED_DOWN * start:
            verdict = "harmful" if cosine < 0.0 else "ignored"
        elif cosine < -_OPPOSED:
            verdict = "harmful"
        else:
            verdict = "helps" if end > start or cosine > _OPPOSED else "ignored"
        return TaskVerdict(self.tasks[i], verdict, start, end, cosine)

    def _batch(self, problem: BilevelProblem, role: str) -> Any:
        if self._batches[role] is None:
            data = getattr(problem, role)
            generators = AllGenerators(problem.device, [data])
            before = generators.states()
            self._batches[role] = problem.stream(role).peek()
            generators.put_back(before)
            self._drawn.add(role)
        return self._batches[role]

    def _check(self, losses: Tensor) -> None:
        if not isinstance(losses, Tensor) or losses.dim() < 2 or losses.shape[1] != len(self.tasks):
            found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise AuxiliaryError(
                f"TaskReport's losses must have shape [batch, tasks] with {len(self.tasks)} tasks "
                f"({', '.join(self.tasks)}); got {found}. Give one row of means, losses[None], where tasks have "
                "samples of their own."
            )

    def _weighted_by(self, problem: BilevelProblem) -> Value:
        values = problem.hyperparameters.values()
        if self._name is not None:
            if self._name not in values:
                raise AuxiliaryError(
                    f"TaskReport reads hyperparameter {self._name!r}, and the problem has "
                    f"{', '.join(values)}.{nearest(self._name, values)}"
                )
            values = {self._name: values[self._name]}
        fitting = {
            name: value
            for name, value in values.items()
            if isinstance(value, LossCombiner)
            or (isinstance(value, Tensor) and value.dim() == 1 and len(self.tasks) - len(value) in (0, 1))
        }
        if len(fitting) != 1:
            raise AuxiliaryError(
                "TaskReport needs one hyperparameter that weighs the tasks, a LossCombiner or a tensor with a weight "
                f"for each of {len(self.tasks)} tasks or of the {len(self.tasks) - 1} auxiliary ones; found "
                f"{', '.join(fitting) or 'none'} among {', '.join(values)}. Name it with hyperparameter=."
            )
        return next(iter(fitting.values()))


def _by_task(losses: Tensor) -> Tensor:
    """[tasks, everything else]."""
    return losses.transpose(0, 1).flatten(1)


def _weights(weighted_by: Value, losses: Tensor, main_task: int, context: Mapping[str, Tensor]) -> Tensor:
    if isinstance(weighted_by, LossCombiner):
        return weighted_by.effective_weights(losses, **context)
    assert isinstance(weighted_by, Tensor)  # nothing else is found to weigh tasks
    weights = weighted_by.detach()
    if len(weights) == losses.shape[1]:
        return weights
    return torch.cat([weights[:main_task], torch.ones_like(weights[:1]), weights[main_task:]])


def _cosine(x: Params, y: Params) -> float:
    size = norm(x) * norm(y) if x else 0.0
    return dot(x, y) / size if size > 0.0 else math.nan


def _ratio(weight: float, main: float) -> float:
    return weight / main if main != 0.0 else math.inf


def _is_plain(batch: Any) -> bool:
    if isinstance(batch, dict):
        return all(map(_is_plain, batch.values()))
    return (
        all(map(_is_plain, batch)) if type(batch) in (list, tuple) else type(batch) in (Tensor, int, float, str, bool)
    )
