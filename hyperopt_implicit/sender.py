"""A buffer between a training loop and a slow or dying receiver: the caller never waits, and nothing is lost silently.

Entries are put by the caller and sent by a thread of its own, in order and once; an entry leaves the buffer only when
it was sent. What MLflow has to do with it is in ``mlflow_run.py``; where the rest is kept, in ``local_copy.py``.
"""

from __future__ import annotations

import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

from hyperopt_implicit.local_copy import LocalCopy, WriteFiles
from hyperopt_implicit.messages import warn

_CLOSE_SECONDS = 30.0
_INTERVAL_SECONDS = 1.0
_RETRY_SECONDS = 0.2
_LONGEST_PAUSE = 5.0  # between two tries
_SILENT_SECONDS = 20.0  # so long the first answer may take before that is worth a warning
_LAST_TRIES = 4  # when closing, of a receiver that is there and fails
_CAREFUL_AFTER = 6  # failures in a row, from which on records are sent one by one
_GIVEN_UP_AFTER = 12  # failures in a row, after which the entry in front is kept aside to let the others pass

MetricRecord = tuple[dict[str, float], int, int]
"""Metrics by name, time in milliseconds, step."""

Entry = tuple[str, Any]
Records = Iterable[tuple[Mapping[str, float], int]]
"""Metrics by name, and their step."""


class Receiver(Protocol):
    """Where entries go. Every method but ``refuses`` and ``explain`` may raise, which counts as not sent."""

    name: str
    metrics_a_call: int

    @property
    def goes_on(self) -> bool:
        """Once connected: whether records of an earlier life may be there already."""

    def check(self, *, last: bool) -> None:
        """Raise at once where nobody is there; the last time, somebody who is busy is waited for a little."""

    def connect(self) -> None:
        """Get ready to take entries; called until it succeeds once."""

    def logged(self, name: str) -> Iterable[tuple[int, int]]:
        """Step and time of every value that is there of a metric."""

    def refuses(self, error: Exception) -> bool:
        """Whether an error is due to the entry, which will never be taken, rather than to the receiver."""

    def explain(self, error: Exception) -> str:
        """An error in one line that can be shown."""

    def send_metrics(self, records: list[MetricRecord]) -> int:
        """Send the first few records in one call, which takes all of them or none; returns how many."""

    def send_params(self, params: Mapping[str, str]) -> None:
        """Send params that never change, but for those that are there."""

    def send_tags(self, tags: Mapping[str, str]) -> None:
        """Send tags."""

    def send_file(self, path: Path, place: str | None) -> None:
        """Send a file."""

    def end(self, status: str, timestamp: int) -> None:
        """The run is over."""


class _EntryError(Exception):
    """What an entry holds cannot be made or written, whatever the receiver."""


class Sender:
    """Sends entries to a receiver from a thread of its own.

    A record counts as sent where the value of its last metric is there. That is looked up, before a record is sent, for
    a run that goes on after an earlier life; and after a call that failed, since only its answer may have been lost.

    Args:
        receiver: where entries go.
        describe: the first line of the local copy, asked for when that is written; its ``run_id`` is the file's name.
        local_copy: for what could not be sent.
        patience: how many seconds to wait here for the first attempt to reach the receiver.
        note: is told of what is in the local copy, instead of a warning; nothing else is warned of then.
    """

    def __init__(
        self,
        receiver: Receiver,
        describe: Callable[[], Mapping[str, Any]],
        local_copy: LocalCopy,
        *,
        patience: float = 0.0,
        note: Callable[[str], None] | None = None,
    ) -> None:
        self._receiver, self._describe, self._local_copy, self._note = receiver, describe, local_copy, note
        self._failure: str | None = None
        self._queue: deque[Entry] = deque()
        self._changing = threading.Lock()  # held while entries at the front are replaced
        self._refused: list[Entry] = []
        self._wake, self._tried = threading.Event(), threading.Event()
        self._connected = self._closing = self._abandoned = self._warned = False
        self._failures = 0
        self._careful = False
        self._in_doubt = 0  # so many records in front were in a call that failed
        self._found: dict[str, set[tuple[int, int]]] = {}  # steps and times by metric, looked up since that failure
        self._earlier: dict[str, set[int]] = {}  # steps by metric, of an earlier life
        self._floor = 0  # the latest time of a record of an earlier life
        self._clock = 0  # the latest time of a record, which later ones never go behind
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="hyperopt-implicit-sender", daemon=True)
        self._thread.start()
        try:
            self._tried.wait(patience)
        except BaseException:
            self._abandoned = True
            raise

    def put_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self._queue.extend(self._records(metrics, self._now(), step))
        self._warn_once()

    def put_past(self, records: Callable[[], Records]) -> None:
        """Take metrics of an earlier life, of which some may be there; they are made on the sender's thread."""
        self._queue.append(("past", (records, self._now())))

    def put_params(self, params: Mapping[str, str]) -> None:
        self._queue.append(("params", dict(params)))

    def put_tags(self, tags: Mapping[str, str]) -> None:
        self._queue.append(("tags", dict(tags)))

    def put_files(self, write: WriteFiles) -> None:
        """Take files; they are written on the sender's thread."""
        self._queue.append(("files", write))

    def put_job(self, job: Callable[[], None]) -> None:
        """Run a job on the sender's thread, after all that was put before it."""
        self._queue.append(("job", job))

    def close(self, status: str | None) -> None:
        """Send what is left within a time limit; keep the rest in the local copy and say so.

        Args:
            status: how the run has ended; None where others go on with it.
        """
        if status is not None:
            self._queue.append(("end", status))
        self._closing = True
        self._wake.set()
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            self._abandoned = True  # what is kept below must not be sent as well; a call under way cannot be stopped
            self._failure = self._failure or f"{self._receiver.name} did not answer within {_CLOSE_SECONDS:.0f} seconds"
        with self._changing:
            entries = [*self._refused, *self._queue]
        for kind, job in entries:
            if kind == "job":  # it ends something that must not go on for ever, whether the receiver is there or not
                threading.Thread(target=job, daemon=True).start()
        unsent = [entry for entry in entries if entry[0] != "job"]
        if unsent:
            self._warned = False
            kept = self._keep(unsent)
            self._failure = f"{self._failure or 'sending failed'}; {kept}"
            if self._note is not None:
                self._note(kept)
        self._warn_once()

    def _records(self, metrics: Mapping[str, float], timestamp: int, step: int) -> Iterator[Entry]:
        """Metrics as entries that fit into one call each."""
        items = iter(metrics.items())
        while part := dict(islice(items, self._receiver.metrics_a_call)):
            yield "metrics", (part, timestamp, step)

    def _now(self) -> int:
        """Milliseconds; a clock that is set back stands still until it has caught up."""
        self._clock = max(self._clock, int(time.time() * 1000))
        return self._clock

    def _warn_once(self) -> None:
        failure = self._failure
        silent = time.monotonic() - self._began
        if failure is None and not self._tried.is_set() and silent > _SILENT_SECONDS and not self._closing:
            failure = f"{self._receiver.name} could not be used (no answer within {silent:.0f} seconds)"
        if failure is not None and not self._warned:
            self._warned = True
            if self._note is None:
                warn(f"MLflow tracking: {failure}. The run itself is not affected.")

    def _work(self) -> None:
        pause, tries = 0.0, 0
        while not self._abandoned:
            self._wake.wait(pause)
            closing = self._closing
            outcome: Literal["ready", "away", "failed"] = "ready" if self._connected else self._reach(last=closing)
            self._tried.set()
            if outcome == "ready":
                outcome = self._drain(last=closing)
            if closing and (outcome == "away" or not self._queue):
                return  # where nobody is there, what is left goes into the local copy
            if outcome == "failed" and closing:
                tries += 1
                if tries >= _LAST_TRIES:
                    return
                time.sleep(_RETRY_SECONDS)
            pause = _INTERVAL_SECONDS if outcome == "ready" else min(max(2 * pause, _RETRY_SECONDS), _LONGEST_PAUSE)

    def _reach(self, *, last: bool) -> Literal["ready", "away"]:
        """Make sure that the receiver is there."""
        receiver = self._receiver
        try:
            receiver.check(last=last)
            if not self._connected:
                receiver.connect()
        except Exception as error:  # whatever a receiver raises, the training loop must not see it
            what = "does not answer" if self._connected else "could not be used"
            self._failure = f"{receiver.name} {what} ({receiver.explain(error)})"
            return "away"
        if not self._connected:
            self._connected, self._failure = True, None
        return "ready"

    def _drain(self, *, last: bool) -> Literal["ready", "away", "failed"]:
        """Send from the front of the buffer, until it is empty or the receiver fails."""
        while self._queue and not self._abandoned:
            if self._reach(last=last) == "away":
                return "away"
            try:
                sent = self._send_first()
            except Exception as error:
                if self._fails(error):
                    return "failed"
                continue
            self._failures = 0
            self._forget(sent)
            if not self._in_doubt:
                self._careful = False
        if not self._refused:
            self._failure = None
        return "ready"

    def _fails(self, error: Exception) -> bool:
        """Note that the entry in front was not taken, and put it aside where it never will be; whether to wait."""
        metrics = self._queue[0][0] == "metrics"
        refused = isinstance(error, _EntryError) or self._receiver.refuses(error)
        self._failure = f"{self._receiver.name} does not take data ({self._receiver.explain(error)})"
        self._failures += 1
        self._found.clear()
        if metrics:
            self._in_doubt = max(self._in_doubt, 1 if self._careful else self._receiver.metrics_a_call)
        if metrics and not self._careful and (refused or self._failures >= _CAREFUL_AFTER):
            self._careful = True  # one at a time now, to find the record that is to blame
            return not refused
        if refused or self._failures >= _GIVEN_UP_AFTER:
            self._refused.append(self._queue[0])
            self._failures = 0
            self._careful = False
            self._forget(1)
            return False
        return True

    def _forget(self, count: int) -> None:
        with self._changing:
            for _ in range(count):
                if self._queue.popleft()[0] == "metrics":
                    self._in_doubt = max(0, self._in_doubt - 1)

    def _send_first(self) -> int:
        """Send the entry at the front, with those behind it that go into the same call; returns how many are done."""
        kind, content = self._queue[0]
        receiver = self._receiver
        if kind == "metrics":
            there, records = self._leading_metrics()
            return there + (receiver.send_metrics(records) if records else 0)
        if kind == "past":
            with self._changing:
                self._queue.popleft()
                self._queue.extendleft(reversed(self._expanded(content)))
            return 0
        if kind == "params":
            receiver.send_params(content)
        elif kind == "tags":
            receiver.send_tags(content)
        elif kind == "files":
            self._send_files(content)
        elif kind == "end":
            receiver.end(content, self._now())
        else:
            content()
        return 1

    def _send_files(self, write: WriteFiles) -> None:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            try:
                files = list(write(Path(folder)))
            except Exception as error:
                raise _EntryError(self._receiver.explain(error)) from error
            for path, place in files:
                self._receiver.send_file(path, place)

    def _leading_metrics(self) -> tuple[int, list[MetricRecord]]:
        """How many records in front are there already, and those behind them that are not, for one call."""
        there = 0
        records: list[MetricRecord] = []
        for at in range(min(len(self._queue), self._receiver.metrics_a_call)):
            kind, record = self._queue[at]
            if kind != "metrics" or (records and self._careful):
                break
            if self._is_there(record, in_doubt=at < self._in_doubt):
                if records:
                    break
                there += 1
                continue
            metrics, timestamp, step = record
            if timestamp < self._floor:  # the clock was set back between two lives
                record = (metrics, self._floor, step)
                self._queue[at] = (kind, record)
            records.append(record)
        return there, records

    def _is_there(self, record: MetricRecord, *, in_doubt: bool) -> bool:
        metrics, timestamp, step = record
        mark = next(reversed(metrics))
        if self._receiver.goes_on and mark not in self._earlier:
            found = set(self._receiver.logged(mark))
            self._earlier[mark] = {at for at, _ in found}
            self._floor = max([self._floor, *(when for _, when in found)])
            self._clock = max(self._clock, self._floor)
        if step in self._earlier.get(mark, ()):
            return True
        if in_doubt and mark not in self._found:
            self._found[mark] = set(self._receiver.logged(mark))
        return in_doubt and (step, timestamp) in self._found[mark]

    def _expanded(self, past: tuple[Callable[[], Records], int]) -> list[Entry]:
        records, timestamp = past
        return [entry for metrics, step in records() for entry in self._records(metrics, timestamp, step)]

    def _keep(self, entries: list[Entry]) -> str:
        """Write the local copy; says where it is, or why there is none."""
        header = self._describe()
        lines: list[Mapping[str, Any]] = [header]
        files = [content for kind, content in entries if kind == "files"]
        for kind, content in entries:
            if kind in ("metrics", "past"):
                for _, (metrics, timestamp, step) in self._expanded(content) if kind == "past" else [(kind, content)]:
                    lines.append({"step": step, "timestamp": timestamp, "metrics": metrics})
            elif kind != "files":
                lines.append({kind: content})
        return self._local_copy.keep(str(header["run_id"] or uuid.uuid4().hex), lines, files)
