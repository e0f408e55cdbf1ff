"""Hyperparameters that are driven to the edge of their constraint: always inside, finite, and never there for good."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

import hyperopt_implicit as hi
from hyperopt_implicit.errors import HyperoptWarning
from hyperopt_implicit.hyperparameters import Declaration, Hyperparameters
from hyperopt_implicit.members import Members

EDGES: dict[str, tuple[Any, Constraint]] = {
    "real": (0.5, constraints.real),
    "positive": (0.5, constraints.positive),
    "nonnegative": (0.5, constraints.nonnegative),
    "greater_than": (2.0, constraints.greater_than(1.0)),
    "greater_than_eq": (2.0, constraints.greater_than_eq(1.0)),
    "less_than": (0.0, constraints.less_than(1.0)),
    "interval": (0.5, constraints.interval(-1.0, 3.0)),
    "unit_interval": (0.5, constraints.unit_interval),
    "half_open_interval": (0.5, constraints.half_open_interval(0.0, 1.0)),
    "simplex": (torch.tensor([0.2, 0.3, 0.5]), constraints.simplex),
    "lower_cholesky": (torch.eye(2), constraints.lower_cholesky),
    "positive_definite": (2.0 * torch.eye(2), constraints.positive_definite),
    "corr_cholesky": (torch.eye(3), constraints.corr_cholesky),
    "independent": (torch.full((2,), 0.5), constraints.independent(constraints.unit_interval, 1)),
}


def following(init: Any, constraint: Constraint, sign: dict[str, float]) -> hi.BilevelProblem:
    """w* = λ and F = ±⟨c, w⟩: the hypergradient pushes on without end, by weights that differ."""

    @hi.hyperparameter("value", init=init, constraint=constraint)
    def training_loss(model: nn.Module, batch: Any, *, value: Tensor) -> Tensor:
        return 0.5 * (model.bias - value.reshape(-1)).square().sum()  # type: ignore[operator]

    def validation_loss(model: nn.Module, batch: Any) -> Tensor:
        return sign["now"] * (model.bias * torch.linspace(1.0, 2.0, len(model.bias))).sum()  # type: ignore[arg-type]

    model = nn.Linear(1, torch.as_tensor(init).numel())
    return hi.BilevelProblem(
        model.double(),
        training_loss,
        validation_loss,
        training_data=[0],
        validation_data=[0],
        optimizer=lambda params: torch.optim.SGD(params, lr=1.0),
    )


@pytest.mark.filterwarnings("ignore::hyperopt_implicit.errors.HyperoptWarning")
@pytest.mark.parametrize("outer_optimizer", [torch.optim.SGD, torch.optim.Adam], ids=["sgd", "adam"])
@pytest.mark.parametrize("outer_lr", [3.0, 1e3, 1e300])
@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["down", "up"])
@pytest.mark.parametrize("name", EDGES)
def test_always_inside_and_never_stuck(name: str, sign: float, outer_lr: float, outer_optimizer: Any) -> None:
    """Pushed outwards for 30 steps, by however much; there is a gradient that leads back."""
    init, constraint = EDGES[name]
    signs = {"now": sign}
    problem = following(init, constraint, signs)
    options = {"inner_steps": 1, "tracking": False, "outer_optimizer": outer_optimizer}
    result = hi.optimize(problem, "exact", outer_steps=30, outer_lr=outer_lr, max_failures=100, **options)
    for each in result.history:
        assert all(map(math.isfinite, each.hyperparameters.values()))
    pushed = result.hyperparameters["value"]
    assert isinstance(pushed, Tensor)
    assert bool(constraint.check(pushed).all())
    assert problem.hyperparameters.is_inside()

    value = problem.hyperparameters()["value"]
    assert isinstance(value, Tensor)
    weights = torch.linspace(1.0, 2.0, value.numel(), dtype=value.dtype).reshape(value.shape)
    (back,) = torch.autograd.grad((value * weights).sum(), problem.hparams["value"])
    assert bool(back.isfinite().all())
    assert bool((back.diagonal() if back.dim() == 2 and name != "corr_cholesky" else back).count_nonzero())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", EDGES)
def test_no_value_is_let_in_from_which_no_gradient_leads_out(name: str, dtype: torch.dtype) -> None:
    init, constraint = EDGES[name]
    model = nn.Linear(1, 1).to(dtype)
    if name == "positive_definite" and dtype.itemsize == 2:
        with pytest.raises(hi.DeclarationError, match="the initial value must lie strictly inside PositiveDefinite"):
            Hyperparameters((Declaration("value", init, constraint, "loss"),), model)
        return
    held = Hyperparameters((Declaration("value", init, constraint, "loss"),), model)
    start = held.value.detach().clone()
    weights = torch.linspace(1.0, 2.0, torch.as_tensor(init).numel(), dtype=dtype).reshape(torch.as_tensor(init).shape)
    let_in, kept_out = [], []
    for size in (0.0, 0.01, 1.0, 5.0, 15.0, 17.0, 36.0, 36.5, 40.0, 90.0, 800.0, 1e30, math.inf, math.nan):
        for sign in (1.0, -1.0):
            with torch.no_grad():
                held.value.copy_(start + sign * size)
            if not held.is_inside():
                kept_out.append(size)
                continue
            let_in.append(size)
            value = held()["value"]
            assert isinstance(value, Tensor)
            (gradient,) = torch.autograd.grad((value * weights).sum(), held.value)
            assert bool(value.isfinite().all()) and bool(gradient.isfinite().all())
            # a map to matrices ignores what is above the diagonal
            used = torch.ones_like(gradient, dtype=torch.bool)
            used = used.tril() if gradient.dim() == 2 else used
            assert bool((gradient[used] != 0).all()), size
    assert {0.0, 0.01, 1.0} <= set(let_in)
    assert {math.inf} <= {x for x in kept_out if x == x}


def test_step_far_beyond_the_edge_of_an_interval_is_taken_back() -> None:
    """torch clips there, with a derivative of zero: the next hypergradient would be zero, and all after it."""
    signs = {"now": -1.0}
    problem = following(0.5, constraints.unit_interval, signs)
    outer = hi.HyperOptimizer(problem, torch.optim.SGD, lr=1e4, backend="exact")
    with pytest.warns(HyperoptWarning, match="onto the edge of its constraint"):
        outer.step(0, 0)
    assert problem.hparams["value"].item() == 0.0
    assert outer.step(0, 0).gradients["value"].item() == -0.25


def test_matrix_that_is_no_longer_positive_definite_is_taken_back() -> None:
    problem = following(2.0 * torch.eye(2), constraints.positive_definite, {"now": 1.0})
    held = problem.hyperparameters
    with torch.no_grad():
        problem.hparams["value"].copy_(torch.tensor([[1.0, 0.0], [1e12, -40.0]]))
    assert not held.is_inside()


@pytest.mark.parametrize("name", EDGES)
def test_members_of_a_population_are_judged_as_they_are_alone(name: str) -> None:
    init, constraint = EDGES[name]
    problems = [following(init, constraint, {"now": 1.0}) for _ in range(4)]
    for problem, size in zip(problems, (0.1, -30.0, 50.0, -1e5), strict=True):
        with torch.no_grad():
            problem.hparams["value"].add_(size)
    alone = [problem.hyperparameters.is_inside() for problem in problems]
    members = Members(problems)
    assert members.inside() == alone
    assert alone[0]
    assert name == "real" or not all(alone)
