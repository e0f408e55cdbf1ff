"""The comparison that every problem of this folder runs: learned weights of auxiliary losses beside eight others.

The methods.

    single, equal            the main task alone; all tasks with weight 1
    uncertainty, dwa, …      weightings of ``hyperopt_implicit.auxiliary.weighting``, which adapt to the training losses
    learned weights          a weight per task, moved by the hypergradient of the loss on a held-out set
    learned network          a monotone network of the tasks' losses in place of a weighted sum, learned the same way

The protocol. A seed splits the data into four parts:

    train        what every method trains on
    auxiliary    the small held-out set whose loss drives the learned weights
    validation   model selection, of every method alike: the metric is computed every few steps, the best step counts
    test         the number in the table, and nothing else

The learned methods need the auxiliary set. So that nobody gets more labels than another, each of the other methods is
run twice: on train alone, and with the auxiliary set added to its training data, which is the figure to beat. A learned
method is reported twice as well:

    online       as in the paper: the weights move while the model trains on train; this is the model of that very run
    retrained    the weights are frozen at what was found, and the model trains anew on train and the auxiliary set

Network, start for a seed, inner optimizer, weight decay, number of steps and model selection are the same for all.

Nothing here knows a data set; a problem file describes one as an :class:`AuxiliaryProblem` and calls :func:`run`.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import hyperopt_implicit as hi
from hyperopt_implicit.auxiliary.combiners import LinearCombiner, NonlinearCombiner
from hyperopt_implicit.auxiliary.weighting import get_weighting
from hyperopt_implicit.tracking import Tracker

EXPERIMENT = "auxiliary learning"
WEIGHTINGS = ("single", "equal", "uncertainty", "dwa", "gradnorm", "cosine", "cosine-unweighted", "pcgrad")
LEARNED = ("learned weights", "learned network")
METHODS = (*WEIGHTINGS, *LEARNED)
ADAM = partial(torch.optim.Adam, lr=5e-3)
REFERENCES = (("learned weights", "online"), ("learned weights", "retrained"))

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
        method: one of ``METHODS``.
        variant: what it was trained on, and how.
        seed: of the split, the start, and the method's own random numbers.
        test: the metric on the test set, of the model that validation chose.
        validation: the metric by which it was chosen.
        best_step: the training step at which it stood.
        seconds: of training; a retrained method's include those of finding its weights.
        weights: the last weight of each task; for a combiner, its derivative with respect to the task's mean loss.
        path: the weights at every look at the validation metric, [looks, tasks].
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
    path: tuple[tuple[float, ...], ...]
    run_link: str | None


class Watch:
    """Model selection, and what the weights were meanwhile; as a callback of ``hi.optimize`` or called directly."""

    def __init__(self, problem: AuxiliaryProblem, split: Split) -> None:
        self._problem = problem
        self._split = split
        self._state: dict[str, Tensor] | None = None
        self.validation = -math.inf if problem.higher_is_better else math.inf
        self.best_step = 0
        self.curve: list[tuple[int, float]] = []
        self.path: list[tuple[float, ...]] = []

    def look(self, model: nn.Module, step: int, weights: Tensor) -> float:
        """Keep the model if it is the best so far on the validation set; returns the metric."""
        metric = evaluated(self._problem, model, self._split.validation)
        self.curve.append((step, metric))
        self.path.append(tuple(weights.tolist()))
        better = metric > self.validation if self._problem.higher_is_better else metric < self.validation
        if better or self._state is None:
            self.validation, self.best_step = metric, step
            self._state = copy.deepcopy(model.state_dict())
        return metric

    def __call__(self, outer_step: hi.OuterStep, bilevel_problem: hi.BilevelProblem) -> None:
        step = self._problem.warmup_steps + (outer_step.step + 1) * self._problem.inner_steps
        model = bilevel_problem.model
        with torch.no_grad():
            losses = self._problem.losses(model, self._split.train)
        combiner = bilevel_problem.hyperparameters.values()["combiner"]
        self.look(model, step, derivative(combiner, losses))

    def record(self, model: nn.Module, **what: Any) -> Record:
        """The run's record, with the model put back to its best step for the test."""
        if self._state is not None:
            model.load_state_dict(self._state)
        last = self.path[-1] if self.path else (math.nan,) * len(self._problem.tasks)
        return Record(
            problem=self._problem.name,
            test=evaluated(self._problem, model, self._split.test),
            validation=self.validation,
            best_step=self.best_step,
            weights=dict(zip(self._problem.tasks, last, strict=True)),
            path=tuple(self.path),
            **what,
        )


@torch.no_grad()
def evaluated(problem: AuxiliaryProblem, model: nn.Module, batch: Batch) -> float:
    training = model.training
    model.eval()
    metric = problem.metric(model, batch)
    model.train(training)
    return metric


def derivative(combiner: Any, losses: Tensor) -> Tensor:
    """∂ combiner / ∂ mean loss of each task [tasks]: of a weighted sum these are the weights."""
    with torch.enable_grad():
        leaf = losses.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(combiner(leaf), leaf)
    return gradient.sum(dim=0)


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
    watch = Watch(problem, split)
    result = hi.optimize(
        bilevel(problem, seed, method),
        problem.backend,
        outer_steps=max((problem.steps - problem.warmup_steps) // problem.inner_steps, 1),
        inner_steps=problem.inner_steps,
        warmup_steps=problem.warmup_steps,
        outer_lr=problem.outer_lr,
        seed=seed,
        callbacks=[watch],
        progress=False,
        tracking=_tracking(problem, seed, method, "online") if tracking else False,
    )
    seconds = result.seconds + problem.warmup_steps * _seconds_a_step(result, problem)
    what: dict[str, Any] = {"method": method, "variant": "online", "seed": seed, "run_link": result.run_link}
    online = watch.record(result.problem.model, seconds=seconds, **what)
    if result.run_id is not None:
        _log_scores(result.run_id, problem, watch, online)
    combiner: Any = result.hyperparameters["combiner"].requires_grad_(False)

    def objective(losses: Tensor, parameters: list[nn.Parameter]) -> Tensor:
        combiner(losses).backward()
        return derivative(combiner, losses)

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
        record = watch.record(
            model, method=method, variant=variant, seed=seed, seconds=seconds, run_link=tracker.run_link
        )
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


def _log_scores(run_id: str, problem: AuxiliaryProblem, watch: Watch, record: Record) -> None:
    """What ``hi.optimize`` did not know of its run: the metric on validation and test set."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=hi.Tracking().resolved_uri)
    for step, metric in watch.curve:
        client.log_metric(run_id, problem.metric_name, metric, step=step)
    client.log_metric(run_id, f"test {problem.metric_name}", record.test, step=problem.steps)


# ------------------------------------------------------------------------------------------------------- the comparison


def compare(
    problem: AuxiliaryProblem,
    seeds: Sequence[int],
    *,
    quick: bool = False,
    tracking: bool = True,
    methods: Sequence[str] = METHODS,
    jobs: int = 1,
    console: Console | None = None,
) -> list[Record]:
    """Every method on every seed; ``quick`` trains for a few steps on the first seed, to see whether it runs."""
    if quick:
        steps = problem.warmup_steps // 10 + 2 * problem.inner_steps
        problem = dataclasses.replace(problem, steps=steps, warmup_steps=problem.warmup_steps // 10)
        seeds = seeds[:1]
    work = partial(run_seed, problem, methods=methods, tracking=tracking)
    with warnings.catch_warnings():
        if quick:  # after so few steps the model is near no minimum, and the backends say so
            warnings.simplefilter("ignore", hi.HyperoptWarning)
        rounds = _results(work, seeds, jobs)
        shown = track(rounds, f"{problem.name}, seeds", total=len(seeds), console=console or Console(), transient=True)
        return [record for records in shown for record in records]


def run_seed(problem: AuxiliaryProblem, seed: int, *, methods: Sequence[str], tracking: bool) -> list[Record]:
    split = problem.data(seed)
    records: list[Record] = []
    for method in methods:
        if method in LEARNED:
            records += run_learned(problem, split, seed, method, tracking)
        else:
            records += [run_weighting(problem, split, seed, method, more, tracking) for more in (False, True)]
    return records


def _results(work: Callable[[int], list[Record]], seeds: Sequence[int], jobs: int) -> Iterator[list[Record]]:
    if jobs == 1:
        yield from map(work, seeds)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(work, seeds)


# --------------------------------------------------------------------------------------------------------- what is said


@dataclass(frozen=True)
class Summary:
    """Mean and standard error over the seeds of one method in one variant.

    Attributes:
        method: one of ``METHODS``.
        variant: what it was trained on, and how.
        mean: of the test metric.
        error: standard error of ``mean``; NaN for a single seed.
        seconds: mean of the training time.
        gains: by (method, variant) of ``REFERENCES``: how much better that one is, mean and standard error of the
            differences paired by seed; positive is better, whichever way the metric points.
    """

    method: str
    variant: Variant
    mean: float
    error: float
    seconds: float
    gains: dict[tuple[str, str], tuple[float, float]]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def summarise(problem: AuxiliaryProblem, records: Sequence[Record]) -> list[Summary]:
    """One summary for each method and variant, in the order of the records."""
    scores: dict[tuple[str, Variant], dict[int, Record]] = {}
    for record in records:
        scores.setdefault((record.method, record.variant), {})[record.seed] = record
    sign = 1 if problem.higher_is_better else -1
    summaries = []
    for key, by_seed in scores.items():
        gains = {}
        for reference in REFERENCES:
            theirs: dict[int, Record] = dict(scores.get(reference, {}))  # type: ignore[call-overload]
            if theirs and reference != key:
                gains[reference] = mean_and_error([sign * (theirs[s].test - r.test) for s, r in by_seed.items()])
        mean, error = mean_and_error([record.test for record in by_seed.values()])
        seconds = statistics.fmean(record.seconds for record in by_seed.values())
        summaries.append(Summary(*key, mean, error, seconds, gains))
    return summaries


def with_error(value: tuple[float, float], digits: int, sign: str = "") -> str:
    """Mean ± standard error."""
    mean, error = value
    return f"{mean:{sign}.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def table(problem: AuxiliaryProblem, records: Sequence[Record]) -> Table:
    """All methods: test metric, by how much the learned weights, retrained, are better, and seconds."""
    direction = "higher" if problem.higher_is_better else "lower"
    shown = Table(title=f"{problem.name}, test {problem.metric_name}, {direction} is better", title_justify="left")
    shown.box = SIMPLE_HEAD
    shown.add_column("method")
    shown.add_column("trained on")
    for column in ("mean ± error", "learned weights,\nretrained,\nare better by", "seconds"):
        shown.add_column(column, justify="right")
    names = {"train": "train", "train + auxiliary": "+ auxiliary set"}
    summaries = summarise(problem, records)
    for each, following in zip(summaries, [*summaries[1:], None], strict=True):
        score = with_error((each.mean, each.error), problem.digits)
        gain = each.gains.get(("learned weights", "retrained"))
        better = "" if gain is None else with_error(gain, problem.digits, "+")
        last = following is None or following.method != each.method
        variant = names.get(each.variant, each.variant)
        shown.add_row(each.method, variant, score, better, f"{each.seconds:.1f}", end_section=last)
    return shown


def weights_table(problem: AuxiliaryProblem, records: Sequence[Record]) -> Table:
    """The weights found, as multiples of the main task's: geometric means over the seeds."""
    learned = [record for record in records if record.variant == "online"]
    methods = list(dict.fromkeys(record.method for record in learned))
    shown = Table(title="Weight of each task at the end, main task 1", title_justify="left")
    shown.box = SIMPLE_HEAD
    shown.add_column("task")
    for method in methods:
        shown.add_column(method, justify="right")
    for task in problem.tasks[1:]:
        found = [[typical_weight(problem, each, task) for each in learned if each.method == m] for m in methods]
        shown.add_row(task, *[f"{math.exp(statistics.fmean(map(math.log, each))):.2g}" for each in found])
    return shown


def typical_weight(problem: AuxiliaryProblem, record: Record, task: str) -> float:
    """A task's weight as a multiple of the main task's, kept away from 0 for the logarithm."""
    return max(record.weights[task], 1e-6) / max(record.weights[problem.tasks[0]], 1e-6)


def run(
    problem: AuxiliaryProblem, *, seeds: int, first_seed: int, quick: bool, tracking: bool, jobs: int = 1
) -> list[Record]:
    """What a problem file does on the command line: compare, and print the tables."""
    torch.set_num_threads(1)  # the matrices are small; threads would wait for one another
    console = Console()
    chosen = range(first_seed, first_seed + seeds)
    records = compare(problem, chosen, quick=quick, tracking=tracking, jobs=jobs, console=console)
    console.print(table(problem, records))
    console.print(weights_table(problem, records))
    used = len({record.seed for record in records})
    console.print(
        f"Mean ± standard error over {used} seed(s), differences paired by seed; weights: geometric mean. Seconds of "
        "training; those of a retrained method include finding its weights."
    )
    link = next((record.run_link for record in reversed(records) if record.variant == "online"), None)
    if link is not None:
        console.print(f"\nThe runs are in MLflow: start 'hyperopt-implicit ui', then open\n{link}", soft_wrap=True)
    return records
