"""Forward mode gives the derivative of reverse mode, for every inner optimizer, in memory that does not grow."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributions import constraints

import hyperopt_implicit as hi
from hyperopt_implicit.forward_mode import basis, push_forward, random_directions
from hyperopt_implicit.inner_loop import train_step
from hyperopt_implicit.testing.assertions import assert_unchanged
from hyperopt_implicit.testing.specimens import network_problem, regression_data, ridge_problem, seeded
from hyperopt_implicit.trajectory import Trajectory
from hyperopt_implicit_backends import Forward

from .test_optimizers import (
    BATCHES,
    assert_each_close,
    assert_same_state,
    every_optimizer,
    fresh_and_used,
    hypergradient,
    make_problem,
    train,
)

pytestmark = pytest.mark.usefixtures("float64")


def both(problem: hi.BilevelProblem, batches: Any = None) -> tuple[hi.Hypergradient, hi.Hypergradient]:
    """Forward and reverse, under the same seed."""
    found = []
    for backend in ("forward", "unrolled"):
        torch.manual_seed(1)
        found.append(hypergradient(problem, backend, batches))
    return found[0], found[1]


def assert_agree(problem: hi.BilevelProblem, batches: Any = None) -> None:
    forward, reverse = both(problem, batches)
    assert forward.status is reverse.status is hi.Status.CONVERGED
    assert all(float(g.norm()) > 0.0 for g in reverse.gradients.values())
    assert_each_close(forward.gradients, reverse.gradients, 1e-10)
    assert_same_state(forward.endpoint, reverse.endpoint)
    assert forward.training_loss == pytest.approx(reverse.training_loss, rel=1e-12)
    assert forward.validation_loss == pytest.approx(reverse.validation_loss, rel=1e-12)


# ------------------------------------------------------------------------------------------- every rule of torch.optim


@every_optimizer
@fresh_and_used
def test_optimizers(optimizer, used):
    """A hyperparameter of the loss and all that are tunable of the optimizer, with gradients that are exactly zero."""
    assert_agree(make_problem(optimizer, used, lr=0.05, weight_decay=0.1, **optimizer.tunable))


@every_optimizer
@fresh_and_used
def test_optimizers_whose_options_are_not_tuned(optimizer, used):
    assert_agree(make_problem(optimizer, used))


@every_optimizer
def test_a_gradient_of_zero_gives_no_nan(optimizer):
    """All second moments are zero; what depends on the shift is seen nevertheless where reverse mode sees it."""

    @hi.hyperparameter("shift", init=0.0)
    def training_loss(model, batch, *, shift):
        return (model.weight - shift).square().sum() * 0.5 + 0.5 * model.bias.square().sum()

    model = nn.Linear(1, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    problem = hi.BilevelProblem(model, training_loss, lambda model, batch: model.weight.sum(), optimizer=optimizer)
    forward, reverse = both(problem, [None] * 3)
    assert forward.status is hi.Status.CONVERGED
    assert_each_close(forward.gradients, reverse.gradients, 1e-12)


def test_groups_with_options_of_their_own():
    def optimizer(params):
        groups = [
            {"params": params[:2], "lr": 0.2, "momentum": 0.9},
            {"params": params[2:3], "weight_decay": 0.5, "nesterov": True, "momentum": 0.5},
            {"params": params[3:]},
        ]
        return torch.optim.SGD(groups, lr=0.05)

    assert_agree(make_problem(optimizer))


def test_gradient_descent_in_closed_form():
    """w_T = λ + (1 − α)^T (w₀ − λ) for L = ½(w − λ)², by hand."""
    steps, alpha, shift, start = 7, 0.3, 0.5, 2.0

    @hi.hyperparameter("lr", init=alpha, target="optimizer")
    @hi.hyperparameter("shift", init=shift)
    def training_loss(model, batch, *, shift):
        return 0.5 * (model.weight - shift).square().sum()

    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, start)
    problem = hi.BilevelProblem(
        model,
        training_loss,
        lambda model, batch: 0.5 * model.weight.square().sum(),
        optimizer=lambda params: torch.optim.SGD(params, lr=1.0),
    )
    result = hi.hypergradient(problem, "forward", training_batches=[None] * steps, validation_batch=None)
    end = shift + (1 - alpha) ** steps * (start - shift)
    assert result.gradients["shift"].item() == pytest.approx(end * (1 - (1 - alpha) ** steps), rel=1e-12)
    expected = -end * steps * (1 - alpha) ** (steps - 1) * (start - shift)
    assert result.gradients["lr"].item() == pytest.approx(expected, rel=1e-12)
    assert (result.iterations, result.hvps) == (steps, 2 * steps)


# --------------------------------------------------------------------------------------------------- models and losses


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 2, batch_first=True)
        self.out = nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.lstm(x[:, None].expand(-1, 4, -1))[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(3, 1, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x[:, None], x[None].expand(len(x), -1, -1), x[None].expand(len(x), -1, -1))[0][..., 0]


def small(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), *middle, nn.Linear(4, 1))


MODELS = {
    "tanh": lambda: small(nn.Tanh()),
    "lstm": Recurrent,
    "attention": Attention,
    "layer norm": lambda: small(nn.LayerNorm(4), nn.Tanh()),
    "group norm": lambda: small(nn.GroupNorm(2, 4), nn.Tanh()),
    "batch norm": lambda: small(nn.BatchNorm1d(4), nn.Tanh()),
    "dropout": lambda: small(nn.Dropout(0.5), nn.Tanh()),
    "weight norm": lambda: small(nn.Tanh(), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))),
    "spectral norm": lambda: small(nn.Tanh(), nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))),
}


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, partial(torch.optim.Adam, eps=0.1)], ids=["sgd", "adam"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_models(model, optimizer):
    """Among them those on which torch's own forward mode fails or, over reverse mode, is silently wrong."""

    @hi.hyperparameter("lr", init=0.05, constraint=constraints.positive, target="optimizer")
    @hi.hyperparameter("decay", init=0.1)
    @hi.hyperparameter("scale", init=1.0, constraint=constraints.positive)
    def training_loss(model, batch, *, decay, scale):
        x, y = batch
        loss = nn.functional.mse_loss(model(x).reshape(y.shape), scale * y)
        return loss + decay * sum(p.square().sum() for p in model.parameters())

    def validation_loss(model, batch):
        x, y = batch
        return nn.functional.huber_loss(model(x).reshape(y.shape), y)

    problem = hi.BilevelProblem(
        seeded(model), training_loss, validation_loss, optimizer=lambda params: optimizer(params, lr=0.05)
    )
    with assert_unchanged(problem, random_state=False):
        assert_agree(problem)


def test_a_hyperparameter_that_is_a_module_with_a_stopped_gradient():
    weigher = seeded(lambda: nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1), nn.Sigmoid()))

    @hi.hyperparameter("weigher", init=weigher)
    def training_loss(model, batch, *, weigher):
        x, y = batch
        losses = (model(x)[:, 0] - y).square()
        return (weigher(losses.detach()[:, None])[:, 0] * losses).mean()

    def validation_loss(model, batch):
        x, y = batch
        return (model(x)[:, 0] - y).square().mean()

    model = seeded(lambda: small(nn.Tanh()))
    assert_agree(
        hi.BilevelProblem(model, training_loss, validation_loss, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    )


def test_a_loss_linear_in_a_weight_and_in_a_hyperparameter():
    """∂L/∂w and ∂L/∂λ have no graph for them; both still move, and F depends on λ directly too."""

    @hi.hyperparameter("lr", init=0.1, target="optimizer")
    @hi.hyperparameter("slope", init=2.0)
    def training_loss(model, batch, *, slope):
        return 3.0 * model.bias.sum() + slope * model.weight.sum()

    def validation_loss(model, batch, *, slope):
        return (model.bias.square() + model.weight.square()).sum() + slope**2

    model = seeded(lambda: nn.Linear(1, 1))
    assert_agree(
        hi.BilevelProblem(
            model, training_loss, validation_loss, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5)
        )
    )


def test_only_the_optimizer_is_tuned():
    @hi.hyperparameter("lr", init=0.05, target="optimizer")
    def training_loss(model, batch):
        x, y = batch
        return (model(x)[:, 0] - y).square().mean()

    def validation_loss(model, batch):
        x, y = batch
        return (model(x)[:, 0] - y).square().mean()

    model = seeded(lambda: nn.Linear(3, 1))
    assert_agree(hi.BilevelProblem(model, training_loss, validation_loss, optimizer=torch.optim.Adam))


# ----------------------------------------------------------------------------------------- steps, as in plain training


@every_optimizer
@fresh_and_used
def test_the_steps_are_those_of_training(optimizer, used):
    problem = make_problem(optimizer, used, lr=0.05, weight_decay=0.1, **optimizer.tunable)
    sweep = push_forward(problem, BATCHES, basis(problem.hparams))
    values = problem.hyperparameters.values()
    losses = [train_step(problem, each, values) for each in BATCHES]
    assert sweep.losses == pytest.approx(losses, rel=1e-12)
    assert_same_state(sweep.endpoint, problem.inner_state(), 1e-11)


def test_dropout_draws_once_a_step():
    problem = ridge_problem(nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.5)))
    torch.manual_seed(1)
    sweep = push_forward(problem, BATCHES, basis(problem.hparams) * 3)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    train(problem, BATCHES)
    assert torch.equal(after, torch.get_rng_state())
    assert_same_state(sweep.endpoint, problem.inner_state())


def test_running_statistics_move_as_in_training():
    problem = network_problem(seeded(lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))))
    before = problem.inner_state()
    result = hypergradient(problem, "forward")
    assert_same_state(problem.inner_state(), before, 0.0)
    train(problem, BATCHES)
    assert_same_state(result.endpoint, problem.inner_state())


def test_tangents_are_linear_in_the_direction():
    problem = make_problem(torch.optim.Adam, lr=0.05)
    first, second = basis(problem.hparams)
    both = {name: 2.0 * first[name] - 3.0 * second[name] for name in first}
    x, y, z = push_forward(problem, BATCHES, [first, second, both]).tangents
    for name in x:
        torch.testing.assert_close(z[name], 2.0 * x[name] - 3.0 * y[name], rtol=1e-12, atol=1e-14)
    assert float(x["unused"].norm()) == 0.0


def test_memory_does_not_grow_with_the_steps():
    """Live tensors while a step runs, counted in the loss; reverse mode, counted the same way, keeps every iterate."""
    counts: list[int] = []

    @hi.hyperparameter("lr", init=0.01, target="optimizer")
    @hi.hyperparameter("decay", init=0.1)
    def training_loss(model, batch, *, decay):
        gc.collect()
        counts.append(sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()))
        return (model.weight - 1.0).square().sum() + decay * model.weight.square().sum()

    problem = hi.BilevelProblem(
        nn.Linear(3, 1), training_loss, lambda model, batch: model.weight.sum(), optimizer=torch.optim.Adam
    )
    push_forward(problem, [None] * 6, basis(problem.hparams))
    assert len(set(counts[2:])) == 1
    counts.clear()
    Trajectory(problem, [None] * 6)
    assert counts[-1] > counts[2]


# ------------------------------------------------------------------------------------------------ refusals and failures


def test_too_many_hyperparameters_are_refused():
    problem = ridge_problem(nn.Linear(3, 1), decay=torch.full((3,), 0.1))
    with pytest.raises(hi.BackendError) as caught:
        hypergradient(problem, Forward(max_directions=2))
    assert str(caught.value) == (
        "forward mode takes a product a step for each scalar hyperparameter, of which there may be at most "
        "max_directions=2; the problem has 3. Use 'unrolled', whose cost does not grow with them, or "
        "'forward_gradient', which takes random directions, or raise max_directions."
    )
    assert hypergradient(problem, Forward(max_directions=3)).hvps == 3 * len(BATCHES)


def test_options_without_a_derivative_are_refused():
    with pytest.raises(hi.ProblemError, match="'dampening' of SGD cannot be a hyperparameter"):
        hypergradient(make_problem(torch.optim.SGD, dampening=0.5), "forward")
    with pytest.raises(hi.ProblemError, match="got Adafactor"):
        hypergradient(make_problem(torch.optim.Adafactor), "forward")


def test_a_run_that_blows_up_is_not_finite():
    result = hypergradient(make_problem(lambda params: torch.optim.SGD(params, lr=1e200)), "forward")
    assert result.status is hi.Status.NON_FINITE
    assert result.iterations < len(BATCHES)
    assert result.hvps == result.iterations


# -------------------------------------------------------------------------------------------------- random directions


@pytest.mark.parametrize("count", [1, 3, 5, 9])
def test_orthonormal_directions(count):
    like = {"a": torch.zeros(2, 2), "b": torch.zeros(())}
    drawn = random_directions(like, count, orthogonal=True, generator=torch.Generator().manual_seed(0))
    rows = torch.stack([torch.cat([d["a"].flatten(), d["b"].flatten()]) for d in drawn.directions])
    k = min(count, 5)
    torch.testing.assert_close(rows @ rows.T, torch.eye(k), rtol=0, atol=1e-14)
    assert drawn.scale == 5 / k
    assert drawn.complete == (k == 5)


def test_data_in_single_precision():
    """Tangents are of the weights' dtype."""
    torch.set_default_dtype(torch.float32)
    x, y = regression_data(0)
    problem = ridge_problem(nn.Linear(4, 1))
    batches = [(x.float(), y.float())] * 5
    results = [
        hi.hypergradient(problem, backend, training_batches=batches, validation_batch=batches[0])
        for backend in ("forward", "unrolled")
    ]
    assert results[0].gradients["decay"].dtype == torch.float32
    assert_each_close(results[0].gradients, results[1].gradients, 1e-5)


def test_a_parameter_that_a_later_step_does_not_use_keeps_its_tangent():
    """torch.optim leaves it where it is, and so does its dependence on the hyperparameters."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

    @hi.hyperparameter("decay", init=0.3)
    def training_loss(model, batch, *, decay):
        used = (model.a, model.b) if batch else (model.a,)
        return sum(((1.0 + decay) * w.square() - w).sum() for w in used)

    problem = hi.BilevelProblem(
        Two(),
        training_loss,
        lambda model, batch: (model.a * model.b).sum(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    )
    found = [
        hi.hypergradient(problem, backend, training_batches=[True, True, False, False], validation_batch=None)
        for backend in ("forward", "unrolled")
    ]
    torch.testing.assert_close(found[0].gradients, found[1].gradients, rtol=1e-12, atol=0.0)
