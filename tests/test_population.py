"""Populations come to what their members come to alone: every optimizer, backend, option and kind of hyperparameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import constraints
from torch.utils.data import DataLoader, TensorDataset

import hyperopt_implicit as hi

from .populations import (
    TRAINING,
    VALIDATION,
    Batch,
    assert_same,
    member,
    perceptron,
    together_and_alone,
    validation_loss,
)
from .ridge import best_decay, ridge

# what members are warned of is what they are warned of alone; here it is whether they come to the same
pytestmark = pytest.mark.filterwarnings("ignore::hyperopt_implicit.HyperoptWarning")

OPTIMIZERS: dict[str, Callable[[Any, int], torch.optim.Optimizer]] = {
    "SGD": lambda params, i: torch.optim.SGD(params, lr=0.1 + 0.05 * i),
    "momentum, dampening and decay of their own": lambda params, i: torch.optim.SGD(
        params, lr=0.1, momentum=0.9 - 0.2 * i, dampening=0.1 * i, weight_decay=0.01 * i
    ),
    "Nesterov": lambda params, i: torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "Adam": lambda params, i: torch.optim.Adam(
        params, lr=0.01 + 0.01 * i, betas=(0.9 - 0.1 * i, 0.99), eps=1e-6, weight_decay=0.01
    ),
    "AdamW": lambda params, i: torch.optim.AdamW(params, lr=0.02, weight_decay=0.1 * i),
    "RMSprop, each by its own": lambda params, i: torch.optim.RMSprop(params, lr=0.01 + 0.01 * i),
    "AMSGrad, each by its own": lambda params, i: torch.optim.Adam(params, lr=0.01 + 0.01 * i, amsgrad=True),
}

BACKENDS: dict[str, Any] = {
    "neumann": "neumann",
    "neumann, short": {"name": "neumann", "terms": 3, "measure_residual": False, "damping": 0.3},
    "neumann, step too long": {"name": "neumann", "step_size": 3.0},
    "neumann, to a tolerance": {"name": "neumann", "terms": 50, "tolerance": 0.3, "damping": 0.5},
    "cg": {"name": "cg", "damping": 0.5},
    "cg, cold": {"name": "cg", "damping": 0.5, "warm_start": False, "max_iterations": 3},
    "heavy_ball": {"name": "heavy_ball", "damping": 0.5},
    "heavy_ball, two steps, strict": {"name": "heavy_ball", "damping": 0.5, "products": 2, "tolerance": 1e-3},
    "identity": {"name": "identity", "measure_residual": True, "damping": 0.1},
    "identity, lr": {"name": "identity", "step_size": "lr"},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(name: str) -> None:
    population, alone = together_and_alone(
        lambda i: member(i, optimizer=OPTIMIZERS[name]), {"name": "cg", "damping": 0.5}
    )
    assert population.groups == [[0, 1, 2]]
    assert population.notes == []
    assert_same(population, alone)


def _own_rates(params: list[nn.Parameter], i: int) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05 + 0.05 * i, weight_decay=0.01 * i)


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_with_a_solver_for_many(name: str) -> None:
    population, alone = together_and_alone(lambda i: member(i, optimizer=_own_rates), BACKENDS[name], outer_steps=6)
    assert population.groups == [[0, 1, 2]]
    assert_same(population, alone)


@pytest.mark.parametrize("backend", ["neumann", "cg", "heavy_ball"])
def test_members_meet_negative_curvature_each_by_itself(backend: str) -> None:
    """Without damping, and at weights that are no minimum, solvers end early, some members here and others there."""
    population, alone = together_and_alone(lambda i: member(i), backend, count=4, outer_steps=4)
    met = {(len(each.history), step.status, step.iterations) for each in alone for step in each.history}
    assert len(met) > 1
    assert_same(population, alone, rtol=1e-6)


@hi.hyperparameter("network", init=lambda model: nn.Linear(3, 1))
@hi.hyperparameter("mixture", init=torch.tensor([0.3, 0.7]), constraint=constraints.simplex)
@hi.hyperparameter("rate", init=0.2, constraint=constraints.interval(0.0, 1.0))
def _many_kinds(model: nn.Module, batch: Batch, *, network: nn.Module, mixture: Tensor, rate: Tensor) -> Tensor:
    x, y = batch
    out = model(x)
    weights = torch.sigmoid(network(out.detach())).squeeze(1)
    loss = (weights * F.cross_entropy(out, y, reduction="none")).mean()
    return mixture[0] * loss + mixture[1] * rate * out.square().mean()


@hi.hyperparameter("scale", init=1.2)
def _scaled(model: nn.Module, batch: Batch, *, scale: Tensor) -> Tensor:
    x, y = batch
    return F.cross_entropy(scale * model(x), y) + 0.1 * (scale - 1.0) ** 2


def test_networks_constraints_and_hyperparameters_of_the_validation_loss() -> None:
    population, alone = together_and_alone(
        lambda i: member(i, training_loss=_many_kinds, validation_loss=_scaled),
        {"name": "neumann", "damping": 0.5},
        outer_optimizer=torch.optim.SGD,
    )
    assert population.groups == [[0, 1, 2]]
    assert_same(population, alone)


@pytest.mark.parametrize(
    "options",
    [
        {"warmup_steps": 7},
        {"restart": True},
        {"clip": 1e-2},
        {"hessian_batches": 2},
        {"inner_steps": 70, "outer_steps": 2},
        {"patience": 1, "outer_steps": 12, "outer_lr": 0.3},
        {"inner_scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)},
        {"outer_optimizer": torch.optim.RMSprop},
    ],
    ids=lambda options: ", ".join(options),
)
def test_options(options: dict[str, Any]) -> None:
    population, alone = together_and_alone(member, {"name": "cg", "damping": 0.5}, **options)
    assert population.groups == [[0, 1, 2]]
    assert_same(population, alone)


def test_shuffled_loaders_with_seeds() -> None:
    """Each member meets the batches that its seed gives it alone, a short last one among them."""
    x, y = (torch.cat(each) for each in zip(*TRAINING, strict=True))

    def make(i: int) -> hi.BilevelProblem:
        return member(i, training_data=DataLoader(TensorDataset(x, y), batch_size=20, shuffle=True))

    population, alone = together_and_alone(make, seeds=[5, 6, 5])
    assert population.groups == [[0, 1, 2]]
    assert alone[0].history[0].training_loss != alone[1].history[0].training_loss
    assert_same(population, alone)


def test_loaders_whose_passes_end_at_different_places() -> None:
    """Batches of one step differ in shape then: members that have the same are computed together."""
    x, y = (torch.cat(each) for each in zip(*TRAINING, strict=True))

    def make(i: int) -> hi.BilevelProblem:
        rows = 48 if i != 1 else 30
        return member(i, training_data=DataLoader(TensorDataset(x[:rows], y[:rows]), batch_size=20, shuffle=True))

    population, alone = together_and_alone(make, seeds=[5, 6, 7])
    assert population.groups == [[0, 1, 2]]
    assert_same(population, alone)


def test_batches_of_their_own() -> None:
    def make(i: int) -> hi.BilevelProblem:
        return member(i, training_data=[(x + 0.1 * i, y) for x, y in TRAINING])

    population, alone = together_and_alone(make)
    assert population.groups == [[0, 1, 2]]
    assert_same(population, alone)


def test_running_statistics_and_frozen_layers_of_their_own() -> None:
    def model() -> nn.Module:
        found = perceptron(5, nn.BatchNorm1d(5))
        found[0].requires_grad_(False)
        return found.double()

    @hi.hyperparameter("decay", init=1e-2, constraint=constraints.positive)
    def loss(model: nn.Module, batch: Batch, *, decay: Tensor) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(x), y) + decay * model[-1].weight.square().sum()

    def make(i: int) -> hi.BilevelProblem:
        torch.manual_seed(i)
        found = model()
        return hi.BilevelProblem(
            found,
            loss,
            validation_loss,
            training_data=TRAINING,
            validation_data=VALIDATION,
            optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        )

    def callbacks(i: int) -> list[Any]:
        return [lambda step, problem: (i, step.step) in ((1, 1), (2, 2))]  # so that one member is left at the end

    population, alone = together_and_alone(make, callbacks=callbacks)
    assert population.groups == [[0, 1, 2]]
    assert_same(population, alone)


# ---------------------------------------------------------------------------------------------------- leaving, failing


def test_a_member_leaves_by_a_callback() -> None:
    """The first one after two steps, the last one after three; what it left with stays as it is."""

    def callbacks(i: int) -> list[Any]:
        return [lambda step, problem: (i, step.step) in ((0, 1), (2, 2))]

    population, alone = together_and_alone(member, {"name": "cg", "damping": 0.5}, callbacks=callbacks)
    assert [len(each.history) for each in alone] == [2, 5, 3]
    assert_same(population, alone)
    for outcome in population.outcomes:
        assert isinstance(outcome, hi.Result)
        for p in outcome.problem.params.values():
            assert p.untyped_storage().nbytes() == p.numel() * 8


@pytest.mark.parametrize(
    "optimizer", ["SGD", "momentum, dampening and decay of their own", "Adam", "RMSprop, each by its own"]
)
@pytest.mark.parametrize("restart", [False, True])
def test_a_member_whose_loss_is_not_finite_for_a_while(optimizer: str, restart: bool) -> None:
    """A batch of one member holds a NaN: it leaves that step out, and the others do not notice."""

    def make(i: int) -> hi.BilevelProblem:
        data = [(x.clone(), y) for x, y in TRAINING]
        if i == 1:
            data[0][0][0, 0] = float("nan")
        problem = member(i, optimizer=OPTIMIZERS[optimizer])
        problem.training_data = data
        return problem

    options: dict[str, Any] = {"outer_steps": 4, "inner_steps": 4, "outer_lr": 0.05, "restart": restart}
    with pytest.raises(hi.LossError):
        hi.optimize(make(1), "cg", tracking=False, progress=False, **options)
    found = hi.optimize_population([make(i) for i in range(3)], {"name": "cg", "damping": 0.5}, **options)
    assert isinstance(found.outcomes[1], hi.LossError)  # found before training, as alone

    def later(i: int) -> hi.BilevelProblem:
        problem = make(i)
        data: Any = problem.training_data
        problem.training_data = [*data[1:], data[0]]  # the first batch, which is tried before training, is sound
        return problem

    population, alone = together_and_alone(later, {"name": "cg", "damping": 0.5}, **options)
    assert sum(step.failed_inner_steps for step in alone[1].history) > 0
    assert_same(population, alone)


def test_a_member_that_fails_ends_alone() -> None:
    """With ``on_failure="raise"``, a member's error is its outcome, and the others come to their own ends."""

    def make(i: int) -> hi.BilevelProblem:
        return ridge(optimizer=lambda params: torch.optim.SGD(params, lr=0.5 if i != 1 else 1e200))

    options: dict[str, Any] = {"outer_steps": 4, "inner_steps": 5, "on_failure": "raise"}
    with pytest.raises(hi.HypergradientError):
        hi.optimize(make(1), "cg", tracking=False, progress=False, **options)
    found = hi.optimize_population([make(i) for i in range(3)], "cg", **options)
    assert isinstance(found.outcomes[1], hi.HypergradientError)
    alone = [hi.optimize(make(i), "cg", tracking=False, progress=False, **options) for i in (0, 2)]
    assert_same(hi.Population([found.outcomes[0], found.outcomes[2]]), alone)


def test_the_best_decay_in_closed_form() -> None:
    """Ridge regression from three starts: every member finds the decay that the closed form names."""

    def make(i: int) -> hi.BilevelProblem:
        problem = ridge()
        problem.hyperparameters.load_values({"decay": torch.tensor([0.1, 0.3, 1.0][i], dtype=torch.float64)})
        return problem

    found = hi.optimize_population(
        [make(i) for i in range(3)], {"name": "cg", "tolerance": 1e-10}, outer_steps=300, inner_steps=20, outer_lr=0.05
    )
    for outcome in found.outcomes:
        assert isinstance(outcome, hi.Result)
        assert float(outcome.hyperparameters["decay"]) == pytest.approx(best_decay(), rel=2e-3)
    assert found.groups == [[0, 1, 2]]
