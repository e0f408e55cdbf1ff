"""Figures of a run: losses, hyperparameters and the solver over the outer steps. Drawn with matplotlib, never shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hyperopt_implicit.history import MAX_ELEMENTS, OuterStep, flattened
from hyperopt_implicit.hyperparameters import Value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def trajectories(history: Sequence[OuterStep]) -> Figure:
    """Losses, hypergradient norm and residual, and every recorded hyperparameter, over the outer steps."""
    history = list(history)  # a history makes its records anew each time it is walked through
    names = list(dict.fromkeys(key.split("/")[0] for each in history for key in each.hyperparameters))
    figure, axes = grid(2 + len(names))
    steps = [each.step for each in history]
    axes[0].plot(steps, [each.training_loss for each in history], label="training")
    axes[0].plot(steps, [each.validation_loss_sweep for each in history], label="validation")
    axes[0].set_title("loss")
    axes[1].plot(steps, [each.hypergradient_norm for each in history], label="norm of the hypergradient")
    if any(each.residual is not None for each in history):
        residuals = [float("nan") if each.residual is None else each.residual for each in history]
        axes[1].plot(steps, residuals, label="solver's relative residual")
    if any(each.hypergradient_norm > 0 for each in history):
        axes[1].set_yscale("log")
    axes[1].set_title("hypergradient")
    for ax, name in zip(axes[2:], names, strict=True):
        keys = [key for key in history[0].hyperparameters if key.split("/")[0] == name]
        for key in keys:
            ax.plot(steps, [each.hyperparameters[key] for each in history], label=key.removeprefix(f"{name}/"))
        ax.set_title(name)
    for ax in axes:
        ax.set_xlabel("outer step")
        if 1 < len(ax.lines) <= 12:
            ax.legend(fontsize="small")
        ax.grid(alpha=0.3)
    return figure


def histograms(values: Mapping[str, Value]) -> Figure | None:
    """The distribution of each hyperparameter that is too large to be recorded element by element."""
    large = {name: flattened(value) for name, value in values.items() if flattened(value).numel() > MAX_ELEMENTS}
    if not large:
        return None
    figure, axes = grid(len(large))
    for ax, (name, flat) in zip(axes, large.items(), strict=True):
        ax.hist(flat.cpu().double().numpy(), bins=50)
        ax.set_title(f"{name} ({flat.numel():,} elements)")
        ax.set_xlabel("final value")
        ax.set_ylabel("elements")
    return figure


def grid(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with so many axes, three in a row at most."""
    from matplotlib.figure import Figure

    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.5 * columns, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for ax in axes[count:]:
        ax.set_visible(False)
    return figure, axes[:count]
