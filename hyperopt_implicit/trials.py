"""One trial, or several at once: from its knobs to its result. What the study is told of it is in ``telling.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hyperopt_implicit.backend import Spec
from hyperopt_implicit.errors import DeclarationError, SearchError
from hyperopt_implicit.heartbeats import Heartbeat
from hyperopt_implicit.history import Result
from hyperopt_implicit.interrupts import Interrupt
from hyperopt_implicit.knob_space import KnobSpace
from hyperopt_implicit.messages import warn
from hyperopt_implicit.optimize import run_alone
from hyperopt_implicit.places import place_of
from hyperopt_implicit.population import run_together
from hyperopt_implicit.prepared_run import RunOptions
from hyperopt_implicit.problem import BilevelProblem
from hyperopt_implicit.reporting import Pace, Reporter
from hyperopt_implicit.storages import without_secrets_of
from hyperopt_implicit.telling import Teller, front, reason_of
from hyperopt_implicit.tracking import Tracking
from hyperopt_implicit.trial_checkpoints import TrialCheckpoints
from hyperopt_implicit.workers import give_back

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial


@dataclass(frozen=True)
class TrialPlan:
    """What all trials of a search have in common.

    Attributes:
        space: where knobs and problems come from.
        seed: plus the place of a trial in the study, its seed.
        options: of :func:`hyperopt_implicit.optimize`.
        catch: what fails a trial and lets the search go on.
        nested: the tracking of a trial.
        warm_start: whether hyperparameters begin at those of the best trial.
        vectorise: how several trials are run at once: ``"always"`` or ``"auto"``.
        compile: whether their computation is compiled.
        checkpoints: where trials are saved while they run.
    """

    space: KnobSpace
    seed: int | None
    options: Mapping[str, Any]
    catch: tuple[type[Exception], ...]
    nested: Callable[[Trial], Tracking | bool]
    checkpoints: TrialCheckpoints
    warm_start: bool = False
    vectorise: Any = "always"
    compile: bool = False


@dataclass
class _Running:
    """A trial while it runs."""

    trial: Trial
    knobs: Mapping[str, Any]
    problem: BilevelProblem
    backend: Spec
    seed: int | None
    reporter: Reporter
    outcome: Result | Exception | None = None


@dataclass
class TrialRunner:
    """Runs trials and has the study told of them.

    Attributes:
        teller: who tells it.
        gains: whether the last trials that were run at once have gained by it; None where there were none.
    """

    study: Study
    plan: TrialPlan
    pace: Pace
    teller: Teller
    interrupt: Interrupt
    gains: bool | None = None
    _said: set[str] = field(default_factory=set)

    def run(self, trials: Sequence[Trial]) -> list[FrozenTrial]:
        """Run trials, at once where there are several, and tell the study; gives them as they have ended.

        An error that is none of ``catch`` ends the search, once the trials that it did not concern are told; those it
        did are not counted.
        """
        failure: BaseException | None = None
        with ExitStack() as beating:
            for each in trials:
                beating.enter_context(Heartbeat(self.study, each))
            running: list[_Running] = []
            try:
                running += filter(None, map(self._built, trials))
                self.pace.members = len(running)
                for same in _by_backend(running):
                    self._train(same)
            except BaseException as error:
                failure = error
            for found in running:
                if found.outcome is not None:
                    try:
                        self._conclude(found)
                    except BaseException as error:
                        failure = failure or error
            if failure is not None:
                again = isinstance(failure, KeyboardInterrupt)
                reason = without_secrets_of(self.study._storage, reason_of(failure))
                for each in trials:
                    if each.number not in self.teller.told:
                        give_back(self.study, each, reason=reason, again=again)
                raise failure
        return [self.teller.told[each.number] for each in trials if each.number in self.teller.told]

    def _built(self, trial: Trial) -> _Running | None:
        plan, knobs = self.plan, trial.params
        seed = None if plan.seed is None else plan.seed + place_of(self.study, trial)
        try:
            problem = plan.space.build(knobs, seed)
        except plan.catch as error:
            self.teller.fail(trial, error)
            return None
        if plan.warm_start:
            self._start_from_best(problem)
        reporter = Reporter(trial, self.pace, prunes=len(self.study.directions) == 1)
        return _Running(trial, knobs, problem, plan.space.backend(knobs), seed, reporter)

    def _start_from_best(self, problem: BilevelProblem) -> None:
        """Give the hyperparameters the values of the best finished trial, where they have the same shapes."""
        best = front(self.study)
        if not best:
            return
        try:
            state = self.teller.kept.load(best[0])
            if state is not None:
                problem.hyperparameters.load_values(state.hyperparameters)
                problem.sync_optimizer()
        except (DeclarationError, SearchError) as error:
            self._say(f"a trial could not start from the hyperparameters of trial {best[0].number}: {error}")

    def _train(self, running: list[_Running]) -> None:
        """Train problems that have a backend in common, and note what came of each."""
        plan, first = self.plan, running[0]
        given = dict(plan.options)
        theirs, progress = given.pop("callbacks", ()), given.pop("progress", False)
        options = RunOptions(**given)
        if len(running) == 1:
            try:
                first.outcome = run_alone(
                    first.problem,
                    first.backend,
                    options,
                    seed=first.seed,
                    callbacks=[*theirs, first.reporter],
                    progress=progress,
                    tracking=plan.nested(first.trial),
                    keeper=plan.checkpoints.keeper(first.trial, first.knobs),
                    interrupt=self.interrupt,
                )
            except plan.catch as error:
                first.outcome = error
            return
        found = run_together(
            [each.problem for each in running],
            first.backend,
            options,
            seeds=[each.seed for each in running],
            callbacks=[[*theirs, each.reporter] for each in running],
            tracking=[plan.nested(each.trial) for each in running],
            knobs=[each.knobs for each in running],
            vectorise=plan.vectorise,
            compile=plan.compile,
            keepers=[plan.checkpoints.keeper(each.trial, each.knobs) for each in running],
            interrupt=self.interrupt,
        )
        for note in found.notes:
            self._say(note)
        self.gains = any(len(group) > 1 for group in found.groups)
        for each, outcome in zip(running, found.outcomes, strict=True):
            each.outcome = outcome

    def _conclude(self, running: _Running) -> None:
        """Have the study told; a trial that a signal has ended is put back."""
        trial, outcome, reporter = running.trial, running.outcome, running.reporter
        assert outcome is not None
        if isinstance(outcome, Exception) and not isinstance(outcome, self.plan.catch):
            raise outcome
        if isinstance(outcome, Result) and outcome.stop_reason == "interrupted":
            give_back(self.study, trial)
            return
        self.teller.tell(trial, outcome, running.seed, pruned=reporter.pruned)
        self.plan.checkpoints.forget(trial)

    def _say(self, note: str) -> None:
        if note not in self._said:
            self._said.add(note)
            warn(note)


def _by_backend(running: Sequence[_Running]) -> list[list[_Running]]:
    """Trials with the same backend and options together, in order."""
    groups: dict[str, list[_Running]] = {}
    for each in running:
        groups.setdefault(repr(each.backend), []).append(each)
    return list(groups.values())
