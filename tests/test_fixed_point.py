"""The fixed-point method: unrolling at a stationary point to rounding, the rate of training, and how it gives up."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

import hyperopt_implicit as hi
from hyperopt_implicit.auxiliary import MetaOptimizer
from hyperopt_implicit.backend import Status
from hyperopt_implicit.testing.assertions import assert_unchanged
from hyperopt_implicit.testing.oracles import DenseOperator
from hyperopt_implicit.testing.specimens import quadratic_problem
from hyperopt_implicit_backends import FixedPoint

from .matrices import flat, right_hand_side, spread, with_spectrum

SIZE = 6
POSITIVE = with_spectrum(spread(0.5, 5.0, SIZE))
VECTOR = right_hand_side(SIZE)
RATES = (0.1, 0.05)


class Split(nn.Module):
    """Six weights in two parameters, so that each can have its own learning rate."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.b = nn.Parameter(torch.zeros(4, dtype=torch.float64))


def problem_at_minimum(optimizer, *, matrix=POSITIVE, **options) -> hi.BilevelProblem:
    """L = ½wᵀHw − (1 + shift)ᵀw at its stationary point, decay of the optimizer included: dF/dshift = A⁻¹ ∂F/∂w."""
    model = Split()

    @hi.hyperparameter("shift", init=torch.zeros(SIZE, dtype=torch.float64))
    def training_loss(model, batch, *, shift):
        w = torch.cat([model.a, model.b])
        return 0.5 * w @ matrix @ w - (1.0 + shift) @ w

    def validation_loss(model, batch):
        return (torch.cat([model.a, model.b]) - torch.arange(1.0, 7.0, dtype=torch.float64)).square().sum()

    groups = [{"params": [model.a], "lr": RATES[0]}, {"params": [model.b], "lr": RATES[1]}]
    problem = hi.BilevelProblem(model, training_loss, validation_loss, optimizer=optimizer(groups, **options))
    decay = options.get("weight_decay", 0.0) if optimizer is not torch.optim.AdamW else 0.0
    w = torch.linalg.solve(matrix + decay * torch.eye(SIZE, dtype=torch.float64), torch.ones(SIZE).double())
    with torch.no_grad():
        model.a.copy_(w[:2])
        model.b.copy_(w[2:])
    return problem


def give_state(problem, step: float, **slots: float) -> None:
    """Optimizer state as after some training; a slot that is positive gets varied entries of about that size."""
    generator = torch.Generator().manual_seed(0)
    for p in problem.params.values():
        varied = {
            key: value * (0.5 + torch.rand(p.shape, generator=generator, dtype=torch.float64))
            for key, value in slots.items()
        }
        problem.optimizer.state[p] = {"step": torch.tensor(step, dtype=torch.float64), **varied}


def iterate(problem, k: int, **options):
    backend = FixedPoint(iterations=k, warm_start=False, **options)
    return hi.hypergradient(problem, backend, training_batches=[None], validation_batch=None)


def unrolled(problem, k: int):
    return hi.hypergradient(problem, "unrolled", training_batches=[None] * k, validation_batch=None)


# ------------------------------------------------------------------------------- it is unrolling at a stationary point


@pytest.mark.parametrize("k", [1, 2, 3, 10, 40])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.8, "dampening": 0.3},
        {"momentum": 0.9, "weight_decay": 0.2},
        {"weight_decay": 0.2},
    ],
    ids=str,
)
def test_sgd_is_unrolling_to_rounding(options, k):
    """Two groups with learning rates of their own."""
    problem = problem_at_minimum(torch.optim.SGD, **options)
    if options.get("dampening"):  # torch's first buffer is the gradient itself, undamped: let there be a buffer
        for p in problem.params.values():
            problem.optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    found, expected = iterate(problem, k), unrolled(problem, k)
    error = (found.gradients["shift"] - expected.gradients["shift"]).norm() / expected.gradients["shift"].norm()
    assert error < 1e-12
    assert found.iterations == found.hvps == k


@pytest.mark.parametrize("k", [1, 2, 10, 40])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW], ids=lambda kind: kind.__name__)
def test_adam_is_unrolling_to_rounding_once_its_moments_stand_still(kind, k):
    """β2 so near one that the second moment stays, and a step count at which both bias corrections are over."""
    options = {"betas": (0.9, 1.0 - 1e-13), "eps": 1e-3, "weight_decay": 0.0}
    problem = problem_at_minimum(kind, **options)
    give_state(problem, 1e15, exp_avg=0.0, exp_avg_sq=0.3)
    found, expected = iterate(problem, k), unrolled(problem, k)
    error = (found.gradients["shift"] - expected.gradients["shift"]).norm() / expected.gradients["shift"].norm()
    assert error < 1e-10


@pytest.mark.parametrize("k", [1, 2, 10])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.7}, {"centered": True}], ids=str)
def test_rmsprop_is_unrolling_to_rounding_once_its_average_stands_still(options, k):
    problem = problem_at_minimum(torch.optim.RMSprop, alpha=1.0 - 1e-14, eps=1e-3, **options)
    slots = {"square_avg": 0.9, **({"grad_avg": 0.3} if options.get("centered") else {})}
    slots |= {"momentum_buffer": 0.0} if options.get("momentum") else {}
    give_state(problem, 9.0, **slots)
    found, expected = iterate(problem, k), unrolled(problem, k)
    error = (found.gradients["shift"] - expected.gradients["shift"]).norm() / expected.gradients["shift"].norm()
    assert error < 1e-10


@pytest.mark.parametrize("k", [1, 2, 7, 30])
def test_adam_is_the_adjoint_of_its_frozen_map(k):
    """Σ_j Jλᵀ (Jᵀ)^j (v, 0) with J the dense Jacobian of (w, m) ↦ one step, the second moment as it is at step 7."""
    betas, eps = (0.9, 0.999), 1e-8
    problem = problem_at_minimum(torch.optim.Adam, betas=betas, eps=eps)
    give_state(problem, 7.0, exp_avg=0.1, exp_avg_sq=0.01)
    second = torch.cat([problem.optimizer.state[p]["exp_avg_sq"] for p in problem.params.values()])
    rate = torch.cat([torch.full((n,), lr, dtype=torch.float64) for n, lr in zip((2, 4), RATES, strict=True)])
    scale = rate / ((second / (1 - betas[1] ** 7)).sqrt() + eps)

    def step(x, shift):
        w, m = x.split(SIZE)
        m = betas[0] * m + (1 - betas[0]) * (POSITIVE @ w - 1.0 - shift)
        return torch.cat([w - scale * m, m])

    w = torch.cat([p.detach() for p in problem.params.values()])
    at = (torch.cat([w, torch.zeros_like(w)]), torch.zeros(SIZE, dtype=torch.float64))
    J, Jλ = torch.autograd.functional.jacobian(step, at)
    v = 2.0 * (w - torch.arange(1.0, 7.0, dtype=torch.float64))
    adjoint, expected = torch.cat([v, torch.zeros_like(v)]), torch.zeros(SIZE, dtype=torch.float64)
    for _ in range(k):
        expected += Jλ.T @ adjoint
        adjoint = J.T @ adjoint
    torch.testing.assert_close(iterate(problem, k).gradients["shift"], expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_the_iterates_are_those_of_the_optimizer_on_the_quadratic(k, nesterov):
    """½uᵀAu − vᵀu minimised from zero by torch.optim.SGD itself."""
    problem = quadratic_problem(POSITIVE)
    problem.optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1, momentum=0.9, nesterov=nesterov)
    v = flat(VECTOR)
    solution = FixedPoint(iterations=k).solver(problem)(DenseOperator(POSITIVE), {"weight": v}, {})
    u = nn.Parameter(torch.zeros_like(v))
    optimizer = torch.optim.SGD([u], lr=0.1, momentum=0.9, nesterov=nesterov)
    for _ in range(k):
        u.grad = POSITIVE @ u.detach() - v
        optimizer.step()
    torch.testing.assert_close(solution.value["weight"], u.detach(), rtol=1e-12, atol=1e-14)
    residual = float((POSITIVE @ solution.value["weight"] - v).norm() / v.norm())
    assert solution.residual == pytest.approx(residual, rel=1e-10)


# -------------------------------------------------------------------------------------------------------- its rate


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_it_converges_at_the_rate_of_training(momentum):
    """The spectral radius of the map: the largest root of ρ² − (1 + μ − αλ)ρ + μ over the spectrum."""
    problem = quadratic_problem(POSITIVE)
    problem.optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1, momentum=momentum)
    roots = []
    for eigenvalue in torch.linalg.eigvalsh(POSITIVE).tolist():
        b = 1 + momentum - 0.1 * eigenvalue
        root = complex(b * b - 4 * momentum) ** 0.5
        roots += [abs(b + root) / 2, abs(b - root) / 2]
    rate = max(roots)
    exact = torch.linalg.solve(POSITIVE, flat(VECTOR))
    errors = {}
    for k in (100, 200):
        backend = FixedPoint(iterations=k)
        solution = backend.solver(problem)(DenseOperator(POSITIVE), {"weight": flat(VECTOR)}, {})
        errors[k] = float((solution.value["weight"] - exact).norm())
    assert (errors[200] / errors[100]) ** (1 / 100) == pytest.approx(rate, rel=0.01)


def test_the_solution_is_that_of_the_system():
    for optimizer, options in (
        (torch.optim.SGD, {"momentum": 0.8}),
        (torch.optim.Adam, {"eps": 1e-2}),
        (torch.optim.AdamW, {"eps": 1e-2, "weight_decay": 0.3}),
    ):
        problem = problem_at_minimum(optimizer, **options)
        if optimizer is not torch.optim.SGD:
            give_state(problem, 50.0, exp_avg=0.0, exp_avg_sq=0.02)
        w = torch.cat([p.detach() for p in problem.params.values()])
        v = 2.0 * (w - torch.arange(1.0, 7.0, dtype=torch.float64))
        with assert_unchanged(problem):
            result = iterate(problem, 3000, tolerance=1e-12)
        assert result.status is Status.CONVERGED
        torch.testing.assert_close(result.gradients["shift"], torch.linalg.solve(POSITIVE, v), rtol=1e-9, atol=1e-10)


# ------------------------------------------------------------------------------------- how it ends, what it carries


def solved(backend, matrix=POSITIVE, lr=0.1, state=None, **options):
    problem = quadratic_problem(matrix)
    problem.optimizer = torch.optim.SGD(problem.model.parameters(), lr=lr, **options)
    operator = DenseOperator(matrix)
    return backend.solver(problem)(operator, {"weight": flat(VECTOR)}, state or {}), operator.products


@pytest.mark.parametrize("lr", [0.41, 0.6, 10.0, 1e12])
@pytest.mark.parametrize("iterations", [20, 2000])
def test_a_learning_rate_that_is_too_large_is_reported(lr, iterations):
    """α > 2/λ_max = 0.4: the iterate of least residual is returned, which is no worse than nothing."""
    if lr == 0.41 and iterations == 20:
        pytest.skip("the growth of 1.05 an iteration does not show yet")
    solution, products = solved(FixedPoint(iterations=iterations), lr=lr)
    assert solution.status is Status.DIVERGED
    assert solution.residual <= 1.0
    v = flat(VECTOR)
    residual = float((POSITIVE @ solution.value["weight"] - v).norm() / v.norm())
    assert solution.residual == pytest.approx(residual, rel=1e-10)
    assert products <= 200


def test_an_end_above_the_start_is_divergence():
    """Too few iterations to grow a hundredfold: ending worse than it began is enough."""
    solution, products = solved(FixedPoint(iterations=4), lr=0.6)
    assert (solution.status, products) == (Status.DIVERGED, 4)
    assert solution.residual <= 1.0


def test_a_loss_that_is_maximized_is_solved_too():
    problem = quadratic_problem(-POSITIVE)
    problem.optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1, maximize=True)
    backend = FixedPoint(iterations=3000, tolerance=1e-12)
    solution = backend.solver(problem)(DenseOperator(-POSITIVE), {"weight": flat(VECTOR)}, {})
    assert solution.status is Status.CONVERGED
    torch.testing.assert_close(solution.value["weight"], torch.linalg.solve(-POSITIVE, flat(VECTOR)))


def test_negative_curvature_diverges():
    matrix = with_spectrum([-0.7, *spread(0.5, 5.0, SIZE - 1)])
    solution, _ = solved(FixedPoint(iterations=2000), matrix, momentum=0.5)
    assert solution.status is Status.DIVERGED
    assert solution.residual <= 1.0


@pytest.mark.parametrize("lr", [0.05, 0.3, 0.75])
def test_momentum_that_goes_up_and_down_is_no_divergence(lr):
    """Stable for αλ < 2(1 + μ) = 3.8, though the residual rises on the way."""
    solution, _ = solved(FixedPoint(iterations=400), lr=lr, momentum=0.9)
    assert not solution.status.failed
    assert solution.residual < 1e-6


def test_a_non_finite_product_is_reported():
    matrix = POSITIVE.clone()
    solution, _ = solved(FixedPoint(), matrix)
    matrix[1, 1] = math.nan
    problem = quadratic_problem(POSITIVE)
    solution = FixedPoint().solver(problem)(DenseOperator(matrix), {"weight": flat(VECTOR)}, {})
    assert solution.status is Status.NON_FINITE
    assert torch.isfinite(solution.value["weight"]).all()
    assert solution.state == {}


def test_it_stops_at_its_tolerance():
    solution, products = solved(FixedPoint(iterations=1000, tolerance=1e-3))
    before, _ = solved(FixedPoint(iterations=solution.iterations - 1))
    assert solution.status is Status.CONVERGED
    assert solution.residual <= 1e-3 < before.residual
    assert products == solution.iterations


def test_warm_start_goes_on():
    """20 and then 20 more, without momentum, are 40; the second call measures its start."""
    first, products = solved(FixedPoint(iterations=20))
    assert products == 20
    second, products = solved(FixedPoint(iterations=20), state=first.state)
    assert products == 21
    whole, _ = solved(FixedPoint(iterations=40))
    torch.testing.assert_close(second.value["weight"], whole.value["weight"], rtol=1e-12, atol=1e-14)
    cold, products = solved(FixedPoint(iterations=20, warm_start=False), state=first.state)
    assert (cold.state, products) == ({}, 20)
    torch.testing.assert_close(cold.value["weight"], first.value["weight"], rtol=0.0, atol=0.0)


def test_a_converged_warm_start_is_no_divergence():
    first, _ = solved(FixedPoint(iterations=3000), momentum=0.9)
    second, _ = solved(FixedPoint(iterations=30), state=first.state, momentum=0.9)
    assert not second.status.failed
    assert second.residual < 1e-13


# -------------------------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.RMSprop], ids=lambda kind: kind.__name__)
def test_a_preconditioner_that_is_not_there_yet_is_refused(kind):
    message = (
        f"backend 'fixed_point' takes the preconditioner of {kind.__name__} from the optimizer's state, and the "
        "optimizer has not taken a step yet. Train before the first hypergradient, or use 'cg' or 'neumann'."
    )
    with pytest.raises(hi.BackendError, match=f"^{re.escape(message)}$"):
        iterate(problem_at_minimum(kind), 3)


def test_a_parameter_without_state_is_not_moved():
    problem = problem_at_minimum(torch.optim.Adam)
    give_state(problem, 7.0, exp_avg=0.0, exp_avg_sq=0.5)
    del problem.optimizer.state[problem.params["a"]]
    result = iterate(problem, 20)
    assert result.gradients["shift"][:2].abs().max() == 0.0
    assert result.gradients["shift"][2:].abs().min() > 0.0


def test_an_optimizer_without_a_known_map_is_refused():
    message = (
        "backend 'fixed_point' iterates the inner optimizer's own update, and knows that of SGD, Adam, AdamW, RMSprop; "
        "got Adagrad. Use one of these, or 'cg' or 'neumann', which do not look at the optimizer."
    )
    with pytest.raises(hi.BackendError, match=f"^{re.escape(message)}$"):
        FixedPoint().check(problem_at_minimum(torch.optim.Adagrad))


def test_amsgrad_is_refused():
    message = (
        "backend 'fixed_point' iterates the inner optimizer's own update, and does not know that of Adam with "
        "amsgrad=True. Set amsgrad=False, or use 'cg' or 'neumann', which do not look at the optimizer."
    )
    with pytest.raises(hi.BackendError, match=f"^{re.escape(message)}$"):
        FixedPoint().check(problem_at_minimum(torch.optim.Adam, amsgrad=True))


def test_losses_without_a_problem_are_refused():
    w, φ = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    meta = MetaOptimizer(torch.optim.SGD([φ], lr=0.1), backend="fixed_point")
    message = (
        "backend 'fixed_point' iterates the update of the inner optimizer of a BilevelProblem, and there is none here. "
        "Use HyperOptimizer or hypergradient with a BilevelProblem, or the backend 'neumann' or 'cg'."
    )
    with pytest.raises(hi.BackendError, match=f"^{re.escape(message)}$"):
        meta.step((φ * w).square().sum(), w.sum(), [w], [φ])
