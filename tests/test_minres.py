"""MINRES against dense linear algebra: its rates, its minimality, and how it ends where A has no inverse."""

from __future__ import annotations

import math

import pytest
import torch

import hyperopt_implicit as hi
from hyperopt_implicit.backend import Status
from hyperopt_implicit.testing.specimens import quadratic_problem
from hyperopt_implicit_backends import MinimalResidual

from .matrices import (
    assert_residual_is_true,
    assert_solves,
    flat,
    right_hand_side,
    solve,
    spread,
    true_residual,
    with_spectrum,
)

POSITIVE = with_spectrum(spread(0.5, 5.0, 12))
INDEFINITE = with_spectrum([-0.7, *spread(0.5, 5.0, 11)])
SINGULAR = with_spectrum([0.0, *spread(0.5, 5.0, 11)])
VECTOR = right_hand_side(12)
THOROUGH = MinimalResidual(tolerance=1e-13, max_iterations=100)


@pytest.mark.parametrize("matrix", [POSITIVE, -POSITIVE, INDEFINITE], ids=["positive", "negative", "indefinite"])
def test_solves_any_invertible_system(matrix):
    solution, products = solve(THOROUGH, matrix, VECTOR)
    assert solution.status is Status.CONVERGED
    assert_solves(matrix, solution, VECTOR, 1e-12)
    assert_residual_is_true(matrix, solution, VECTOR)
    assert solution.iterations == products == 12


@pytest.mark.parametrize("curvature", [-2.0, 0.1, 2.0])
@pytest.mark.parametrize("size", [1, 4])
def test_solves_a_multiple_of_the_identity_in_one_step(size, curvature):
    matrix, vector = curvature * torch.eye(size, dtype=torch.float64), right_hand_side(size)
    solution, products = solve(THOROUGH, matrix, vector)
    assert (solution.status, solution.iterations, products) == (Status.CONVERGED, 1, 1)
    assert_solves(matrix, solution, vector)


@pytest.mark.parametrize("matrix", [POSITIVE, INDEFINITE, SINGULAR], ids=["positive", "indefinite", "singular"])
def test_the_residual_is_the_least_over_the_krylov_space(matrix):
    """For each k, against least squares over span{v, Av, …}: ‖v − A V y‖ with V orthonormal."""
    v = flat(VECTOR)
    krylov, before = v[:, None] / v.norm(), 1.0
    for k in range(1, 12):
        solution, products = solve(MinimalResidual(tolerance=0.0, max_iterations=k), matrix, VECTOR)
        y = torch.linalg.lstsq(matrix @ krylov, v[:, None]).solution
        least = float((matrix @ krylov @ y - v[:, None]).norm() / v.norm())
        assert true_residual(matrix, solution, VECTOR) == pytest.approx(least, rel=1e-6)
        assert_residual_is_true(matrix, solution, VECTOR)
        assert solution.residual <= before
        assert (solution.iterations, products) == (k, k)
        before = solution.residual
        krylov = torch.linalg.qr(torch.cat([krylov, matrix @ krylov[:, -1:]], dim=1)).Q


def test_keeps_its_bound_where_definite():
    """2((√κ − 1)/(√κ + 1))^k."""
    matrix, vector = with_spectrum(spread(0.1, 10.0, 40)), right_hand_side(40)
    q = (math.sqrt(100) - 1) / (math.sqrt(100) + 1)
    for k in range(1, 31):
        solution, _ = solve(MinimalResidual(tolerance=0.0, max_iterations=k), matrix, vector)
        assert solution.residual <= 2 * q**k


@pytest.mark.parametrize("kappa", [3.0, 10.0])
def test_keeps_its_bound_where_indefinite(kappa):
    """2((κ − 1)/(κ + 1))^⌊k/2⌋ for a spectrum in [−κ, −1] ∪ [1, κ]; and the rate is about that, not faster."""
    half = spread(1.0, kappa, 60)
    matrix, vector = with_spectrum([*half, *(-x for x in half)]), right_hand_side(120)
    q = (kappa - 1) / (kappa + 1)
    residuals = []
    for k in range(1, 25):
        solution, _ = solve(MinimalResidual(tolerance=0.0, max_iterations=k), matrix, vector)
        assert solution.residual <= 2 * q ** (k // 2)
        residuals.append(solution.residual)
    assert (residuals[21] / residuals[9]) ** (1 / 6) == pytest.approx(q, rel=0.15)


def test_a_standstill_of_one_iteration_is_no_end():
    """⟨v, Av⟩ = 0: the first iterate is zero, where conjugate residuals divide by zero."""
    matrix = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    solution, products = solve(THOROUGH, matrix, {"a": torch.ones(2, dtype=torch.float64)})
    assert (solution.status, products) == (Status.CONVERGED, 2)
    torch.testing.assert_close(flat(solution.value), torch.tensor([1.0, -1.0], dtype=torch.float64))
    stopped, _ = solve(MinimalResidual(max_iterations=1), matrix, {"a": torch.ones(2, dtype=torch.float64)})
    assert (stopped.status, stopped.residual) == (Status.TRUNCATED, 1.0)


def test_stops_at_its_tolerance():
    solution, products = solve(MinimalResidual(tolerance=1e-2), INDEFINITE, VECTOR)
    before, _ = solve(MinimalResidual(tolerance=0.0, max_iterations=solution.iterations - 1), INDEFINITE, VECTOR)
    assert solution.status is Status.CONVERGED
    assert solution.residual <= 1e-2 < before.residual
    assert products == solution.iterations


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(12))
def test_never_claims_to_solve_an_inconsistent_system(dtype, seed):
    """Fewer rows than parameters, of either sign: the least residual is returned, and known for what it is."""
    generator = torch.Generator().manual_seed(seed)
    rows = 2 + seed % 9
    x = torch.randn(rows, 12, generator=generator, dtype=torch.float64)
    signs = torch.randn(rows, generator=generator, dtype=torch.float64).sign() if seed % 2 else torch.ones(rows)
    matrix = (x.T @ (signs.double()[:, None] * x) / rows).to(dtype)
    vector = {name: part.to(dtype) for name, part in right_hand_side(12, seed).items()}
    null = torch.linalg.qr(x.T, mode="complete").Q[:, rows:]
    least = float((null.T @ flat(vector).double()).norm() / flat(vector).double().norm())
    state: dict = {}
    for _ in range(3):
        solution, _ = solve(MinimalResidual(tolerance=0.0, max_iterations=300), matrix, vector, state)
        assert solution.status is Status.SINGULAR
        assert solution.residual == pytest.approx(least, rel=1e-3)
        exact = (matrix.double() @ flat(solution.value).double() - flat(vector).double()).norm()
        assert float(exact / flat(vector).double().norm()) == pytest.approx(least, rel=1e-3)
        state = solution.state


def test_singular_system_ends_at_the_least_squares_residual():
    solution, _ = solve(THOROUGH, SINGULAR, VECTOR)
    u = torch.linalg.pinv(SINGULAR) @ flat(VECTOR)
    assert solution.status is Status.SINGULAR
    assert solution.residual == pytest.approx(
        float((SINGULAR @ u - flat(VECTOR)).norm() / flat(VECTOR).norm()), rel=1e-9
    )
    assert_residual_is_true(SINGULAR, solution, VECTOR)


def test_a_consistent_singular_system_is_solved_with_least_norm():
    v = SINGULAR @ flat(VECTOR)
    solution, _ = solve(MinimalResidual(tolerance=1e-12, max_iterations=100), SINGULAR, {"a": v[:6], "b": v[6:]})
    assert solution.status is Status.CONVERGED
    torch.testing.assert_close(flat(solution.value), torch.linalg.pinv(SINGULAR) @ v)


def test_a_matrix_of_zeros_is_singular():
    solution, products = solve(THOROUGH, torch.zeros(12, 12, dtype=torch.float64), VECTOR)
    assert (solution.status, solution.residual, products) == (Status.SINGULAR, 1.0, 1)
    assert flat(solution.value).abs().max() == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_products_are_reported(bad):
    matrix = POSITIVE.clone()
    matrix[3, 3] = bad
    solution, _ = solve(MinimalResidual(), matrix, VECTOR)
    assert solution.status is Status.NON_FINITE
    assert torch.isfinite(flat(solution.value)).all()
    assert solution.state == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_left_is_converged(dtype):
    matrix = (0.123 * torch.eye(4) + 1e-9 * with_spectrum(spread(1.0, 2.0, 4))).to(dtype)
    vector = {name: x.to(dtype) for name, x in right_hand_side(4).items()}
    solution, _ = solve(MinimalResidual(tolerance=0.0, max_iterations=50), matrix, vector)
    assert solution.status is Status.CONVERGED
    assert solution.iterations < 10


def test_warm_start_saves_products():
    backend = MinimalResidual(tolerance=1e-6, max_iterations=100)
    first, cold = solve(backend, INDEFINITE, VECTOR)
    moved = INDEFINITE + 1e-7 * with_spectrum(spread(0.0, 1.0, 12), seed=5)
    second, warm = solve(backend, moved, VECTOR, first.state)
    again, nothing = solve(backend, moved, VECTOR, second.state)
    assert warm <= cold / 2
    assert (again.iterations, nothing) == (0, 1)
    assert_residual_is_true(moved, second, VECTOR)
    assert torch.equal(flat(again.value), flat(second.value))


def test_drops_a_bad_warm_start_and_carries_nothing_without():
    far = {"solution": {name: 1e6 * torch.ones_like(x) for name, x in VECTOR.items()}}
    fresh, cold = solve(THOROUGH, INDEFINITE, VECTOR)
    solution, products = solve(THOROUGH, INDEFINITE, VECTOR, far)
    assert torch.equal(flat(solution.value), flat(fresh.value))
    assert products == cold + 1
    without, products = solve(MinimalResidual(warm_start=False), INDEFINITE, VECTOR, fresh.state)
    assert without.state == {}
    assert products == without.iterations


def test_damping_solves_the_damped_system():
    solution, _ = solve(MinimalResidual(tolerance=1e-12, max_iterations=100, damping=0.3), INDEFINITE, VECTOR)
    damped = INDEFINITE + 0.3 * torch.eye(12, dtype=torch.float64)
    assert_solves(damped, solution, VECTOR)
    assert_residual_is_true(damped, solution, VECTOR)


def test_it_is_right_at_a_saddle_point():
    """Where cg gives up: dF/dλ = H⁻¹ ∂F/∂w for a hyperparameter that shifts the minimum."""
    matrix = torch.diag(torch.tensor([2.0, 1.0, 0.5, -0.7], dtype=torch.float64))
    problem = quadratic_problem(matrix)
    result = hi.hypergradient(problem, THOROUGH, training_batches=[None], validation_batch=None)
    assert result.status is Status.CONVERGED
    w = problem.params["weight"].detach()
    torch.testing.assert_close(result.gradients["shift"].double(), (w - 1) / torch.diag(matrix), rtol=1e-6, atol=1e-6)
