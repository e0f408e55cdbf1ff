"""Runs that are stopped and resumed: a problem in which everything draws, and what two runs of it must share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import hyperopt_implicit as hi

OUTER_STEPS = 6
OPTIONS: dict[str, dict[str, Any]] = {
    "evolution": {"pairs": 2},
    "forward_gradient": {"directions": 2},
    "nystrom": {"rank": 4},
    "exact": {"damping": 1e-2},
    "cg": {"damping": 1e-2},
    "f2sa": {"penalty": 10.0, "steps": 3},
}
"""Of backends whose default ones are slow or do not fit."""


class Noisy(TensorDataset):
    """A sample with noise that is drawn when it is loaded, by a worker where there are some."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        x, y = super().__getitem__(index)
        return x + 0.01 * torch.randn(x.shape), y


def problem(workers: int = 0, *, listed: bool = False) -> hi.BilevelProblem:
    """Shuffled data with noise, dropout, and running statistics; the model's start is drawn as well.

    Args:
        workers: of the loader of the training data.
        listed: whether the batches stand in lists, for a backend that has to find them there.
    """

    @hi.hyperparameter("decay", init=lambda model: torch.full((2,), 0.1), constraint=constraints.positive)
    @hi.hyperparameter("scale", init=1.0, constraint=constraints.interval(0.1, 10.0))
    def training_loss(model: nn.Module, batch: Any, *, decay: Tensor, scale: Tensor) -> Tensor:
        x, y = batch
        weights = [p for name, p in model.named_parameters() if name.endswith("weight") and p.dim() == 2]
        penalty = sum(d * w.square().sum() for d, w in zip(decay, weights, strict=True))
        return scale * F.mse_loss(model(x), y) + 0.01 * penalty

    def validation_loss(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return F.mse_loss(model(x), y)

    generator = torch.Generator().manual_seed(5)
    x = torch.randn(56, 3, generator=generator)
    y = torch.tanh(x @ torch.randn(3, 1, generator=generator))
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.1), nn.Linear(4, 1))
    context = "fork" if workers else None  # also in a process that was not forked itself
    training = DataLoader(
        Noisy(x[:40], y[:40]), batch_size=8, shuffle=True, num_workers=workers, multiprocessing_context=context
    )
    own = torch.Generator().manual_seed(9)
    validation = DataLoader(TensorDataset(x[40:], y[40:]), batch_size=8, shuffle=True, generator=own)
    return hi.BilevelProblem(
        model,
        training_loss,
        validation_loss,
        training_data=list(training) if listed else training,
        validation_data=list(validation) if listed else validation,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    )


def train(backend: str, folder: Path | None, *, workers: int = 0, **options: Any) -> hi.Result:
    """One run, resumed where the folder has checkpoints."""
    torch.manual_seed(11)
    kept: dict[str, Any] = {} if folder is None else {"checkpoint": folder, "checkpoint_every": 1, "resume": True}
    chosen: dict[str, Any] = {"outer_steps": OUTER_STEPS, "inner_steps": 3, "tracking": False, "progress": False}
    return hi.optimize(
        problem(workers, listed=backend == "saba"),
        {"name": backend, **OPTIONS.get(backend, {})},
        **{**chosen, "seed": 3, "keep_best_model": True, **kept, **options},
    )


def outcome(result: hi.Result) -> dict[str, Any]:
    """All of a result that must be the same, as plain values."""
    inner = result.problem.optimizer.state_dict()["state"]
    return {
        "weights": result.problem.model.state_dict(),
        "momentum": {key: each["momentum_buffer"] for key, each in inner.items() if "momentum_buffer" in each},
        "hyperparameters": dict(result.hyperparameters),
        "best": dict(result.best_hyperparameters),
        "best_model": result.best_model_state,
        "best_step": result.best_step,
        "losses": [result.validation_loss, result.best_validation_loss],
        "failed": result.failed_steps,
        "stop_reason": result.stop_reason,
        "history": [_without_times(step) for step in result.history],
    }


def _without_times(step: hi.OuterStep) -> dict[str, Any]:
    names = [name for name in hi.OuterStep.__slots__ if name not in ("inner_seconds", "outer_seconds")]
    return {name: getattr(step, name) for name in names} | {"status": step.status.value}


def difference(x: Any, y: Any, name: str = "") -> str | None:
    """Where two outcomes differ first, by however little; None where every bit is the same."""
    if isinstance(x, Mapping) and isinstance(y, Mapping):
        if x.keys() != y.keys():
            return f"{name}: {sorted(map(str, x))} and {sorted(map(str, y))}"
        return next((found for key in x if (found := difference(x[key], y[key], f"{name}.{key}"))), None)
    if isinstance(x, list) and isinstance(y, list):
        if len(x) != len(y):
            return f"{name}: {len(x)} and {len(y)} of them"
        pairs = enumerate(zip(x, y, strict=True))
        return next((found for i, (a, b) in pairs if (found := difference(a, b, f"{name}[{i}]"))), None)
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        same = x.dtype == y.dtype and x.shape == y.shape and torch.equal(x.nan_to_num(), y.nan_to_num())
        return None if same else f"{name}: {x} and {y}"
    both_nan = isinstance(x, float) and isinstance(y, float) and math.isnan(x) and math.isnan(y)
    return None if both_nan or x == y else f"{name}: {x!r} and {y!r}"
