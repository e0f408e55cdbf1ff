"""``auto`` on mini-batches and random losses: how it tells, and what it does with them."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import hyperopt_implicit as hi
from hyperopt_implicit.backend import Hypergradient, State, Status
from hyperopt_implicit.errors import HyperoptWarning
from hyperopt_implicit.inner_loop import train_step
from hyperopt_implicit.plan import Plan
from hyperopt_implicit.testing.assertions import assert_unchanged, relative_error, saved_and_loaded
from hyperopt_implicit.testing.oracles import dense_derivatives, flatten, implicit_hypergradient, train_to_minimum
from hyperopt_implicit.testing.specimens import (
    TRAINING,
    VALIDATION,
    regression_data,
    ridge_problem,
)
from hyperopt_implicit_backends import Auto, Soba

from .auto_runs import (
    dropout_problem,
    method,
)
from .quadratics import mixture


def test_mini_batches():
    """The start is a solution on the first of them, and each call a step of at most 1/λ_max from there."""
    m = mixture(4, noise=0.5)
    result = m.hypergradient(Auto(), [0], {})
    assert method(result) == "soba" and "mini-batches, largest eigenvalue" in result.note
    largest = result.state["plan"]["largest"]
    assert largest == pytest.approx(float(torch.linalg.eigvalsh(m.hessians[0])[-1]), rel=1e-2)
    krylov = torch.stack([torch.linalg.matrix_power(m.hessians[0], k) @ m.v for k in range(3)], 1)
    q = torch.linalg.qr(krylov).Q
    start = q @ torch.linalg.solve(q.T @ m.hessians[0] @ q, q.T @ m.v)  # three iterations of conjugate gradients
    torch.testing.assert_close(result.gradients["shift"], start)
    again = m.hypergradient(Auto(), [1], result.state)
    u = result.state["method"]["solution"]["weight"]
    torch.testing.assert_close(again.gradients["shift"], 1.1 * u)
    assert result.hvps == 4 + 3 + 1, "as many products of Lanczos as there are dimensions, a start, and the method's"
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


# -------------------------------------------------------------------------------------------------- without data to ask


def test_batches_that_change_between_calls():
    """Without data to ask, one call cannot tell; the second one can, and ten more whether they have come to rest."""
    outer = hi.HyperOptimizer(ridge_problem(), torch.optim.SGD, lr=1e-3, backend="auto")
    others = [regression_data(seed) for seed in range(2, 6)]
    assert method(outer.step(TRAINING, VALIDATION)) == "heavy_ball"
    for batch in others:
        assert method(outer.step(batch, VALIDATION)) == "soba"
    results = [outer.step(others[-1], VALIDATION) for _ in range(12)]
    assert [method(r) for r in results] == ["soba"] * 9 + ["heavy_ball"] * 3
    assert "all the training data at each call" in results[-1].note, "for so long that it is no longer one so far"
    assert method(outer.step(others[-1], TRAINING)) == "heavy_ball", "another validation batch is no reason"


def test_batches_that_stay_the_same_from_one_call_to_the_next():
    outer = hi.HyperOptimizer(ridge_problem(), torch.optim.SGD, lr=1e-3, backend="auto")
    batch = [x.clone() for x in TRAINING]
    taken = {method(outer.step(tuple(x.clone() for x in batch), VALIDATION)) for _ in range(15)}
    assert taken == {"heavy_ball"}


@pytest.mark.parametrize("jump", [0.0, 0.2], ids=["heavy_ball", "cg"])
def test_all_the_data_in_another_order_each_time(jump):
    """As a shuffling loader gives it whose batch is all there is."""
    problem, generator = ridge_problem(decay=torch.tensor([0.1, 0.3, 1.0, 2.0])), torch.Generator().manual_seed(0)
    train_to_minimum(problem, [TRAINING])
    outer = hi.HyperOptimizer(problem, torch.optim.SGD, lr=1e-2, backend="auto")
    x, y = TRAINING
    taken, errors, spent = [], [], []
    for _ in range(50):
        rows = torch.randperm(len(x), generator=generator)
        train_step(problem, (x[rows], y[rows]), problem.hyperparameters.values())
        with torch.no_grad():
            problem.model.weight.add_(jump * torch.randn(4, generator=generator, dtype=torch.float64))
        truth = implicit_hypergradient(problem, [TRAINING], VALIDATION)
        result = outer.step((x[rows], y[rows]), VALIDATION)
        taken.append(method(result))
        spent.append(result.hvps)
        errors.append(relative_error(result.gradients, truth))
    assert set(taken) == ({"heavy_ball", "cg"} if jump else {"heavy_ball"})
    assert statistics.median(errors) < 0.01 and max(errors) < 0.1
    if not jump:
        assert [t for t, n in enumerate(spent) if n > 1] == [0, 9, 39], "one survey, and the error measured twice"


def test_two_batches_in_turn_are_mini_batches():
    outer = hi.HyperOptimizer(ridge_problem(), torch.optim.SGD, lr=1e-3, backend="auto")
    batches = [TRAINING, regression_data(2)]
    taken = [method(outer.step(batches[t % 2], VALIDATION)) for t in range(30)]
    assert taken == ["heavy_ball"] + ["soba"] * 29


def test_a_run_resumed_with_data_that_it_did_not_have():
    """Whether the batches change is then asked of the data."""
    outer = hi.HyperOptimizer(ridge_problem(), torch.optim.SGD, lr=1e-3, backend="auto")
    outer.step(TRAINING, VALIDATION)
    outer.problem.training_data, outer.problem.validation_data = [TRAINING], [VALIDATION]
    assert method(outer.step(TRAINING, VALIDATION)) == "heavy_ball"


# -------------------------------------------------------------------------------------------------------- random losses


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


# ---------------------------------------------------------------------------------------------------------- failures


def in_turn(attached: bool, glitch: int | None, steps: int = 60) -> tuple[list[Hypergradient], list[State]]:
    """150 rows in batches of 16, the last one of 6; at one call their inputs are six times as large."""
    x, y = regression_data(3, rows=150)
    batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 150, 16)]
    problem, state, results, states = ridge_problem(decay=0.1), {}, [], []
    if attached:
        problem.training_data = batches
    for t in range(steps):
        inputs, targets = batches[t % len(batches)]
        batch = (6.0 * inputs, targets) if t == glitch else (inputs, targets)
        results.append(Auto().hypergradient(problem, [batch], VALIDATION, state))
        state = saved_and_loaded(results[-1].state)
        states.append(state)
        with torch.no_grad():
            problem.model.weight.add_(1e-3)
    return results, states


@pytest.mark.parametrize("glitch", [None, 5, 9, 30])
@pytest.mark.parametrize("attached", [False, True])
def test_the_method_does_not_change_to_and_fro(attached, glitch):
    """Once at most, at the second call, where there was no data to ask; not after a failure, nor a smaller batch."""
    results, _ = in_turn(attached, glitch)
    taken = [method(r) for r in results]
    assert taken == (["soba"] if attached else ["heavy_ball"]) + ["soba"] * 59
    assert [t for t, r in enumerate(results) if r.status.failed] == ([] if glitch is None else [glitch])


@pytest.mark.parametrize("attached", [False, True])
def test_mini_batches_on_which_it_diverges(attached):
    """The next call takes half the step, from a new start; that the batches are a part of the data is still known."""
    results, states = in_turn(attached, 5, steps=30)
    assert results[5].status is Status.DIVERGED
    before = states[4]["plan"]["largest"]
    assert "plan" not in states[5] and states[5]["sampled"] == 2.0 * before
    assert "mini-batches" in results[6].note and results[6].hvps > 1
    assert [s["plan"]["largest"] for s in states[6:]] == [2.0 * before] * 24
    assert f"soba with a step size from {0.5 / before:.2g} down" in results[6].note
    assert Plan.from_state(states[6]["plan"]).step_size == 0.5 / before
    assert [r.hvps for r in results[7:]] == [1] * 23 and not any(r.status.failed for r in results[6:])


@pytest.mark.parametrize(("status", "factor"), [(Status.NON_FINITE, 1.0), (Status.DIVERGED, 2.0)])
def test_only_a_divergence_shrinks_the_step(monkeypatch, status, factor):
    """A sample that is not finite says nothing of the eigenvalues."""
    m = mixture(4, noise=0.5)
    state = m.hypergradient(Auto(), [0], {}).state
    sound = Soba.hypergradient
    monkeypatch.setattr(Soba, "hypergradient", lambda *given: dataclasses.replace(sound(*given), status=status))
    failed = m.hypergradient(Auto(), [1], state)
    assert failed.state["sampled"] == factor * state["plan"]["largest"]
