"""``stocbio``: a Neumann series on one batch, and on independent batches one that is right on average."""

from __future__ import annotations

import pytest
import torch

from hyperopt_implicit.backend import Status
from hyperopt_implicit_backends.stocbio import StocBio

from .matrices import assert_residual_is_true, basis, flat, right_hand_side, solve, spread, with_spectrum
from .quadratics import mixture

RHO = 0.15


@pytest.mark.parametrize("terms", [1, 2, 10])
def test_is_the_series_on_one_batch(terms):
    """Coordinates (1 − (1 − ρλ)^K)/λ in the eigenbasis; K products, nothing carried, no memory of earlier calls."""
    eigenvalues = torch.tensor(spread(0.5, 5.0, 12), dtype=torch.float64)
    matrix, vector, q = with_spectrum(eigenvalues.tolist()), right_hand_side(12), basis(12)
    solution, products = solve(StocBio(terms=terms, step_size=RHO), matrix, vector)
    expected = (1 - (1 - RHO * eigenvalues) ** terms) / eigenvalues * (q.T @ flat(vector))
    torch.testing.assert_close(q.T @ flat(solution.value), expected, rtol=1e-11, atol=1e-13)
    assert_residual_is_true(matrix, solution, vector)
    assert (solution.iterations, products, solution.state) == (terms, terms, {})


def test_bias_is_that_of_truncation():
    """u* − u_K = (I − ρA)^K u*."""
    matrix, vector = with_spectrum(spread(0.5, 5.0, 12)), right_hand_side(12)
    truth = torch.linalg.solve(matrix, flat(vector))
    contraction = torch.eye(12, dtype=torch.float64) - RHO * matrix
    for terms in (5, 10, 20):
        solution, _ = solve(StocBio(terms=terms, step_size=RHO), matrix, vector)
        bias = torch.linalg.matrix_power(contraction, terms) @ truth
        torch.testing.assert_close(truth - flat(solution.value), bias, rtol=1e-9, atol=1e-12)
        assert bias.norm() <= (1 - RHO * 0.5) ** terms * truth.norm()


def test_factors_take_the_batches_in_turn():
    """The k-th factor the k-th batch, the residual and the mixed derivative the K-th."""
    data = mixture(batches=4, noise=1.0)
    result = data.hypergradient(StocBio(terms=4, step_size=0.3), [2, 0, 1, 3], {})
    u, factor = 0.3 * data.v, data.v
    for i in (2, 0, 1):
        factor = factor - 0.3 * data.hessians[i] @ factor
        u = u + 0.3 * factor
    torch.testing.assert_close(result.gradients["shift"], data.scales[3] * u, rtol=1e-11, atol=1e-13)
    residual = (data.hessians[3] @ u - data.v).norm() / data.v.norm()
    assert result.residual == pytest.approx(float(residual), rel=1e-9)
    assert result.hvps == 4


def test_unbiased_for_the_series_of_the_average():
    """Over 300 draws of five independent batches; the average itself is far from the series of any one batch."""
    data, rho, terms = mixture(batches=6, noise=1.0), 0.3, 5
    generator = torch.Generator().manual_seed(0)
    found = torch.stack(
        [
            data.hypergradient(
                StocBio(terms=terms, step_size=rho), torch.randint(6, (terms,), generator=generator).tolist(), {}
            ).gradients["shift"]
            for _ in range(300)
        ]
    )
    factor = torch.eye(4, dtype=torch.float64) - rho * data.mean
    u = rho * sum(torch.linalg.matrix_power(factor, k) @ data.v for k in range(terms))
    expected = torch.stack(data.scales).mean() * u  # the mixed derivative's batch is no factor's
    z = (found.mean(0) - expected) / (found.std(0) / 300**0.5)
    assert z.abs().max() < 4
    assert float((found.std(0) / 300**0.5).norm()) < 0.05 * float(expected.norm())


def test_ends_where_a_factor_has_grown_tenfold():
    """Factors (1 − ρλ)^k v: with ρλ = 5 the second is 16 times v, and no more products are spent than its residual."""
    matrix = 5.0 * torch.eye(12, dtype=torch.float64)
    solution, products = solve(StocBio(terms=50, step_size=1.0), matrix, right_hand_side(12))
    assert solution.status is Status.DIVERGED
    assert (solution.iterations, products) == (2, 3)
    assert not flat(solution.value).any()
