"""Differences of trainings: values by hand, the bias in σ, mean and variance, metrics without a gradient, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import hyperopt_implicit as hi
from hyperopt_implicit.testing.assertions import assert_close, assert_unchanged
from hyperopt_implicit.testing.oracles import finite_differences
from hyperopt_implicit.testing.specimens import Linear, network_problem, seeded
from hyperopt_implicit_backends import Evolution

from .test_optimizers import BATCHES, VALIDATION, assert_each_close, assert_same_state, make_problem, train

pytestmark = pytest.mark.usefixtures("float64")

SIZE = 6
START = torch.linspace(0.2, 1.0, SIZE, dtype=torch.float64)
TARGET = torch.linspace(-1.0, 1.0, SIZE, dtype=torch.float64)


def shift_problem(validation_loss: Any = None, **data: Any) -> hi.BilevelProblem:
    """L = ½‖w − shift‖² with rate ½ from w = 0, so that w_T = (1 − 2⁻ᵀ)·shift; F = ½‖w − target‖² unless given."""

    @hi.hyperparameter("shift", init=START)
    def training_loss(model, batch, *, shift):
        return 0.5 * (model.weight - shift).square().sum()

    def half_square(model, batch):
        return 0.5 * (model.weight - TARGET).square().sum()

    return hi.BilevelProblem(
        Linear(SIZE),
        training_loss,
        half_square if validation_loss is None else validation_loss,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.5),
        **data,
    )


def estimate(problem: hi.BilevelProblem, steps: int = 3, **options: Any) -> hi.Hypergradient:
    return hi.hypergradient(
        problem, hi.get_backend("evolution", **options), training_batches=[None] * steps, validation_batch=None
    )


@pytest.mark.parametrize("sigma", [1e-3, 0.5, 10.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_exact_on_a_quadratic_whatever_sigma(steps, sigma):
    """dF/dshift = c(c·shift − target) with c = 1 − 2⁻ᵀ; a factor of σ would show a thousandfold."""
    problem = shift_problem()
    with assert_unchanged(problem):
        result = estimate(problem, steps, sigma=sigma)
    c = 1.0 - 0.5**steps
    assert_close(result.gradients, {"shift": c * (c * START - TARGET)}, 1e-11)
    assert (result.status, result.iterations, result.hvps) == (hi.Status.CONVERGED, SIZE, 0)
    assert result.validation_loss == pytest.approx(float(0.5 * (c * START - TARGET).square().sum()))


def test_the_bias_falls_as_the_square_of_sigma():
    """F = Σ sinh(w): the symmetric difference is right up to σ²F‴/6; halving σ leaves a quarter."""
    problem = shift_problem(lambda model, batch: model.weight.sinh().sum())
    c = 1.0 - 0.5**3
    truth = c * (c * START).cosh()
    errors = [float((estimate(problem, sigma=s).gradients["shift"] - truth).norm()) for s in (0.4, 0.2, 0.1)]
    assert 3.8 < errors[0] / errors[1] < 4.2
    assert 3.9 < errors[1] / errors[2] < 4.1


@pytest.mark.parametrize("pairs", [1, 4])
@pytest.mark.parametrize("orthogonal", [True, False])
def test_mean_and_variance(orthogonal, pairs):
    """On a quadratic the differences are exact, so only the directions vary: (m/k − 1)‖g‖² or ((m + 1)/k)‖g‖²."""
    problem = shift_problem()
    rows = []
    for seed in range(200):
        backend = Evolution(pairs=pairs, orthogonal=orthogonal, seed=seed)
        rows.append(backend.hypergradient(problem, [None], None, {}).gradients["shift"])
    found, truth = torch.stack(rows), 0.5 * (0.5 * START - TARGET)
    size = float(truth.square().sum())
    variance = (SIZE / pairs - 1.0 if orthogonal else (SIZE + 1.0) / pairs) * size
    squares = (found - truth).square().sum(1)
    assert float((found.mean(0) - truth).norm()) < 2.0 * math.sqrt(variance / len(found))
    assert abs(float(squares.mean()) - variance) < 3.5 * float(squares.std()) / math.sqrt(len(found))


# ------------------------------------------------------------------------------------------------ what F and L may be


def count(model: nn.Module, batch: Any) -> torch.Tensor:
    """How many weights lie below ¼, a whole number without a gradient."""
    return (model.weight < 0.25).sum()


def test_a_metric_in_steps():
    """Autograd has nothing to say; a σ that reaches over the steps sees that larger shifts are better."""
    gradient = estimate(shift_problem(count), sigma=0.2, pairs=SIZE, seed=1).gradients["shift"]
    assert float(gradient.sum()) < 0.0
    with pytest.raises(hi.HyperoptError):
        hi.hypergradient(shift_problem(count), "unrolled", training_batches=[None], validation_batch=None)
    flat = shift_problem(lambda model, batch: count(model, batch).double())
    with pytest.raises(hi.LossError, match=r"no graph to any of them.*backend that does without \('evolution'\)"):
        hi.hypergradient(flat, "unrolled", training_batches=[None], validation_batch=None)


def test_optimize_improves_a_metric_in_steps():
    problem = shift_problem(count, training_data=[0], validation_data=[0])
    with torch.no_grad():
        problem.hparams["shift"].fill_(0.1)
    result = hi.optimize(
        problem,
        {"name": "evolution", "sigma": 0.3},
        outer_steps=40,
        inner_steps=4,
        outer_lr=0.05,
        tracking=False,
        progress=False,
    )
    assert result.history[0].validation_loss == SIZE
    assert result.history[-1].validation_loss == 0


@pytest.mark.parametrize("kind", ["detached", "shape [1]", "integer", "boolean"])
def test_kinds_of_numbers(kind):
    def validation_loss(model, batch):
        value = 0.5 * (model.weight - TARGET).square().sum()
        return {
            "detached": lambda: value.detach(),
            "shape [1]": lambda: value.reshape(1),
            "integer": lambda: (1e9 * value).round().long(),
            "boolean": lambda: value > 0.0,
        }[kind]()

    gradient = estimate(shift_problem(validation_loss)).gradients["shift"]
    c = 1.0 - 0.5**3
    scale = {"integer": 1e9, "boolean": 0.0}.get(kind, 1.0)
    torch.testing.assert_close(gradient, scale * c * (c * START - TARGET), rtol=1e-5, atol=1e-10)


def test_a_training_loss_without_a_second_derivative():
    @hi.hyperparameter("shift", init=START)
    def training_loss(model, batch, *, shift):
        return _Once.apply(model.weight - shift)

    problem = hi.BilevelProblem(
        Linear(SIZE),
        training_loss,
        lambda m, b: m.weight.square().sum(),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.5),
    )
    assert_close(estimate(problem, 1).gradients, {"shift": 0.5 * START}, 1e-10)


class _Once(torch.autograd.Function):
    """½‖x‖², differentiable once."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 0.5 * x.square().sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


# ------------------------------------------------------------------------------------------------------- along training


def test_options_of_the_optimizer_that_have_no_derivative_in_torch():
    """RMSprop's alpha, which unrolled refuses, against finite differences of real training."""
    problem = make_problem(torch.optim.RMSprop, lr=0.05, alpha=0.9)
    start = problem.inner_state()

    def run() -> float:
        problem.load_inner_state(start)
        problem.sync_optimizer()
        train(problem, BATCHES)
        return float(problem.validation_loss(VALIDATION))

    expected = finite_differences(run, problem.hparams, step=1e-4)
    problem.load_inner_state(start)
    problem.sync_optimizer()
    result = hi.hypergradient(problem, Evolution(sigma=1e-4), training_batches=BATCHES, validation_batch=VALIDATION)
    assert_each_close(result.gradients, expected, 1e-5)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(4)], ids=["dropout", "batch norm"])
def test_draws_and_statistics_are_those_of_real_training(layer):
    """Every training under the same seed, with the running statistics that it ends with; the generator goes on once."""
    problem = network_problem(seeded(lambda: nn.Sequential(nn.Linear(3, 4), layer, nn.Tanh(), nn.Linear(4, 1))))
    start = problem.inner_state()

    def run() -> float:
        problem.load_inner_state(start)
        torch.manual_seed(1)
        train(problem, BATCHES)
        return float(problem.validation_loss(VALIDATION))

    expected = finite_differences(run, problem.hparams)
    problem.load_inner_state(start)
    torch.manual_seed(1)
    result = hi.hypergradient(problem, Evolution(sigma=1e-4), training_batches=BATCHES, validation_batch=VALIDATION)
    after = torch.get_rng_state()
    assert_each_close(result.gradients, expected, 1e-6)
    run()
    assert torch.equal(after, torch.get_rng_state())
    assert_same_state(result.endpoint, problem.inner_state())


# ---------------------------------------------------------------------------------------------------- seeds, refusals


def test_seed_none_draws_from_the_global_generator():
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(estimate(shift_problem(), pairs=2, seed=None).gradients["shift"])
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


def test_the_directions_change_from_call_to_call():
    problem, backend = shift_problem(), Evolution(pairs=2)
    first = backend.hypergradient(problem, [None], None, {})
    second = backend.hypergradient(problem, [None], None, first.state)
    assert (first.state, second.state) == ({"calls": 1}, {"calls": 2})
    assert not torch.allclose(first.gradients["shift"], second.gradients["shift"])


def test_a_side_that_blows_up_is_not_finite():
    problem = shift_problem(lambda model, batch: (model.weight - 0.01).log().sum())
    result = Evolution(sigma=10.0).hypergradient(problem, [None], None, {})
    assert result.status is hi.Status.NON_FINITE
    assert math.isfinite(result.validation_loss)


@pytest.mark.parametrize(("option", "value"), [("sigma", 0.0), ("pairs", 0), ("seed", -1)])
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(hi.BackendError, match=f"Evolution option '{option}'"):
        hi.get_backend("evolution", **{option: value})
