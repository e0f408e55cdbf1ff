"""Figures of an auxiliary-learning run: the tasks over the steps, and what a combiner has learned to do with losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hyperopt_implicit.auxiliary.combiners import LossCombiner
from hyperopt_implicit.figures import grid
from hyperopt_implicit.problem import evaluating

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hyperopt_implicit.auxiliary.task_report import TaskReading

_POINTS = 40  # along each axis of a surface


def trajectories(readings: Sequence[TaskReading], tasks: Sequence[str]) -> Figure:
    """Weight, loss and cosine of each task over the outer steps."""
    figure, axes = grid(3)
    steps = [each.step for each in readings]
    columns = {
        "weight (derivative of the combined loss)": [each.weights for each in readings],
        "mean training loss": [each.losses for each in readings],
        "cosine with the validation loss's gradient": [each.cosines for each in readings],
    }
    for ax, (title, rows) in zip(axes, columns.items(), strict=True):
        for i, task in enumerate(tasks):
            ax.plot(steps, [row[i] for row in rows], label=task)
        ax.set_title(title, fontsize="medium")
        ax.set_xlabel("outer step")
        ax.grid(alpha=0.3)
    if all(weight > 0 for row in columns["weight (derivative of the combined loss)"] for weight in row):
        axes[0].set_yscale("log")
    axes[0].legend(fontsize="small")
    axes[2].axhline(0, color="black", linewidth=0.8)
    return figure


def loss_surface(
    combiner: LossCombiner,
    readings: Sequence[TaskReading],
    tasks: Sequence[str],
    main_task: int,
    shape: tuple[int, ...],
) -> Figure:
    """The combined loss over the main loss and each auxiliary one, the others as they are, with the path of the run."""
    others = [i for i in range(len(tasks)) if i != main_task]
    figure, axes = grid(len(others))
    low, high = _ranges(readings)
    last = torch.tensor(readings[-1].losses)
    for ax, i in zip(axes, others, strict=True):
        x, y = (torch.linspace(low[k], high[k], _POINTS) for k in (main_task, i))
        points = last.repeat(_POINTS, _POINTS, 1)
        points[..., main_task], points[..., i] = x[None, :], y[:, None]
        surface = _combined(combiner, points.reshape(-1, len(tasks)), shape).reshape(_POINTS, _POINTS)
        drawn = ax.contourf(x.numpy(), y.numpy(), surface.numpy(), levels=20)
        figure.colorbar(drawn, ax=ax, label="combined loss")
        path = torch.tensor([each.losses for each in readings])
        ax.plot(path[:, main_task].numpy(), path[:, i].numpy(), color="white", linewidth=1.5)
        ax.plot(path[-1, main_task], path[-1, i], "o", color="white", markersize=5)
        ax.set_xlabel(f"loss of {tasks[main_task]} (main)")
        ax.set_ylabel(f"loss of {tasks[i]}")
    return figure


def loss_gradients(
    combiner: LossCombiner, readings: Sequence[TaskReading], tasks: Sequence[str], shape: tuple[int, ...]
) -> Figure:
    """The derivative of the combined loss with respect to each task's, as one loss varies and the others stay."""
    figure, axes = grid(len(tasks))
    low, high = _ranges(readings)
    last = torch.tensor(readings[-1].losses)
    for k, ax in enumerate(axes):
        x = torch.linspace(low[k], high[k], _POINTS)
        points = last.repeat(_POINTS, 1)
        points[:, k] = x
        slopes = _slopes(combiner, points, shape)
        for i, task in enumerate(tasks):
            ax.plot(x.numpy(), slopes[:, i].numpy(), label=task)
        ax.axvline(float(last[k]), color="black", linewidth=0.8, linestyle=":")
        ax.set_xlabel(f"loss of {tasks[k]}")
        ax.set_title("derivative of the combined loss", fontsize="medium")
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    return figure


def _ranges(readings: Sequence[TaskReading]) -> tuple[list[float], list[float]]:
    """What each loss went through, and a little more on both sides."""
    seen = torch.tensor([each.losses for each in readings])
    low, high = seen.min(dim=0).values, seen.max(dim=0).values
    margin = torch.maximum(0.1 * (high - low), 0.05 * high.abs() + 1e-6)
    return (low - margin).clamp(min=0.0).tolist(), (high + margin).tolist()


def _as_losses(combiner: LossCombiner, points: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Mean losses [points, tasks] as what the combiner takes: for loss images, images of one value."""
    like = next(combiner.parameters())
    points = points.to(like)
    return points if combiner.dimensions == 2 else points[:, :, None, None].expand(-1, -1, *shape[2:])


def _combined(combiner: LossCombiner, points: Tensor, shape: tuple[int, ...]) -> Tensor:
    with torch.no_grad(), evaluating(combiner):
        return combiner.per_sample(_as_losses(combiner, points, shape), None).cpu()


def _slopes(combiner: LossCombiner, points: Tensor, shape: tuple[int, ...]) -> Tensor:
    with torch.enable_grad(), evaluating(combiner):
        leaf = points.detach().to(next(combiner.parameters())).requires_grad_()
        combined = combiner.per_sample(_as_losses(combiner, leaf, shape), None).sum()
        (gradient,) = torch.autograd.grad(combined, leaf)
    return gradient.cpu()
