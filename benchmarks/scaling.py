"""What an outer step costs as hyperparameters, parameters and terms grow: time, memory, and their fitted exponents.

python benchmarks/scaling.py            print the table
python benchmarks/scaling.py --write    and write docs/scaling.md, with its plots in docs/images/

One thread; the points of a sweep take turns, and a figure is the median over turns.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import keep_freed_memory
from torch import Tensor, nn
from torch.distributions import constraints
from versions import versions_line

import hyperopt_implicit as hi
from hyperopt_implicit.diagnostics.measuring import peak_bytes
from hyperopt_implicit.history import summarise
from hyperopt_implicit.inner_loop import train_step

ROOT = Path(__file__).parents[1]
INNER_STEPS = 10
BATCH = 64
STEP_SIZE = 1e-3  # small enough everywhere, so that the series takes all its terms
_TURN = 0.02  # seconds that a quick call is repeated for in its turn
_ROUNDS = 5
_PARTS = (f"{INNER_STEPS} training steps", "hypergradient", "move and record of the hyperparameters")


@dataclass
class Point:
    """One size of a sweep, and what was measured there: medians of processor time in seconds, peak memory in bytes."""

    size: int
    calls: dict[str, Callable[[], object]]
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sweep:
    """One thing that grows, the rest held."""

    name: str
    axis: str
    held: str
    points: list[Point]

    def exponent(self, values: Sequence[float]) -> float:
        """The slope of log cost over log size, by least squares over the upper half of the sizes."""
        upper = len(self.points) // 2
        x = [math.log(point.size) for point in self.points[upper:]]
        y = [math.log(value) for value in values[upper:]]
        return round(statistics.linear_regression(x, y).slope, 2) + 0.0  # and no −0

    @property
    def fitted(self) -> str:
        """Over which sizes exponents are fitted."""
        return f"{_count(self.points[len(self.points) // 2].size)} to {_count(self.points[-1].size)}"


def problem(parameters: int, hyperparameters: int) -> tuple[hi.BilevelProblem, object, object]:
    """A perceptron with a weight for each of many samples, of which a batch is seen; with its two batches."""
    torch.manual_seed(0)
    classes, width = 10, 1
    while 2 * width * width + (classes + 2) * width < parameters:
        width += 1
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
    model.append(nn.Linear(width, classes))

    @hi.hyperparameter("weights", init=torch.full((hyperparameters,), 0.5), constraint=constraints.unit_interval)
    def training_loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor], *, weights: Tensor) -> Tensor:
        x, y, which = batch
        return (weights[which] * F.cross_entropy(model(x), y, reduction="none")).mean()

    def validation_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    x, y = torch.randn(2, BATCH, width), torch.randint(classes, (2, BATCH))
    training = (x[0], y[0], torch.randint(hyperparameters, (BATCH,)))
    made = hi.BilevelProblem(
        model,
        training_loss,
        validation_loss,
        training_data=[training],
        validation_data=[(x[1], y[1])],
        optimizer=lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
    )
    return made, training, (x[1], y[1])


def point(size: int, parameters: int, hyperparameters: int, terms: int) -> Point:
    """The parts of an outer step at one size, ready to be called."""
    made, training, validation = problem(parameters, hyperparameters)
    outer = hi.HyperOptimizer(
        made,
        torch.optim.Adam,
        lr=1e-3,
        backend={"name": "neumann", "terms": terms, "step_size": STEP_SIZE},
    )
    values = made.hyperparameters.values()
    found = outer.compute([training], validation)
    assert found.hvps == terms, (size, found.status, found.hvps)

    def train() -> None:
        for _ in range(INNER_STEPS):
            train_step(made, training, values)

    def move() -> None:
        outer.apply(found)
        summarise(outer.hyperparameters)

    calls = (train, lambda: outer.compute([training], validation), move)
    return Point(size, dict(zip(_PARTS, calls, strict=True)))


def sweeps() -> list[Sweep]:
    """The three of them, not yet measured."""
    return [
        Sweep(
            "hyperparameters",
            "hyperparameters m",
            "10⁵ parameters, 5 terms",
            [point(10**k, 10**5, 10**k, 5) for k in range(1, 7)],
        ),
        Sweep(
            "parameters",
            "parameters n",
            "100 hyperparameters, 5 terms",
            [point(10**k, 10**k, 100, 5) for k in range(3, 8)],
        ),
        Sweep(
            "terms",
            "terms K",
            "10⁵ parameters, 100 hyperparameters",
            [point(2**k, 10**5, 100, 2**k) for k in range(7)],
        ),
    ]


def measure(sweep: Sweep) -> None:
    """Fill in what the points cost."""
    times: dict[tuple[int, str], list[float]] = {}
    for turn in range(_ROUNDS + 1):
        for each in sweep.points:
            for part, call in each.calls.items():
                until = time.perf_counter() + _TURN
                while True:
                    started = time.thread_time()
                    call()
                    if turn:  # the first one warms up
                        times.setdefault((each.size, part), []).append(time.thread_time() - started)
                    if time.perf_counter() > until:
                        break
    for each in sweep.points:
        for part, call in each.calls.items():
            each.seconds[part] = statistics.median(times[each.size, part])
            each.memory[part] = peak_bytes(call)


def draw(sweep: Sweep, file: Path) -> None:
    """Time and memory over the size, both axes logarithmic."""
    from matplotlib.figure import Figure

    sizes = [each.size for each in sweep.points]
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for part, marker in zip(_PARTS, "osD", strict=True):
        seconds = [each.seconds[part] * 1e3 for each in sweep.points]
        left.plot(sizes, seconds, marker=marker, label=f"{part}: {_power(sweep, seconds)}")
        megabytes = [each.memory[part] / 1e6 for each in sweep.points]
        right.plot(sizes, megabytes, marker=marker, label=f"{part}: {_power(sweep, megabytes)}")
    left.set_ylabel("processor time, ms")
    right.set_ylabel("peak memory beyond what is held, MB")
    for ax in (left, right):
        ax.set_xscale("log", base=2 if sweep.name == "terms" else 10)
        ax.set_yscale("log")
        ax.set_xlabel(f"{sweep.axis}   ({sweep.held})")
        ax.grid(alpha=0.3, which="both", linewidth=0.5)
        low, high = ax.get_ylim()
        ax.set_ylim(low, high * (high / low) ** 0.35)  # room for the legend
        ax.legend(fontsize="small", loc="upper left")
    figure.savefig(file, dpi=130)


def _power(sweep: Sweep, values: Sequence[float]) -> str:
    letter = sweep.axis.split()[-1]
    return f"${letter}^{{{sweep.exponent(values):.2f}}}$"


def _count(number: float) -> str:
    exponent = round(math.log10(number))
    if number >= 1000 and number == 10**exponent:
        return f"10{''.join('⁰¹²³⁴⁵⁶⁷⁸⁹'[int(digit)] for digit in str(exponent))}"
    return f"{number:,.0f}"


def table(found: list[Sweep]) -> list[str]:
    """The fitted exponents, with the costs at both ends."""
    lines = [
        "| what grows | part of an outer step | time | fitted exponent | memory | fitted exponent |",
        "|---|---|---|---|---|---|",
    ]
    for sweep in found:
        first, last = sweep.points[0], sweep.points[-1]
        what = f"{sweep.name}, {_count(first.size)} to {_count(last.size)}"
        for part in _PARTS:
            seconds = [each.seconds[part] for each in sweep.points]
            memory = [each.memory[part] for each in sweep.points]
            lines.append(
                f"| {what} | {part} | {first.seconds[part] * 1e3:.2f} → {last.seconds[part] * 1e3:.2f} ms | "
                f"{sweep.exponent(seconds):.2f} | {first.memory[part] / 1e6:.3f} → {last.memory[part] / 1e6:.3f} MB | "
                f"{sweep.exponent(memory):.2f} |"
            )
    return lines


def page(found: list[Sweep], took: float) -> str:
    """The docs page."""
    lines = [
        "# Cost as things grow",
        "",
        "Written by `make benchmark-scaling` (`python benchmarks/scaling.py --write`).",
        "",
        f"{versions_line()} {took:.0f} seconds.",
        "",
        "An outer step has three parts: training steps, the hypergradient, and the move of the hyperparameters with "
        "their record. Below is what each costs as one number grows and the others are held. The problem is a "
        f"perceptron with two square layers, trained on batches of {BATCH} out of a data set in which every sample has "
        "a weight of its own; the weights are the hyperparameters. The backend is `neumann` with a fixed step size; "
        "`outer_optimizer` is Adam.",
        "",
        "Time is processor time of one thread. Memory is the largest amount that tensors took during the call, beyond "
        "what they held before it. An exponent of 1 means that twice the size costs twice as much, 0 that it costs "
        "the same. Exponents are fitted by least squares to the upper half of the sizes ("
        + ", ".join(f"{sweep.fitted} {sweep.name}" for sweep in found)
        + "). What a call costs whatever its size hides the slope below these, and still lowers it there.",
        "",
        *table(found),
        "",
    ]
    for sweep in found:
        lines += [
            f"## {sweep.name.capitalize()}",
            "",
            f"![Time and memory over the number of {sweep.name}](images/scaling-{sweep.name}.png)",
            "",
            _SAID[sweep.name],
            "",
        ]
    return "\n".join(lines)


_SAID = {
    "hyperparameters": (
        "One backward pass gives the derivative with respect to all hyperparameters, so their number enters through "
        "vectors as long as they are: their constrained values, the gradient, and the moments of the outer optimizer. "
        "The solver never sees them. A training step reads the weights of its batch only."
    ),
    "parameters": (
        "Training steps and Hessian-vector products are both linear in the number of parameters. The memory of a "
        "hypergradient is a few vectors as long as the parameters, beside the graph of one batch. The hyperparameters' "
        "move knows nothing of them."
    ),
    "terms": ("Each term is one product through a graph that is kept: time grows with their number, memory does not."),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/scaling.md and its plots")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    started = time.perf_counter()
    found = sweeps()
    for sweep in found:
        measure(sweep)
    took = time.perf_counter() - started
    print(*table(found), f"{took:.0f} seconds", sep="\n")
    if arguments.write:
        for sweep in found:
            draw(sweep, ROOT / "docs" / "images" / f"scaling-{sweep.name}.png")
        (ROOT / "docs" / "scaling.md").write_text(page(found, took))


if __name__ == "__main__":
    main()
