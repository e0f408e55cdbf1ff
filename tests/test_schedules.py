"""An option of the inner optimizer with a value for each step, against torch.optim with the option set by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributions import constraints

import hyperopt_implicit as hi
from hyperopt_implicit.inner_loop import train_step
from hyperopt_implicit.problem import write_option
from hyperopt_implicit.testing.assertions import assert_unchanged
from hyperopt_implicit.testing.oracles import finite_differences
from hyperopt_implicit.testing.specimens import seeded
from hyperopt_implicit.trajectory import Trajectory
from hyperopt_implicit_backends import Evolution, ForwardGradient, Unrolled

from .test_optimizers import BATCHES, VALIDATION, Model, assert_each_close, assert_same_state

pytestmark = pytest.mark.usefixtures("float64")

RATES = torch.tensor([0.1, 0.05, 0.2, 0.02, 0.08, 0.03])
MOMENTA = torch.tensor([0.9, 0.5, 0.7, 0.2, 0.6, 0.8])

OPTIMIZERS = {
    "sgd momentum": (lambda params: torch.optim.SGD(params, lr=1.0, momentum=0.9), {"momentum": MOMENTA}),
    "adam": (lambda params: torch.optim.Adam(params, eps=0.01), {"beta1": MOMENTA, "weight_decay": 0.1 * RATES}),
}
every_optimizer = pytest.mark.parametrize(("optimizer", "more"), OPTIMIZERS.values(), ids=OPTIMIZERS)
SEES_TRAJECTORIES = {
    "unrolled": (Unrolled(), 1e-6),
    "forward": (hi.get_backend("forward"), 1e-6),
    "forward_gradient": (ForwardGradient(directions=40), 1e-6),
    "evolution": (Evolution(sigma=1e-4, pairs=40), 1e-5),
}
every_backend = pytest.mark.parametrize(("backend", "accuracy"), SEES_TRAJECTORIES.values(), ids=SEES_TRAJECTORIES)


def squared_error(model, batch):
    x, y = batch
    return (model(x)[:, 0] - y).square().mean()


def make_problem(optimizer: Any, **schedules: Any) -> hi.BilevelProblem:
    def training_loss(model, batch):
        return squared_error(model, batch)

    for name, init in schedules.items():
        constraint = constraints.unit_interval if name in ("momentum", "beta1") else constraints.positive
        training_loss = hi.hyperparameter(name, init=init, constraint=constraint, target="optimizer")(training_loss)
    return hi.BilevelProblem(seeded(Model), training_loss, squared_error, optimizer=optimizer)


def train_by_hand(problem: hi.BilevelProblem, batches: Any = BATCHES) -> None:
    """torch.optim's steps, with each option set before each step as a user would."""
    values = problem.hyperparameters.values()
    for t, each in enumerate(batches):
        for name, schedule in values.items():
            for group in problem.optimizer.param_groups:
                write_option(group, name, float(schedule.reshape(-1)[min(t, schedule.numel() - 1)]))
        train_step(problem, each, values)


def differences(problem: hi.BilevelProblem, batches: Any = BATCHES) -> dict[str, torch.Tensor]:
    start = problem.inner_state()

    def run() -> float:
        problem.load_inner_state(start)
        train_by_hand(problem, batches)
        return float(problem.validation_loss(VALIDATION))

    gradient = finite_differences(run, problem.hparams)
    problem.load_inner_state(start)
    problem.sync_optimizer()
    return gradient


def hypergradient(problem: hi.BilevelProblem, backend: Any, batches: Any = BATCHES) -> hi.Hypergradient:
    return hi.hypergradient(problem, backend, training_batches=batches, validation_batch=VALIDATION)


# --------------------------------------------------------------------------------------------------------- derivatives


@every_optimizer
@every_backend
def test_gradient_of_each_step(optimizer, more, backend, accuracy):
    problem = make_problem(optimizer, lr=RATES, **more)
    expected = differences(problem)
    with assert_unchanged(problem):
        result = hypergradient(problem, backend)
    assert result.gradients["lr"].shape == (len(RATES),)
    assert bool((expected["lr"] != 0.0).all())
    assert_each_close(result.gradients, expected, accuracy)


@every_backend
def test_the_last_value_stays(backend, accuracy):
    """A schedule that ends early; its last entry gathers the derivatives of all steps from there on."""
    problem = make_problem(OPTIMIZERS["adam"][0], lr=RATES[:3])
    result = hypergradient(problem, backend)
    assert_each_close(result.gradients, differences(problem), accuracy)
    full = hypergradient(make_problem(OPTIMIZERS["adam"][0], lr=RATES[[0, 1, 2, 2, 2, 2]]), backend)
    gathered = torch.stack([*full.gradients["lr"][:2], full.gradients["lr"][2:].sum()])
    assert_each_close(result.gradients, {"lr": gathered}, 1e-11 if accuracy == 1e-6 else accuracy)


@every_backend
def test_entries_beyond_the_steps_have_no_influence(backend, accuracy):
    problem = make_problem(OPTIMIZERS["sgd momentum"][0], lr=RATES)
    result = hypergradient(problem, backend, BATCHES[:4])
    assert_each_close(result.gradients, differences(problem, BATCHES[:4]), accuracy)
    assert float(result.gradients["lr"][4:].abs().max()) < 1e-8


def test_a_truncated_sweep_knows_where_it_is_in_the_schedule():
    """With last=2 of six steps, the entries of those two steps get what the whole sweep gives them; the others none."""
    problem = make_problem(OPTIMIZERS["sgd momentum"][0], lr=RATES)
    whole = hypergradient(problem, "unrolled")
    with pytest.warns(hi.HyperoptWarning, match="last=2 leaves out"):
        last = hypergradient(problem, Unrolled(last=2))
    torch.testing.assert_close(last.gradients["lr"][-2:], whole.gradients["lr"][-2:], rtol=1e-12, atol=0)
    assert last.gradients["lr"][:-2].tolist() == [0.0] * 4


def test_a_constant_schedule_is_one_value():
    """The gradient of one value is the sum over its schedule, whether it has no dimension or one."""
    one = make_problem(OPTIMIZERS["adam"][0], lr=0.05)
    several = make_problem(OPTIMIZERS["adam"][0], lr=torch.full((6,), 0.05))
    single = make_problem(OPTIMIZERS["adam"][0], lr=torch.full((1,), 0.05))
    gradients = [hypergradient(each, "unrolled").gradients["lr"] for each in (one, several, single)]
    assert [tuple(g.shape) for g in gradients] == [(), (6,), (1,)]
    for g in gradients[1:]:
        torch.testing.assert_close(g.sum(), gradients[0], rtol=1e-11, atol=0)


# --------------------------------------------------------------------------------------------------------------- steps


@every_optimizer
@every_backend
def test_the_endpoint_is_that_of_plain_training(optimizer, more, backend, accuracy):
    problem = make_problem(optimizer, lr=RATES[:4], **more)
    result = hypergradient(problem, backend)
    train_by_hand(problem)
    assert_same_state(result.endpoint, problem.inner_state(), 1e-11)


def test_a_schedule_through_zero_momentum_is_that_of_torch():
    """Without a constraint a momentum may be zero at a step; torch then leaves its buffer alone, and so do we."""
    schedule = torch.tensor([0.9, 0.0, 0.5, 0.5])
    problem = hi.BilevelProblem(
        seeded(Model),
        hi.hyperparameter("momentum", init=schedule, target="optimizer")(
            lambda model, batch: squared_error(model, batch)
        ),
        squared_error,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    )
    end = Trajectory(problem, BATCHES).endpoint
    train_by_hand(problem)
    assert_same_state(end, problem.inner_state())


def test_outside_a_trajectory_the_first_value_holds():
    problem = make_problem(OPTIMIZERS["sgd momentum"][0], lr=RATES, momentum=MOMENTA)
    group = problem.optimizer.param_groups[0]
    assert (group["lr"], group["momentum"]) == pytest.approx((0.1, 0.9))
    with torch.no_grad():
        problem.hparams["lr"] += torch.arange(6).add(1).log()
    problem.sync_optimizer()
    assert group["lr"] == pytest.approx(0.1)
    with torch.no_grad():
        problem.hparams["lr"] += torch.tensor(3.0).log()
    problem.sync_optimizer()
    assert group["lr"] == pytest.approx(0.3)


def test_a_rate_in_a_tensor_is_not_written_by_a_trajectory():
    rate = torch.tensor(1.0)
    problem = make_problem(lambda params: torch.optim.SGD(params, lr=rate), lr=RATES)
    result = hypergradient(problem, "forward")
    assert problem.optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.1)
    train_by_hand(problem)
    assert_same_state(result.endpoint, problem.inner_state(), 1e-11)


def test_optimize_tunes_the_schedule_of_the_whole_training():
    """L = ½‖w‖² from w = 1, with F the same: each rate grows towards 1, from which a single step would suffice."""

    @hi.hyperparameter("lr", init=torch.full((4,), 0.1), constraint=constraints.positive, target="optimizer")
    def training_loss(model, batch):
        return 0.5 * model.weight.square().sum()

    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    problem = hi.BilevelProblem(
        model,
        training_loss,
        lambda model, batch: 0.5 * model.weight.square().sum(),
        training_data=[0],
        validation_data=[0],
        optimizer=lambda params: torch.optim.SGD(params, lr=1.0),
    )
    result = hi.optimize(
        problem, "forward", outer_steps=30, inner_steps=4, restart=True, outer_lr=0.1, tracking=False, progress=False
    )
    assert result.hyperparameters["lr"].shape == (4,)
    assert bool((result.hyperparameters["lr"] > 0.3).all())
    assert result.history[-1].validation_loss < 0.1 * result.history[0].validation_loss


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("init", "found"),
    [
        (torch.full((2, 2), 0.1), "of shape (2, 2)"),
        (torch.zeros(0), "of shape (0,)"),
        (nn.Linear(1, 1), "a Linear"),
    ],
    ids=["matrix", "empty", "module"],
)
def test_other_shapes_are_refused(init, found):
    with pytest.raises(hi.DeclarationError) as caught:
        hi.BilevelProblem(
            nn.Linear(1, 1),
            hi.hyperparameter("lr", init=init, target="optimizer")(lambda model, batch: model.weight.sum()),
            lambda model, batch: model.weight.sum(),
            optimizer=torch.optim.SGD,
        )
    assert str(caught.value) == (
        "a hyperparameter of the optimizer must be one number, or a 1-D tensor with a value for each inner step; 'lr' "
        f"is {found}. Give it init=0.1, say, or init=torch.full((steps,), 0.1)."
    )
