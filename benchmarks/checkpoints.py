"""What checkpoints cost: a save, its share of the time, and the way back.

python benchmarks/checkpoints.py                    print the tables
python benchmarks/checkpoints.py --write FILE.md    and write them to a file

Times are medians. A share is that of the time between two saves at the default interval, from what a save was measured
to take; with checkpoints and without, the same outer steps take turns in one process.
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
from timing import keep_freed_memory
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from versions import versions_line

import hyperopt_implicit as hi
from hyperopt_implicit.checkpoint import Checkpoints
from hyperopt_implicit.prepared_run import PreparedRun, RunOptions
from hyperopt_implicit.run_state import RunKeeper

WIDTHS = [16, 256, 1024, 3072]
SAVES, TURNS = 9, 60
DEFAULT = Checkpoints("nowhere")


@hi.hyperparameter("decay", init=lambda model: torch.full((2,), 1e-3))
def training_loss(model: nn.Module, batch: tuple[Tensor, Tensor], *, decay: Tensor) -> Tensor:
    x, y = batch
    weights = [p for p in model.parameters() if p.dim() == 2]
    return (model(x) - y).square().mean() + sum(d * w.square().sum() for d, w in zip(decay, weights, strict=False))


def validation_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (model(x) - y).square().mean()


def problem(width: int, workers: int = 0) -> hi.BilevelProblem:
    """Three layers, Adam, and shuffled data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))
    data = TensorDataset(torch.randn(1024, 64), torch.randn(1024, 1))
    return hi.BilevelProblem(
        model,
        training_loss,
        validation_loss,
        training_data=DataLoader(data, batch_size=32, shuffle=True, num_workers=workers),
        validation_data=[data[:64]],
        optimizer=lambda params: torch.optim.Adam(params, lr=1e-3),
    )


def begun(width: int, keeper: RunKeeper | None, workers: int = 0) -> PreparedRun:
    run = PreparedRun(problem(width, workers), "identity", RunOptions(inner_steps=5), 0)
    run.begin([], False, keeper)
    return run


@dataclass(frozen=True)
class Row:
    """A model: its size, that of a checkpoint in bytes, and seconds of an outer step, a save and a resumption."""

    parameters: int
    workers: int
    size: int
    step: float
    save: float
    resume: float

    @property
    def share(self) -> float:
        """Of a save in the time between two, at the default interval."""
        return self.save / max(DEFAULT.least_seconds, self.save / DEFAULT.share)

    def line(self) -> str:
        """Of the table."""
        return (
            f"| {self.parameters:,} | {self.workers} | {self.size / 1e6:.2f} MB | {self.step * 1e3:.1f} ms | "
            f"{self.save * 1e3:.1f} ms | {self.share:.2%} | {self.resume:.3f} s |"
        )


def measured(width: int, workers: int = 0) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        run = begun(width, RunKeeper(Checkpoints(folder, every=10**6), resume=False), workers)
        assert run.keeper is not None
        steps, saves, resumes = [], [], []
        for step in range(SAVES):
            started = time.perf_counter()
            run.run.advance(step)
            stepped = time.perf_counter()
            run.keeper.save()
            steps.append(stepped - started)
            saves.append(time.perf_counter() - stepped)
        size = max(path.stat().st_size for path in Path(folder).glob("*.pt"))
        run.close()
        for _ in range(SAVES):
            again = PreparedRun(problem(width, workers), "identity", RunOptions(inner_steps=5), 0)
            started = time.perf_counter()
            again.begin([], False, RunKeeper(Checkpoints(folder), resume=True))
            again.run.loop.training.peek()
            resumes.append(time.perf_counter() - started)
            assert len(again.run.history) == SAVES
            again.close()
    parameters = sum(p.numel() for p in run.problem.params.values())
    return Row(parameters, workers, size, *(statistics.median(each) for each in (steps, saves, resumes)))


def off() -> float:
    """Seconds that a run without checkpoints spends on the questions whether there are any, an outer step."""
    run = begun(16, None)
    run.run.advance(0)
    questions, nothing = [], []
    for _ in range(SAVES):
        started = time.perf_counter()
        for _ in range(10_000):
            run.heed(None)
            _ = run.keeper is not None and run.run.stop_reason is None
        questions.append(time.perf_counter() - started)
        started = time.perf_counter()
        for _ in range(10_000):
            pass
        nothing.append(time.perf_counter() - started)
    run.close()
    return (statistics.median(questions) - statistics.median(nothing)) / 10_000


def taking_turns(width: int) -> float:
    """What outer steps with checkpoints as often as costs a share of 0.005 take, over those without."""
    with tempfile.TemporaryDirectory() as folder:
        keeper = RunKeeper(Checkpoints(folder, least_seconds=0.0), resume=False)
        runs: list[Any] = [begun(width, keeper), begun(width, None)]
        seconds = [0.0, 0.0]
        for turn in range(TURNS):
            for which, run in enumerate(runs):
                started = time.process_time()
                for step in range(5):
                    run.run.advance(turn * 5 + step)
                    run.heed(None)
                    if run.keeper is not None:
                        run.keeper.after_step()
                if turn >= TURNS // 10:
                    seconds[which] += time.process_time() - started
        for run in runs:
            run.close()
    return seconds[0] / seconds[1]


def page() -> str:
    rows = [*(measured(width) for width in WIDTHS), measured(WIDTHS[1], workers=2)]
    nothing, small, often = off(), rows[0], taking_turns(256)
    lines = [
        "# What checkpoints cost",
        "",
        "Checkpoints are told of in [Stopping and resuming](resuming.md). A network of three layers, Adam, a shuffled",
        "`DataLoader`, and five inner steps an outer step.",
        "",
        "| parameters | workers | checkpoint | outer step | a save | its share | reading it, until the next batch |",
        "|--:|--:|--:|--:|--:|--:|--:|",
        *(row.line() for row in rows),
        "",
        "A save is written, flushed to the disk and renamed. By default, of which the share is, it comes ten seconds",
        "after the last one, or 200 times as long as it takes, whichever is later.",
        "",
        f"Saved far more often, whenever 200 times as long as a save takes have passed, outer steps took {often:.3f}",
        f"times the processor time of those without ({rows[1].parameters:,} parameters, taking turns in a process).",
        "",
        "Without checkpoints, what is left is the question whether there are any:",
        f"{nothing * 1e9:.0f} ns an outer step, {nothing / small.step:.4%} of the shortest one above.",
        "",
        "```bash",
        "make benchmark-checkpoints",
        "```",
        "",
        versions_line(),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", type=Path, help="file to write the page to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    found = page()
    print(found)
    if arguments.write is not None:
        arguments.write.write_text(found)


if __name__ == "__main__":
    main()
