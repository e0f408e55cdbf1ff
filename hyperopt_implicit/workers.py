"""Several processes at one study: who runs which trial, whose worker is gone, and how many trials are left.

There is no coordinator. What a worker has to know is in the study: a trial is handed out once by the storage, carries
the process that runs it, and is run again under a new number where that process is gone. A trial and those that repeat
it take one place together, so that a study gets as many as were asked for however often workers are killed.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from hyperopt_implicit.places import (
    FIXED,
    RETRY_OF,
    SURPLUS,
    WORKER,
    counted,
    is_lost,
    origin,
    places,
    repeated,
    visible_trials,
)
from hyperopt_implicit.processes import identity, is_gone
from hyperopt_implicit.retries import end, give_up, give_up_killed, repeat_forgotten

if TYPE_CHECKING:
    from types import TracebackType

    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

__all__ = [
    "Heartbeat",
    "claim",
    "counted",
    "give_back",
    "identity",
    "is_lost",
    "origin",
    "reclaim",
    "visible_trials",
]

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
        _mark(study, trial)
        return trial
    mine = create_trial(state=TrialState.RUNNING, user_attrs={WORKER: identity()})
    number = study._storage.create_new_trial(study._study_id, template_trial=mine)
    study._thread_local.cached_all_trials = None  # as ``ask`` does: samplers look at the trials that run
    trial = Trial(study, number)
    _beat(study, trial)
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
    if not _has_heartbeats(study):
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


# ---------------------------------------------------------------------------------------------------- being alive


class Heartbeat:
    """Says that the worker of a trial is alive, as long as the block lasts.

    The trial bears the mark of this process, by which workers on the same host see whether it is gone. Where the
    storage has heartbeats, a thread records one now and then for those on other hosts.

    Args:
        study: the study.
        trial: a running trial; several at once have a heartbeat each.

    Example:
        >>> import optuna
        >>> from hyperopt_implicit.workers import Heartbeat, claim
        >>> study = optuna.create_study()
        >>> trial = claim(study, {}, n_trials=1)
        >>> with Heartbeat(study, trial):
        ...     _ = study.tell(trial, 1.0)
    """

    def __init__(self, study: Study, trial: Trial) -> None:
        self._study, self._trial = study, trial
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Heartbeat:
        if self._trial.user_attrs.get(WORKER) != identity():
            _mark(self._study, self._trial)
        interval = _interval(self._study)
        if interval is not None:
            self._thread = threading.Thread(
                target=self._go_on, args=(interval,), name="hyperopt-implicit-heartbeat", daemon=True
            )
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _go_on(self, interval: float) -> None:
        while not self._over.wait(interval):
            try:
                _beat(self._study, self._trial)
            except Exception:  # a server that is away for a while; the next one may get through
                continue


def _mark(study: Study, trial: Trial) -> None:
    """Note whose trial it is."""
    _beat(study, trial)
    trial.set_user_attr(WORKER, identity())


def _beat(study: Study, trial: Trial) -> None:
    storage: Any = study._storage
    if _has_heartbeats(study):
        storage.record_heartbeat(trial._trial_id)


def _interval(study: Study) -> float | None:
    storage: Any = study._storage
    return storage.get_heartbeat_interval() if hasattr(storage, "get_heartbeat_interval") else None


def _has_heartbeats(study: Study) -> bool:
    return _interval(study) is not None


# --------------------------------------------------------------------------------------------------- trials given up


def give_back(study: Study, trial: Trial, *, reason: str = "interrupted", again: bool = True) -> None:
    """End a running trial without counting it.

    Args:
        study: the study.
        trial: the trial; nothing happens where it has ended.
        reason: what its ``failure`` is to say.
        again: put it in the queue once more, with the same knobs.

    Example:
        >>> import optuna
        >>> from hyperopt_implicit.workers import claim, give_back, origin
        >>> study = optuna.create_study()
        >>> give_back(study, claim(study, {}, n_trials=1))
        >>> trial = claim(study, {}, n_trials=1)
        >>> trial.number, origin(trial)
        (1, 0)
    """
    give_up(study, study._storage.get_trial(trial._trial_id), reason, again=again)


def reclaim(study: Study) -> list[int]:
    """Give up the trials whose worker is gone, and put them in the queue once more, with the same knobs.

    A worker on this host is gone when its process is, on every storage. One on another host, or in another container,
    is when its heartbeat has stopped for the grace period of the storage; without heartbeats nobody else can tell, and
    its trials are left for a worker on that host. Of several workers that find the same trial, one puts it in the
    queue.

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

    running = [each for each in trials if each.state is TrialState.RUNNING]
    stale = _stale(study) if running else set()
    return [
        each.number
        for each in running
        if (each._trial_id in stale or _is_orphan(each)) and give_up_killed(study, each, trials)
    ]


def _stale(study: Study) -> set[int]:
    storage: Any = study._storage
    return set(storage._get_stale_trial_ids(study._study_id)) if _has_heartbeats(study) else set()


def _is_orphan(trial: FrozenTrial) -> bool:
    worker = trial.user_attrs.get(WORKER)
    if worker is not None:
        return is_gone(worker)
    return trial.datetime_start is not None and datetime.now() - trial.datetime_start > _UNMARKED
