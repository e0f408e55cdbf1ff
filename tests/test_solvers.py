"""The implicit backends' solvers against dense linear algebra: rates where theory gives one, and how each gives up."""

from __future__ import annotations

import math

import pytest
import torch

import hyperopt_implicit as hi
from hyperopt_implicit.backend import Status
from hyperopt_implicit.testing.specimens import Linear, quadratic_problem
from hyperopt_implicit_backends import ConjugateGradient, Exact, Neumann

from .matrices import (
    assert_residual_is_true,
    assert_solves,
    basis,
    error,
    flat,
    right_hand_side,
    solve,
    spread,
    with_spectrum,
)

POSITIVE = with_spectrum(spread(0.5, 5.0, 12))
INDEFINITE = with_spectrum([-0.7, *spread(0.5, 5.0, 11)])
SINGULAR = with_spectrum([0.0, *spread(0.5, 5.0, 11)])
VECTOR = right_hand_side(12)
THOROUGH = [
    Neumann(terms=2000, tolerance=1e-13),
    Neumann(terms=2000, step_size=0.3, tolerance=1e-13),
    ConjugateGradient(tolerance=1e-13, max_iterations=100),
    Exact(),
]


# ------------------------------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize("backend", THOROUGH, ids=str)
def test_solves_a_positive_definite_system(backend):
    solution, _ = solve(backend, POSITIVE, VECTOR)
    assert solution.status is Status.CONVERGED
    assert_solves(POSITIVE, solution, VECTOR)


@pytest.mark.parametrize("backend", THOROUGH, ids=str)
@pytest.mark.parametrize("curvature", [0.1, 2.0])
@pytest.mark.parametrize("size", [1, 4])
def test_solves_a_multiple_of_the_identity(backend, size, curvature):
    """In one step, which must count: peers return the iterate before it, which is zero."""
    matrix = curvature * torch.eye(size, dtype=torch.float64)
    vector = right_hand_side(size)
    solution, _ = solve(backend, matrix, vector)
    assert solution.status is Status.CONVERGED
    assert_solves(matrix, solution, vector)


@pytest.mark.parametrize("backend", [Neumann(terms=50), ConjugateGradient(tolerance=0.0, max_iterations=50)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_left_is_converged(backend, dtype):
    """Iterations past the last digit neither underflow into another status nor claim more digits than there are."""
    matrix = (0.123 * torch.eye(4) + 1e-9 * with_spectrum(spread(1.0, 2.0, 4))).to(dtype)
    vector = {name: x.to(dtype) for name, x in right_hand_side(4).items()}
    solution, _ = solve(backend, matrix, vector)
    assert solution.status is Status.CONVERGED
    assert solution.iterations < 10


@pytest.mark.parametrize("backend", [Neumann(), Neumann(step_size=0.1), ConjugateGradient(), Exact()], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_products_are_reported(backend, bad):
    matrix = POSITIVE.clone()
    matrix[3, 3] = bad
    solution, _ = solve(backend, matrix, VECTOR)
    assert solution.status is Status.NON_FINITE


@pytest.mark.parametrize(
    "backend",
    [
        Neumann(terms=7),
        Neumann(terms=7, step_size=0.2),
        Neumann(terms=100, step_size=0.6),
        ConjugateGradient(max_iterations=3),
        ConjugateGradient(max_iterations=100, tolerance=1e-6),
        ConjugateGradient(max_iterations=100, damping=1.0),
        Exact(),
        Exact(damping=1.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("matrix", [POSITIVE, INDEFINITE, SINGULAR], ids=["positive", "indefinite", "singular"])
def test_reported_residual_is_that_of_the_value(backend, matrix):
    """Whatever the status; with damping, that of the damped system."""
    solution, _ = solve(backend, matrix, VECTOR)
    assert_residual_is_true(matrix + backend.damping * torch.eye(12), solution, VECTOR)


@pytest.mark.parametrize("backend", ["neumann", "cg", "exact"])
def test_nothing_to_solve_costs_nothing(backend):
    """∂F/∂w = 0."""
    problem = quadratic_problem(torch.eye(3, dtype=torch.float64))  # w = b = 1 is where F is least
    result = hi.hypergradient(problem, backend, training_batches=[None], validation_batch=None)
    assert result.status is Status.CONVERGED
    assert (result.iterations, result.hvps, result.residual) == (0, 0, 0.0)
    assert result.gradients["shift"].abs().max() == 0.0


# ---------------------------------------------------------------------------------------------------------- neumann


@pytest.mark.parametrize("terms", [1, 2, 5, 10, 40])
def test_neumann_is_the_series(terms):
    """In the eigenbasis each coordinate of u_K is (1 − (1 − αλ)^K)/λ times that of v: the series, α ≠ 1 included."""
    eigenvalues, alpha = torch.tensor(spread(0.5, 5.0, 12), dtype=torch.float64), 0.15
    solution, products = solve(Neumann(terms=terms, step_size=alpha), POSITIVE, VECTOR)
    q = basis(12)
    expected = (1 - (1 - alpha * eigenvalues) ** terms) / eigenvalues * (q.T @ flat(VECTOR))
    torch.testing.assert_close(q.T @ flat(solution.value), expected, rtol=1e-11, atol=1e-13)
    assert (solution.iterations, products) == (terms, terms)


@pytest.mark.parametrize("step_size", [0.05, 0.2, "auto"])
def test_neumann_converges_at_its_rate(step_size):
    """‖u_K − u‖ stays under (1 − αλ_min)^K·‖u‖, and in the end shrinks by just that factor a term."""
    one_term, _ = solve(Neumann(terms=1, step_size=step_size), POSITIVE, VECTOR)
    alpha = float(one_term.value["a"][0] / VECTOR["a"][0])
    rate = 1 - alpha * 0.5
    size = torch.linalg.solve(POSITIVE, flat(VECTOR)).norm()
    errors = []
    for terms in range(1, 81):
        solution, _ = solve(Neumann(terms=terms, step_size=step_size), POSITIVE, VECTOR)
        errors.append(error(POSITIVE, solution, VECTOR).norm())
        assert errors[-1] <= rate**terms * size * (1 + 1e-9)
    # the next slower eigenvalue is 0.91, so what is left of it after 60 terms is (1 − 0.91α)^60 / (1 − 0.5α)^60
    tail = ((1 - alpha * (0.5 + 4.5 / 11)) / rate) ** 60
    assert abs(errors[-1] / errors[-2] / rate - 1) <= 10 * tail
    assert tail < 0.3


def test_neumann_stops_at_its_tolerance():
    solution, products = solve(Neumann(terms=500, step_size=0.2, tolerance=1e-3), POSITIVE, VECTOR)
    before, _ = solve(Neumann(terms=solution.iterations - 1, step_size=0.2), POSITIVE, VECTOR)
    assert solution.status is Status.CONVERGED
    assert solution.residual <= 1e-3 < before.residual
    assert products == solution.iterations


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("eigenvalues", [spread(0.5, 5.0, 12), spread(1e-3, 1.0, 40), [0.01] * 20 + [100.0]], ids=len)
def test_neumann_finds_its_step_size(eigenvalues, seed):
    """1 ≤ α·λ_max < 2, where the series converges, after eight products."""
    matrix, vector = with_spectrum(eigenvalues, seed), right_hand_side(len(eigenvalues), seed + 10)
    solution, products = solve(Neumann(terms=1), matrix, vector)
    alpha = float(solution.value["a"][0] / vector["a"][0])
    assert 1 - 1e-9 <= alpha * max(eigenvalues) < 1.3
    assert solution.state["largest_eigenvalue"] == pytest.approx(1 / alpha)
    assert products == 8 + 1


def test_neumann_follows_a_changing_hessian():
    """One more product a call keeps the estimate with a Hessian that grows and turns, and no call diverges."""
    state = {}
    for step in range(30):
        grown = POSITIVE + step * with_spectrum([*[0.0] * 11, 1.0], seed=7)
        solution, products = solve(Neumann(terms=10), grown, VECTOR, state)
        assert products == 10 + (1 if state else 8)
        assert solution.status is Status.TRUNCATED
        assert solution.residual < 1
        state = solution.state
    assert state["largest_eigenvalue"] == pytest.approx(float(torch.linalg.eigvalsh(grown)[-1]), rel=0.02)


def test_neumann_corrects_an_underestimated_eigenvalue():
    """The state names the smallest eigenvector: α = 1/λ_min would diverge, and is lowered on the way."""
    smallest = basis(12)[:, 0]
    state = {"eigenvector": {"a": smallest[:6].clone(), "b": smallest[6:].clone()}, "largest_eigenvalue": 0.5}
    solution, _ = solve(Neumann(terms=300), POSITIVE, VECTOR, state)
    assert not solution.status.failed
    assert solution.residual < 1e-6
    assert_solves(POSITIVE, solution, VECTOR, 1e-5)
    assert_residual_is_true(POSITIVE, solution, VECTOR)


def test_neumann_forgets_a_state_of_other_shapes():
    state = {"eigenvector": {"c": torch.ones(5)}, "largest_eigenvalue": 1e-3}
    solution, products = solve(Neumann(terms=1), POSITIVE, VECTOR, state)
    fresh, _ = solve(Neumann(terms=1), POSITIVE, VECTOR)
    assert products == 8 + 1
    assert torch.equal(flat(solution.value), flat(fresh.value))


@pytest.mark.parametrize("step_size", [0.41, 0.6, 3.0, 1e6])
def test_neumann_stops_when_the_step_size_is_too_large(step_size):
    """α > 2/λ_max: the first growth ends it, and what is returned is no worse than nothing."""
    mostly_flat = flat(VECTOR) @ basis(12)
    mostly_flat[-1] *= 1e-3
    v = basis(12) @ mostly_flat
    vector = {"a": v[:6], "b": v[6:]}
    solution, _ = solve(Neumann(terms=1000, step_size=step_size), POSITIVE, vector)
    assert solution.status is Status.DIVERGED
    assert solution.residual <= 1
    assert_residual_is_true(POSITIVE, solution, vector)
    if step_size < 1:
        assert solution.iterations > 0


@pytest.mark.parametrize("step_size", [0.2, "auto"])
def test_neumann_notices_negative_curvature(step_size):
    solution, _ = solve(Neumann(terms=1000, step_size=step_size), INDEFINITE, VECTOR)
    assert solution.status is Status.NEGATIVE_CURVATURE
    assert 0 < solution.residual <= 1
    downwards = {"a": basis(12)[:6, 0], "b": basis(12)[6:, 0]}
    solution, _ = solve(Neumann(terms=1000, step_size=step_size), INDEFINITE, downwards)
    assert solution.status is Status.NEGATIVE_CURVATURE
    assert solution.residual == 1
    assert flat(solution.value).abs().max() == 0


def test_neumann_notices_a_null_space():
    """H v = 0 exactly: no number of terms helps."""
    matrix = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
    solution, _ = solve(Neumann(step_size=0.5), matrix, {"a": torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)})
    assert solution.status is Status.SINGULAR
    assert solution.residual == 1


# --------------------------------------------------------------------------------------------------------------- cg


def test_cg_is_exact_after_as_many_steps_as_there_are_eigenvalues():
    matrix = with_spectrum([0.1] * 3 + [1.0] * 5 + [7.0] * 4)
    solution, products = solve(ConjugateGradient(tolerance=1e-11), matrix, VECTOR)
    assert solution.status is Status.CONVERGED
    assert (solution.iterations, products) == (3, 3)
    assert_solves(matrix, solution, VECTOR, 1e-11)


def test_cg_keeps_its_error_bound():
    """In the energy norm the error falls every step, and stays under 2((√κ − 1)/(√κ + 1))^k of the first."""
    matrix, vector = with_spectrum(spread(0.1, 10.0, 40)), right_hand_side(40)
    q = (math.sqrt(100) - 1) / (math.sqrt(100) + 1)
    start = torch.linalg.solve(matrix, flat(vector))
    energy = [float((start @ matrix @ start).sqrt())]
    for k in range(1, 31):
        solution, products = solve(ConjugateGradient(tolerance=0.0, max_iterations=k), matrix, vector)
        e = error(matrix, solution, vector)
        energy.append(float((e @ matrix @ e).sqrt()))
        assert energy[-1] < energy[-2]
        assert energy[-1] <= 2 * q**k * energy[0]
        assert (solution.iterations, products) == (k, k)


def test_cg_warm_start_saves_products():
    """After a small change, the last solution is nearer than zero."""
    backend = ConjugateGradient(tolerance=1e-6, max_iterations=100)
    first, cold = solve(backend, POSITIVE, VECTOR)
    moved = POSITIVE + 1e-5 * with_spectrum(spread(0.0, 1.0, 12), seed=5)
    second, warm = solve(backend, moved, VECTOR, first.state)
    again, nothing = solve(backend, moved, VECTOR, second.state)
    assert warm <= cold / 2
    assert (again.iterations, nothing) == (0, 1)
    assert_solves(moved, second, VECTOR, 1e-5)


@pytest.mark.parametrize(
    "last",
    [
        {"a": torch.full((6,), 1e6, dtype=torch.float64), "b": torch.ones(6, dtype=torch.float64)},
        {"a": torch.full((6,), math.nan, dtype=torch.float64), "b": torch.ones(6, dtype=torch.float64)},
        {"a": torch.zeros(6, dtype=torch.float64), "b": torch.zeros(6, dtype=torch.float64)},
        {"a": torch.ones(5, dtype=torch.float64), "b": torch.ones(6, dtype=torch.float64)},
        {"another": torch.ones(12, dtype=torch.float64)},
    ],
    ids=["far", "nan", "zero", "other shape", "other name"],
)
def test_cg_drops_a_bad_warm_start(last):
    backend = ConjugateGradient(tolerance=1e-6, max_iterations=100)
    fresh, cold = solve(backend, POSITIVE, VECTOR)
    solution, products = solve(backend, POSITIVE, VECTOR, {"solution": last})
    assert torch.equal(flat(solution.value), flat(fresh.value))
    assert products <= cold + 1


def test_cg_without_warm_start_carries_nothing():
    backend = ConjugateGradient(warm_start=False)
    first, cold = solve(backend, POSITIVE, VECTOR)
    again, products = solve(backend, POSITIVE, VECTOR, solve(ConjugateGradient(), POSITIVE, VECTOR)[0].state)
    assert first.state == again.state == {}
    assert products == cold


def test_cg_notices_negative_curvature():
    solution, _ = solve(ConjugateGradient(tolerance=0.0, max_iterations=100), INDEFINITE, VECTOR)
    assert solution.status is Status.NEGATIVE_CURVATURE
    assert solution.iterations < 12
    assert torch.isfinite(flat(solution.value)).all()


@pytest.mark.parametrize("matrix", [POSITIVE, INDEFINITE], ids=["positive", "indefinite"])
def test_cg_damping_solves_the_damped_system(matrix):
    solution, _ = solve(ConjugateGradient(tolerance=1e-12, max_iterations=100, damping=1.0), matrix, VECTOR)
    assert solution.status is Status.CONVERGED
    assert_solves(matrix + torch.eye(12), solution, VECTOR)
    assert_residual_is_true(matrix + torch.eye(12), solution, VECTOR)


def test_cg_warm_start_knows_damping():
    backend = ConjugateGradient(tolerance=1e-12, max_iterations=100, damping=1.0)
    first, _ = solve(backend, POSITIVE, VECTOR)
    again, products = solve(backend, POSITIVE, VECTOR, first.state)
    assert products == 1
    assert_residual_is_true(POSITIVE + torch.eye(12), again, VECTOR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cg_never_claims_to_solve_an_inconsistent_system(dtype):
    """More parameters than rows, and no decay: a step along a null direction would make rounding look like success."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 12, generator=generator, dtype=dtype)
    vector = {name: part.to(dtype) for name, part in VECTOR.items()}
    state: dict = {}
    for _ in range(3):
        solution, _ = solve(ConjugateGradient(tolerance=0.0, max_iterations=300), x.T @ x / 5, vector, state)
        assert solution.status is Status.SINGULAR
        assert torch.isfinite(flat(solution.value)).all()
        assert solution.residual > 0.1
        state = solution.state


def test_cg_does_not_step_from_the_least_norm_solution_of_an_inconsistent_system():
    """A warm start whose residual lies in the null space entirely: its own curvature is no measure of smallness."""
    u = torch.linalg.pinv(SINGULAR) @ flat(VECTOR)
    solution, _ = solve(ConjugateGradient(tolerance=0.0), SINGULAR, VECTOR, {"solution": {"a": u[:6], "b": u[6:]}})
    assert solution.status is Status.SINGULAR
    torch.testing.assert_close(flat(solution.value), u)


def test_cg_solves_a_consistent_singular_system_with_least_norm():
    v = SINGULAR @ flat(VECTOR)
    solution, _ = solve(ConjugateGradient(tolerance=1e-12, max_iterations=100), SINGULAR, {"a": v[:6], "b": v[6:]})
    assert solution.status is Status.CONVERGED
    torch.testing.assert_close(flat(solution.value), torch.linalg.pinv(SINGULAR) @ v)


# ------------------------------------------------------------------------------------------------------------ exact


@pytest.mark.parametrize("matrix", [POSITIVE, INDEFINITE], ids=["positive", "indefinite"])
def test_exact_solves_any_invertible_system(matrix):
    solution, products = solve(Exact(), matrix, VECTOR)
    assert solution.status is Status.CONVERGED
    assert_solves(matrix, solution, VECTOR, 1e-12)
    assert products == 12


def test_exact_says_that_a_system_is_singular():
    solution, _ = solve(Exact(), SINGULAR, VECTOR)
    assert solution.status is Status.SINGULAR
    torch.testing.assert_close(flat(solution.value), torch.linalg.pinv(SINGULAR) @ flat(VECTOR))


def test_exact_solves_a_consistent_singular_system_with_least_norm():
    v = SINGULAR @ flat(VECTOR)
    solution, _ = solve(Exact(), SINGULAR, {"a": v[:6], "b": v[6:]})
    assert solution.status is Status.CONVERGED
    torch.testing.assert_close(flat(solution.value), torch.linalg.pinv(SINGULAR) @ v)


def test_exact_on_a_hessian_of_zeros():
    solution, _ = solve(Exact(), torch.zeros(12, 12, dtype=torch.float64), VECTOR)
    assert solution.status is Status.SINGULAR
    assert flat(solution.value).abs().max() == 0


def test_exact_damping_solves_the_damped_system():
    solution, _ = solve(Exact(damping=0.3), POSITIVE, VECTOR)
    damped = POSITIVE + 0.3 * torch.eye(12, dtype=torch.float64)
    assert_solves(damped, solution, VECTOR, 1e-12)
    assert_residual_is_true(damped, solution, VECTOR)


def test_exact_refuses_a_large_model():
    problem = quadratic_problem(torch.eye(6, dtype=torch.float64))
    with pytest.raises(hi.BackendError, match=r"max_parameters=5 .*this one has 6.*Use 'cg'"):
        hi.hypergradient(problem, Exact(max_parameters=5), training_batches=[None], validation_batch=None)


# ------------------------------------------------------------------------------------- neumann, the last product saved


@pytest.mark.parametrize("step_size", [0.15, "auto"])
@pytest.mark.parametrize("terms", [1, 2, 7])
def test_neumann_without_the_last_product(terms, step_size):
    """The value is the same; the residual is that of the series with one term less."""
    with_it, products = solve(Neumann(terms=terms, step_size=step_size), POSITIVE, VECTOR)
    without, fewer = solve(Neumann(terms=terms, step_size=step_size, measure_residual=False), POSITIVE, VECTOR)
    torch.testing.assert_close(flat(without.value), flat(with_it.value), rtol=1e-14, atol=1e-15)
    assert (without.status, without.iterations, fewer) == (Status.TRUNCATED, terms, products - 1)
    assert without.residual > with_it.residual
    if terms == 1:
        assert without.residual == 1.0
    else:
        before, _ = solve(Neumann(terms=terms - 1, step_size=step_size), POSITIVE, VECTOR)
        assert without.residual == before.residual


def test_neumann_without_the_last_product_still_gives_up_and_converges():
    """What the products before it show."""
    options = {"terms": 1000, "measure_residual": False}
    solution, products = solve(Neumann(step_size=0.2, tolerance=1e-3, **options), POSITIVE, VECTOR)
    same, as_many = solve(Neumann(terms=1000, step_size=0.2, tolerance=1e-3), POSITIVE, VECTOR)
    assert solution.status is Status.CONVERGED
    assert (solution.residual, products) == (same.residual, as_many)
    assert solve(Neumann(step_size=0.6, **options), POSITIVE, VECTOR)[0].status is Status.DIVERGED
    assert solve(Neumann(step_size=0.2, **options), INDEFINITE, VECTOR)[0].status is Status.NEGATIVE_CURVATURE


def test_mixed_derivative_that_is_not_finite():
    """√shift has no slope at zero: H and v are sound, and ∂²L/∂λ∂w is infinite."""

    @hi.hyperparameter("shift", init=0.0)
    def training_loss(model, batch, *, shift):
        return 0.5 * model.weight.square().sum() + shift.sqrt() * model.weight.sum()

    problem = hi.BilevelProblem(
        Linear(3),
        training_loss,
        lambda model, batch: 0.5 * (model.weight - 1.0).square().sum(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
    )
    result = Exact().hypergradient(problem, [None], None, {})
    assert result.status is Status.NON_FINITE
    assert not torch.isfinite(result.gradients["shift"])
