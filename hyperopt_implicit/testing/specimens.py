"""Small problems in float64 with known answers: what the conformance suite and the tests are run on.

Nothing here moves torch's global random state, and all models start from the same weights every time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from hyperopt_implicit.hyperparameters import hyperparameter
from hyperopt_implicit.problem import BilevelProblem
from hyperopt_implicit.vectors import Params

Batch = tuple[Tensor, Tensor]
Loss = Callable[..., Tensor]
OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def gradient_descent(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Plain SGD; the suite sets its learning rate."""
    return torch.optim.SGD(params, lr=0.1)


class Linear(nn.Module):
    """x ↦ x·w from zero, with room for more parameters; draws nothing."""

    def __init__(self, features: int, **more: nn.Parameter) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(features, dtype=torch.float64))
        for name, parameter in more.items():
            self.register_parameter(name, parameter)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Twice(nn.Module):
    """x ↦ 2x·w, through one weight that two submodules share."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.first, self.second = Linear(features), Linear(features)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.first(x), self.second(x))


def regression_data(seed: int, rows: int = 20, features: int = 4) -> Batch:
    """x [rows, features] and a noisy linear target y [rows], in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    noise = torch.randn(rows, generator=generator, dtype=torch.float64)
    return x, x @ torch.linspace(-1.0, 1.0, features, dtype=torch.float64) + 0.5 * noise + 0.3


TRAINING, VALIDATION = regression_data(0), regression_data(1)
"""The data of most tests."""


def ridge_problem(
    model: nn.Module | None = None,
    *,
    decay: float | Tensor = 0.3,
    scale: float = 1.0,
    validation_loss: Loss | None = None,
    extra: Callable[[Any], Tensor] | None = None,
    also: Callable[[Loss], Loss] | None = None,
    optimizer: OptimizerFactory = gradient_descent,
) -> BilevelProblem:
    """L = scale·(½ mean (f(x) − y)² + ½ Σ (decay + second)·w²) + extra, and F = ½ mean (f(x) − y)².

    ``decay`` is positive and of any shape. ``also`` declares a further hyperparameter: ``second``, ``unused`` or an
    option of the inner optimizer.
    """

    @hyperparameter("decay", init=decay, constraint=constraints.positive)
    def training_loss(
        model: nn.Module, batch: Batch, *, decay: Tensor, second: float | Tensor = 0.0, unused: float | Tensor = 0.0
    ) -> Tensor:
        weight = next(model.parameters())
        loss = scale * (half_mean_square(model, batch) + 0.5 * ((decay + second) * weight.square()).sum())
        return loss if extra is None else loss + extra(model)  # nosec B610 # a term of a loss

    return BilevelProblem(
        Linear(4) if model is None else model,
        training_loss if also is None else also(training_loss),
        half_mean_square if validation_loss is None else validation_loss,
        optimizer=optimizer,
    )


def half_mean_square(model: nn.Module, batch: Batch) -> Tensor:
    """½ mean (f(x) − y)²."""
    x, y = batch
    prediction: Tensor = model(x)
    return 0.5 * (prediction.reshape(y.shape) - y).square().mean()


def ridge_truth(
    problem: BilevelProblem,
    training: Batch,
    validation: Batch,
    *,
    factor: float = 1.0,
    outer: Callable[[Tensor, Tensor, Batch], Tensor] | None = None,
) -> Params:
    """dF(w*(λ), λ)/dλ of :func:`ridge_problem` by differentiating w* = (XᵀX/n + diag(decay))⁻¹ Xᵀy/n itself.

    The prediction is ``factor``·x·w; ``outer`` is F as a function of (w, decay, validation batch).
    """
    decay = problem.hyperparameters()["decay"]
    assert isinstance(decay, Tensor)
    x, y = factor * training[0], training[1]
    normal = x.T @ x / len(y) + torch.diag(decay.expand(x.shape[1]))
    w = torch.linalg.solve(normal, x.T @ y / len(y))
    if outer is None:
        loss = 0.5 * (factor * validation[0] @ w - validation[1]).square().mean()
    else:
        loss = outer(w, decay, validation)
    names, values = list(problem.hparams), list(problem.hparams.values())
    grads = torch.autograd.grad(loss, values, allow_unused=True, materialize_grads=True)
    return dict(zip(names, grads, strict=True))


def logistic_problem(decay: float = 0.1) -> BilevelProblem:
    """Logistic regression with labels ±1, a decay, and a margin: a hyperparameter inside the logarithm."""

    @hyperparameter("margin", init=0.1)
    @hyperparameter("decay", init=decay, constraint=constraints.positive)
    def training_loss(model: nn.Module, batch: Batch, *, decay: Tensor, margin: Tensor) -> Tensor:
        x, y = batch
        penalty = 0.5 * decay * next(model.parameters()).square().sum()
        return torch.log1p(torch.exp(margin - y * model(x))).mean() + penalty

    def validation_loss(model: nn.Module, batch: Batch) -> Tensor:
        x, y = batch
        return torch.log1p(torch.exp(-y * model(x))).mean()

    return BilevelProblem(Linear(4), training_loss, validation_loss, optimizer=gradient_descent)


def network_problem(model: nn.Module, *, decay: float = 0.1) -> BilevelProblem:
    """Mean squared error of a network, a decay towards its first weights, and a weight for the first half of the rows.

    Batch normalisation makes layers before it indifferent to their scale; a decay towards zero would then have no good
    minimum.
    """
    start = [p.detach().clone() for p in model.parameters()]

    @hyperparameter("first", init=1.0, constraint=constraints.positive)
    @hyperparameter("decay", init=decay, constraint=constraints.positive)
    def training_loss(model: nn.Module, batch: Batch, *, decay: Tensor, first: Tensor) -> Tensor:
        x, y = batch
        prediction: Tensor = model(x)
        squares = (prediction.reshape(y.shape) - y).square()
        half = len(y) // 2
        penalty = torch.stack([(p - p0).square().sum() for p, p0 in zip(model.parameters(), start, strict=True)]).sum()
        return (first * squares[:half].sum() + squares[half:].sum()) / len(y) + 0.5 * decay * penalty

    return BilevelProblem(model, training_loss, half_mean_square, optimizer=gradient_descent)


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A module in float64 whose initial weights come from a seed; the global random state stays where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().double()


def quadratic_problem(hessian: Tensor, *, offset: Tensor | None = None) -> BilevelProblem:
    """L = ½ wᵀHw − (b + shift)ᵀw with w at its stationary point, and F = ½‖w − 1‖².

    ``shift`` is the hyperparameter, one number for each weight, and b is ``offset``, by default of ones.
    """
    size = len(hessian)
    b = torch.ones(size, dtype=torch.float64) if offset is None else offset

    @hyperparameter("shift", init=torch.zeros(size))
    def training_loss(model: Linear, batch: None, *, shift: Tensor) -> Tensor:
        w = model.weight
        return 0.5 * w @ hessian @ w - (b + shift) @ w

    def validation_loss(model: Linear, batch: None) -> Tensor:
        return 0.5 * (model.weight - 1.0).square().sum()

    model = Linear(size)
    model.weight.data.copy_(torch.linalg.pinv(hessian) @ b)
    return BilevelProblem(model, training_loss, validation_loss, optimizer=gradient_descent)
