"""Several processes at one study: who runs which trial, whose worker is gone, and how many trials are left.

There is no coordinator. What a worker has to know is in the study: a trial is handed out once by the storage, carries
the process that runs it, and is run again under a new number where that process is gone. A trial and those that repeat
it take one place together, so that a study gets as many as were asked for however often workers are killed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from hyperopt_implicit.heartbeats import beat, has_heartbeats, mark, silent
from hyperopt_implicit.places import (
    FIXED,
    RETRY_OF,
    SURPLUS,
    WORKER,
    places,
    repeated,
)
from hyperopt_implicit.processes import identity, lives
from hyperopt_implicit.retries import end, give_up, give_up_killed, repeat_forgotten

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

_UNMARKED = timedelta(minutes=10)  # a trial from the queue has no mark for a moment, nor have those of other programs


def claim(study: Study, distributions: Mapping[str, BaseDistribution], n_trials: int) -> Trial | None:
    """The next trial of a study, marked with this process; None where the study has all of its trials.

    Whatever the number of workers that claim at once, ``n_trials`` places are given out and no more. A trial's place
    follows from its number, which the storage gives out once: it is there for the first ``n_trials`` numbers that are
    neither surplus nor repeat another. A worker looks before it asks, so that a surplus trial is rare.

    Args:
        study: the study.
        distributions: of the knobs.
        n_trials: how many trials the study is to have, those of all workers together.

    Returns:
        A running trial, with its knobs.

    Example:
        >>> import optuna
        >>> from hyperopt_implicit.workers import claim
        >>> study = optuna.create_study()
        >>> claim(study, {"lr": optuna.distributions.FloatDistribution(0.1, 1.0)}, n_trials=1).number
        0
        >>> claim(study, {}, n_trials=1) is None
        True
    """
    while True:
        trials = study.get_trials(deepcopy=False)
        if _give_up_dead(study, trials) or repeat_forgotten(study, trials):
            continue
        if not _has_place(trials, n_trials):
            return None
        trial = _begin(study, trials)
        try:
            if trial.number > len(trials):  # others have begun trials in between
                trials = study.get_trials(deepcopy=False)
            if _is_admitted(trials, trial, n_trials):
                for name, distribution in distributions.items():
                    _suggest(trial, name, distribution)
                return trial
        except BaseException:
            give_back(study, trial)
            raise
        _take_back(study, trial)


def _begin(study: Study, trials: Sequence[FrozenTrial]) -> Trial:
    """The next trial, marked from the moment on at which it is there."""
    from optuna.trial import Trial, TrialState, create_trial

    if any(each.state is TrialState.WAITING for each in trials):
        trial = _ask(study)
        mark(study, trial)
        return trial
    mine = create_trial(state=TrialState.RUNNING, user_attrs={WORKER: identity()})
    number = study._storage.create_new_trial(study._study_id, template_trial=mine)
    study._thread_local.cached_all_trials = None  # as ``ask`` does: samplers look at the trials that run
    trial = Trial(study, number)
    if has_heartbeats(study):
        beat(study, trial)
    return trial


def _has_place(trials: Sequence[FrozenTrial], n_trials: int) -> bool:
    from optuna.trial import TrialState

    taken = sum(each.state is not TrialState.WAITING for each in places(trials))
    repeats = any(each.state is TrialState.WAITING and repeated(each) is not None for each in trials)
    return taken < n_trials or repeats


def _is_admitted(trials: Sequence[FrozenTrial], trial: Trial, n_trials: int) -> bool:
    """Whether a trial has a place: its own, or that of the trial that it is the first to repeat.

    This follows from the trials with lower numbers, and from what never changes in them, but that places become free.
    """
    number = trial.number
    before = repeated(trials[number]) if number < len(trials) else None
    if before is not None:
        return not any(each.number < number and repeated(each) == before for each in trials)
    return sum(each.number < number for each in places(trials)) < n_trials


def _ask(study: Study) -> Trial:
    if not has_heartbeats(study):
        return study.ask()
    with warnings.catch_warnings():  # that heartbeats are for Study.optimize; here they are taken care of
        warnings.filterwarnings("ignore", "Heartbeat of storage is supposed", UserWarning)
        return study.ask()


def _suggest(trial: Trial, name: str, distribution: BaseDistribution) -> None:
    """Have the sampler draw a knob. The trial bears its mark by then, since this may take a while."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    match distribution:
        case FloatDistribution(low=low, high=high, step=step, log=log):
            trial.suggest_float(name, low, high, step=step, log=log)
        case IntDistribution(low=low, high=high, step=step, log=log):
            trial.suggest_int(name, low, high, step=step, log=log)
        case CategoricalDistribution(choices=choices):
            trial.suggest_categorical(name, choices)


def _take_back(study: Study, trial: Trial) -> None:
    """End a trial that has no place. What somebody has put in the queue goes back to its end."""
    trial.set_user_attr(SURPLUS, True)
    if not end(study, trial._trial_id):
        return
    fixed = study._storage.get_trial(trial._trial_id).system_attrs.get(FIXED)
    if fixed is not None and RETRY_OF not in trial.user_attrs:
        study.enqueue_trial(fixed)


def give_back(study: Study, trial: Trial, *, reason: str = "interrupted", again: bool = True) -> None:
    """End a running trial without counting it.

    Args:
        study: the study.
        trial: the trial; nothing happens where it has ended.
        reason: what its ``failure`` is to say.
        again: put it in the queue once more, with the same knobs.

    Example:
        >>> import optuna
        >>> from hyperopt_implicit.places import origin
        >>> from hyperopt_implicit.workers import claim, give_back
        >>> study = optuna.create_study()
        >>> give_back(study, claim(study, {}, n_trials=1))
        >>> trial = claim(study, {}, n_trials=1)
        >>> trial.number, origin(trial)
        (1, 0)
    """
    give_up(study, study._storage.get_trial(trial._trial_id), reason, again=again)


def reclaim(study: Study) -> list[int]:
    """Give up the trials whose worker is gone, and put them in the queue once more, with the same knobs.

    A worker on this host is gone when its process is. One on another host, or in another container, is when it has
    given no sign of life for the grace period; where the storage has no heartbeats, that takes two calls which are that
    far apart. Of several workers that find the same trial, one puts it in the queue.

    Args:
        study: the study.

    Returns:
        The numbers of the trials that this call has given up.

    Example:
        >>> import optuna
        >>> from hyperopt_implicit.workers import claim, reclaim
        >>> study = optuna.create_study()
        >>> _ = claim(study, {}, n_trials=1)
        >>> reclaim(study)  # its worker is this process
        []
    """
    trials = study.get_trials(deepcopy=False)
    repeat_forgotten(study, trials)
    return _give_up_dead(study, trials)


def _give_up_dead(study: Study, trials: Sequence[FrozenTrial]) -> list[int]:
    from optuna.trial import TrialState

    gone, unknown = [], []
    for each in trials:
        if each.state is TrialState.RUNNING:
            worker = each.user_attrs.get(WORKER)
            alive = lives(worker) if worker is not None else False if _is_old(each) else None
            if alive is False:
                gone.append(each)
            elif alive is None:
                unknown.append(each)
    return [each.number for each in [*gone, *silent(study, unknown)] if give_up_killed(study, each, trials)]


def _is_old(trial: FrozenTrial) -> bool:
    return trial.datetime_start is not None and datetime.now() - trial.datetime_start > _UNMARKED
