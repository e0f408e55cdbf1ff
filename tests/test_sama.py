"""The inner optimizer's update as a preconditioner: ∂Φ/∂g by hand, SGD as finite differences, and what is refused."""

from __future__ import annotations

import pytest
import torch

import hyperopt_implicit as hi
from hyperopt_implicit.first_order import TrainingDerivatives, present_weights, update_adjoint
from hyperopt_implicit.optimizers import _RULES
from hyperopt_implicit.testing.assertions import assert_close
from hyperopt_implicit.testing.specimens import TRAINING, VALIDATION, ridge_problem

DECAY = torch.tensor([0.1, 0.3, 1.0, 2.0])
V = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)


def problem_with(optimizer):
    """Away from the minimum, with a few steps of the optimizer's state behind it."""
    problem = ridge_problem(decay=DECAY, optimizer=optimizer)
    problem.params["weight"].data.copy_(torch.linspace(-0.5, 0.7, 4, dtype=torch.float64))
    for _ in range(3):
        problem.optimizer.zero_grad()
        problem.training_loss(TRAINING).backward(inputs=list(problem.params.values()))
        problem.optimizer.step()
    problem.optimizer.zero_grad()
    return problem


def adjoint(problem):
    weights = present_weights(problem)
    derivatives = TrainingDerivatives(problem, [TRAINING]).at(weights)
    return update_adjoint(problem, weights, derivatives, {"weight": V})["weight"], derivatives.weights["weight"]


def adam(state, g, lr, beta1, beta2, eps):
    """Diagonal of ∂Φ/∂g from the state before the update."""
    t = float(state["step"]) + 1
    m = beta1 * state["exp_avg"] + (1 - beta1) * g
    s = beta2 * state["exp_avg_sq"] + (1 - beta2) * g**2
    m_hat, root = m / (1 - beta1**t), (s / (1 - beta2**t)).sqrt()
    first = (1 - beta1) / (1 - beta1**t) / (root + eps)
    return lr * (first - m_hat * (1 - beta2) * g / ((1 - beta2**t) * root * (root + eps) ** 2))


def test_adam_by_hand():
    problem = problem_with(lambda params: torch.optim.Adam(params, lr=0.03, betas=(0.8, 0.95), eps=1e-3))
    found, g = adjoint(problem)
    expected = adam(problem.optimizer.state[problem.params["weight"]], g, 0.03, 0.8, 0.95, 1e-3)
    assert_close({"u": found}, {"u": expected * V}, 1e-12)


def test_hypergradient_by_hand_with_adam():
    """The difference is exact on a quadratic: −diag(decay·w) u."""
    problem = problem_with(lambda params: torch.optim.Adam(params, lr=0.03))
    w, decay = problem.params["weight"].detach(), problem.hyperparameters()["decay"].detach()
    state = problem.optimizer.state[problem.params["weight"]]
    state["exp_avg"] = torch.tensor([0.1, -0.2, 0.3, 0.4], dtype=torch.float64)
    state["exp_avg_sq"] = torch.tensor([0.5, 0.04, 0.2, 1.0], dtype=torch.float64)
    x, y = TRAINING
    g = x.T @ (x @ w - y) / len(y) + decay * w
    v = VALIDATION[0].T @ (VALIDATION[0] @ w - VALIDATION[1]) / len(VALIDATION[1])
    expected = {"decay": -decay * w * adam(state, g, 0.03, 0.9, 0.999, 1e-8) * v}
    result = hi.hypergradient(problem, "sama", training_batches=[TRAINING], validation_batch=VALIDATION)
    assert_close(result.gradients, expected, 1e-10)


@pytest.mark.parametrize(
    ("options", "factor"),
    [({}, 1.0), ({"momentum": 0.9}, 1.0), ({"momentum": 0.9, "nesterov": True}, 1.9), ({"maximize": True}, -1.0)],
)
def test_sgd_by_hand(options, factor):
    found, _ = adjoint(problem_with(lambda params: torch.optim.SGD(params, lr=0.2, **options)))
    assert_close({"u": found}, {"u": 0.2 * factor * V}, 1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_with_sgd_it_is_the_finite_difference_without_lookahead(decay):
    problem = problem_with(lambda params: torch.optim.SGD(params, lr=0.2, weight_decay=decay))
    batches = {"training_batches": [TRAINING, VALIDATION], "validation_batch": VALIDATION}
    expected = hi.hypergradient(problem, {"name": "finite_difference", "lookahead": False}, **batches)
    assert_close(hi.hypergradient(problem, "sama", **batches).gradients, expected.gradients, 1e-12)


SMOOTH = sorted((each for each, rule in _RULES.items() if not rule.signs_only), key=lambda each: each.__name__)


@pytest.mark.parametrize("optimizer", SMOOTH, ids=lambda each: each.__name__)
def test_every_optimizer_against_differences_of_its_own_step(optimizer):
    """Φ as torch.optim performs it: its steps from g ± h·v, differenced."""
    problem = problem_with(lambda params: optimizer(params, lr=0.05))
    found, g = adjoint(problem)
    state, p = problem.inner_state(), problem.params["weight"]
    jacobian = torch.empty(4, dtype=torch.float64)
    for i in range(4):
        ends = []
        for sign in (1.0, -1.0):
            p.grad = g.clone()
            p.grad[i] += sign * 1e-5
            problem.optimizer.step()
            ends.append(p.detach()[i].clone())
            problem.load_inner_state(state)
        jacobian[i] = -(ends[0] - ends[1]) / 2e-5
    assert_close({"u": found}, {"u": jacobian * V}, 1e-5)


@pytest.mark.parametrize(
    ("optimizer", "got"),
    [
        (lambda params: torch.optim.Rprop(params), "Rprop"),
        (lambda params: torch.optim.LBFGS(params), "LBFGS"),
    ],
)
def test_optimizers_that_are_not_known(optimizer, got):
    with pytest.raises(hi.BackendError) as caught:
        hi.get_backend("sama").check(ridge_problem(optimizer=optimizer))
    assert str(caught.value) == (
        "backend 'sama' differentiates the inner optimizer's update, which must be that of SGD, Adam, AdamW, Adamax, "
        f"RMSprop, Adagrad, NAdam, RAdam, Adadelta or ASGD of torch.optim; got {got}. Use one of these, or "
        "'finite_difference', which looks at the learning rate only."
    )
    assert all(each.__name__ in str(caught.value) for each, rule in _RULES.items() if not rule.signs_only)
