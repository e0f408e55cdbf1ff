"""One call by hand, and the failures that are reported."""

from __future__ import annotations

import torch

import hyperopt_implicit as hi
from hyperopt_implicit.testing.assertions import assert_close
from hyperopt_implicit.testing.specimens import TRAINING, VALIDATION, ridge_problem

DECAY = torch.tensor([0.1, 0.3, 1.0, 2.0])


def test_one_call_by_hand():
    problem = ridge_problem(decay=DECAY)
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
    κ = max(4.0 - float(v @ slope(θ) / squared), 0.0)
    assert κ > 0
    backend = hi.get_backend("bome", eta=4.0, steps=3, step_size=0.2)
    result = hi.hypergradient(problem, backend, training_batches=[TRAINING], validation_batch=VALIDATION)
    assert_close(result.gradients, {"decay": κ * gap}, 1e-11)
    assert_close(result.state["weights"], {"weight": θ - 0.2 * (v + κ * slope(θ))}, 1e-11)


def test_steps_that_are_too_long():
    problem = ridge_problem(decay=DECAY)
    backend = hi.get_backend("bome", step_size=5.0)
    result = hi.hypergradient(problem, backend, training_batches=[TRAINING], validation_batch=VALIDATION)
    assert (result.status, result.state) == (hi.Status.DIVERGED, {})
