"""Trials that are given up, and put in the queue once more with the same knobs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from hyperopt_implicit.places import (
    ABANDONED,
    FAILURE,
    FIRST,
    FIXED,
    HISTORY,
    LOST,
    RETRY_OF,
    history,
    is_lost,
    origin,
    repeated,
)

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

KILLED = "its worker was killed"
MAX_RETRIES = 3
"""How often a trial is run again whose worker was killed: it may be the trial that kills it."""

_UNREPEATED = timedelta(seconds=10)  # between the end of a lost trial and the one that repeats it


def _lose(study: Study, trial: FrozenTrial, failure: str, again: bool, counts: bool = False) -> bool:
    """End a trial whose worker is gone, or gives it up; whether it was this call that has ended it.

    Args:
        study: the study.
        trial: the trial.
        failure: why.
        again: whether it is to be repeated.
        counts: whether it counts as failed, and is not repeated.
    """
    from optuna.exceptions import UpdateFinishedTrialError

    marks: dict[str, Any] = {_FAILURE: failure}
    if counts:
        marks[_FAILURE] = f"{failure}, {MAX_RETRIES + 1} times"
    else:
        marks[_LOST] = True
        if not again:
            marks[_ABANDONED] = True
    try:
        for name, value in marks.items():
            study._storage.set_trial_user_attr(trial._trial_id, name, value)
    except UpdateFinishedTrialError:
        return False
    if not _end(study, trial._trial_id):
        return False
    if again and not counts:
        _repeat(study, trial)
    return True


def _repeat(study: Study, trial: FrozenTrial) -> None:
    """Put a trial in the queue once more, in the form that Optuna's own retries have."""
    from optuna.trial import TrialState, create_trial

    attributes = {_FIRST: origin(trial), _HISTORY: [*_history(trial), trial.number]}
    if _FIXED in trial.system_attrs:  # knobs that somebody has chosen
        attributes[_FIXED] = trial.system_attrs[_FIXED]
    study.add_trial(
        create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={_RETRY_OF: origin(trial)},
            system_attrs=attributes,
        )
    )


def _make_up(study: Study, trials: Sequence[FrozenTrial]) -> bool:
    """Repeat what a worker has given up, and was killed before it could put it in the queue; whether there was any."""
    repeated = {_repeated(each) for each in trials}
    forgotten = [
        each
        for each in trials
        if is_lost(each)
        and not each.user_attrs.get(_ABANDONED)
        and each.number not in repeated
        and each.datetime_complete is not None
        and _age(each.datetime_complete) > _UNREPEATED
    ]
    for each in forgotten:
        _repeat(study, each)
    return bool(forgotten)


def _end(study: Study, trial_id: int) -> bool:
    """Set a trial to failed; False where someone else has ended it before."""
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    try:
        return study._storage.set_trial_state_values(trial_id, TrialState.FAIL)
    except UpdateFinishedTrialError:
        return False


