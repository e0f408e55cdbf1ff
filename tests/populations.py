"""Members of populations in float64, and the comparison of what they come to together with what they come to alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import constraints

import hyperopt_implicit as hi

Batch = tuple[Tensor, Tensor]
Problem = Callable[[int], hi.BilevelProblem]

_generator = torch.Generator().manual_seed(3)


def _sample(rows: int) -> Batch:
    x = torch.randn(rows, 6, generator=_generator, dtype=torch.float64)
    return x, (x[:, :3] + 0.5 * torch.randn(rows, 3, generator=_generator, dtype=torch.float64)).argmax(1)


TRAINING: list[Batch] = [_sample(16) for _ in range(3)]
VALIDATION: list[Batch] = [_sample(24)]


@hi.hyperparameter("decay", init=torch.full((2,), 1e-2), constraint=constraints.positive)
def training_loss(model: nn.Module, batch: Batch, *, decay: Tensor) -> Tensor:
    """Cross-entropy with a decay for each layer."""
    x, y = batch
    weights = [p for p in model.parameters() if p.dim() == 2]
    return F.cross_entropy(model(x), y) + sum(d * w.square().sum() for d, w in zip(decay, weights, strict=True))


def validation_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy."""
    x, y = batch
    return F.cross_entropy(model(x), y)


def descent(params: list[nn.Parameter], i: int) -> torch.optim.Optimizer:
    """SGD whose learning rate is the member's own."""
    return torch.optim.SGD(params, lr=0.1 + 0.02 * i, momentum=0.5)


def perceptron(width: int = 5, *middle: nn.Module) -> nn.Module:
    """Two layers in float64, with others in between."""
    return nn.Sequential(nn.Linear(6, width), *middle, nn.Tanh(), nn.Linear(width, 3)).double()


def member(
    i: int,
    *,
    model: Callable[[], nn.Module] = perceptron,
    optimizer: Callable[[list[nn.Parameter], int], torch.optim.Optimizer] = descent,
    **changes: Any,
) -> hi.BilevelProblem:
    """The i-th member: weights from its own seed, its own learning rate, the same data; keywords replace parts."""
    torch.manual_seed(i)
    settings: dict[str, Any] = {
        "training_loss": training_loss,
        "validation_loss": validation_loss,
        "training_data": TRAINING,
        "validation_data": VALIDATION,
        **changes,
    }
    return hi.BilevelProblem(model(), optimizer=lambda params: optimizer(params, i), **settings)


def together_and_alone(
    make: Problem,
    backend: Any = "neumann",
    count: int = 3,
    *,
    callbacks: Callable[[int], list[Any]] = lambda i: [],
    vectorise: Any = "always",
    seeds: Sequence[int | None] | None = None,
    **options: Any,
) -> tuple[hi.Population, list[hi.Result]]:
    """The same members as a population, and by ``optimize`` one by one."""
    options = {"outer_steps": 5, "inner_steps": 4, "outer_lr": 0.05, "keep_best_model": True, **options}
    seeds = list(range(count)) if seeds is None else seeds
    alone = [
        hi.optimize(make(i), backend, seed=seeds[i], callbacks=callbacks(i), tracking=False, progress=False, **options)
        for i in range(count)
    ]
    population = hi.optimize_population(
        [make(i) for i in range(count)],
        backend,
        seeds=seeds,
        callbacks=[callbacks(i) for i in range(count)],
        vectorise=vectorise,
        **options,
    )
    return population, alone


def assert_same(population: hi.Population, alone: Sequence[hi.Result], rtol: float = 1e-9) -> None:
    """Every member has come to the same as alone: weights, hyperparameters, records, best values, why it stopped."""
    assert len(population.outcomes) == len(alone)
    for ours, theirs in zip(population.outcomes, alone, strict=True):
        assert isinstance(ours, hi.Result), ours
        for x, y in (
            (ours.problem.model.state_dict(), theirs.problem.model.state_dict()),
            (ours.problem.hyperparameters.state_dict(), theirs.problem.hyperparameters.state_dict()),
            (ours.best_model_state or {}, theirs.best_model_state or {}),
        ):
            assert list(x) == list(y)
            for name in x:
                torch.testing.assert_close(x[name], y[name], rtol=rtol, atol=rtol, msg=lambda m, n=name: f"{n}: {m}")
        assert (ours.best_step, ours.stop_reason, ours.failed_steps) == (
            theirs.best_step,
            theirs.stop_reason,
            theirs.failed_steps,
        )
        torch.testing.assert_close(ours.best_validation_loss, theirs.best_validation_loss, rtol=rtol, atol=rtol)
        assert len(ours.history) == len(theirs.history)
        for a, b in zip(ours.history, theirs.history, strict=True):
            assert (a.step, a.status, a.iterations, a.hvps, a.applied, a.failed_inner_steps) == (
                b.step,
                b.status,
                b.iterations,
                b.hvps,
                b.applied,
                b.failed_inner_steps,
            )
            for key in ("training_loss", "validation_loss", "validation_loss_sweep", "hypergradient_norm"):
                torch.testing.assert_close(getattr(a, key), getattr(b, key), rtol=rtol, atol=rtol, equal_nan=True)
            if b.residual is None:
                assert a.residual is None
            else:
                torch.testing.assert_close(a.residual, b.residual, rtol=1e-6, atol=1e-8)
            assert list(a.hyperparameters) == list(b.hyperparameters)
            for key, value in b.hyperparameters.items():
                torch.testing.assert_close(a.hyperparameters[key], value, rtol=rtol, atol=rtol)
