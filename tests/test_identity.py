"""The identity in the place of the inverse Hessian: values by hand, T1−T2 as one step of SGD, and what it costs."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import hyperopt_implicit as hi
from hyperopt_implicit.auxiliary import MetaOptimizer
from hyperopt_implicit.backend import Status
from hyperopt_implicit.testing.oracles import train_to_minimum
from hyperopt_implicit.testing.specimens import TRAINING, VALIDATION, quadratic_problem, ridge_problem
from hyperopt_implicit_backends import Identity

from .matrices import assert_residual_is_true, flat, right_hand_side, solve, spread, with_spectrum

POSITIVE = with_spectrum(spread(0.5, 5.0, 12))
VECTOR = right_hand_side(12)


@pytest.mark.parametrize("step_size", [1.0, 0.1])
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_the_value_by_hand(step_size, damping):
    """u = αv/(1 + αδ), without a product."""
    solution, products = solve(Identity(step_size=step_size, damping=damping), POSITIVE, VECTOR)
    torch.testing.assert_close(flat(solution.value), step_size * flat(VECTOR) / (1 + step_size * damping))
    assert (solution.status, solution.residual, products) == (Status.TRUNCATED, None, 0)


def test_the_hypergradient_by_hand():
    """L = ½wᵀHw − (b + shift)ᵀw and F = ½‖w − 1‖²: dF/dshift = α(w − 1), at w = H⁻¹b."""
    problem = quadratic_problem(torch.diag(torch.tensor([2.0, 4.0], dtype=torch.float64)))
    result = hi.hypergradient(problem, Identity(step_size=0.5), training_batches=[None], validation_batch=None)
    torch.testing.assert_close(result.gradients["shift"].double(), torch.tensor([-0.25, -0.375]).double())
    assert (result.status, result.hvps, result.residual) == (Status.TRUNCATED, 0, None)


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_the_residual_costs_a_product(damping):
    solution, products = solve(Identity(step_size=0.2, damping=damping, measure_residual=True), POSITIVE, VECTOR)
    assert products == 1
    assert_residual_is_true(POSITIVE + damping * torch.eye(12, dtype=torch.float64), solution, VECTOR)
    assert solution.status is Status.TRUNCATED


def test_it_is_the_first_term_of_the_neumann_series():
    problem = ridge_problem()
    one = hi.hypergradient(
        problem,
        {"name": "neumann", "terms": 1, "step_size": 0.3},
        training_batches=[TRAINING],
        validation_batch=VALIDATION,
    )
    same = hi.hypergradient(problem, Identity(step_size=0.3), training_batches=[TRAINING], validation_batch=VALIDATION)
    torch.testing.assert_close(same.gradients["decay"], one.gradients["decay"], rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("rate", [0.1, 0.03])
def test_with_the_learning_rate_it_is_one_step_of_sgd(rate):
    """T1−T2: at a minimum, where a step leads back to where it began, the derivative through it is the same."""
    problem = ridge_problem(decay=torch.tensor([0.1, 0.3, 1.0, 2.0]))
    train_to_minimum(problem, [TRAINING])
    problem.optimizer.param_groups[0]["lr"] = rate
    batches = {"training_batches": [TRAINING], "validation_batch": VALIDATION}
    identity = hi.hypergradient(problem, Identity(step_size="lr"), **batches)
    unrolled = hi.hypergradient(problem, "unrolled", **batches)
    torch.testing.assert_close(identity.gradients["decay"], unrolled.gradients["decay"], rtol=1e-11, atol=1e-14)
    assert identity.gradients["decay"].abs().min() > 1e-6


@pytest.mark.parametrize("maximize", [False, True])
def test_each_group_has_its_learning_rate(maximize):
    model = nn.Linear(2, 1).double()
    scale = -1.0 if maximize else 1.0

    @hi.hyperparameter("shift", init=torch.zeros(2))
    def training_loss(model, batch, *, shift):
        return scale * (
            0.5 * model.weight.square().sum()
            + model.bias.square().sum() * (1 + shift.sum())
            - (shift * model.weight[0]).sum()
        )

    def validation_loss(model, batch):
        return (model.weight.sum() - 1.0).square() + 3.0 * model.bias.sum()

    groups = [{"params": [model.weight], "lr": 0.5}, {"params": [model.bias], "lr": 0.125}]
    optimizer = torch.optim.SGD(groups, maximize=maximize)
    problem = hi.BilevelProblem(model, training_loss, validation_loss, optimizer=optimizer)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.fill_(0.25)
    found = hi.hypergradient(problem, Identity(step_size="lr"), training_batches=[None], validation_batch=None)
    v, b = -2.0, 3.0  # ∂F/∂w and ∂F/∂bias
    expected = 0.5 * v - 0.125 * b * 2 * 0.25
    torch.testing.assert_close(found.gradients["shift"].double(), torch.full((2,), expected).double())


def test_a_non_finite_product_is_reported():
    matrix = POSITIVE.clone()
    matrix[3, 3] = float("nan")
    solution, _ = solve(Identity(measure_residual=True), matrix, VECTOR)
    assert solution.status is Status.NON_FINITE


def test_the_learning_rate_needs_a_problem():
    w, φ = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    meta = MetaOptimizer(torch.optim.SGD([φ], lr=0.1), backend={"name": "identity", "step_size": "lr"})
    message = (
        "step_size='lr' takes the learning rate from the inner optimizer of a BilevelProblem, and there is none here. "
        "Give a number, for instance step_size=0.1."
    )
    with pytest.raises(hi.BackendError, match=f"^{re.escape(message)}$"):
        meta.step((φ * w).square().sum(), w.sum(), [w], [φ])


@pytest.mark.parametrize("step_size", [0.0, -1.0, "auto"])
def test_step_sizes_that_cannot_hold_are_refused(step_size):
    with pytest.raises(hi.BackendError, match=r"^Identity option 'step_size': "):
        Identity(step_size=step_size)
