"""Optuna outside and gradients inside, against Optuna alone, random search and gradients alone: equal wall-clock time.

python benchmarks/search.py                                     measure and print
python benchmarks/search.py --write docs/benchmarks-search.md   and write the page and its figures
python benchmarks/search.py --plan                              only say what would be run, and for how long
python benchmarks/search.py --quick                             a smoke test: the numbers mean nothing
python benchmarks/search.py --save search.json                  and keep what was measured, for --load

A run is one method on one task for a fixed time, by two processes of one thread each that share a study. Runs are made
one after another, so that each has both cores. The tasks are in ``search_problems.py``, the methods in
``search_methods.py``, and the page is written by ``search_page.py``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import random
import tempfile
import time
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path

import search_page
import torch
from search_methods import METHODS, Deadline, Found, Log, Setting, prepare
from search_problems import TASKS, Task
from timing import keep_freed_memory

SEEDS = 5
WORKERS = 2
ALONG_SIZES = ("ours", "tpe")
"""The methods that are compared as the number of hyperparameters grows."""

PATIENCE = 120.0  # seconds for which a worker waits for the others to be ready


@dataclass(frozen=True)
class Job:
    """A run to be made.

    Attributes:
        task: name of the task.
        size: number of hyperparameters.
        method: key of the method.
        seed: of data, models and samplers.
        seconds: how long.
    """

    task: str
    size: int
    method: str
    seed: int
    seconds: float


@dataclass(frozen=True)
class Point:
    """A configuration that is better than all before it, by its validation loss, and when it was known."""

    seconds: float
    validation: float
    test: float
    error: float


@dataclass(frozen=True)
class Run:
    """What came of a job.

    Attributes:
        job: the job.
        points: the best so far, in order; empty where no trial ended in time.
        trials: how many ended in time, by state.
        share: processor time of the workers as a part of the wall-clock time that they had.
        longest: seconds of the last look at the clock by any worker.
    """

    job: Job
    points: list[Point]
    trials: dict[str, int]
    share: float
    longest: float


@dataclass(frozen=True)
class Part:
    """What one worker brings home from a job."""

    points: list[Point]
    trials: dict[str, int]
    share: float
    longest: float


def best_so_far(parts: Iterable[Part]) -> list[Point]:
    """The points of all workers in order of time, those left out that were no better than what was known."""
    kept: list[Point] = []
    for point in sorted((point for part in parts for point in part.points), key=lambda each: each.seconds):
        if not kept or point.validation < kept[-1].validation:
            kept.append(point)
    return kept


# ------------------------------------------------------------------------------------------------------- the workers

_together: Barrier | None = None
_warm: set[tuple[str, str]] = set()


def _begin(together: Barrier) -> None:
    global _together
    _together = together
    torch.set_num_threads(1)
    keep_freed_memory()
    # what trials with bad knobs warn of is part of what they are
    warnings.simplefilter("ignore")


def compete(setting: Setting, method: str, seconds: float) -> Log:
    """A method for so many seconds from now on, as one worker; the log has what ended in that time."""
    log = Log(Deadline(seconds))
    METHODS[method].run(setting, log)
    return log


def judged(task: Task, seed: int, found: Iterable[Found]) -> list[Point]:
    """What was found, with the test data; asked when time is up."""
    return [Point(each.seconds, each.validation, *task.judge(seed, each.state)) for each in found]


def work(job: Job, worker: int, folder: str) -> Part:
    """One worker's part in a job."""
    task = next(task for task in TASKS if task.name == job.task)
    if (job.task, job.method) not in _warm:
        _warm.add((job.task, job.method))
        with tempfile.TemporaryDirectory() as alone:
            compete(prepare(task, job.size, job.method, job.seed, 0, Path(alone)), job.method, 0.5)
    setting = prepare(task, job.size, job.method, job.seed, worker, Path(folder))
    assert _together is not None
    _together.wait(PATIENCE)
    spent, started = time.process_time(), time.perf_counter()
    log = compete(setting, job.method, job.seconds)
    share = (time.process_time() - spent) / (time.perf_counter() - started)
    return Part(judged(task, job.seed, log.found), dict(log.trials), share, log.last_look)


# ---------------------------------------------------------------------------------------------------- the whole of it


def jobs_of(tasks: list[Task], seeds: int, scale: float, sizes: bool) -> list[Job]:
    """Every method on the full number of hyperparameters, and two of them on the smaller ones."""
    jobs = []
    for task in tasks:
        for seed in range(seeds):
            for method in METHODS:
                jobs.append(Job(task.name, task.sizes[-1], method, seed, task.seconds * scale))
            for size in task.sizes[:-1] if sizes else ():
                for method in ALONG_SIZES:
                    jobs.append(Job(task.name, size, method, seed, task.seconds * scale))
    return jobs


@dataclass(frozen=True)
class Results:
    """All that the page is written from."""

    runs: list[Run]
    minutes: float

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Results:
        raw = json.loads(path.read_text())
        runs = [
            Run(**{**each, "job": Job(**each["job"]), "points": [Point(**point) for point in each["points"]]})
            for each in raw["runs"]
        ]
        return cls(**{**raw, "runs": runs})

    def of(self, task: str, method: str, size: int) -> list[Run]:
        """By seed."""
        found = [r for r in self.runs if (r.job.task, r.job.method, r.job.size) == (task, method, size)]
        return sorted(found, key=lambda each: each.job.seed)


def measure(jobs: list[Job]) -> Results:
    """Make the runs, in an order that favours nobody on a machine that is not always equally fast."""
    started = time.perf_counter()
    order = random.Random(0).sample(jobs, len(jobs))
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(WORKERS)
    pools = [
        ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=(together,)) for _ in range(WORKERS)
    ]
    runs = []
    try:
        for number, job in enumerate(order):
            with tempfile.TemporaryDirectory(prefix="search-") as folder:
                parts = [
                    each.result()
                    for each in [pool.submit(work, job, worker, folder) for worker, pool in enumerate(pools)]
                ]
            states = {state for part in parts for state in part.trials}
            runs.append(
                Run(
                    job,
                    best_so_far(parts),
                    {state: sum(part.trials.get(state, 0) for part in parts) for state in sorted(states)},
                    sum(part.share for part in parts) / len(parts),
                    max(part.longest for part in parts),
                )
            )
            if (number + 1) % 10 == 0:
                print(f"{number + 1} of {len(jobs)} runs after {time.perf_counter() - started:.0f} s", flush=True)
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)
    return Results(runs, (time.perf_counter() - started) / 60)


def plan(jobs: list[Job]) -> list[str]:
    """How many runs of which length, and how long all of them take."""
    lines = []
    for name in dict.fromkeys(job.task for job in jobs):
        mine = [job for job in jobs if job.task == name]
        sizes = ", ".join(str(size) for size in sorted({job.size for job in mine}))
        lines.append(
            f"{name}: {len(mine)} runs of {mine[0].seconds:g} s; "
            f"{len({job.seed for job in mine})} seeds; hyperparameters: {sizes}"
        )
    total = sum(job.seconds for job in jobs)
    return [*lines, f"{len(jobs)} runs, {total / 60:.1f} minutes, and about 0.3 s more for each run"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="the page; its figures go to the folder images beside it")
    parser.add_argument("--plan", action="store_true", help="measure nothing; say what would be run")
    parser.add_argument("--quick", action="store_true", help="two seeds and a sixth of the time, on two tasks")
    parser.add_argument("--save", type=Path, help="keep what was measured in this file")
    parser.add_argument("--load", type=Path, help="measure nothing; take it from this file")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all budgets of time")
    parser.add_argument("--tasks", nargs="*", default=[task.name for task in TASKS], help="only these")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="only so many")
    parser.add_argument("--no-sizes", action="store_true", help="leave out smaller numbers of hyperparameters")
    arguments = parser.parse_args()
    tasks = [task for task in TASKS if task.name in arguments.tasks]
    jobs = jobs_of(tasks, arguments.seeds, arguments.scale, not arguments.no_sizes)
    if arguments.quick:
        tasks = [dataclasses.replace(task, sizes=(task.sizes[0], task.sizes[-1])) for task in TASKS[:2]]
        jobs = jobs_of(tasks, 2, 1 / 6, True)
    if arguments.plan:
        print("\n".join(plan(jobs)))
        return
    results = Results.load(arguments.load) if arguments.load else measure(jobs)
    if arguments.save is not None:
        results.save(arguments.save)
    print("\n".join(line for task in tasks for line in search_page.summary(results, task)))
    if arguments.write is not None:
        search_page.write(results, tasks, arguments.write)


if __name__ == "__main__":
    main()
