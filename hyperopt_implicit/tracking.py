"""MLflow: what is logged of a run, and the sender that keeps it from ever holding a run up.

The only file that imports mlflow. The caller puts records into a buffer; a thread of its own sends them in batches, in order.
What could not be sent when the run ends is written next to it as one file of JSON lines.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import json
import logging
import math
import os
import platform
import socket
import subprocess
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch

from hyperopt_implicit import figures
from hyperopt_implicit.backend import Backend, options_of
from hyperopt_implicit.errors import HyperoptWarning

if TYPE_CHECKING:
    from hyperopt_implicit.history import OuterStep, Result
    from hyperopt_implicit.problem import BilevelProblem

DEFAULT_URI = "sqlite:///mlflow.db"
MODEL_TRAINING_VIEW = "?workflowType=machine_learning"
_METRICS_A_BATCH = 1000  # MLflow's limits for one call
_PARAMS_A_BATCH = 100
_CLOSE_SECONDS = 30.0
_CONNECT_SECONDS = 2.0


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
    system_metrics: bool = True
    local_copy: str = "unsent_mlflow"

    @property
    def resolved_uri(self) -> str:
        """The tracking URI that will be used."""
        return self.uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI

    @property
    def resolved_experiment(self) -> str:
        """The experiment that will be used."""
        return self.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "hyperopt_implicit"


class NullTracker:
    """Tracks nothing."""

    run_id: str | None = None
    run_link: str | None = None

    def log_step(self, step: OuterStep) -> None:
        """Take a record of one outer step; returns at once."""

    def close(self, result: Result, error: BaseException | None = None) -> None:
        """End the run: send what is left, the figures and the final states."""


def start_tracking(
    tracking: Tracking | bool, problem: BilevelProblem, backend: Backend, options: Mapping[str, Any]
) -> NullTracker:
    """A tracker whose run has begun, with params, tags and the source file on their way."""
    if tracking is False:
        return NullTracker()
    config = Tracking() if tracking is True else tracking
    source = _source_file(problem)
    params = {**_described(backend), **options, **_versions(), **config.params, **_sizes(problem)}
    tracker = Tracker(config, params, {**_source_tags(source), **config.tags})
    if source is not None:
        tracker.submit(lambda client, run_id: client.log_artifact(run_id, str(source), "source"))
    return tracker


class Tracker(NullTracker):
    """One MLflow run.

    Args:
        config: where and how.
        params: logged once, as MLflow's params.
        tags: the run's tags.

    Attributes:
        run_id: None where the server could not be reached at the start.
        run_link: where to look at the run.
    """

    def __init__(self, config: Tracking, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        self._config = config
        self._seconds_in_caller = 0.0
        self._monitor: Any = None
        self._sender = _Sender(config, params, tags)
        self.run_id = self._sender.run_id
        self.run_link = run_link(config.resolved_uri, self._sender.experiment_id, self.run_id)
        if self.run_id is not None and config.system_metrics and importlib.util.find_spec("psutil"):
            self._monitor = _system_monitor(self.run_id, config.resolved_uri)

    def log_step(self, step: OuterStep) -> None:
        self._sender.put_metrics(metrics_of(step), step.step)

    def submit(self, job: Callable[[Any, str], None]) -> None:
        """Run ``job(client, run_id)`` on the sender's thread, after all that was given before it."""
        self._sender.put_job(job)

    def close(self, result: Result, error: BaseException | None = None) -> None:
        if self._monitor is not None:
            monitor = self._monitor
            self.submit(lambda client, run_id: monitor.finish())
        summary = {"best_step": -1 if result.best_step is None else result.best_step, "failed_steps": result.failed_steps}
        last = len(result.history)
        self._sender.put_metrics({"summary/best_validation_loss": result.best_validation_loss, **{f"summary/{k}": v for k, v in summary.items()}}, last)
        stop = result.stop_reason if error is None else f"{type(error).__name__}: {error}"
        self.submit(lambda client, run_id: client.set_tag(run_id, "stop_reason", stop[:500]))
        if len(result.history):
            self.submit(lambda client, run_id: _log_artifacts(client, run_id, result, save_state=self._config.save_state))
        status = "FINISHED" if error is None else "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        self._sender.close(status)


def metrics_of(step: OuterStep) -> dict[str, float]:
    """One outer step as MLflow metrics, grouped by prefix."""
    metrics = {
        "loss/training": step.training_loss,
        "loss/validation": step.validation_loss,
        "loss/validation_sweep": step.validation_loss_sweep,
        "solver/hypergradient_norm": step.hypergradient_norm,
        "solver/iterations": step.iterations,
        "solver/products": step.hvps,
        "solver/failed": float(step.status.failed),
        "solver/not_applied": float(not step.applied),
        "solver/failed_inner_steps": step.failed_inner_steps,
        "time/inner_seconds": step.inner_seconds,
        "time/outer_seconds": step.outer_seconds,
    }
    if step.residual is not None:
        metrics["solver/residual"] = step.residual
    metrics.update((f"hyperparameter/{name}", value) for name, value in step.hyperparameters.items())
    return metrics


class _Sender:
    """A buffer and the thread that empties it into an MLflow run, batch by batch and in order."""

    def __init__(self, config: Tracking, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        self._config = config
        self._uri = config.resolved_uri
        self._queue: deque[tuple[str, Any]] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._failure: str | None = None
        self._warned = False
        self._params = {name: str(value)[:6000] for name, value in params.items()}
        self._tags = dict(tags)
        self.run_id: str | None = None
        self.experiment_id: str | None = None
        self._client: Any = None
        self._begin()
        for at in range(0, len(self._params), _PARAMS_A_BATCH):
            self._queue.append(("params", list(self._params.items())[at : at + _PARAMS_A_BATCH]))
        self._thread = threading.Thread(target=self._work, name="hyperopt-implicit-tracking", daemon=True)
        if self.run_id is not None:
            self._thread.start()

    # ------------------------------------------------------------------------------------- called by the training loop

    def put_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self._queue.append(("metrics", (dict(metrics), int(time.time() * 1000), step)))
        self._warn_once()

    def put_job(self, job: Callable[[Any, str], None]) -> None:
        self._queue.append(("job", job))

    def close(self, status: str) -> None:
        """Send what is left within a time limit, then keep the rest in a file and say so."""
        self._queue.append(("end", status))
        self._closing = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            self._failure = self._failure or f"{_without_password(self._uri)} did not answer within {_CLOSE_SECONDS:.0f} seconds"
        if self._queue:
            path = self._spool(list(self._queue))
            self._warned = False
            self._failure = f"{self._failure or 'sending failed'}; what was not sent is in {path}"
        self._warn_once()

    def _warn_once(self) -> None:
        if self._failure is not None and not self._warned:
            self._warned = True
            warnings.warn(f"MLflow tracking: {self._failure}. The run itself is not affected.", HyperoptWarning, stacklevel=4)

    # ---------------------------------------------------------------------------------------------------- the thread

    def _work(self) -> None:
        while True:
            self._wake.wait(1.0)
            closing = self._closing
            try:
                self._drain()
            except Exception as error:
                self._failure = f"{_without_password(self._uri)} does not take data ({_first_line(error)})"
            if closing:
                return

    def _drain(self) -> None:
        """Send the front of the queue; an entry leaves it only once it was sent."""
        if not _reachable(self._uri):
            raise ConnectionError("no connection")
        while self._queue:
            kind = self._queue[0][0]
            count = 1
            if kind == "metrics":
                count = self._send_metrics()
            elif kind == "params":
                self._client.log_batch(self.run_id, params=_params(self._queue[0][1]))
            elif kind == "end":
                self._client.set_terminated(self.run_id, self._queue[0][1])
            else:
                self._queue[0][1](self._client, self.run_id)
            for _ in range(count):
                self._queue.popleft()

    def _send_metrics(self) -> int:
        """One batch of the metric records at the front; returns how many records it covers."""
        from mlflow.entities import Metric

        batch: list[Any] = []
        count = 0
        for kind, record in list(self._queue):
            if kind != "metrics" or (count and len(batch) + len(record[0]) > _METRICS_A_BATCH):
                break
            metrics, timestamp, step = record
            # MLflow stores an infinity as 1.8e308, which ruins every axis; NaN it shows as a gap
            batch += [Metric(k, v if math.isfinite(v) else math.nan, timestamp, step) for k, v in metrics.items()]
            count += 1
        for at in range(0, len(batch), _METRICS_A_BATCH):
            self._client.log_batch(self.run_id, metrics=batch[at : at + _METRICS_A_BATCH])
        return count

    def _begin(self) -> None:
        try:
            if not _reachable(self._uri):
                raise ConnectionError("no connection")
            with _quiet():
                from mlflow import MlflowClient

                self._client = MlflowClient(tracking_uri=self._uri)
                name = self._config.resolved_experiment
                found = self._client.get_experiment_by_name(name)
                self.experiment_id = found.experiment_id if found else self._create_experiment(name)
                tags = dict(self._tags)
                if self._config.parent_run_id is not None:
                    tags["mlflow.parentRunId"] = self._config.parent_run_id
                run = self._client.create_run(self.experiment_id, run_name=self._config.run_name, tags=tags)
                self.run_id = run.info.run_id
        except Exception as error:
            self._failure = f"{_without_password(self._uri)} could not be used ({_first_line(error)})"

    def _create_experiment(self, name: str) -> str:
        try:
            return str(self._client.create_experiment(name))
        except Exception:  # another process may have created it in between
            found = self._client.get_experiment_by_name(name)
            if found is None:
                raise
            return str(found.experiment_id)

    def _spool(self, entries: list[tuple[str, Any]]) -> Path:
        folder = Path(self._config.local_copy)
        folder.mkdir(parents=True, exist_ok=True)
        name = self.run_id or f"{int(time.time())}-{os.getpid()}"
        path = folder / f"{name}.jsonl"
        head = {"run_id": self.run_id, "experiment": self._config.resolved_experiment, "tags": self._tags}
        lines = [json.dumps(head)]
        for kind, content in entries:
            if kind == "metrics":
                metrics, timestamp, step = content
                lines.append(json.dumps({"step": step, "timestamp": timestamp, "metrics": metrics}))
            elif kind in ("params", "end"):
                lines.append(json.dumps({kind: dict(content) if kind == "params" else content}))
        path.write_text("\n".join(lines) + "\n")
        return path


# ---------------------------------------------------------------------------------------------- what is said about a run


def _described(backend: Backend) -> dict[str, Any]:
    options = {f"backend.{option.name}": getattr(backend, option.name) for option in options_of(type(backend))}
    return {"backend": type(backend).__name__, **options}


def _versions() -> dict[str, str]:
    names = ("hyperopt-implicit", "torch", "mlflow", "optuna")
    return {f"version.{name}": importlib.metadata.version(name) for name in names} | {"version.python": platform.python_version()}


def _sizes(problem: BilevelProblem) -> dict[str, Any]:
    return {
        "model": type(problem.model).__name__,
        "model.parameters": sum(p.numel() for p in problem.params.values()),
        "inner_optimizer": type(problem.optimizer).__name__,
        "device": str(problem.device),
        **{f"hyperparameter.{name}": each.constraint for name, each in problem.hyperparameters.declarations.items()},
        "hyperparameters": sum(p.numel() for p in problem.hparams.values()),
    }


def _source_file(problem: BilevelProblem) -> Path | None:
    try:
        path = Path(inspect.getsourcefile(problem.loss_source()) or "")
    except TypeError:
        return None
    return path if path.is_file() else None


def _source_tags(source: Path | None) -> dict[str, str]:
    if source is None:
        return {}
    tags = {"mlflow.source.name": source.name, "mlflow.source.type": "LOCAL"}
    try:
        found = subprocess.run(
            ["git", "-C", str(source.parent), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return tags
    return {**tags, "mlflow.source.git.commit": found.stdout.strip()} if found.returncode == 0 else tags


def _log_artifacts(client: Any, run_id: str, result: Result, *, save_state: bool) -> None:
    client.log_figure(run_id, figures.trajectories(result.history), "trajectories.png")
    distribution = figures.histograms(result.hyperparameters)
    if distribution is not None:
        client.log_figure(run_id, distribution, "hyperparameters.png")
    with tempfile.TemporaryDirectory() as folder:
        history = Path(folder, "history.csv")
        result.history.to_dataframe().to_csv(history, index=False)
        client.log_artifact(run_id, str(history))
        if save_state:
            states = {"model": result.problem.model, "hyperparameters": result.problem.hyperparameters}
            for name, module in states.items():
                path = Path(folder, f"{name}.pt")
                torch.save(module.state_dict(), path)
                client.log_artifact(run_id, str(path), "state")


# --------------------------------------------------------------------------------------------------------- small pieces


def run_link(uri: str, experiment_id: str | None, run_id: str | None) -> str | None:
    """Where a browser shows the run: on the server itself, or on the one that ``hyperopt-implicit ui`` starts."""
    if run_id is None:
        return None
    base = uri.rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
    return f"{base}/{MODEL_TRAINING_VIEW}#/experiments/{experiment_id}/runs/{run_id}"


def _params(items: list[tuple[str, str]]) -> list[Any]:
    from mlflow.entities import Param

    return [Param(name, value) for name, value in items]


def _system_monitor(run_id: str, uri: str) -> Any:
    try:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        with _quiet():
            monitor = SystemMetricsMonitor(run_id, tracking_uri=uri)
            monitor.start()
    except Exception:  # an extra that must not cost the run anything
        return None
    return monitor


def _reachable(uri: str) -> bool:
    """Whether something listens where an http URI points; MLflow's own retries would take minutes to find out."""
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or parts.hostname is None:
        return True
    try:
        socket.create_connection((parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)), _CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def _without_password(uri: str) -> str:
    parts = urlsplit(uri)
    if parts.password is None:
        return uri
    return parts._replace(netloc=parts.netloc.replace(f":{parts.password}@", ":***@")).geturl()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


class _quiet:
    """No chatter of MLflow and its database migrations on the terminal of somebody's training run."""

    def __enter__(self) -> None:
        self._levels = {name: logging.getLogger(name).level for name in ("mlflow", "alembic")}
        for name in self._levels:
            logging.getLogger(name).setLevel(logging.WARNING)

    def __exit__(self, *exception: object) -> None:
        for name, level in self._levels.items():
            logging.getLogger(name).setLevel(level)
