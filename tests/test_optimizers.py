"""Inner optimizers as differentiable functions: steps against torch.optim's, derivatives against differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributions import constraints
from torch.optim import SGD

import hyperopt_implicit as hi
from hyperopt_implicit.inner_loop import InnerSteps, Iterate, leaves, train_step
from hyperopt_implicit.optimizers import update_rule
from hyperopt_implicit.testing.assertions import assert_close, assert_finite
from hyperopt_implicit.testing.oracles import finite_differences, unrolled_hypergradient
from hyperopt_implicit.testing.specimens import regression_data, seeded
from hyperopt_implicit.trajectory import Trajectory
from hyperopt_implicit.updates import adjoint_of

pytestmark = pytest.mark.usefixtures("float64")


@dataclass(frozen=True)
class Row:
    """An inner optimizer, and the options that can be hyperparameters beside lr and weight_decay."""

    name: str
    make: Callable[..., torch.optim.Optimizer]
    options: dict[str, Any] = field(default_factory=dict)
    tunable: dict[str, float] = field(default_factory=dict)

    def __call__(self, params: Any) -> torch.optim.Optimizer:
        return self.make(params, **{"lr": 0.05, **self.options})

    def __str__(self) -> str:
        return self.name


ADAM = {"beta1": 0.8, "beta2": 0.9, "eps": 0.01}
OPTIMIZERS = [
    Row("sgd", torch.optim.SGD),
    Row("sgd tensor", lambda params, lr, **options: SGD(params, lr=torch.tensor(lr), **options), {"weight_decay": 0.1}),
    Row("sgd momentum", torch.optim.SGD, {"momentum": 0.9}, {"momentum": 0.9}),
    Row("sgd nesterov", torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    Row("sgd dampening", torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3}),
    Row("sgd decay", torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}, {"momentum": 0.9}),
    Row("sgd maximize", torch.optim.SGD, {"lr": 0.01, "momentum": 0.5, "maximize": True}, {"momentum": 0.5}),
    Row("adam", torch.optim.Adam, {"betas": (0.8, 0.9), "eps": 0.01}, ADAM),
    Row("adam decay", torch.optim.Adam, {"weight_decay": 0.1}),
    Row("adam maximize", torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "maximize": True}),
    Row("adam amsgrad", torch.optim.Adam, {"betas": (0.8, 0.6), "eps": 0.01, "amsgrad": True}, ADAM),
    Row("adamw amsgrad", torch.optim.AdamW, {"betas": (0.8, 0.6), "weight_decay": 0.1, "amsgrad": True}),
    Row("adamw", torch.optim.AdamW, {"betas": (0.8, 0.9), "eps": 0.01, "weight_decay": 0.1}, ADAM),
    Row("adamax", torch.optim.Adamax, {"betas": (0.8, 0.6), "eps": 0.01}),
    Row("adamax maximize", torch.optim.Adamax, {"lr": 0.01, "weight_decay": 0.1, "maximize": True}),
    Row("rmsprop", torch.optim.RMSprop),
    Row("rmsprop momentum", torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9}, {"momentum": 0.9}),
    Row("rmsprop centered", torch.optim.RMSprop, {"centered": True, "alpha": 0.8, "weight_decay": 0.1}),
    Row("adagrad", torch.optim.Adagrad, {"lr_decay": 0.1}),
    Row("adagrad started", torch.optim.Adagrad, {"initial_accumulator_value": 0.5, "weight_decay": 0.1}),
    Row("nadam", torch.optim.NAdam),
    Row("nadam decoupled", torch.optim.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    Row("radam", torch.optim.RAdam, {"betas": (0.8, 0.9)}),
    Row("radam decoupled", torch.optim.RAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    Row("adadelta", torch.optim.Adadelta, {"lr": 1.0, "eps": 1e-3}),
    Row("asgd", torch.optim.ASGD),
    Row("asgd averaging", torch.optim.ASGD, {"lambd": 0.5, "t0": 2, "alpha": 0.6, "weight_decay": 0.1}),
    Row("asgd maximize", torch.optim.ASGD, {"lr": 0.01, "maximize": True}),
]
RPROP = [
    Row("rprop", torch.optim.Rprop),
    Row("rprop bounds", torch.optim.Rprop, {"etas": (0.3, 1.5), "step_sizes": (0.02, 0.08), "maximize": True}),
]
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
rprop_too = pytest.mark.parametrize("optimizer", OPTIMIZERS + RPROP, ids=str)
fresh_and_used = pytest.mark.parametrize("used", [0, 3], ids=["fresh", "used"])


class Model(nn.Module):
    """tanh of a linear map, summed; one parameter is used by no loss."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)
        self.outer = nn.Linear(2, 1)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.tanh(self.inner(x)))


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch whose last column is zero, so that three weights have a gradient of exactly zero."""
    x, y = regression_data(seed, rows=8, features=3)
    x[:, -1] = 0.0
    return x, y


BATCHES = [batch(seed) for seed in range(6)]
VALIDATION = batch(100)


def make_problem(optimizer: Callable[..., torch.optim.Optimizer], used: int = 0, **tuned: float) -> hi.BilevelProblem:
    """A network with a decay on its output layer; ``tuned`` options of the optimizer are hyperparameters too."""

    def training_loss(model, batch, *, decay):
        x, y = batch
        return (model(x)[:, 0] - y).square().mean() + decay * model.outer.weight.square().sum()

    def validation_loss(model, batch):
        x, y = batch
        return (model(x)[:, 0] - y).square().mean()

    loss = hi.hyperparameter("decay", init=0.1)(training_loss)
    for name, init in tuned.items():
        constraint = constraints.unit_interval if name in ("momentum", "beta1", "beta2") else constraints.positive
        loss = hi.hyperparameter(name, init=init, constraint=constraint, target="optimizer")(loss)
    problem = hi.BilevelProblem(seeded(Model), loss, validation_loss, optimizer=optimizer)
    train(problem, [batch(seed) for seed in range(10, 10 + used)])
    return problem


def train(problem: hi.BilevelProblem, batches: list[Any]) -> None:
    """Real steps of the real optimizer."""
    values = problem.hyperparameters.values()
    for each in batches:
        train_step(problem, each, values)


def hypergradient(problem: hi.BilevelProblem, backend: Any = "unrolled", batches: Any = None) -> hi.Hypergradient:
    return hi.hypergradient(
        problem, backend, training_batches=BATCHES if batches is None else batches, validation_batch=VALIDATION
    )


def differences(problem: hi.BilevelProblem, step: float = 1e-3) -> dict[str, torch.Tensor]:
    """dF/dλ by finite differences of whole runs of the real optimizer, from the present state."""
    start = problem.inner_state()

    def run() -> float:
        problem.load_inner_state(start)
        problem.sync_optimizer()
        train(problem, BATCHES)
        return float(problem.validation_loss(VALIDATION))

    gradient = finite_differences(run, problem.hparams, step=step)
    problem.load_inner_state(start)
    problem.sync_optimizer()
    return gradient


def assert_each_close(actual, expected, relative):
    """Each hyperparameter on its own: none hides behind a larger one."""
    for name in expected:
        assert_close({name: actual[name]}, {name: expected[name]}, relative, f"the hypergradient of {name!r}")


def assert_same_state(actual: hi.problem.InnerState, expected: hi.problem.InnerState, tolerance: float = 1e-12) -> None:
    """Parameters, buffers and the optimizer's whole state."""
    torch.testing.assert_close(actual.params, expected.params, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(actual.buffers, expected.buffers, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(actual.optimizer, expected.optimizer, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------------------ steps


@rprop_too
@fresh_and_used
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_trajectory_takes_the_steps_of_torch_optim(optimizer, used, dtype):
    """Weights, momenta and counters, to the bit, for parameters with, without and with a zero gradient."""
    batches = [tuple(x.to(dtype) for x in each) for each in BATCHES]
    torch.set_default_dtype(dtype)  # in which torch.optim keeps counters
    problem = make_problem(optimizer, used).copy(dtype)
    trajectory = Trajectory(problem, batches)
    train(problem, batches)
    assert_same_state(trajectory.endpoint, problem.inner_state(), 0.0)


@every_optimizer
def test_trajectory_takes_the_same_steps_with_tuned_options(optimizer):
    problem = make_problem(optimizer, lr=0.05, weight_decay=0.1, **optimizer.tunable)
    trajectory = Trajectory(problem, BATCHES)
    train(problem, BATCHES)
    assert_same_state(trajectory.endpoint, problem.inner_state(), 0.0)


@rprop_too
@fresh_and_used
def test_the_differentiable_update_is_the_same(optimizer, used):
    """Its values are those of torch.optim too, so that its derivative is of the right thing."""
    problem = make_problem(optimizer, used)
    steps, hparams = InnerSteps(problem), dict(problem.hparams)
    current = steps.start()
    for t, each in enumerate(BATCHES):
        _, gradient, _ = steps.gradients(leaves(current.params), hparams, each, dict(current.buffers), graph=False)
        params, slots = steps.update(t, current.params, gradient, current.slots, hparams)
        current = Iterate(params, slots, current.buffers)
    train(problem, BATCHES)
    assert_same_state(current.inner_state, problem.inner_state())


@every_optimizer
def test_training_goes_on_from_the_endpoint(optimizer):
    """Differentiate, move to where it led, go on: the same as never having stopped."""
    problem, uninterrupted = make_problem(optimizer), make_problem(optimizer)
    problem.load_inner_state(hypergradient(problem, batches=BATCHES[:3]).endpoint)
    train(problem, BATCHES[3:])
    train(uninterrupted, BATCHES)
    assert_same_state(problem.inner_state(), uninterrupted.inner_state())


def test_a_learning_rate_in_a_tensor_stays_in_it():
    """A compiled step reads it there."""
    rate = torch.tensor(0.05)
    problem = make_problem(lambda params: torch.optim.SGD(params, lr=rate), lr=0.05)
    with torch.no_grad():
        problem.hparams["lr"] += math.log(2)
    problem.sync_optimizer()
    assert problem.optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.1)


def test_groups_keep_their_options():
    def optimizer(params):
        groups = [
            {"params": params[:2], "lr": 0.2, "momentum": 0.9},
            {"params": params[2:3], "weight_decay": 0.5, "nesterov": True, "momentum": 0.5},
            {"params": params[3:]},
        ]
        return torch.optim.SGD(groups, lr=0.05)

    problem = make_problem(optimizer)
    trajectory = Trajectory(problem, BATCHES)
    expected = differences(problem)
    assert_each_close(hypergradient(problem).gradients, expected, 1e-7)
    train(problem, BATCHES)
    assert_same_state(trajectory.endpoint, problem.inner_state())


def test_a_tuned_option_counts_in_every_group():
    def optimizer(params):
        return torch.optim.Adam([{"params": params[:2]}, {"params": params[2:], "betas": (0.5, 0.6)}], eps=0.01)

    problem = make_problem(optimizer, lr=0.05, weight_decay=0.1, beta1=0.8)
    assert_each_close(hypergradient(problem).gradients, differences(problem), 1e-7)


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop", "adam"])
def test_a_buffer_that_is_no_longer_used_is_kept_as_torch_keeps_it(optimizer):
    make, options, unused = {
        "sgd": (torch.optim.SGD, {"momentum": 0.9}, {"momentum": 0.0}),
        "rmsprop": (torch.optim.RMSprop, {"momentum": 0.9}, {"momentum": 0.0}),
        "adam": (torch.optim.Adam, {"amsgrad": True}, {"amsgrad": False}),
    }[optimizer]
    problem = make_problem(lambda params: make(params, lr=0.01, **options), used=3)
    problem.optimizer.param_groups[0].update(unused)
    report = hypergradient(problem)
    train(problem, BATCHES)
    assert_same_state(report.endpoint, problem.inner_state())


# ------------------------------------------------------------------------------------------------------ derivatives


@pytest.mark.parametrize(
    "optimizer",
    [row for row in OPTIMIZERS if row.name in ("sgd", "sgd nesterov", "sgd decay", "adam", "adam decay", "adamw")],
    ids=str,
)
def test_complex_parameters(optimizer):
    """Of which torch.optim takes real and imaginary parts for themselves."""

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1.0 + 2.0j, -0.5 + 0.3j, 0.2 - 1.0j]))

    def training_loss(model, batch, *, decay):
        x, y = batch
        w = model.weight
        return (torch.tanh((x * w).abs().sum(1)) - y).square().mean() + decay * (w.imag.square() * w.real.exp()).sum()

    def validation_loss(model, batch):
        x, y = batch
        return ((x * model.weight).real.sum(1) - y).square().mean()

    loss = hi.hyperparameter("decay", init=0.3)(training_loss)
    problem = hi.BilevelProblem(Turned(), loss, validation_loss, optimizer=optimizer)
    train(problem, BATCHES[:2])
    assert_each_close(hypergradient(problem).gradients, differences(problem), 1e-7)


@every_optimizer
@fresh_and_used
def test_hypergradient_of_a_loss_hyperparameter(optimizer, used):
    """With gradients that are exactly zero, where the square root of a second moment has an infinite derivative."""
    problem = make_problem(optimizer, used)
    result = hypergradient(problem)
    assert result.status is hi.Status.CONVERGED
    assert_each_close(result.gradients, differences(problem), 1e-6)


@every_optimizer
@fresh_and_used
def test_hypergradients_of_the_optimizers_options(optimizer, used):
    """The learning rate, the weight decay and whatever else is tunable, all at once."""
    problem = make_problem(optimizer, used, lr=0.05, weight_decay=0.1, **optimizer.tunable)
    result = hypergradient(problem)
    assert result.status is hi.Status.CONVERGED
    assert set(result.gradients) == {"decay", "lr", "weight_decay", *optimizer.tunable}
    assert_each_close(result.gradients, differences(problem), 1e-6)


@every_optimizer
@fresh_and_used
def test_adjoints_written_out_are_those_of_autograd(optimizer, used, monkeypatch):
    """Those of SGD, Adam and AdamW, where no option is tuned; also where a batch leaves a layer without a gradient."""
    batches = [None, *BATCHES[:2], None, *BATCHES[2:], None]
    found = hypergradient(forgetful(optimizer, used), batches=batches).gradients
    monkeypatch.setattr("hyperopt_implicit.inner_loop.adjoint_of", lambda rule, groups: None)
    expected = hypergradient(forgetful(optimizer, used), batches=batches).gradients
    assert_each_close(found, expected, 1e-11)


def test_which_adjoints_are_written_out():
    for row in OPTIMIZERS:
        optimizer = row([nn.Parameter(torch.ones(1))])
        written = adjoint_of(update_rule(optimizer), optimizer.param_groups) is not None
        assert written is (isinstance(optimizer, SGD | torch.optim.Adam) and "amsgrad" not in row.options), row.name


def forgetful(optimizer: Callable[..., torch.optim.Optimizer], used: int) -> hi.BilevelProblem:
    """A loss that on the batch None does not touch the output layer."""
    problem = make_problem(optimizer, used)
    loss = problem.loss_source("training_loss")

    def training_loss(model, batch, *, decay):
        if batch is None:
            return decay * torch.tanh(model.inner(torch.ones(3))).square().sum()
        return loss(model, batch, decay=decay)

    return problem.copy(losses={"training_loss": training_loss})


@pytest.mark.parametrize("optimizer", RPROP, ids=str)
def test_rprop_has_a_derivative_with_respect_to_its_start_only(optimizer):
    """Its steps are where signs put them: what the loss depends on does not count, and the learning rate once."""
    problem = make_problem(optimizer, lr=0.05)
    with pytest.warns(hi.HyperoptWarning, match="Rprop looks at the signs of gradients only"):
        result = hypergradient(problem)
    assert_close({"lr": result.gradients["lr"]}, {"lr": differences(problem, 1e-5)["lr"]}, 1e-7)
    assert result.gradients["lr"] != 0.0
    assert result.gradients["decay"] == 0.0
    with pytest.warns(hi.HyperoptWarning, match="Use another inner optimizer, or 'evolution'"):
        assert hypergradient(make_problem(optimizer, used=3, lr=0.05)).gradients["lr"] == 0.0


@every_optimizer
def test_a_gradient_of_zero_gives_no_nan(optimizer):
    """Training at a point where every gradient vanishes: all second moments are zero."""

    @hi.hyperparameter("shift", init=0.0)
    def training_loss(model, batch, *, shift):
        return (model.weight - shift).square().sum() * 0.5 + 0.5 * model.bias.square().sum()

    model = nn.Linear(1, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    problem = hi.BilevelProblem(model, training_loss, lambda model, batch: model.weight.sum(), optimizer=optimizer)
    result = hi.hypergradient(problem, "unrolled", training_batches=[None] * 3, validation_batch=None)
    assert result.status is hi.Status.CONVERGED
    assert_finite(result.gradients)


def test_gradient_descent_in_closed_form():
    """w_T = λ + (1 − α)^T (w₀ − λ) for L = ½(w − λ)², differentiated by hand, for λ and for α."""
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
    result = hi.hypergradient(problem, "unrolled", training_batches=[None] * steps, validation_batch=None)
    end = shift + (1 - alpha) ** steps * (start - shift)
    assert result.gradients["shift"].item() == pytest.approx(end * (1 - (1 - alpha) ** steps), rel=1e-12)
    expected = -end * steps * (1 - alpha) ** (steps - 1) * (start - shift)
    assert result.gradients["lr"].item() == pytest.approx(expected, rel=1e-12)


def test_unrolled_equals_one_long_graph():
    problem = make_problem(lambda params: torch.optim.SGD(params, lr=0.1, weight_decay=0.2), lr=0.1)
    expected = unrolled_hypergradient(problem, BATCHES, VALIDATION)
    assert_each_close(hypergradient(problem).gradients, expected, 1e-12)


def test_a_run_that_blows_up_is_not_finite():
    problem = make_problem(lambda params: torch.optim.SGD(params, lr=1e200))
    result = hypergradient(problem)
    assert result.status is hi.Status.NON_FINITE
    assert not math.isfinite(result.training_loss + result.validation_loss)


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("make", "option", "message"),
    [
        (SGD, "dampening", r"'dampening' of SGD cannot .* lr, weight_decay, momentum; search .* as a knob"),
        (torch.optim.RMSprop, "alpha", r"'alpha' of RMSprop cannot .* lr, weight_decay, momentum"),
        (torch.optim.Adadelta, "rho", r"'rho' of Adadelta cannot .* lr, weight_decay"),
        (torch.optim.NAdam, "beta1", r"'beta1' of NAdam cannot"),
        (torch.optim.Adagrad, "eps", r"'eps' of Adagrad cannot"),
        (torch.optim.ASGD, "alpha", r"'alpha' of ASGD cannot .* lr, weight_decay; search"),
        (torch.optim.Adamax, "eps", r"'eps' of Adamax cannot .* lr, weight_decay; search"),
        (partial(SGD, momentum=0.9, nesterov=True), "momentum", r"momentum > 0, nesterov=False and dampening=0"),
        (partial(SGD, momentum=0.9, dampening=0.1), "momentum", r"momentum > 0, nesterov=False and dampening=0"),
    ],
)
def test_options_without_a_derivative_are_refused(make, option, message):
    problem = make_problem(make, **{option: 0.5})
    with pytest.raises(hi.ProblemError, match=message):
        hypergradient(problem)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            torch.optim.Adafactor,
            r"form: ASGD, Adadelta, .*SGD; got Adafactor \(it takes the norms .* lost\)\. Use .*'cg'",
        ),
        (
            lambda params: torch.optim.Muon([p for p in params if p.dim() == 2]),
            r"got Muon \(it computes its step in bfloat16, ",
        ),
        (torch.optim.LBFGS, r"got LBFGS \(it evaluates the loss as often as its line search needs"),
        (torch.optim.SparseAdam, r"got SparseAdam \(it takes sparse gradients"),
        (type("Mine", (SGD,), {}), r"got Mine\. Use one of these, or an implicit backend \('cg', 'neumann'\)"),
    ],
)
def test_optimizers_without_a_derivative_are_refused(make, message):
    with pytest.raises(hi.ProblemError, match=message):
        hypergradient(make_problem(make))
