"""``heavy_ball`` against Polyak's recursion in numpy: its rate at rest, its lag behind what moves, how it recovers."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

import hyperopt_implicit as hi
from hyperopt_implicit.backend import State, Status
from hyperopt_implicit.errors import BackendError
from hyperopt_implicit.implicit import Solution
from hyperopt_implicit.testing.assertions import saved_and_loaded
from hyperopt_implicit.testing.oracles import DenseOperator
from hyperopt_implicit.vectors import Params
from hyperopt_implicit_backends import HeavyBall
from hyperopt_implicit_backends.heavy_ball import coefficients

from .matrices import (
    assert_residual_is_true,
    assert_solves,
    basis,
    error,
    flat,
    right_hand_side,
    solve,
    spread,
    true_residual,
    with_spectrum,
)
from .ridge import best_decay, ridge

SIZE = 12
MATRIX, VECTOR = with_spectrum(spread(0.5, 5.0, SIZE)), right_hand_side(SIZE)
V = flat(VECTOR)
SCALES = torch.linspace(0.3, 2.0, SIZE, dtype=torch.float64)


def split(x: Tensor) -> Params:
    return {"a": x[: SIZE // 2].clone(), "b": x[SIZE // 2 :].clone()}


def begun(u: Tensor, smallest: float, largest: float, d: Tensor | None = None) -> State:
    """A state that names its u and the Ritz values."""
    displacement = torch.zeros_like(u) if d is None else d
    return {"solution": split(u), "displacement": split(displacement), "smallest": smallest, "largest": largest}


def polyak(
    matrix: Tensor, v: Tensor, u: Tensor, rate: float, momentum: float, scales: Tensor | None = None
) -> Iterator[np.ndarray]:
    """u_0, u_1, … of d ← βd − ρM⁻¹(Au − v), u ← u + d, in numpy."""
    a, right, x = matrix.numpy(), v.numpy(), u.numpy().copy()
    d, m = np.zeros_like(x), 1.0 if scales is None else scales.numpy()
    while True:
        yield x.copy()
        d = momentum * d - rate * (a @ x - right) / m
        x = x + d


def call(
    backend: HeavyBall, matrix: Tensor, v: Tensor, state: State, scales: Tensor | None = None
) -> tuple[Solution, int]:
    operator = DenseOperator(matrix)
    solution = backend.solve_scaled(operator, split(v), state, None if scales is None else split(scales))
    return solution, operator.products


# ----------------------------------------------------------------------------------------------------- the first call


@pytest.mark.parametrize("tolerance", [0.5, 0.05, 1e-4])
def test_the_first_call_is_conjugate_gradients(tolerance):
    """To a hundredth of the tolerance, in as many products as iterations; what is carried is a start at rest."""
    solution, products = solve(HeavyBall(tolerance=tolerance), MATRIX, VECTOR)
    plain, iterations = solve(hi.get_backend("cg", tolerance=0.01 * tolerance), MATRIX, VECTOR)
    assert torch.equal(flat(solution.value), flat(plain.value))
    assert solution.status is Status.CONVERGED
    assert solution.iterations == products == iterations
    assert solution.residual <= 0.01 * tolerance
    assert_residual_is_true(MATRIX, solution, VECTOR)
    state = solution.state
    assert torch.equal(flat(state["solution"]), flat(solution.value))
    assert state["solution"]["a"].data_ptr() != solution.value["a"].data_ptr()
    assert flat(state["displacement"]).abs().max() == 0.0
    assert 0.5 * (1 - 1e-9) <= state["smallest"] < 1.0
    assert 4.5 < state["largest"] <= 5.0 * (1 + 1e-9)


def test_too_few_iterations_are_told():
    solution, products = solve(HeavyBall(max_iterations=3), MATRIX, VECTOR)
    assert (solution.status, solution.iterations, products) == (Status.TRUNCATED, 3, 3)
    assert_residual_is_true(MATRIX, solution, VECTOR)


# ------------------------------------------------------------------------------------------------------ the recursion


@pytest.mark.parametrize("products", [1, 2, 3, 5])
@pytest.mark.parametrize("scales", [None, SCALES], ids=["plain", "preconditioned"])
def test_is_polyaks_recursion(products, scales):
    """n products a call, of which the last is at the u that is returned; with its residual on the present system."""
    backend, start = HeavyBall(products=products, tolerance=9.0), torch.linspace(-1.0, 1.0, SIZE, dtype=torch.float64)
    smallest, largest = (0.5, 5.0) if scales is None else (0.2, 14.0)
    low, high = min(products**2 / 5, 1.0) * smallest, 1.05 * largest
    rate = 4 / (math.sqrt(high) + math.sqrt(low)) ** 2
    momentum = ((math.sqrt(high) - math.sqrt(low)) / (math.sqrt(high) + math.sqrt(low))) ** 2
    iterates = polyak(MATRIX, V, start, rate, momentum, scales)
    state = begun(start, smallest, largest)
    for _ in range(30 // products):
        solution, count = call(backend, MATRIX, V, state, scales)
        for _ in range(products - 1):
            next(iterates)
        np.testing.assert_allclose(flat(solution.value).numpy(), next(iterates), rtol=1e-10, atol=1e-12)
        assert_residual_is_true(MATRIX, solution, VECTOR)
        assert (solution.iterations, count) == (products, products)
        assert solution.status is Status.TRUNCATED
        state = saved_and_loaded(solution.state)
        assert (state["smallest"], state["largest"]) == (smallest, largest)


def test_nothing_that_was_given_is_changed():
    start = torch.linalg.solve(MATRIX, V) + 0.02
    state, vector = begun(start, 0.5, 5.0, torch.full((SIZE,), 0.01).double()), split(V)
    before = saved_and_loaded(state)
    for tolerance, products in ((9.0, 1), (9.0, 2), (1e-6, 1), (1e-6, 2)):
        HeavyBall(tolerance=tolerance, products=products).solve(DenseOperator(MATRIX), vector, state)
        assert torch.equal(flat(vector), V)
        for key in ("solution", "displacement"):
            assert torch.equal(flat(state[key]), flat(before[key]))


@pytest.mark.parametrize("products", [1, 3])
def test_its_rate_at_rest(products):
    """The slope of log error against products is log √β, whatever the eigenvalues between l and h."""
    matrix = with_spectrum(spread(0.1, 10.0, SIZE))
    backend, state = HeavyBall(products=products, tolerance=9.0), begun(torch.zeros(SIZE).double(), 0.1, 10.0)
    _, momentum = coefficients(0.1, 10.0, products)
    logs = []
    for _ in range(360 // products):
        solution, _ = call(backend, matrix, V, state)
        state = solution.state
        logs.append(math.log(float(error(matrix, solution, VECTOR).norm())))
    kept = [(products * t, x) for t, x in enumerate(logs) if -22 < x < -5]
    slope = float(np.polyfit(*zip(*kept, strict=True), 1)[0])
    assert len(kept) * products > 25
    assert slope == pytest.approx(0.5 * math.log(momentum), rel=0.06)


def test_its_bounds_are_those_of_the_theory():
    """With l and h at the extreme eigenvalues, |1 + β − ρμ| ≤ 2√β in between, with equality at both ends."""
    for smallest, largest, products in ((0.5, 5.0, 1), (0.01, 30.0, 2), (0.2, 0.2, 1), (1.0, 2.0, 9)):
        rate, momentum = coefficients(smallest, largest, products)
        low, high = min(0.2 * products**2, 1.0) * smallest, 1.05 * largest
        for end, sign in ((low, 1.0), (high, -1.0)):
            assert (1 + momentum - rate * end) * sign == pytest.approx(2 * math.sqrt(momentum), abs=1e-12)
        assert 2 * (1 + momentum) / rate == pytest.approx(low + high), "where it ceases to be stable"


def test_nothing_left_is_converged():
    state: State = {}
    for _ in range(400):
        solution, _ = solve(HeavyBall(), MATRIX, VECTOR, state)
        state = solution.state
    assert solution.status is Status.CONVERGED
    assert_solves(MATRIX, solution, VECTOR, 1e-12)


# ------------------------------------------------------------------------------------------------------------ the lag

EIGENVALUES = torch.tensor(spread(0.5, 5.0, SIZE), dtype=torch.float64)
STEP = torch.linspace(1.0, 2.0, SIZE, dtype=torch.float64)  # of the solution, an outer step


def lags(products: int, calls: int = 200) -> Tensor:
    """Errors [calls, n] in each eigendirection of a system whose solution moves by ``STEP`` from call to call."""
    backend, solution = HeavyBall(products=products, tolerance=9.0), 1e3 * torch.ones(SIZE, dtype=torch.float64)
    state, found = begun(solution, 0.5, 5.0), []
    for _ in range(calls):
        result, _ = call(backend, torch.diag(EIGENVALUES), EIGENVALUES * solution, state)
        found.append(flat(result.value) - solution)
        state, solution = result.state, solution + STEP
    return torch.stack(found)


def test_its_lag_behind_a_system_that_moves():
    """u_t − A⁻¹v_t settles at −√(h·l)/μ·δ."""
    expected = -math.sqrt(1.05 * 5.0 * 0.2 * 0.5) / EIGENVALUES * STEP
    torch.testing.assert_close(lags(1)[-1], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("products", [2, 3, 6])
def test_its_lag_with_several_products(products):
    """The mean over the steps of a call is −√(h·l)/μ·δ/n; the u that is used is the last of them, and nearer."""
    low, high = min(0.2 * products**2, 1.0) * 0.5, 1.05 * 5.0
    rate, momentum = coefficients(0.5, 5.0, products)
    errors = lags(products)
    torch.testing.assert_close(errors[-1], errors[-2], rtol=1e-6, atol=1e-8)
    # the cycle that a call closes: n steps, and the solution moves by δ
    steps = [
        torch.tensor([[1 - rate * mu, momentum], [-rate * mu, momentum]], dtype=torch.float64) for mu in EIGENVALUES
    ]
    means = []
    for i, (step, delta) in enumerate(zip(steps, STEP, strict=True)):
        moved = torch.tensor([delta, 0.0], dtype=torch.float64)
        cycle = torch.linalg.matrix_power(step, products)
        x = torch.linalg.solve(torch.eye(2, dtype=torch.float64) - cycle, -moved)  # right after the system moved
        seen = []
        for _ in range(products):
            seen.append(x[0])
            x = step @ x
        assert float(errors[-1, i]) == pytest.approx(float(seen[-1]), rel=1e-5, abs=1e-7)
        means.append(torch.stack(seen).mean())
    expected = -math.sqrt(low * high) / EIGENVALUES * STEP / products
    torch.testing.assert_close(torch.stack(means), expected, rtol=1e-9, atol=1e-12)


def test_two_products_come_to_rest_in_a_quarter_of_the_calls():
    """l is four times larger with them, and there are twice as many."""
    rates = [products * math.log(coefficients(0.01, 100.0, products)[1]) for products in (1, 2)]
    assert rates[1] / rates[0] == pytest.approx(4.0, rel=0.01)


# --------------------------------------------------------------------------------------------------------- recoveries


def test_above_the_tolerance_it_is_solved_anew():
    """From u, to a quarter of the tolerance; the product at u is not lost, and the bounds are renewed."""
    backend, exact = HeavyBall(tolerance=1e-2), torch.linalg.solve(MATRIX, V)
    state = begun(exact + 0.02, 0.5, 5.0, torch.ones(SIZE).double())
    solution, products = call(backend, MATRIX, V, state)
    assert products == solution.iterations + 1
    assert 1 < solution.iterations < solve(backend, MATRIX, VECTOR)[1]
    assert solution.residual <= 0.25 * 1e-2
    plain, _ = solve(hi.get_backend("cg", tolerance=0.25 * 1e-2), MATRIX, VECTOR, {"solution": state["solution"]})
    assert torch.equal(flat(solution.value), flat(plain.value))
    assert solution.status is Status.CONVERGED
    assert_residual_is_true(MATRIX, solution, VECTOR)
    assert flat(solution.state["displacement"]).abs().max() == 0.0
    assert torch.equal(flat(solution.state["solution"]), flat(solution.value))


@pytest.mark.parametrize("size", [0.999e-2, 1.001e-2])
def test_the_tolerance_is_where_it_says(size):
    off = torch.linalg.solve(MATRIX, V * size)
    _, products = call(HeavyBall(tolerance=1e-2), MATRIX, V, begun(torch.linalg.solve(MATRIX, V) + off, 0.5, 5.0))
    assert (products == 1) == (size < 1e-2)


def test_a_u_that_is_worse_than_zero_is_left():
    """The solve is then the cold one, after the product that told."""
    solution, products = call(HeavyBall(), MATRIX, V, begun(torch.full((SIZE,), 50.0).double(), 0.5, 5.0))
    cold, count = solve(HeavyBall(), MATRIX, VECTOR)
    assert torch.equal(flat(solution.value), flat(cold.value))
    assert products == count + 1


def test_bounds_are_remembered_for_a_while():
    """Each time it is solved anew, by a tenth less where they are not met again."""
    solution, _ = call(HeavyBall(), MATRIX, V, begun(torch.zeros(SIZE).double(), 0.05, 100.0))
    assert solution.state["smallest"] == pytest.approx(0.05 / 0.9)
    assert solution.state["largest"] == pytest.approx(90.0)
    solution, _ = call(HeavyBall(), MATRIX, V, begun(torch.zeros(SIZE).double(), 0.7, 4.0))
    assert solution.state["smallest"] == pytest.approx(0.5, rel=0.1)
    assert solution.state["largest"] == pytest.approx(5.0, rel=0.01)


@pytest.mark.parametrize("products", [1, 2])
@pytest.mark.parametrize("factor", [4.0, 100.0, 0.25])
def test_curvature_that_changes_at_once(factor, products):
    """No call is above the tolerance, the bounds follow, and afterwards a call is cheap again."""
    backend, state, counts = HeavyBall(products=products), {}, []
    for t in range(120):
        matrix = MATRIX * (factor if t >= 20 else 1.0)
        solution, count = solve(backend, matrix, VECTOR, state)
        assert true_residual(matrix, solution, VECTOR) <= backend.tolerance
        assert not solution.status.failed
        state = saved_and_loaded(solution.state)
        counts.append(count)
    assert counts[10:20] == [products] * 10 and counts[20] > products
    assert counts[-10:] == [products] * 10
    assert state["largest"] >= 0.98 * 5.0 * factor
    assert_solves(matrix, solution, VECTOR, 1e-3)


def test_an_eigenvalue_that_grows_out_of_the_bounds():
    """One direction becomes unstable that v hardly shows; its growth is noticed before it matters."""
    backend, state, q = HeavyBall(), {}, basis(SIZE)[:, -1]
    v = V - (1 - 1e-6) * (q @ V) * q
    for t in range(150):
        matrix = MATRIX + (15.0 if t >= 10 else 0.0) * torch.outer(q, q)
        solution, _ = call(backend, matrix, v, state)
        state = solution.state
        assert true_residual(matrix, solution, split(v)) <= backend.tolerance
    assert state["largest"] == pytest.approx(20.0, rel=0.02)
    assert float(error(matrix, solution, split(v)).norm()) < 1e-4


@pytest.mark.parametrize("products", [1, 2])
def test_an_indefinite_matrix(products):
    """Negative curvature is told at each call, nothing is carried, and it is well again when the matrix is."""
    backend, indefinite = HeavyBall(products=products), with_spectrum([-0.7, *spread(0.5, 5.0, SIZE - 1)])
    state: State = {}
    for _ in range(3):
        solution, _ = solve(backend, indefinite, VECTOR, state)
        assert solution.status is Status.NEGATIVE_CURVATURE
        assert torch.isfinite(flat(solution.value)).all()
        assert_residual_is_true(indefinite, solution, VECTOR)
        state = solution.state
        assert state == {}
    well, _ = solve(backend, MATRIX, VECTOR, state)
    assert well.status is Status.CONVERGED


def test_a_matrix_that_becomes_indefinite():
    """From a good u: sooner or later it is told, and never is a value returned that has run away."""
    backend, state, q = HeavyBall(), {}, basis(SIZE)[:, 0]
    statuses = []
    for t in range(80):
        matrix = MATRIX - (1.2 if t >= 10 else 0.0) * torch.outer(q, q)
        solution, _ = solve(backend, matrix, VECTOR, state)
        state = solution.state
        statuses.append(solution.status)
        assert solution.residual <= 1.0 or solution.status.failed
        assert flat(solution.value).norm() < 20 * torch.linalg.solve(matrix, V).norm()
    assert not any(status.failed for status in statuses[:10])
    assert Status.NEGATIVE_CURVATURE in statuses[10:]


def test_a_null_space_does_not_run_away():
    """u holds all that can be solved; what is left of v has no curvature but rounding."""
    for seed in range(6):
        matrix, q = with_spectrum([0.0, *spread(0.5, 5.0, SIZE - 1)], seed), basis(SIZE, seed)[:, 0]
        consistent = V - (q @ V) * q
        start = torch.linalg.pinv(matrix) @ consistent
        solution, products = call(HeavyBall(), matrix, consistent + 0.3 * V.norm() * q, begun(start, 0.5, 5.0))
        assert (solution.status, products) == (Status.SINGULAR, 2)
        assert torch.equal(flat(solution.value), flat(split(start)))
        assert solution.state == {}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["solution", "displacement"])
@pytest.mark.parametrize("products", [1, 2])
def test_a_state_that_is_not_finite(bad, place, products):
    """It is well at the next call at the latest, and the value is sound at each."""
    state = begun(torch.linalg.solve(MATRIX, V), 0.5, 5.0)
    state[place]["a"][2] = bad
    cold = solve(HeavyBall(), MATRIX, VECTOR)[1]
    for turn in range(2):
        solution, count = call(HeavyBall(products=products), MATRIX, V, state)
        if place == "solution":
            assert count == (products if turn else cold), "nothing is spent on a u that is none"
        assert_solves(MATRIX, solution, VECTOR, 0.05)
        assert not solution.status.failed
        state = solution.state
    assert all(torch.isfinite(flat(state[key])).all() for key in ("solution", "displacement"))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("state", [{}, begun(torch.linalg.solve(MATRIX, V), 0.5, 5.0)], ids=["cold", "warm"])
def test_products_that_are_not_finite(bad, state):
    matrix = MATRIX.clone()
    matrix[3, 3] = bad
    solution, _ = solve(HeavyBall(), matrix, VECTOR, state)
    assert solution.status is Status.NON_FINITE
    assert solution.state == {}


@pytest.mark.parametrize(
    "state",
    [
        {"solution": {"a": torch.ones(5)}, "displacement": {"a": torch.ones(5)}, "smallest": 1.0, "largest": 2.0},
        {"solution": split(V)},
        {"solution": split(V), "displacement": {"b": torch.ones(6)}, "smallest": 1.0, "largest": 2.0},
    ],
    ids=["other shapes", "another method's", "half"],
)
def test_a_state_that_is_not_its_own_is_a_cold_start(state):
    solution, products = solve(HeavyBall(), MATRIX, VECTOR, state)
    cold, count = solve(HeavyBall(), MATRIX, VECTOR)
    looked = "b" in state["solution"]  # at a u that fits, by one product
    assert torch.equal(flat(solution.value), flat(cold.value)) and products == count + looked


def test_another_methods_solution_is_a_start():
    """Fewer products than from nothing, and the spectrum is looked at as deep as from nothing."""
    near = torch.linalg.solve(MATRIX, V) * 1.1
    solution, products = solve(HeavyBall(), MATRIX, VECTOR, {"solution": split(near)})
    _, count = solve(HeavyBall(), MATRIX, VECTOR)
    assert products < count
    assert true_residual(MATRIX, solution, VECTOR) <= 0.01 * HeavyBall().tolerance
    assert solution.state["largest"] > 4.0


# -------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("options", [{}, {"products": 2}, {"damping": 1e-9}])
def test_a_run_reaches_the_best_decay(options):
    """On the whole data; nearly all calls are one product."""
    result = hi.optimize(
        ridge(),
        {"name": "heavy_ball", **options},
        outer_steps=150,
        inner_steps=3,
        outer_lr=0.06,
        tracking=False,
        progress=False,
    )
    assert float(result.hyperparameters["decay"]) == pytest.approx(best_decay(), rel=0.02)


def test_damping_is_part_of_the_system():
    damped, state = MATRIX + 0.4 * torch.eye(SIZE, dtype=torch.float64), {}
    for _ in range(300):
        solution, products = solve(HeavyBall(damping=0.4), MATRIX, VECTOR, state)
        state = solution.state
    assert products == 1
    assert_residual_is_true(damped, solution, VECTOR)
    assert_solves(damped, solution, VECTOR, 1e-11)


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("products", 0, "input should be greater than or equal to 1; got 0"),
        ("tolerance", 0.0, "input should be greater than 0; got 0.0"),
        ("max_iterations", 0, "input should be greater than or equal to 1; got 0"),
    ],
)
def test_options_that_cannot_be(option, value, rule):
    with pytest.raises(BackendError) as caught:
        hi.get_backend("heavy_ball", **{option: value})
    assert str(caught.value) == f"HeavyBall option {option!r}: {rule}."
