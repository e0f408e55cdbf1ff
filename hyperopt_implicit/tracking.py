"""Tracking: runs, nested runs and what goes into them.

What is said about a run is in ``run_record.py``; the buffer that keeps a slow server from holding up a run, in
``sender.py``; MLflow itself, in ``mlflow_run.py``.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from hyperopt_implicit.credentials import censored, without_credentials
from hyperopt_implicit.distributed import is_first
from hyperopt_implicit.errors import HyperoptError
from hyperopt_implicit.local_copy import LocalCopy, WriteFiles
from hyperopt_implicit.mlflow_run import SQLITE, MlflowRun
from hyperopt_implicit.run_record import (
    description_of,
    files_of,
    metrics_of,
    params_of,
    source_of,
    source_tags,
    summary_of,
)
from hyperopt_implicit.sender import Sender

if TYPE_CHECKING:
    from hyperopt_implicit.backend import Backend
    from hyperopt_implicit.history import OuterStep, Result
    from hyperopt_implicit.problem import BilevelProblem
    from hyperopt_implicit.report import Report

DEFAULT_URI = "sqlite:///mlflow.db"
MODEL_TRAINING_VIEW = "?workflowType=machine_learning"  # without it the UI opens on its GenAI pages
_REFUSED = re.compile(r"[^/\w.\- :]")
_LEADING = re.compile(r"^(\.\.+|\.$)")  # the parts of a path that are a folder above, or the same one
_NAME_LENGTH = 250  # MLflow's limit
_START_SECONDS = 5.0  # more would hold up a run that goes as well without
_DATABASE_SECONDS = 60.0  # a new one is made by this process, or by one beside it, and takes ten of them


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
    _note: Callable[[str], None] | None = field(default=None, repr=False, compare=False)  # instead of warnings

    def __repr__(self) -> str:
        shown = {each.name: getattr(self, each.name) for each in fields(self) if each.repr}
        shown["uri"] = None if self.uri is None else without_credentials(self.uri)
        return f"Tracking({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    @property
    def resolved_uri(self) -> str:
        """The tracking URI that will be used; a file by its full path, since MLflow keeps stores open by URI."""
        uri = self.uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI
        file = uri.removeprefix(SQLITE)
        return uri if file in (uri, "", ":memory:") else f"{SQLITE}{Path(file).absolute()}"

    @property
    def resolved_experiment(self) -> str:
        """The experiment that will be used."""
        return self.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "hyperopt_implicit"


class Tracker:
    """One MLflow run, or none at all.

    The run begins on a thread of its own, whose first attempt is waited for; where that fails, it is tried again for as
    long as the run goes on that is tracked, and what could not be sent by its end is in a file then.

    Args:
        config: where and how; None tracks nothing.
        params: logged once, as MLflow's params.
        tags: the run's tags.
        resume: the id of a run to go on with, where what is there is not logged again; a new one begins where it is not
            there any more.
        patience: how many seconds to wait here for the first attempt; some for a server, more for a database, which
            may have to be made first.
        token: what an earlier life has tagged its run with, which is then gone on with, though its id is not known.
    """

    def __init__(
        self,
        config: Tracking | None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        resume: str | None = None,
        patience: float | None = None,
        token: str | None = None,
    ) -> None:
        self._sender: Sender | None = None
        self._run: MlflowRun | None = None
        if config is None:
            return
        self._config = config
        self._tags = {**(tags or {}), **config.tags}
        if patience is None:
            patience = _START_SECONDS if config.resolved_uri.startswith("http") else _DATABASE_SECONDS
        self._run = MlflowRun(config, self._tags, resume, token)
        copy = LocalCopy(Path(config.local_copy))
        self._sender = Sender(self._run, self._described, copy, patience=patience, note=config._note)
        named = {_accepted(key): str(value) for key, value in {**(params or {}), **config.params}.items()}
        self._sender.put_params(named)

    @property
    def run_id(self) -> str | None:
        """None where nothing is tracked, or no server was reached yet; that of a run to go on with is always known."""
        return None if self._run is None else self._run.run_id

    @property
    def token(self) -> str | None:
        """What the run is tagged with, known before its id; None where nothing is tracked."""
        return None if self._run is None else self._run.token

    @property
    def run_link(self) -> str | None:
        """Where to look at the run, once a server was reached."""
        run = self._run
        if run is None or run.experiment_id is None or run.run_id is None:
            return None
        return run_link(self._config.resolved_uri, run.experiment_id, run.run_id)

    def _described(self) -> dict[str, Any]:
        return {"run_id": self.run_id, "experiment": self._config.resolved_experiment, "tags": self._tags}

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
            self._sender.put_tags({name: censored(value, self._config.resolved_uri)})

    def kill_nested(self, tag: str, values: Sequence[str]) -> None:
        """End the nested runs with one of these values of a tag as killed: nobody else ends them any more."""
        if self._sender is not None and self._run is not None and values:
            self._sender.put_job(functools.partial(self._run.kill_nested, tag, values))

    def leave(self) -> None:
        """Send what is left, and let the run go on: others log to it."""
        self._close(None)

    def interrupt(self) -> None:
        """Send what is left and mark the run as killed; it may be gone on with."""
        self._close("KILLED")

    def end(self, error: BaseException | None = None) -> None:
        """Send what is left and end the run: finished, killed by Ctrl-C, or failed."""
        if error is not None:
            self.set_tag("error", f"{type(error).__name__}: {error}")
        self._close("FINISHED" if error is None else "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")

    def _close(self, status: str | None) -> None:
        if self._sender is not None and self._run is not None:
            self._sender.put_job(self._run.finish_monitor)
            self._sender.close(status)


class RunTracker(Tracker):
    """The MLflow run of one :func:`hyperopt_implicit.optimize`.

    Args:
        tracking: where and how.
        problem: what is optimized.
        backend: how.
        options: of the run.
        reports: what else is logged.
        resume: the id of the run to go on with.
        history: the outer steps that were taken before, of which those are logged that are not there.
        token: see :class:`Tracker`.
    """

    def __init__(
        self,
        tracking: Tracking | bool,
        problem: BilevelProblem,
        backend: Backend,
        options: Mapping[str, Any],
        reports: Sequence[Report] = (),
        *,
        resume: str | None = None,
        history: Sequence[OuterStep] = (),
        token: str | None = None,
    ) -> None:
        self._reports = reports
        config = resolve(tracking)
        if config is None:
            super().__init__(None)
            return
        source = source_of(problem.loss_source())
        params = {**params_of(problem, backend), **options}
        super().__init__(config, params, source_tags(source), resume, token=token)
        if source is not None:
            self.log_artifact(source, "source")
        if self._sender is not None and len(history):
            taken = range(len(history))  # the history may grow in the meantime
            self._sender.put_past(lambda: ((_named(metrics_of(history[i])), history[i].step) for i in taken))

    def log_step(self, step: OuterStep) -> None:
        """Take the record of one outer step, and what the reports saw in it; returns at once."""
        if self._sender is None:
            return
        metrics, reported = metrics_of(step), dict[str, float]()
        for report in self._reports:
            for name, value in report.metrics().items():
                (metrics if name in metrics else reported)[name] = value
        self.log_metrics(metrics, step.step)
        self.log_metrics(reported, step.step)  # apart: what is known of a step in a later life has no reports
        if step.note is not None:
            self.set_tag("backend.choice", step.note)

    def close(self, result: Result, error: BaseException | None = None) -> None:
        """Log the summary, figures and final states, and end the run."""
        if self._sender is not None:
            summary: dict[str, float] = {}
            for report in self._reports:
                summary.update(report.summary())
            self.log_metrics({**summary_of(result), **summary}, len(result.history))
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


def _named(metrics: Mapping[str, float]) -> dict[str, float]:
    return {_accepted(name): value for name, value in metrics.items()}


@functools.lru_cache(maxsize=10_000)
def _accepted(name: str) -> str:
    """The name of a metric or param as MLflow takes it; one object for all records that have it.

    Some stores make files of names, so that a name must not lead anywhere.
    """
    parts = _REFUSED.sub("_", name).split("/")
    accepted = "/".join(_LEADING.sub(lambda dots: "_" * len(dots[0]), part) or "_" for part in parts)
    if len(accepted) <= _NAME_LENGTH:
        return accepted
    return f"{accepted[: _NAME_LENGTH - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def resolve(tracking: Tracking | bool) -> Tracking | None:
    """What ``tracking=`` stands for: True is the default settings, False is none.

    Of several processes only the first one tracks.
    """
    if isinstance(tracking, bool):
        return Tracking() if tracking and is_first() else None
    if isinstance(tracking, Tracking):
        return tracking if is_first() else None
    raise HyperoptError(f"tracking must be True, False or a Tracking(uri=…, experiment=…, …); got {tracking!r}.")


def run_link(uri: str, experiment_id: str, run_id: str) -> str:
    """Where a browser shows the run: on the server itself, or on the one that ``hyperopt-implicit ui`` starts."""
    parts = urlsplit(uri)
    server = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()  # a link needs no password
    base = server.rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
    return f"{base}/#/experiments/{experiment_id}/runs/{run_id}{MODEL_TRAINING_VIEW}"
