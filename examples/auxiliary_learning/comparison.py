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

Nothing here knows a data set; a problem file describes one as an ``AuxiliaryProblem`` of ``protocol.py``, and calls
:func:`run`.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from protocol import AuxiliaryProblem, Record, run_learned, run_weighting
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

import hyperopt_implicit as hi

WEIGHTINGS = ("single", "equal", "uncertainty", "dwa", "gradnorm", "cosine", "cosine-unweighted", "pcgrad")
LEARNED = ("learned weights", "learned network")
METHODS = (*WEIGHTINGS, *LEARNED)
REFERENCES = tuple((method, "retrained") for method in LEARNED)


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
    variant: str
    mean: float
    error: float
    seconds: float
    gains: dict[tuple[str, str], tuple[float, float]]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def summarise(problem: AuxiliaryProblem, records: Sequence[Record]) -> list[Summary]:
    """One summary for each method and variant, in the order of the records."""
    scores: dict[tuple[str, str], dict[int, Record]] = {}
    for record in records:
        scores.setdefault((record.method, record.variant), {})[record.seed] = record
    sign = 1 if problem.higher_is_better else -1
    summaries = []
    for key, by_seed in scores.items():
        gains: dict[tuple[str, str], tuple[float, float]] = {}
        for reference in REFERENCES:
            theirs = scores.get(reference, {})
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


def table(problem: AuxiliaryProblem, summaries: Sequence[Summary]) -> Table:
    """All methods: test metric, by how much the learned weights, retrained, are better, and seconds."""
    direction = "higher" if problem.higher_is_better else "lower"
    shown = Table(title=f"{problem.name}, test {problem.metric_name}, {direction} is better", title_justify="left")
    shown.box = SIMPLE_HEAD
    shown.add_column("method")
    shown.add_column("trained on")
    for column in ("mean ± error", "learned weights,\nretrained,\nare better by", "seconds"):
        shown.add_column(column, justify="right")
    names = {"train": "train", "train + auxiliary": "+ auxiliary set"}
    for each, following in zip(summaries, [*summaries[1:], None], strict=True):
        score = with_error((each.mean, each.error), problem.digits)
        gain = each.gains.get(REFERENCES[0])
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


def conclusions(problem: AuxiliaryProblem, summaries: Sequence[Summary]) -> list[str]:
    """For each learned method, retrained: which of the others, trained on the same samples, it beats and which not."""
    lines = []
    for reference in REFERENCES:
        found: dict[str, list[str]] = {"better than": [], "not told apart from": [], "worse than": []}
        for other in summaries:
            gain, error = other.gains.get(reference, (math.nan, math.nan))
            if other.variant == "train + auxiliary" and not math.isnan(error):
                verdict = "better than" if gain > error else "worse than" if gain < -error else "not told apart from"
                found[verdict].append(f"{other.method} ({with_error((gain, error), problem.digits, '+')})")
        said = "; ".join(f"{verdict} {', '.join(others)}" for verdict, others in found.items() if others)
        if said:
            lines.append(f"{', '.join(reference)}: {said}.".capitalize())
    return lines


def run(
    problem: AuxiliaryProblem,
    *,
    seeds: int,
    first_seed: int,
    quick: bool,
    tracking: bool,
    jobs: int = 1,
    methods: Sequence[str] = METHODS,
) -> list[Record]:
    """What a problem file does on the command line: compare, and print the tables."""
    torch.set_num_threads(1)  # the matrices are small; threads would wait for one another
    console = Console()
    chosen = range(first_seed, first_seed + seeds)
    records = compare(problem, chosen, quick=quick, tracking=tracking, methods=methods, jobs=jobs, console=console)
    summaries = summarise(problem, records)
    console.print(table(problem, summaries))
    console.print(weights_table(problem, records))
    said = conclusions(problem, summaries)
    if said:
        console.print("Same samples for all, and one standard error of the paired difference as the mark:")
        console.print(*said, sep="\n")
    used = len({record.seed for record in records})
    console.print(
        f"Mean ± standard error over {used} seed(s), differences paired by seed; weights: geometric mean. Seconds of "
        "training; those of a retrained method include finding its weights."
    )
    link = next((record.run_link for record in reversed(records) if record.variant == "online"), None)
    if link is not None:
        console.print(f"\nThe runs are in MLflow: start 'hyperopt-implicit ui', then open\n{link}", soft_wrap=True)
    return records
