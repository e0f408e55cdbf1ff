"""Trials that are given up, and put in the queue once more with the same knobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from hyperopt_implicit.places import (
    ABANDONED,
    FAILURE,
    FIRST,
    FIXED,
    GONE_ON_FROM,
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
"""How often a trial is run again that gets no further before its worker is killed: it may be what kills it."""

_UNREPEATED = timedelta(seconds=10)  # between the end of a lost trial and the one that repeats it


def give_up(study: Study, trial: FrozenTrial, failure: str, *, again: bool) -> bool:
    """End a trial without counting it, and put it in the queue once more or leave its place to another.

    Args:
        study: the study.
        trial: the trial.
        failure: why.
        again: whether it is to be repeated.

    Returns:
        Whether it was this call that has ended it.
    """
    marks: dict[str, Any] = {FAILURE: failure, LOST: True}
    if not again:
        marks[ABANDONED] = True
    ended = _end_with(study, trial, marks)
    if ended and again:
        repeat(study, trial)
    return ended


def give_up_killed(study: Study, trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> bool:
    """The same for one whose worker is gone; if that was so several times, it counts as failed and is not repeated.

    Those times do not count after which a trial went on from a later outer step than ever before.
    """
    lives = [trials[number] for number in history(trial) if trials[number].user_attrs.get(FAILURE) == KILLED]
    killed, furthest = 0, -1
    for each in (*lives, trial):
        begun = each.user_attrs.get(GONE_ON_FROM, 0)
        killed = 1 if begun > furthest else killed + 1
        furthest = max(begun, furthest)
    if killed > MAX_RETRIES:
        return _end_with(study, trial, {FAILURE: f"{KILLED}, {killed} times"})
    return give_up(study, trial, KILLED, again=True)


def _end_with(study: Study, trial: FrozenTrial, marks: Mapping[str, Any]) -> bool:
    from optuna.exceptions import UpdateFinishedTrialError

    try:
        for name, value in marks.items():
            study._storage.set_trial_user_attr(trial._trial_id, name, value)
    except UpdateFinishedTrialError:
        return False
    return end(study, trial._trial_id)


def end(study: Study, trial_id: int) -> bool:
    """Set a trial to failed; False where someone else has ended it before."""
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    try:
        return study._storage.set_trial_state_values(trial_id, TrialState.FAIL)
    except UpdateFinishedTrialError:
        return False


def repeat(study: Study, trial: FrozenTrial) -> None:
    """Put a trial in the queue once more, in the form that Optuna's own retries have."""
    from optuna.trial import TrialState, create_trial

    attributes: dict[str, Any] = {FIRST: origin(trial), HISTORY: [*history(trial), trial.number]}
    if FIXED in trial.system_attrs:  # knobs that somebody has chosen
        attributes[FIXED] = trial.system_attrs[FIXED]
    study.add_trial(
        create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={RETRY_OF: origin(trial)},
            system_attrs=attributes,
        )
    )


def repeat_forgotten(study: Study, trials: Sequence[FrozenTrial]) -> bool:
    """Repeat what a worker has given up, and was killed before it could put it in the queue; whether there was any."""
    done = {repeated(each) for each in trials}
    forgotten = [
        each
        for each in trials
        if is_lost(each)
        and not each.user_attrs.get(ABANDONED)
        and each.number not in done
        and each.datetime_complete is not None
        and datetime.now() - each.datetime_complete > _UNREPEATED
    ]
    for each in forgotten:
        repeat(study, each)
    return bool(forgotten)
