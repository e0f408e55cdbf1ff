"""Penalised weights: closed form, bias of order 1/σ, what training that has not converged costs, and carried state."""

from __future__ import annotations

import pytest
import torch

import hyperopt_implicit as hi
from hyperopt_implicit.testing.assertions import assert_close, relative_error, saved_and_loaded
from hyperopt_implicit.testing.oracles import implicit_hypergradient, train_to_minimum
from hyperopt_implicit.testing.specimens import TRAINING, VALIDATION, ridge_problem

DECAY = torch.tensor([0.1, 0.3, 1.0, 2.0])
SOLVED = {"name": "f2sa", "steps": 300, "step_size": "auto"}


def at_minimum(**rest):
    problem = ridge_problem(decay=DECAY, **rest)
    train_to_minimum(problem, [TRAINING])
    return problem


def compute(problem, state=None, **options):
    return hi.hypergradient(
        problem, {**SOLVED, **options}, training_batches=[TRAINING], validation_batch=VALIDATION, state=state
    )


def penalised_minimum(decay, penalty):
    """argmin L + F/σ from the normal equations of both."""
    (x, y), (a, b) = TRAINING, VALIDATION
    matrix = x.T @ x / len(y) + torch.diag(decay) + a.T @ a / len(b) / penalty
    return torch.linalg.solve(matrix, x.T @ y / len(y) + a.T @ b / len(b) / penalty)


@pytest.mark.parametrize("penalty", [0.5, 10.0, 1000.0])
@pytest.mark.parametrize("step_size", ["auto", 0.2])
def test_by_hand(penalty, step_size):
    problem = at_minimum()
    w, decay = problem.params["weight"].detach(), problem.hyperparameters()["decay"].detach()
    y = penalised_minimum(decay, penalty)
    result = compute(problem, penalty=penalty, step_size=step_size, steps=2000, tolerance=1e-11)
    assert_close(result.state["weights"], {"weight": y}, 1e-9)
    assert_close(result.gradients, {"decay": 0.5 * penalty * decay * (y**2 - w**2)}, 1e-7)
    assert result.status is hi.Status.CONVERGED
    assert result.residual <= max(1e-11, 3e-16 * penalty)


def test_bias_falls_like_one_over_the_penalty():
    problem = at_minimum()
    truth = implicit_hypergradient(problem, [TRAINING], VALIDATION)
    errors = [relative_error(compute(problem, penalty=s).gradients, truth) * s for s in (1e2, 2e2, 4e2, 1e4)]
    assert errors == pytest.approx([errors[-1]] * 4, rel=0.05)
    assert errors[-1] > 0.01


def test_training_that_has_not_converged_costs_in_proportion_to_the_penalty():
    """The error is σ·∂L/∂λ(w* ) − σ·∂L/∂λ(w): linear in σ and in how far w is from its minimum."""
    problem = at_minimum()
    truth = compute(problem, penalty=100.0).gradients["decay"]
    w, decay = problem.params["weight"].detach().clone(), problem.hyperparameters()["decay"].detach()
    off = torch.tensor([0.01, -0.02, 0.01, 0.03], dtype=torch.float64)
    problem.params["weight"].data.add_(off)
    found = compute(problem, penalty=100.0).gradients["decay"]
    expected = 0.5 * 100.0 * decay * (w**2 - (w + off) ** 2)
    assert_close({"error": found - truth}, {"error": expected}, 1e-7)


def test_residual_is_that_of_the_system():
    """At a minimum of L and for quadratics, ‖Au − v‖/‖v'‖ with u = σ(w − y), A = H + K/σ, and v' = ∂F/∂w at y."""
    problem = at_minimum()
    w, decay = problem.params["weight"].detach(), problem.hyperparameters()["decay"].detach()
    result = compute(problem, penalty=50.0, steps=7, step_size="lr")
    (x, y), (a, b) = TRAINING, VALIDATION
    A = x.T @ x / len(y) + torch.diag(decay) + a.T @ a / len(b) / 50.0
    at = result.state["weights"]["weight"]
    v, there = (a.T @ (a @ z - b) / len(b) for z in (w, at))
    expected = (A @ (50.0 * (w - at)) - v).norm() / there.norm()
    assert result.residual == pytest.approx(float(expected), rel=1e-8)
    assert (result.status, result.iterations) == (hi.Status.TRUNCATED, 7)


def test_weight_decay_of_the_optimizer_is_a_part_of_the_inner_objective():
    inside = at_minimum(extra=lambda model: 0.2 * model.weight.square().sum())
    coupled = ridge_problem(decay=DECAY, optimizer=lambda params: torch.optim.SGD(params, lr=0.1, weight_decay=0.4))
    coupled.model.load_state_dict(inside.model.state_dict())
    assert_close(compute(coupled, penalty=100.0).gradients, compute(inside, penalty=100.0).gradients, 1e-7)


def test_weights_are_carried():
    """Two calls of k steps are one of 2k where the step size is fixed; a dropped state starts at w again."""
    problem = at_minimum()
    first = compute(problem, steps=4, step_size="lr")
    second = compute(problem, saved_and_loaded(first.state), steps=4, step_size="lr")
    assert_close(second.gradients, compute(problem, steps=8, step_size="lr").gradients, 1e-12)
    assert second.residual < first.residual < 1.0
    assert_close(compute(problem, {}, steps=4, step_size="lr").gradients, first.gradients, 0.0)


def test_penalty_grows_with_the_calls():
    problem = at_minimum()
    state = None
    for call in range(3):
        result = compute(problem, state, penalty=10.0, penalty_growth=5.0)
        expected = compute(problem, penalty=10.0 + 5.0 * call)
        assert_close(result.gradients, expected.gradients, 1e-6)
        state = saved_and_loaded(result.state)
    assert state["calls"] == 3


def test_steps_that_are_too_long():
    problem = at_minimum()
    result = compute(problem, step_size=10.0, steps=5)
    assert result.status is hi.Status.DIVERGED
    assert "weights" not in result.state
    assert result.residual == pytest.approx(1.0, rel=1e-9)  # y = w, the best there was
    assert compute(problem, step_size="auto", tolerance=1e-6).status is hi.Status.CONVERGED


def test_adapted_steps_need_fewer():
    problem = at_minimum()
    assert (
        compute(problem, tolerance=1e-8).iterations * 4
        < compute(problem, tolerance=1e-8, step_size="lr", steps=5000).iterations
    )


def test_where_the_weights_have_no_say_carried_ones_have_none_either():
    """What y and w differ by after a call with another F is no response to this one."""
    before = compute(at_minimum(), steps=5)
    problem = at_minimum(validation_loss=lambda model, batch, *, decay: decay.sum())
    result = compute(problem, state=before.state)
    assert_close(result.gradients, {"decay": problem.hyperparameters()["decay"].detach()}, 1e-12)
