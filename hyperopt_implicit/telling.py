"""What a study is told of a trial: its values, or that it failed and why; and which models are kept for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from hyperopt_implicit.argument_checks import shown
from hyperopt_implicit.backend import Status
from hyperopt_implicit.errors import HypergradientError, LossError, SearchError
from hyperopt_implicit.history import Result
from hyperopt_implicit.kept_trials import KeptTrials, TrialState
from hyperopt_implicit.messages import warn
from hyperopt_implicit.optuna_warnings import accepting_experimental
from hyperopt_implicit.places import FAILURE
from hyperopt_implicit.storages import without_secrets_of

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial
    from optuna.trial import TrialState as State

FAILURES: tuple[type[Exception], ...] = (LossError, HypergradientError, torch.OutOfMemoryError)
"""What fails a trial and no other: a loss or a gradient that is not finite, and memory that runs out."""

Objective = Callable[[Result], float]

OBJECTIVES: dict[str, Objective] = {
    "validation_loss": lambda result: result.best_validation_loss,
    "seconds": lambda result: result.seconds,
}
"""What can be minimised by name."""


@dataclass
class Teller:
    """Tells a study what came of its trials.

    Attributes:
        study: the study.
        objectives: what is minimised, by name.
        constraints: what must be at most zero, by name.
        catch: errors that fail a trial, where an objective or a constraint raises them.
        kept: where models are kept.
        told: the trials that were told, as they have ended, by number.
        best: the number and the result of the best trial that was told here.
        failures: what went wrong, a line a trial.
        exhausted: whether the sampler has said that there is nothing more to try.
    """

    study: Study
    objectives: Mapping[str, Objective]
    constraints: Mapping[str, Objective]
    catch: tuple[type[Exception], ...]
    kept: KeptTrials
    told: dict[int, FrozenTrial] = field(default_factory=dict)
    best: tuple[int, Result] | None = None
    failures: list[str] = field(default_factory=list)
    exhausted: bool = False

    def tell(self, trial: Trial, outcome: Result | Exception, seed: int | None, *, pruned: bool) -> None:
        """Tell what came of a trial that has run.

        Args:
            trial: Optuna's.
            outcome: its result, or the error that has ended it.
            seed: that of the trial.
            pruned: whether the pruner has ended it.
        """
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState as State

        try:
            if isinstance(outcome, Exception):
                self.fail(trial, outcome)
                return
            if outcome.run_id is not None:
                trial.set_user_attr("run_id", outcome.run_id)
            if pruned:
                self._end(trial, State.PRUNED)
                return
            try:
                values, bounds = _values(self.objectives, outcome), _values(self.constraints, outcome)
            except self.catch as error:
                self.fail(trial, error)
                return
            with accepting_experimental():
                for name, value in bounds.items():
                    trial.set_constraint(name, value)
            self._complete(trial, list(values.values()), all(x <= 0.0 for x in bounds.values()), outcome, seed)
        except UpdateFinishedTrialError:  # a worker that stood still for too long is taken for dead
            warn(f"trial {trial.number} was ended by somebody else while it ran here; what it came to is not counted.")

    def fail(self, trial: Trial, error: Exception) -> None:
        """Tell that a trial has failed, and why."""
        from optuna.trial import TrialState as State

        trial.set_user_attr(FAILURE, without_secrets_of(self.study._storage, reason_of(error)))
        self._end(trial, State.FAIL)
        self.failures.append(f"trial {trial.number}: {without_secrets_of(self.study._storage, str(error))}")

    def _complete(self, trial: Trial, values: list[float], is_allowed: bool, result: Result, seed: int | None) -> None:
        """Tell the values of a trial, and keep its model if it is among the best."""
        from optuna.trial import TrialState as State

        before = front(self.study)
        several = len(values) > 1
        is_best = is_allowed and (several or not before or values[0] < before[0].values[0])
        is_kept = is_best and self.kept.keep(trial, TrialState.of(result, seed))
        told = self._end(trial, State.COMPLETE, values)
        if not is_best:
            return
        now = front(self.study) if several else [told]
        if is_kept:
            stays = {each.number for each in now}
            self.kept.forget(each for each in (*before, told) if each.number not in stays)
        if now[0].number == trial.number:
            self.best = (trial.number, result)

    def _end(self, trial: Trial, state: State, values: list[float] | None = None) -> FrozenTrial:
        from optuna.exceptions import UpdateFinishedTrialError

        try:
            told = self.study.tell(trial, values, state=state)
        except RuntimeError as error:  # samplers that have tried everything stop Study.optimize, which this is not
            if "Study.stop" not in str(error):
                raise
            self.exhausted = True
            told = self.study.get_trials(deepcopy=False)[trial.number]
        except ValueError as error:
            if not self.study.get_trials(deepcopy=False)[trial.number].state.is_finished():
                raise
            raise UpdateFinishedTrialError from error
        self.told[trial.number] = told
        return told


def front(study: Study) -> list[FrozenTrial]:
    """The best trials that keep the constraints: one, or the Pareto front, its lowest first objective first."""
    if len(study.directions) > 1:
        return sorted(study.best_trials, key=lambda each: each.values)
    try:
        return [study.best_trial]
    except ValueError:  # none is complete, or none keeps the constraints
        return []


def objective_names(study: Study) -> list[str]:
    """What a study calls its values; numbers where it was made elsewhere and has no names for several."""
    count = len(study.directions)
    return study.metric_names or (["value"] if count == 1 else [f"value_{i}" for i in range(count)])


def reason_of(error: BaseException) -> str:
    """What a trial's ``failure`` says of an error."""
    return str(error) if isinstance(error, LossError | HypergradientError) else f"{type(error).__name__}: {error}"


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise SearchError(f"{name!r} must give one number for a trial's Result; it gave {shown(value)}.") from error


def _values(functions: Mapping[str, Objective], result: Result) -> dict[str, float]:
    """The values of a result.

    Raises:
        LossError: one is not finite, or training came to nothing.
    """
    if result.stop_reason == "too many failed steps":
        full = result.history[-1].status is Status.OUT_OF_MEMORY
        raise LossError(
            f"training ended at outer step {len(result.history) - 1}: "
            f"{'memory ran out' if full else 'a loss or a gradient was not finite'}, too many times in a row"
        )
    values = {name: _number(name, function(result)) for name, function in functions.items()}
    for name, value in values.items():
        if not math.isfinite(value):
            raise LossError(
                "no outer step had a finite validation loss"
                if name == "validation_loss"
                else f"{name!r} of its result is {value}"
            )
    return values
