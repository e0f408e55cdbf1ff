"""``auto``: what it takes on problems whose best method is known, when it changes its mind, and what it spends."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import statistics
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.utils.data import DataLoader, TensorDataset

import hyperopt_implicit as hi
from hyperopt_implicit.backend import Hypergradient, State, Status
from hyperopt_implicit.carried import fitting
from hyperopt_implicit.errors import HyperoptWarning
from hyperopt_implicit.inner_loop import train_step
from hyperopt_implicit.operators import LossHessian
from hyperopt_implicit.survey import Costs
from hyperopt_implicit.testing.assertions import assert_unchanged, relative_error, same, saved_and_loaded
from hyperopt_implicit.testing.oracles import dense_derivatives, flatten, implicit_hypergradient, train_to_minimum
from hyperopt_implicit.testing.specimens import (
    TRAINING,
    VALIDATION,
    Linear,
    quadratic_problem,
    regression_data,
    ridge_problem,
)
from hyperopt_implicit_backends import Auto, ConjugateGradient, HeavyBall, Soba, Unrolled
from hyperopt_implicit_backends.auto import Plan

from .matrices import right_hand_side, solve, spread, with_spectrum
from .quadratics import mixture

SIZE = 12
DEFINITE = with_spectrum(spread(0.5, 5.0, SIZE))
INDEFINITE = with_spectrum([-0.4, *spread(0.5, 5.0, SIZE - 1)])
IDENTITY = torch.eye(SIZE, dtype=torch.float64)
COSTS = Costs(seconds=1.0, validation=1.0, graph=1.0, product=1.0, mixed=1.0)
DAMPED = (
    "auto met an indefinite Hessian (eigenvalues from -0.4 to 5), damped by 0.6. The hypergradient is that of the "
    "damped system: its direction can be trusted more than its size. Train longer before the first outer step, put a "
    "weight decay into the training loss, or choose the damping yourself with damping=."
)


def method(result: Hypergradient) -> str:
    """What the note says was taken."""
    assert result.note is not None
    return result.note.removeprefix("auto takes ").split()[0].rstrip(":")


class Moving:
    """L = ½ wᵀHw − shiftᵀw and F = ½‖w − 1‖², so that dF/dshift = u = H⁻¹(w − 1); w goes around an ellipse."""

    def __init__(self, matrix: Tensor, backend: Auto, *, turn: float = 0.0, reach: float = 1.0) -> None:
        self.matrix = matrix.clone()
        self.problem = quadratic_problem(self.matrix)
        self.backend, self.turn, self.reach = backend, turn, reach
        self.angle, self.state = 0.0, {}
        self.one, self.other = (torch.cos(k * torch.arange(1, len(matrix) + 1, dtype=torch.float64)) for k in (1, 2))

    def step(self) -> Hypergradient:
        v = self.reach * (math.cos(self.angle) * self.one + math.sin(self.angle) * self.other)
        self.problem.model.weight.data.copy_(1.0 + v)
        result = self.backend.hypergradient(self.problem, [None], None, self.state)
        self.angle += self.turn
        self.state = result.state
        self.truth = torch.linalg.solve(self.matrix, v)
        self.error = float((result.gradients["shift"] - self.truth).norm() / self.truth.norm())
        return result

    def steps(self, count: int) -> list[Hypergradient]:
        return [self.step() for _ in range(count)]


def with_costs(state: State, **costs: float) -> State:
    """A state of which the plan says that the parts cost this, and otherwise 1 g each."""
    plan = {**state["plan"], "costs": dataclasses.replace(COSTS, **costs).state()}
    return {**state, "plan": plan}


# ------------------------------------------------------------------------------------------------------ what it takes


def test_all_the_data_and_a_definite_hessian():
    run = Moving(DEFINITE, Auto())
    first = run.step()
    assert method(first) == "heavy_ball"
    assert "all the training data at each call, condition number 10;" in first.note
    assert 2 < first.hvps <= 1 + 12 and first.status is Status.TRUNCATED
    assert run.error < 0.01 and first.residual < 0.01
    for result in run.steps(8):
        assert (result.hvps, result.iterations, result.note) == (1, 1, first.note)


def test_data_that_is_whole_at_each_call():
    """One batch in the list, or all of them given; in a DataLoader that has one batch as well."""
    x, y = TRAINING
    for training, given in (
        ([TRAINING], [TRAINING]),
        ([TRAINING, regression_data(2)], [TRAINING, regression_data(2)]),
        (DataLoader(TensorDataset(x, y), batch_size=len(x)), [TRAINING]),
    ):
        problem = ridge_problem()
        problem.training_data, problem.validation_data = training, [VALIDATION]
        assert method(Auto().hypergradient(problem, given, VALIDATION, {})) == "heavy_ball"


def test_mini_batches():
    """The start is a solution on the first of them, and each call a step of at most 1/λ_max from there."""
    m = mixture(4, noise=0.5)
    result = m.hypergradient(Auto(), [0], {})
    assert method(result) == "soba" and "mini-batches, largest eigenvalue" in result.note
    largest = result.state["plan"]["largest"]
    assert largest == pytest.approx(float(torch.linalg.eigvalsh(m.hessians[0])[-1]), rel=1e-2)
    truth = torch.linalg.solve(m.hessians[0], m.v)
    assert float((result.gradients["shift"] - truth).norm() / truth.norm()) < 0.1
    again = m.hypergradient(Auto(), [1], result.state)
    u = result.state["method"]["solution"]["weight"]
    torch.testing.assert_close(again.gradients["shift"], 1.1 * u)
    assert result.hvps == 1 + 4
    expected = u - 1.0 / largest * (m.hessians[1] @ u - m.v)
    torch.testing.assert_close(again.state["method"]["solution"]["weight"], expected)
    assert again.hvps == 1 and again.status is Status.TRUNCATED


def test_steps_on_mini_batches_get_smaller():
    """1/λ_max for 20 calls, half of it for 60 more, and a quarter from there on; a new survey does not change that."""
    m, state, shares = mixture(2, noise=0.5), {}, []
    for t in range(130):
        before, result = state, m.hypergradient(Auto(), [t % 2], state)
        state = result.state
        if t:
            u = before["method"]["solution"]["weight"]
            moved = state["method"]["solution"]["weight"] - u
            force = m.v - m.hessians[t % 2] @ u
            shares.append(float(moved @ force / (force @ force)) * state["plan"]["largest"])
    expected = [1.0] * 19 + [0.5] * 60 + [0.25] * 50
    assert shares == pytest.approx(expected, rel=1e-6)


def test_mini_batches_of_a_loader():
    x, y = TRAINING
    problem = ridge_problem()
    problem.training_data = DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True)
    with assert_unchanged(problem):
        assert method(Auto().hypergradient(problem, [TRAINING], VALIDATION, {})) == "soba"


@pytest.mark.parametrize("attached", [True, False])
def test_mini_batches_of_validation_data_only(attached):
    """A is exact, so each is solved for: by a method that does not count on the last solution, once that shows."""
    problem, state, validation = ridge_problem(), {}, [regression_data(seed, rows=3) for seed in range(5, 11)]
    if attached:
        problem.training_data, problem.validation_data = [TRAINING], validation
    errors, taken = [], []
    for t in range(20):
        result = Auto().hypergradient(problem, [TRAINING], validation[t % 6], state)
        state = result.state
        taken.append(method(result))
        truth = implicit_hypergradient(problem, [TRAINING], validation[t % 6])
        errors.append(relative_error(result.gradients, truth))
        with torch.no_grad():
            problem.model.weight.add_(0.01)
    assert taken == ["heavy_ball"] * 9 + ["cg"] * 11
    assert statistics.median(errors) < 0.01 and max(errors[1:]) < 0.1


def test_the_running_estimate_beats_solving_each_mini_batch():
    """On noisy batches, and from the first calls on."""
    m = mixture(12, noise=4.0, size=10)
    errors: dict[str, list[float]] = {}
    for name in ("auto", "cg", "soba"):
        backend, state, found = hi.get_backend(name), {}, []
        for t in range(120):
            result = m.hypergradient(backend, [t % 12], state)
            state = result.state
            u = result.gradients["shift"] / m.scales[t % 12]
            found.append(float((u - m.truth).norm() / m.truth.norm()))
        errors[name] = found
    late = {name: statistics.median(x[60:]) for name, x in errors.items()}
    assert late["auto"] < 0.5 * late["cg"] and late["auto"] < late["soba"]
    assert max(errors["auto"][:10]) < 2 * max(errors["cg"])


def test_batches_that_change_between_calls():
    """Without data to ask, one call cannot tell; the second one can, and ten more whether they have come to rest."""
    outer = hi.HyperOptimizer(ridge_problem(), torch.optim.SGD, lr=1e-3, backend="auto")
    others = [regression_data(seed) for seed in range(2, 6)]
    assert method(outer.step(TRAINING, VALIDATION)) == "heavy_ball"
    for batch in others:
        assert method(outer.step(batch, VALIDATION)) == "soba"
    taken = [method(outer.step(others[-1], VALIDATION)) for _ in range(12)]
    assert taken == ["soba"] * 9 + ["heavy_ball"] * 3
    assert method(outer.step(others[-1], TRAINING)) == "heavy_ball", "another validation batch is no reason"


def test_batches_that_stay_the_same_from_one_call_to_the_next():
    outer = hi.HyperOptimizer(ridge_problem(), torch.optim.SGD, lr=1e-3, backend="auto")
    batch = [x.clone() for x in TRAINING]
    taken = {method(outer.step(tuple(x.clone() for x in batch), VALIDATION)) for _ in range(15)}
    assert taken == {"heavy_ball"}


def test_two_batches_in_turn_are_mini_batches():
    outer = hi.HyperOptimizer(ridge_problem(), torch.optim.SGD, lr=1e-3, backend="auto")
    batches = [TRAINING, regression_data(2)]
    taken = [method(outer.step(batches[t % 2], VALIDATION)) for t in range(30)]
    assert taken == ["heavy_ball"] + ["soba"] * 29


def dropout_problem() -> hi.BilevelProblem:
    return ridge_problem(nn.Sequential(Linear(4), nn.Dropout(0.2)), validation_loss=offset)


def offset(model: nn.Module, batch: Any) -> Tensor:
    """F that has a gradient at w = 0 too."""
    x, y = batch
    return 0.5 * (model(x) - y).square().mean()


def test_a_random_loss():
    """Is known at the first call, and not surveyed again because the batches stay the same."""
    problem, state = dropout_problem(), {}
    results = []
    for _ in range(60):
        results.append(Auto().hypergradient(problem, [TRAINING], VALIDATION, state))
        state = results[-1].state
    assert {method(r) for r in results} == {"soba"}
    assert "a random loss, largest eigenvalue" in results[0].note
    assert [r.hvps for r in results[1:]] == [1] * 59


def test_the_largest_eigenvalue_of_mini_batches_is_looked_up_again():
    m, state, spent = mixture(2, noise=0.1), {}, []
    for t in range(202):
        if t == 50:
            m.hessians[0].mul_(2.0)
        result = m.hypergradient(Auto(), [t % 2], state)
        state = result.state
        spent.append(result.hvps)
    assert [t for t, n in enumerate(spent) if n > 1] == [0, 100, 200]
    assert state["plan"]["largest"] == pytest.approx(float(torch.linalg.eigvalsh(m.hessians[0])[-1]), rel=0.05)


@pytest.mark.parametrize("option", ["lr", "momentum"])
def test_hyperparameters_of_the_optimizer(option):
    init = {"lr": 0.1, "momentum": 0.5}[option]
    problem = ridge_problem(
        also=hi.hyperparameter(option, init=init, constraint=constraints.positive, target="optimizer"),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.1),
    )
    assert Auto().for_problem(problem) == Unrolled()
    mine = Auto(tolerance=0.3)
    assert mine.for_problem(ridge_problem()) is mine
    with pytest.raises(hi.BackendError, match="hyperparameter of the inner optimizer"):
        mine.check(problem)


def test_adams_second_moment_on_a_badly_scaled_problem():
    """It is taken where it halves the condition number; with another optimizer there is none to take."""
    scales = torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=torch.float64)
    x, y = TRAINING
    taken = {}
    for name, optimizer in (
        ("adam", lambda params: torch.optim.Adam(params, lr=1e-3)),
        ("adamw", lambda params: torch.optim.AdamW(params, lr=1e-3)),
        ("sgd", lambda params: torch.optim.SGD(params, lr=1e-7)),
    ):
        problem = ridge_problem(decay=1e-3, optimizer=optimizer)
        batch = (x * scales, y)
        fresh = Auto().hypergradient(problem, [batch], (VALIDATION[0] * scales, VALIDATION[1]), {})
        assert fresh.state["plan"]["preconditioner"] is None, "there is no moment before the first step"
        for _ in range(3):
            train_step(problem, batch, problem.hyperparameters.values())
        result = Auto().hypergradient(problem, [batch], (VALIDATION[0] * scales, VALIDATION[1]), {})
        taken[name] = result.state["plan"]["preconditioner"]
        assert ("when preconditioned by Adam's second moment" in result.note) is (name != "sgd")
        for _ in range(3):
            result = Auto().hypergradient(
                problem, [batch], (VALIDATION[0] * scales, VALIDATION[1]), saved_and_loaded(result.state)
            )
            assert result.hvps == 1 and not result.status.failed
    assert taken == {"adam": "adam", "adamw": "adam", "sgd": None}


# ------------------------------------------------------------------------------------------------------------ damping


def test_an_indefinite_hessian_is_damped_and_that_is_said():
    run = Moving(INDEFINITE, Auto())
    with pytest.warns(HyperoptWarning) as caught:
        first = run.step()
    assert [str(w.message) for w in caught] == [DAMPED]
    assert "an indefinite Hessian (eigenvalues from -0.4 to 5), damped by 0.6;" in first.note
    damped = torch.linalg.solve(INDEFINITE + 0.6 * IDENTITY, run.problem.model.weight.detach() - 1.0)
    assert relative_error(first.gradients, {"shift": damped}) < 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {r.hvps for r in run.steps(8)} == {1}
    assert first.status is Status.TRUNCATED, "never converged: it is another system"


def test_a_damped_system_that_is_solved_to_rounding_is_not_called_converged():
    run = Moving(INDEFINITE, Auto(tolerance=1e-13))
    with pytest.warns(HyperoptWarning):
        results = run.steps(6)
    assert {r.status for r in results} == {Status.TRUNCATED}
    assert Moving(DEFINITE, Auto(tolerance=1e-13)).step().status is Status.CONVERGED


def test_the_error_of_a_damped_system_is_measured_on_that_system():
    run = Moving(INDEFINITE, Auto(), turn=0.001)
    with pytest.warns(HyperoptWarning):
        result = run.steps(10)[-1]
    v = run.problem.model.weight.detach() - 1.0
    damped = torch.linalg.solve(INDEFINITE + run.state["plan"]["damping"] * IDENTITY, v)
    error = relative_error(result.gradients, {"shift": damped})
    assert run.state["plan"]["error"] == pytest.approx(error, rel=0.3)


def test_a_singular_hessian_is_damped():
    run = Moving(with_spectrum([0.0, *spread(0.5, 5.0, SIZE - 1)]), Auto())
    with pytest.warns(HyperoptWarning, match=r"^auto met an? (singular|indefinite) Hessian .* damped by 0\.5\. "):
        first = run.step()
    assert first.state["plan"]["damping"] == pytest.approx(0.5, rel=1e-3)
    assert not first.status.failed


def test_damping_that_was_asked_for_is_kept():
    """It is part of A: enough of it needs no more, and what is missing comes on top."""
    run = Moving(INDEFINITE, Auto(damping=0.7))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = run.step()
    assert first.state["plan"]["damping"] == 0.7
    v = run.problem.model.weight.detach() - 1.0
    assert relative_error(first.gradients, {"shift": torch.linalg.solve(INDEFINITE + 0.7 * IDENTITY, v)}) < 1e-3
    with pytest.warns(HyperoptWarning, match="damped by"):
        result = Moving(INDEFINITE, Auto(damping=0.1)).step()
    assert result.state["plan"]["damping"] == pytest.approx(0.1 + max(1.5 * 0.3, 0.1 * 5.1), rel=1e-3)


def test_curvature_that_becomes_negative_on_the_way():
    """One call says so, the next one looks at the problem anew and damps it, and from there on it is well."""
    run = Moving(DEFINITE, Auto(), turn=0.005)
    assert not any(r.status.failed for r in run.steps(15))
    run.matrix.copy_(INDEFINITE)
    with pytest.warns(HyperoptWarning, match="auto met an indefinite Hessian") as caught:
        results = run.steps(30)
    failed = [t for t, r in enumerate(results) if r.status.failed]
    assert failed and results[failed[0]].status is Status.NEGATIVE_CURVATURE
    assert "plan" not in results[failed[0]].state
    assert len(failed) == len(caught) == 1
    assert "an indefinite Hessian" in results[failed[0] + 1].note
    v = run.problem.model.weight.detach() - 1.0
    damped = torch.linalg.solve(INDEFINITE + 0.6 * IDENTITY, v)
    assert relative_error(results[-1].gradients, {"shift": damped}) < 0.03


def test_damping_is_given_up_when_it_is_no_longer_needed():
    """After 50 calls; where it is still needed, that is not warned of again, and looked at less and less often."""
    run = Moving(INDEFINITE, Auto())
    with pytest.warns(HyperoptWarning) as caught:
        results = run.steps(252)
    assert len(caught) == 1
    looked = [t for t, r in enumerate(results) if r.hvps > 20]
    assert looked == [0, 50, 250]
    assert results[-1].state["plan"]["again"] == 800
    run = Moving(INDEFINITE, Auto())
    with pytest.warns(HyperoptWarning):
        run.steps(20)
    run.matrix.copy_(DEFINITE)
    results = run.steps(40)
    assert "damped" in results[29].note and "damped" not in results[31].note
    assert results[31].state["plan"]["damping"] == 0.0 and run.error < 0.01


def test_mini_batches_with_negative_curvature():
    """Are damped where it is much of it; a batch that shows it is no reason to begin anew."""
    problem = ridge_problem(extra=lambda model: -0.9 * next(model.parameters())[0] ** 2)
    problem.training_data, state = [TRAINING, regression_data(2)], {}

    def call(state: State, t: int) -> State:
        found.append(Auto().hypergradient(problem, [problem.training_data[t % 2]], VALIDATION, state))
        assert "plan" in found[-1].state
        return found[-1].state

    found: list[Hypergradient] = []
    with pytest.warns(HyperoptWarning, match="auto met an indefinite Hessian") as caught:
        state = functools.reduce(call, range(120), state)
    result = found[-1]
    assert len(caught) == 1 and state["plan"]["damping"] > 0.0
    last = dense_derivatives(problem, [TRAINING]).hessian  # of the survey at the 100th call
    largest = float(torch.linalg.eigvalsh(last)[-1]) + state["plan"]["damping"]
    assert state["plan"]["largest"] == pytest.approx(largest, rel=0.01)
    assert math.isfinite(float(flatten(result.gradients).norm()))


def test_a_mini_batch_that_curves_downwards():
    """On the average of all it does not: what is known of the problem stays, and no survey is made for it."""
    m, state, found = mixture(2, noise=0.5), {}, []
    m.hessians[1].copy_(-0.4 * m.hessians[0])
    for t in range(30):
        found.append(m.hypergradient(Auto(), [t % 2], state))
        state = found[-1].state
        assert "plan" in state
    assert {r.status for r in found[1::2]} == {Status.NEGATIVE_CURVATURE}
    assert [r.hvps for r in found[1:]] == [1] * 29


def test_the_gauss_newton_matrix():
    """Is asked for of every method, and of the survey: it is definite where H is not."""

    def bent(model: nn.Module) -> Tensor:
        return -0.4 * next(model.parameters()).square().sum()

    made = []

    class Watched(Auto):
        def linearise(self, problem: Any, batches: Any) -> LossHessian:
            made.append(self.curvature)
            return super().linearise(problem, batches)

    problem = ridge_problem(nn.Sequential(Linear(4), nn.Tanh()), decay=0.5)
    with torch.no_grad():
        next(problem.model.parameters()).fill_(0.8)
    backend = Watched(curvature="gauss_newton")
    result = backend.hypergradient(problem, [TRAINING], VALIDATION, {})
    exact = hi.get_backend("exact", curvature="gauss_newton").hypergradient(problem, [TRAINING], VALIDATION, {})
    plain = hi.get_backend("exact").hypergradient(problem, [TRAINING], VALIDATION, {})
    assert made == ["gauss_newton"]
    assert relative_error(result.gradients, exact.gradients) < 0.01 < relative_error(plain.gradients, exact.gradients)
    plan = Plan.from_state(result.state["plan"])
    for rung in (-1, 0, 1):
        plan.rung = rung
        assert backend._method(plan).curvature == "gauss_newton"


@pytest.mark.parametrize("options", [{"compile": True}, {"precision": "bfloat16", "refinements": 2}])
def test_what_all_methods_share_is_handed_on(options):
    plan = Plan(rung=0, costs=COSTS, what="", random=False, damping=0.3, damped=False, largest=2.0)
    for rung, kind in ((-1, Soba), (0, HeavyBall), (1, ConjugateGradient)):
        plan.rung = rung
        found = Auto(damping=0.1, **options)._method(plan)
        assert type(found) is kind and found.damping == 0.3
        assert all(getattr(found, name) == value for name, value in options.items())


# --------------------------------------------------------------------------------------------------- changing its mind


def test_a_system_that_moves_too_fast_for_heavy_ball():
    """Ten calls show it; and when it comes to rest, heavy_ball is tried again and kept."""
    run = Moving(with_spectrum(spread(0.02, 5.0, SIZE)), Auto(), turn=0.4)
    results = run.steps(60)
    taken = [method(r) for r in results]
    assert taken[:9] == ["heavy_ball"] * 9 and taken[9] == "cg"
    assert "cg to a residual of 0.01:" in results[9].note and "at least" in results[9].note
    assert taken[9:34] == ["cg"] * 25 and taken[34:44] == ["heavy_ball"] * 10 and taken[44:] == ["cg"] * 16
    assert run.state["plan"]["rest"] == 50
    run.turn = 0.0
    taken = [method(r) for r in run.steps(60)]
    assert taken[-1] == "heavy_ball"
    assert run.steps(1)[0].hvps == 1 and run.error < 0.01


def test_a_slow_system_never_leaves_heavy_ball():
    run = Moving(DEFINITE, Auto(), turn=1e-3)
    results = run.steps(100)
    assert {method(r) for r in results} == {"heavy_ball"}
    assert sum(r.hvps for r in results[1:]) <= 110


@pytest.mark.parametrize("turn", [1e-3, 1e-2, 0.05, 0.4])
@pytest.mark.parametrize("tolerance", [0.1, 0.01, 1e-3])
def test_the_tolerance_holds_in_a_run_that_drifts(turn, tolerance):
    """The median of the errors, against a dense solve, from the 50th call on; nearly so in the hardest case."""
    run = Moving(with_spectrum(spread(0.1, 5.0, SIZE)), Auto(tolerance=tolerance), turn=turn)
    errors = []
    for _ in range(130):
        run.step()
        errors.append(run.error)
    assert statistics.median(errors[50:]) <= tolerance * (1.5 if tolerance == turn == 1e-3 else 1.0)
    assert max(errors) <= 20 * tolerance


def test_the_tolerance_holds_where_everything_moves():
    """Weights, λ and H, as they do in training; against ``exact``."""
    problem = ridge_problem(decay=torch.tensor([0.1, 0.3, 1.0, 2.0]))
    train_to_minimum(problem, [TRAINING])
    outer = hi.HyperOptimizer(problem, torch.optim.Adam, lr=0.05, backend="auto")
    errors, results = [], []
    for _ in range(80):
        for _ in range(3):
            train_step(problem, TRAINING, problem.hyperparameters.values())
        results.append(outer.compute([TRAINING], VALIDATION))
        exact = hi.hypergradient(problem, "exact", training_batches=[TRAINING], validation_batch=VALIDATION)
        errors.append(relative_error(results[-1].gradients, exact.gradients))
        outer.apply(results[-1])
    assert statistics.median(errors[20:]) <= 0.01


def test_the_error_that_is_reported_is_the_error():
    run = Moving(with_spectrum(spread(0.1, 5.0, SIZE)), Auto(tolerance=0.05), turn=0.002)
    for t in range(45):
        result = run.step()
        if t in (9, 39):
            assert run.state["plan"]["error"] == pytest.approx(run.error, rel=0.25)
            assert f"; its error was {run.state['plan']['error']:.1%} when last measured." in result.note
            assert result.hvps > 1
        elif t:
            assert result.hvps == 1
    assert run.state["plan"]["audit"] == 160


def test_a_residual_that_is_rounding_is_not_taken_for_a_measure():
    run = Moving(DEFINITE, Auto(tolerance=1e-13))
    run.steps(200)
    plan = run.state["plan"]
    assert (plan["ratio"], plan["rung"]) == (1.0, 0) and plan["audit"] > 160


def test_a_hypergradient_on_which_u_has_no_bearing_still_has_one():
    """The direct term outweighs the rest by so much that hardly a residual is needed; u is solved for all the same."""
    plan = Plan(rung=1, costs=COSTS, what="", random=False, damping=0.0, damped=False, largest=2.0, ratio=0.01)
    assert Auto(tolerance=0.05)._method(plan).tolerance == 0.1


# ------------------------------------------------------------------------------------------------------------- budget


def budgeted(budget: float | None, turn: float = 0.4, steps: int = 60, **costs: float) -> tuple[Moving, list]:
    """A system that moves too fast for heavy_ball, on which the parts cost 1 g each."""
    run = Moving(with_spectrum(spread(0.02, 5.0, SIZE)), Auto(budget=budget), turn=turn)
    results = run.steps(1)
    run.state = with_costs(run.state, **costs)
    return run, results + run.steps(steps - 1)


def test_a_budget_that_one_product_is_more_than():
    run = Moving(DEFINITE, Auto(budget=0.01))
    result = run.step()
    assert result.note.endswith(" g, which is the least there is and more than the budget of 0.01 g.")
    assert method(result) == "heavy_ball"
    assert Auto(budget=1e9).hypergradient(run.problem, [None], None, {}).note.endswith(" g.")


@pytest.mark.parametrize("budget", [3.5, 5.0, 7.9])
def test_a_budget_for_heavy_ball_only(budget):
    """It is never left, however large the error, and spends a product: three iterations would do worse than that."""
    _, results = budgeted(budget, turn=0.05)
    assert {method(r) for r in results} == {"heavy_ball"}
    assert {r.hvps for t, r in enumerate(results) if t not in (0, 9, 39)} == {1}


@pytest.mark.parametrize(("budget", "iterations"), [(8.0, 4), (9.9, 5), (12.0, 8)])
def test_a_budget_for_a_few_iterations(budget, iterations):
    """Validation gradient, graph, a product for the warm start and the mixed derivative leave so many."""
    _, results = budgeted(budget)
    taken = [method(r) for r in results]
    assert taken[20] == "cg"
    spent = [r.hvps for t, r in enumerate(results) if t > 0 and method(r) == taken[t - 1] == "cg"]
    assert max(spent[:8]) <= iterations + 1
    heavy = [r.hvps for t, r in enumerate(results) if 0 < t < 9]
    assert max(heavy) <= iterations + 1, "where it solves anew it keeps to the budget too"


def test_without_a_budget_it_takes_what_it_needs():
    _, results = budgeted(None)
    assert max(r.hvps for r in results[10:20]) > 6


def test_costs_are_in_units_of_a_gradient():
    """Measured, so only roughly known: the graph of the gradient and a product cost about as much as a gradient."""
    x = torch.randn(2000, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    problem = ridge_problem(Linear(100))
    costs = Auto().hypergradient(problem, [(x, x[:, 0])], (x[:200], x[:200, 1]), {}).state["plan"]["costs"]
    assert 0.02 < costs["validation"] < 5 and 0.1 < costs["graph"] < 20 and 0.1 < costs["product"] < 20
    assert costs["seconds"] > 0.0


# --------------------------------------------------------------------------------------------------------------- note


def test_the_note_is_one_line_and_changes_with_the_plan():
    run = Moving(with_spectrum(spread(0.02, 5.0, SIZE)), Auto(), turn=0.4)
    results = run.steps(25)
    for result in results:
        assert result.note.startswith("auto takes ") and result.note.endswith(".") and "\n" not in result.note
        assert "a product costs " in result.note and " g and a hypergradient " in result.note
    changes = [t for t in range(1, 25) if results[t].note != results[t - 1].note]
    assert changes == [9, 19, 24]
    assert "its error was" not in results[9].note and "its error was" in results[19].note


@pytest.mark.parametrize("name", ["cg", "heavy_ball", "soba", "exact", "neumann", "identity"])
def test_other_backends_have_nothing_to_say(name):
    assert hi.get_backend(name).hypergradient(ridge_problem(), [TRAINING], VALIDATION, {}).note is None


# -------------------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("turn", [0.01, 0.4], ids=["heavy_ball", "cg and back"])
def test_a_state_from_a_file_continues_to_the_bit(turn):
    run = Moving(with_spectrum(spread(0.02, 5.0, SIZE)), Auto(), turn=turn)
    for t in range(50):
        run.step()
        if t not in (0, 8, 9, 12, 33, 34):
            continue
        straight, resumed = copy.deepcopy(run), copy.deepcopy(run)
        resumed.state = saved_and_loaded(run.state)
        assert fitting(resumed.state, resumed.problem) is resumed.state
        for one, other in zip(straight.steps(15), resumed.steps(15), strict=True):
            assert same(dataclasses.asdict(one), dataclasses.asdict(other))


def test_a_state_of_mini_batches_continues_to_the_bit():
    m, state = mixture(3, noise=0.5), {}
    for t in range(7):
        state = m.hypergradient(Auto(), [t % 3], state).state
    loaded = saved_and_loaded(state)
    for t in range(6):
        one, other = m.hypergradient(Auto(), [t % 3], state), m.hypergradient(Auto(), [t % 3], loaded)
        assert same(dataclasses.asdict(one), dataclasses.asdict(other))
        state, loaded = one.state, other.state


def test_the_state_that_was_given_is_not_changed():
    run = Moving(with_spectrum(spread(0.02, 5.0, SIZE)), Auto(), turn=0.4)
    for _ in range(45):
        before = copy.deepcopy(run.state)
        given = run.state
        run.step()
        assert same(given, before)


def test_a_state_of_another_model_is_dropped():
    narrow, wide = Moving(DEFINITE, Auto()), Moving(with_spectrum(spread(0.5, 5.0, 20)), Auto())
    narrow.steps(3)
    with pytest.warns(HyperoptWarning, match=r"of shape \(12,\), which is \(20,\) in the model\. It was dropped"):
        found = hi.hypergradient(
            wide.problem, "auto", training_batches=[None], validation_batch=None, state=narrow.state
        )
    cold = hi.hypergradient(wide.problem, "auto", training_batches=[None], validation_batch=None)
    assert same(found.gradients, cold.gradients) and found.hvps == cold.hvps


@pytest.mark.parametrize("name", ["cg", "heavy_ball", "soba"])
def test_a_state_of_another_method_is_a_beginning(name):
    run = Moving(DEFINITE, Auto())
    run.step()
    state = hi.get_backend(name).hypergradient(run.problem, [None], None, {}).state
    found = Auto().hypergradient(run.problem, [None], None, state)
    assert method(found) == "heavy_ball" and relative_error(found.gradients, {"shift": run.truth}) < 1e-3


@pytest.mark.parametrize(
    ("make", "random"),
    [(ridge_problem, False), (dropout_problem, True), (lambda: normalised(), False)],
    ids=["ridge", "dropout", "batch norm"],
)
@pytest.mark.filterwarnings("ignore:auto met an indefinite Hessian:hyperopt_implicit.errors.HyperoptWarning")
def test_nothing_of_the_problem_changes(make, random):
    """Not by the survey, nor by the calls after it, nor by those that measure the error."""
    problem, state = make(), {}
    for p in problem.model.parameters():
        p.grad = torch.ones_like(p)
    for _ in range(12):
        with assert_unchanged(problem, random_state=not random):
            result = Auto().hypergradient(problem, [TRAINING], VALIDATION, state)
        with torch.no_grad():
            for p in problem.model.parameters():
                p.mul_(1.001)
        state = result.state


def normalised() -> hi.BilevelProblem:
    return ridge_problem(nn.Sequential(nn.BatchNorm1d(4).double(), Linear(4)), decay=1.0)


def test_a_random_loss_draws_as_it_would_without():
    """Also at the first call, which draws for itself besides."""
    left = []
    for backend in (Auto(), Soba(step_size=0.1)):
        torch.manual_seed(3)
        problem, state = dropout_problem(), {}
        for _ in range(4):
            result = backend.hypergradient(problem, [TRAINING], VALIDATION, state)
            state = result.state
            left.append((torch.get_rng_state(), result.training_loss))
    for (one, loss), (other, plain) in zip(left[:4], left[4:], strict=True):
        assert torch.equal(one, other) and loss == plain


# ----------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("bad", ["training", "validation"])
def test_a_step_that_fails_does_not_break_the_next(sampled, bad):
    """NaN in a batch: it is told, and after it all is as before."""
    problem = ridge_problem()
    problem.training_data = [TRAINING] * (2 if sampled else 1)
    broken = (TRAINING[0] * math.nan, TRAINING[1])
    state: State = {}
    for t in range(25):
        batches = {"training": TRAINING, "validation": VALIDATION} | ({bad: broken} if t in (0, 5, 6, 14) else {})
        result = Auto().hypergradient(problem, [batches["training"]], batches["validation"], state)
        state = result.state
        assert (result.status is Status.NON_FINITE) is (t in (0, 5, 6, 14))
        assert "plan" in state or result.status.failed
    exact = implicit_hypergradient(problem, [TRAINING], VALIDATION)
    assert method(result) == ("soba" if sampled else "heavy_ball")
    assert relative_error(result.gradients, exact) < (0.2 if sampled else 0.01)


@pytest.mark.parametrize("sampled", [False, True])
def test_no_validation_gradient_yet(sampled):
    """F that does not depend on w for a while: nothing is known, and that is looked at again."""
    awake = [0.0]
    problem = ridge_problem(
        scale=20.0,
        validation_loss=lambda model, batch: awake[0] * offset(model, batch) + 0.0 * next(model.parameters()).sum(),
    )
    problem.training_data, state = [TRAINING] * (2 if sampled else 1), {}
    for t in range(6):
        awake[0] = float(t >= 3)
        result = Auto().hypergradient(problem, [TRAINING], VALIDATION, state)
        state = saved_and_loaded(result.state)
        assert not result.status.failed
        assert ("no validation gradient yet" in result.note) is (t < 3)
        if t < 3:
            assert float(flatten(result.gradients).abs().max()) == 0.0
    assert relative_error(result.gradients, implicit_hypergradient(problem, [TRAINING], VALIDATION)) < 0.1


def test_a_run_resumed_with_data_that_it_did_not_have():
    """Whether the batches change is then asked of the data."""
    outer = hi.HyperOptimizer(ridge_problem(), torch.optim.SGD, lr=1e-3, backend="auto")
    outer.step(TRAINING, VALIDATION)
    outer.problem.training_data, outer.problem.validation_data = [TRAINING], [VALIDATION]
    assert method(outer.step(TRAINING, VALIDATION)) == "heavy_ball"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 0.0}, "Auto option 'tolerance': input should be greater than 0; got 0.0."),
        ({"budget": 0.0}, "Auto option 'budget': input should be greater than 0; got 0.0."),
        ({"budget": "much"}, "Auto option 'budget': input should be a valid number, unable to parse string"),
    ],
)
def test_options_that_cannot_hold(options, message):
    with pytest.raises(hi.BackendError) as caught:
        Auto(**options)
    assert str(caught.value).startswith(message)


def test_a_system_alone():
    """Without a problem, by conjugate gradients to the tolerance."""
    solution, products = solve(Auto(tolerance=1e-6), DEFINITE, right_hand_side(SIZE))
    plain, expected = solve(ConjugateGradient(1e-6, 60), DEFINITE, right_hand_side(SIZE))
    assert same(solution.value, plain.value) and products == expected


# --------------------------------------------------------------------------------------------------------------- cost


def test_it_spends_little_more_than_heavy_ball():
    """Products over 60 outer steps on the whole data, of the same run by hand; the survey and the checks included."""

    def run(backend: hi.Backend) -> tuple[int, float]:
        problem = ridge_problem(decay=torch.tensor([0.1, 0.3, 1.0, 2.0]))
        train_to_minimum(problem, [TRAINING])
        outer = hi.HyperOptimizer(problem, torch.optim.Adam, lr=0.02, backend=backend)
        spent = 0
        for _ in range(60):
            train_step(problem, TRAINING, problem.hyperparameters.values())
            spent += outer.step(TRAINING, VALIDATION).hvps
        return spent

    assert run(Auto()) <= 1.1 * run(HeavyBall())
