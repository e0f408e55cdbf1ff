"""What ``optimize`` costs around the hypergradient, against the same training written by hand.

python benchmarks/loop.py                    print the table
python benchmarks/loop.py --write FILE.md    and write it to a file

Blocks of both take turns in one process; a figure is the median over blocks. A hypergradient is taken every ten steps,
and ours is tracked in MLflow, with a database on disk.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import by_hand
import torch
from problems import Case, perceptron
from timing import interleaved, keep_freed_memory
from torch import Tensor, nn
from torch.distributions import constraints
from versions import versions_line

import hyperopt_implicit as hi

INNER_STEPS = 10
TERMS = 10
STEP_SIZE = 0.01  # small enough for both problems, so that the series takes all its terms
BACKEND = {"name": "neumann", "terms": TERMS, "step_size": STEP_SIZE}
BLOCKS = 5
Times = tuple[float, float, float]
"""Wall clock, processor time of this thread, processor time of all threads."""
WALL, THREAD, PROCESS = range(3)
_WARM = 5  # outer steps at the start of each block that are not measured


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        problem: its name.
        step_ms: processor time of an inner step, by hand.
        outer_ms: processor time of ten inner steps with their hypergradient, by hand.
        processor: ours / by hand, in processor time of the calling thread.
        untracked: the same without tracking.
        wall: ours / by hand, in wall-clock time.
        process: ours / by hand, in processor time of all threads, that of MLflow among them.
        hypergradient: ours / by hand for the hypergradient alone, in processor time.
        allowed: the largest ratio that is wanted.
    """

    problem: str
    step_ms: float
    outer_ms: float
    processor: float
    untracked: float
    wall: float
    process: float
    hypergradient: float
    allowed: float


def small() -> Case:
    """Linear regression, so small that what is measured is what Python does between two operators."""

    def squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return (model(x).squeeze(1) - y).square().mean()

    @hi.hyperparameter("decay", init=1e-2, constraint=constraints.positive)
    def training_loss(model: nn.Module, batch: tuple[Tensor, Tensor], *, decay: Tensor) -> Tensor:
        return squares(model, batch) + decay * model.weight.square().sum()

    def make() -> hi.BilevelProblem:
        torch.manual_seed(0)
        return hi.BilevelProblem(
            nn.Linear(20, 1),
            training_loss,
            squares,
            training_data=[training],
            validation_data=[validation],
            optimizer=lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
        )

    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(20, generator=generator)

    def sample() -> tuple[Tensor, Tensor]:
        x = torch.randn(64, 20, generator=generator)
        return x, x @ weights + torch.randn(64, generator=generator)

    training, validation = sample(), sample()
    name = "linear regression, 64×20, one decay"
    return Case(name, make, training_loss, squares, training, validation, {"decay": torch.exp}, 0.0)


def compare(case: Case, seconds: float, allowed: float) -> Row:
    """One row: blocks of about ``seconds / BLOCKS``, each of ours and each by hand."""
    step_ms, mine_ms, hand_ms = _parts(case, seconds / 4)
    outer_steps = max(10, int(1e3 * seconds / BLOCKS / (INNER_STEPS * step_ms + hand_ms)))
    tracking = hi.Tracking(uri="sqlite:///mlflow.db", save_state=False)
    blocks: list[tuple[Times, Times, Times]] = []
    for _ in range(BLOCKS + 1):
        ours = _ours(case, outer_steps, tracking)
        blocks.append((ours, _by_hand(case, outer_steps), _ours(case, outer_steps, False)))
    # the first one warms up
    ours, hand, untracked = (
        [statistics.median(column) for column in zip(*each, strict=True)] for each in zip(*blocks[1:], strict=True)
    )
    return Row(
        problem=case.name,
        step_ms=step_ms,
        outer_ms=hand[THREAD] * 1e3,
        processor=ours[THREAD] / hand[THREAD],
        untracked=untracked[THREAD] / hand[THREAD],
        wall=ours[WALL] / hand[WALL],
        process=ours[PROCESS] / hand[PROCESS],
        hypergradient=mine_ms / hand_ms,
        allowed=allowed,
    )


def _parts(case: Case, seconds: float) -> tuple[float, float, float]:
    """Milliseconds of processor time: an inner step by hand; a hypergradient of ours, and by hand."""
    ours, theirs = case.make(), case.make()
    values = theirs.hyperparameters.values()
    raw = {name: p.detach().clone().requires_grad_() for name, p in theirs.hparams.items()}
    backend, solve = hi.get_backend(BACKEND), by_hand.neumann(TERMS, STEP_SIZE)
    batches = [case.training_batch], case.validation_batch

    def step() -> None:
        theirs.optimizer.zero_grad()
        case.training_loss(theirs.model, case.training_batch, **values).backward()
        theirs.optimizer.step()

    step_s, _ = interleaved(step, lambda: None, seconds)
    mine_s, hand_s = interleaved(
        lambda: backend.hypergradient(ours, *batches, {}),
        lambda: by_hand.hypergradient(case, theirs.model, raw, solve),
        seconds,
    )
    return step_s * 1e3, mine_s * 1e3, hand_s * 1e3


def _now() -> Times:
    return time.perf_counter(), time.thread_time(), time.process_time()


def _ours(case: Case, outer_steps: int, tracking: hi.Tracking | bool) -> Times:
    """Seconds an outer step, from one callback to a later one."""
    marks: list[Times] = []
    result = hi.optimize(
        case.make(),
        BACKEND,
        outer_steps=_WARM + outer_steps,
        inner_steps=INNER_STEPS,
        tracking=tracking,
        progress=False,
        callbacks=[lambda step, problem: marks.append(_now())],
    )
    assert (result.run_id is not None) == bool(tracking)
    assert result.history[-1].hvps == TERMS
    return _between(marks[_WARM - 1], marks[-1], outer_steps)


def _by_hand(case: Case, outer_steps: int) -> Times:
    problem = case.make()
    raw = {name: p.detach().clone().requires_grad_() for name, p in problem.hparams.items()}
    rest = case, problem.model, raw, problem.optimizer, by_hand.neumann(TERMS, STEP_SIZE)
    by_hand.train_with_hypergradients(*rest, _WARM, INNER_STEPS)
    first = _now()
    by_hand.train_with_hypergradients(*rest, outer_steps, INNER_STEPS)
    return _between(first, _now(), outer_steps)


def _between(first: Times, last: Times, steps: int) -> Times:
    wall, thread, process = ((b - a) / steps for a, b in zip(first, last, strict=True))
    return wall, thread, process


def rows(seconds: float) -> list[Row]:
    """Both problems, about ``4 · seconds`` for each."""
    previous = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            return [compare(perceptron(), seconds, 1.03), compare(small(), seconds, 1.10)]
        finally:
            os.chdir(previous)


def section(rows: list[Row]) -> list[str]:
    """The table in Markdown, under its heading."""
    lines = [
        "## The whole loop, tracked in MLflow, against training written by hand",
        "",
        f"Steady state of `optimize`: {INNER_STEPS} inner steps and a hypergradient of {TERMS} Neumann terms, over and "
        f"over. Medians over {BLOCKS} blocks that take turns in one process. Processor time is that of the thread that "
        "trains. MLflow writes to its database, on disk, on a thread of its own; Python runs one thread at a time, so "
        "that where outer steps are short its work lengthens them by the clock.",
        "",
        "| problem | inner step | outer step, by hand | ours / by hand, processor time | allowed | without tracking | "
        "wall clock | processor time of all threads | hypergradient alone |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.problem} | {row.step_ms:.2f} ms | {row.outer_ms:.2f} ms | {row.processor:.3f} | {row.allowed:.2f} | "
        f"{row.untracked:.3f} | {row.wall:.3f} | {row.process:.3f} | {row.hypergradient:.3f} |"
        for row in rows
    ]
    return [
        *lines,
        "",
        "What the loop does beside its hypergradients: a copy of the model to go back to, the hyperparameters as "
        "numbers, checks that they and the weights are finite, the record, and handing that to the tracker. Starting "
        "and ending an MLflow run, with its figures, comes once a run and is not in here.",
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="a file for the table")
    parser.add_argument("--seconds", type=float, default=12.0, help="time for each side of a comparison")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    found = rows(arguments.seconds)
    print(*found, sep="\n")
    text = "\n".join([versions_line(), "", *section(found)])
    print(text)
    if arguments.write is not None:
        arguments.write.write_text(text)


if __name__ == "__main__":
    main()
