"""``check``: is a backend's hypergradient right on a problem, and if not, how much is due to what?

It measures; what the measurements mean is put into words in ``verdict.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hyperopt_implicit.argument_checks import is_number
from hyperopt_implicit.backend import Backend, Spec, get_backend
from hyperopt_implicit.diagnostics.batches import batches_of, check_count, check_seconds, warmed_up
from hyperopt_implicit.diagnostics.measurements import CheckReport, Measurements
from hyperopt_implicit.diagnostics.truth import (
    difference,
    directions,
    minimise,
    slope,
    theorem,
    true_residual,
    unrolled,
)
from hyperopt_implicit.diagnostics.twin import Twin, float64_twin
from hyperopt_implicit.diagnostics.verdict import verdict
from hyperopt_implicit.errors import BackendError, HyperoptError, ProblemError
from hyperopt_implicit.implicit import ImplicitBackend
from hyperopt_implicit.problem import BilevelProblem, check_problem
from hyperopt_implicit.vectors import Params, norm

_MOST_DRAWS = 8


def check(
    problem: BilevelProblem,
    backend: Spec = "neumann",
    *,
    training_batches: Sequence[Any] | None = None,
    validation_batches: Sequence[Any] | None = None,
    inner_steps: int = 10,
    warmup_steps: int = 0,
    calls: int = 50,
    tolerance: float = 0.1,
    seconds: float = 60.0,
    seed: int = 0,
) -> CheckReport:
    """Compare a backend's hypergradient with finite differences of F through the whole inner problem, in float64.

    Everything happens on copies. For a backend that differentiates the solution, the inner problem is minimised, for
    the present hyperparameters and for displaced ones, and F is differenced there; for one that differentiates the
    trajectory, training is run again with displaced hyperparameters, by torch's own optimizer. The distance of the
    backend's number from that is split: how much is due to the inner problem not being solved, to the solver, to one
    batch standing for all, to the precision, and to losses whose derivatives are not what they seem.

    Args:
        problem: the bilevel problem, with the model at the weights at which to check.
        backend: a name, a dict of a name and options, or an instance.
        training_batches: L is their average, a trajectory steps through them; by default one pass of the problem's
            training data (16 batches at most), or ``inner_steps`` batches of it.
        validation_batches: F is their average; by default one pass of the validation data, 16 batches at most.
        inner_steps: length of a trajectory, where no batches are given.
        warmup_steps: plain training steps on the copy before anything is looked at.
        calls: for a backend that carries state: how often it is called, at most, until its number has settled.
        tolerance: relative error up to which a hypergradient is called right.
        seconds: after which a minimisation is given up.
        seed: of directions and random layers.

    Returns:
        The measurements, and a verdict; ``print`` shows both.

    Raises:
        HyperoptError: what :func:`hyperopt_implicit.preflight.preflight` refuses, or an option out of its range.

    Example:
        >>> import torch, hyperopt_implicit as hi
        >>> @hi.hyperparameter("decay", init=0.5)
        ... def training_loss(model, batch, *, decay):
        ...     return ((model(batch) - batch) ** 2).mean() + decay * model.weight.square().sum()
        >>> batch = torch.tensor([[1.0], [2.0]])
        >>> problem = hi.BilevelProblem(
        ...     torch.nn.Linear(1, 1), training_loss, lambda model, batch: ((model(batch) - batch) ** 2).mean(),
        ...     training_data=[batch], validation_data=[batch],
        ...     optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
        >>> report = hi.check(problem, "cg", warmup_steps=500)
        >>> report.ok
        True
    """
    check_problem(problem)
    check_seconds("seconds", seconds)
    chosen = get_backend(backend).for_problem(problem)
    chosen.check(problem)
    if not is_number(tolerance) or not 0.0 < tolerance < 1.0:
        raise HyperoptError(f"tolerance must be a relative error between 0 and 1; got {tolerance!r}.")
    for name, value, least in (("inner_steps", inner_steps, 1), ("warmup_steps", warmup_steps, 0), ("calls", calls, 1)):
        check_count(name, value, least)
    with warmed_up(problem, warmup_steps, seed) as start:
        through = chosen.differentiates == "trajectory"
        training = batches_of(problem, "training_data", training_batches, inner_steps if through else None)
        validation = batches_of(problem, "validation_data", validation_batches, None)
        chosen.check_steps(len(training))
        found = _Examination(start, chosen, training, validation, calls, seconds, seed).measure()
    return CheckReport(found, tolerance, *verdict(found, tolerance))


class _Examination:
    """One check: the copies that it is made on, and one measurement after the other."""

    def __init__(
        self,
        problem: BilevelProblem,
        backend: Backend,
        training: list[Any],
        validation: list[Any],
        calls: int,
        seconds: float,
        seed: int,
    ) -> None:
        self.backend, self.calls, self.seconds, self.seed = backend, calls, seconds, seed
        self.through = backend.differentiates == "trajectory"
        self.notes: list[str] = []
        self.as_given = Twin(problem, training, validation, seed=seed)
        self.twin = float64_twin(problem, training, validation, seed, self.notes)
        self.vector, self.direct = self.twin.validation_gradients()

    def measure(self) -> Measurements:
        """Everything that the report shows and that the verdict rests on."""
        before = self.as_given.everything()
        mine, calls = self.as_given.hypergradient(self.backend, calls=self.calls)
        changed = self.as_given.changed_since(before)
        first, again = (self.twin.hypergradient(self.backend)[0] for _ in range(2))
        exact = self.twin.hypergradient(self.backend, calls=self.calls)[0]
        parameters, hparams = self.twin.problem.params, self.twin.problem.hparams
        found = Measurements(
            backend=self.backend,
            result=mine,
            calls=calls,
            in_float64=exact.gradients,
            first=first.gradients,
            reproducible=difference(first.gradients, again.gradients) <= 1e-9 * norm(first.gradients),
            changed=changed,
            direct=self.direct,
            validation_gradient_norm=norm(self.vector),
            training_gradient_norm=norm(self.twin.gradient()),
            spread=self._spread(exact.gradients),
            parameters=sum(p.numel() for p in parameters.values()),
            hyperparameters=sum(p.numel() for p in hparams.values()),
            batches=(len(self.twin.training), len(self.twin.validation)),
            notes=self.notes,
        )
        if not self.backend.needs_validation_gradient and norm(self.vector) + norm(self.direct) == 0.0:
            self.notes.append("F has no gradient, so finite differences are all that there is to compare with.")
            self._difference_training(found)
        elif self.through:
            found.target = self._unrolled()
            self._difference_training(found)
        elif self.twin.is_twice_differentiable():
            self._solve(found, self.backend.settled(exact.state))
            self._difference_minima(found)
        else:
            self.notes.append(
                "L has no second derivative, so its minimum was looked for with first derivatives (L-BFGS), and the "
                "theorem could not be solved."
            )
            self._difference_minima(found)
        return found

    def _unrolled(self) -> Params | None:
        """All steps differentiated, where they can be."""
        try:
            return unrolled(self.twin).gradients
        except (BackendError, ProblemError) as error:
            self.notes.append(f"The training steps cannot be differentiated: {error}")
            return None

    def _solve(self, found: Measurements, backend: Backend) -> None:
        """The theorem at the present weights: with the damping and the curvature of the backend, and without."""
        found.target = found.theorem = theorem(self.twin).gradients
        if isinstance(backend, ImplicitBackend):
            found.solved_by, found.true_residual = backend, true_residual(self.twin, backend)
            if backend.damping or backend.curvature != "hessian":
                found.target = theorem(self.twin, backend).gradients

    def _difference_training(self, found: Measurements) -> None:
        found.slopes = [slope(self.twin, *each, self.twin.train) for each in directions(self.twin, self.seed)]

    def _difference_minima(self, found: Measurements) -> None:
        minimum = found.minimum = minimise(self.twin, seconds=self.seconds)
        if not minimum.solved:
            reached = (
                "L curves downwards where its gradient vanishes: that is a saddle point and no minimum"
                if minimum.curves_down
                else f"No minimum of L was reached in {minimum.iterations} steps of Newton's method: ‖∂L/∂w‖ = "
                f"{minimum.gradient_norm:.2g} is left, beside ‖∂F/∂w‖ = {norm(self.vector):.2g}"
            )
            self.notes.append(
                f"{reached}. There are no finite differences, and the theorem at the present weights stands in for the "
                "truth."
            )
            return
        if found.theorem is not None:
            found.at_minimum = theorem(self.twin).gradients

        def settle() -> None:
            minimise(self.twin, target=2.0 * minimum.gradient_norm, seconds=self.seconds)

        found.slopes = [slope(self.twin, *each, settle) for each in directions(self.twin, self.seed)]

    def _spread(self, mean: Params) -> float | None:
        """How far the number from one batch each is from the one from all, root mean square; None with one batch."""
        training, validation = self.twin.training, self.twin.validation
        draws = min(max(len(validation), 1 if self.through else len(training)), _MOST_DRAWS)
        if draws < 2:
            return None
        squares = []
        for i in range(draws):
            batches = training if self.through else [training[i % len(training)]]
            alone = self.twin.hypergradient(self.backend, batches, [validation[i % len(validation)]], calls=self.calls)
            squares.append(difference(alone[0].gradients, mean) ** 2)
        return math.sqrt(sum(squares) / draws)
