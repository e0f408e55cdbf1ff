"""The Nyström solver against the paper's formula, its error over the rank, and the coordinates that it draws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import hyperopt_implicit as hi
from hyperopt_implicit.backend import Status
from hyperopt_implicit.testing.oracles import DenseOperator
from hyperopt_implicit.testing.specimens import TRAINING, VALIDATION, Linear, ridge_problem
from hyperopt_implicit_backends import Nystrom

from .matrices import basis, flat, right_hand_side, solve, spread, with_spectrum

POSITIVE = with_spectrum(spread(0.5, 5.0, 12))
VECTOR = right_hand_side(12)
EYE = torch.eye(12, dtype=torch.float64)


class Recording(DenseOperator):
    """Takes down which coordinates were asked for."""

    def __init__(self, matrix):
        super().__init__(matrix)
        self.asked = []

    def __matmul__(self, vector):
        v = flat(vector)
        if torch.count_nonzero(v) == 1:
            self.asked.append(int(v.argmax()))
        return super().__matmul__(vector)


def coordinates(backend, state, matrix=POSITIVE, vector=VECTOR):
    operator = Recording(matrix)
    solution = backend.solve(operator, vector, state)
    return operator.asked, solution


@pytest.mark.parametrize("rank", [1, 3, 5, 6, 11, 12, 30])
@pytest.mark.parametrize("damping", [1e-3, 0.5])
def test_it_is_the_formula_of_the_paper(rank, damping):
    """(H_K W⁺ H_Kᵀ + ρI)⁻¹ v, and the same by Woodbury: v/ρ − H_K (W + H_KᵀH_K/ρ)⁻¹ H_Kᵀ v/ρ²."""
    asked, solution = coordinates(Nystrom(rank=rank, damping=damping), {})
    assert len(set(asked)) == len(asked) == min(rank, 12)
    C, W, v = POSITIVE[:, asked], POSITIVE[asked][:, asked], flat(VECTOR)
    dense = torch.linalg.solve(C @ torch.linalg.pinv(W) @ C.T + damping * EYE, v)
    woodbury = v / damping - C @ torch.linalg.solve(W + C.T @ C / damping, C.T @ v) / damping**2
    torch.testing.assert_close(flat(solution.value), dense, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(flat(solution.value), woodbury, rtol=1e-8, atol=1e-8)
    assert solution.status is (Status.CONVERGED if rank >= 12 else Status.TRUNCATED)
    assert solution.iterations == min(rank, 12)


@pytest.mark.parametrize("damping", [1e-12, 1e-6, 0.1])
def test_all_columns_solve_the_damped_system(damping):
    solution, products = solve(Nystrom(rank=12, damping=damping), POSITIVE, VECTOR)
    expected = torch.linalg.solve(POSITIVE + damping * EYE, flat(VECTOR))
    torch.testing.assert_close(flat(solution.value), expected, rtol=1e-11, atol=1e-13)
    assert products == 13


@pytest.mark.parametrize("rank", [3, 12])
def test_the_residual_is_that_of_the_damped_system(rank):
    """ρ is added to H once: not before the approximation as well."""
    solution, products = solve(Nystrom(rank=rank, damping=0.2), POSITIVE, VECTOR)
    v = flat(VECTOR)
    expected = float(((POSITIVE + 0.2 * EYE) @ flat(solution.value) - v).norm() / v.norm())
    assert solution.residual == pytest.approx(expected, rel=1e-9, abs=1e-13)
    unmeasured, fewer = solve(Nystrom(rank=rank, damping=0.2, measure_residual=False), POSITIVE, VECTOR)
    assert (unmeasured.residual, fewer) == (None, products - 1)
    assert torch.equal(flat(unmeasured.value), flat(solution.value))


def test_the_error_falls_with_the_rank_and_ends_at_it():
    """A matrix of rank 6 with noise of size 1e-7: nothing is gained beyond rank 6, and all of it by then."""
    matrix = with_spectrum([1e-7] * 34 + spread(1.0, 5.0, 6))
    vector, rho = right_hand_side(40), 1e-2
    exact = torch.linalg.solve(matrix + rho * torch.eye(40, dtype=torch.float64), flat(vector))
    errors = {}
    for rank in (1, 3, 5, 6, 8, 12):
        found = []
        for seed in range(20):
            solution, _ = solve(Nystrom(rank=rank, damping=rho, seed=seed), matrix, vector)
            found.append(float((flat(solution.value) - exact).norm() / exact.norm()))
        errors[rank] = sum(found) / len(found)
    assert errors[1] > errors[3] > errors[5] > 100 * errors[6]
    assert errors[5] > 1e-2
    assert errors[6] < 1e-3
    assert errors[8] < 1e-4
    assert errors[12] < 1e-4


def test_a_matrix_of_low_rank_is_solved_at_its_rank():
    matrix = with_spectrum([0.0] * 34 + spread(1.0, 5.0, 6))
    vector = right_hand_side(40)
    for rank in (6, 9, 20):
        solution, _ = solve(Nystrom(rank=rank, damping=0.1), matrix, vector)
        exact = torch.linalg.solve(matrix + 0.1 * torch.eye(40, dtype=torch.float64), flat(vector))
        torch.testing.assert_close(flat(solution.value), exact, rtol=1e-8, atol=1e-9)
        assert solution.residual < 1e-8


def test_each_call_draws_other_coordinates_and_all_can_be_repeated():
    matrix, vector = with_spectrum(spread(0.5, 5.0, 100)), right_hand_side(100)
    backend, state, drawn = Nystrom(rank=10), {}, []
    for call in range(5):
        again, _ = coordinates(backend, state, matrix, vector)
        asked, solution = coordinates(backend, state, matrix, vector)
        assert asked == again
        drawn.append(frozenset(asked))
        state = solution.state
        assert state == {"calls": call + 1}
    assert len(set(drawn)) == 5
    other, _ = coordinates(Nystrom(rank=10, seed=1), {}, matrix, vector)
    assert frozenset(other) != drawn[0]


def test_every_coordinate_is_as_likely():
    """Of 20, drawn 4 at a time and 15 at a time (the two ways of drawing): the counts are binomial."""
    matrix, vector = torch.eye(20, dtype=torch.float64), right_hand_side(20)
    for rank in (4, 15):
        counts = torch.zeros(20)
        for seed in range(300):
            asked, _ = coordinates(Nystrom(rank=rank, seed=seed, measure_residual=False), {}, matrix, vector)
            assert len(set(asked)) == rank
            counts[asked] += 1
        p = rank / 20
        assert (counts - 300 * p).abs().max() < 4.5 * math.sqrt(300 * p * (1 - p))


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    solve(Nystrom(rank=3), POSITIVE, VECTOR)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("rank", [2, 4, 7, 64])
def test_coordinates_without_curvature_do_no_harm(rank):
    """A parameter that no loss uses: its columns are zero, and u is zero there."""
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    problem = ridge_problem(Linear(4, unused=unused))
    state: dict = {}
    for _ in range(5):
        result = hi.hypergradient(
            problem, Nystrom(rank=rank), training_batches=[TRAINING], validation_batch=VALIDATION, state=state
        )
        assert torch.isfinite(result.gradients["decay"]).all()
        assert not result.status.failed
        state = result.state
    matrix = torch.zeros(12, 12, dtype=torch.float64)
    matrix[:8, :8] = with_spectrum(spread(0.5, 5.0, 8))
    vector = flat(VECTOR).clone()
    vector[8:] = 0.0
    solution, _ = solve(Nystrom(rank=12, damping=0.1), matrix, {"a": vector[:6], "b": vector[6:]})
    torch.testing.assert_close(flat(solution.value), torch.linalg.solve(matrix + 0.1 * EYE, vector))


def test_a_hessian_of_zeros_leaves_the_damping():
    solution, _ = solve(Nystrom(rank=5, damping=0.25), torch.zeros(12, 12, dtype=torch.float64), VECTOR)
    torch.testing.assert_close(flat(solution.value), 4.0 * flat(VECTOR))
    assert solution.residual < 1e-14


@pytest.mark.parametrize("damping", [0.1, 0.7, 0.75])
def test_negative_curvature_is_left_out_and_reported(damping):
    """Eigenvalue −0.7: the direction is missing from u, the others are solved."""
    matrix = with_spectrum([-0.7, *spread(0.5, 5.0, 11)])
    solution, _ = solve(Nystrom(rank=12, damping=damping), matrix, VECTOR)
    q = basis(12)
    eigenvalues = torch.tensor([-0.7, *spread(0.5, 5.0, 11)], dtype=torch.float64)
    expected = (q.T @ flat(VECTOR)) / (eigenvalues + damping)
    expected[0] = 0.0
    assert solution.status is Status.NEGATIVE_CURVATURE
    torch.testing.assert_close(q.T @ flat(solution.value), expected, rtol=1e-9, atol=1e-11)


def test_damping_above_the_negative_curvature_solves():
    matrix = with_spectrum([-0.7, *spread(0.5, 5.0, 11)])
    solution, _ = solve(Nystrom(rank=12, damping=1.0), matrix, VECTOR)
    assert solution.status is Status.CONVERGED
    torch.testing.assert_close(flat(solution.value), torch.linalg.solve(matrix + EYE, flat(VECTOR)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_products_are_reported(bad):
    matrix = POSITIVE.clone()
    matrix[3, 3] = bad
    solution, _ = solve(Nystrom(rank=12), matrix, VECTOR)
    assert solution.status is Status.NON_FINITE
    assert flat(solution.value).abs().max() == 0.0


def test_float32_is_solved_to_its_precision():
    vector = {name: x.float() for name, x in VECTOR.items()}
    solution, _ = solve(Nystrom(rank=12, damping=0.1), POSITIVE.float(), vector)
    assert solution.residual < 1e-5


def test_damping_must_be_positive():
    message = r"^Nystrom option 'damping': input should be greater than 0; got 0.0\.$"
    with pytest.raises(hi.BackendError, match=message):
        Nystrom(damping=0.0)


def test_a_tiny_damping_does_not_blow_up_rounding():
    """Of v − QQᵀv only rounding is left here, and dividing it by ρ must leave no part in the range of H."""
    matrix = with_spectrum([5.0, 3.0, 2.0, 1.0, *[0.0] * 8])
    vector = {"weight": matrix @ torch.linspace(-1.0, 1.0, 12, dtype=torch.float64)}
    solution, _ = solve(Nystrom(rank=6, damping=1e-10), matrix, vector)
    assert solution.residual < 1e-11
