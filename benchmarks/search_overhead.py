"""What ``search`` costs beyond calling ``optimize`` in a loop.

python benchmarks/search_overhead.py                    print the table
python benchmarks/search_overhead.py --write FILE.md    and write it to a file

A search takes turns with a loop over its trials, with the same knobs and seeds; nothing is tracked, and nothing pruned.
Figures are medians over rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from optuna.distributions import FloatDistribution
from torch import Tensor, nn
from versions import versions_line

import hyperopt_implicit as hi

TRIALS = 20
ROUNDS = 5
SHORT = {"outer_steps": 20, "inner_steps": 5, "backend": "cg"}
LONG_STEPS = 100  # of a long trial, whose reports are counted


class Wide(nn.Module):
    """Two layers, wide enough for a trial to take some time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(20, width), nn.Tanh(), nn.Linear(width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@hi.hyperparameter("decay", init=1e-2)
def training_loss(model: nn.Module, batch: tuple[Tensor, Tensor], *, decay: Tensor) -> Tensor:
    x, y = batch
    return (model(x) - y).square().mean() + decay * sum(p.square().sum() for p in model.parameters())


def validation_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (model(x) - y).square().mean()


_generator = torch.Generator().manual_seed(0)
DATA = [
    (torch.randn(rows, 20, generator=_generator), torch.randn(rows, 1, generator=_generator)) for rows in (256, 128)
]


def builder(width: int) -> Any:
    @hi.knob("momentum", FloatDistribution(0.0, 0.9))
    @hi.knob("lr", FloatDistribution(1e-3, 1e-1, log=True))
    def problem(*, lr: float, momentum: float) -> hi.BilevelProblem:
        return hi.BilevelProblem(
            Wide(width),
            training_loss,
            validation_loss,
            training_data=[DATA[0]],
            validation_data=[DATA[1]],
            optimizer=lambda params: torch.optim.SGD(params, lr=lr, momentum=momentum),
        )

    return problem


@dataclass(frozen=True)
class Row:
    """Seconds a trial: by a loop, by the search; and what the search adds, in ms and as a share."""

    storage: str
    loop: float
    search: float

    @property
    def added_ms(self) -> float:
        return 1e3 * (self.search - self.loop)

    @property
    def share(self) -> float:
        return self.search / self.loop - 1.0


def storage_in(folder: Path, kind: str, number: int) -> str | None:
    return {
        "memory": None,
        "sqlite": f"sqlite:///{folder}/{number}.db",
        "journal": f"journal:///{folder}/{number}.log",
    }[kind]


def measure(kind: str, *, width: int, trials: int, rounds: int, options: dict[str, Any]) -> Row:
    """A search and a loop with its knobs and seeds, in turns, each in processor time of this process."""
    build = builder(width)
    loops, searches = [], []
    with tempfile.TemporaryDirectory() as name:
        for number in range(rounds + 1):
            storage = storage_in(Path(name), kind, number)
            started = time.perf_counter()
            found = hi.search(build, n_trials=trials, storage=storage, pruner="none", seed=0, tracking=False, **options)
            middle = time.perf_counter()
            for trial in found.study.trials:
                with torch.random.fork_rng():
                    torch.manual_seed(trial.number)
                    problem = build(**trial.params)
                hi.optimize(problem, seed=trial.number, tracking=False, progress=False, **options)
            ended = time.perf_counter()
            if number:  # the first round imports and warms up
                searches.append((middle - started) / trials)
                loops.append((ended - middle) / trials)
    return Row(kind, statistics.median(loops), statistics.median(searches))


def page(short: list[Row], long: list[Row], long_trials: int) -> str:
    lines = [
        "# What a search adds",
        "",
        "Seconds a trial, by `hi.optimize` in a loop over the same knobs and seeds and by `hi.search`; in turns in one "
        "process, medians. Nothing is tracked, and nothing pruned; trials report all the same.",
        "",
        f"{versions_line()} Command: `make benchmark-search-overhead`",
        "(`python benchmarks/search_overhead.py --write docs/benchmarks-search-overhead.md`).",
    ]
    for title, rows in (
        (f"Short trials ({SHORT['outer_steps']} outer steps; {TRIALS} trials, {ROUNDS} rounds)", short),
        (f"Long trials ({LONG_STEPS} outer steps; {long_trials} trials a round)", long),
    ):
        lines += [
            "",
            f"## {title}",
            "",
            "| storage | loop, s a trial | search, s a trial | added, ms a trial | added |",
        ]
        lines += ["|---|---|---|---|---|"]
        lines += [
            f"| {r.storage} | {r.loop:.3f} | {r.search:.3f} | {r.added_ms:.1f} | {100 * r.share:.1f} % |" for r in rows
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", type=Path)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rounds = 1 if arguments.quick else ROUNDS
    trials = 3 if arguments.quick else TRIALS
    kinds = ("memory", "sqlite", "journal")
    short = [measure(kind, width=16, trials=trials, rounds=rounds, options=SHORT) for kind in kinds]
    long: list[Row] = []
    if not arguments.quick:
        steps = {"outer_steps": LONG_STEPS, "inner_steps": 20, "backend": "cg"}
        long = [measure(kind, width=512, trials=2, rounds=3, options=steps) for kind in kinds[1:]]
    text = page(short, long, 2)
    print(text)
    if arguments.write is not None:
        arguments.write.write_text(text)


if __name__ == "__main__":
    main()
