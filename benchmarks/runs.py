"""Full bilevel runs, in the style of benchmark_bilevel: the value function against seconds and against gradient calls.

python benchmarks/runs.py                          measure and print
python benchmarks/runs.py --write docs             and write docs/benchmarks-runs.md and its figures
python benchmarks/runs.py --save runs.json         and keep what was measured, for --load

Each run is ``hi.optimize``, as a user calls it. Its clock is the processor time of its own thread; what is looked at on
the way is copied while the clock stands, and its value is computed when the run is over. The problems are in
``runs_problems.py``, the page is written by ``runs_page.py``.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import random
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import runs_page
import torch
from runs_problems import TASKS, Task, ValueFunction, build
from timing import keep_freed_memory

import hyperopt_implicit as hi
from hyperopt_implicit.vectors import Params

SEEDS = 5
CHECKPOINTS = 8
POLISHING = {"decays": 12, "cleaning": 10}
"""Evaluations of the value function with which the best run of a seed is improved, for the best value known."""


@dataclass(frozen=True)
class Method:
    """A backend as it is run; all its options but those named are the defaults.

    Attributes:
        name: in table and figures.
        spec: for ``backend=``.
        hessian_batches: on mini-batches; one on full batches.
        only_batches: on a full batch, it is another of the methods.
    """

    name: str
    spec: dict[str, Any]
    hessian_batches: int = 1
    only_batches: bool = False


METHODS = [
    Method("soba", {"name": "soba"}),
    Method("saba", {"name": "saba"}, only_batches=True),
    Method("amigo", {"name": "amigo"}, hessian_batches=11),
    Method("stocbio", {"name": "stocbio"}, hessian_batches=10, only_batches=True),
    Method("f2sa", {"name": "f2sa"}),
    Method("bome", {"name": "bome"}),
    Method("unrolled", {"name": "unrolled"}),
    Method("neumann", {"name": "neumann"}),
    Method("fixed_point", {"name": "fixed_point"}),
    Method("cg cold", {"name": "cg", "warm_start": False}),
    Method("cg warm", {"name": "cg"}),
    Method("heavy_ball", {"name": "heavy_ball"}),
    Method("auto", {"name": "auto"}),
]


@dataclass(frozen=True)
class Choice:
    """The step sizes of a run.

    Attributes:
        outer_rate: of Adam on λ.
        inner_rate: of SGD with momentum on w, as a multiple of one over a bound on the curvature.
        inner_steps: for one outer step.
    """

    outer_rate: float
    inner_rate: float
    inner_steps: int


OUTER_RATES, INNER_RATES, INNER_STEPS = [0.1, 0.3, 1.0], [0.3, 1.0], [1, 10]
"""The grid from which step sizes are chosen."""


@dataclass(frozen=True)
class Point:
    """Where a run stood at a checkpoint; ``error`` is that of the test samples."""

    seconds: float
    calls: int
    value: float
    error: float


@dataclass(frozen=True)
class Trace:
    """A run: its first point is the initial λ, its last the end of the budget.

    ``slope`` is the largest ‖∂L/∂w‖ at which an inner problem of its values was left, ``last`` the final λ.
    """

    task: str
    method: str
    seed: int
    choice: Choice
    outer_steps: int
    points: list[Point]
    slope: float
    last: dict[str, list[float]]


class Calls:
    """Counts reverse passes: gradients of either loss, Hessian-vector products and mixed derivatives alike."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        grad, backward = torch.autograd.grad, torch.Tensor.backward

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                self.count += 1
                return function(*args, **kwargs)

            return call

        torch.autograd.grad, torch.Tensor.backward = counted(grad), counted(backward)  # type: ignore[assignment]
        try:
            yield
        finally:
            torch.autograd.grad, torch.Tensor.backward = grad, backward  # type: ignore[assignment]


class Recorder:
    """A callback that copies λ at the checkpoints, ends the run with its budget, and leaves its own time out."""

    def __init__(self, calls: Calls, budget: float) -> None:
        self.found: list[tuple[float, int, Params]] = []
        self.steps = 0
        self._calls, self._budget, self._paused = calls, budget, 0.0
        self._due = [budget * (1 / 60) ** (1 - i / (CHECKPOINTS - 1)) for i in range(CHECKPOINTS)]
        self._started = time.thread_time()

    def __call__(self, record: hi.OuterStep, problem: hi.BilevelProblem) -> bool:
        now = time.thread_time()
        spent = now - self._started - self._paused
        self.steps += 1
        if spent >= self._due[0]:
            hparams = {name: p.detach().clone() for name, p in problem.hparams.items()}
            self.found.append((spent, self._calls.count, hparams))
            self._due = [each for each in self._due if each > spent]
        self._paused += time.thread_time() - now
        return not self._due


def optimize(
    task: Task, method: Method, choice: Choice, seed: int, budget: float
) -> tuple[hi.BilevelProblem, Recorder]:
    """A run; whatever it warns of is part of what it is."""
    problem = build(task, seed, choice.inner_rate)
    calls = Calls()
    with warnings.catch_warnings(), calls.counting():
        warnings.simplefilter("ignore")
        recorder = Recorder(calls, budget)
        hi.optimize(
            problem,
            method.spec,
            outer_steps=10**9,
            inner_steps=choice.inner_steps,
            hessian_batches=method.hessian_batches if task.batch else 1,
            outer_lr=choice.outer_rate,
            seed=seed,
            callbacks=[recorder],
            progress=False,
            tracking=False,
        )
    return problem, recorder


Job = tuple[Task, Method, Choice, int, float, bool]


def trace(job: Job) -> Trace:
    """A run and the values of its checkpoints, or only of the last one."""
    task, method, choice, seed, budget, whole = job
    optimize(task, method, choice, seed, budget=0.02)  # warms up
    _, recorder = optimize(task, method, choice, seed, budget)
    function = ValueFunction(task, seed, tolerance=1e-7 if whole else 1e-4)
    looks = [(0.0, 0, function.initial), *recorder.found]
    points, slope = [], 0.0
    for seconds, calls, hparams in looks if whole else looks[-1:]:
        found = function(hparams)
        points.append(Point(seconds, calls, found.value, found.error))
        slope = max(slope, found.slope)
    last = {name: p.flatten().tolist() for name, p in looks[-1][2].items()}
    return Trace(task.name, method.name, seed, choice, recorder.steps, points, slope, last)


def polish(job: tuple[Task, int, Trace]) -> tuple[str, int, float]:
    """The least value of a task's value function that is found from the end of its best run."""
    task, seed, best = job
    function = ValueFunction(task, seed)
    hparams = {name: torch.tensor(best.last[name]).reshape(p.shape) for name, p in function.initial.items()}
    return _family(task.name), seed, function.polished(hparams, POLISHING[_family(task.name)]).value


def _family(task: str) -> str:
    """Tasks that differ in their batches only have one value function."""
    return task.removesuffix("-batches")


@dataclass(frozen=True)
class Results:
    """All that the page is written from; ``best`` is by value function and seed."""

    traces: list[Trace]
    best: dict[str, dict[int, float]]
    missing: list[str]
    scale: float
    grid: list[Choice]
    workers: int
    minutes: float

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Results:
        raw = json.loads(path.read_text())
        traces = [
            Trace(**{**each, "choice": Choice(**each["choice"]), "points": [Point(**p) for p in each["points"]]})
            for each in raw["traces"]
        ]
        best = {name: {int(seed): value for seed, value in each.items()} for name, each in raw["best"].items()}
        return cls(**{**raw, "traces": traces, "best": best, "grid": [Choice(**each) for each in raw["grid"]]})

    def joined(self, other: Results) -> Results:
        """With what was measured of other problems, by the same settings."""
        return dataclasses.replace(
            self,
            traces=self.traces + other.traces,
            best=self.best | other.best,
            minutes=self.minutes + other.minutes,
        )

    def of(self, task: str, method: str) -> list[Trace]:
        return sorted((t for t in self.traces if (t.task, t.method) == (task, method)), key=lambda t: t.seed)

    def distance(self, trace: Trace, point: Point) -> float:
        """A value of the value function less the best known of the same seed."""
        return point.value - self.best[_family(trace.task)][trace.seed]

    def gap(self, trace: Trace, point: Point) -> float:
        """The same as a part of the initial distance."""
        return self.distance(trace, point) / self.distance(trace, trace.points[0])


def measure(scale: float, workers: int, tasks: list[Task], grid: list[Choice], seeds: int) -> Results:
    """Tune, run, and improve on the best run."""
    started = time.perf_counter()
    missing = [m.spec["name"] for m in METHODS if m.spec["name"] not in hi.list_backends()]
    pairs = [
        (task, method)
        for task in tasks
        for method in METHODS
        if method.spec["name"] not in missing and (task.batch or not method.only_batches)
    ]
    order = random.Random(0)  # neighbours on the other core are then nobody's lot in particular
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool:
        jobs: list[Job] = [(t, m, c, runs_page.TUNING_SEED, t.budget * scale, False) for t, m in pairs for c in grid]
        order.shuffle(jobs)
        tried = list(pool.map(trace, jobs))
        print(f"tuned: {len(jobs)} runs after {time.perf_counter() - started:.0f} s", flush=True)
        jobs = [
            (
                t,
                m,
                _least([x for x in tried if (x.task, x.method) == (t.name, m.name)]).choice,
                seed,
                t.budget * scale,
                True,
            )
            for t, m in pairs
            for seed in range(seeds)
        ]
        order.shuffle(jobs)
        traces = list(pool.map(trace, jobs))
        print(f"run: {len(jobs)} runs after {time.perf_counter() - started:.0f} s", flush=True)
        ends = [
            (next(t for t in tasks if _family(t.name) == family), seed, _least(
                [x for x in traces if _family(x.task) == family and x.seed == seed]))
            for family in dict.fromkeys(_family(t.name) for t in tasks)
            for seed in range(seeds)
        ]  # fmt: skip
        best: dict[str, dict[int, float]] = {}
        for family, seed, value in pool.map(polish, ends):
            seen = (p.value for x in traces if _family(x.task) == family and x.seed == seed for p in x.points)
            best.setdefault(family, {})[seed] = min(value, *(each for each in seen if math.isfinite(each)))
    return Results(traces, best, missing, scale, grid, workers, (time.perf_counter() - started) / 60)


def _least(traces: list[Trace]) -> Trace:
    return min(traces, key=lambda each: each.points[-1].value if math.isfinite(each.points[-1].value) else math.inf)


def _one_thread() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="the docs folder, in which the page and its figures are written")
    parser.add_argument("--save", type=Path, help="keep what was measured in this file")
    parser.add_argument("--load", type=Path, nargs="+", help="measure nothing; take it from files, one for each part")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all budgets of time")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--tasks", nargs="*", default=[t.name for t in TASKS], help="only these")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="only so many")
    parser.add_argument("--outer-rates", type=float, nargs="+", default=OUTER_RATES, help="of the grid")
    parser.add_argument("--inner-rates", type=float, nargs="+", default=INNER_RATES, help="of the grid")
    parser.add_argument("--inner-steps", type=int, nargs="+", default=INNER_STEPS, help="of the grid")
    arguments = parser.parse_args()
    tasks = [task for task in TASKS if task.name in arguments.tasks]
    grid = [
        Choice(*each) for each in itertools.product(arguments.outer_rates, arguments.inner_rates, arguments.inner_steps)
    ]
    if arguments.load:
        results = functools.reduce(Results.joined, map(Results.load, arguments.load))
    else:
        results = measure(arguments.scale, arguments.workers, tasks, grid, arguments.seeds)
    if arguments.save is not None:
        results.save(arguments.save)
    print("\n".join(line for task in tasks for line in runs_page.table(results, task)))
    if arguments.write is not None:
        runs_page.write(results, tasks, arguments.write)


if __name__ == "__main__":
    main()
