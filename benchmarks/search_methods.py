"""The ways to search that compete, each as one worker of a run: what they share, and what each does with its time.

All are given the same task, the same seconds and the same default configuration. Where a method has trials, a trial
counts when it has ended before time is up. When a run is made and what becomes of it is in ``search.py``.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from search_problems import Task, Weights, validation_loss
from torch import Tensor, nn

import hyperopt_implicit as hi

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.study import Study

STUDY = "race"
ENDLESS = 10**9


class Deadline:
    """The time of a run, from when this is made."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._started = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._started


@dataclass(frozen=True)
class Found:
    """A model that was better than all before it, by its validation loss, and when that was known."""

    seconds: float
    validation: float
    state: Weights


@dataclass
class Log:
    """What one worker has found before the deadline; later things are not taken.

    Attributes:
        deadline: of the run.
        found: one better than the other.
        trials: how many ended in time, by state.
        last_look: seconds at which the clock was last looked at.
    """

    deadline: Deadline
    found: list[Found] = field(default_factory=list)
    trials: Counter[str] = field(default_factory=Counter)
    last_look: float = 0.0

    @property
    def over(self) -> bool:
        self.last_look = self.deadline.now()
        return self.last_look > self.deadline.seconds

    def ended(self, state: str) -> bool:
        """A trial has ended; whether it was in time."""
        if self.over:
            return False
        self.trials[state] += 1
        return True

    def add(self, validation: float, state: Weights) -> None:
        """A model that is known from now on."""
        if not self.over and validation < (self.found[-1].validation if self.found else math.inf):
            self.found.append(Found(self.last_look, validation, state))


@dataclass(frozen=True)
class Setting:
    """What a method is given.

    Attributes:
        task: the problem.
        size: number of hyperparameters.
        seed: of data, model and samplers.
        worker: which of the workers this is.
        folder: where the workers of a run meet.
        storage: of the study that they share; None for methods that have none.
    """

    task: Task
    size: int
    seed: int
    worker: int
    folder: Path
    storage: BaseStorage | None

    def sampler(self, name: str) -> BaseSampler:
        """Optuna's, as it comes, with a seed of this worker's own."""
        import optuna

        seed = 1000 * self.seed + self.worker
        return {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}[name](seed=seed)

    def study(self, sampler: str) -> Study:
        import optuna

        return optuna.load_study(
            study_name=STUDY, storage=self.storage, sampler=self.sampler(sampler), pruner=pruner(self.task, plain=True)
        )


def pruner(task: Task, *, plain: bool) -> Any:
    """Optuna's median pruner, silent for the first eighth of a trial; steps are counted as trials report them."""
    from optuna.pruners import MedianPruner

    length = task.trial.steps if plain else task.trial.outer_steps
    return MedianPruner(n_warmup_steps=length // 8)


def distributions(task: Task, size: int) -> dict[str, BaseDistribution]:
    """Everything, for a search without gradients: the knob and each hyperparameter."""
    from optuna.distributions import FloatDistribution

    lr, weights = task.inner_lr, task.weights
    each = FloatDistribution(weights.low, weights.high, log=weights.log)
    return {"inner_lr": FloatDistribution(lr.low, lr.high, log=lr.log), **{f"weight_{i}": each for i in range(size)}}


def default(task: Task, size: int) -> dict[str, float]:
    """The configuration that is tried first."""
    return {"inner_lr": task.inner_lr.default, **{f"weight_{i}": task.weights.default for i in range(size)}}


# ------------------------------------------------------------------------------------------- gradients in each trial


def retrained(task: Task, seed: int, inner_lr: float, results: Iterable[Tensor]) -> tuple[float, Weights]:
    """The lowest validation loss that a model trained anew has with any of these hyperparameters, and the model."""
    best, kept = math.inf, Weights()
    for weights in results:
        *_, (_, loss, model) = looks(task, seed, weights, inner_lr, only_last=True)
        if loss < best:
            best, kept = loss, copied(model)
    return best, kept


def copied(model: nn.Module) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def hyperparameters_of(result: hi.Result) -> list[Tensor]:
    """Those of the last outer step and, where it is another, of the one with the lowest validation loss."""
    candidates = [result.hyperparameters["weights"], result.best_hyperparameters["weights"]]
    tensors = [each for each in candidates if isinstance(each, Tensor)]
    return tensors[:1] if torch.equal(tensors[0], tensors[1]) else tensors


def optuna_and_gradients(setting: Setting, log: Log) -> None:
    """``hi.search``: Optuna over the knobs, and the hyperparameters by gradient in each trial."""
    from optuna.distributions import FloatDistribution

    task, trial = setting.task, setting.task.trial
    lr, weights = task.inner_lr, task.weights.inside()
    kept = Weights()

    @hi.knob("inner_lr", FloatDistribution(lr.low, lr.high, log=lr.log))
    @hi.knob("initial", FloatDistribution(weights.low, weights.high, log=weights.log))
    def builder(*, inner_lr: float, initial: float) -> hi.BilevelProblem:
        return task.problem(setting.seed, torch.full((setting.size,), initial), inner_lr)

    def trained_anew(result: hi.Result) -> float:
        nonlocal kept
        if log.over:  # it will not count, and fails as a trial without a finite loss
            return math.inf
        loss, kept = retrained(
            task, setting.seed, result.problem.optimizer.param_groups[0]["lr"], hyperparameters_of(result)
        )
        return loss

    def on_trial(ended: Any) -> None:
        if log.ended(ended.state.name.lower()) and ended.state.name == "COMPLETE":
            log.add(ended.value, kept)

    try:
        hi.search(
            builder,
            trial.backend,
            n_trials=ENDLESS,
            timeout=max(log.deadline.seconds - log.deadline.now(), 1e-3),
            study_name=STUDY,
            storage=setting.storage,
            sampler=setting.sampler("tpe"),
            pruner=pruner(task, plain=False),
            seed=setting.seed,
            objectives=[trained_anew],
            artifacts=setting.folder / "models",
            on_trial=on_trial,
            tracking=False,
            outer_steps=trial.outer_steps,
            inner_steps=trial.inner_steps,
            outer_lr=trial.outer_lr,
            warmup_steps=trial.warmup_steps,
            callbacks=[lambda record, problem: log.over],
        )
    except hi.SearchError:
        if not log.over:  # that no trial has ended in time is a result like others
            raise


def gradients_alone(setting: Setting, log: Log) -> None:
    """``hi.optimize`` with the knobs at their defaults.

    The first worker begins at the default hyperparameters and goes on until time is up; every so many outer steps as a
    trial of ours has, a model is trained anew with them. The others begin anew, as often as there is time, at
    hyperparameters drawn from the ranges; their runs are as long as a trial of ours.
    """
    task, trial, inner_lr = setting.task, setting.task.trial, setting.task.inner_lr.default
    generator = torch.Generator().manual_seed(1000 * setting.seed + setting.worker)
    goes_on = setting.worker == 0

    def note(weights: list[Tensor]) -> None:
        loss, state = retrained(task, setting.seed, inner_lr, weights)
        if log.ended("complete"):
            log.add(loss, state)

    def look(record: hi.OuterStep, problem: hi.BilevelProblem) -> bool:
        if goes_on and (record.step + 1) % trial.outer_steps == 0:
            weights = problem.hyperparameters.values()["weights"]
            note([weights] if isinstance(weights, Tensor) else [])
        return log.over

    while not log.over:
        drawn = task.weights.inside().draw(setting.size, generator)
        result = hi.optimize(
            task.problem(setting.seed, torch.full_like(drawn, task.weights.default) if goes_on else drawn, inner_lr),
            trial.backend,
            outer_steps=ENDLESS if goes_on else trial.outer_steps,
            inner_steps=trial.inner_steps,
            outer_lr=trial.outer_lr,
            warmup_steps=trial.warmup_steps,
            seed=setting.seed,
            callbacks=[look],
            progress=False,
            tracking=False,
        )
        if not goes_on and not log.over:
            note(hyperparameters_of(result))


# ---------------------------------------------------------------------------------------------------- without gradients


def looks(
    task: Task, seed: int, weights: Tensor, inner_lr: float, *, only_last: bool = False
) -> Iterator[tuple[int, float, nn.Module]]:
    """Plain training with fixed hyperparameters: steps so far, validation loss and model, once every few steps.

    Nothing but what training needs: the loss as it is, torch's optimizer, no graph at the looks.
    """
    training, validation, _ = task.parts(seed)
    model, loss = task.model(seed), task.loss(len(weights))
    optimizer = task.optimizer(model.parameters(), inner_lr)
    for step in range(1, task.trial.steps + 1):
        optimizer.zero_grad()
        loss(model, training, weights=weights).backward()
        optimizer.step()
        if step == task.trial.steps or (step % task.trial.look == 0 and not only_last):
            with torch.no_grad():
                yield step, float(validation_loss(model, validation)), model


def optuna_alone(setting: Setting, log: Log, sampler: str) -> None:
    """Optuna over everything; a trial is a plain training, and its value the validation loss at its end."""
    from optuna.trial import TrialState

    task = setting.task
    study = setting.study(sampler)
    searched = distributions(task, setting.size)
    while not log.over:
        trial = study.ask(searched)
        weights = torch.tensor([trial.params[f"weight_{i}"] for i in range(setting.size)])
        state, value, kept = TrialState.COMPLETE, math.inf, Weights()
        for step, loss, model in looks(task, setting.seed, weights, trial.params["inner_lr"]):
            if log.over or not math.isfinite(loss):
                state = TrialState.FAIL
                break
            if step == task.trial.steps:
                value, kept = loss, copied(model)
                break
            trial.report(loss, step)
            if trial.should_prune():
                state = TrialState.PRUNED
                break
        study.tell(trial, value if state is TrialState.COMPLETE else None, state=state)
        if log.ended(state.name.lower()) and state is TrialState.COMPLETE:
            log.add(value, kept)


def tpe(setting: Setting, log: Log) -> None:
    optuna_alone(setting, log, "tpe")


def random_search(setting: Setting, log: Log) -> None:
    optuna_alone(setting, log, "random")


# ------------------------------------------------------------------------------------------------------- the methods


@dataclass(frozen=True)
class Method:
    """A competitor.

    Attributes:
        title: in tables and figures.
        run: one worker of it, until the log says that time is up.
        first: the first trial of its study, from a task and a number of hyperparameters; None where it has no study.
    """

    title: str
    run: Callable[[Setting, Log], None]
    first: Callable[[Task, int], dict[str, float]] | None


METHODS = {
    "ours": Method(
        "Optuna outside, gradients inside",
        optuna_and_gradients,
        lambda task, size: {"inner_lr": task.inner_lr.default, "initial": task.weights.default},
    ),
    "tpe": Method("Optuna alone", tpe, default),
    "random": Method("random search", random_search, default),
    "gradients": Method("gradients alone", gradients_alone, None),
}


def prepare(task: Task, size: int, method: str, seed: int, worker: int, folder: Path) -> Setting:
    """What a worker is given: the data in memory, and the study open."""
    import optuna
    from optuna.exceptions import DuplicatedStudyError
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    task.parts(seed)
    first = METHODS[method].first
    if first is None:
        return Setting(task, size, seed, worker, folder, None)
    storage = JournalStorage(JournalFileBackend(str(folder / "study.log")))
    with suppress(DuplicatedStudyError):  # another worker was faster
        optuna.create_study(study_name=STUDY, storage=storage).enqueue_trial(first(task, size))
    return Setting(task, size, seed, worker, folder, storage)
