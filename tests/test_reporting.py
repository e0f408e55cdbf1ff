"""What a trial reports, and what ends it: the pruner, a signal, and nothing else."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from hyperopt_implicit.reporting import Pace, Reporter


class Trial:
    """Takes note of reports; prunes from a step on."""

    def __init__(self, prunes_at: float = math.inf) -> None:
        self.reports: dict[int, float] = {}
        self._prunes_at = prunes_at

    def report(self, value: float, step: int) -> None:
        self.reports[step] = value

    def should_prune(self) -> bool:
        return max(self.reports) >= self._prunes_at


def reporter(trial: Trial, every: int | None = 1, outer_steps: int = 6, **options: Any) -> Reporter:
    study: Any = SimpleNamespace(user_attrs={}, set_user_attr=lambda name, value: None)
    settings = {"prunes": True, **options}
    return Reporter(trial, Pace(study, outer_steps, every), **settings)  # type: ignore[arg-type]


def run(made: Reporter, losses: list[float]) -> int:
    """How many steps are made until it says stop."""
    for i, loss in enumerate(losses):
        step: Any = SimpleNamespace(step=i, validation_loss_sweep=loss)
        problem: Any = None
        if made(step, problem):
            return i + 1
    return len(losses)


@pytest.mark.parametrize(("every", "steps"), [(1, [0, 1, 2, 3, 4, 5]), (2, [1, 3, 5]), (4, [3]), (7, [])])
def test_reports_are_made_at_the_pace(every: int, steps: list[int]) -> None:
    trial = Trial()
    losses = [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    assert run(reporter(trial, every), losses) == 6
    assert trial.reports == {step: losses[step] for step in steps}


def test_losses_that_are_not_finite_are_not_reported() -> None:
    trial = Trial()
    run(reporter(trial), [1.0, math.nan, math.inf, 0.5])
    assert trial.reports == {0: 1.0, 3: 0.5}


def test_pruner_ends_a_trial() -> None:
    made = reporter(Trial(prunes_at=2))
    assert run(made, [1.0] * 6) == 3
    assert made.pruned


def test_several_objectives_are_neither_reported_nor_pruned() -> None:
    trial = Trial(prunes_at=0)
    made = reporter(trial, prunes=False)
    assert run(made, [1.0] * 6) == 6
    assert trial.reports == {}
    assert not made.pruned


def test_what_was_reported_is_reported_by_the_trial_that_goes_on() -> None:
    first, second = Trial(prunes_at=9), Trial(prunes_at=9)
    before = reporter(first, every=2)
    run(before, [6.0, 5.0, 4.0, 3.0])
    after = reporter(second, every=2)
    after.load_state_dict(before.state_dict())
    assert second.reports == first.reports == {1: 5.0, 3: 3.0}
    again = reporter(Trial(prunes_at=9))
    again.load_state_dict(after.state_dict())
    assert again.state_dict() == before.state_dict()


def test_trial_that_somebody_has_ended_meanwhile_ends_at_its_next_report() -> None:
    from optuna.exceptions import UpdateFinishedTrialError

    class Ended(Trial):
        def report(self, value: float, step: int) -> None:
            raise UpdateFinishedTrialError

    before, after = reporter(Trial()), reporter(Ended())
    run(before, [2.0, 1.0])
    after.load_state_dict(before.state_dict())
    assert (run(after, [0.5] * 6), after.taken) == (1, True)
