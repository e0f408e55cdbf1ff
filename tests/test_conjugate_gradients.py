"""Conjugate gradients against the best point of each Krylov space, and their Ritz values against dense ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hyperopt_implicit.backend import Status
from hyperopt_implicit.conjugate_gradients import Iterations, conjugate_gradients
from hyperopt_implicit.testing.oracles import DenseOperator
from hyperopt_implicit.vectors import Params, clone
from hyperopt_implicit_backends import ConjugateGradient

from .matrices import basis, flat, right_hand_side, solve, spread, with_spectrum

SIZE = 10
MATRIX = with_spectrum(spread(0.5, 5.0, SIZE))
VECTOR = right_hand_side(SIZE)
V = flat(VECTOR)
SCALES = torch.linspace(0.2, 3.0, SIZE, dtype=torch.float64)


def split(x: Tensor) -> Params:
    return {"a": x[: SIZE // 2].clone(), "b": x[SIZE // 2 :].clone()}


def run(matrix: Tensor, vector: Params = VECTOR, **options: object) -> tuple[Iterations, int]:
    """Where it arrives, and the number of products."""
    operator = DenseOperator(matrix)
    options = {"target": 0.0, "iterations": 100, **options}
    return conjugate_gradients(operator, vector, **options), operator.products


def krylov(matrix: Tensor, residual: Tensor, k: int) -> Tensor:
    """An orthonormal basis [n, k] of span(r, Ar, …, A^(k−1) r), made orthogonal twice."""
    columns: list[Tensor] = []
    for _ in range(k):
        x = matrix @ columns[-1] if columns else residual
        for _ in range(2):
            for q in columns:
                x = x - (q @ x) * q
        columns.append(x / x.norm())
    return torch.stack(columns, 1)


def best(matrix: Tensor, v: Tensor, k: int, start: Tensor | None = None) -> Tensor:
    """The u of least error in the A-norm in start + the k-th Krylov space: the Galerkin solution, by dense algebra."""
    start = torch.zeros_like(v) if start is None else start
    q = krylov(matrix, v - matrix @ start, k)
    return start + q @ torch.linalg.solve(q.T @ matrix @ q, q.T @ (v - matrix @ start))


def ritz(matrix: Tensor, v: Tensor, k: int) -> Tensor:
    """The eigenvalues of A seen from the k-th Krylov space."""
    q = krylov(matrix, v, k)
    return torch.linalg.eigvalsh(q.T @ matrix @ q)


# -------------------------------------------------------------------------------------------------------- the iterates


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("warm", [False, True])
def test_each_iterate_is_the_best_of_its_krylov_space(k, warm):
    """With v − Au beside it, in so many products; v is not changed, and the start is where it says."""
    start = torch.linalg.solve(MATRIX, V) + 0.1 * right_hand_side(SIZE, 5)["a"].repeat(2) if warm else None
    pair = None if start is None else (split(start), split(V - MATRIX @ start))
    given = clone(VECTOR)
    found, products = run(MATRIX, start=pair, iterations=k)
    u = flat(found.solution)
    torch.testing.assert_close(u, best(MATRIX, V, k, start), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(flat(found.residual), V - MATRIX @ u, rtol=1e-9, atol=1e-13)
    assert found.size == pytest.approx(float((V - MATRIX @ u).norm()), rel=1e-9)
    assert (found.count, products, found.status) == (k, k, Status.TRUNCATED)
    assert torch.equal(flat(given), V)
    if pair is not None:
        assert found.solution is pair[0] and found.residual is pair[1], "changed in place, as it says"


@pytest.mark.parametrize("eigenvalues", [[3.0] * 10, [0.1] * 3 + [7.0] * 7, [0.1] * 2 + [1.0] * 5 + [7.0] * 3])
def test_it_ends_after_as_many_steps_as_there_are_eigenvalues(eigenvalues):
    """And then the Ritz values are eigenvalues."""
    matrix, distinct = with_spectrum(eigenvalues), len(set(eigenvalues))
    found, products = run(matrix, target=1e-11)
    assert (found.status, found.count, products) == (Status.CONVERGED, distinct, distinct)
    torch.testing.assert_close(flat(found.solution), torch.linalg.solve(matrix, V), rtol=1e-10, atol=1e-11)
    assert found.smallest == pytest.approx(min(eigenvalues), rel=1e-9)
    assert found.largest == pytest.approx(max(eigenvalues), rel=1e-9)


@pytest.mark.parametrize("target", [1.0, 1e-3, 1e-8])
def test_it_stops_at_the_first_residual_below_the_target(target):
    found, products = run(MATRIX, target=target)
    before, _ = run(MATRIX, target=target, iterations=found.count - 1)
    assert found.size <= target < before.size
    assert (found.status, before.status) == (Status.CONVERGED, Status.TRUNCATED)
    assert products == found.count


def test_a_residual_of_zero_ends_it():
    found, products = run(torch.tensor([[2.0]], dtype=torch.float64), {"a": torch.ones(1, dtype=torch.float64)})
    assert (found.status, products, found.size) == (Status.CONVERGED, 1, 0.0)


def test_one_dimension():
    found, products = run(torch.tensor([[0.7]], dtype=torch.float64), right_hand_side(1), target=1e-12)
    assert (found.status, products) == (Status.CONVERGED, 1)
    assert found.solution["a"].item() == pytest.approx(right_hand_side(1)["a"].item() / 0.7, rel=1e-15)
    assert found.smallest == found.largest == pytest.approx(0.7, rel=1e-15)


@pytest.mark.parametrize(("target", "status"), [(0.0, Status.TRUNCATED), (1e3, Status.CONVERGED)])
def test_no_iteration_knows_no_eigenvalues(target, status):
    found, products = run(MATRIX, target=target, iterations=0 if target == 0.0 else 5)
    assert (found.count, products, found.status) == (0, 0, status)
    assert math.isnan(found.smallest) and math.isnan(found.largest)
    assert flat(found.solution).abs().max() == 0.0 and torch.equal(flat(found.residual), V)
    assert found.residual["a"].data_ptr() != VECTOR["a"].data_ptr()


# ------------------------------------------------------------------------------------------------------- Ritz values


@pytest.mark.parametrize("k", range(1, 10))
def test_ritz_values_are_those_of_lanczos(k):
    """Inside the eigenvalues, and nearer to them with every step."""
    found, _ = run(MATRIX, iterations=k)
    expected = ritz(MATRIX, V, k)
    assert found.smallest == pytest.approx(float(expected[0]), rel=1e-8)
    assert found.largest == pytest.approx(float(expected[-1]), rel=1e-8)
    assert 0.5 * (1 - 1e-9) <= found.smallest <= found.largest <= 5.0 * (1 + 1e-9)
    if k > 1:
        before, _ = run(MATRIX, iterations=k - 1)
        assert found.smallest < before.smallest and found.largest > before.largest


def test_ritz_values_at_the_end_are_the_eigenvalues():
    found, _ = run(MATRIX, target=1e-12)
    assert found.count == SIZE
    assert found.smallest == pytest.approx(0.5, rel=1e-9)
    assert found.largest == pytest.approx(5.0, rel=1e-9)


def test_ritz_values_stay_inside_when_orthogonality_is_lost():
    """Far more iterations than dimensions, at a condition of 10⁸."""
    eigenvalues = torch.logspace(-6, 2, 30, dtype=torch.float64).tolist()
    found, _ = run(with_spectrum(eigenvalues), right_hand_side(30), iterations=400)
    assert 1e-6 * (1 - 1e-3) <= found.smallest <= found.largest <= 100 * (1 + 1e-9)


# ------------------------------------------------------------------------------------------------- the preconditioner


@pytest.mark.parametrize("k", [1, 2, 4, 7])
def test_preconditioned_is_plain_on_the_scaled_system(k):
    """u = M^(−½) x for the x of M^(−½) A M^(−½) x = M^(−½) v, Ritz values included; the target is of v − Au."""
    root = torch.diag(SCALES.rsqrt())
    scaled, b = root @ MATRIX @ root, root @ V
    found, products = run(MATRIX, iterations=k, preconditioner=split(SCALES))
    u = flat(found.solution)
    torch.testing.assert_close(u, root @ best(scaled, b, k), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(flat(found.residual), V - MATRIX @ u, rtol=1e-9, atol=1e-13)
    assert found.size == pytest.approx(float((V - MATRIX @ u).norm()), rel=1e-9)
    expected = ritz(scaled, b, k)
    assert found.smallest == pytest.approx(float(expected[0]), rel=1e-8)
    assert found.largest == pytest.approx(float(expected[-1]), rel=1e-8)
    assert (found.count, products) == (k, k)


def test_preconditioned_from_a_start():
    start, root = torch.linspace(-1.0, 1.0, SIZE, dtype=torch.float64), torch.diag(SCALES.rsqrt())
    pair = split(start), split(V - MATRIX @ start)
    found, _ = run(MATRIX, start=pair, iterations=3, preconditioner=split(SCALES))
    expected = root @ best(root @ MATRIX @ root, root @ V, 3, start / SCALES.rsqrt())
    torch.testing.assert_close(flat(found.solution), expected, rtol=1e-10, atol=1e-12)


def test_the_diagonal_itself_is_a_preconditioner_that_ends_a_diagonal_system_at_once():
    eigenvalues = torch.logspace(-4, 4, SIZE, dtype=torch.float64)
    found, products = run(torch.diag(eigenvalues), target=1e-9, preconditioner=split(eigenvalues))
    assert (found.status, products) == (Status.CONVERGED, 1)
    assert found.smallest == pytest.approx(1.0) and found.largest == pytest.approx(1.0)


def test_a_preconditioner_of_ones_is_none():
    plain, _ = run(MATRIX, iterations=5)
    ones, _ = run(MATRIX, iterations=5, preconditioner=split(torch.ones_like(V)))
    torch.testing.assert_close(flat(ones.solution), flat(plain.solution), rtol=1e-13, atol=1e-15)


def test_the_preconditioner_is_not_changed():
    given = split(SCALES)
    run(MATRIX, preconditioner=given)
    assert torch.equal(flat(given), SCALES)


# --------------------------------------------------------------------------------------------- where it cannot go on


@pytest.mark.parametrize("preconditioner", [None, split(SCALES)], ids=["plain", "preconditioned"])
def test_negative_curvature_shows_in_the_smallest_ritz_value(preconditioner):
    """It stops at the first direction that curves downwards, with the iterate before."""
    matrix = with_spectrum([-0.3, *spread(0.5, 5.0, SIZE - 1)])
    found, products = run(matrix, preconditioner=preconditioner)
    assert found.status is Status.NEGATIVE_CURVATURE
    assert products == found.count + 1
    root = torch.eye(SIZE, dtype=torch.float64) if preconditioner is None else torch.diag(SCALES.rsqrt())
    expected = ritz(root @ matrix @ root, root @ V, found.count + 1)
    assert expected[0] < 0 < ritz(root @ matrix @ root, root @ V, found.count)[0]
    assert found.smallest == pytest.approx(float(expected[0]), rel=1e-6)
    before, _ = run(matrix, iterations=found.count, preconditioner=preconditioner)
    assert torch.equal(flat(found.solution), flat(before.solution))
    torch.testing.assert_close(flat(found.residual), V - matrix @ flat(found.solution), rtol=1e-9, atol=1e-12)


def test_negative_curvature_at_once():
    found, products = run(-MATRIX)
    assert (found.status, found.count, products) == (Status.NEGATIVE_CURVATURE, 0, 1)
    assert found.smallest == found.largest == pytest.approx(-float(V @ MATRIX @ V / (V @ V)))
    assert flat(found.solution).abs().max() == 0.0


def test_a_null_space_is_singular():
    """After all that can be solved was solved: the solution of least norm, and the part of v in the null space left."""
    matrix, q = with_spectrum([0.0, *spread(0.5, 5.0, SIZE - 1)]), basis(SIZE)[:, 0]
    found, _ = run(matrix)
    assert found.status is Status.SINGULAR
    assert found.size >= abs(float(q @ V)) * (1 - 1e-9)


def test_nothing_but_a_null_space():
    """Exactly: at the first product. Up to rounding: as soon as a larger curvature shows what the first step was of."""
    exact = torch.diag(torch.tensor([0.0, *spread(0.5, 5.0, SIZE - 1)], dtype=torch.float64))
    found, products = run(exact, split(torch.eye(SIZE, dtype=torch.float64)[0]))
    assert (found.status, products) == (Status.SINGULAR, 1)
    assert flat(found.solution).abs().max() == 0.0
    for seed in range(6):
        matrix = with_spectrum([0.0, *spread(0.5, 5.0, SIZE - 1)], seed)
        found, products = run(matrix, split(basis(SIZE, seed)[:, 0]), target=1e-3)
        assert found.status in (Status.SINGULAR, Status.NEGATIVE_CURVATURE)
        assert products <= 3


@pytest.mark.parametrize("preconditioner", [None, torch.ones(SIZE), torch.full((SIZE,), 1e-3)], ids=str)
def test_a_start_whose_residual_is_all_in_the_null_space(preconditioner):
    """Its curvature is rounding, which shows beside the largest eigenvalue that the start has seen: at once."""
    for seed in range(6):
        matrix, q = with_spectrum([0.0, *spread(0.5, 5.0, SIZE - 1)], seed), basis(SIZE, seed)
        consistent = V - (q[:, 0] @ V) * q[:, 0]
        vector = split(consistent + 1e-3 * q[:, 0])
        start = split(torch.linalg.pinv(matrix) @ consistent)
        diagonal = None if preconditioner is None else split(preconditioner.double())
        operator = DenseOperator(matrix)
        found = ConjugateGradient(tolerance=1e-6).solve_scaled(operator, vector, {"solution": start}, diagonal)
        assert (found.status, operator.products) == (Status.SINGULAR, 2)
        assert torch.equal(flat(found.value), flat(start))


def test_curvature_is_compared_on_one_scale():
    """M = c·I leaves the iterates as they are, however large c is, and from a start as well."""
    state = {"solution": split(torch.linalg.solve(MATRIX, V) + 0.1)}
    backend = ConjugateGradient(tolerance=1e-9, max_iterations=5)
    plain = backend.solve_scaled(DenseOperator(MATRIX), VECTOR, state, None)
    scaled = backend.solve_scaled(DenseOperator(MATRIX), VECTOR, state, split(torch.full((SIZE,), 2.0**50).double()))
    assert scaled.status is plain.status is Status.TRUNCATED
    torch.testing.assert_close(flat(scaled.value), flat(plain.value), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("preconditioner", [None, split(SCALES)], ids=["plain", "preconditioned"])
def test_products_that_are_not_finite(bad, preconditioner):
    matrix = MATRIX.clone()
    matrix[2, 2] = bad
    found, products = run(matrix, preconditioner=preconditioner)
    assert (found.status, found.count, products) == (Status.NON_FINITE, 0, 1)
    assert math.isnan(found.smallest) and math.isnan(found.largest)
    assert flat(found.solution).abs().max() == 0.0


def test_a_product_that_is_not_finite_later_on():
    """What was found before it stands, and so do its Ritz values."""

    class Breaks(DenseOperator):
        def __matmul__(self, vector: Params) -> Params:
            product = super().__matmul__(vector)
            return {name: x * math.nan for name, x in product.items()} if self.products == 4 else product

    found = conjugate_gradients(Breaks(MATRIX), VECTOR, target=0.0, iterations=50)
    before, _ = run(MATRIX, iterations=3)
    assert (found.status, found.count) == (Status.NON_FINITE, 3)
    assert torch.equal(flat(found.solution), flat(before.solution))
    assert (found.smallest, found.largest) == (before.smallest, before.largest)


@pytest.mark.parametrize("scale", [1e-25, 1e-21, 1e25])
@pytest.mark.parametrize("preconditioner", [None, 1e4 * SCALES.float()], ids=["plain", "preconditioned"])
def test_squares_that_leave_the_range_of_the_dtype(scale, preconditioner):
    """Neither an exception nor a solution that is none."""
    vector = {name: scale * x.float() for name, x in VECTOR.items()}
    found, _ = run(MATRIX.float(), vector, preconditioner=None if preconditioner is None else split(preconditioner))
    assert found.status.failed or found.size <= 1e-5 * float(flat(vector).double().norm())
    assert torch.isfinite(flat(found.solution)).all()


# -------------------------------------------------------------------------------------------------------- as a backend


def test_the_backend_counts_a_product_for_the_start():
    backend = ConjugateGradient(tolerance=1e-6, max_iterations=100)
    first, cold = solve(backend, MATRIX, VECTOR)
    assert cold == first.iterations
    again, warm = solve(backend, MATRIX, {name: 1.00001 * x for name, x in VECTOR.items()}, first.state)
    assert warm == again.iterations + 1 < cold
    expected = best(MATRIX, 1.00001 * V, again.iterations, flat(first.value))
    torch.testing.assert_close(flat(again.value), expected, rtol=1e-9, atol=1e-11)
