"""``auto``: what it takes on problems whose best method is known, what it says, and what it spends."""

from __future__ import annotations

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
from hyperopt_implicit.backend import Status
from hyperopt_implicit.errors import HyperoptWarning
from hyperopt_implicit.inner_loop import train_step
from hyperopt_implicit.operators import LossHessian
from hyperopt_implicit.plan import Plan
from hyperopt_implicit.survey import spectrum
from hyperopt_implicit.testing.assertions import relative_error, same, saved_and_loaded
from hyperopt_implicit.testing.oracles import train_to_minimum
from hyperopt_implicit.testing.specimens import (
    TRAINING,
    VALIDATION,
    Linear,
    quadratic_problem,
    regression_data,
    ridge_problem,
)
from hyperopt_implicit_backends import Auto, ConjugateGradient, HeavyBall, Soba, Unrolled

from .auto_runs import (
    COSTS,
    DEFINITE,
    SIZE,
    Moving,
    budgeted,
    method,
    with_costs,
)
from .matrices import right_hand_side, solve, spread, with_spectrum


def test_all_the_data_and_a_definite_hessian():
    run = Moving(DEFINITE, Auto())
    first = run.step()
    assert method(first) == "heavy_ball"
    assert "heavy_ball: one batch so far, condition number 10;" in first.note
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
        result = Auto().hypergradient(problem, given, VALIDATION, {})
        assert result.note.startswith("auto takes heavy_ball: all the training data at each call, condition number ")


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
    with pytest.warns(HyperoptWarning) as caught:
        found = Auto(tolerance=0.3, damping=0.1, budget=math.inf).for_problem(problem)
    assert found == Unrolled()
    assert [str(w.message) for w in caught] == [
        f"auto leaves {option!r}, a hyperparameter of the inner optimizer, to the backend 'unrolled', which has none "
        "of its options; damping, tolerance, budget will do nothing. Leave them out, or choose 'unrolled' yourself, "
        "with memory= for long training."
    ]


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


def test_the_survey_is_in_full_precision_and_not_compiled(monkeypatch):
    """What compiling takes, once, is no product's cost; the method itself has both options."""
    seen, events = [], []

    class Watched(Auto):
        def linearise(self, problem: Any, batches: Any) -> LossHessian:
            seen.append((self.precision, self.compile))
            return super().linearise(problem, batches)

    def made(problem: Any, batches: Any, lowered: Any, make: Any, *, gauss_newton: bool) -> LossHessian:
        events.append("compiled")
        return make()

    def surveyed(*given: Any) -> Any:
        assert events == []
        return spectrum(*given)

    monkeypatch.setattr("hyperopt_implicit.implicit.compiled", made)
    monkeypatch.setattr("hyperopt_implicit_backends.auto.spectrum", surveyed)
    problem = ridge_problem()
    state = Watched(compile=True).hypergradient(problem, [TRAINING], VALIDATION, {}).state
    assert seen == [("full", False)] and events == ["compiled"]
    Watched(compile=True).hypergradient(problem, [TRAINING], VALIDATION, state)
    assert seen == [("full", False)] and events == ["compiled"] * 2
    events.clear()
    Watched(precision="bfloat16").hypergradient(problem, [TRAINING], VALIDATION, {})
    assert seen == [("full", False)] * 2


@pytest.mark.parametrize("options", [{"compile": True}, {"precision": "bfloat16", "refinements": 2}])
def test_what_all_methods_share_is_handed_on(options):
    plan = Plan(rung=0, costs=COSTS, what="", random=False, damping=0.3, damped=False, largest=2.0)
    for rung, kind in ((-1, Soba), (0, HeavyBall), (1, ConjugateGradient)):
        plan.rung = rung
        found = Auto(damping=0.1, **options)._method(plan)
        assert type(found) is kind and found.damping == 0.3
        assert all(getattr(found, name) == value for name, value in options.items())


def test_a_hypergradient_on_which_u_has_no_bearing_still_has_one():
    """The direct term outweighs the rest by so much that hardly a residual is needed; u is solved for all the same."""
    plan = Plan(rung=1, costs=COSTS, what="", random=False, damping=0.0, damped=False, largest=2.0, ratio=0.01)
    assert Auto(tolerance=0.05)._method(plan).tolerance == 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 0.0}, "Auto option 'tolerance': input should be greater than 0; got 0.0."),
        ({"tolerance": 1.0}, "Auto option 'tolerance': input should be less than 1; got 1.0."),
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


# --------------------------------------------------------------------------------------------------------------- budget


def test_a_budget_that_one_product_is_more_than():
    run = Moving(DEFINITE, Auto(budget=0.01))
    result = run.step()
    assert result.note.endswith(" g, which is the least there is and more than the budget of 0.01 g.")
    assert method(result) == "heavy_ball"
    assert Auto(budget=1e9).hypergradient(run.problem, [None], None, {}).note.endswith(" g.")


@pytest.mark.parametrize("budget", [3.5, 5.0, 7.9])
def test_a_budget_for_heavy_ball_only(budget):
    """It is never left, however large the error, and spends a product: three iterations would do worse than that."""
    with pytest.warns(HyperoptWarning, match="does not: after 1 product the residual"):
        _, results = budgeted(budget, turn=0.05)
    assert {method(r) for r in results} == {"heavy_ball"}
    assert {r.hvps for t, r in enumerate(results) if t not in (0, 9, 39)} == {1}


@pytest.mark.parametrize(("budget", "iterations"), [(8.0, 4), (9.9, 5), (12.0, 8)])
def test_a_budget_for_a_few_iterations(budget, iterations):
    """Validation gradient, graph, a product for the warm start and the mixed derivative leave so many."""
    with pytest.warns(HyperoptWarning, match=f"does not: after {iterations + 1} products the residual"):
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
    _, endless = budgeted(math.inf)
    assert [(r.hvps, method(r)) for r in endless] == [(r.hvps, method(r)) for r in results]


@pytest.mark.parametrize(("budget", "turn", "first"), [(5.0, 0.05, 9), (8.0, 0.4, 19)], ids=["heavy_ball", "cg"])
def test_a_tolerance_that_is_missed_is_warned_of_once(budget, turn, first):
    """After ten calls with the method beyond which there is none."""
    run = Moving(with_spectrum(spread(0.02, 5.0, SIZE)), Auto(budget=budget), turn=turn)
    run.step()
    run.state = with_costs(run.state)
    warned = []
    for t in range(1, 60):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = run.step()
        if caught:
            warned.append(t)
            (message,) = (str(w.message) for w in caught)
            products = {5.0: "1 product", 8.0: "5 products"}[budget]
            assert message == (
                f"auto was to keep the hypergradient's error below 0.01, and does not: after {products} the residual "
                f"is {result.residual:.2g}. Give it a larger budget where it has one, add damping= or weight decay, or "
                "let the hyperparameters move more slowly (outer_lr, inner_steps)."
            )
            assert statistics.median(run.state["plan"]["recent"][-10:]) > 0.02
    assert warned == [first]


@pytest.mark.parametrize(("budget", "turn"), [(None, 0.4), (5.0, 1e-4)], ids=["cg arrives", "heavy_ball follows"])
def test_a_tolerance_that_is_kept_is_not_warned_of(budget, turn):
    run, results = budgeted(budget, turn=turn)
    assert not run.state["plan"]["warned"] and not any(r.status.failed for r in results)


# ----------------------------------------------------------------------------------------------- what it costs and says


def test_costs_are_in_units_of_a_gradient():
    """Measured, so only roughly known: the graph of the gradient and a product cost about as much as a gradient."""
    x = torch.randn(2000, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    problem = ridge_problem(Linear(100))
    costs = Auto().hypergradient(problem, [(x, x[:, 0])], (x[:200], x[:200, 1]), {}).state["plan"]["costs"]
    assert 0.02 < costs["validation"] < 5 and 0.1 < costs["graph"] < 20 and 0.1 < costs["product"] < 20
    assert costs["seconds"] > 0.0


def test_the_note_is_one_line_and_changes_with_the_plan():
    run = Moving(with_spectrum(spread(0.02, 5.0, SIZE)), Auto(), turn=0.4)
    results = run.steps(25)
    for result in results:
        assert result.note.startswith("auto takes ") and result.note.endswith(".") and "\n" not in result.note
        assert "a product costs " in result.note and " g and a hypergradient " in result.note
    changes = [t for t in range(1, 25) if results[t].note != results[t - 1].note]
    assert changes == [9, 19]
    assert results[9].note.startswith("auto takes cg from the last solution: one batch so far, condition number ")
    assert "its error was" not in results[9].note and "its error was" in results[19].note


def test_the_cost_of_cg_is_that_of_the_last_call():
    """The parts cost 1 g each: the validation gradient, the graph, its products and the mixed derivative."""
    _, results = budgeted(None, steps=11)
    last = results[9].state["plan"]["products"]
    assert last == results[10].hvps == 12
    assert results[9].note.endswith(" a product costs 1.0 g and a hypergradient about 15.0 g.")


def test_an_error_that_could_not_be_measured():
    """Sixty iterations do not arrive on this one, and what they leave is no yardstick."""
    eigenvalues = torch.logspace(-5, 0, 150, dtype=torch.float64).tolist()
    run = Moving(with_spectrum(eigenvalues), Auto(), turn=1e-3)
    with pytest.warns(HyperoptWarning, match="does not: after 61 products"):
        results = run.steps(20)
    assert "; its error" not in results[18].note
    assert results[19].note.endswith(" g; its error could not be measured.")
    assert math.isnan(run.state["plan"]["error"]) and run.state["plan"]["ratio"] == 1.0


def test_the_method_behind_a_state():
    """Which is what ``check`` measures the solver by: damping that was taken on the way is no fault of it."""
    backend = Auto(curvature="gauss_newton")
    assert backend.settled({}) is backend
    plan = Plan(rung=0, costs=COSTS, what="", random=False, damping=0.3, damped=True, largest=2.0)
    for rung, kind in ((-1, Soba), (0, HeavyBall), (1, ConjugateGradient)):
        plan.rung = rung
        found = backend.settled({"plan": plan.state()})
        assert type(found) is kind and (found.damping, found.curvature) == (0.3, "gauss_newton")
    assert HeavyBall().settled({"plan": plan.state()}) == HeavyBall()


def test_check_does_not_blame_the_solver_for_damping():
    problem = quadratic_problem(torch.diag(torch.tensor([2.0, 1.0, -0.7], dtype=torch.float64)))
    with pytest.warns(HyperoptWarning, match="auto met an indefinite Hessian"):
        report = hi.check(problem, "auto", training_batches=[None], validation_batches=[None], seconds=1.0)
    assert report.parts["solver"] < 1e-9 < 0.1 < report.parts["damping and curvature"]
    assert "solver" not in report.verdict


@pytest.mark.parametrize("name", ["cg", "heavy_ball", "soba", "exact", "neumann", "identity"])
def test_other_backends_have_nothing_to_say(name):
    assert hi.get_backend(name).hypergradient(ridge_problem(), [TRAINING], VALIDATION, {}).note is None


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
