"""Every kind of hyperparameter with every backend: the hypergradient is right, or the backend refuses it by name.

A row of KINDS is a small problem, one of ``cases.CASES`` a backend. Backends of the solution are compared at the
minimum with the implicit function theorem solved densely, those of the trajectory through eight steps with one long
graph, or with finite differences of training by torch.optim itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints

import hyperopt_implicit as hi
from hyperopt_implicit.operators import validation_gradients
from hyperopt_implicit.testing.comparison import Comparison
from hyperopt_implicit.testing.oracles import (
    finite_differences,
    flatten,
    implicit_hypergradient,
    train_to_minimum,
    unrolled_hypergradient,
)
from hyperopt_implicit.testing.specimens import Linear, half_mean_square, regression_data, seeded
from hyperopt_implicit.vectors import Params, norm

from .cases import CASES, Case

TRAINING, VALIDATION = regression_data(0, rows=12), regression_data(1, rows=12)
STEPS, LR, DECAY = 8, 0.1, 0.3


@dataclass(frozen=True)
class Kind:
    """A kind of hyperparameter, in one small problem.

    Attributes:
        build: makes the problem.
        optimizer: whether it belongs to the inner optimizer, so that backends of the solution must refuse it.
        vanishes: whether the minimum does not depend on it, so that its hypergradient there is zero.
        cosines: bounds for backends that are biased by design, where they are below the one of the backend's row.
    """

    build: Callable[[], hi.BilevelProblem]
    optimizer: bool = False
    vanishes: bool = False
    cosines: dict[str, float] = field(default_factory=dict)


def squares(prediction: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (prediction - y).square()


def decay(model: nn.Module) -> Tensor:
    return 0.5 * DECAY * sum(p.square().sum() for p in model.parameters())


def sgd(**options: float) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    return lambda params: torch.optim.SGD(params, lr=LR, **options)


def problem_of(training_loss, model=None, validation_loss=half_mean_square, optimizer=None) -> hi.BilevelProblem:
    return hi.BilevelProblem(
        Linear(4) if model is None else model, training_loss, validation_loss, optimizer=optimizer or sgd()
    )


# ----------------------------------------------------------------------------------------------- in the training loss


def decay_per_parameter() -> hi.BilevelProblem:
    @hi.hyperparameter("decay", init=lambda model: torch.full_like(model.weight, 0.5), constraint=constraints.positive)
    def training_loss(model, batch, *, decay):
        x, y = batch
        return nn.functional.softplus(-y.sign() * model(x)).mean() + 0.5 * (decay * model.weight.square()).sum()

    return problem_of(training_loss)


def weight_per_sample() -> hi.BilevelProblem:
    @hi.hyperparameter("weights", init=torch.linspace(0.5, 1.5, 12), constraint=constraints.positive)
    def training_loss(model, batch, *, weights):
        x, y = batch
        return (weights * squares(model(x), y)).mean() + decay(model)

    return problem_of(training_loss)


def auxiliary_losses(constraint, init: Tensor) -> hi.BilevelProblem:
    """A main loss, and two of other targets that the same prediction is held against."""

    @hi.hyperparameter("shares", init=init, constraint=constraint)
    def training_loss(model, batch, *, shares):
        x, y = batch
        losses = [squares(model(x), target).mean() for target in (y, y.sign(), x.sum(dim=1))]
        return shares @ torch.stack(losses) + decay(model)

    return problem_of(training_loss)


def distilled_data() -> hi.BilevelProblem:
    @hi.hyperparameter("points", init=TRAINING[0][:6])
    def training_loss(model, batch, *, points):
        return squares(model(points), TRAINING[1][:6]).mean() + decay(model)

    return problem_of(training_loss)


def learned_augmentation() -> hi.BilevelProblem:
    @hi.hyperparameter("shift", init=torch.zeros(4))
    @hi.hyperparameter("scale", init=torch.ones(4), constraint=constraints.positive)
    def training_loss(model, batch, *, scale, shift):
        x, y = batch
        moved = squares(model(scale * x + shift), y)
        return 0.5 * (squares(model(x), y) + moved).mean() + decay(model)

    return problem_of(training_loss)


def architecture() -> hi.BilevelProblem:
    """A softmax over three operations, as in DARTS; the choice stands in both losses."""

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.operations = nn.ModuleList([Linear(4), Linear(4), Linear(4)])

        def forward(self, x: Tensor, choice: Tensor) -> Tensor:
            inputs = (x, x.tanh(), x.square())
            return choice.softmax(dim=0) @ torch.stack([f(z) for f, z in zip(self.operations, inputs, strict=True)])

    @hi.hyperparameter("choice", init=torch.tensor([0.3, -0.3, 0.1]))
    def training_loss(model, batch, *, choice):
        x, y = batch
        return squares(model(x, choice), y).mean() + decay(model)

    def validation_loss(model, batch, *, choice):
        x, y = batch
        return squares(model(x, choice), y).mean()

    return problem_of(training_loss, Mixture(), validation_loss)


def module() -> hi.BilevelProblem:
    """A network that weights the samples."""

    @hi.hyperparameter("net", init=seeded(lambda: nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 1))))
    def training_loss(model, batch, *, net):
        x, y = batch
        return (2.0 * net(x)[:, 0].sigmoid() * squares(model(x), y)).mean() + decay(model)

    return problem_of(training_loss)


# --------------------------------------------------------------------------------------------------- where one begins


def beginning(strength: float) -> hi.BilevelProblem:
    """The weights are start + δ, and δ is trained from zero; with a decay of δ towards zero as in iMAML, or without."""

    @hi.hyperparameter("start", init=torch.tensor([0.5, -0.5, 0.2, 0.1]))
    def training_loss(model, batch, *, start):
        x, y = batch
        tie = 0.5 * strength * model.weight.square().sum()
        return squares(model(x) + x @ start, y).mean() + tie

    def validation_loss(model, batch, *, start):
        x, y = batch
        return squares(model(x) + x @ start, y).mean()

    return problem_of(training_loss, validation_loss=validation_loss)


# ------------------------------------------------------------------------------------------------- the inner optimizer


def option(name: str, init, constraint, **options: float) -> hi.BilevelProblem:
    @hi.hyperparameter(name, init=init, constraint=constraint, target="optimizer")
    def training_loss(model, batch):
        return half_mean_square(model, batch) + decay(model)

    return problem_of(training_loss, optimizer=sgd(**options))


def bounds(one_step: float, bome: float) -> dict[str, float]:
    """Cosines that biased methods keep to: bome, and the three others, which agree at a minimum to rounding."""
    return {"finite_difference": one_step, "sama": one_step, "identity": one_step, "bome": bome}


# a hyperparameter that pulls the weights in many directions is where H⁻¹ replaced by a multiple of I shows most
KINDS = {
    "decay per parameter": Kind(decay_per_parameter),
    "weight per sample": Kind(weight_per_sample, cosines=bounds(0.92, 0.95)),  # measured 0.9288, 0.9586
    "auxiliary losses, simplex": Kind(lambda: auxiliary_losses(constraints.simplex, torch.tensor([0.5, 0.3, 0.2]))),
    "auxiliary losses, positive": Kind(lambda: auxiliary_losses(constraints.positive, torch.tensor([1.0, 0.5, 0.5]))),
    "distilled data": Kind(distilled_data, cosines=bounds(0.80, 0.85)),  # measured 0.8068, 0.8535
    "learned augmentation": Kind(learned_augmentation, cosines=bounds(0.94, 0.97)),  # measured 0.9462, 0.9742
    "architecture": Kind(architecture),
    "module": Kind(module, cosines=bounds(0.89, 0.92)),  # measured 0.8988, 0.9273
    "initialisation": Kind(lambda: beginning(0.0), vanishes=True),
    "proximal initialisation": Kind(lambda: beginning(1.0), cosines={"identity": 0.98}),  # measured 0.9861
    "learning rate": Kind(lambda: option("lr", 0.1, constraints.positive), optimizer=True),
    "schedule": Kind(lambda: option("lr", torch.linspace(0.2, 0.05, STEPS), constraints.positive), optimizer=True),
    "momentum": Kind(lambda: option("momentum", 0.5, constraints.unit_interval, momentum=0.5), optimizer=True),
}

PAIRS = [
    pytest.param(case, kind, id=f"{case.name}-{name}")
    for name, kind in KINDS.items()
    for case in CASES
    if not (kind.vanishes and case.cosine is not None)  # zero has no direction to compare a biased method with
]


@pytest.mark.parametrize(("case", "kind"), PAIRS)
def test_kind(case: Case, kind: Kind):
    comparison = Comparison()
    comparison.backend, comparison.accuracy, comparison.calls = case.backend, case.accuracy, case.calls
    comparison.cosine, comparison.prepare = case.cosine, case.prepare
    problem = kind.build()
    if comparison.through_training:
        check_through_training(comparison, problem, differenced=kind.optimizer)
    elif kind.optimizer:
        check_refusal(case, problem)
    else:
        check_at_minimum(comparison, problem, kind, kind.cosines.get(case.name))


def check_through_training(comparison: Comparison, problem: hi.BilevelProblem, *, differenced: bool) -> None:
    batches = [TRAINING] * STEPS
    expected = differences_of_training(problem) if differenced else unrolled_hypergradient(problem, batches, VALIDATION)
    assert norm(expected) > 1e-3
    result = comparison.compute(problem, batches, VALIDATION)
    comparison.agree(result.gradients, expected, least=1e-7 if differenced else 0.0)
    assert not result.status.failed


def check_refusal(case: Case, problem: hi.BilevelProblem) -> None:
    (name,) = problem.hyperparameters.names("optimizer")
    case.prepare(problem, [TRAINING], VALIDATION)
    with pytest.raises(hi.BackendError, match=f"{name!r} is a hyperparameter of the inner optimizer"):
        case.backend.check(problem)


def check_at_minimum(comparison: Comparison, problem: hi.BilevelProblem, kind: Kind, bound: float | None) -> None:
    assert train_to_minimum(problem, [TRAINING]) < 1e-11
    result = comparison.compute(problem, [TRAINING], VALIDATION)
    assert not result.status.failed
    if kind.vanishes:
        _, _, direct = validation_gradients(problem, VALIDATION)
        assert norm(result.gradients) <= comparison.accuracy * norm(direct)
        return
    expected = implicit_hypergradient(problem, [TRAINING], VALIDATION)
    assert norm(expected) > 1e-3
    if bound is not None:
        assert comparison.cosine is not None and 0.0 <= bound < comparison.cosine
        comparison.cosine = bound
    comparison.agree(result.gradients, expected)


def differences_of_training(problem: hi.BilevelProblem) -> Params:
    """dF/dλ for an option of the optimizer, by finite differences of torch.optim.SGD, schedules followed by hand."""
    (name,) = problem.hyperparameters.names("optimizer")
    start = flatten(problem.params).clone()

    def value() -> float:
        values = problem.hyperparameters.values()[name].reshape(-1).tolist()
        model = Linear(4)
        model.weight.data.copy_(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        for t in range(STEPS):
            optimizer.param_groups[0][name] = values[min(t, len(values) - 1)]
            optimizer.zero_grad()
            (half_mean_square(model, TRAINING) + decay(model)).backward()
            optimizer.step()
        return half_mean_square(model, VALIDATION).item()

    return finite_differences(value, problem.hparams)
