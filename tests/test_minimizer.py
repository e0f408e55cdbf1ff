"""``minimizer`` gives w*(λ) with the derivatives that it promises, and problems of three levels rest on it."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from torch.distributions import constraints

import hyperopt_implicit as hi
from hyperopt_implicit.minimizer import minimizer
from hyperopt_implicit.testing.assertions import assert_unchanged
from hyperopt_implicit.testing.oracles import finite_differences, flatten, train_to_minimum
from hyperopt_implicit.testing.specimens import (
    TRAINING,
    Linear,
    gradient_descent,
    half_mean_square,
    logistic_problem,
    regression_data,
    ridge_problem,
)

DECAY = torch.tensor([0.1, 0.3, 1.0, 2.0], dtype=torch.float64)
SIGNS = (TRAINING[0], TRAINING[1].sign())
MODULE = sys.modules[minimizer.__module__]  # the package's attribute of that name is the function
torch_close = torch.testing.assert_close


def closed_form(decay: torch.Tensor) -> torch.Tensor:
    """(XᵀX/n + diag(decay))⁻¹ Xᵀy/n."""
    x, y = TRAINING
    return torch.linalg.solve(x.T @ x / len(y) + torch.diag(decay), x.T @ y / len(y))


def derivatives(function, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A function's value [n], Jacobian [n, m] and second derivatives [n, m, m]."""
    at = at.clone().requires_grad_()
    value = function(at)
    rows = [torch.autograd.grad(x, at, create_graph=True)[0] for x in value]
    second = [torch.stack([torch.autograd.grad(g, at, retain_graph=True)[0] for g in row]) for row in rows]
    return value.detach(), torch.stack(rows).detach(), torch.stack(second)


# ------------------------------------------------------------------------------------------------- derivatives of w*


@pytest.mark.parametrize("dense", [True, False], ids=["factorised", "conjugate gradients"])
def test_ridge(dense, monkeypatch):
    monkeypatch.setattr(MODULE, "_DENSE", 1000 if dense else 0)
    problem = ridge_problem(decay=torch.ones(4))
    found = derivatives(lambda decay: minimizer(problem, {"decay": decay}, [TRAINING])["weight"], DECAY)
    for actual, expected in zip(found, derivatives(closed_form, DECAY), strict=True):
        torch_close(actual, expected, rtol=1e-8, atol=1e-10)


def logistic(order: int):
    problem = logistic_problem()

    def weights(values: torch.Tensor) -> torch.Tensor:
        given = {"decay": values[0], "margin": values[1]}
        return minimizer(problem, given, [SIGNS], order=order, tolerance=1e-13)["weight"]

    return weights


LOGISTIC = torch.tensor([0.2, 0.3], dtype=torch.float64)


def differenced(function, at: torch.Tensor) -> torch.Tensor:
    """d function/d at, its last axis that of ``at``, by differences with an error of order h⁴."""
    columns = []
    for i in range(len(at)):
        e = torch.zeros_like(at)
        e[i] = 3e-3
        near, far = function(at + e) - function(at - e), function(at + 2 * e) - function(at - 2 * e)
        columns.append((8 * near - far) / (12 * 3e-3))
    return torch.stack(columns, dim=-1)


def test_both_derivatives_where_the_loss_is_not_quadratic():
    _, first, second = derivatives(logistic(order=2), LOGISTIC)
    torch_close(first, differenced(lambda at: derivatives(logistic(1), at)[0], LOGISTIC), rtol=1e-6, atol=1e-6)
    torch_close(second, differenced(lambda at: derivatives(logistic(1), at)[1], LOGISTIC), rtol=1e-5, atol=1e-5)


def test_each_step_makes_one_derivative_right():
    """With one step the first is right and the second is not, by much; with three the third is right as well."""
    once, twice, thrice = (derivatives(logistic(order), LOGISTIC) for order in (1, 2, 3))
    torch_close(once[1], twice[1], rtol=1e-9, atol=1e-11)
    torch_close(thrice[2], twice[2], rtol=1e-9, atol=1e-11)
    assert float((once[2] - twice[2]).norm() / twice[2].norm()) > 0.1

    def third(order):
        at = LOGISTIC.clone().requires_grad_()
        x = logistic(order)(at).sum()
        for _ in range(3):
            (x,) = (g.sum() for g in torch.autograd.grad(x, at, create_graph=True))
        return x.detach()

    direction = torch.ones(2, dtype=torch.float64)

    def second_along(at):
        return torch.einsum("nij,i,j->", derivatives(logistic(2), at)[2], direction, direction)

    expected = differenced(second_along, LOGISTIC).sum()
    torch_close(third(3), expected, rtol=1e-5, atol=1e-6)
    assert abs(float(third(2) / expected) - 1.0) > 0.05


def test_coupled_decay_of_the_optimizer_is_part_of_the_loss():
    problem = ridge_problem(decay=torch.ones(4), optimizer=lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.7))
    found = derivatives(lambda decay: minimizer(problem, {"decay": decay}, [TRAINING])["weight"], DECAY)
    for actual, expected in zip(found, derivatives(lambda decay: closed_form(decay + 0.7), DECAY), strict=True):
        torch_close(actual, expected, rtol=1e-8, atol=1e-10)


def test_batches_are_averaged():
    other, decay = regression_data(2), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    both = tuple(torch.cat(pair) for pair in zip(TRAINING, other, strict=True))
    problem = ridge_problem()
    apart, together = (minimizer(problem, {"decay": decay}, each)["weight"] for each in ([TRAINING, other], [both]))
    torch_close(apart, together, rtol=1e-10, atol=1e-12)


def test_values_not_given_are_the_problems_own():
    problem = logistic_problem()
    decay = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        problem.hyperparameters.margin.fill_(0.3)
    expected = logistic(2)(LOGISTIC)
    torch_close(minimizer(problem, {"decay": decay}, [SIGNS])["weight"], expected, rtol=1e-9, atol=1e-11)


def test_parameters_of_a_module_by_their_names():
    @hi.hyperparameter("net", init=nn.Linear(1, 1, bias=False))
    def training_loss(model, batch, *, net):
        return half_mean_square(model, batch) + 0.5 * net.weight.square().sum() * model.weight.square().sum()

    problem = hi.BilevelProblem(Linear(4), training_loss, half_mean_square, optimizer=gradient_descent)
    root = torch.tensor([[0.6]], dtype=torch.float64, requires_grad=True)
    w = minimizer(problem, {"net.weight": root}, [TRAINING])["weight"]
    torch_close(w, closed_form(root.square().expand(4, 1)[:, 0]), rtol=1e-9, atol=1e-11)
    expected = torch.autograd.grad(closed_form(root.square().expand(4, 1)[:, 0]).sum(), root)
    torch_close(torch.autograd.grad(w.sum(), root), expected, rtol=1e-8, atol=1e-10)


def test_weights_on_a_simplex():
    """Derivatives along the simplex are those of the loss, whatever the map to unconstrained values is."""
    parts = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64).view(3, 4)

    @hi.hyperparameter("shares", init=torch.full((3,), 1 / 3), constraint=constraints.simplex)
    def training_loss(model, batch, *, shares):
        return 0.5 * model.weight.square().sum() - (shares @ parts.square()) @ model.weight

    problem = hi.BilevelProblem(Linear(4), training_loss, half_mean_square, optimizer=gradient_descent)

    def weights(logits):
        return minimizer(problem, {"shares": logits.softmax(0)}, [None])["weight"]

    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
    expected = derivatives(lambda logits: logits.softmax(0) @ parts.square(), logits)
    for actual, wanted in zip(derivatives(weights, logits), expected, strict=True):
        torch_close(actual, wanted, rtol=1e-8, atol=1e-10)


def test_parameters_without_a_loss_stay():
    problem = ridge_problem(Linear(4, unused=nn.Parameter(torch.ones(2, dtype=torch.float64))), decay=torch.ones(4))
    decay = DECAY.clone().requires_grad_()
    w = minimizer(problem, {"decay": decay}, [TRAINING])
    torch_close(w["weight"], closed_form(decay), rtol=1e-9, atol=1e-11)
    assert torch.equal(w["unused"], torch.ones(2, dtype=torch.float64))


def test_random_layers_are_held_still():
    problem = ridge_problem(nn.Sequential(nn.Dropout(0.3), Linear(4)), decay=0.3)
    decay = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = (minimizer(problem, {"decay": decay}, [TRAINING])["1.weight"] for _ in range(2))
    assert torch.equal(first, second) and torch.equal(before, torch.get_rng_state())
    mask = nn.functional.dropout(torch.ones_like(TRAINING[0]), 0.3)
    x, y = TRAINING[0] * mask, TRAINING[1]
    torch_close(first, torch.linalg.solve(x.T @ x / len(y) + 0.3 * torch.eye(4).double(), x.T @ y / len(y)))


# -------------------------------------------------------------------------------------------------- what it leaves be


def test_problem_is_left_alone():
    problem = logistic_problem()
    with assert_unchanged(problem):
        logistic_weights = minimizer(problem, {"decay": torch.tensor(0.2, requires_grad=True)}, [SIGNS])["weight"]
        logistic_weights.sum().backward()


def test_without_gradients():
    with torch.no_grad():
        w = minimizer(ridge_problem(), {"decay": torch.tensor(0.4)}, [TRAINING])["weight"]
    assert not w.requires_grad
    torch_close(w, closed_form(torch.full((4,), 0.4, dtype=torch.float64)), rtol=1e-6, atol=1e-8)


def test_start_saves_steps(monkeypatch):
    problem, steps = logistic_problem(), []
    home, plain = MODULE, MODULE.newton

    def counting(*args, **kwargs):
        found = plain(*args, **kwargs)
        steps.append(found.steps)
        return found

    monkeypatch.setattr(home, "newton", counting)
    w = minimizer(problem, {}, [SIGNS])
    again = minimizer(problem, {}, [SIGNS], start=w)
    assert steps[0] >= 3 and steps[1] == 0
    torch_close(again, w, rtol=1e-10, atol=1e-12)


def test_float32():
    x, y = (part.float() for part in TRAINING)
    problem = ridge_problem(Linear(4).float(), decay=torch.ones(4))
    decay = DECAY.float().requires_grad_()
    w = minimizer(problem, {"decay": decay}, [(x, y)])["weight"]
    assert w.dtype is torch.float32
    torch_close(w.double(), closed_form(DECAY), rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------- refusals


def refusal(error: type[Exception], problem=None, values=None, **options) -> str:
    with pytest.raises(error) as caught:
        minimizer(problem or logistic_problem(), values or {}, options.pop("batches", [SIGNS]), **options)
    return str(caught.value)


def test_unknown_name():
    assert refusal(hi.ProblemError, values={"decoy": torch.tensor(1.0)}) == (
        "values must name hyperparameters of the losses, which are margin, decay; 'decoy' is none of them. "
        "Did you mean 'decay'?"
    )


def test_hyperparameter_of_the_optimizer():
    problem = ridge_problem(also=hi.hyperparameter("lr", init=0.1, target="optimizer"))
    assert refusal(hi.ProblemError, problem, {"lr": torch.tensor(0.1)}) == (
        "a minimum does not depend on how it was reached; 'lr' is a hyperparameter of the inner optimizer. Leave it "
        "out of values."
    )


def test_value_outside_its_constraint():
    for value in (-1.0, 0.0):
        assert refusal(hi.ProblemError, values={"decay": torch.tensor(value)}) == (
            f"the value of 'decay' must lie strictly inside GreaterThan(lower_bound=0.0); got [{value}]. Compute it as "
            "the constraint's own transform does."
        )


def test_value_of_another_shape_or_kind():
    assert "must be shaped like the one declared; it has shape (2,)" in refusal(
        hi.ProblemError, values={"decay": torch.ones(2)}
    )
    assert refusal(hi.ProblemError, values={"decay": 0.1}) == (
        "values must be tensors; 'decay' is a float. Wrap it in torch.tensor."
    )


def test_start_that_does_not_fit():
    assert refusal(hi.ProblemError, start={"w": torch.ones(4)}) == (
        "start must hold the weights that the inner optimizer trains, {'weight': (4,)}; it holds {'w': (4,)}. The "
        "result of a call before fits, and so does problem.params."
    )


def test_numbers_out_of_range():
    assert refusal(hi.ProblemError, order=0) == "order must be an integer of at least 1; got 0."
    assert refusal(hi.ProblemError, max_steps=1.5) == "max_steps must be an integer of at least 1; got 1.5."
    assert refusal(hi.ProblemError, tolerance=0.0) == "tolerance must be a gradient norm above zero; got 0.0."
    assert refusal(hi.ProblemError, batches=[]) == "training_batches must hold a batch at least; it is empty."


def test_minimum_that_is_not_reached():
    message = refusal(hi.HypergradientError, max_steps=1)
    assert message.startswith(
        "w*(λ) can be differentiated where the training loss has its minimum; after 1 of at most 1 Newton steps "
        "‖∂L/∂w‖ is "
    )
    assert message.endswith("or allow more with max_steps= or tolerance=.")


@pytest.mark.parametrize("dense", [True, False], ids=["factorised", "conjugate gradients"])
@pytest.mark.parametrize("curvature", [0.0, 1e-17, -1.0], ids=["flat", "flat to rounding", "saddle"])
def test_minimum_that_is_none(dense, curvature, monkeypatch):
    """A stationary point where L is flat along one direction, or curves downwards."""
    monkeypatch.setattr(MODULE, "_DENSE", 1000 if dense else 0)

    @hi.hyperparameter("shift", init=0.0)
    def training_loss(model, batch, *, shift):
        first, second = model.weight
        return 0.5 * (first - shift).square() + 0.5 * curvature * (second - shift).square()

    problem = hi.BilevelProblem(Linear(2), training_loss, half_mean_square, optimizer=gradient_descent)
    shift = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    with pytest.raises(hi.HypergradientError, match="where the Hessian of the training loss is positive definite"):
        minimizer(problem, {"shift": shift}, [None])["weight"].sum().backward()


# ------------------------------------------------------------------------------------------------------- three levels

SECOND, THIRD = ((x, y.sign()) for x, y in (regression_data(2), regression_data(3)))


def bottom() -> hi.BilevelProblem:
    """w: logistic regression with a decay per feature, μ."""

    @hi.hyperparameter("decay", init=lambda model: torch.full((4,), 0.3), constraint=constraints.positive)
    def training_loss(model, batch, *, decay):
        x, y = batch
        return torch.log1p(torch.exp(-y * model(x))).mean() + 0.5 * (decay * model.weight.square()).sum()

    return hi.BilevelProblem(Linear(4), training_loss, logistic_loss, optimizer=gradient_descent)


def logistic_loss(model, batch):
    x, y = batch
    return torch.log1p(torch.exp(-y * model(x))).mean()


class LogDecays(nn.Module):
    """The middle's weights: log μ."""

    def __init__(self) -> None:
        super().__init__()
        self.log_decay = nn.Parameter(torch.full((4,), -1.0, dtype=torch.float64))
        self.lowest = bottom()
        self.last = None

    def forward(self, order: int) -> torch.Tensor:
        decay = self.log_decay.exp()
        w = minimizer(self.lowest, {"decay": decay}, [SIGNS], order=order, start=self.last)
        self.last = {name: p.detach() for name, p in w.items()}
        return w["weight"]


def three_levels(order: int = 2) -> hi.BilevelProblem:
    """λ, the strength and the centre of a prior of log μ, at the top."""

    @hi.hyperparameter("centre", init=-1.5)
    @hi.hyperparameter("strength", init=0.05, constraint=constraints.positive)
    def training_loss(model, batch, *, strength, centre):
        x, y = batch
        loss = torch.log1p(torch.exp(-y * (x @ model(order)))).mean()
        return loss + strength * (model.log_decay - centre).square().mean()

    def validation_loss(model, batch):
        x, y = batch
        return torch.log1p(torch.exp(-y * (x @ model(order=1)))).mean()

    return hi.BilevelProblem(
        LogDecays(),
        training_loss,
        validation_loss,
        training_data=[SECOND],
        validation_data=[THIRD],
        optimizer=lambda params: torch.optim.SGD(params, lr=1.0),
    )


@pytest.mark.parametrize("backend", ["exact", {"name": "cg", "tolerance": 1e-10}], ids=["exact", "cg"])
def test_hypergradient_of_three_levels(backend):
    """Against finite differences of F through both problems below, each minimised anew for every λ."""
    problem = three_levels()
    train_to_minimum(problem, [SECOND])
    report = hi.check(problem, backend)
    assert report.ok, report
    assert report.relative_error < 1e-4


def test_through_the_steps_of_the_middle_problem():
    report = hi.check(three_levels(), "unrolled", inner_steps=3)
    assert report.relative_error < 1e-4


def test_three_levels_need_the_second_order():
    """With order 1 in its training loss, the middle problem's Hessian is wrong, and the hypergradient with it."""
    problem = three_levels(order=1)
    train_to_minimum(three_levels(), [SECOND])
    right = three_levels()
    train_to_minimum(right, [SECOND])
    with torch.no_grad():
        problem.params["log_decay"].copy_(right.params["log_decay"])
    wrong, good = (
        hi.hypergradient(each, "exact", training_batches=[SECOND], validation_batch=THIRD).gradients
        for each in (problem, right)
    )
    assert float((flatten(wrong) - flatten(good)).norm() / flatten(good).norm()) > 0.01


def test_top_level_by_finite_differences_of_its_own():
    """The same as ``check`` does, with nothing of it: every weight found by the dense oracle."""
    problem = three_levels()

    def value() -> float:
        train_to_minimum(problem, [SECOND], tolerance=1e-11)
        log_decay = problem.params["log_decay"].detach()
        lowest = bottom()
        with torch.no_grad():
            lowest.hyperparameters.decay.copy_(log_decay)
        train_to_minimum(lowest, [SIGNS])
        return float(lowest.validation_loss(THIRD))

    expected = finite_differences(value, problem.hparams, step=1e-2)
    train_to_minimum(problem, [SECOND])
    found = hi.hypergradient(problem, "exact", training_batches=[SECOND], validation_batch=THIRD).gradients
    torch_close(flatten(found), flatten(expected), rtol=1e-5, atol=1e-8)
