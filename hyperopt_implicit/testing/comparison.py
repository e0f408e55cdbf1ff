"""How a conformance test compares a backend with the truth: carried state, minima, and what counts as right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from hyperopt_implicit.backend import Backend, Hypergradient, State
from hyperopt_implicit.hyper_optimizer import hypergradient
from hyperopt_implicit.problem import BilevelProblem
from hyperopt_implicit.testing.assertions import assert_close, assert_points_along
from hyperopt_implicit.testing.oracles import (
    dense_derivatives,
    implicit_hypergradient,
    train_to_minimum,
    unrolled_hypergradient,
)
from hyperopt_implicit.testing.specimens import Batch
from hyperopt_implicit.vectors import Params


class Comparison:
    """A backend under test, and what it is compared with; the attributes are those of ``BackendConformance``."""

    backend: Backend
    accuracy: float = 1e-6
    cosine: float | None = None
    calls: int = 1

    @property
    def through_training(self) -> bool:
        """Whether the backend under test differentiates the trajectory."""
        return self.backend.differentiates == "trajectory"

    def prepare(self, problem: BilevelProblem, training_batches: Sequence[Any], validation_batch: Any) -> None:
        """Called before the first call, for a backend that asks more of a problem than batches; does nothing here."""

    def compute(
        self,
        problem: BilevelProblem,
        training_batches: Sequence[Any],
        validation_batch: Any,
        state: State | None = None,
    ) -> Hypergradient:
        """The backend's hypergradient, through the public function: the last of as many calls as it takes."""
        self.prepare(problem, training_batches, validation_batch)
        result = hypergradient(
            problem, self.backend, training_batches=training_batches, validation_batch=validation_batch, state=state
        )
        for _ in range(self.calls - 1):
            result = self.backend.hypergradient(problem, training_batches, validation_batch, result.state)
        return result

    def agree(self, actual: Params, expected: Params, least: float = 0.0) -> None:
        """The hypergradient is what it should be, to the accuracy stated (but not asked to be below ``least``)."""
        if self.cosine is None:
            assert_close(actual, expected, max(self.accuracy, least))
        else:
            assert_points_along(actual, expected, self.cosine)

    def repeated(self, batch: Any) -> list[Any]:
        """A few steps on the batch, or the batch once where only the solution is seen."""
        return [batch] * (5 if self.through_training else 1)

    def truth(self, problem: BilevelProblem, training_batches: Sequence[Any], validation_batch: Any) -> Params:
        """What it must agree with, at the weights as they are."""
        oracle = unrolled_hypergradient if self.through_training else implicit_hypergradient
        return oracle(problem, training_batches, validation_batch)

    def at_minimum(self, problem: BilevelProblem, training: Batch, validation: Batch) -> Hypergradient:
        """The hypergradient at a minimum of L, where a trajectory is given enough steps to forget its beginning."""
        left = train_to_minimum(problem, [training])
        if not left < 1e-11:
            raise AssertionError(f"the suite's own training did not converge: ‖∂L/∂w‖ = {left}")
        batches = [training]
        eigenvalues = torch.linalg.eigvalsh(dense_derivatives(problem, batches).hessian)
        eigenvalues = eigenvalues[eigenvalues > 1e-9 * eigenvalues.max()]
        least, most = float(eigenvalues.min()), float(eigenvalues.max())
        problem.optimizer.param_groups[0]["lr"] = 2.0 / (least + most)  # the best for gradient descent
        if self.through_training:
            contraction = max((most - least) / (most + least), 0.1)
            batches *= math.ceil(math.log(0.01 * self.accuracy) / math.log(contraction))
        return self.compute(problem, batches, validation)

    def check_at_minimum(
        self, problem: BilevelProblem, training: Batch, validation: Batch, expected: Params | None = None
    ) -> Hypergradient:
        """It agrees with ``expected`` at a minimum (by default the theorem, solved densely) and claims success."""
        result = self.at_minimum(problem, training, validation)
        if expected is None:
            expected = implicit_hypergradient(problem, [training], validation)
        self.agree(result.gradients, expected)
        if result.status.failed:
            raise AssertionError(f"the hypergradient is right, and its status {result.status.value!r}")
        return result
