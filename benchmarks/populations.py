"""How much faster members of a population are trained as one computation than one after another.

python benchmarks/populations.py                                           print the tables
python benchmarks/populations.py --write docs/benchmarks-populations.md    and write the page
python benchmarks/populations.py --quick                                   small sizes only

Whole runs of ``optimize`` and ``optimize_population`` take turns in one process, set-up, checks and hypergradients
included; a figure is the median over rounds. Members cost the same, so that only some of them are run one by one.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import keep_freed_memory
from torch import Tensor, nn
from torch.distributions import constraints
from versions import versions_line

import hyperopt_implicit as hi

INNER_STEPS = 10
ROUNDS = 3
_ALONE = 2  # members that are run one by one in each round

Batch = tuple[Tensor, Tensor]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "Adam": lambda params: torch.optim.Adam(params, lr=1e-2),
}


@dataclass(frozen=True)
class Setting:
    """One comparison: a two-layer network with a decay for each layer."""

    width: int
    batch: int
    members: int
    backend: str = "neumann"
    optimizer: str = "SGD"
    outer_steps: int = 30
    rounds: int = ROUNDS


@dataclass(frozen=True)
class Row:
    """Milliseconds of processor time of one outer step of all members, set-up spread over the steps.

    Attributes:
        alone: one after another.
        together: as one computation.
        auto: with ``vectorise="auto"``.
        measured: the speed-up that it measured.
        chosen: whether it chose one computation.
    """

    alone: float
    together: float
    auto: float
    measured: float
    chosen: bool


@hi.hyperparameter("decay", init=torch.full((2,), 1e-2), constraint=constraints.positive)
def training_loss(model: nn.Module, batch: Batch, *, decay: Tensor) -> Tensor:
    """Cross-entropy and a decay for each layer."""
    x, y = batch
    weights = [p for p in model.parameters() if p.dim() == 2]
    return F.cross_entropy(model(x), y) + sum(d * w.square().sum() for d, w in zip(decay, weights, strict=True))


def validation_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy."""
    x, y = batch
    return F.cross_entropy(model(x), y)


def data_of(batch: int) -> tuple[list[Batch], list[Batch]]:
    """Three training batches and one of validation, each of so many rows."""
    generator = torch.Generator().manual_seed(0)

    def sample() -> Batch:
        x = torch.randn(batch, 20, generator=generator)
        return x, (x[:, :4] + 0.5 * torch.randn(batch, 4, generator=generator)).argmax(1)

    return [sample() for _ in range(3)], [sample()]


def problems(setting: Setting, count: int) -> list[hi.BilevelProblem]:
    """Members with weights of their own."""
    training, validation = data_of(setting.batch)
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(20, setting.width), nn.Tanh(), nn.Linear(setting.width, 4))
        found.append(
            hi.BilevelProblem(
                model,
                training_loss,
                validation_loss,
                training_data=training,
                validation_data=validation,
                optimizer=OPTIMIZERS[setting.optimizer],
            )
        )
    return found


def options_of(setting: Setting) -> dict[str, Any]:
    return {"outer_steps": setting.outer_steps, "inner_steps": INNER_STEPS, "outer_lr": 0.05, "tracking": False}


def compare(setting: Setting) -> Row:
    """One row: whole runs taking turns."""
    alone, together, auto, choices = [], [], [], []
    for _ in range(setting.rounds + 1):
        started = time.thread_time()  # on shared cores, wall-clock time measures the neighbours
        for problem in problems(setting, _ALONE):
            hi.optimize(problem, setting.backend, progress=False, **options_of(setting))
        alone.append((time.thread_time() - started) * setting.members / _ALONE)
        together.append(_together(setting)[0])
        seconds, found = _together(setting, vectorise="auto")
        auto.append(seconds)
        choices.append(found)
    # the first round warms up
    a, t, o = (statistics.median(each[1:]) / setting.outer_steps * 1e3 for each in (alone, together, auto))
    measured = statistics.median(each.speedup or 0.0 for each in choices)
    return Row(a, t, o, measured, len(choices[-1].groups) == 1)


def _together(setting: Setting, **options: Any) -> tuple[float, hi.Population]:
    """Seconds of processor time of all members as a population, and what came of it."""
    many = problems(setting, setting.members)
    started = time.thread_time()
    found = hi.optimize_population(many, setting.backend, **options_of(setting), **options)
    return time.thread_time() - started, found


def compiled(setting: Setting) -> tuple[float, float, float]:
    """Milliseconds of an outer step of all members: one after another, and compiled; and the seconds of compiling."""
    steps, warm = 60, 20
    marks: list[float] = []

    def mark(step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        marks.append(time.thread_time())

    options = {**options_of(setting), "outer_steps": steps}
    alone, together, seconds = [], [], 0.0
    for _ in range(setting.rounds):
        marks.clear()
        (one,) = problems(setting, 1)
        hi.optimize(one, setting.backend, progress=False, callbacks=[mark], **options)
        alone.append((marks[-1] - marks[warm]) / (steps - 1 - warm) * setting.members)
        marks.clear()
        started = time.perf_counter()
        hi.optimize_population(
            problems(setting, setting.members),
            setting.backend,
            callbacks=[[mark], *([[]] * (setting.members - 1))],
            compile=True,
            **options,
        )
        seconds = max(seconds, time.perf_counter() - started)
        together.append((marks[-1] - marks[warm]) / (steps - 1 - warm))
    return statistics.median(alone) * 1e3, statistics.median(together) * 1e3, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="write the docs page")
    parser.add_argument("--quick", action="store_true", help="small sizes only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    warnings.simplefilter("ignore", hi.HyperoptWarning)
    lines = _introduction()
    lines += _methods()
    lines += _sizes([16, 64] if arguments.quick else [16, 64, 128, 256], [4, 16] if arguments.quick else [4, 16, 64])
    lines += _compiled([16] if arguments.quick else [16, 64])
    text = "\n".join(lines) + "\n"
    if arguments.write is not None:
        arguments.write.write_text(text)


def _said(line: str) -> str:
    print(line, flush=True)
    return line


def _introduction() -> list[str]:
    return [
        "# Populations against one by one",
        "",
        "Written by `make benchmark-populations` "
        "(`python benchmarks/populations.py --write docs/benchmarks-populations.md`).",
        "",
        versions_line(),
        "",
        "A two-layer network (20 inputs, tanh, 4 classes) with a decay for each layer; 10 inner steps and a "
        "hypergradient an outer step. Times are processor time of whole runs of 30 outer steps, set-up and checks "
        "included, divided by the steps, for all members; *one by one* is `optimize` for each member, *together* is "
        '`optimize_population`. `auto` is `vectorise="auto"`, its measurement included.',
    ]


def _methods() -> list[str]:
    lines = [
        "",
        "## 16 members, batch 32: backends and optimizers",
        "",
        "| width | backend | optimizer | one by one, ms | together, ms | faster by | target |",
        "|---|---|---|---|---|---|---|",
    ]
    targets = {16: 4.0, 64: 3.0}
    for width, backend, optimizer in itertools.product(targets, ("neumann", "cg"), OPTIMIZERS):
        row = compare(Setting(width, 32, 16, backend, optimizer))
        ratio = row.alone / row.together
        met = "met" if ratio >= targets[width] else "missed"
        lines.append(
            _said(
                f"| {width} | {backend} | {optimizer} | {row.alone:.1f} | {row.together:.1f} | {ratio:.1f} | "
                f"{targets[width]:.0f}: {met} |"
            )
        )
    return lines


def _sizes(widths: list[int], members: list[int]) -> list[str]:
    lines = [
        "",
        "## Sizes, and what `auto` chooses",
        "",
        "`neumann`, SGD. The target for `auto` is at least 0.95 times the speed of one by one.",
        "",
        "| width | batch | members | together faster by | `auto` measured | `auto` chose | `auto` faster by | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for width, batch, count in itertools.product(widths, (32, 128), members):
        large = width * batch * count > 64 * 128 * 16
        row = compare(Setting(width, batch, count, outer_steps=30, rounds=1 if large else ROUNDS))
        auto = row.alone / row.auto
        choice = "together" if row.chosen else "one by one"
        lines.append(
            _said(
                f"| {width} | {batch} | {count} | {row.alone / row.together:.2f} | {row.measured:.2f} | {choice} | "
                f"{auto:.2f} | {'met' if auto >= 0.95 else 'missed'} |"
            )
        )
    return lines


def _compiled(widths: list[int]) -> list[str]:
    lines = [
        "",
        "## Compiled",
        "",
        "16 members, batch 32, `neumann`, SGD, `compile=True`; the steps after compiling. The longest of three runs "
        "says what compiling takes; torch keeps what it has compiled on disk.",
        "",
        "| width | one by one, ms | compiled, ms | faster by | whole run, s | target |",
        "|---|---|---|---|---|---|",
    ]
    for width in widths:
        alone, together, seconds = compiled(Setting(width, 32, 16))
        ratio = alone / together
        target = ("10: met" if ratio >= 10 else "10: missed") if width == 16 else ""
        lines.append(_said(f"| {width} | {alone:.1f} | {together:.1f} | {ratio:.1f} | {seconds:.0f} | {target} |"))
    return lines


if __name__ == "__main__":
    main()
