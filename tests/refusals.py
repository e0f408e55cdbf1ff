"""What the tests of bad input share: a problem that is sound but for one thing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints

import hyperopt_implicit as hi

Loss = Callable[..., Tensor]


@hi.hyperparameter("decay", init=0.1, constraint=constraints.positive)
def good(model: nn.Module, batch: Tensor, *, decay: Tensor) -> Tensor:
    return model(batch).square().mean() + decay * sum(p.square().sum() for p in model.parameters())


def plain(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - 1.0).square().mean()


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def build(model: nn.Module, training: Loss = good, validation: Loss = plain, **changes: Any) -> hi.BilevelProblem:
    batch = torch.tensor([[1.0, 2.0], [3.0, -4.0], [0.5, 0.0]])
    settings = {"training_data": [batch], "validation_data": [batch], "optimizer": sgd, **changes}
    return hi.BilevelProblem(model, training, validation, **settings)


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)
