"""Signs of life of those who run a trial: given by themselves, and missed by others.

Databases have heartbeats of Optuna's, by the clock of the server. Elsewhere a trial carries a number that goes up, and
it takes a look, a while, and another look to see that it does not.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from hyperopt_implicit.places import WORKER
from hyperopt_implicit.processes import identity
from hyperopt_implicit.storages import GRACE_SECONDS, HEARTBEAT_SECONDS

if TYPE_CHECKING:
    from types import TracebackType

    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

_BEAT = "beat"  # the user attribute with that number

_seen: WeakKeyDictionary[Study, dict[int, tuple[int, float]]] = WeakKeyDictionary()


class Heartbeat:
    """Says that the worker of a trial is alive, as long as the block lasts.

    The trial bears the mark of this process, by which workers on the same host see whether it is gone. A thread gives
    a sign of life now and then for those on other hosts.

    Args:
        study: the study.
        trial: a running trial; several at once have a heartbeat each.

    Example:
        >>> import optuna
        >>> from hyperopt_implicit.heartbeats import Heartbeat
        >>> from hyperopt_implicit.workers import claim
        >>> study = optuna.create_study()
        >>> trial = claim(study, {}, n_trials=1)
        >>> with Heartbeat(study, trial):
        ...     _ = study.tell(trial, 1.0)
    """

    def __init__(self, study: Study, trial: Trial) -> None:
        self._study, self._trial = study, trial
        self._beats = 0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Heartbeat:
        if self._trial.user_attrs.get(WORKER) != identity():
            mark(self._study, self._trial)
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
            self._beats += 1
            with suppress(Exception):  # a server that is away for a while; the next one may get through
                beat(self._study, self._trial, self._beats)


def mark(study: Study, trial: Trial) -> None:
    """Note whose trial it is. A trial that bears a mark has a heartbeat, where there are any."""
    if has_heartbeats(study):
        beat(study, trial)
    trial.set_user_attr(WORKER, identity())


def beat(study: Study, trial: Trial, number: int = 0) -> None:
    """Give a sign of life, the so-manieth."""
    storage: Any = study._storage
    if has_heartbeats(study):
        storage.record_heartbeat(trial._trial_id)
    else:
        storage.set_trial_user_attr(trial._trial_id, _BEAT, number)


def silent(study: Study, running: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Of trials that run, those that have given no sign of life for the grace period."""
    storage: Any = study._storage
    if not running:
        return []
    if has_heartbeats(study):
        stale = set(storage._get_stale_trial_ids(study._study_id))
        return [each for each in running if each._trial_id in stale]
    seen, now = _seen.setdefault(study, {}), time.monotonic()
    for each in running:
        beats = each.user_attrs.get(_BEAT, 0)
        if seen.get(each.number, (None, now))[0] != beats:
            seen[each.number] = (beats, now)
    return [each for each in running if WORKER in each.user_attrs and now - seen[each.number][1] > GRACE_SECONDS]


def has_heartbeats(study: Study) -> bool:
    """Whether the study is kept in a database that records heartbeats."""
    storage: Any = study._storage
    return hasattr(storage, "get_heartbeat_interval") and storage.get_heartbeat_interval() is not None


def _interval(study: Study) -> float | None:
    """How often a sign of life is due; None where the storage is this process's own."""
    from optuna.storages import InMemoryStorage

    storage: Any = study._storage
    if isinstance(storage, InMemoryStorage):
        return None
    return float(storage.get_heartbeat_interval()) if has_heartbeats(study) else float(HEARTBEAT_SECONDS)
