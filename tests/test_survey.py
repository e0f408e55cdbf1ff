"""What ``auto`` measures: costs and random draws, and eigenvalues against dense ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hyperopt_implicit.backend import Status
from hyperopt_implicit.spectrum import extreme_eigenvalues, lanczos
from hyperopt_implicit.survey import (
    Clock,
    Costs,
    Spectrum,
    condition,
    sampled_spectrum,
    spectrum,
    time_gradient,
)
from hyperopt_implicit.testing.assertions import assert_unchanged
from hyperopt_implicit.testing.oracles import DenseOperator
from hyperopt_implicit.testing.specimens import TRAINING, Linear, regression_data, ridge_problem

from .matrices import basis, flat, right_hand_side, spread, with_spectrum

SIZE = 12
VECTOR = right_hand_side(SIZE)
DEFINITE = with_spectrum(spread(0.5, 5.0, SIZE))
INDEFINITE = with_spectrum([-0.4, *spread(0.5, 5.0, SIZE - 1)])


# ------------------------------------------------------------------------------------------------- costs, and draws


def noisy(model: nn.Module) -> Tensor:
    return 0.01 * nn.functional.dropout(next(model.parameters()), 0.5).square().sum()


def generator_noise(model: nn.Module) -> Tensor:
    return 0.01 * torch.randn(()) * next(model.parameters()).sum()


@pytest.mark.parametrize(
    ("problem", "random"),
    [
        (lambda: ridge_problem(), False),
        (lambda: ridge_problem(nn.Sequential(Linear(4), nn.Dropout(0.5))), True),
        (lambda: ridge_problem(nn.Sequential(Linear(4), nn.Dropout(0.5)).eval()), False),
        (lambda: ridge_problem(extra=noisy), True),
        (lambda: ridge_problem(extra=generator_noise), True),
        (lambda: ridge_problem(nn.Sequential(nn.BatchNorm1d(4).double(), Linear(4))), False),
    ],
    ids=["plain", "dropout", "eval", "functional dropout", "noise", "batch norm"],
)
def test_a_gradient_is_timed_and_leaves_nothing_behind(problem, random):
    problem, clock = problem(), Clock(torch.device("cpu"))
    with assert_unchanged(problem, random_state=not random):
        seconds, drew = time_gradient(problem, [TRAINING, regression_data(2)], clock)
    assert drew is random
    assert 0.0 < seconds < 5.0
    with torch.no_grad(), assert_unchanged(problem, random_state=False):
        assert time_gradient(problem, [TRAINING], clock)[1] is random


def test_the_fastest_of_the_repeats_counts():
    """And each is one gradient."""
    times, problem = iter([3.0, 1.0, 2.0]), ridge_problem()

    class Fixed(Clock):
        def __call__(self, call):
            result = call()
            self.seconds = next(times)
            return result

    assert time_gradient(problem, [TRAINING], Fixed(torch.device("cpu")), repeats=3) == (1.0, False)
    assert next(times, None) is None


def test_a_clock_is_never_at_zero():
    clock = Clock(torch.device("cpu"))
    assert clock(lambda: "result") == "result"
    assert clock.seconds >= 1e-9


def test_what_a_hypergradient_costs():
    costs = Costs(seconds=1.0, validation=0.5, graph=1.5, product=2.0, mixed=3.0)
    assert costs.of(1, shared=True) == 0.5 + 1.5 + 2.0
    assert costs.of(4, shared=False) == 0.5 + 1.5 + 4 * 2.0 + 3.0
    assert Costs(**costs.state()) == costs


# -------------------------------------------------------------------------------------------------------- eigenvalues


@pytest.mark.parametrize(
    "eigenvalues",
    [spread(0.5, 5.0, SIZE), [-3.0, *spread(-1.0, 2.0, SIZE - 1)], spread(-5.0, -1.0, SIZE), [0.0] * 3 + [1.0] * 9],
    ids=["positive", "indefinite", "negative", "semidefinite"],
)
def test_lanczos_from_inside(eigenvalues):
    """Each product brings the extremes no further inside, and n of them all the way."""
    matrix = with_spectrum(eigenvalues)
    least, most = min(eigenvalues), max(eigenvalues)
    low, high = math.inf, -math.inf
    for products in range(1, SIZE + 1):
        operator = DenseOperator(matrix)
        smallest, largest = lanczos(operator, VECTOR, products)
        assert operator.products <= products
        assert least - 1e-9 <= smallest <= low + 1e-9 and high - 1e-9 <= largest <= most + 1e-9
        low, high = smallest, largest
    assert (low, high) == pytest.approx((least, most), abs=1e-8)


def test_lanczos_of_one_product_is_the_rayleigh_quotient():
    v = flat(VECTOR)
    quotient = float(v @ INDEFINITE @ v / (v @ v))
    assert lanczos(DenseOperator(INDEFINITE), VECTOR, 1) == pytest.approx((quotient, quotient), rel=1e-12)


def test_few_products_underestimate_the_largest():
    """On a spectrum of the kind that networks have, six miss it, and the Rayleigh–Ritz values are dense ones."""
    matrix, v = with_spectrum(spread(0.5, 5.0, SIZE)), flat(VECTOR)
    krylov = torch.stack([torch.linalg.matrix_power(matrix, k) @ v for k in range(6)], 1)
    q = torch.linalg.qr(krylov).Q
    ritz = torch.linalg.eigvalsh(q.T @ matrix @ q)
    smallest, largest = lanczos(DenseOperator(matrix), VECTOR, 6)
    assert (smallest, largest) == pytest.approx((float(ritz[0]), float(ritz[-1])), rel=1e-8)
    assert 0.9 * 5.0 < largest < 5.0 * (1 - 1e-6)


def test_lanczos_does_not_change_what_it_is_given():
    vector, before = {"a": 3.0 * flat(VECTOR)}, 3.0 * flat(VECTOR)
    lanczos(DenseOperator(torch.eye(SIZE, dtype=torch.float64)), vector, 3)
    assert torch.equal(vector["a"], before)


@pytest.mark.parametrize("directions", [1, 2, 3])
def test_lanczos_in_an_invariant_subspace(directions):
    """It stops there, with the eigenvalues that the vector sees, and none of rounding."""
    q = basis(SIZE)[:, [0, 5, 9]][:, :directions]
    v = q.sum(1)
    operator = DenseOperator(INDEFINITE)
    seen = [float(x @ INDEFINITE @ x) for x in q.T]
    assert lanczos(operator, {"a": v}, 10) == pytest.approx((min(seen), max(seen)), rel=1e-9)
    assert operator.products <= directions + 1


@pytest.mark.parametrize("value", [3.0, -2.0, 0.0])
def test_lanczos_in_one_dimension(value):
    operator = DenseOperator(torch.tensor([[value]], dtype=torch.float64))
    assert lanczos(operator, right_hand_side(1), 5) == (value, value)
    assert operator.products == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_lanczos_of_what_is_not_finite(bad):
    matrix = DEFINITE.clone()
    matrix[2, 3] = bad
    assert all(map(math.isnan, lanczos(DenseOperator(matrix), VECTOR, 4)))


def test_eigenvalues_of_a_tridiagonal_matrix():
    diagonal, beside = [1.0, -2.0, 3.0, 0.5], [0.3, 1.5, -0.7]
    matrix = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
    values = np.linalg.eigvalsh(matrix)
    for longer in ([], [9.0]):  # the last one leads out of the matrix
        assert extreme_eigenvalues(diagonal, beside + longer) == pytest.approx((values[0], values[-1]), rel=1e-12)
    assert all(map(math.isnan, extreme_eigenvalues([], [])))
    assert all(map(math.isnan, extreme_eigenvalues([1.0, math.nan], [0.0])))
    assert all(map(math.isnan, extreme_eigenvalues([1.0, 2.0], [math.inf])))


# ----------------------------------------------------------------------------------------------------- all the data


def survey(matrix: Tensor, diagonal: Tensor | None = None, vector: Tensor | None = None) -> tuple[Spectrum, int]:
    operator = DenseOperator(matrix)
    v = flat(VECTOR) if vector is None else vector
    found = spectrum(operator, {"a": v}, 1e-10, 60, None if diagonal is None else {"a": diagonal})
    return found, operator.products


def test_a_definite_matrix():
    found, products = survey(DEFINITE)
    assert (found.smallest, found.largest) == pytest.approx((0.5, 5.0), rel=1e-6)
    assert (found.damping, found.preconditioned) == (0.0, False)
    assert found.words == "condition number 10"
    assert found.solved is not None and products == found.solved.count == SIZE
    torch.testing.assert_close(found.solved.solution["a"], torch.linalg.solve(DEFINITE, flat(VECTOR)))


@pytest.mark.parametrize(
    ("eigenvalues", "damping"),
    [
        ([-0.4, *spread(0.5, 5.0, SIZE - 1)], 0.6),
        ([-0.1, *spread(0.5, 5.0, SIZE - 1)], 0.5),
        ([-4.0, *spread(0.5, 5.0, SIZE - 1)], 6.0),
        (spread(-5.0, -1.0, SIZE), 7.5),
    ],
    ids=["1.5 of the smallest", "a tenth of the largest", "much", "negative definite"],
)
def test_an_indefinite_matrix_is_damped(eigenvalues, damping):
    """By max(1.5·|λ_min|, 0.1·λ_max), where the smallest eigenvalue of what is then solved is positive."""
    matrix = with_spectrum(eigenvalues)
    found, _ = survey(matrix)
    assert found.damping == pytest.approx(damping, rel=1e-6)
    assert found.smallest == pytest.approx(min(eigenvalues), rel=1e-6)
    assert found.largest == pytest.approx(max(eigenvalues), rel=1e-2)
    assert found.words.startswith(f"an indefinite Hessian (eigenvalues from {min(eigenvalues):.2g} to ")
    assert found.words.endswith(f"), damped by {damping:.2g}")
    assert found.solved is not None and found.solved.status is Status.CONVERGED
    damped = matrix + found.damping * torch.eye(SIZE, dtype=torch.float64)
    torch.testing.assert_close(found.solved.solution["a"], torch.linalg.solve(damped, flat(VECTOR)))


def test_a_singular_matrix_is_damped():
    found, _ = survey(with_spectrum([0.0, *spread(0.5, 5.0, SIZE - 1)]))
    assert found.damping == pytest.approx(0.5, rel=1e-4)
    assert found.words == "a singular Hessian (eigenvalues from 0 to 5), damped by 0.5" or "e-" in found.words
    assert abs(found.smallest) < 1e-8


def test_a_singular_matrix_with_a_solution_is_not():
    """What has no curvature is not asked for either, as with an unused parameter."""
    matrix = with_spectrum([0.0, *spread(0.5, 5.0, SIZE - 1)])
    found, _ = survey(matrix, vector=matrix @ flat(VECTOR))
    assert found.damping == 0.0 and found.solved is not None
    assert found.smallest == pytest.approx(0.5, rel=1e-6)


def test_a_matrix_of_zeros():
    found, products = survey(torch.zeros(SIZE, SIZE, dtype=torch.float64))
    assert found.damping == 0.0 and found.solved is not None and found.solved.status is Status.SINGULAR
    assert products <= 3


def test_damping_is_doubled_until_it_is_enough():
    """Where Lanczos stops short of the smallest eigenvalue; and what conjugate gradients saw counts as well."""
    size = 200
    eigenvalues = [-0.05, *torch.logspace(-2, 2, size - 1, dtype=torch.float64).tolist()]
    matrix = with_spectrum(eigenvalues)
    q = basis(size)
    for share in (1.0, 1e-2, 1e-4):
        v = q.sum(1) - (1.0 - share) * q[:, 0]
        operator = DenseOperator(matrix)
        found = spectrum(operator, {"a": v}, 1e-8, 400, None)
        assert found.damping > 0.05 and found.smallest < 0.0, share
        assert found.solved is not None and not found.solved.status.failed
        assert found.words.startswith("an indefinite Hessian")


def test_the_smallest_eigenvalue_is_not_missed_because_it_is_seen_late():
    """After more products than Lanczos takes: it is negative curvature all the same, and not a singular matrix."""
    size, q = 60, basis(60)
    eigenvalues = torch.tensor([-2.0, *torch.logspace(-1, 1, 59, dtype=torch.float64).tolist()], dtype=torch.float64)
    v = q.sum(1) - (1.0 - 1e-10) * q[:, 0]
    assert lanczos(DenseOperator(q @ torch.diag(eigenvalues) @ q.T), {"a": v}, 20)[0] > 0.0
    found = spectrum(DenseOperator(q @ torch.diag(eigenvalues) @ q.T), {"a": v}, 1e-12, size, None)
    assert -2.0 <= found.smallest < 0.0
    assert found.solved is not None and found.solved.status is not Status.NEGATIVE_CURVATURE
    assert found.words.startswith("an indefinite Hessian")


def test_single_precision_is_not_asked_for_more_than_it_has():
    counts = []
    for tolerance in (torch.finfo(torch.float32).eps, 1e-12):
        operator = DenseOperator(DEFINITE.float())
        found = spectrum(operator, {"a": flat(VECTOR).float()}, tolerance, 60, None)
        assert found.solved is not None and found.solved.status is Status.CONVERGED
        counts.append(operator.products)
    assert counts[0] == counts[1]


# ----------------------------------------------------------------------------------------------------- preconditioner


@pytest.mark.parametrize(("factor", "taken"), [(1.98, False), (2.02, True), (100.0, True), (1.0, False)])
def test_a_preconditioner_has_to_halve_the_condition_number(factor, taken):
    """κ = 10·factor without, and 10 with it."""
    eigenvalues = torch.tensor(spread(1.0, 10.0, SIZE), dtype=torch.float64)
    scales = torch.linspace(1.0, factor, SIZE, dtype=torch.float64)
    found, products = survey(torch.diag(eigenvalues * scales), scales)
    assert found.preconditioned is taken
    kappa = 10.0 if taken else 10.0 * factor
    assert found.solved is not None and condition(found.solved) == pytest.approx(kappa, rel=1e-4)
    assert ("when preconditioned by Adam's second moment" in found.words) is taken
    torch.testing.assert_close(found.solved.solution["a"], flat(VECTOR) / (eigenvalues * scales), rtol=1e-7, atol=1e-9)
    assert products <= 2 * SIZE + 2


def test_a_preconditioner_of_a_damped_matrix():
    scales = torch.logspace(0, 3, SIZE, dtype=torch.float64)
    matrix = torch.diag(scales)
    matrix[0, 0] = -1.0
    found, _ = survey(matrix, scales + 100.0)
    assert found.damping == pytest.approx(100.0, rel=1e-3)
    assert found.preconditioned and found.solved is not None
    torch.testing.assert_close(
        found.solved.solution["a"], flat(VECTOR) / (matrix.diag() + found.damping), rtol=1e-6, atol=1e-9
    )


# ------------------------------------------------------------------------------------------------------- mini-batches


def test_a_definite_mini_batch():
    """Its largest eigenvalue from inside, in eight products, and a rough solution, in three."""
    operator = DenseOperator(with_spectrum(spread(0.01, 5.0, SIZE)))
    found = sampled_spectrum(operator, VECTOR)
    assert operator.products == 8 + 3 and found.damping == 0.0
    assert 4.5 < found.largest <= 5.0
    assert found.words == f"largest eigenvalue {found.largest:.2g}"
    assert found.solved is not None and found.solved.count == 3
    assert found.solved.size < 0.5 * float(flat(VECTOR).norm())


@pytest.mark.parametrize(("smallest", "damping"), [(-0.0001, 0.0), (-0.3, 0.5), (-1.0, 1.5)])
def test_an_indefinite_mini_batch_is_damped_where_it_is_far_from_definite(smallest, damping):
    """One that is only just so may be due to the sample."""
    matrix = torch.diag(torch.tensor([smallest, 3.0, 5.0], dtype=torch.float64))
    operator = DenseOperator(matrix)
    found = sampled_spectrum(operator, {"a": torch.ones(3, dtype=torch.float64)})
    assert found.damping == pytest.approx(damping, rel=1e-6)
    assert found.largest == pytest.approx(5.0, rel=1e-6)
    assert operator.products <= 16


def test_nothing_to_see():
    found = Spectrum(math.nan, math.nan)
    assert (found.words, found.damping, found.solved) == ("nothing finite to solve with yet", 0.0, None)
