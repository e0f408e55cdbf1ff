"""Runs of small problems with one unusual part each, that are stopped twice and resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import (
    DataLoader,
    TensorDataset,
)

import hyperopt_implicit as hi

from .resumable import difference, outcome

X = torch.randn(24, 3, generator=torch.Generator().manual_seed(5))
Y = X.sum(1, keepdim=True).tanh()


class StoppedError(Exception):
    """What ends a run in these tests."""


def stop(step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
    if step.step in (2, 4):
        raise StoppedError


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.1), nn.Tanh(), nn.Linear(4, 1))


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), **{"batch_size": 6, "shuffle": True, **options})


@hi.hyperparameter("decay", init=-3.0)
def decayed(model: nn.Module, batch: Any, *, decay: Tensor) -> Tensor:
    x, y = batch
    dtype = next(model.parameters()).dtype
    penalty = sum(p.square().sum() for p in model.parameters() if p.requires_grad)
    return mse_loss(model(x.to(dtype)), y.to(dtype)) + decay.exp() * penalty


def error(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    dtype = next(model.parameters()).dtype
    return mse_loss(model(x.to(dtype)), y.to(dtype))


def heavy_ball(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def problem(
    model: Callable[[], nn.Module] = network,
    optimizer: Callable[..., torch.optim.Optimizer] = heavy_ball,
    training: Callable[[], Any] = loader,
    validation: Callable[[], Any] = loader,
    loss: Any = decayed,
) -> hi.BilevelProblem:
    return hi.BilevelProblem(
        model(), loss, error, training_data=training(), validation_data=validation(), optimizer=optimizer
    )


def run(make: Callable[[], hi.BilevelProblem], folder: Path | None, **options: Any) -> hi.Result:
    torch.manual_seed(11)
    kept: dict[str, Any] = {} if folder is None else {"checkpoint": folder, "checkpoint_every": 1, "resume": True}
    chosen: dict[str, Any] = {"outer_steps": 6, "inner_steps": 4, "seed": 3, "tracking": False, "progress": False}
    return hi.optimize(make(), options.pop("backend", "identity"), **{**chosen, **kept, **options})


def assert_resumes(make: Callable[[], hi.BilevelProblem], folder: Path, **options: Any) -> None:
    whole = run(make, None, **options)
    for _ in range(2):
        with pytest.raises(StoppedError):
            run(make, folder, callbacks=[stop], **options)
    resumed = run(make, folder, **options)
    assert difference(outcome(whole), outcome(resumed)) is None
    buffers = [dict(each.problem.model.named_buffers()) for each in (whole, resumed)]
    assert difference(*buffers) is None
