"""Adam's second moment as a preconditioner: its value, what it saves on a badly scaled problem, who is refused it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints

import hyperopt_implicit as hi
from hyperopt_implicit.backend import Status
from hyperopt_implicit.errors import BackendError
from hyperopt_implicit.preconditioner import FLOOR, adam_preconditioner
from hyperopt_implicit.testing.assertions import assert_close, assert_unchanged, saved_and_loaded
from hyperopt_implicit.testing.oracles import implicit_hypergradient
from hyperopt_implicit.testing.specimens import TRAINING, VALIDATION, Linear, half_mean_square, ridge_problem

OPTIMIZERS = {
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "amsgrad": lambda params: torch.optim.Adam(params, lr=0.01, amsgrad=True, betas=(0.8, 0.95)),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=0.01),
    "RAdam": lambda params: torch.optim.RAdam(params, lr=0.01),
    "two groups": lambda params: torch.optim.Adam([{"params": params[:1]}, {"params": params[1:], "lr": 1e-3}]),
}


def badly_scaled(optimizer: Callable = OPTIMIZERS["Adam"], model: nn.Module | None = None) -> hi.BilevelProblem:
    """Forty features of sizes from 0.05 to 20: with the decay, a condition of about 10⁴."""
    generator = torch.Generator().manual_seed(4)
    sizes = torch.logspace(-1.3, 1.3, 40, dtype=torch.float64)
    sizes = sizes[torch.randperm(40, generator=generator)]

    def data(rows: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(rows, 40, generator=generator, dtype=torch.float64) * sizes
        noise = torch.randn(rows, generator=generator, dtype=torch.float64)
        return x, (x / sizes).sum(1) + noise

    @hi.hyperparameter("decay", init=1e-2, constraint=constraints.positive)
    def training_loss(model: nn.Module, batch: tuple[Tensor, Tensor], *, decay: Tensor) -> Tensor:
        return half_mean_square(model, batch) + 0.5 * decay * next(model.parameters()).square().sum()

    return hi.BilevelProblem(
        Linear(40) if model is None else model,
        training_loss,
        half_mean_square,
        training_data=[data(30) for _ in range(5)],
        validation_data=[data(200)],
        optimizer=optimizer,
    )


def trained(problem: hi.BilevelProblem, steps: int = 200) -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """Its batches, after so many steps of its own optimizer."""
    training, validation = list(problem.training_data), next(iter(problem.validation_data))
    for step in range(steps):
        problem.optimizer.zero_grad()
        problem.training_loss(training[step % len(training)]).backward()
        problem.optimizer.step()
    problem.optimizer.zero_grad()
    return training, validation


# ----------------------------------------------------------------------------------------------------------- its value


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_is_the_root_of_the_second_moment(optimizer):
    """Worked out from the gradients: v ← β₂v + (1 − β₂)g², and √(v/mean v), no less than the floor."""
    offset = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
    model = Linear(4, offset=offset)
    problem = ridge_problem(model, optimizer=optimizer, extra=lambda m: (m.offset.sum() - 1.0).square() * 1e-3)
    beta = problem.optimizer.param_groups[0]["betas"][1]
    moments = {name: np.zeros(tuple(p.shape)) for name, p in problem.params.items()}
    assert adam_preconditioner(problem) is None
    for _ in range(7):
        problem.optimizer.zero_grad()
        problem.training_loss(TRAINING).backward()
        for name, p in problem.params.items():
            moments[name] = beta * moments[name] + (1 - beta) * p.grad.numpy() ** 2
        problem.optimizer.step()
    problem.optimizer.zero_grad()
    mean = np.concatenate([m.ravel() for m in moments.values()]).mean()
    with assert_unchanged(problem):
        found = adam_preconditioner(problem)
    assert found is not None and list(found) == list(problem.params)
    for name, moment in moments.items():
        np.testing.assert_allclose(found[name].numpy(), np.maximum(np.sqrt(moment / mean), FLOOR), rtol=1e-12)
    assert (found["offset"] == FLOOR).all() and (found["weight"] > FLOOR).all()


def test_belongs_to_the_problem_not_to_the_optimizer():
    """A copy of the problem has the same one, and the memory is its own."""
    problem = badly_scaled()
    trained(problem, 5)
    found, other = adam_preconditioner(problem), adam_preconditioner(problem.copy())
    assert_close(other, found, 0.0)
    found["weight"].zero_()
    assert problem.optimizer.state[problem.params["weight"]]["exp_avg_sq"].abs().min() > 0


def test_a_parameter_without_a_gradient_has_the_least():
    """Adam keeps nothing for it; the others keep their preconditioner."""
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    problem, plain = badly_scaled(model=Linear(40, unused=unused)), badly_scaled()
    trained(problem, 20), trained(plain, 20)
    found, wanted = adam_preconditioner(problem), adam_preconditioner(plain)
    assert unused not in problem.optimizer.state
    assert found["unused"].tolist() == [FLOOR] * 3
    above = wanted["weight"] > FLOOR
    torch.testing.assert_close(found["weight"][above], wanted["weight"][above] * (43 / 40) ** 0.5, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_moments_of_which_nothing_can_be_made(value):
    problem = badly_scaled()
    trained(problem, 1)
    problem.optimizer.state[problem.params["weight"]]["exp_avg_sq"].fill_(value)
    assert adam_preconditioner(problem) is None


# ------------------------------------------------------------------------------------------------------- what it saves


@pytest.mark.parametrize("name", ["cg", "heavy_ball"])
def test_fewer_iterations_for_the_same_solution(name):
    problem = badly_scaled()
    training, validation = trained(problem)
    options = {"tolerance": 1e-8 if name == "cg" else 1e-6, "max_iterations": 200}
    expected = implicit_hypergradient(problem, training, validation)
    results = {}
    for preconditioner in (None, "adam"):
        backend = hi.get_backend(name, preconditioner=preconditioner, **options)
        with assert_unchanged(problem):
            results[preconditioner] = hi.hypergradient(
                problem, backend, training_batches=training, validation_batch=validation
            )
        assert results[preconditioner].status is Status.CONVERGED
        assert_close(results[preconditioner].gradients, expected, 1e-6)
    assert results["adam"].iterations <= 0.75 * results[None].iterations
    assert results["adam"].hvps <= 0.75 * results[None].hvps


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_damping_is_part_of_the_system(curvature):
    """M scales A = H + δI, and not H alone."""
    problem = badly_scaled()
    training, validation = trained(problem)
    options = {"damping": 0.5, "curvature": curvature}
    results = [
        hi.hypergradient(
            problem, hi.get_backend(name, **more, **options), training_batches=training, validation_batch=validation
        )
        for name, more in (
            ("cg", {"preconditioner": "adam", "tolerance": 1e-11, "max_iterations": 300}),
            ("exact", {}),
        )
    ]
    assert_close(results[0].gradients, results[1].gradients, 1e-9)


def test_heavy_ball_follows_with_it():
    """Many calls on the same system, at one product each, with the state saved at each: the error goes to zero."""
    problem = badly_scaled()
    training, validation = trained(problem)
    backend, state = hi.get_backend("heavy_ball", preconditioner="adam"), {}
    for call in range(100):
        result = hi.hypergradient(
            problem, backend, training_batches=training, validation_batch=validation, state=saved_and_loaded(state)
        )
        assert result.hvps == (1 if call else result.iterations)
        state = result.state
    assert result.residual < 1e-5
    assert_close(result.gradients, implicit_hypergradient(problem, training, validation), 1e-4)


@pytest.mark.parametrize("name", ["cg", "heavy_ball"])
def test_before_the_first_step_there_is_none(name):
    """The call is that of a backend without; the option only begins to tell once there are moments."""
    problem = badly_scaled()
    training, validation = trained(problem, 0)
    results = [
        hi.hypergradient(
            problem,
            hi.get_backend(name, preconditioner=preconditioner),
            training_batches=training,
            validation_batch=validation,
        )
        for preconditioner in (None, "adam")
    ]
    assert_close(results[0].gradients, results[1].gradients, 0.0)
    assert results[0].iterations == results[1].iterations


def test_heavy_ball_survives_the_moments_coming_in():
    """Bounds that were found without a preconditioner do not fit with one; the residual tells, and it solves anew."""
    problem = badly_scaled()
    training, validation = trained(problem, 0)
    backend = hi.get_backend("heavy_ball", preconditioner="adam", max_iterations=200)
    state, residuals = {}, []
    for _ in range(30):
        result = hi.hypergradient(problem, backend, training_batches=training, validation_batch=validation, state=state)
        trained(problem, 20)
        state = result.state
        residuals.append(result.residual)
        assert not result.status.failed
    assert max(residuals) <= backend.tolerance


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["cg", "heavy_ball"])
@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [
        ("SGD", lambda params: torch.optim.SGD(params, lr=0.1)),
        ("Adamax", lambda params: torch.optim.Adamax(params)),
        ("RMSprop", lambda params: torch.optim.RMSprop(params)),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refused_without_moments(name, kind, optimizer):
    """In both entry points, before anything is computed."""
    problem, backend = ridge_problem(optimizer=optimizer), hi.get_backend(name, preconditioner="adam")
    for use in (
        lambda: hi.hypergradient(problem, backend, training_batches=[TRAINING], validation_batch=VALIDATION),
        lambda: hi.HyperOptimizer(problem, backend=backend),
    ):
        with pytest.raises(BackendError) as caught:
            use()
        assert str(caught.value) == (
            "preconditioner='adam' takes the second moment that Adam, AdamW, NAdam and RAdam keep; the inner optimizer "
            f"is {kind}. Leave the option out."
        )


@pytest.mark.parametrize("name", ["cg", "heavy_ball"])
def test_there_is_no_other(name):
    with pytest.raises(BackendError) as caught:
        hi.get_backend(name, preconditioner="jacobi")
    kind = type(hi.get_backend(name)).__name__
    assert str(caught.value) == f"{kind} option 'preconditioner': input should be 'adam'; got 'jacobi'."
