"""One call by hand, with a direct term and without, and the failures that are reported."""

from __future__ import annotations

import pytest
import torch

import hyperopt_implicit as hi
from hyperopt_implicit.testing.assertions import assert_close
from hyperopt_implicit.testing.oracles import train_to_minimum
from hyperopt_implicit.testing.specimens import TRAINING, VALIDATION, half_mean_square, ridge_problem

DECAY = torch.tensor([0.1, 0.3, 1.0, 2.0])


@pytest.mark.parametrize("strength", [0.0, 0.2])
def test_one_call_by_hand(strength):
    """F = ½ mean (f(x) − y)² + strength·Σ decay²: its direct term counts in κ as well."""

    def validation_loss(model, batch, *, decay):
        return half_mean_square(model, batch) + strength * decay.square().sum()

    problem = ridge_problem(decay=DECAY, validation_loss=validation_loss)
    θ = torch.linspace(-0.5, 0.7, 4, dtype=torch.float64)
    problem.params["weight"].data.copy_(θ)
    decay = problem.hyperparameters()["decay"].detach()
    (x, y), (a, b) = TRAINING, VALIDATION

    def slope(w):
        return x.T @ (x @ w - y) / len(y) + decay * w

    arrived = θ
    for _ in range(3):
        arrived = arrived - 0.2 * slope(arrived)
    v = a.T @ (a @ θ - b) / len(b)
    gap = 0.5 * decay * (θ**2 - arrived**2)
    squared = slope(θ) @ slope(θ) + gap @ gap
    direct = 2.0 * strength * decay**2  # positive is reached by exp: ∂decay/∂λ = decay
    κ = 4.0 - float((v @ slope(θ) + direct @ gap) / squared)
    assert κ > 0.1
    backend = hi.get_backend("bome", eta=4.0, steps=3, step_size=0.2)
    result = hi.hypergradient(problem, backend, training_batches=[TRAINING], validation_batch=VALIDATION)
    assert_close(result.gradients, {"decay": direct + κ * gap}, 1e-11)
    assert_close(result.state["weights"], {"weight": θ - 0.2 * (v + κ * slope(θ))}, 1e-11)


def test_descent_that_closes_the_gap_by_itself_is_not_held_back():
    """⟨∇F, ∇q⟩ > η‖∇q‖²: κ is zero and not negative, and θ moves along ∇F alone."""
    problem = ridge_problem(decay=DECAY)
    (x, y), (a, b) = TRAINING, VALIDATION
    θ = torch.full((4,), 3.0, dtype=torch.float64)
    problem.params["weight"].data.copy_(θ)
    v = a.T @ (a @ θ - b) / len(b)
    slope = x.T @ (x @ θ - y) / len(y) + problem.hyperparameters()["decay"].detach() * θ
    assert v @ slope > 0.1 * slope @ slope
    backend = hi.get_backend("bome", eta=1e-3, steps=3, step_size=0.01)
    result = hi.hypergradient(problem, backend, training_batches=[TRAINING], validation_batch=VALIDATION)
    assert_close(result.gradients, {"decay": torch.zeros(4)}, 0.0)
    assert_close(result.state["weights"], {"weight": θ - 0.01 * v}, 1e-12)


def test_steps_that_are_too_long():
    """The direct term alone is returned, and nothing is carried."""
    problem = ridge_problem(
        decay=DECAY, validation_loss=lambda model, batch, *, decay: half_mean_square(model, batch) + decay.sum()
    )
    problem.params["weight"].data.fill_(1.0)
    backend = hi.get_backend("bome", step_size=5.0, eta=10.0)
    result = hi.hypergradient(problem, backend, training_batches=[TRAINING], validation_batch=VALIDATION)
    assert (result.status, result.state) == (hi.Status.DIVERGED, {})
    assert_close(result.gradients, {"decay": problem.hyperparameters()["decay"].detach()}, 1e-12)


def test_loss_that_rises_while_the_decay_of_the_optimizer_falls_is_no_failure():
    """From the minimum of L itself, steps on L + ½·weight_decay·‖w‖² raise L and lower the sum."""
    problem = ridge_problem(decay=DECAY, optimizer=lambda params: torch.optim.SGD(params, lr=0.1, weight_decay=2.0))
    train_to_minimum(problem, [TRAINING])
    result = hi.hypergradient(problem, "bome", training_batches=[TRAINING], validation_batch=VALIDATION)
    assert result.status is hi.Status.TRUNCATED
    assert result.state["weights"].keys() == {"weight"}
