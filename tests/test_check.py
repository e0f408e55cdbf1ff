"""``check`` says right where a hypergradient is right, and finds and names what is wrong: faults planted one by one."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributions import constraints

import hyperopt_implicit as hi
from hyperopt_implicit import updates
from hyperopt_implicit.diagnostics.truth import Slope
from hyperopt_implicit.testing.assertions import assert_unchanged
from hyperopt_implicit.testing.oracles import train_to_minimum
from hyperopt_implicit.testing.specimens import (
    TRAINING,
    VALIDATION,
    Linear,
    half_mean_square,
    network_problem,
    quadratic_problem,
    regression_data,
    ridge_problem,
    seeded,
)
from hyperopt_implicit.vectors import add, clone, scale_, zeros_like
from hyperopt_implicit_backends import ConjugateGradient, Exact, Unrolled

SECOND = regression_data(2)


def decay_in_both(model, batch, *, decay):
    """F with a direct term."""
    return half_mean_square(model, batch) + 0.03 * (decay * next(model.parameters()).square()).sum()


def ridge(*, solved=True, **options):
    problem = ridge_problem(decay=torch.tensor([0.1, 0.3, 1.0, 2.0]), validation_loss=decay_in_both, **options)
    problem.training_data, problem.validation_data = [TRAINING, SECOND], [VALIDATION]
    if solved:
        train_to_minimum(problem, [TRAINING, SECOND])
    return problem


# ------------------------------------------------------------------------------------------------- nothing is wrong


@pytest.mark.parametrize("backend", ["exact", "cg", {"name": "neumann", "terms": 200}])
def test_right_at_a_minimum(backend):
    report = hi.check(ridge(), backend)
    assert report.ok, report
    assert report.relative_error < 1e-3 and report.cosine > 0.999999
    assert report.verdict.endswith("of finite differences of the whole inner problem.")


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_right_through_training(optimizer):
    rate = hi.hyperparameter("lr", init=0.1, constraint=constraints.positive, target="optimizer")
    report = hi.check(ridge(solved=False, also=rate, optimizer=lambda p: optimizer(p, lr=0.1)), "unrolled")
    assert report.ok, report
    assert report.relative_error < 1e-12 and report.parts["the losses' own derivatives"] < 1e-7
    assert [slope.name for slope in report.measured.slopes] == ["lr", "decay", "all"]


def test_finite_differences_are_those_of_the_closed_form():
    """dF/dλ of ½‖w − 1‖² with w = H⁻¹(b + λ), along each direction, to ten digits."""
    matrix = torch.diag(torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64))
    problem = quadratic_problem(matrix)
    report = hi.check(problem, "exact", training_batches=[None], validation_batches=[None])
    w = torch.linalg.solve(matrix, torch.ones(3, dtype=torch.float64))
    expected = torch.linalg.solve(matrix, w - 1.0)
    (slope,) = report.measured.slopes
    assert abs(slope.value - float(expected @ slope.direction["shift"])) < 1e-10
    assert slope.uncertainty < 1e-8


def test_steps_tell_truncation_from_rounding():
    """The quotients' errors fall with h² first, and the step that is chosen is not the largest."""
    report = hi.check(ridge(), "exact")
    (slope,) = report.measured.slopes
    errors = [abs(q - slope.value) for q in slope.quotients]
    assert errors[0] / errors[1] == pytest.approx(100.0, rel=0.2)
    assert slope.best_step < slope.steps[0]


def test_right_through_a_schedule():
    """One rate a step; finite differences are of training under the same schedule."""
    rates = torch.tensor([0.3, 0.02, 0.2, 0.05])
    rate = hi.hyperparameter("lr", init=rates, constraint=constraints.positive, target="optimizer")
    report = hi.check(ridge(solved=False, also=rate), "unrolled", inner_steps=4)
    assert report.ok, report
    assert report.parts["the losses' own derivatives"] < 1e-6


def test_slopes_are_extrapolated_from_the_steps_that_agree_best():
    """Quotients a + b·h² give a; the last one, lost to rounding, has no part in it, and the gap is what is doubted."""
    steps = (1e-1, 1e-2, 1e-3, 1e-4)
    found = Slope("all", {}, steps, (*(2.0 + 3.0 * h**2 for h in steps[:3]), 2.001))
    assert found.value == pytest.approx(2.0, rel=1e-14)
    assert found.uncertainty == pytest.approx(3.0 * (1e-4 - 1e-6), rel=1e-9)
    assert found.best_step == 1e-3


def test_decay_of_the_optimizer_is_a_part_of_the_inner_problem():
    """The minimum is that of L + ½·weight_decay·‖w‖², and so are the differences and the theorem there."""
    problem = ridge(solved=False, optimizer=lambda params: torch.optim.SGD(params, lr=0.1, weight_decay=0.5))
    problem.training_data = [TRAINING]
    report = hi.check(problem, "exact", warmup_steps=500)
    assert report.ok, report
    assert report.measured.minimum.solved
    assert report.measured.training_gradient_norm < 1e-9
    assert report.relative_error < 1e-6 and report.parts["the losses' own derivatives"] < 1e-6


def test_decay_of_the_optimizer_where_minima_are_found_with_first_derivatives():
    """cdist has no second derivative: L-BFGS goes by values and gradients, in which the decay is a term."""
    place = torch.ones(1, 4, dtype=torch.float64)
    problem = ridge(
        solved=False,
        extra=lambda model: 0.1 * torch.cdist(model.weight[None], place).sum(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1, weight_decay=0.5),
    )
    problem.training_data = [TRAINING]
    report = hi.check(problem, {"name": "f2sa", "penalty": 1e4, "steps": 200, "step_size": "auto"}, warmup_steps=500)
    assert report.measured.minimum.solved, report
    assert report.relative_error < 0.01, report


def test_problem_is_left_alone():
    problem = ridge()
    with assert_unchanged(problem):
        hi.check(problem, "cg", warmup_steps=3)
        hi.check(problem, "unrolled", warmup_steps=3)


def test_random_layers_are_held_still():
    problem = ridge_problem(nn.Sequential(Linear(4), nn.Dropout(0.5)), decay=0.3)
    report = hi.check(problem, "exact", training_batches=[TRAINING], validation_batches=[VALIDATION], warmup_steps=0)
    assert report.parts["the losses' own derivatives"] < 1e-6
    through = hi.check(problem, "unrolled", training_batches=[TRAINING] * 3, validation_batches=[VALIDATION])
    assert through.ok and through.relative_error < 1e-12, through


def test_float32_is_compared_with_float64():
    problem = seeded_classifier()
    report = hi.check(problem, "unrolled")
    assert 1e-9 < report.parts["precision"] < 1e-4
    assert report.ok


def seeded_classifier():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 5, generator=generator), torch.randint(0, 3, (60,), generator=generator)

    @hi.hyperparameter("decay", init=0.1, constraint=constraints.positive)
    def training_loss(model, batch, *, decay):
        penalty = sum(p.square().sum() for p in model.parameters())
        return nn.functional.cross_entropy(model(batch[0]), batch[1]) + decay * penalty

    return hi.BilevelProblem(
        seeded(lambda: nn.Linear(5, 3)).float(),
        training_loss,
        lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        training_data=[(x[:40], y[:40])],
        validation_data=[(x[40:], y[40:])],
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
    )


# ---------------------------------------------------------------------------------------- the errors of every method


def test_inner_problem_that_is_not_solved():
    report = hi.check(ridge(solved=False), "exact", warmup_steps=1)
    assert not report.ok
    assert "due to the inner problem not being solved" in report.verdict
    assert "warmup_steps" in report.advice
    assert report.parts["solver"] < 1e-9 < 0.1 < report.parts["inner problem not solved"]


def test_series_that_is_cut_short():
    report = hi.check(ridge(), {"name": "neumann", "terms": 1}, tolerance=0.01)
    assert not report.ok
    assert "the solver left: its residual is" in report.verdict
    assert report.parts["inner problem not solved"] < 1e-6 < 0.01 < report.parts["solver"]


def test_a_truncated_series_that_is_only_too_short_has_lost_no_factor():
    """On a multiple of the identity a truncated series is a multiple of the truth, and its residual says so."""
    problem = quadratic_problem(2.0 * torch.eye(3, dtype=torch.float64))
    backend = {"name": "neumann", "terms": 1, "step_size": 0.1}
    report = hi.check(problem, backend, training_batches=[None], validation_batches=[None])
    assert "the solver left: its residual is 0.8." in report.verdict, report
    assert report.relative_error == pytest.approx(0.8, rel=1e-6)


def test_damping_that_is_too_large():
    report = hi.check(ridge(), {"name": "exact", "damping": 5.0})
    assert "comes from solving with another matrix than the Hessian" in report.verdict
    assert report.parts["damping and curvature"] > 0.1 > 1e-9 > report.parts["solver"]


def test_steps_that_are_left_out():
    report = hi.check(ridge(solved=False), {"name": "unrolled", "last": 1}, tolerance=0.05)
    assert "is left out of the training steps" in report.verdict


def test_step_size_with_which_the_series_diverges():
    report = hi.check(ridge(), {"name": "neumann", "step_size": 50.0})
    assert "the solver ended with 'diverged'" in report.verdict
    assert "step_size='auto'" in report.advice


def test_saddle_point():
    problem = quadratic_problem(torch.diag(torch.tensor([2.0, 1.0, -0.7], dtype=torch.float64)))
    report = hi.check(problem, "cg", training_batches=[None], validation_batches=[None], seconds=1.0)
    assert not report.ok
    assert "the solver ended with 'negative curvature'" in report.verdict
    assert any("saddle point and no minimum" in note for note in report.measured.notes)


def test_batches_that_scatter():
    problem = ridge()
    report = hi.check(problem, "exact")
    single = [
        hi.hypergradient(problem, "exact", training_batches=[batch], validation_batch=VALIDATION).gradients["decay"]
        for batch in (TRAINING, SECOND)
    ]
    both = report.measured.result.gradients["decay"]
    expected = torch.stack([(g - both).square().sum() for g in single]).mean().sqrt() / both.norm()
    assert report.parts["one batch for all"] == pytest.approx(float(expected), rel=1e-9)


# ------------------------------------------------------------------------------------------ faults planted in backends


@dataclass(frozen=True)
class WrongSign(Exact):
    def differentiate(self, hessian, vector, direct, validation_loss, state, solve=None):
        result = super().differentiate(hessian, vector, direct, validation_loss, state, solve)
        through = {name: -(g - direct[name]) for name, g in result.gradients.items()}
        return dataclasses.replace(result, gradients=add(direct, through))


@dataclass(frozen=True)
class LosesItsStepSize(Exact):
    def solve(self, operator, vector, state, /):
        solution = super().solve(operator, vector, state)
        return dataclasses.replace(solution, value=scale_(solution.value, 10.0))


@dataclass(frozen=True)
class DropsTheDirectTerm(Exact):
    def differentiate(self, hessian, vector, direct, validation_loss, state, solve=None):
        return super().differentiate(hessian, vector, zeros_like(direct), validation_loss, state, solve)


@dataclass(frozen=True)
class KeepsTheDirectTermOnly(Exact):
    def differentiate(self, hessian, vector, direct, validation_loss, state, solve=None):
        result = super().differentiate(hessian, vector, direct, validation_loss, state, solve)
        return dataclasses.replace(result, gradients=direct)


@dataclass(frozen=True)
class ReturnsTheIterateBeforeTheLast(ConjugateGradient):
    def solve(self, operator, vector, state, /):
        whole = ConjugateGradient(tolerance=1e-10, max_iterations=50, warm_start=False).solve(operator, vector, {})
        before = ConjugateGradient(tolerance=1e-10, max_iterations=max(whole.iterations - 1, 1), warm_start=False)
        return dataclasses.replace(before.solve(operator, vector, {}), status=whole.status, residual=whole.residual)


@dataclass(frozen=True)
class GoesOnWithAStaleResidual(ConjugateGradient):
    """The residual is what the recurrence believes; the solution has stopped."""

    def solve(self, operator, vector, state, /):
        short = ConjugateGradient(max_iterations=2, warm_start=False).solve(operator, vector, {})
        return dataclasses.replace(short, residual=1e-9, status=hi.Status.TRUNCATED)


@dataclass(frozen=True)
class NeverSolvesAgain(Exact):
    """Takes what it solved for another point."""

    def solve(self, operator, vector, state, /):
        solution = super().solve(operator, vector, state)
        if "calls" in state:
            value = {name: 3.0 * x.flip(0) for name, x in solution.value.items()}
            solution = dataclasses.replace(solution, value=value)
        return dataclasses.replace(solution, state={"calls": state.get("calls", 0) + 1})


@dataclass(frozen=True)
class UsesTheFirstBatchOnly(Exact):
    def hypergradient(self, problem, training_batches, validation_batch, state, /):
        return super().hypergradient(problem, training_batches[:1], validation_batch, state)


@dataclass(frozen=True)
class MovesRunningStatistics(Exact):
    def hypergradient(self, problem, training_batches, validation_batch, state, /):
        problem.training_loss(training_batches[0])
        return super().hypergradient(problem, training_batches, validation_batch, state)


@dataclass(frozen=True)
class RollsDice(Exact):
    def solve(self, operator, vector, state, /):
        solution = super().solve(operator, vector, state)
        return dataclasses.replace(solution, value=scale_(solution.value, 1.0 + 0.01 * random.random()))


@dataclass(frozen=True)
class DetachesTheFirstMomentumBuffer(Unrolled):
    """As torch.optim.sgd does by itself."""

    def hypergradient(self, problem, training_batches, validation_batch, state, /):
        def clone_and_detach(rule, group, tuned, params, grads, slots):
            if not any(slots):
                grads = [g.detach() for g in grads]
            return apply(rule, group, tuned, params, grads, slots)

        apply = updates.apply_update
        with (
            mock.patch("hyperopt_implicit.inner_loop.adjoint_of", return_value=None),
            mock.patch("hyperopt_implicit.inner_loop.apply_update", clone_and_detach),
        ):
            return super().hypergradient(problem, training_batches, validation_batch, state)


def with_batch_norm():
    training, validation = regression_data(0, features=2), regression_data(1, features=2)
    net = seeded(lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Tanh(), nn.Linear(2, 1)))
    problem = network_problem(net, decay=1.0)
    problem.training_data, problem.validation_data = [training], [validation]
    train_to_minimum(problem, [training])
    return problem


def with_momentum():
    problem = ridge(solved=False, optimizer=lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9))
    problem.model.weight.data.fill_(1.0)  # at zero, the first gradient would not depend on the decay
    return problem


@pytest.mark.parametrize(
    ("backend", "problem", "words"),
    [
        (WrongSign(), ridge, "WrongSign has the wrong sign."),
        (LosesItsStepSize(), ridge, "LosesItsStepSize is off by a factor of 10."),
        (DropsTheDirectTerm(), ridge, "DropsTheDirectTerm leaves out the direct term ∂F/∂λ."),
        (KeepsTheDirectTermOnly(), ridge, "KeepsTheDirectTermOnly gives ∂F/∂λ alone"),
        (ReturnsTheIterateBeforeTheLast(), ridge, "ReturnsTheIterateBeforeTheLast reports a residual of"),
        (GoesOnWithAStaleResidual(), ridge, "GoesOnWithAStaleResidual reports a residual of 1e-09, and it is"),
        (NeverSolvesAgain(), ridge, "NeverSolvesAgain is right at its first call, and off by"),
        (UsesTheFirstBatchOnly(), ridge, "says that it converged, and is off by"),
        (MovesRunningStatistics(), with_batch_norm, "changes the problem that it is given (buffer 1.running_mean"),
        (RollsDice(), ridge, "RollsDice gives another number when it is asked again under the same seed."),
        (DetachesTheFirstMomentumBuffer(), with_momentum, "says that it converged, and is off by"),
    ],
    ids=lambda each: type(each).__name__ if isinstance(each, hi.Backend) else "",
)
def test_planted_in_a_backend(backend, problem, words):
    report = hi.check(problem(), backend, tolerance=0.02)
    assert not report.ok, report
    assert words in report.verdict, report
    assert report.advice


# -------------------------------------------------------------------------------------------- faults planted in losses


def loss_problem(hide, *, target="training"):
    """Ridge regression whose decay passes through ``hide`` on its way into the training loss."""

    @hi.hyperparameter("scale", init=1.0, constraint=constraints.positive)
    @hi.hyperparameter("decay", init=0.3, constraint=constraints.positive)
    def training_loss(model, batch, *, decay, scale):
        return half_mean_square(model, batch) + scale * model.weight.square().mean() + hide(decay, model)

    problem = hi.BilevelProblem(
        Linear(4),
        training_loss,
        half_mean_square,
        training_data=[TRAINING],
        validation_data=[VALIDATION],
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
    )
    train_to_minimum(problem, [TRAINING])
    return problem


@pytest.mark.filterwarnings("ignore:hyperparameter 'decay' influences neither")
@pytest.mark.parametrize(
    "hide",
    [
        lambda decay, model: decay.detach() * model.weight.square().sum(),
        lambda decay, model: decay.item() * model.weight.square().sum(),
        lambda decay, model: (decay + 2.0 * decay.data) * model.weight.square().sum(),
        lambda decay, model: float(decay.detach().numpy()) * model.weight.square().sum(),
    ],
    ids=["detach", "item", "in part", "numpy"],
)
@pytest.mark.parametrize("backend", ["exact", "unrolled"])
def test_hyperparameter_that_is_hidden_from_autograd(hide, backend):
    report = hi.check(loss_problem(hide), backend, warmup_steps=0)
    assert not report.ok
    assert "the losses hide a dependence on 'decay' from autograd" in report.verdict, report
    assert ".detach()" in report.advice


class RemembersItsWeights(nn.Module):
    """A buffer that follows the weights in training, and is used in their place when evaluating."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, dtype=torch.float64))
        self.register_buffer("average", torch.zeros(4, dtype=torch.float64))

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.average.mul_(0.5).add_(self.weight, alpha=0.5)
            return x @ self.weight
        return x @ (self.weight + self.average) / 2.0


def test_detached_buffer():
    """What reaches F through a buffer has no derivative, and finite differences see it."""
    problem = ridge_problem(RemembersItsWeights(), decay=0.3)
    report = hi.check(problem, "unrolled", training_batches=[TRAINING] * 5, validation_batches=[VALIDATION])
    assert not report.ok
    assert "the losses hide a dependence on 'decay' from autograd" in report.verdict


def test_metric_with_jumps():
    def error(model, batch):
        x, y = batch
        wrong = ((x @ model.weight) * y < 0).double().mean()
        return wrong + 0.0 * model.weight.sum()

    problem = ridge_problem(decay=torch.tensor([0.1, 0.3, 1.0, 2.0]), validation_loss=error)
    report = hi.check(problem, "unrolled", training_batches=[TRAINING] * 5, validation_batches=[VALIDATION])
    assert report.relative_error == 0.0 or not report.ok


def test_loss_that_uses_a_float32_tensor_from_outside():
    weights = torch.rand(4, dtype=torch.float32)
    problem = seeded_classifier()
    loss = problem.loss_source()

    @hi.hyperparameter("decay", init=0.1, constraint=constraints.positive)
    def training_loss(model, batch, *, decay):
        return loss(model, batch, decay=decay) + (batch[0][:, :4] @ weights).mean() * 0.0

    other = hi.BilevelProblem(
        problem.model,
        training_loss,
        problem.loss_source("validation_loss"),
        training_data=problem.training_data,
        validation_data=problem.validation_data,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
    )
    report = hi.check(other, "unrolled")
    assert "do not run in float64" in report.measured.notes[0]


# -------------------------------------------------------------------------------------------------------- what it shows


def test_text_of_a_report():
    text = str(hi.check(ridge(), "cg"))
    for words in (
        "ConjugateGradient on 4 parameters and 4 hyperparameters, 2 training and 1 validation batches",
        "inner problem not solved",
        "one batch for all",
        "finite differences",
        "right: the hypergradient is within",
    ):
        assert words in text, text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 0.0}, "tolerance must be a relative error between 0 and 1; got 0.0."),
        ({"inner_steps": 0}, "inner_steps must be a whole number of at least 1; got 0."),
        ({"warmup_steps": -1}, "warmup_steps must be a whole number of at least 0; got -1."),
        ({"calls": 0}, "calls must be a whole number of at least 1; got 0."),
        ({"training_batches": []}, "training_batches must hold at least one batch; it is empty."),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(hi.HyperoptError) as caught:
        hi.check(ridge(), "cg", **options)
    assert str(caught.value) == message


def test_copies_are_independent():
    problem = ridge()
    other = problem.copy(torch.float32)
    assert {p.dtype for p in other.params.values()} == {torch.float32}
    with torch.no_grad():
        for p in (*other.params.values(), *other.hparams.values()):
            p.add_(1.0)
    assert all(p.dtype is torch.float64 for p in problem.params.values())
    before = clone(problem.params)
    single = tuple(x.float() for x in TRAINING)
    hi.hypergradient(
        other,
        "unrolled",
        training_batches=[single],
        validation_batch=single,
    )
    assert all(torch.equal(before[name], p) for name, p in problem.params.items())
    assert set(other.optimizer.param_groups[0]["params"]) == set(other.params.values())


def test_validation_loss_is_averaged_over_batches():
    """F of two batches is their mean: so is the hypergradient, and so are its differences."""
    problem = ridge()
    report = hi.check(problem, "exact", validation_batches=[VALIDATION, SECOND])
    single = [hi.check(problem, "exact", validation_batches=[batch]) for batch in (VALIDATION, SECOND)]
    mean = sum(each.measured.result.gradients["decay"] for each in single) / 2.0
    assert torch.allclose(report.measured.result.gradients["decay"], mean, rtol=1e-12)
    slopes = [each.measured.slopes[0].value for each in single]
    assert report.measured.slopes[0].value == pytest.approx(sum(slopes) / 2.0, rel=1e-6)


def test_validation_loss_that_draws_is_held_still():
    def noisy(model, batch):
        x, y = batch
        return half_mean_square(model, (x + 0.5 * torch.randn_like(x), y))

    problem = ridge_problem(decay=0.3, validation_loss=noisy)
    train_to_minimum(problem, [TRAINING])
    report = hi.check(problem, "exact", training_batches=[TRAINING], validation_batches=[VALIDATION])
    assert report.ok and report.parts["the losses' own derivatives"] < 1e-6, report


@pytest.mark.parametrize("hide", [torch.Tensor.detach, lambda loss: torch.tensor(loss.item())], ids=["detach", "item"])
def test_validation_loss_without_a_graph_is_refused(hide):
    """Every gradient would be zero, and equal to every other."""
    problem = ridge_problem(validation_loss=lambda model, batch: hide(half_mean_square(model, batch)))
    with pytest.raises(hi.LossError) as caught:
        hi.check(problem, "cg", training_batches=[TRAINING], validation_batches=[VALIDATION])
    assert str(caught.value) == (
        "validation_loss must depend on the model's parameters, or on a hyperparameter; its result has no graph to any "
        "of them, and every hypergradient would be zero. Look for .detach(), .item() or torch.no_grad() in it. A "
        "metric without a gradient needs a backend that does without ('evolution')."
    )


def test_damping_that_a_backend_adds_by_itself_counts_once():
    """The residual worked out anew is the one reported, whichever of the two has ρ in it."""
    report = hi.check(ridge(), {"name": "nystrom", "rank": 2, "damping": 1.0})
    true, reported = report.measured.true_residual
    assert true == pytest.approx(reported, rel=1e-9) == pytest.approx(report.measured.result.residual, rel=1e-9)


def test_without_anything_to_compare_with_nothing_is_called_right():
    """L has no second derivative, and its minimum is not reached."""
    place = torch.ones(1, 4, dtype=torch.float64)
    problem = ridge(solved=False, extra=lambda model: torch.cdist(model.weight[None], place).sum())
    report = hi.check(problem, "finite_difference", seconds=1e-9)
    assert not report.ok
    assert report.relative_error != report.relative_error
    assert report.verdict.startswith("there is nothing to compare the hypergradient with")
    assert "not right: " in str(report)


@pytest.mark.parametrize("seed", range(27, 32))
def test_a_gradient_that_is_zero_to_rounding_is_right(seed):
    """w* = 0 whatever the decay: dF/dλ is zero, and what is left of it, in float32 and in float64, is rounding."""
    torch.manual_seed(seed)  # without a floor, what 29 leaves is told as a dependence that the losses hide

    @hi.hyperparameter("decay", init=0.5)
    def training_loss(model, batch, *, decay):
        return ((model(batch) - 1) ** 2).mean() + decay * model.weight.square().sum()

    batch = torch.tensor([[1.0], [2.0]])
    problem = hi.BilevelProblem(
        nn.Linear(1, 1),
        training_loss,
        lambda model, batch: (model(batch) ** 2).mean(),
        training_data=[batch],
        validation_data=[batch],
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
    )
    report = hi.check(problem, "cg", warmup_steps=500)
    assert report.ok, str(report)
    assert report.relative_error < 0.01
