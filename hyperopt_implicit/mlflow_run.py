"""The receiving end: one run in an MLflow store. The only file that imports mlflow.

What is sent to it, and when, is decided in ``tracking.py`` and ``sender.py``.
"""

from __future__ import annotations

import errno
import importlib.util
import logging
import math
import os
import socket
import sqlite3
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from hyperopt_implicit.credentials import Censor, censored, secrets_of, without_credentials
from hyperopt_implicit.messages import first_line
from hyperopt_implicit.servers import alone, within

if TYPE_CHECKING:
    from hyperopt_implicit.sender import MetricRecord
    from hyperopt_implicit.tracking import Tracking

SQLITE = "sqlite:///"
_PARAMS_A_CALL = 100  # MLflow's limits
_PARAM_LENGTH = 6000
_CONNECT_SECONDS = 2.0
_BUSY_SECONDS = 10.0  # when a run closes: others rarely lock a database for longer
_TURN_SECONDS = 60.0  # for a new database, which takes ten of them
_MONITOR_SECONDS = 5.0
_TOKEN = "hyperopt_implicit.token"  # nosec B105 # the name of a tag
_FOR_LATER = (401, 403, 408, 429)  # of the statuses from 400 to 499, those that are not about what was sent
_OF_THIS_MACHINE = {
    errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EISDIR, errno.ENOENT, errno.ENOSPC, errno.ENOTDIR, errno.EPERM,
    errno.EROFS,
}  # fmt: skip


class MlflowRun:
    """One run, which begins when it is first connected. Any method may raise what MLflow raises.

    Args:
        config: where and how.
        tags: the run's tags.
        resume: the run to go on with; a new one begins where it is not there any more.
        token: that of an earlier life, which may have begun a run whose id nobody has come to know.

    Attributes:
        token: what the run is tagged with, so that it can be found again without its id.
        run_id: None until the run has begun; from the start the one to go on with.
        experiment_id: None until then.
        goes_on: whether it is a run that was there.
    """

    metrics_a_call = 1000  # MLflow's limit

    def __init__(
        self, config: Tracking, tags: Mapping[str, str], resume: str | None = None, token: str | None = None
    ) -> None:
        self.run_id = resume
        self.experiment_id: str | None = None
        self.goes_on = False
        self._config, self._tags, self._resume = config, tags, resume
        self._uri = config.resolved_uri
        self.name = without_credentials(self._uri)
        self.token = uuid.uuid4().hex if token is None else token
        self._asked = token is not None
        self._started = 0
        self._params: frozenset[str] = frozenset()
        self._monitor: Any = None

    def check(self, *, last: bool = False) -> None:
        """MLflow takes minutes to find out that nobody listens or that a file is locked; this takes two seconds."""
        file = database_file(self._uri)
        if file is not None:
            _check_database(file, _BUSY_SECONDS if last else _CONNECT_SECONDS)
            return
        parts = urlsplit(self._uri)
        if parts.scheme in ("http", "https") and parts.hostname is not None:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.hostname, port), _CONNECT_SECONDS).close()

    def connect(self) -> None:
        if secrets_of(self._uri):
            _censor(self._uri)
        with _alone(self._uri), quiet():
            from mlflow import MlflowClient

            self._client = MlflowClient(tracking_uri=self._uri)
            run = (None if self._resume is None else self._found(self._resume)) or self._begun()
            if run is not None:
                self._params, self.goes_on = frozenset(run.data.params), True
                self._client.update_run(run.info.run_id, status="RUNNING")
                if "error" in run.data.tags:  # what has ended its earlier life
                    self._client.delete_tag(run.info.run_id, "error")
            else:
                run = self._new()
        self.experiment_id, self.run_id = str(run.info.experiment_id), str(run.info.run_id)
        self._started = run.info.start_time or 0
        if self._config.system_metrics and importlib.util.find_spec("psutil"):
            self._monitor = _system_monitor(self.run_id, self._uri, goes_on=self.goes_on)

    def _begun(self) -> Any:
        """The run that was begun by an earlier call whose answer was lost, or by an earlier life, or None."""
        if not self._asked:
            return None
        experiment = self._experiment(self._config.resolved_experiment)
        return next(iter(self._client.search_runs([experiment], f"tags.`{_TOKEN}` = '{self.token}'")), None)

    def _new(self) -> Any:
        experiment = self._experiment(self._config.resolved_experiment)
        self._asked = True
        parent = self._config.parent_run_id
        nested = {} if parent is None else {"mlflow.parentRunId": parent}
        tags = {**self._tags, **nested, _TOKEN: self.token}
        return self._client.create_run(experiment, run_name=self._config.run_name, tags=tags)

    def _found(self, run_id: str) -> Any:
        """A run that is there and was not deleted, or None."""
        try:
            run = self._client.get_run(run_id)
        except Exception as error:
            if _status(error) in (400, 404):
                return None
            raise  # a server in trouble: the run may be there
        return run if run.info.lifecycle_stage == "active" else None

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name))
            except Exception:  # another process may have created it in between
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def logged(self, name: str) -> Iterable[tuple[int, int]]:
        with quiet():
            return [(each.step, each.timestamp) for each in self._client.get_metric_history(self.run_id, name)]

    def refuses(self, error: Exception) -> bool:
        status = _status(error)
        if status is not None:
            return 400 <= status < 500 and status not in _FOR_LATER
        return error.errno in _OF_THIS_MACHINE if isinstance(error, OSError) else True

    def explain(self, error: Exception) -> str:
        text = censored(str(error), self._uri)  # as a whole: half of a password is one too
        return first_line(Exception(text)) if text.strip() else type(error).__name__

    def send_metrics(self, records: list[MetricRecord]) -> int:
        from mlflow.entities import Metric

        batch: list[Any] = []
        count = 0
        for metrics, timestamp, step in records:
            if count and len(batch) + len(metrics) > self.metrics_a_call:
                break
            # MLflow stores an infinity as 1.8e308, which ruins every axis; NaN it shows as a gap
            batch += [Metric(k, v if math.isfinite(v) else math.nan, timestamp, step) for k, v in metrics.items()]
            count += 1
        with quiet():
            self._client.log_batch(self.run_id, metrics=batch)
        return count

    def send_params(self, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        items = [Param(key, value[:_PARAM_LENGTH]) for key, value in params.items() if key not in self._params]
        with quiet():
            for at in range(0, len(items), _PARAMS_A_CALL):
                self._client.log_batch(self.run_id, params=items[at : at + _PARAMS_A_CALL])

    def send_tags(self, tags: Mapping[str, str]) -> None:
        with quiet():
            for name, value in tags.items():
                self._client.set_tag(self.run_id, name, value[:_PARAM_LENGTH])

    def send_file(self, path: Path, place: str | None) -> None:
        with quiet():
            self._client.log_artifact(self.run_id, str(path), place)

    def end(self, status: str, timestamp: int) -> None:
        with quiet():
            self._client.set_terminated(self.run_id, status, max(timestamp, self._started))

    def kill_nested(self, tag: str, values: Sequence[str]) -> None:
        with suppress(Exception), quiet():  # a run that stays open costs nobody anything
            for value in values:
                wanted = f"tags.`mlflow.parentRunId` = '{self.run_id}' and tags.`{tag}` = '{value}'"
                for run in self._client.search_runs([self.experiment_id], wanted):
                    if run.info.status in ("RUNNING", "FINISHED"):
                        self._client.set_terminated(run.info.run_id, "KILLED")

    def finish_monitor(self) -> None:
        """End the thread that samples CPU and memory, which may be waiting for a server that is gone."""
        if self._monitor is not None:
            with suppress(TimeoutError), quiet():
                within(_MONITOR_SECONDS, self._monitor.finish)


def database_file(uri: str) -> Path | None:
    """The file of an sqlite store; None for one in memory, and for what is none."""
    name = uri.removeprefix(SQLITE)
    if name == uri or name in ("", ":memory:") or name.startswith("file:") or "?" in name:
        return None
    return Path(name)


def _check_database(file: Path, seconds: float) -> None:
    """Raise where nobody can write into a database now; one that is not there yet is not made."""
    if not file.exists():
        folder = file.parent
        if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return
    address = f"file:{quote(str(file))}?mode=rw"
    connection = sqlite3.connect(address, uri=True, timeout=seconds, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")
    finally:
        connection.close()


def _status(error: Exception) -> int | None:
    """The HTTP status of an answer, or that which MLflow gives its own errors."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return int(error.get_http_status_code())
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _alone(uri: str) -> AbstractContextManager[object]:
    """One process at a time in a database file: two that create its tables at once destroy each other's work."""
    return alone(uri, _TURN_SECONDS) if uri.startswith(SQLITE) else nullcontext()


def _system_monitor(run_id: str, uri: str, *, goes_on: bool) -> Any:
    try:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        with quiet():
            monitor = SystemMetricsMonitor(run_id, tracking_uri=uri, resume_logging=goes_on)
            monitor.start()
    except Exception:  # an extra that must not cost the run anything
        return None
    return monitor


def _censor(uri: str) -> None:
    """MLflow's own messages have the URI in them."""
    names = ("mlflow", "mlflow.system_metrics.system_metrics_monitor", "mlflow.utils.autologging_utils.client")
    loggers = [logging.getLogger(name) for name in names]
    for each in (*loggers, *loggers[0].handlers):
        each.addFilter(Censor(uri))


_LEVELS = {
    "mlflow": logging.WARNING,
    "mlflow.store.db.utils": logging.CRITICAL,
    "mlflow.system_metrics": logging.WARNING,
    "alembic": logging.WARNING,
    "urllib3.connectionpool": logging.ERROR,  # a line for each of MLflow's own tries
}
_PRINTING = "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"
# by itself MLflow tries for minutes, with ever longer pauses, and so misses a server that has come back
_TRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"


class _Quiet:
    """What is changed in the process while any thread is inside :func:`quiet`, and put back by the last to leave."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._levels: dict[str, int] = {}
        self._variables: dict[str, str | None] = {}

    def enter(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._levels = {name: logging.getLogger(name).level for name in _LEVELS}
                self._variables = {name: os.environ.get(name) for name in (_PRINTING, _TRIES)}
                for name, level in _LEVELS.items():
                    logging.getLogger(name).setLevel(level)
                os.environ[_PRINTING] = "true"
                os.environ.setdefault(_TRIES, "2")

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                for name, level in self._levels.items():
                    logging.getLogger(name).setLevel(level)
                for name, value in self._variables.items():
                    if value is None:
                        os.environ.pop(name, None)
                    else:
                        os.environ[name] = value


_QUIET = _Quiet()


@contextmanager
def quiet() -> Iterator[None]:
    """No chatter of MLflow and its databases on the terminal of somebody's training run, nor URIs with passwords."""
    _QUIET.enter()
    try:
        yield
    finally:
        _QUIET.leave()
