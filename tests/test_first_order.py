"""Methods without second derivatives: what all four keep to, and finite differences of one step against its truth."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributions import constraints

import hyperopt_implicit as hi
from hyperopt_implicit.errors import HyperoptWarning
from hyperopt_implicit.testing.assertions import assert_close, assert_unchanged, relative_error
from hyperopt_implicit.testing.oracles import dense_derivatives, flatten, unflatten
from hyperopt_implicit.testing.specimens import (
    TRAINING,
    VALIDATION,
    Linear,
    half_mean_square,
    logistic_problem,
    network_problem,
    regression_data,
    ridge_problem,
    seeded,
)

from .ridge import best_decay, loss_at, ridge

FOUR = ["finite_difference", "sama", "f2sa", "bome"]
all_four = pytest.mark.parametrize("name", FOUR)


def start(problem, value=0.5):
    """Weights away from the minimum and from zero."""
    for i, p in enumerate(problem.params.values()):
        p.data.copy_(torch.linspace(-value, value + 0.1 * i, p.numel(), dtype=p.dtype).reshape(p.shape))
    return problem


def compute(problem, backend, batches=(TRAINING,), validation=VALIDATION, **rest):
    return hi.hypergradient(problem, backend, training_batches=list(batches), validation_batch=validation, **rest)


def outer_gradient(problem, at, validation=VALIDATION):
    """∂F/∂w at weights [n]."""
    w = at.clone().requires_grad_()
    loss = problem.functional_validation_loss(unflatten(w, problem.params), problem.hparams, validation)
    return torch.autograd.grad(loss, w)[0]


# ------------------------------------------------------------------------------------------------------- all four


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(6, 3, mode="mean")

    def forward(self, x):
        return self.bag(x).sum(1)


class Distances(nn.Module):
    def __init__(self):
        super().__init__()
        self.centres = nn.Parameter(torch.randn(3, 2))

    def forward(self, x):
        return torch.cdist(x, self.centres).sum(1)


class Sequences(nn.Module):
    def __init__(self):
        super().__init__()
        self.scores = nn.Parameter(torch.randn(5, 2, 4))

    def forward(self, _):
        lengths = torch.full((2,), 5), torch.full((2,), 2)
        return torch.nn.functional.ctc_loss(self.scores.log_softmax(2), torch.tensor([[1, 2], [3, 1]]), *lengths)


def undifferentiable(kind):
    """A regression through an operator that has no second derivative, with a decay."""
    build = {"bag": Bag, "cdist": Distances, "ctc": Sequences}[kind]
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(6, (8, 3), generator=generator) if kind == "bag" else torch.randn(8, 2, generator=generator)
    y = torch.randn(8, generator=generator).double()
    batch = (x if kind == "bag" else x.double(), y)

    @hi.hyperparameter("decay", init=0.5, constraint=constraints.positive)
    def training_loss(model, batch, *, decay):
        return (model(batch[0]) - batch[1]).square().mean() + decay * sum(p.square().sum() for p in model.parameters())

    def validation_loss(model, batch):
        return (model(batch[0]) - 0.9 * batch[1]).square().mean()

    model = seeded(build)
    data = {"training_data": [batch], "validation_data": [batch]}
    return hi.BilevelProblem(
        model, training_loss, validation_loss, optimizer=lambda params: torch.optim.SGD(params, lr=0.02), **data
    )


@all_four
@pytest.mark.parametrize("kind", ["bag", "cdist", "ctc"])
def test_no_second_derivative_is_taken(name, kind):
    problem = undifferentiable(kind)
    (batch,) = problem.training_data
    with pytest.raises(hi.HyperoptError):
        compute(problem, "cg", [batch], batch)
    with assert_unchanged(problem):
        first = compute(problem, name, [batch], batch)
        second = compute(problem, name, [batch], batch, state=first.state)
    assert second.status is hi.Status.TRUNCATED
    assert second.hvps == 0
    assert name == "bome" or abs(second.gradients["decay"]) > 0  # κ = 0 is an answer of its own


@all_four
def test_a_run_lowers_the_validation_loss(name):
    problem = undifferentiable("bag")
    result = hi.optimize(
        problem, name, outer_steps=60, inner_steps=5, warmup_steps=100, outer_lr=0.05, tracking=False, progress=False
    )
    assert result.history[-1].validation_loss < 0.95 * result.history[0].validation_loss


@all_four
def test_direct_term_is_exact_where_the_weights_have_no_say(name):
    def validation_loss(model, batch, *, decay):
        return decay**3

    problem = start(ridge_problem(validation_loss=validation_loss))
    decay = problem.hyperparameters()["decay"]
    (expected,) = torch.autograd.grad(decay**3, list(problem.hparams.values()))
    result = compute(problem, name)
    assert torch.equal(result.gradients["decay"], expected)


@pytest.mark.parametrize("name", ["finite_difference", "sama", "f2sa"])  # bome weighs it: see its own tests
def test_direct_term_is_added_to_what_comes_through_the_weights(name):
    def validation_loss(model, batch, *, decay):
        return half_mean_square(model, batch) + decay**3

    problem = start(ridge_problem(validation_loss=validation_loss))
    (direct,) = torch.autograd.grad(problem.hyperparameters()["decay"] ** 3, list(problem.hparams.values()))
    without = compute(start(ridge_problem()), name).gradients["decay"]
    assert abs(without) > 1e-3
    assert_close(compute(problem, name).gradients, {"decay": without + direct}, 1e-11)


@pytest.mark.parametrize(
    "backend", [*FOUR, {"name": "finite_difference", "lookahead": False}], ids=[*FOUR, "without lookahead"]
)
def test_losses_reported_are_those_at_the_weights(backend):
    """L averaged over the batches, without what the optimizer adds; once more with state carried."""
    problem = start(ridge_problem(optimizer=lambda params: torch.optim.SGD(params, lr=0.1, weight_decay=0.4)))
    batches = [TRAINING, regression_data(2)]
    training = sum(problem.training_loss(batch).item() for batch in batches) / 2.0
    validation = problem.validation_loss(VALIDATION).item()
    first = compute(problem, backend, batches)
    second = compute(problem, backend, batches, state=first.state)
    for result in (first, second):
        assert (result.training_loss, result.validation_loss) == pytest.approx((training, validation), rel=1e-12)


@pytest.mark.parametrize("name", ["f2sa", "bome"])
def test_carried_weights_of_other_shapes_are_dropped(name):
    problem = start(ridge_problem())
    expected = compute(problem, name)
    for weights in ({"weight": torch.zeros(3, dtype=torch.float64)}, {"other": torch.zeros(4, dtype=torch.float64)}):
        with pytest.warns(HyperoptWarning, match="the state carried from earlier outer steps must fit the model"):
            found = compute(problem, name, state={"weights": weights})
        assert_close(found.gradients, expected.gradients, 0.0)
        assert_close(found.state["weights"], expected.state["weights"], 0.0)


@all_four
def test_running_statistics_and_generators_stay(name):
    layers = lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))  # noqa: E731
    problem = network_problem(seeded(layers))
    with assert_unchanged(problem):
        compute(problem, name, [regression_data(0, features=2)] * 2, regression_data(1, features=2))


@all_four
def test_dropout_draws_once_a_batch(name):
    """As plain training would, however many gradients are taken; and the same masks each time."""
    problem = start(ridge_problem(nn.Sequential(Linear(4), nn.Dropout(0.5))))
    batches = [TRAINING, regression_data(2)]
    backend = hi.get_backend(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for batch in batches:
            problem.training_loss(batch)
        drawn = torch.get_rng_state()
        torch.manual_seed(1)
        backend.hypergradient(problem, batches, VALIDATION, {})
        assert torch.equal(torch.get_rng_state(), drawn)


@all_four
def test_loss_that_is_not_finite(name):
    problem = start(ridge_problem(extra=lambda model: model.weight.sum() * float("inf")))
    result = hi.get_backend(name).hypergradient(problem, [TRAINING], VALIDATION, {})
    assert result.status is hi.Status.NON_FINITE


@all_four
def test_weights_without_influence(name):
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    expected = compute(start(ridge_problem()), name)
    problem = ridge_problem(Linear(4, unused=unused), also=hi.hyperparameter("unused", init=1.0))
    problem.params["weight"].data.copy_(torch.linspace(-0.5, 0.5, 4, dtype=torch.float64))
    found = compute(problem, name).gradients
    assert_close({"decay": found["decay"]}, expected.gradients, 1e-12)
    assert found["unused"] == 0


@all_four
def test_hyperparameter_of_the_optimizer_is_refused(name):
    rate = hi.hyperparameter("lr", init=0.1, constraint=constraints.positive, target="optimizer")
    with pytest.raises(hi.BackendError, match="'lr' is a hyperparameter of the inner optimizer"):
        compute(ridge_problem(also=rate), name)


@pytest.mark.parametrize(
    ("name", "option", "value", "message"),
    [
        (
            "finite_difference",
            "epsilon",
            0.0,
            "FiniteDifference option 'epsilon': input should be greater than 0; got 0.0.",
        ),
        ("sama", "alpha", -1.0, "Sama option 'alpha': input should be greater than 0; got -1.0."),
        ("f2sa", "penalty", 0.0, "F2SA option 'penalty': input should be greater than 0; got 0.0."),
        ("f2sa", "steps", 0, "F2SA option 'steps': input should be greater than or equal to 1; got 0."),
        (
            "f2sa",
            "penalty_growth",
            -1.0,
            "F2SA option 'penalty_growth': input should be greater than or equal to 0; got -1.0.",
        ),
        ("bome", "eta", 0.0, "Bome option 'eta': input should be greater than 0; got 0.0."),
        ("bome", "steps", 0, "Bome option 'steps': input should be greater than or equal to 1; got 0."),
        (
            "finite_difference",
            "step_size",
            0.0,
            "FiniteDifference option 'step_size': input should be 'lr'; input should be greater than 0; got 0.0.",
        ),
        (
            "f2sa",
            "step_size",
            -0.1,
            "F2SA option 'step_size': input should be 'lr' or 'auto'; input should be greater than 0; got -0.1.",
        ),
        (
            "bome",
            "step_size",
            0.0,
            "Bome option 'step_size': input should be 'lr'; input should be greater than 0; got 0.0.",
        ),
    ],
)
def test_options_that_cannot_hold(name, option, value, message):
    with pytest.raises(hi.BackendError) as caught:
        hi.get_backend(name, **{option: value})
    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["f2sa", "bome"])
def test_ascent_is_refused(name):
    problem = ridge_problem(optimizer=lambda params: torch.optim.SGD(params, lr=0.1, maximize=True))
    with pytest.raises(hi.BackendError) as caught:
        compute(problem, name)
    assert str(caught.value) == (
        f"backend {name!r} descends on the training loss, and the inner optimizer climbs on it (maximize=True). "
        "Return the negative of the loss and leave maximize out."
    )


# --------------------------------------------------------------------------------------------- finite_difference


@pytest.mark.parametrize("lookahead", [True, False])
def test_by_hand_on_a_quadratic(lookahead):
    """Third derivatives are zero, so that the difference is exact: −ξ M v with M = diag(∂decay/∂λ · w)."""
    problem = start(ridge_problem(decay=torch.tensor([0.1, 0.3, 1.0, 2.0])))
    x, y = TRAINING
    w = problem.params["weight"].detach()
    decay = problem.hyperparameters()["decay"].detach()
    slope = x.T @ (x @ w - y) / len(y) + decay * w
    ahead = w - 0.7 * slope if lookahead else w
    v = VALIDATION[0].T @ (VALIDATION[0] @ ahead - VALIDATION[1]) / len(VALIDATION[1])
    expected = {"decay": -0.7 * decay * w * v}  # positive is reached by exp: ∂decay/∂λ = decay
    result = compute(problem, hi.get_backend("finite_difference", step_size=0.7, lookahead=lookahead))
    assert_close(result.gradients, expected, 1e-11)
    assert result.status is hi.Status.TRUNCATED
    assert result.validation_loss == pytest.approx(float(problem.validation_loss(VALIDATION)), rel=1e-12)


def test_decay_of_the_optimizer_and_rates_by_group():
    """u_i = ξ_i v_i, and the step ahead shrinks the weights as training would; the momentum is left out."""
    extra = nn.Parameter(torch.full((2,), 0.3, dtype=torch.float64))
    model = Linear(4, other=extra)

    def groups(params):
        each = [{"params": [params[0]], "lr": 0.2}, {"params": [params[1]], "lr": 0.05, "weight_decay": 0.4}]
        return torch.optim.SGD(each, lr=1.0)

    @hi.hyperparameter("scale", init=torch.tensor([0.7, 1.3], dtype=torch.float64))
    def training_loss(model, batch, *, scale):
        shift = (scale * model.other).sum()
        return 0.5 * (model(batch[0]) + shift - scale[0] * batch[1]).square().mean()

    def validation_loss(model, batch):
        return 0.5 * (model(batch[0]) + model.other.sum() - batch[1]).square().mean()

    problem = start(hi.BilevelProblem(model, training_loss, validation_loss, optimizer=groups))
    exact = compute(problem, "unrolled")
    found = compute(problem, hi.get_backend("finite_difference", epsilon=1e-4))
    assert_close(found.gradients, exact.gradients, 1e-8)


def nonlinear():
    problem = start(logistic_problem())
    training = (TRAINING[0], TRAINING[1].sign())
    return problem, training, (VALIDATION[0], VALIDATION[1].sign())


def test_error_falls_with_the_square_of_epsilon_to_that_of_one_unrolled_step():
    problem, training, validation = nonlinear()
    exact = compute(problem, "unrolled", [training], validation)
    errors = [
        relative_error(
            compute(problem, hi.get_backend("finite_difference", epsilon=epsilon), [training], validation).gradients,
            exact.gradients,
        )
        for epsilon in (0.1, 0.05, 0.025)
    ]
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(4.0, rel=0.05)
    assert (
        relative_error(compute(problem, "finite_difference", [training], validation).gradients, exact.gradients) < 1e-4
    )


def test_several_batches_are_averaged_in_step_and_difference():
    problem, first, validation = nonlinear()
    second = (regression_data(5)[0], regression_data(5)[1].sign())
    derivatives = dense_derivatives(problem, [first, second])
    v = outer_gradient(problem, flatten(problem.params).detach() - 0.1 * derivatives.gradient, validation)
    expected = unflatten(-0.1 * derivatives.mixed.T @ v, problem.hparams)
    result = compute(problem, hi.get_backend("finite_difference", epsilon=1e-4), [first, second], validation)
    assert_close(result.gradients, expected, 1e-7)


def test_ascent_turns_the_step_around():
    problem, training, validation = nonlinear()
    expected = compute(problem, "unrolled", [training], validation)
    climbing = start(logistic_problem())
    climbing.optimizer.param_groups[0].update(maximize=True)
    exact = compute(climbing, "unrolled", [training], validation)
    assert relative_error(exact.gradients, expected.gradients) > 1.0
    found = compute(climbing, hi.get_backend("finite_difference", epsilon=1e-4), [training], validation)
    assert_close(found.gradients, exact.gradients, 1e-7)


def test_dropout_masks_are_the_same_on_both_sides():
    """Else the difference would be of order 1/ε; and they are those that training would have drawn."""
    problem = start(ridge_problem(nn.Sequential(Linear(4), nn.Dropout(0.5)), decay=torch.tensor([0.1, 0.3, 1.0, 2.0])))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        expected = compute(problem, "unrolled")
        torch.manual_seed(1)
        found = compute(problem, "finite_difference")
    assert_close(found.gradients, expected.gradients, 1e-9)


@pytest.mark.parametrize("name", FOUR)
def test_best_decay_of_ridge_regression(name):
    """One hyperparameter, whose gradient has the right sign: the optimum is that of the exact gradient."""
    options = {"f2sa": {"penalty": 100.0, "steps": 5}, "bome": {"step_size": 0.02, "steps": 30}}.get(name, {})
    problem = ridge()
    result = hi.optimize(
        problem, {"name": name, **options}, outer_steps=120, inner_steps=5, warmup_steps=50, outer_lr=0.1,
        tracking=False, progress=False,
    )  # fmt: skip
    reached = float(result.hyperparameters["decay"])
    allowed = 2e-3 if name == "bome" else 1e-4  # the zero of bome's number is not that of the gradient
    assert loss_at(reached) - loss_at(best_decay()) < allowed * loss_at(best_decay()), (reached, best_decay())
