"""A product and the mixed derivative from one backward: equal to the two apart, counted once, and never out of date."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints

import hyperopt_implicit as hi
from hyperopt_implicit.gauss_newton import GaussNewton
from hyperopt_implicit.one_loop import InTurn
from hyperopt_implicit.operators import Damped, Hessian, LinearOperator, LossHessian
from hyperopt_implicit.testing.assertions import assert_close
from hyperopt_implicit.testing.oracles import DenseOperator, dense_derivatives, flatten, unflatten
from hyperopt_implicit.testing.specimens import Linear, gradient_descent, regression_data, seeded
from hyperopt_implicit.vectors import Params, clone

BATCHES = [regression_data(0), regression_data(1), regression_data(2)]
VALIDATION = regression_data(3)


def network(decay: float = 0.0, optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD) -> hi.BilevelProblem:
    """A network with an unused parameter, one on which L depends linearly, and an unused hyperparameter."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
            self.unused = nn.Parameter(torch.ones(2))
            self.slope = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).squeeze(-1)

    @hi.hyperparameter("unused", init=torch.ones(2))
    @hi.hyperparameter("shift", init=0.2)
    @hi.hyperparameter("decay", init=torch.full((3,), 0.3), constraint=constraints.positive)
    def training_loss(model: nn.Module, batch: Any, *, decay: Tensor, shift: Tensor, unused: Tensor) -> Tensor:
        x, y = batch
        penalty = (decay.sum() * next(model.parameters()).pow(4)).sum() + (decay * model.slope).sum()
        return (model(x) - shift * y).square().mean() + penalty

    def validation_loss(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return (model(x) - y).square().mean() + (model.slope.sum() - 1.0).square()

    return hi.BilevelProblem(
        seeded(Net), training_loss, validation_loss, optimizer=lambda p: optimizer(p, lr=0.1, weight_decay=decay)
    )


OPERATORS: dict[str, Callable[[hi.BilevelProblem], LossHessian]] = {
    "hessian": lambda problem: Hessian(problem, BATCHES),
    "gauss newton": lambda problem: GaussNewton(problem, BATCHES),
    "in turn": lambda problem: InTurn(lambda batch: Hessian(problem, [batch]), BATCHES),
    "gauss newton in turn": lambda problem: InTurn(lambda batch: GaussNewton(problem, [batch]), BATCHES),
}
every_operator = pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS.keys())


def random_like(params: Params) -> Params:
    return {name: torch.randn_like(p.detach()) for name, p in params.items()}


@contextmanager
def counted_backwards(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many inputs each call of autograd.grad was asked for."""
    calls: list[int] = []
    plain = torch.autograd.grad

    def counting(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(inputs))
        return plain(outputs, inputs, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", counting)
        yield calls


# -------------------------------------------------------------------------------------------------------------- values


@every_operator
@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_is_product_and_mixed_derivative(make, decay):
    """Of one operator, and of another that is asked for the two apart; the vector stays as it was."""
    problem = network(decay)
    vector, apart = random_like(problem.params), make(problem)
    given, operator = clone(vector), make(problem)
    for _ in range(4):  # once around the batches, where they come in turn
        product, mixed = apart @ vector, apart.mixed(vector)
        found = operator.multiply_and_mix(vector)
        assert_close(found, product, 1e-13, "the product")
        assert_close(operator.mixed(vector), mixed, 1e-13, "the mixed derivative")
        assert not any(x.requires_grad for x in (*found.values(), *operator.mixed(vector).values()))
    assert_close(vector, given, 0.0, "the vector")
    assert operator.products == apart.products == 4


@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_is_what_dense_derivatives_say(decay):
    """The optimizer's own decay included; rows of zeros for what is linear or unused."""
    problem = network(decay)
    here, vector = dense_derivatives(problem, BATCHES), random_like(problem.params)
    operator = Hessian(problem, BATCHES)
    v = flatten(vector)
    assert_close(
        operator.multiply_and_mix(vector), unflatten(here.hessian @ v + decay * v, problem.params), 1e-12, "the product"
    )
    mixed = operator.mixed(vector)
    assert_close(mixed, unflatten(here.mixed.T @ v, problem.hparams), 1e-12, "the mixed derivative")
    assert mixed["unused"].tolist() == [0.0, 0.0] and mixed["decay"].abs().min() > 0


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_damped(optimizer):
    """δ is added to the product alone; a decay that the optimizer decouples is no part of either."""
    problem = network(0.7, optimizer)
    here, vector, hessian = dense_derivatives(problem, BATCHES), random_like(problem.params), Hessian(problem, BATCHES)
    operator, v = Damped(hessian, 0.4), flatten(vector)
    diagonal = 0.4 + (0.7 if optimizer is torch.optim.SGD else 0.0)
    found = operator.multiply_and_mix(vector)
    assert_close(found, unflatten(here.hessian @ v + diagonal * v, problem.params), 1e-12, "the product")
    assert_close(hessian.mixed(vector), unflatten(here.mixed.T @ v, problem.hparams), 1e-12, "the mixed derivative")
    assert operator.products == hessian.products == 1


@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
def test_a_loss_that_is_linear(kind):
    """No graph to go back through: zeros for both."""

    @hi.hyperparameter("shift", init=torch.ones(2))
    def training_loss(model: nn.Module, batch: Tensor, *, shift: Tensor) -> Tensor:
        return model(batch).sum() + 0.0 * shift.sum()

    problem = hi.BilevelProblem(
        Linear(3), training_loss, lambda model, batch: model(batch).sum(), optimizer=gradient_descent
    )
    operator, vector = kind(problem, [torch.ones(2, 3).double()]), random_like(problem.params)
    assert operator.multiply_and_mix(vector)["weight"].tolist() == [0.0] * 3
    assert operator.mixed(vector)["shift"].tolist() == [0.0] * 2


def test_other_operators_only_multiply():
    matrix, vector = torch.diag(torch.tensor([1.0, 2.0])), {"w": torch.ones(2)}
    operator: LinearOperator = DenseOperator(matrix)
    assert operator.multiply_and_mix(vector)["w"].tolist() == [1.0, 2.0]
    assert operator.products == 1


# --------------------------------------------------------------------------------------------------------------- cost


@pytest.mark.parametrize("damping", [0.0, 0.4])
def test_both_are_one_backward(damping, monkeypatch):
    """Of as many inputs as w and λ have tensors; the mixed derivative is then free. Apart they are two."""
    problem = network(0.7)
    hessian, vector = Hessian(problem, BATCHES), random_like(problem.params)
    operator = Damped(hessian, damping) if damping else hessian
    weights, hparams = len(problem.params), len(problem.hparams)
    with counted_backwards(monkeypatch) as calls:
        operator.multiply_and_mix(vector)
        for _ in range(3):
            hessian.mixed(vector)
    assert calls == [weights + hparams]
    with counted_backwards(monkeypatch) as calls:
        other = clone(vector)
        _ = operator @ other
        hessian.mixed(other)
    assert calls == [weights, hparams]


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_heavy_ball_has_both_from_one_backward(curvature, monkeypatch):
    """A later call is one backward less than the same with the two apart; its hypergradient is the same to rounding."""
    problem = network(0.7)
    backend = hi.get_backend("heavy_ball", damping=1.0, curvature=curvature, tolerance=0.5, max_iterations=100)
    state = backend.hypergradient(problem, BATCHES, VALIDATION, {}).state
    with counted_backwards(monkeypatch) as together:
        found = backend.hypergradient(problem, BATCHES, VALIDATION, state)
    assert found.hvps == 1
    with monkeypatch.context() as patch:
        patch.setattr(LossHessian, "multiply_and_mix", LossHessian.__matmul__)
        with counted_backwards(monkeypatch) as apart:
            expected = backend.hypergradient(problem, BATCHES, VALIDATION, state)
    assert len(apart) - len(together) == (1 if curvature == "hessian" else 0)
    assert_close(found.gradients, expected.gradients, 1e-12)


# ---------------------------------------------------------------------------------------------------- never out of date


def test_only_the_very_vector_is_known(monkeypatch):
    """Another of equal values is computed anew, and so is one that took its place under the same names."""
    problem = network()
    operator, vector = Hessian(problem, BATCHES), random_like(problem.params)
    operator.multiply_and_mix(vector)
    expected = operator.mixed(vector)
    for other in (clone(vector), dict(vector)):
        with counted_backwards(monkeypatch) as calls:
            assert_close(operator.mixed(other), expected, 1e-13)
        assert len(calls) == 1
    double = {name: 2.0 * x for name, x in vector.items()}
    assert_close(operator.mixed(double), {name: 2.0 * x for name, x in expected.items()}, 1e-13)
    assert operator.mixed(vector) is expected


def test_products_in_between():
    """They change nothing of what is known; the next pair replaces it."""
    problem = network()
    first, second = random_like(problem.params), random_like(problem.params)
    operator, apart = Hessian(problem, BATCHES), Hessian(problem, BATCHES)
    operator.multiply_and_mix(first)
    _ = operator @ second
    assert_close(operator.mixed(first), apart.mixed(first), 1e-13)
    assert_close(operator.mixed(second), apart.mixed(second), 1e-13)
    operator.multiply_and_mix(second)
    assert_close(operator.mixed(first), apart.mixed(first), 1e-13)
    assert_close(operator.mixed(second), apart.mixed(second), 1e-13)


@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
def test_in_turn_forgets_with_the_batch(kind):
    """After a product with the next batch, the mixed derivative of the same vector is that batch's."""
    problem = network()
    vector, other = random_like(problem.params), random_like(problem.params)
    operator = InTurn(lambda batch: kind(problem, [batch]), BATCHES)
    for turn in range(5):
        expected = Hessian(problem, [BATCHES[turn % 3]]).mixed(vector)
        if turn % 2:
            _ = operator @ other
        else:
            operator.multiply_and_mix(vector)
        assert_close(operator.mixed(vector), expected, 1e-12)
    assert operator.products == 5
