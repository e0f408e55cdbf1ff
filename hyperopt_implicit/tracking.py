"""MLflow: runs, nested runs and what goes into them. The only file that imports mlflow.

What is said about a run is in ``run_record.py``; the buffer that keeps a slow server from holding up a run, in
``sender.py``.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import os
import re
import socket
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from hyperopt_implicit.errors import HyperoptError
from hyperopt_implicit.messages import first_line
from hyperopt_implicit.run_record import (
    description_of,
    files_of,
    metrics_of,
    params_of,
    source_of,
    source_tags,
    summary_of,
)
from hyperopt_implicit.sender import MetricRecord, Sender, WriteFiles
from hyperopt_implicit.servers import alone, within, without_password

if TYPE_CHECKING:
    from hyperopt_implicit.backend import Backend
    from hyperopt_implicit.history import OuterStep, Result
    from hyperopt_implicit.problem import BilevelProblem
    from hyperopt_implicit.report import Report

DEFAULT_URI = "sqlite:///mlflow.db"
_SQLITE = "sqlite:///"
MODEL_TRAINING_VIEW = "?workflowType=machine_learning"  # without it the UI opens on its GenAI pages
_REFUSED = re.compile(r"[^/\w.\- :]")
_METRICS_A_CALL = 1000  # MLflow's limits
_PARAMS_A_CALL = 100
_PARAM_LENGTH = 6000
_CONNECT_SECONDS = 2.0
_START_SECONDS = 60.0  # a new database takes ten of them


@dataclass(frozen=True)
class Tracking:
    """Where and how a run is tracked.

    Args:
        uri: MLflow's tracking URI; by default the environment's ``MLFLOW_TRACKING_URI``, else ``sqlite:///mlflow.db``.
        experiment: name of the experiment; by default the environment's ``MLFLOW_EXPERIMENT_NAME``, else
            ``hyperopt_implicit``.
        run_name: MLflow makes one up where it is None.
        parent_run_id: the run under which this one is nested.
        tags: further tags.
        params: further params, such as the values of knobs.
        save_state: store the final state dicts of model and hyperparameters as artifacts.
        figures: draw the run when it ends, as artifacts; takes some tenths of a second. Trials of a search go without,
            but for the best one, which is drawn in the search's own run.
        system_metrics: sample CPU, memory and GPU through psutil, where it is installed.
        local_copy: folder for what a server would not take.
    """

    uri: str | None = None
    experiment: str | None = None
    run_name: str | None = None
    parent_run_id: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    save_state: bool = True
    figures: bool = True
    system_metrics: bool = True
    local_copy: str = "unsent_mlflow"

    @property
    def resolved_uri(self) -> str:
        """The tracking URI that will be used; a file by its full path, since MLflow keeps stores open by URI."""
        uri = self.uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI
        file = uri.removeprefix(_SQLITE)
        return uri if file in (uri, "", ":memory:") else f"{_SQLITE}{Path(file).absolute()}"

    @property
    def resolved_experiment(self) -> str:
        """The experiment that will be used."""
        return self.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "hyperopt_implicit"


class Tracker:
    """One MLflow run, or none at all.

    The run begins when the tracker is made; where that fails, the run that is tracked goes on with a warning, and all
    that would have been sent ends in a file.

    Args:
        config: where and how; None tracks nothing.
        params: logged once, as MLflow's params.
        tags: the run's tags.
        resume: the id of a run to go on with, whose params are not logged again; a new one begins where it is not
            there any more.

    Attributes:
        run_id: None where nothing is tracked, or the server could not be reached at the start.
        run_link: where to look at the run.
    """

    def __init__(
        self,
        config: Tracking | None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        resume: str | None = None,
    ) -> None:
        self.run_id: str | None = None
        self.run_link: str | None = None
        self._sender: Sender | None = None
        self._receiver: _MlflowRun | None = None
        self._monitor: Any = None
        if config is None:
            return
        self._config = config
        tags = {**(tags or {}), **config.tags}
        receiver, failure = None, None
        try:
            with _alone(config.resolved_uri):
                receiver = within(_START_SECONDS, lambda: _MlflowRun(config, tags, resume))
            self._receiver, self.run_id = receiver, receiver.run_id
            self.run_link = run_link(config.resolved_uri, receiver.experiment_id, receiver.run_id)
        except Exception as error:  # tracking must not cost the run anything, whatever a server or database answers
            failure = f"{without_password(config.resolved_uri)} could not be used ({first_line(error)})"
        name = self.run_id or uuid.uuid4().hex
        header = {"run_id": self.run_id, "experiment": config.resolved_experiment, "tags": tags}
        self._sender = Sender(receiver, failure, header, Path(config.local_copy, f"{name}.jsonl"))
        if self.run_id is None or self.run_id != resume:
            self._sender.put_params({key: str(value) for key, value in {**(params or {}), **config.params}.items()})
        if self.run_id is not None and config.system_metrics and importlib.util.find_spec("psutil"):
            self._monitor = _system_monitor(self.run_id, config.resolved_uri)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Take metrics; returns at once. A character that MLflow takes in no name (such as %) becomes an underscore."""
        if self._sender is not None:
            self._sender.put_metrics({_accepted(name): value for name, value in metrics.items()}, step)

    def log_artifact(self, path: Path, place: str | None = None) -> None:
        """Store a file that exists until the run ends."""
        self.log_files(lambda folder: [(path, place)])

    def log_files(self, write: WriteFiles) -> None:
        """Have files written into a temporary folder, on the sender's thread, and store them."""
        if self._sender is not None:
            self._sender.put_files(write)

    def set_tag(self, name: str, value: str) -> None:
        if self._sender is not None:
            self._sender.put_tags({name: value})

    def kill_nested(self, tag: str, values: Sequence[str]) -> None:
        """End the nested runs with one of these values of a tag as killed: nobody else ends them any more."""
        if self._sender is not None and self._receiver is not None and values:
            self._sender.put_job(functools.partial(self._receiver.kill_nested, tag, values))

    def leave(self) -> None:
        """Send what is left, and let the run go on: others log to it."""
        if self._sender is not None:
            self._finish_monitor()
            self._sender.close(None)

    def end(self, error: BaseException | None = None) -> None:
        """Send what is left and end the run: finished, killed by Ctrl-C, or failed."""
        if self._sender is None:
            return
        self._finish_monitor()
        if error is not None:
            self.set_tag("error", f"{type(error).__name__}: {error}")
        self._sender.close(
            "FINISHED" if error is None else "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        )

    def _finish_monitor(self) -> None:
        if self._sender is not None and self._monitor is not None:
            self._sender.put_job(_quiet()(self._monitor.finish))


class RunTracker(Tracker):
    """The MLflow run of one :func:`hyperopt_implicit.optimize`."""

    def __init__(
        self,
        tracking: Tracking | bool,
        problem: BilevelProblem,
        backend: Backend,
        options: Mapping[str, Any],
        reports: Sequence[Report] = (),
    ) -> None:
        self._reports = reports
        config = resolve(tracking)
        if config is None:
            super().__init__(None)
            return
        source = source_of(problem.loss_source())
        super().__init__(config, {**params_of(problem, backend), **options}, source_tags(source))
        self._config = config
        if source is not None:
            self.log_artifact(source, "source")

    def log_step(self, step: OuterStep) -> None:
        """Take the record of one outer step, and what the reports saw in it; returns at once."""
        if self._sender is not None:
            metrics = metrics_of(step)
            for report in self._reports:
                metrics.update(report.metrics())
            self.log_metrics(metrics, step.step)
            if step.note is not None:
                self.set_tag("backend.choice", step.note)

    def close(self, result: Result, error: BaseException | None = None) -> None:
        """Log the summary, figures and final states, and end the run."""
        if self._sender is not None:
            summary = summary_of(result)
            for report in self._reports:
                summary.update(report.summary())
            self.log_metrics(summary, len(result.history))
            self.set_tag("stop_reason", result.stop_reason)
            description = description_of(self._reports)
            if description is not None:
                self.set_tag("mlflow.note.content", description)
            config, reports = self._config, self._reports
            self.log_files(
                lambda folder: files_of(
                    result, folder, save_state=config.save_state, draw=config.figures, reports=reports
                )
            )
        self.end(error)


@functools.lru_cache(maxsize=10_000)
def _accepted(name: str) -> str:
    """A metric's name as MLflow takes it; one object for all records that have it."""
    return _REFUSED.sub("_", name)


def resolve(tracking: Tracking | bool) -> Tracking | None:
    """What ``tracking=`` stands for: True is the default settings, False is none."""
    if isinstance(tracking, bool):
        return Tracking() if tracking else None
    if isinstance(tracking, Tracking):
        return tracking
    raise HyperoptError(f"tracking must be True, False or a Tracking(uri=…, experiment=…, …); got {tracking!r}.")


class _MlflowRun:
    """The receiving end: one run in an MLflow store. Any method may raise what MLflow raises."""

    def __init__(self, config: Tracking, tags: Mapping[str, str], resume: str | None = None) -> None:
        self.run_id: str
        self.experiment_id: str
        self._uri = config.resolved_uri
        self.name = without_password(self._uri)
        self.check()
        with _quiet():
            from mlflow import MlflowClient

            self.client = MlflowClient(tracking_uri=self._uri)
            found = None if resume is None else self._found(resume)
            if found is not None:
                self.run_id, self.experiment_id = found
                self.client.update_run(self.run_id, status="RUNNING")
                return
            self.experiment_id = self._experiment(config.resolved_experiment)
            parent = {} if config.parent_run_id is None else {"mlflow.parentRunId": config.parent_run_id}
            run = self.client.create_run(self.experiment_id, run_name=config.run_name, tags={**tags, **parent})
        self.run_id = run.info.run_id

    def _found(self, run_id: str) -> tuple[str, str] | None:
        """A run that is there and was not deleted: its id and its experiment's."""
        from mlflow.exceptions import MlflowException

        try:
            info = self.client.get_run(run_id).info
        except MlflowException:
            return None
        return (run_id, str(info.experiment_id)) if info.lifecycle_stage == "active" else None

    def check(self) -> None:
        """MLflow's own retries take minutes to find out that nobody listens; a connection attempt does not."""
        parts = urlsplit(self._uri)
        if parts.scheme in ("http", "https") and parts.hostname is not None:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.hostname, port), _CONNECT_SECONDS).close()

    def send_metrics(self, records: list[MetricRecord]) -> int:
        from mlflow.entities import Metric

        batch: list[Any] = []
        count = 0
        for metrics, timestamp, step in records:
            if count and len(batch) + len(metrics) > _METRICS_A_CALL:
                break
            # MLflow stores an infinity as 1.8e308, which ruins every axis; NaN it shows as a gap
            batch += [Metric(k, v if math.isfinite(v) else math.nan, timestamp, step) for k, v in metrics.items()]
            count += 1
        for at in range(0, len(batch), _METRICS_A_CALL):
            self.client.log_batch(self.run_id, metrics=batch[at : at + _METRICS_A_CALL])
        return count

    def send_params(self, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        items = [Param(key, value[:_PARAM_LENGTH]) for key, value in params.items()]
        for at in range(0, len(items), _PARAMS_A_CALL):
            self.client.log_batch(self.run_id, params=items[at : at + _PARAMS_A_CALL])

    def send_tags(self, tags: Mapping[str, str]) -> None:
        for name, value in tags.items():
            self.client.set_tag(self.run_id, name, value[:_PARAM_LENGTH])

    def send_file(self, path: Path, place: str | None) -> None:
        self.client.log_artifact(self.run_id, str(path), place)

    def end(self, status: str) -> None:
        self.client.set_terminated(self.run_id, status)

    def kill_nested(self, tag: str, values: Sequence[str]) -> None:
        with suppress(Exception):  # a run that stays open costs nobody anything
            for value in values:
                wanted = f"tags.`mlflow.parentRunId` = '{self.run_id}' and tags.`{tag}` = '{value}'"
                for run in self.client.search_runs([self.experiment_id], wanted):
                    if run.info.status in ("RUNNING", "FINISHED"):
                        self.client.set_terminated(run.info.run_id, "KILLED")

    def _experiment(self, name: str) -> str:
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self.client.create_experiment(name))
            except Exception:  # another process may have created it in between
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)


def run_link(uri: str, experiment_id: str, run_id: str) -> str:
    """Where a browser shows the run: on the server itself, or on the one that ``hyperopt-implicit ui`` starts."""
    parts = urlsplit(uri)
    server = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()  # a link needs no password
    base = server.rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
    return f"{base}/#/experiments/{experiment_id}/runs/{run_id}{MODEL_TRAINING_VIEW}"


def _alone(uri: str) -> AbstractContextManager[object]:
    """One process at a time in a database file: two that create its tables at once destroy each other's work."""
    return alone(uri, _START_SECONDS) if uri.startswith(_SQLITE) else nullcontext()


def _system_monitor(run_id: str, uri: str) -> Any:
    try:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        with _quiet():
            monitor = SystemMetricsMonitor(run_id, tracking_uri=uri)
            monitor.start()
    except Exception:  # an extra that must not cost the run anything
        return None
    return monitor


@contextmanager
def _quiet() -> Iterator[None]:
    """No chatter of MLflow and its database migrations on the terminal of somebody's training run."""
    loggers = [
        logging.getLogger(name) for name in ("mlflow", "mlflow.store.db.utils", "mlflow.system_metrics", "alembic")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
