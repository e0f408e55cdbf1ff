"""A buffer between a training loop and a slow or dying receiver: the caller never waits, and nothing is lost silently.

Entries are put by the caller and sent by a thread of its own, in order; an entry leaves the buffer only once it was
sent. What MLflow has to do with it is in ``tracking.py``.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from hyperopt_implicit.messages import first_line, warn

_CLOSE_SECONDS = 30.0
_INTERVAL_SECONDS = 1.0
_RETRY_SECONDS = 0.2
_ATTEMPTS = 3

MetricRecord = tuple[dict[str, float], int, int]
"""Metrics by name, time in milliseconds, step."""

WriteFiles = Callable[[Path], Iterable[tuple[Path, str | None]]]
"""Writes files into the folder given, and names each with its place among the artifacts."""


class Receiver(Protocol):
    """Where entries go. Every method may raise, which counts as not sent."""

    name: str

    def check(self) -> None:
        """Raise at once where nobody is there."""

    def send_metrics(self, records: list[MetricRecord]) -> int:
        """Send the first few records in one call; returns how many."""

    def send_params(self, params: Mapping[str, str]) -> None:
        """Send params that never change."""

    def send_tags(self, tags: Mapping[str, str]) -> None:
        """Send tags."""

    def send_file(self, path: Path, place: str | None) -> None:
        """Send a file."""

    def end(self, status: str) -> None:
        """The run is over."""


class Sender:
    """Sends entries to a receiver from a thread of its own.

    Args:
        receiver: None where there is none from the start; everything is kept for the local copy then.
        failure: why there is none.
        header: the first line of the local copy.
        local_copy: the file for what could not be sent; files go into a folder of the same name beside it.
    """

    def __init__(
        self, receiver: Receiver | None, failure: str | None, header: Mapping[str, Any], local_copy: Path
    ) -> None:
        self._receiver = receiver
        self._failure = failure
        self._header = header
        self._local_copy = local_copy
        self._queue: deque[tuple[str, Any]] = deque()
        self._refused: list[tuple[str, Any]] = []
        self._wake = threading.Event()
        self._closing = False
        self._warned = False
        self._thread = threading.Thread(target=self._work, name="hyperopt-implicit-sender", daemon=True)
        if receiver is not None:
            self._thread.start()

    def put_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self._queue.append(("metrics", (dict(metrics), int(time.time() * 1000), step)))
        self._warn_once()

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
        if self._thread.is_alive():
            self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive() and self._receiver is not None:
            self._failure = self._failure or f"{self._receiver.name} did not answer within {_CLOSE_SECONDS:.0f} seconds"
        for kind, job in list(self._queue):
            if kind == "job":  # it ends something that must not go on for ever, whether the receiver is there or not
                threading.Thread(target=job, daemon=True).start()
        unsent = [entry for entry in [*self._refused, *self._queue] if entry[0] != "job"]
        if unsent:
            self._warned = False
            self._failure = f"{self._failure or 'sending failed'}; {self._kept(unsent)}"
        self._warn_once()

    def _warn_once(self) -> None:
        if self._failure is not None and not self._warned:
            self._warned = True
            text = f"MLflow tracking: {self._failure}. The run itself is not affected."
            warn(text)

    def _work(self) -> None:
        while True:
            self._wake.wait(_INTERVAL_SECONDS)
            closing = self._closing
            if not self._drain() and closing:
                return  # nobody is there: what is left goes into the local copy
            if closing and not self._queue:
                return

    def _drain(self) -> bool:
        """Send from the front of the buffer; False where the receiver is not there."""
        receiver = self._receiver
        assert receiver is not None  # the thread runs only where there is one
        attempts, careful = 0, False
        while self._queue:
            try:
                receiver.check()
            except Exception as error:
                self._failure = f"{receiver.name} does not answer ({first_line(error)})"
                return False
            try:
                sent = self._send_first(receiver, alone=careful)
            except Exception as error:  # whatever a receiver raises, the training loop must not see it
                self._failure = f"{receiver.name} does not take data ({first_line(error)})"
                attempts, careful = attempts + 1, True  # one at a time now, to find the entry that is refused
                if attempts < _ATTEMPTS:
                    time.sleep(_RETRY_SECONDS)
                    continue
                sent, careful = 1, False
                self._refused.append(self._queue[0])  # it is there and refuses this entry: let the others pass
            attempts = 0
            for _ in range(sent):
                self._queue.popleft()
        if not self._refused:
            self._failure = None
        return True

    def _send_first(self, receiver: Receiver, *, alone: bool) -> int:
        """Send the entry at the front, with those behind it that go into the same call; returns how many."""
        kind, content = self._queue[0]
        if kind == "metrics":
            return receiver.send_metrics([content] if alone else self._leading_metrics())
        if kind == "params":
            receiver.send_params(content)
        elif kind == "tags":
            receiver.send_tags(content)
        elif kind == "files":
            with tempfile.TemporaryDirectory() as folder:
                for path, place in content(Path(folder)):
                    receiver.send_file(path, place)
        elif kind == "end":
            receiver.end(content)
        else:
            content()
        return 1

    def _leading_metrics(self) -> list[MetricRecord]:
        records = []
        for kind, content in list(self._queue):
            if kind != "metrics":
                break
            records.append(content)
        return records

    def _kept(self, entries: list[tuple[str, Any]]) -> str:
        """Write the local copy; says where it is, or why there is none."""
        try:
            self._write_local_copy(entries)
        except Exception as error:  # a full disk must not cost the run its result either
            return f"what was not sent could not be written to {self._local_copy} ({first_line(error)})"
        return f"what was not sent is in {self._local_copy}"

    def _write_local_copy(self, entries: list[tuple[str, Any]]) -> None:
        self._local_copy.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(self._header)]
        for kind, content in entries:
            if kind == "metrics":
                metrics, timestamp, step = content
                finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
                lines.append(json.dumps({"step": step, "timestamp": timestamp, "metrics": finite}))
            elif kind != "files":
                lines.append(json.dumps({kind: content}))
        self._local_copy.write_text("\n".join(lines) + "\n")
        for kind, content in entries:
            if kind == "files":
                self._keep_files(content)

    def _keep_files(self, write: WriteFiles) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for path, place in write(Path(folder)):
                target = self._local_copy.with_suffix("") / (place or "")
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
