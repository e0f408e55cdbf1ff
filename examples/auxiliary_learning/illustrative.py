"""A regression whose right answer is known: one auxiliary task helps, the other can only do harm.

The problem. Three linear regressions on the same inputs x in the plane, and one model of two weights for all of them:

    main     y = w* · x + noise of standard deviation 4       what counts, but hard to learn from
    helpful  y = w* · x + noise of standard deviation 1       the same weights, seen clearly
    harmful  y = v · x + noise of standard deviation 1        other weights, seen just as clearly

The training losses do not say which of the two is of use: they are regressions on equal terms. The main task does, on
samples that were not trained on. The right answer is a weight near zero for the harmful task and a large one for the
helpful. After Navon et al., "Auxiliary Learning by Implicit Differentiation", ICLR 2021, section 5.1.

The number reported is the mean squared error against w* · x without noise, so that 0 is perfect; models are selected by
the error against noisy targets. The methods and the protocol are those of ``comparison.py``. Settings were chosen on
seeds from 100 up; in other settings tried there (more noise in the main task, or a smaller auxiliary set), uncertainty
weighting, which needs no auxiliary set, was as good as learned weights or better.

    python examples/auxiliary_learning/illustrative.py [--seeds 5] [--quick] [--no-tracking] [--figure FILE.png]
    hyperopt-implicit run examples/auxiliary_learning/illustrative.py --backend cg
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import torch
import typer
from comparison import run
from protocol import AuxiliaryProblem, Split, bilevel, untrained
from torch import Tensor, nn

import hyperopt_implicit as hi

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TASKS = ("main", "helpful", "harmful")
TRUE_WEIGHTS = torch.tensor([[2.0, -2.0], [2.0, -2.0], [-2.0, 3.0]])  # [tasks, 2]
NOISE = torch.tensor([4.0, 1.0, 1.0])
TRAIN, AUXILIARY, VALIDATION, TEST = 20, 100, 100, 1000


# --------------------------------------------------------------------------------------------------------- the problem


class Samples(NamedTuple):
    """Inputs [rows, 2], targets [rows, tasks], and what the metric compares with [rows]: without noise in the test."""

    inputs: Tensor
    targets: Tensor
    answers: Tensor


def data(seed: int) -> Split:
    random = torch.Generator().manual_seed(seed)

    def samples(rows: int) -> tuple[Samples, Tensor]:
        inputs = torch.randn(rows, 2, generator=random)
        exact = inputs @ TRUE_WEIGHTS.T
        targets = exact + NOISE * torch.randn(rows, len(TASKS), generator=random)
        return Samples(inputs, targets, targets[:, 0]), exact[:, 0]

    train, auxiliary, validation = (samples(rows)[0] for rows in (TRAIN, AUXILIARY, VALIDATION))
    test, exact = samples(TEST)
    return Split(train, auxiliary, validation, test._replace(answers=exact))


def model() -> nn.Linear:
    return nn.Linear(2, 1, bias=False)


def losses(model: nn.Linear, batch: Samples) -> Tensor:
    return (model(batch.inputs) - batch.targets).square()


def mean_squared_error(model: nn.Linear, batch: Samples) -> float:
    return (model(batch.inputs)[:, 0] - batch.answers).square().mean().item()


PROBLEM = AuxiliaryProblem(
    name="illustrative",
    tasks=TASKS,
    data=data,
    model=model,
    losses=losses,
    metric=mean_squared_error,
    metric_name="error",
    higher_is_better=False,
    optimizer=partial(torch.optim.Adam, lr=0.05),
    steps=600,
    warmup_steps=100,
    backend="cg",  # the loss is quadratic in two weights: two iterations solve it
    outer_lr=0.2,
    digits=3,
)


def problem(*, seed: int = 0, method: str = "learned weights") -> hi.BilevelProblem:
    return bilevel(PROBLEM, seed, method)


# ---------------------------------------------------------------------------------------------------------- the figure


def figure(seed: int = 0) -> Figure:
    """The training loss over the model's two weights, and the path of training, with equal and with learned weights."""
    from matplotlib.figure import Figure

    # from the first step on, and closely enough for a path
    problem = dataclasses.replace(PROBLEM, warmup_steps=0, inner_steps=5)
    drawn = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = drawn.subplots(1, 2, sharex=True, sharey=True)
    _draw(left, "equal weights", seed, torch.ones(len(TASKS)), equal_path(problem, seed))
    path, weights = learned_path(problem, seed)
    shown = ", ".join(f"{task} {weight:.2g}" for task, weight in zip(TASKS, weights.tolist(), strict=True))
    _draw(right, f"learned weights: {shown}", seed, weights, path)
    left.set_ylabel("second weight")
    left.legend(loc="upper right", fontsize="small")
    return drawn


def equal_path(problem: AuxiliaryProblem, seed: int) -> Tensor:
    """The model's weights while it trains with equal task weights [looks, 2]."""
    network, batch = untrained(problem, seed), problem.data(seed).train
    optimizer = problem.optimizer(list(network.parameters()))
    path = [_position(network)]
    for step in range(1, problem.steps + 1):
        optimizer.zero_grad()
        problem.losses(network, batch).sum(dim=1).mean().backward()
        optimizer.step()
        if step % problem.inner_steps == 0:
            path.append(_position(network))
    return torch.stack(path)


def learned_path(problem: AuxiliaryProblem, seed: int) -> tuple[Tensor, Tensor]:
    """The model's weights while the task weights are learned [looks, 2], and the task weights at the end [tasks]."""
    learning = bilevel(problem, seed)
    path = [_position(learning.model)]
    result = hi.optimize(
        learning,
        problem.backend,
        outer_steps=problem.steps // problem.inner_steps,
        inner_steps=problem.inner_steps,
        outer_lr=problem.outer_lr,
        callbacks=[lambda _, running: path.append(_position(running.model))],
        progress=False,
        tracking=False,
    )
    combiner: Any = result.hyperparameters["combiner"]
    return torch.stack(path), combiner.task_weights().detach()


def _position(network: nn.Module) -> Tensor:
    return next(network.parameters()).detach().clone()[0]


def _draw(ax: Axes, title: str, seed: int, task_weights: Tensor, path: Tensor) -> None:
    batch = data(seed).train
    axis = torch.linspace(-4, 5, 120)
    first, second = torch.meshgrid(axis, axis - 0.5, indexing="xy")
    predicted = torch.stack([first, second], dim=-1) @ batch.inputs.T  # [120, 120, rows]
    surface = ((predicted[..., None] - batch.targets).square().mean(dim=2) * task_weights).sum(dim=-1)
    ax.contourf(first, second, surface.log(), levels=25, cmap="Blues_r")
    ax.plot(*path.T, color="black", marker=".", markersize=3, linewidth=1, label="training")
    ax.plot(*path[-1], color="black", marker="o", linestyle="", label="where it ends")
    ax.plot(*TRUE_WEIGHTS[0], color="gold", marker="*", markersize=15, linestyle="", label="w*, true weights")
    ax.plot(*TRUE_WEIGHTS[2], color="crimson", marker="X", markersize=9, linestyle="", label="v, of the harmful task")
    ax.set_title(title, fontsize="medium")
    ax.set_xlabel("first weight")


def main(
    seeds: int = 5,
    first_seed: int = 0,
    quick: bool = False,
    tracking: bool = True,
    jobs: int = 1,
    figure_file: Annotated[Path | None, typer.Option("--figure", help="Draw the loss surfaces here.")] = None,
) -> None:
    """Compare all methods over the seeds 0, 1, …"""
    run(PROBLEM, seeds=seeds, first_seed=first_seed, quick=quick, tracking=tracking, jobs=jobs)
    if figure_file is not None:
        figure(first_seed).savefig(figure_file, dpi=150)


if __name__ == "__main__":
    typer.run(main)
