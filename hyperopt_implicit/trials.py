"""One trial, or several at once: from its knobs to what the study is told of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from hyperopt_implicit.backend import Spec
from hyperopt_implicit.errors import DeclarationError, HypergradientError, LossError
from hyperopt_implicit.history import Result
from hyperopt_implicit.interrupts import Interrupt
from hyperopt_implicit.kept_trials import KeptTrials, TrialState
from hyperopt_implicit.knob_space import KnobSpace
from hyperopt_implicit.messages import warn
from hyperopt_implicit.optimize import optimize
from hyperopt_implicit.optuna_warnings import accepting_experimental
from hyperopt_implicit.places import place_of
from hyperopt_implicit.population import optimize_population
from hyperopt_implicit.problem import BilevelProblem
from hyperopt_implicit.reporting import Pace, Reporter
from hyperopt_implicit.tracking import Tracking
from hyperopt_implicit.workers import Heartbeat, give_back

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

FAILURES: tuple[type[Exception], ...] = (LossError, HypergradientError, torch.OutOfMemoryError)
"""What fails a trial and no other: a loss or a gradient that is not finite, and memory that runs out."""

Objective = Callable[[Result], float]

OBJECTIVES: dict[str, Objective] = {
    "validation_loss": lambda result: result.best_validation_loss,
    "seconds": lambda result: result.seconds,
}
"""What can be minimised by name."""


@dataclass(frozen=True)
class TrialPlan:
    """What all trials of a search have in common.

    Attributes:
        space: where knobs and problems come from.
        seed: plus the place of a trial in the study, its seed.
        options: of :func:`hyperopt_implicit.optimize`.
        objectives: what is minimised, by name.
        constraints: what must be at most zero, by name.
        catch: what fails a trial and lets the search go on.
        nested: the tracking of a trial.
        warm_start: whether hyperparameters begin at those of the best trial.
        vectorise: how several trials are run at once: ``"always"`` or ``"auto"``.
        compile: whether their computation is compiled.
    """

    space: KnobSpace
    seed: int | None
    options: Mapping[str, Any]
    objectives: Mapping[str, Objective]
    constraints: Mapping[str, Objective]
    catch: tuple[type[Exception], ...]
    nested: Callable[[Trial], Tracking | bool]
    warm_start: bool = False
    vectorise: Any = "always"
    compile: bool = False


@dataclass
class _Running:
    """A trial while it runs."""

    trial: Trial
    problem: BilevelProblem
    backend: Spec
    seed: int | None
    reporter: Reporter
    outcome: Result | Exception | None = None


@dataclass
class TrialRunner:
    """Runs trials and tells the study.

    Attributes:
        best: the number and the result of the best trial that was run here.
        failures: what went wrong, a line a trial.
        gains: whether the last trials that were run at once have gained by it; None where nothing was measured.
    """

    study: Study
    plan: TrialPlan
    pace: Pace
    kept: KeptTrials
    interrupt: Interrupt
    best: tuple[int, Result] | None = None
    failures: list[str] = field(default_factory=list)
    gains: bool | None = None
    _said: set[str] = field(default_factory=set)
    _told: dict[int, FrozenTrial] = field(default_factory=dict)

    def run(self, trials: Sequence[Trial]) -> list[FrozenTrial]:
        """Run trials, at once where there are several, and tell the study; gives them as they have ended.

        An error that is none of ``catch`` ends the search; the trials are not counted then.
        """
        with ExitStack() as beating:
            for each in trials:
                beating.enter_context(Heartbeat(self.study, each))
            try:
                running = [found for found in map(self._built, trials) if found is not None]
                for same in _by_backend(running):
                    self._train(same)
                for found in running:
                    self._tell(found)
            except BaseException as error:
                for each in trials:
                    if each.number not in self._told:
                        give_back(self.study, each, reason=_reason(error), again=isinstance(error, KeyboardInterrupt))
                raise
        return [self._told[each.number] for each in trials if each.number in self._told]

    def _built(self, trial: Trial) -> _Running | None:
        plan = self.plan
        seed = None if plan.seed is None else plan.seed + place_of(self.study, trial)
        try:
            problem = plan.space.build(trial.params, seed)
        except plan.catch as error:
            self._fail(trial, error)
            return None
        if plan.warm_start:
            self._start_from_best(problem)
        reporter = Reporter(trial, self.pace, self.interrupt, prunes=len(plan.objectives) == 1)
        return _Running(trial, problem, plan.space.backend(trial.params), seed, reporter)

    def _start_from_best(self, problem: BilevelProblem) -> None:
        """Give the hyperparameters the values of the best finished trial, where they have the same shapes."""
        best = front(self.study)
        state = self.kept.load(best[0]) if best else None
        if state is None:
            return
        try:
            problem.hyperparameters.load_values(state.hyperparameters)
        except DeclarationError as error:
            self._say(f"a trial could not start from the hyperparameters of trial {best[0].number}: {error}")
            return
        problem.sync_optimizer()

    def _train(self, running: list[_Running]) -> None:
        """Train problems that have a backend in common, and note what came of each."""
        plan, first = self.plan, running[0]
        options = {"progress": False, **plan.options}
        theirs = options.pop("callbacks", ())
        if len(running) == 1:
            try:
                first.outcome = optimize(
                    first.problem,
                    first.backend,
                    seed=first.seed,
                    callbacks=[*theirs, first.reporter],
                    tracking=plan.nested(first.trial),
                    **options,
                )
            except plan.catch as error:
                first.outcome = error
            return
        options.pop("progress")
        found = optimize_population(
            [each.problem for each in running],
            first.backend,
            seeds=[each.seed for each in running],
            callbacks=[[*theirs, each.reporter] for each in running],
            tracking=[plan.nested(each.trial) for each in running],
            knobs=[each.trial.params for each in running],
            vectorise=plan.vectorise,
            compile=plan.compile,
            **options,
        )
        for note in found.notes:
            self._say(note)
        self.gains = any(len(group) > 1 for group in found.groups)
        for each, outcome in zip(running, found.outcomes, strict=True):
            if isinstance(outcome, Exception) and not isinstance(outcome, plan.catch):
                raise outcome
            each.outcome = outcome

    def _tell(self, running: _Running) -> None:
        """Tell the study what came of a trial; one that a signal has ended is put back."""
        from optuna.trial import TrialState as State

        trial, outcome, reporter = running.trial, running.outcome, running.reporter
        if reporter.interrupted:
            give_back(self.study, trial, reason="interrupted", again=True)
            return
        if not isinstance(outcome, Result):
            self._fail(trial, outcome)
            return
        if outcome.run_id is not None:
            trial.set_user_attr("run_id", outcome.run_id)
        if reporter.pruned:
            self._told[trial.number] = self.study.tell(trial, state=State.PRUNED)
            return
        try:
            values = _values(self.plan.objectives, outcome)
            bounds = _values(self.plan.constraints, outcome)
        except LossError as error:
            self._fail(trial, error)
            return
        with accepting_experimental():
            for name, value in bounds.items():
                trial.set_constraint(name, value)
        self._complete(trial, list(values.values()), all(each <= 0.0 for each in bounds.values()), outcome)

    def _complete(self, trial: Trial, values: list[float], is_allowed: bool, result: Result) -> None:
        """Tell the values of a trial, and keep its state if it is among the best."""
        from optuna.trial import TrialState as State

        before = front(self.study)
        several = len(values) > 1
        is_best = is_allowed and (several or not before or values[0] < before[0].values[0])
        if is_best:
            self.kept.keep(trial, TrialState.of(result))
        told = self._told[trial.number] = self.study.tell(trial, values, state=State.COMPLETE)
        if not is_best:
            return
        now = front(self.study) if several else [told]
        stays = {each.number for each in now}
        self.kept.forget(each for each in (*before, told) if each.number not in stays)
        if now[0].number == trial.number:
            self.best = (trial.number, result)

    def _fail(self, trial: Trial, error: Exception | None) -> None:
        from optuna.trial import TrialState as State

        trial.set_user_attr("failure", _reason(error))
        self._told[trial.number] = self.study.tell(trial, state=State.FAIL)
        self.failures.append(f"trial {trial.number}: {error}")

    def _say(self, note: str) -> None:
        if note not in self._said:
            self._said.add(note)
            warn(note)


def front(study: Study) -> list[FrozenTrial]:
    """The best trials that keep the constraints: one, or the Pareto front, its lowest first objective first."""
    if len(study.directions) > 1:
        return sorted(study.best_trials, key=lambda each: each.values)
    try:
        return [study.best_trial]
    except ValueError:  # none is complete, or none keeps the constraints
        return []


def _values(functions: Mapping[str, Objective], result: Result) -> dict[str, float]:
    values = {name: float(function(result)) for name, function in functions.items()}
    for name, value in values.items():
        if not math.isfinite(value):
            reason = (
                "no outer step had a finite validation loss"
                if name == "validation_loss"
                else f"{name!r} of its result is {value}"
            )
            raise LossError(reason)
    return values


def _by_backend(running: Sequence[_Running]) -> list[list[_Running]]:
    """Trials with the same backend and options together, in order."""
    groups: dict[str, list[_Running]] = {}
    for each in running:
        groups.setdefault(repr(each.backend), []).append(each)
    return list(groups.values())


def _reason(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}" if not isinstance(error, LossError | HypergradientError) else str(error)
