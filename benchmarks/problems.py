"""The problems that the benchmarks share, each as plain PyTorch and as a ``BilevelProblem`` over the same tensors.

P1 logistic regression with a decay per feature, P2 a multilayer perceptron with a decay per layer, P3 a small
convolutional network with auxiliary loss weights, P4 data cleaning: logistic regression with a weight per sample. Data
is generated: what is measured here is cost, and it does not depend on what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import constraints

import hyperopt_implicit as hi

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """A problem in both forms.

    Attributes:
        name: as in the tables.
        make: builds a fresh ``BilevelProblem``.
        training_loss: the loss itself, taking ``(model, batch, **hyperparameters)``.
        validation_loss: taking ``(model, batch)``.
        training_batch: one batch.
        validation_batch: another.
        constrain: maps the unconstrained values of the hyperparameters, by name, as the problem's declarations do.
        damping: what makes the Hessian positive definite, so that conjugate gradients take all their iterations.
    """

    name: str
    make: Callable[[], hi.BilevelProblem]
    training_loss: Loss
    validation_loss: Loss
    training_batch: Any
    validation_batch: Any
    constrain: dict[str, Callable[[Tensor], Tensor]]
    damping: float


def _cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


def _labelled(count: int, shape: tuple[int, ...], classes: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *shape, generator=generator)
    scores = x.flatten(1) @ torch.randn(x[0].numel(), classes, generator=generator)
    return x, scores.argmax(1)


def _case(
    name: str,
    model: Callable[[], nn.Module],
    training_loss: Loss,
    training_batch: Any,
    validation_batch: Any,
    constrain: dict[str, Callable[[Tensor], Tensor]],
    lr: float,
    damping: float = 0.0,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
) -> Case:
    def make() -> hi.BilevelProblem:
        torch.manual_seed(0)
        return hi.BilevelProblem(
            model(),
            training_loss,
            _cross_entropy,
            training_data=[training_batch],
            validation_data=[validation_batch],
            optimizer=optimizer or (lambda params: torch.optim.SGD(params, lr=lr, momentum=0.9)),
        )

    return Case(name, make, training_loss, _cross_entropy, training_batch, validation_batch, constrain, damping)


def logistic_regression() -> Case:
    @hi.hyperparameter("decay", init=torch.full((200,), 1e-2), constraint=constraints.positive)
    def training_loss(model: nn.Module, batch: tuple[Tensor, Tensor], *, decay: Tensor) -> Tensor:
        return _cross_entropy(model, batch) + (decay * model.weight.square()).sum()

    return _case(
        "P1 logistic regression, 5000×200, a decay per feature",
        lambda: nn.Linear(200, 2),
        training_loss,
        _labelled(5000, (200,), 2, seed=1),
        _labelled(1000, (200,), 2, seed=2),
        {"decay": torch.exp},
        lr=0.1,
    )


def _decayed_layers(init: Tensor) -> Loss:
    """Cross-entropy with a decay for each layer."""

    @hi.hyperparameter("decay", init=init, constraint=constraints.positive)
    def training_loss(model: nn.Module, batch: tuple[Tensor, Tensor], *, decay: Tensor) -> Tensor:
        weights = [p for p in model.parameters() if p.dim() == 2]
        return _cross_entropy(model, batch) + sum(d * w.square().sum() for d, w in zip(decay, weights, strict=True))

    return training_loss


def perceptron() -> Case:
    return _case(
        "P2 perceptron 784-256-256-10, batch 256, a decay per layer",
        lambda: nn.Sequential(nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 10)),
        _decayed_layers(torch.full((3,), 3e-2)),
        _labelled(256, (784,), 10, seed=1),
        _labelled(256, (784,), 10, seed=2),
        {"decay": torch.exp},
        lr=0.05,
        damping=0.2,
    )


class _ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.Softplus(), nn.AvgPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.Softplus(), nn.AvgPool2d(2), nn.Flatten(),
        )  # fmt: skip
        self.heads = nn.ModuleList(nn.Linear(32 * 64, 10) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[0](self.trunk(x))


def convolutional() -> Case:
    @hi.hyperparameter("task_weights", init=torch.ones(2), constraint=constraints.positive)
    def training_loss(model: nn.Module, batch: tuple[Tensor, Tensor], *, task_weights: Tensor) -> Tensor:
        x, y = batch
        features = model.trunk(x)
        main, *auxiliary = [F.cross_entropy(head(features), (y + i) % 10) for i, head in enumerate(model.heads)]
        decay = 1e-3 * sum(p.square().sum() for p in model.parameters())
        return main + (task_weights * torch.stack(auxiliary)).sum() + decay

    return _case(
        "P3 convolutional, 3×32×32, batch 64, auxiliary loss weights",
        _ConvNet,
        training_loss,
        _labelled(64, (3, 32, 32), 10, seed=1),
        _labelled(64, (3, 32, 32), 10, seed=2),
        {"task_weights": torch.exp},
        lr=0.02,
        damping=0.2,
    )


def data_cleaning() -> Case:
    @hi.hyperparameter("sample_weights", init=torch.full((5000,), 0.5), constraint=constraints.unit_interval)
    def training_loss(model: nn.Module, batch: tuple[Tensor, Tensor], *, sample_weights: Tensor) -> Tensor:
        x, y = batch
        losses = F.cross_entropy(model(x), y, reduction="none")
        return (sample_weights * losses).mean() + 1e-2 * model.weight.square().sum()

    return _case(
        "P4 data cleaning, 5000×784, a weight per sample",
        lambda: nn.Linear(784, 10),
        training_loss,
        _labelled(5000, (784,), 10, seed=1),
        _labelled(1000, (784,), 10, seed=2),
        {"sample_weights": torch.sigmoid},
        lr=0.1,
    )


def ill_conditioned() -> Case:
    """P4 on features of scales from 1 to 1/30, with a tenth of its decay, trained by Adam."""

    @hi.hyperparameter("sample_weights", init=torch.full((5000,), 0.5), constraint=constraints.unit_interval)
    def training_loss(model: nn.Module, batch: tuple[Tensor, Tensor], *, sample_weights: Tensor) -> Tensor:
        x, y = batch
        losses = F.cross_entropy(model(x), y, reduction="none")
        return (sample_weights * losses).mean() + 1e-3 * model.weight.square().sum()

    scales = torch.logspace(0, -1.5, 784)
    (x, y), (held_out, labels) = _labelled(5000, (784,), 10, seed=1), _labelled(1000, (784,), 10, seed=2)
    return _case(
        "P5 data cleaning, features of unequal scale, Adam",
        lambda: nn.Linear(784, 10),
        training_loss,
        (x * scales, y),
        (held_out * scales, labels),
        {"sample_weights": torch.sigmoid},
        lr=0.0,
        optimizer=lambda params: torch.optim.Adam(params, lr=3e-3),
    )


def indefinite() -> Case:
    """A perceptron that is trained for a short time with next to no decay: its Hessian has negative eigenvalues."""

    return _case(
        "P6 perceptron 100-64-10, hardly any decay, indefinite",
        lambda: nn.Sequential(nn.Linear(100, 64), nn.Tanh(), nn.Linear(64, 10)),
        _decayed_layers(torch.full((2,), 1e-3)),
        _labelled(1000, (100,), 10, seed=1),
        _labelled(1000, (100,), 10, seed=2),
        {"decay": torch.exp},
        lr=0.05,
    )


ALL = (logistic_regression, perceptron, convolutional, data_cleaning)
