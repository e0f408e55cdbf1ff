"""The estimate along random directions: its mean, its variance and its cosine are those of the theory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import hyperopt_implicit as hi
from hyperopt_implicit.testing.assertions import assert_close, assert_unchanged, saved_and_loaded
from hyperopt_implicit.testing.specimens import Linear
from hyperopt_implicit_backends import ForwardGradient

pytestmark = pytest.mark.usefixtures("float64")

SIZE = 10
TARGET = torch.linspace(-1.0, 2.0, SIZE, dtype=torch.float64)


def shift_problem() -> hi.BilevelProblem:
    """One step of L = ½‖w − shift‖² with rate ½ from w = 0, and F = ½‖w − target‖² + ½·shift₀², by hand below."""

    @hi.hyperparameter("first", init=0.5)
    @hi.hyperparameter("shift", init=torch.linspace(0.3, 1.0, SIZE, dtype=torch.float64))
    def training_loss(model, batch, *, shift, first):
        return 0.5 * (model.weight - shift).square().sum() + 0.5 * (first * model.weight[0] - 1.0) ** 2

    def validation_loss(model, batch, *, shift):
        return 0.5 * (model.weight - TARGET).square().sum() + 0.5 * shift[0] ** 2

    return hi.BilevelProblem(
        Linear(SIZE), training_loss, validation_loss, optimizer=lambda p: torch.optim.SGD(p, lr=0.5)
    )


def by_hand() -> dict[str, torch.Tensor]:
    """w = ½·shift + ½·first·e₀ after the step."""
    shift, first = torch.linspace(0.3, 1.0, SIZE, dtype=torch.float64), 0.5
    w = 0.5 * shift
    w[0] += 0.5 * first
    gradient = 0.5 * (w - TARGET)
    direct = torch.zeros(SIZE, dtype=torch.float64)
    direct[0] = shift[0]
    return {"first": gradient[0], "shift": gradient + direct}


def estimate(backend: ForwardGradient, state: hi.backend.State | None = None) -> hi.Hypergradient:
    return hi.hypergradient(shift_problem(), backend, training_batches=[None], validation_batch=None, state=state)


def draws(count: int = 200, **options) -> torch.Tensor:
    """[count, m]: estimates under as many seeds."""
    problem, rows = shift_problem(), []
    for seed in range(count):
        backend = ForwardGradient(seed=seed, **options)
        found = backend.hypergradient(problem, [None], None, {}).gradients
        rows.append(torch.cat([found["first"][None], found["shift"]]))
    return torch.stack(rows)


TRUTH = torch.cat([by_hand()["first"][None], by_hand()["shift"]])
M = SIZE + 1


@pytest.mark.parametrize("directions", [M, 40])
def test_exact_with_as_many_orthonormal_directions_as_hyperparameters(directions):
    result = estimate(ForwardGradient(directions=directions))
    assert_close(result.gradients, by_hand(), 1e-13)
    exact = hi.hypergradient(shift_problem(), "unrolled", training_batches=[None], validation_batch=None)
    assert_close(result.gradients, exact.gradients, 1e-13)
    assert (result.status, result.hvps) == (hi.Status.CONVERGED, M)


@pytest.mark.parametrize("directions", [1, 3, 8])
@pytest.mark.parametrize("orthogonal", [True, False])
def test_mean_variance_and_cosine(orthogonal, directions):
    """Var = (m/k − 1)‖g‖² or ((m + 1)/k)‖g‖², and E cos² = k/m for orthonormal directions; all over 200 seeds."""
    found = draws(orthogonal=orthogonal, directions=directions)
    size = float(TRUTH.square().sum())
    variance = (M / directions - 1.0 if orthogonal else (M + 1.0) / directions) * size
    squares = (found - TRUTH).square().sum(1)
    assert float((found.mean(0) - TRUTH).norm()) < 2.0 * math.sqrt(variance / len(found))
    error = float(squares.std()) / math.sqrt(len(found))
    assert abs(float(squares.mean()) - variance) < 3.5 * error
    if orthogonal:
        cosines = (found @ TRUTH).square() / (found.square().sum(1) * size)
        assert abs(float(cosines.mean()) - directions / M) < 3.5 * float(cosines.std()) / math.sqrt(len(found))


def test_gaussian_directions_are_never_exact():
    result = estimate(ForwardGradient(directions=16, orthogonal=False))
    assert (result.status, result.hvps) == (hi.Status.TRUNCATED, 16)
    assert estimate(ForwardGradient(directions=4)).status is hi.Status.TRUNCATED


def test_directions_follow_the_seed_and_the_number_of_the_call():
    backend = ForwardGradient(directions=2)
    problem = shift_problem()
    with assert_unchanged(problem):
        first = backend.hypergradient(problem, [None], None, {})
    again, second = estimate(backend), estimate(backend, saved_and_loaded(first.state))
    assert torch.equal(first.gradients["shift"], again.gradients["shift"])
    assert not torch.allclose(first.gradients["shift"], second.gradients["shift"])
    assert not torch.allclose(
        first.gradients["shift"], estimate(ForwardGradient(directions=2, seed=1)).gradients["shift"]
    )
    assert (first.state, second.state) == ({"calls": 1}, {"calls": 2})


def test_a_run_that_blows_up_is_not_finite():
    problem = shift_problem()
    problem.optimizer.param_groups[0]["lr"] = float("inf")
    result = hi.hypergradient(problem, "forward_gradient", training_batches=[None] * 3, validation_batch=None)
    assert result.status is hi.Status.NON_FINITE


@pytest.mark.parametrize(("option", "value"), [("directions", 0), ("seed", -1)])
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(hi.BackendError, match=f"ForwardGradient option '{option}'"):
        hi.get_backend("forward_gradient", **{option: value})


def test_more_hyperparameters_than_forward_takes():
    @hi.hyperparameter("shift", init=torch.zeros(100))
    def training_loss(model, batch, *, shift):
        return 0.5 * (model.weight - shift).square().sum()

    problem = hi.BilevelProblem(
        nn.Linear(100, 1),
        training_loss,
        lambda model, batch: 0.5 * (model.weight - 1.0).square().sum(),
        training_data=[0],
        validation_data=[0],
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
    )
    result = hi.optimize(
        problem,
        {"name": "forward_gradient", "directions": 10},
        outer_steps=60,
        inner_steps=1,
        outer_optimizer=torch.optim.SGD,
        outer_lr=0.05,
        tracking=False,
        progress=False,
    )
    assert result.history[-1].validation_loss < 0.2 * result.history[0].validation_loss
