"""``soba`` and ``amigo`` against Richardson's iteration done by hand, the noise that theory gives, and whole runs."""

from __future__ import annotations

import pytest
import torch

import hyperopt_implicit as hi
from hyperopt_implicit.backend import Status
from hyperopt_implicit.errors import BackendError
from hyperopt_implicit.testing.assertions import saved_and_loaded
from hyperopt_implicit_backends.amigo import Amigo
from hyperopt_implicit_backends.soba import Soba
from hyperopt_implicit_backends.stocbio import StocBio

from .matrices import (
    assert_residual_is_true,
    basis,
    error,
    flat,
    right_hand_side,
    solve,
    spread,
    with_spectrum,
)
from .quadratics import mixture
from .ridge import TRAINING, VALIDATION, best_decay, ridge

MATRIX, VECTOR = with_spectrum(spread(0.5, 5.0, 12)), right_hand_side(12)
V = flat(VECTOR)
RHO = 0.15


# ------------------------------------------------------------------------------------------- one batch, weights at rest


def test_soba_is_richardsons_iteration():
    """u_0 = ρv, and u_{t+1} = u_t − ρ(A u_t − v); one product a call, and the residual that of the value returned."""
    u, state = RHO * V, {}
    for _ in range(20):
        solution, products = solve(Soba(step_size=RHO), MATRIX, VECTOR, state)
        torch.testing.assert_close(flat(solution.value), u, rtol=1e-12, atol=1e-14)
        assert_residual_is_true(MATRIX, solution, VECTOR)
        assert (solution.status, products) == (Status.TRUNCATED, 1)
        u = u - RHO * (MATRIX @ u - V)
        state = saved_and_loaded(solution.state)


def test_soba_converges_at_its_rate():
    """The error shrinks by no less than 1 − ρλ_min a call, and in the end by just that."""
    state, last = {}, None
    for _ in range(150):
        solution, _ = solve(Soba(step_size=RHO), MATRIX, VECTOR, state)
        state, found = solution.state, float(error(MATRIX, solution, VECTOR).norm())
        if last is not None:
            ratio = found / last
            assert ratio <= (1 - RHO * 0.5) * (1 + 1e-9)
        last = found
    assert ratio == pytest.approx(1 - RHO * 0.5, rel=1e-3)


def test_auto_step_size_is_the_inverse_of_the_largest_eigenvalue():
    """Eight products more at the first call, one more after that; saved with u."""
    state = {}
    for call in range(40):
        solution, products = solve(Soba(), MATRIX, VECTOR, state)
        assert products == 1 + (1 if call else 8)
        state = saved_and_loaded(solution.state)
    assert state["largest_eigenvalue"] == pytest.approx(5.0, rel=1e-3)


def test_amigo_is_so_many_steps():
    u, state = RHO * V, {}
    for _ in range(3):
        solution, products = solve(Amigo(step_size=RHO, steps=7), MATRIX, VECTOR, state)
        for _ in range(7):
            u = u - RHO * (MATRIX @ u - V)
        torch.testing.assert_close(flat(solution.value), u, rtol=1e-12, atol=1e-14)
        assert_residual_is_true(MATRIX, solution, VECTOR)
        assert (solution.iterations, products) == (7, 8)
        state = solution.state


@pytest.mark.parametrize("backend", [Soba(step_size=RHO, damping=0.4), Amigo(step_size=RHO, damping=0.4)], ids=str)
def test_damping_is_part_of_the_system(backend):
    damped, state = MATRIX + 0.4 * torch.eye(12, dtype=torch.float64), {}
    for _ in range(400):
        solution, _ = solve(backend, MATRIX, VECTOR, state)
        state = solution.state
    assert error(damped, solution, VECTOR).norm() < 1e-10


@pytest.mark.parametrize("backend", [Soba(), Amigo(), StocBio()], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_products_are_reported(backend, bad):
    matrix = MATRIX.clone()
    matrix[3, 3] = bad
    solution, _ = solve(backend, matrix, VECTOR)
    assert solution.status is Status.NON_FINITE
    assert "solution" not in solution.state


@pytest.mark.parametrize("kind", [Soba, Amigo, StocBio])
def test_a_step_size_too_large_diverges_and_starts_anew(kind):
    """What is returned is no worse than zero, and nothing of it is carried."""
    state = {}
    for _ in range(10):
        solution, _ = solve(kind(step_size=3 * 0.4), MATRIX, VECTOR, state)
        state = solution.state
        if solution.status.failed:
            break
    assert solution.status is Status.DIVERGED
    assert solution.residual == 1.0
    assert flat(solution.value).abs().max() == 0.0
    assert state == {}


@pytest.mark.parametrize("backend", [Soba(), Amigo(), StocBio()], ids=str)
def test_negative_curvature_is_reported(backend):
    downwards = {"a": basis(12)[:6, 0], "b": basis(12)[6:, 0]}
    solution, _ = solve(backend, with_spectrum([-0.7, *spread(0.5, 5.0, 11)]), downwards)
    assert solution.status is Status.NEGATIVE_CURVATURE


@pytest.mark.parametrize("last", [{"a": torch.ones(5)}, {"a": torch.full((6,), float("nan")), "b": torch.ones(6)}])
def test_a_bad_start_is_dropped(last):
    solution, _ = solve(Soba(step_size=RHO), MATRIX, VECTOR, {"solution": last})
    torch.testing.assert_close(flat(solution.value), RHO * V)


# --------------------------------------------------------------------------------------------------- batches in turn


def test_amigo_takes_the_batches_in_turn():
    """Step k with batch k in a ring; residual and mixed derivative on the one after the last; then on from there."""
    data = mixture(batches=3, noise=0.5)
    u, rho, state = 0.2 * data.v, 0.2, {}
    for _ in range(2):
        result = data.hypergradient(Amigo(step_size=rho, steps=4), [0, 1, 2], state)
        for k in (0, 1, 2, 0):
            u = u - rho * (data.hessians[k] @ u - data.v)
        torch.testing.assert_close(result.state["solution"]["weight"], u, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(result.gradients["shift"], data.scales[1] * u, rtol=1e-11, atol=1e-13)
        residual = (data.hessians[1] @ u - data.v).norm() / data.v.norm()
        assert result.residual == pytest.approx(float(residual), rel=1e-9)
        assert result.hvps == 5
        state = result.state


def test_training_loss_is_averaged_over_the_looks():
    """One look a product, the first batch again in the fourth."""
    problem = ridge()
    batches = [tuple(x[rows] for x in TRAINING) for rows in (slice(0, 4), slice(4, 9), slice(9, 16))]
    losses = [problem.training_loss(batch).item() for batch in batches]
    for steps, looks in ((1, losses[:2]), (3, [*losses, losses[0]])):
        result = hi.hypergradient(
            problem, Amigo(step_size=0.1, steps=steps), training_batches=batches, validation_batch=VALIDATION
        )
        assert result.training_loss == pytest.approx(sum(looks) / len(looks), rel=1e-12)


def soba_noise(rho: float, calls: int = 3000) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of u − A⁻¹v over a stream of random batches, with its standard error, and the variance."""
    data, state, seen = mixture(batches=8, noise=0.3), {}, []
    order = torch.randint(8, (calls,), generator=torch.Generator().manual_seed(3))
    u = {"weight": data.v * rho}
    for i in order.tolist():
        solution, _ = solve(Soba(step_size=rho), data.hessians[i], {"weight": data.v}, state)
        state, u = solution.state, solution.value
        seen.append(u["weight"] - data.truth)
    errors = torch.stack(seen[300:])
    blocks = errors[: len(errors) // 20 * 20].view(20, -1, errors.shape[1]).mean(1)
    return blocks.mean(0) / (blocks.std(0) / 20**0.5), errors.var(0).sum()


def test_soba_settles_around_the_truth_with_a_variance_like_its_step_size():
    """Over independent batches the mean of the recursion is Richardson's on the average; the variance goes like ρ."""
    z, variance = soba_noise(0.1)
    z_half, half = soba_noise(0.05)
    assert z.abs().max() < 4 and z_half.abs().max() < 4
    assert 1.6 < variance / half < 2.6


# --------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("name", ["soba", "saba", "amigo", "stocbio"])
def test_a_run_reaches_the_best_decay(name):
    """On the whole data, within 2 % of the decay that golden section finds; ten terms have little bias here."""
    result = hi.optimize(ridge(), name, outer_steps=150, inner_steps=3, outer_lr=0.06, tracking=False, progress=False)
    assert float(result.hyperparameters["decay"]) == pytest.approx(best_decay(), rel=0.02)


@pytest.mark.parametrize("name", ["soba", "saba"])
def test_a_run_on_mini_batches_reaches_the_best_decay(name):
    """Four batches of four rows; small steps of the optimizers keep the noise of w and λ down."""
    batches = [(TRAINING[0][i::4].contiguous(), TRAINING[1][i::4].contiguous()) for i in range(4)]
    problem = ridge(
        training_data=batches,
        validation_data=[VALIDATION],
        optimizer=lambda params: torch.optim.SGD(params, lr=0.02),
    )
    options = {"outer_steps": 400, "inner_steps": 4, "outer_lr": 0.03, "tracking": False, "progress": False}
    result = hi.optimize(problem, {"name": name, "step_size": 0.1}, warmup_steps=100, **options)
    assert float(result.hyperparameters["decay"]) == pytest.approx(best_decay(), rel=0.1)


@pytest.mark.parametrize("name", ["soba", "saba", "amigo", "stocbio"])
def test_step_size_must_be_positive(name):
    with pytest.raises(BackendError) as caught:
        hi.get_backend(name, step_size=0.0)
    kind = type(hi.get_backend(name)).__name__
    assert str(caught.value) == (
        f"{kind} option 'step_size': input should be 'auto'; input should be greater than 0; got 0.0."
    )


@pytest.mark.parametrize(("name", "option"), [("amigo", "steps"), ("stocbio", "terms")])
def test_counts_are_at_least_one(name, option):
    with pytest.raises(BackendError) as caught:
        hi.get_backend(name, **{option: 0})
    kind = type(hi.get_backend(name)).__name__
    assert str(caught.value) == f"{kind} option '{option}': input should be greater than or equal to 1; got 0."
