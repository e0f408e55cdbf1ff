"""Every backend meets every problem of the conformance suite; the table leaves none out, the suite catches mistakes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import hyperopt_implicit as hi
from hyperopt_implicit.operators import Hessian
from hyperopt_implicit.testing import BackendConformance
from hyperopt_implicit.testing.assertions import assert_close
from hyperopt_implicit.testing.oracles import train_to_minimum
from hyperopt_implicit.testing.specimens import Linear, regression_data, ridge_problem
from hyperopt_implicit.vectors import scale_
from hyperopt_implicit_backends import Auto, Exact, Unrolled

from .cases import CASES

every_backend = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.mark.filterwarnings("ignore:auto leaves 'lr':hyperopt_implicit.errors.HyperoptWarning")
@pytest.mark.filterwarnings("ignore:auto met an indefinite Hessian:hyperopt_implicit.errors.HyperoptWarning")
class TestBackends(BackendConformance):
    """The suite, once for each row."""

    @pytest.fixture(autouse=True, params=CASES, ids=lambda case: case.name)
    def _case(self, request: pytest.FixtureRequest) -> None:
        self.backend = request.param.backend
        self.accuracy = request.param.accuracy
        self.cosine = request.param.cosine
        self.calls = request.param.calls
        self.prepare = request.param.prepare

    def test_dropout_masks_are_those_drawn_first(self) -> None:
        """Beyond the contract: our backends draw as plain training would, once a batch, so the truth is known."""
        if self.calls > 1 or self.backend.batches == "sampled" or isinstance(self.backend, Auto):
            pytest.skip("it mixes many draws: those of all calls, or of every look at a batch")
        if not self.through_training and not self.backend.needs_second_derivative:
            pytest.skip("biased where L is not at its minimum, as it cannot be for every mask")
        training, validation = regression_data(0), regression_data(1)
        problem = ridge_problem(nn.Sequential(Linear(4), nn.Dropout(0.5)))
        train_to_minimum(problem, [training], max_steps=1)
        batches = [training, regression_data(2)]
        torch.manual_seed(1)
        result = self.compute(problem, batches, validation)
        torch.manual_seed(1)
        assert_close(result.gradients, self.truth(problem, batches, validation), self.accuracy)


def test_every_backend_has_its_row():
    ours = {name for name in hi.list_backends() if _module(name).startswith("hyperopt_implicit_backends.")}
    assert {case.name for case in CASES} == ours


def _module(name: str) -> str:
    return type(hi.get_backend(name)).__module__


@every_backend
def test_backends_say_what_they_differentiate(case):
    assert case.backend.differentiates == case.differentiates


@every_backend
def test_products_are_counted(case, monkeypatch):
    """hvps is what was really multiplied, the power iteration and warm starts included."""
    count = 0

    def counting(multiply):
        def counted(self, vector):
            nonlocal count
            count += 1
            return multiply(self, vector)

        return counted

    for name in ("__matmul__", "multiply_and_mix"):
        monkeypatch.setattr(Hessian, name, counting(getattr(Hessian, name)))
    problem, training, validation = ridge_problem(), regression_data(0), regression_data(1)
    case.prepare(problem, [training] * 3, validation)

    def expected():
        if not case.backend.needs_second_derivative:
            return 0
        assert case.differentiates == "trajectory" or count > 0
        return count if case.differentiates == "solution" else 3

    first = hi.hypergradient(problem, case.backend, training_batches=[training] * 3, validation_batch=validation)
    assert first.hvps == expected()
    count = 0
    second = hi.hypergradient(
        problem, case.backend, training_batches=[training] * 3, validation_batch=validation, state=first.state
    )
    assert second.hvps == expected()


# ------------------------------------------------------------------------------------ backends wrong on purpose


@dataclass(frozen=True)
class LeavesOutTheDirectTerm(Exact):
    def hypergradient(self, problem, training_batches, validation_batch, state, /):
        result = super().hypergradient(problem, training_batches, validation_batch, state)
        loss = problem.functional_validation_loss(problem.params, problem.hparams, validation_batch)
        direct = torch.autograd.grad(loss, list(problem.hparams.values()), allow_unused=True, materialize_grads=True)
        gradients = {name: g - d for (name, g), d in zip(result.gradients.items(), direct, strict=True)}
        return dataclasses.replace(result, gradients=gradients)


@dataclass(frozen=True)
class KeepsAFactor(Exact):
    """1/α too large, as if the series had lost its step size."""

    def solve(self, hessian, vector, state, /):
        solution = super().solve(hessian, vector, state)
        return dataclasses.replace(solution, value=scale_(solution.value, 10.0))


@dataclass(frozen=True)
class Boasts(Exact):
    def solve(self, hessian, vector, state, /):
        solution = super().solve(hessian, vector, state)
        return dataclasses.replace(solution, value=scale_(solution.value, 1.0 + 1e-4))


@dataclass(frozen=True)
class ConvergesAnywhere(Exact):
    """A solver for positive definite matrices that is used on any."""

    def solve(self, hessian, vector, state, /):
        solution = super().solve(hessian, vector, state)
        downwards = {name: solution.value[name] * (vector[name] * solution.value[name] > 0) for name in vector}
        return dataclasses.replace(solution, value=downwards)


@dataclass(frozen=True)
class ChangesTheRightHandSide(Exact):
    def solve(self, hessian, vector, state, /):
        solution = super().solve(hessian, vector, state)
        scale_(vector, 0.5)
        return solution


@dataclass(frozen=True)
class MovesRunningStatistics(Exact):
    def hypergradient(self, problem, training_batches, validation_batch, state, /):
        problem.training_loss(training_batches[0])
        return super().hypergradient(problem, training_batches, validation_batch, state)


@dataclass(frozen=True)
class WritesGradients(Exact):
    def hypergradient(self, problem, training_batches, validation_batch, state, /):
        problem.training_loss(training_batches[0]).backward()
        return super().hypergradient(problem, training_batches, validation_batch, state)


@dataclass(frozen=True)
class DrawsFromTheGlobalGenerator(Exact):
    def solve(self, hessian, vector, state, /):
        torch.rand(1)
        return super().solve(hessian, vector, state)


@dataclass(frozen=True)
class UsesTheFirstBatchOnly(Exact):
    def hypergradient(self, problem, training_batches, validation_batch, state, /):
        return super().hypergradient(problem, training_batches[:1], validation_batch, state)


@dataclass(frozen=True)
class KeepsAnObject(Exact):
    def solve(self, hessian, vector, state, /):
        return dataclasses.replace(super().solve(hessian, vector, state), state={"hessian": object()})


@dataclass(frozen=True)
class ChecksNothing(Exact):
    def check(self, problem):
        pass


@dataclass(frozen=True)
class ForgetsTheFirstStep(Unrolled):
    def hypergradient(self, problem, training_batches, validation_batch, state, /):
        result = Unrolled(last=max(len(training_batches) - 1, 1)).hypergradient(
            problem, training_batches, validation_batch, state
        )
        return dataclasses.replace(result, status=hi.Status.CONVERGED)


@dataclass(frozen=True)
class Trains(Unrolled):
    def hypergradient(self, problem, training_batches, validation_batch, state, /):
        result = super().hypergradient(problem, training_batches, validation_batch, state)
        problem.load_inner_state(result.endpoint)
        return result


@pytest.mark.parametrize(
    ("backend", "test"),
    [
        (LeavesOutTheDirectTerm(), "test_hyperparameter_in_the_validation_loss"),
        (KeepsAFactor(), "test_ridge"),
        (Boasts(), "test_residual_is_the_true_one"),
        (ConvergesAnywhere(), "test_indefinite_hessian"),
        (ChangesTheRightHandSide(), "test_residual_is_the_true_one"),
        (MovesRunningStatistics(), "test_batch_norm_in_training_mode"),
        (WritesGradients(), "test_changes_nothing"),
        (DrawsFromTheGlobalGenerator(), "test_changes_nothing"),
        (UsesTheFirstBatchOnly(), "test_several_training_batches"),
        (KeepsAnObject(), "test_state_carries_and_survives"),
        (ChecksNothing(), "test_hyperparameter_of_the_optimizer"),
        (ForgetsTheFirstStep(), "test_several_training_batches"),
        (Trains(), "test_changes_nothing"),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_the_suite_catches(backend, test):
    suite = BackendConformance()
    suite.backend, suite.accuracy = backend, 1e-8
    with pytest.raises((AssertionError, TypeError, AttributeError)) as caught:
        getattr(suite, test)()
    assert caught.type is AssertionError, caught.value
