"""What a trial tells Optuna while it runs, how often, and whether the pruner ends it."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hyperopt_implicit.history import OuterStep

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import Trial

    from hyperopt_implicit.problem import BilevelProblem

_EVERY = "report_every"  # the study's attribute
_SHARE = 0.01  # of a trial's time
_LEAST_SECONDS = 0.01  # for reports, in trials that are short
_MEASURED_STEPS = 3


class Pace:
    """At which outer steps trials report, the same ones for all trials of a study: pruners compare equal steps.

    A report and the question whether to prune take milliseconds on a database. Unless the pace is given, it is taken
    from the first steps of the first trial such that reports take about a hundredth of a trial, or 10 ms; it is a power
    of two, so that the steps of two workers which measure at the same time have most in common. A trial reports twice
    at least, however short it is.

    Args:
        study: which remembers the pace.
        outer_steps: of a trial.
        every: report after so many outer steps; None measures.

    Attributes:
        every: after how many outer steps, once that is known.
        members: how many trials run side by side and report at the same steps.
    """

    def __init__(self, study: Study, outer_steps: int, every: int | None) -> None:
        self._study, self.outer_steps = study, outer_steps
        found = study.user_attrs.get(_EVERY) if every is None else every
        self._most = 2 ** max(int(math.log2(outer_steps)) - 1, 0)
        is_usable = isinstance(found, int) and (every is not None or found <= self._most)
        self.every: int | None = found if is_usable else None
        self.members = 1
        self._seen: list[tuple[float, float]] = []

    def is_due(self, step: int) -> bool:
        return self.every is None or (step + 1) % self.every == 0

    def measure(self, step: int, step_seconds: float, report_seconds: float) -> None:
        """Take note of what an outer step and a report took, and decide after some of them."""
        if self.every is not None:
            return
        self._seen.append((step_seconds - (self.members - 1) * report_seconds, self.members * report_seconds))
        if step + 1 < min(_MEASURED_STEPS, self.outer_steps):
            return
        steps, reports = (statistics.median(each) for each in zip(*self._seen, strict=True))
        allowed = max(_SHARE * self.outer_steps * steps, _LEAST_SECONDS) / max(reports, 1e-9)
        self.every = min(2 ** max(math.ceil(math.log2(self.outer_steps / max(allowed, 1.0))), 0), self._most)
        self._study.set_user_attr(_EVERY, self.every)


@dataclass
class Reporter:
    """The callback of one trial: reports its validation loss, and ends it where the pruner says so.

    What it has reported is saved with the trial, and reported anew by the one that goes on with it.

    Attributes:
        trial: Optuna's.
        pace: when to report.
        prunes: whether there is one value that a pruner can judge by.
        pruned: whether the pruner has ended the trial.
        taken: whether somebody else has ended the trial in the study.
    """

    trial: Trial
    pace: Pace
    prunes: bool
    pruned: bool = False
    taken: bool = False
    _last: float | None = None
    _reported: dict[int, float] = field(default_factory=dict)

    def __call__(self, step: OuterStep, problem: BilevelProblem) -> bool:
        began = time.perf_counter()
        if self.prunes and self.pace.is_due(step.step) and math.isfinite(step.validation_loss_sweep):
            self._report(step)
        ended = time.perf_counter()
        if self.prunes and self._last is not None:
            self.pace.measure(step.step, began - self._last, ended - began)
        self._last = ended
        return self.pruned or self.taken

    def state_dict(self) -> dict[str, Any]:
        """What was reported so far."""
        return {"reported": dict(self._reported)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Report to the present trial what one before it had reported."""
        from optuna.exceptions import UpdateFinishedTrialError

        self._reported = dict(state["reported"])
        with suppress(UpdateFinishedTrialError):  # which the next report finds as well
            for step, value in self._reported.items():
                self.trial.report(value, step)

    def _report(self, step: OuterStep) -> None:
        from optuna.exceptions import UpdateFinishedTrialError

        try:
            self.trial.report(step.validation_loss_sweep, step.step)
            self._reported[step.step] = step.validation_loss_sweep
            self.pruned = self.trial.should_prune()
        except UpdateFinishedTrialError:  # a worker that stood still for too long is taken for dead
            self.taken = True
