"""What a problem of this folder is, and one training run of one method on it.

How the methods are compared, and why that is fair, is told in ``comparison.py``.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

import hyperopt_implicit as hi
from hyperopt_implicit.auxiliary import LinearCombiner, NonlinearCombiner, TaskReport, get_weighting
from hyperopt_implicit.tracking import Tracker

EXPERIMENT = "auxiliary learning"
ADAM = partial(torch.optim.Adam, lr=5e-3)

Variant = Literal["train", "train + auxiliary", "online", "retrained"]
Batch = Any
Objective = Callable[[Tensor, list[nn.Parameter]], Tensor]
"""Takes losses [rows, tasks] and parameters, accumulates into ``.grad``, and returns the weights of the tasks."""


# ---------------------------------------------------------------------------------------------------- what a problem is


@dataclass(frozen=True)
class Split:
    """One seed's data. Each part is a full batch: what ``losses`` and ``metric`` of the problem take."""

    train: Batch
    auxiliary: Batch
    validation: Batch
    test: Batch


def concatenate(first: Batch, second: Batch) -> Batch:
    """Two batches as one: tensors joined by rows, tuples member by member."""
    if isinstance(first, Tensor):
        return torch.cat([first, second])
    joined = [concatenate(a, b) for a, b in zip(first, second, strict=True)]
    return type(first)(*joined) if hasattr(first, "_fields") else type(first)(joined)


def main_known(losses: Tensor, known: Tensor) -> Tensor:
    """Losses [rows, tasks] where the main task's label is known for some rows only (known [rows], 1 or 0).

    The main loss of the others is 0, and that of the known ones is scaled, so that the mean over all rows is the mean
    over those that are known.
    """
    main = losses[:, :1] * (known * len(known) / known.sum())[:, None]
    return torch.cat([main, losses[:, 1:]], dim=1)


@dataclass(frozen=True)
class AuxiliaryProblem:
    """A main task, auxiliary tasks, data, and the settings that all methods share.

    Functions must be those of a module, not lambdas, since seeds may be sent to other processes.

    Args:
        name: short, as it stands in tables and in MLflow.
        tasks: names of the tasks, the main one first.
        data: ``data(seed)``, the four parts.
        model: builds the network; called with torch's generator seeded.
        losses: ``losses(model, batch)``, a tensor [rows, tasks], or [1, tasks] where tasks have samples of their own.
        metric: ``metric(model, batch)``, of the main task; called without gradients.
        metric_name: what it is, for the table.
        higher_is_better: whether the metric is.
        held_out_loss: ``held_out_loss(model, batch)``, a scalar that drives the learned weights; by default the mean of
            the main task's loss.
        join: how train and the auxiliary set become one batch.
        shared: the parameters that all tasks use, for methods that ask; None stands for all.
        optimizer: makes the inner optimizer of a list of parameters.
        decay: all methods add ``decay · ‖w‖²`` to what they minimise.
        steps: training steps of every method.
        warmup_steps: training steps before the weights first move; model selection begins after them, for all methods.
        inner_steps: training steps between two moves of the weights, and between two looks at the validation metric.
        backend: how hypergradients are computed.
        outer_lr: learning rate of the weights (Adam).
        linear: makes the combiner of "learned weights".
        nonlinear: makes the combiner of "learned network".
        digits: digits after the point in tables.
    """

    name: str
    tasks: tuple[str, ...]
    data: Callable[[int], Split]
    model: Callable[[], nn.Module]
    losses: Callable[[Any, Batch], Tensor]
    metric: Callable[[Any, Batch], float]
    metric_name: str
    higher_is_better: bool = True
    held_out_loss: Callable[[Any, Batch], Tensor] | None = None
    join: Callable[[Batch, Batch], Batch] = concatenate
    shared: Callable[[Any], Iterable[nn.Parameter]] | None = None
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = ADAM
    decay: float = 0.0
    steps: int = 400
    warmup_steps: int = 50
    inner_steps: int = 10
    backend: str | dict[str, Any] = "neumann"
    outer_lr: float = 0.1
    linear: Callable[[int], nn.Module] = LinearCombiner
    nonlinear: Callable[[int], nn.Module] = NonlinearCombiner
    digits: int = 1


def bilevel(problem: AuxiliaryProblem, seed: int, method: str = "learned weights") -> hi.BilevelProblem:
    """The bilevel problem behind "learned weights" and "learned network": train below, the auxiliary set above."""
    split = problem.data(seed)
    combiner_of = problem.linear if method == "learned weights" else problem.nonlinear
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        start = combiner_of(len(problem.tasks))

    @hi.hyperparameter("combiner", init=start)
    def training_loss(model: nn.Module, batch: Batch, *, combiner: nn.Module) -> Tensor:
        combined: Tensor = combiner(problem.losses(model, batch))
        return combined + penalty(problem, model)

    def main_loss(model: nn.Module, batch: Batch) -> Tensor:
        return problem.losses(model, batch)[:, 0].mean()

    return hi.BilevelProblem(
        untrained(problem, seed),
        training_loss,
        problem.held_out_loss or main_loss,
        training_data=[split.train],
        validation_data=[split.auxiliary],
        optimizer=problem.optimizer,
    )


def untrained(problem: AuxiliaryProblem, seed: int) -> nn.Module:
    """The network from which every method starts."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return problem.model()


def penalty(problem: AuxiliaryProblem, model: nn.Module) -> Tensor:
    return problem.decay * torch.stack([p.square().sum() for p in model.parameters()]).sum()


# ----------------------------------------------------------------------------------------------------- one training run


@dataclass(frozen=True)
class Record:
    """One run of one method.

    Attributes:
        problem: the problem's name.
        method: its name.
        variant: what it was trained on, and how.
        seed: of the split, the start, and the method's own random numbers.
        test: the metric on the test set, of the model that validation chose.
        validation: the metric by which it was chosen.
        best_step: the training step at which it stood.
        seconds: of training; a retrained method's include those of finding its weights.
        weights: the last weight of each task; for a combiner, its derivative with respect to the task's mean loss.
        run_link: where MLflow shows it; None where it was not tracked.
    """

    problem: str
    method: str
    variant: Variant
    seed: int
    test: float
    validation: float
    best_step: int
    seconds: float
    weights: dict[str, float]
    run_link: str | None


class Watch(hi.Report):
    """Model selection on the validation set, and the test of the model that it chose.

    As a callback of ``hi.optimize`` it looks after each outer step, and its metric is in the MLflow run.
    """

    def __init__(self, problem: AuxiliaryProblem, split: Split) -> None:
        self._problem = problem
        self._split = split
        self._best: nn.Module | None = None
        self._last = math.nan
        self.validation = -math.inf if problem.higher_is_better else math.inf
        self.best_step = 0
        self.weights = torch.full((len(problem.tasks),), math.nan)

    def look(self, model: nn.Module, step: int, weights: Tensor) -> float:
        """Keep the model if it is the best so far on the validation set; returns the metric."""
        self._last, self.weights = evaluated(self._problem, model, self._split.validation), weights
        sign = 1 if self._problem.higher_is_better else -1
        if self._best is None or sign * self._last > sign * self.validation:
            self.validation, self.best_step = self._last, step
            self._best = copy.deepcopy(model)
        return self._last

    def __call__(self, outer_step: hi.OuterStep, bilevel_problem: hi.BilevelProblem) -> None:
        step = self._problem.warmup_steps + (outer_step.step + 1) * self._problem.inner_steps
        self.look(bilevel_problem.model, step, self.weights_of(bilevel_problem))

    def weights_of(self, bilevel_problem: hi.BilevelProblem) -> Tensor:
        """The present weight of each task [tasks]."""
        with torch.no_grad():
            losses = self._problem.losses(bilevel_problem.model, self._split.train)
        combiner: Any = bilevel_problem.hyperparameters.values()["combiner"]
        weights: Tensor = combiner.effective_weights(losses)
        return weights

    def metrics(self) -> dict[str, float]:
        return {self._problem.metric_name: self._last}

    def summary(self) -> dict[str, float]:
        return {f"test {self._problem.metric_name}": self.test()}

    def test(self) -> float:
        """The metric of the chosen model on the test set."""
        return math.nan if self._best is None else evaluated(self._problem, self._best, self._split.test)

    def record(self, **what: Any) -> Record:
        """The run's record."""
        return Record(
            problem=self._problem.name,
            test=self.test(),
            validation=self.validation,
            best_step=self.best_step,
            weights=dict(zip(self._problem.tasks, self.weights.tolist(), strict=True)),
            **what,
        )


@torch.no_grad()
def evaluated(problem: AuxiliaryProblem, model: nn.Module, batch: Batch) -> float:
    training = model.training
    model.eval()
    metric = problem.metric(model, batch)
    model.train(training)
    return metric


def train(
    problem: AuxiliaryProblem,
    model: nn.Module,
    batch: Batch,
    objective: Objective,
    own_parameters: Iterable[nn.Parameter],
    watch: Watch,
    log: Callable[[dict[str, float], int], None],
) -> float:
    """Train with an objective, with looks at the validation metric; returns the seconds, without those looks."""
    parameters = list(model.parameters())
    optimizer = problem.optimizer([*parameters, *own_parameters])
    seconds = 0.0
    for step in range(1, problem.steps + 1):
        started = time.perf_counter()
        optimizer.zero_grad()
        losses = problem.losses(model, batch)
        weights = objective(losses, parameters)
        penalty(problem, model).backward()
        optimizer.step()
        seconds += time.perf_counter() - started
        if step > problem.warmup_steps and (step - problem.warmup_steps) % problem.inner_steps == 0:
            metrics = {problem.metric_name: watch.look(model, step, weights.detach())}
            for task, loss, weight in zip(problem.tasks, losses.mean(dim=0).tolist(), weights.tolist(), strict=True):
                metrics |= {f"loss/{task}": loss, f"weight/{task}": weight}
            log(metrics, step)
    return seconds


def run_weighting(
    problem: AuxiliaryProblem, split: Split, seed: int, method: str, with_auxiliary: bool, tracking: bool
) -> Record:
    """A method that needs no auxiliary set."""
    weighting = get_weighting(method, len(problem.tasks), main_task=0)
    model = untrained(problem, seed)
    shared = None if problem.shared is None else list(problem.shared(model))
    variant: Variant = "train + auxiliary" if with_auxiliary else "train"
    batch = problem.join(split.train, split.auxiliary) if with_auxiliary else split.train
    epoch = 0

    def objective(losses: Tensor, parameters: list[nn.Parameter]) -> Tensor:
        nonlocal epoch
        epoch += 1
        weights: Tensor = weighting.backward(losses.mean(dim=0), parameters, shared=shared)
        if epoch % problem.inner_steps == 0:
            weighting.end_epoch()
        return weights

    return _trained(problem, split, seed, (method, variant), model, batch, objective, weighting.parameters(), tracking)


def run_learned(problem: AuxiliaryProblem, split: Split, seed: int, method: str, tracking: bool) -> list[Record]:
    """A learned method: the run that finds the weights, and training anew with them."""
    watch, report = Watch(problem, split), TaskReport(problem.losses, problem.tasks)
    result = hi.optimize(
        bilevel(problem, seed, method),
        problem.backend,
        outer_steps=max((problem.steps - problem.warmup_steps) // problem.inner_steps, 1),
        inner_steps=problem.inner_steps,
        warmup_steps=problem.warmup_steps,
        outer_lr=problem.outer_lr,
        seed=seed,
        callbacks=[watch, report],
        progress=False,
        tracking=_tracking(problem, seed, method, "online") if tracking else False,
    )
    seconds = result.seconds + problem.warmup_steps * _seconds_a_step(result, problem)
    what: dict[str, Any] = {"method": method, "variant": "online", "seed": seed, "run_link": result.run_link}
    online = watch.record(seconds=seconds, **what)
    combiner: Any = result.hyperparameters["combiner"].requires_grad_(False)

    def objective(losses: Tensor, parameters: list[nn.Parameter]) -> Tensor:
        combiner(losses).backward()
        weights: Tensor = combiner.effective_weights(losses)
        return weights

    model = untrained(problem, seed)
    batch = problem.join(split.train, split.auxiliary)
    retrained = _trained(problem, split, seed, (method, "retrained"), model, batch, objective, [], tracking)
    return [online, dataclasses.replace(retrained, seconds=retrained.seconds + seconds)]


def _trained(
    problem: AuxiliaryProblem,
    split: Split,
    seed: int,
    labels: tuple[str, Variant],
    model: nn.Module,
    batch: Batch,
    objective: Objective,
    own_parameters: Iterable[nn.Parameter],
    tracking: bool,
) -> Record:
    method, variant = labels
    watch = Watch(problem, split)
    tracker = Tracker(_tracking(problem, seed, method, variant) if tracking else None)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            seconds = train(problem, model, batch, objective, own_parameters, watch, tracker.log_metrics)
        record = watch.record(method=method, variant=variant, seed=seed, seconds=seconds, run_link=tracker.run_link)
        tracker.log_metrics({f"test {problem.metric_name}": record.test}, problem.steps)
    except BaseException as error:
        tracker.end(error)
        raise
    tracker.end()
    return record


def _seconds_a_step(result: hi.Result, problem: AuxiliaryProblem) -> float:
    """``Result.seconds`` has no warm-up steps in it: they cost what the inner steps do."""
    return sum(each.inner_seconds for each in result.history) / (len(result.history) * problem.inner_steps)


def _tracking(problem: AuxiliaryProblem, seed: int, method: str, variant: Variant) -> hi.Tracking:
    shown = ("steps", "warmup_steps", "inner_steps", "decay", "backend", "outer_lr")
    return hi.Tracking(
        experiment=EXPERIMENT,
        run_name=f"{problem.name}: {method}, {variant}, seed {seed}",
        params={"seed": seed, **{name: getattr(problem, name) for name in shown}},
        tags={"problem": problem.name, "method": method, "variant": variant},
        save_state=False,
        system_metrics=False,
    )
