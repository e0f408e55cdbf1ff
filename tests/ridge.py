"""Ridge regression in float64: a small problem whose best decay is known, for tests of loop, tracking and search."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints

import hyperopt_implicit as hi

Batch = tuple[Tensor, Tensor]

_generator = torch.Generator().manual_seed(7)
_weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def _sample(rows: int) -> Batch:
    x = torch.randn(rows, 3, generator=_generator, dtype=torch.float64)
    return x, x @ _weights + 2.0 * torch.randn(rows, generator=_generator, dtype=torch.float64)


TRAINING, VALIDATION = _sample(16), _sample(40)


class Weights(nn.Module):
    """w, from zero."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@hi.hyperparameter("decay", init=1.0, constraint=constraints.positive)
def training_loss(model: nn.Module, batch: Batch, *, decay: Tensor) -> Tensor:
    """L = ½ mean (xw − y)² + ½ decay ‖w‖²."""
    x, y = batch
    return 0.5 * (model(x) - y).square().mean() + 0.5 * decay * sum(p.square().sum() for p in model.parameters())


def validation_loss(model: nn.Module, batch: Batch) -> Tensor:
    """F = ½ mean (xw − y)²."""
    x, y = batch
    return 0.5 * (model(x) - y).square().mean()


def ridge(**changes: Any) -> hi.BilevelProblem:
    """The problem; keywords replace parts of it, such as ``training_loss`` or ``optimizer``."""
    settings = {
        "model": Weights(),
        "training_loss": training_loss,
        "validation_loss": validation_loss,
        "training_data": [TRAINING],
        "validation_data": [VALIDATION],
        "optimizer": lambda params: torch.optim.SGD(params, lr=0.5),
        **changes,
    }
    return hi.BilevelProblem(**settings)


def minimum(decay: float) -> Tensor:
    """w*(decay), in closed form."""
    x, y = TRAINING
    return torch.linalg.solve(x.T @ x / len(y) + decay * torch.eye(3, dtype=x.dtype), x.T @ y / len(y))


def loss_at(decay: float) -> float:
    """F(w*(decay))."""
    x, y = VALIDATION
    return float(0.5 * (x @ minimum(decay) - y).square().mean())


def best_decay() -> float:
    """argmin F(w*(decay)), by golden section on the closed form."""
    low, high, ratio = 1e-3, 10.0, (5**0.5 - 1) / 2
    while high - low > 1e-10:
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if loss_at(a) < loss_at(b) else (a, high)
    return low
