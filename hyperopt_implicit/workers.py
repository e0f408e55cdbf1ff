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

from hyperopt_implicit.processes import identity, is_gone

if TYPE_CHECKING:
    from types import TracebackType

    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

KILLED = "its worker was killed"
INTERRUPTED = "interrupted"
MAX_RETRIES = 3
"""How often a trial is run again whose worker was killed: it may be the trial that kills it."""

_UNMARKED = timedelta(minutes=10)  # a trial bears no mark while its sampler draws
_UNREPEATED = timedelta(seconds=10)  # between the end of a lost trial and the one that repeats it

_WORKER = "worker"  # user attributes
_FAILURE = "failure"
_LOST = "lost"  # ended without having run; another takes its place
_ABANDONED = "abandoned"  # likewise, and none does
_SURPLUS = "surplus"  # never needed
_RETRY_OF = "retry_of"
_FIRST = "failed_trial"  # attributes of Optuna's, as its own retries have them
_HISTORY = "retry_history"
_FIXED = "fixed_params"


# --------------------------------------------------------------------------------------------------------- what counts


def origin(trial: Trial | FrozenTrial) -> int:
    """The number of the trial that this one repeats, or its own where it repeats none.

    Args:
        trial: a trial.

    Returns:
        The number of the first of those that have had these knobs.

    Example:
        >>> import optuna
        >>> from hyperopt_implicit.workers import origin
        >>> origin(optuna.create_study().ask())
        0
    """
    return int(trial.user_attrs.get(_RETRY_OF, trial.number))


def counted(study: Study) -> int:
    """How many finished trials count: failed ones do, lost, interrupted and surplus ones do not.

    Args:
        study: the study.

    Returns:
        Their number.

    Example:
        >>> import optuna
        >>> from hyperopt_implicit.workers import claim, counted, give_back
        >>> study = optuna.create_study()
        >>> _ = study.tell(claim(study, {}, n_trials=2), 1.0)
        >>> give_back(study, claim(study, {}, n_trials=2))
        >>> counted(study)
        1
    """
    return sum(
        each.state.is_finished() and not is_lost(each) and not each.user_attrs.get(_SURPLUS)
        for each in study.get_trials(deepcopy=False)
    )


def visible_trials(study: Study) -> list[FrozenTrial]:
    """The trials of a study without those that were handed out in vain.

    Args:
        study: the study.

    Returns:
        All that are to be shown, by number.

    Example:
        >>> import optuna
        >>> from hyperopt_implicit.workers import visible_trials
        >>> visible_trials(optuna.create_study())
        []
    """
    return [each for each in study.get_trials(deepcopy=False) if not each.user_attrs.get(_SURPLUS)]


def is_lost(trial: FrozenTrial) -> bool:
    """Whether a trial was given up before its end, by a signal or with its worker, and does not count."""
    from optuna.trial import TrialState

    # the mark is set before the state; a worker that was taken for dead may have been faster
    return trial.state is TrialState.FAIL and bool(trial.user_attrs.get(_LOST))


def _places(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The first trial of each place that is taken."""
    abandoned = {origin(each) for each in trials if is_lost(each) and each.user_attrs.get(_ABANDONED)}
    return [
        each
        for each in trials
        if origin(each) == each.number and not each.user_attrs.get(_SURPLUS) and each.number not in abandoned
    ]


def _repeated(trial: FrozenTrial) -> int | None:
    """The number of the trial right before this one."""
    history = trial.system_attrs.get(_HISTORY)
    return int(history[-1]) if history else None


# ------------------------------------------------------------------------------------------------------------- claiming


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
        if _give_up_dead(study, trials) or _make_up(study, trials):
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
    mine = create_trial(state=TrialState.RUNNING, user_attrs={_WORKER: identity()})
    number = study._storage.create_new_trial(study._study_id, template_trial=mine)
    study._thread_local.cached_all_trials = None  # as ``ask`` does: samplers look at the trials that run
    trial = Trial(study, number)
    _beat(study, trial)
    return trial


def _has_place(trials: Sequence[FrozenTrial], n_trials: int) -> bool:
    from optuna.trial import TrialState

    taken = sum(each.state is not TrialState.WAITING for each in _places(trials))
    repeats = any(each.state is TrialState.WAITING and _repeated(each) is not None for each in trials)
    return taken < n_trials or repeats


def _is_admitted(trials: Sequence[FrozenTrial], trial: Trial, n_trials: int) -> bool:
    """Whether a trial has a place: its own, or that of the trial that it is the first to repeat.

    This follows from the trials with lower numbers, and from what never changes in them, but that places become free.
    """
    number = trial.number
    repeated = _repeated(trials[number]) if number < len(trials) else None
    if repeated is not None:
        return not any(each.number < number and _repeated(each) == repeated for each in trials)
    return sum(each.number < number for each in _places(trials)) < n_trials


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
    trial.set_user_attr(_SURPLUS, True)
    if not _end(study, trial._trial_id):
        return
    fixed = study._storage.get_trial(trial._trial_id).system_attrs.get(_FIXED)
    if fixed is not None and _RETRY_OF not in trial.user_attrs:
        study.enqueue_trial(fixed)


def _end(study: Study, trial_id: int) -> bool:
    """Set a trial to failed; False where someone else has ended it before."""
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    try:
        return study._storage.set_trial_state_values(trial_id, TrialState.FAIL)
    except UpdateFinishedTrialError:
        return False


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
        if self._trial.user_attrs.get(_WORKER) != identity():
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
    trial.set_user_attr(_WORKER, identity())


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


def give_back(study: Study, trial: Trial, *, reason: str = INTERRUPTED, again: bool = True) -> None:
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
    _lose(study, study._storage.get_trial(trial._trial_id), reason, again)


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
    _make_up(study, trials)
    return _give_up_dead(study, trials)


def _give_up_dead(study: Study, trials: Sequence[FrozenTrial]) -> list[int]:
    from optuna.trial import TrialState

    running = [each for each in trials if each.state is TrialState.RUNNING]
    stale = _stale(study) if running else set()
    given_up = []
    for each in running:
        worker = each.user_attrs.get(_WORKER)
        unmarked = worker is None and each.datetime_start is not None and _age(each.datetime_start) > _UNMARKED
        if each._trial_id in stale or unmarked or (worker is not None and is_gone(worker)):
            killed = sum(trials[number].user_attrs.get(_FAILURE) == KILLED for number in _history(each))
            if _lose(study, each, KILLED, True, counts=killed >= MAX_RETRIES):
                given_up.append(each.number)
    return given_up


def _stale(study: Study) -> set[int]:
    storage: Any = study._storage
    return set(storage._get_stale_trial_ids(study._study_id)) if _has_heartbeats(study) else set()


def _age(time: datetime) -> timedelta:
    return datetime.now() - time


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


def _history(trial: FrozenTrial) -> list[int]:
    return list(trial.system_attrs.get(_HISTORY, []))


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
