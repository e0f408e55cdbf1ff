"""The docs page of the competition of searches, and its figures; nothing is measured here."""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search_methods import METHODS
from versions import versions_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from search import Point, Results, Run
    from search_problems import Task

COLOURS = {"ours": "#0072B2", "tpe": "#D55E00", "random": "#CC79A7", "gradients": "#009E73"}  # Okabe and Ito's
DASHES = {"ours": "-", "tpe": "--", "random": "-.", "gradients": (0, (1, 1))}
MUST_WIN_FROM = 10
"""The number of hyperparameters from which on gradients are meant to pay."""

What = Callable[["Point"], float]


def _validation(point: Point) -> float:
    return point.validation


def _test(point: Point) -> float:
    return point.test


def _error(point: Point) -> float:
    return point.error


# ------------------------------------------------------------------------------------------------------- the numbers


def ends(runs: list[Run], what: What = _test) -> list[float]:
    """What the configuration with the lowest validation loss has at the end, by seed; infinite where there is none."""
    return [what(run.points[-1]) if run.points else math.inf for run in runs]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    if not values or not all(map(math.isfinite, values)):
        return math.inf, math.nan
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def difference(results: Results, task: str, other: str, size: int, what: What = _test) -> tuple[float, float]:
    """By how much ours is lower: mean over the seeds and its standard error, seeds being paired.

    Infinite where one of the two has found nothing for some seed; where neither has, ours has not won.
    """
    ours, theirs = (ends(results.of(task, method, size), what) for method in ("ours", other))
    if not all(map(math.isfinite, ours)):
        return -math.inf, math.nan
    if not all(map(math.isfinite, theirs)):
        return math.inf, math.nan
    return mean_and_error([b - a for a, b in zip(ours, theirs, strict=True)])


def wins(found: tuple[float, float]) -> bool:
    """Whether a difference is positive beyond a standard error; a method that has found nothing has lost."""
    mean, error = found
    return mean == math.inf or mean > error


def first_size(results: Results, task: Task, what: What = _test) -> int | None:
    """The number of hyperparameters from which on ours wins against Optuna alone at all that were tried."""
    first = None
    for size in sorted(task.sizes, reverse=True):
        if not wins(difference(results, task.name, "tpe", size, what)):
            break
        first = size
    return first


# ------------------------------------------------------------------------------------------------------ the sentences


def from_which_size(results: Results, task: Task) -> str:
    """From how many hyperparameters on ours wins, as a sentence."""
    said = []
    for name, what in (("validation", _validation), ("test", _test)):
        first = first_size(results, task, what)
        if first is None:
            mean, error = difference(results, task.name, "tpe", task.sizes[-1], what)
            at_largest = f" ({mean:+.4f} ± {error:.4f} at the largest)" if math.isfinite(mean) else ""
            said.append(f"the lower {name} loss at no number that was tried{at_largest}")
        elif first == min(task.sizes):
            said.append(f"the lower {name} loss at every number that was tried")
        else:
            said.append(f"the lower {name} loss from {first} hyperparameters on")
    sentence = f"{task.title}: beyond a standard error, ours has {' and '.join(said)}."
    missed = [
        size for size in task.sizes if size >= MUST_WIN_FROM and not wins(difference(results, task.name, "tpe", size))
    ]
    if missed:
        sentence += f" Its test loss is not the lower one with {' and '.join(map(str, missed))}."
    return sentence


def verdict(results: Results, task: Task) -> str:
    """Ours against each of the others, with all hyperparameters, as a sentence."""
    size = task.sizes[-1]
    mean, error = mean_and_error(ends(results.of(task.name, "ours", size)))
    if not math.isfinite(mean):
        return "Ours found nothing in time."
    sentences = [f"The test loss of ours is {mean:.4f} ± {error:.4f}."]
    groups: dict[str, list[str]] = {"lower than": [], "no different from": [], "higher than": []}
    for method in METHODS:
        if method == "ours" or not results.of(task.name, method, size):
            continue
        gain, spread = difference(results, task.name, method, size)
        title = METHODS[method].title
        if not math.isfinite(gain):
            groups["lower than"].append(f"that of {title}, which found nothing in time for some seed")
        elif abs(gain) <= spread:
            groups["no different from"].append(f"that of {title} ({gain:+.4f} ± {spread:.4f})")
        else:
            groups["lower than" if gain > 0 else "higher than"].append(
                f"that of {title} by {abs(gain):.4f} ± {spread:.4f}"
            )
    sentences += [f"It is {how} {', '.join(which)}." for how, which in groups.items() if which]
    return " ".join(sentences)


# --------------------------------------------------------------------------------------------------------- the tables


def shown(values: list[float], form: str = ".4f") -> str:
    mean, error = mean_and_error(values)
    return f"{mean:{form}} ± {error:{form}}" if math.isfinite(mean) else "–"


def table(results: Results, task: Task) -> list[str]:
    """The methods with all hyperparameters."""
    lines = [
        "| method | trials ended in time | best validation loss | its test loss | its test error | processor time |",
        "|---|---|---|---|---|---|",
    ]
    for key, method in METHODS.items():
        runs = results.of(task.name, key, task.sizes[-1])
        if not runs:
            continue
        states = sorted({state for run in runs for state in run.trials})
        trials = ", ".join(
            f"{statistics.mean(run.trials.get(state, 0) for run in runs):.0f} {state}" for state in states
        )
        lines.append(
            f"| {method.title} | {trials or 'none'} | {shown(ends(runs, _validation))} | {shown(ends(runs))} | "
            f"{shown(ends(runs, _error), '.1%')} | {statistics.mean(run.share for run in runs):.0%} |"
        )
    return lines


def sizes_table(results: Results, task: Task) -> list[str]:
    """Ours against Optuna alone as the number of hyperparameters grows."""
    lines = [
        "| hyperparameters | validation loss, ours | Optuna alone | ours is lower by | test loss, ours | "
        "Optuna alone | ours is lower by | trials, ours and Optuna alone |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size in task.sizes:
        cells = [str(size)]
        ours, theirs = (results.of(task.name, method, size) for method in ("ours", "tpe"))
        for what in (_validation, _test):
            gain, spread = difference(results, task.name, "tpe", size, what)
            cells += [shown(ends(ours, what)), shown(ends(theirs, what))]
            cells.append(f"{gain:+.4f} ± {spread:.4f}" if math.isfinite(gain) else "–")
        counts = [statistics.mean(sum(run.trials.values()) for run in runs) for runs in (ours, theirs)]
        cells.append(" and ".join(f"{count:.0f}" for count in counts))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def summary(results: Results, task: Task) -> list[str]:
    """What is printed."""
    lines = [f"\n{task.title}", verdict(results, task), *table(results, task)]
    if len(task.sizes) > 1 and results.of(task.name, "tpe", task.sizes[0]):
        lines += [from_which_size(results, task), *sizes_table(results, task)]
    return lines


# -------------------------------------------------------------------------------------------------------- the figures


def curve(runs: list[Run], what: What, places: list[float]) -> list[tuple[float, float, float]]:
    """Time, mean and standard error of the best so far, at the places at which every seed has one."""
    found = []
    for place in places:
        values = []
        for run in runs:
            known = bisect.bisect_right([point.seconds for point in run.points], place)
            values.append(what(run.points[known - 1]) if known else math.inf)
        mean, error = mean_and_error(values)
        if math.isfinite(mean):
            found.append((place, mean, 0.0 if math.isnan(error) else error))
    return found


def figure(results: Results, task: Task, path: Path) -> None:
    """Validation loss of the best so far and its test loss, against seconds."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(11, 4.2), layout="constrained")
    panels = drawing.subplots(1, 2)
    for ax, (label, what) in zip(panels, (("validation loss", _validation), ("test loss", _test)), strict=True):
        highest, lowest = -math.inf, math.inf
        for key, method in METHODS.items():
            runs = results.of(task.name, key, task.sizes[-1])
            if not runs:
                continue
            until = runs[0].job.seconds
            points = curve(runs, what, [until * 100 ** (i / 200 - 1) for i in range(201)])
            if not points:
                continue
            x, middle, error = zip(*points, strict=True)
            low = [m - e for m, e in zip(middle, error, strict=True)]
            high = [m + e for m, e in zip(middle, error, strict=True)]
            ax.fill_between(x, low, high, color=COLOURS[key], alpha=0.15, linewidth=0)
            ax.plot(x, middle, color=COLOURS[key], linestyle=DASHES[key], linewidth=2, label=method.title)
            later = [value for at, value in zip(x, high, strict=True) if at >= until / 5]
            highest, lowest = max(highest, *later), min(lowest, *low)
        _dress(ax, label, "seconds")
        if math.isfinite(highest):
            ax.set_ylim(lowest - 0.05 * (highest - lowest), highest + 0.15 * (highest - lowest))
        ax.set_title(f"{label} of the best so far")
    drawing.savefig(path, dpi=110)


def sizes_figure(results: Results, tasks: list[Task], path: Path) -> None:
    """Losses at the end against the number of hyperparameters, a panel for each task."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(5.5 * len(tasks), 4.2), layout="constrained")
    for ax, task in zip(drawing.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for key in ("ours", "tpe"):
            for name, what, dash in (("test", _test, "-"), ("validation", _validation, ":")):
                found = [mean_and_error(ends(results.of(task.name, key, size), what)) for size in task.sizes]
                ax.errorbar(
                    task.sizes,
                    [mean if math.isfinite(mean) else math.nan for mean, _ in found],
                    yerr=[0.0 if math.isnan(error) else error for _, error in found],
                    color=COLOURS[key],
                    linestyle=dash,
                    marker="o",
                    markersize=4,
                    capsize=3,
                    label=f"{METHODS[key].title}, {name}",
                )
        _dress(ax, "loss at the end", "hyperparameters")
        ax.set_xticks(task.sizes, [str(size) for size in task.sizes])
        ax.set_title(task.title)
    drawing.savefig(path, dpi=110)


def _dress(ax: Axes, vertical: str, horizontal: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    ax.set_xscale("log")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    ax.set_xlabel(horizontal)
    ax.set_ylabel(vertical)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize="small", handlelength=3)
    ax.grid(alpha=0.25)


# ----------------------------------------------------------------------------------------------------------- the page


def protocol(results: Results, tasks: list[Task]) -> list[str]:
    """How it was measured, as it was in this run."""
    seeds = len({run.job.seed for run in results.runs})
    shares = [run.share for run in results.runs]
    late = max(run.longest / run.job.seconds for run in results.runs)
    lines = [
        f"Four ways to search, each with two processes of one thread for the same wall-clock time, with {seeds} seeds. "
        "A seed decides the division of the data, the model's initial weights and what samplers draw.",
        "",
        "- **Optuna outside, gradients inside** (ours): `hi.search`. Optuna searches the inner learning rate and the "
        "hyperparameters' common initial value; in each trial they move by gradient (Adam).",
        "- **Optuna alone:** Optuna searches the inner learning rate and every hyperparameter. A trial is a plain "
        "training loop in PyTorch: no hypergradient, no tracking, no graph where the validation loss is looked at.",
        "- **Random search:** the same with Optuna's random sampler.",
        "- **Gradients alone:** `hi.optimize` with the inner learning rate at its default. One process begins at the "
        "default hyperparameters and goes on until time is up. The other begins anew, as often as there is time, at "
        "values drawn from the ranges, with runs as long as a trial of ours. A model is trained anew at the end of "
        "each run, and in the run that goes on after every so many steps.",
        "",
        f"- **The same for all:** ranges (below; drawn on a log scale but for weights between 0 and 1), the default "
        "configuration, which is the first trial of every study, the inner optimizer, and where the others have one, "
        f"Optuna {version('optuna')} as it comes: TPE with its defaults (multivariate, constant liar), the median "
        "pruner (silent for the first eighth of a trial), and a study that both processes share in a journal file.",
        "- **The time** begins when both processes have the data in memory and the study open, after each has run the "
        "method once for half a second. Trials that end after it do not count. What a sampler and the storage take is "
        "part of it. Runs are made one after another in random order.",
        "- **What is compared** is a configuration: an inner learning rate and hyperparameters. Its validation loss is "
        "that of a model trained anew with it, for as many steps as a plain trial has, at the end of them; at the end "
        "of a trial of ours such a model is trained as well (with the last hyperparameters and with those of the best "
        "outer step), within the trial's time. So models are trained to near convergence in all methods: early "
        "stopping is no hyperparameter here. In tries that are not part of this command, trials were judged by their "
        "lowest validation loss instead, and on the breast cancer data Optuna alone was then the better one, by "
        "stopping early. Pruned trials do not count. What is reported is the test loss of the model with the best "
        "validation loss so far; the test data is not looked at before time is up.",
        "- Trials' lengths, the step size of Adam and how the data is divided were chosen on seeds from 100 on, which "
        "are not reported. With 30 to 40 training samples of the breast cancer data in place of 20, a decay for each "
        "feature lowered the validation loss and gained little in test loss over one decay for all.",
        "- **Differences** are paired by seed, ± is a standard error over the seeds. Each process had "
        f"{min(shares):.0%} to {max(shares):.0%} of a core (median {statistics.median(shares):.0%}); the rest is "
        "waiting: for the study's file, and for whatever else the machine did. The last trial was left after at "
        f"most {late:.0%} of the time.",
        "",
        "| problem | data and training loss L | hyperparameters | inner learning rate | trial of ours | "
        "plain trial | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for task in tasks:
        trial, weights, lr = task.trial, task.weights, task.inner_lr
        seconds = sorted({run.job.seconds for run in results.runs if run.job.task == task.name})
        warmup = f"{trial.warmup_steps} training steps, then " if trial.warmup_steps else ""
        cells = [
            task.title,
            task.about,
            f"{task.sizes[-1]} in [{weights.low:g}, {weights.high:g}], {weights.default:g} by default",
            f"{lr.low:g} to {lr.high:g}, {lr.default:g} by default",
            f"{warmup}{trial.outer_steps} outer steps after {trial.inner_steps} training steps each, outer lr "
            f"{trial.outer_lr:g}, `{_spec(trial.backend)}`",
            f"{trial.steps} steps, {trial.steps // trial.look} looks",
            ", ".join(f"{each:g}" for each in seconds),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _spec(backend: Any) -> str:
    if not isinstance(backend, dict):
        return str(backend)
    options = ", ".join(f"{name}={value}" for name, value in backend.items() if name != "name")
    return f"{backend['name']}({options})"


def write(results: Results, tasks: list[Task], path: Path) -> None:
    """The page, and its figures in the folder ``images`` beside it."""
    images = path.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    growing = [task for task in tasks if len(task.sizes) > 1 and results.of(task.name, "tpe", task.sizes[0])]
    lines = [
        "# Ways to search",
        "",
        f"Written by `make benchmark-search` (`python benchmarks/search.py --write docs/{path.name}`).",
        "",
        f"{versions_line()} The whole command took {results.minutes:.0f} minutes.",
        "",
    ]
    if growing:
        sizes_figure(results, growing, images / "search-sizes.png")
        lines += [
            "## From how many hyperparameters on",
            "",
            "Ours against Optuna alone, at equal wall-clock time, as the decays of neighbouring features are tied to "
            "so many groups.",
            "",
            *[f"- {from_which_size(results, task)}" for task in growing],
            "",
            "![Losses against the number of hyperparameters](images/search-sizes.png)",
            "",
        ]
        for task in growing:
            lines += [f"{task.title}:", "", *sizes_table(results, task), ""]
    lines += ["## How it is measured", "", *protocol(results, tasks)]
    for task in tasks:
        figure(results, task, images / f"search-{task.name}.png")
        lines += [
            f"## {task.title}",
            "",
            f"{task.sizes[-1]} hyperparameters. {verdict(results, task)}",
            "",
            f"![Best so far against seconds, {task.title}](images/search-{task.name}.png)",
            "",
            *table(results, task),
            "",
        ]
    path.write_text("\n".join(lines))
