"""Tracking on servers that are not there, do not answer or die: a run is as fast as without, with the same result."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

import hyperopt_implicit as hi
from hyperopt_implicit import tracking as tracking_module
from hyperopt_implicit.credentials import without_credentials
from hyperopt_implicit.errors import HyperoptWarning
from hyperopt_implicit.tracking import RunTracker, run_link

from .ridge import ridge

REFUSED = f"[Errno {errno.ECONNREFUSED}] {os.strerror(errno.ECONNREFUSED)}"


def optimize(uri: str, **options: Any) -> hi.Result:
    defaults: dict[str, Any] = {"outer_steps": 5, "inner_steps": 2}
    return hi.optimize(ridge(), "cg", tracking=hi.Tracking(uri, system_metrics=False), **{**defaults, **options})


@pytest.fixture
def port() -> int:
    """A port of this machine on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def copies(folder: Path) -> list[Path]:
    return sorted((folder / "unsent_mlflow").glob("*.jsonl"))


def lines(copy: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in copy.read_text().splitlines()]


def assert_same_course(result: hi.Result, other: hi.Result) -> None:
    assert [each.hyperparameters for each in result.history] == [each.hyperparameters for each in other.history]
    assert result.validation_loss == other.validation_loss


def test_unreachable_server_costs_a_warning_and_leaves_a_complete_copy(workplace: Path, port: int) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = optimize(f"http://127.0.0.1:{port}")
    assert [each.category for each in caught] == [HyperoptWarning, HyperoptWarning]
    start = f"MLflow tracking: http://127.0.0.1:{port} could not be used ({REFUSED})"
    assert str(caught[0].message) == f"{start}. The run itself is not affected."
    (copy,) = copies(workplace)
    assert str(caught[1].message) == (
        f"{start}; what was not sent is in {copy.relative_to(workplace)}. The run itself is not affected."
    )
    assert (result.run_id, result.run_link) == (None, None)
    assert_same_course(result, hi.optimize(ridge(), "cg", outer_steps=5, inner_steps=2, tracking=False))

    header, *rest = lines(copy)
    assert header["experiment"] == "hyperopt_implicit"
    assert header["tags"]["mlflow.source.name"] == "ridge.py"
    assert rest[0]["params"]["backend"] == "ConjugateGradient"
    metrics = [line for line in rest if "metrics" in line]
    assert [line["step"] for line in metrics] == [0, 1, 2, 3, 4, 5]
    for line, step in zip(metrics, result.history, strict=False):
        assert line["metrics"]["hyperparameter/decay"] == step.hyperparameters["decay"]
        assert line["metrics"]["loss/validation"] == step.validation_loss
    assert metrics[-1]["metrics"]["summary/best_validation_loss"] == result.best_validation_loss
    assert {"tags": {"stop_reason": "all outer steps done"}} in rest
    assert rest[-1] == {"end": "FINISHED"}
    kept = [str(path.relative_to(copy.with_suffix(""))) for path in copy.with_suffix("").rglob("*.*")]
    assert {"trajectories.png", "history.csv", "source/ridge.py", "state/model.pt", "hyperparameters/best.pt"} <= set(
        kept
    )


def test_runs_that_could_not_be_sent_do_not_overwrite_each_other(workplace: Path, port: int) -> None:
    for _ in range(2):
        with pytest.warns(HyperoptWarning):
            optimize(f"http://127.0.0.1:{port}")
    assert len(copies(workplace)) == 2


def test_server_that_accepts_and_never_answers_is_given_up(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking_module, "_START_SECONDS", 0.3)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        with pytest.warns(HyperoptWarning, match="could not be used"):
            result = optimize(f"http://127.0.0.1:{deaf.getsockname()[1]}")
    assert len(result.history) == 5
    assert len(copies(workplace)) == 1


@pytest.mark.parametrize("uri", ["gopher://somewhere", "sqlite:///broken.db"])
def test_store_that_cannot_be_used_is_only_warned_of(workplace: Path, uri: str) -> None:
    (workplace / "broken.db").write_bytes(b"no database" * 100)
    with pytest.warns(HyperoptWarning, match="could not be used"):
        result = optimize(uri)
    assert len(result.history) == 5
    assert len(copies(workplace)) == 1
    assert (workplace / "broken.db").read_bytes() == b"no database" * 100


def test_password_is_never_shown(workplace: Path, port: int) -> None:
    uri = f"http://me:secret@127.0.0.1:{port}"
    assert without_credentials(uri) == f"http://me:***@127.0.0.1:{port}"
    assert without_credentials("sqlite:///mlflow.db") == "sqlite:///mlflow.db"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimize(uri)
    assert "secret" not in "".join(str(each.message) for each in caught)
    assert "secret" not in copies(workplace)[0].read_text()
    link = run_link("https://me:secret@mlflow.org/base/", "1", "abc")
    assert link == "https://mlflow.org/base/#/experiments/1/runs/abc?workflowType=machine_learning"


def test_logging_a_step_costs_the_caller_next_to_nothing(workplace: Path) -> None:
    """A fifth of a bare log_metric of one number at most, for all numbers of a step."""
    uri = f"sqlite:///{workplace}/mlflow.db"
    result = optimize(uri)
    problem = ridge()
    tracker = RunTracker(hi.Tracking(uri, system_metrics=False), problem, hi.get_backend("cg"), {})
    client = MlflowClient(tracking_uri=uri)
    bare, ours = [], []
    for _ in range(40):
        start = time.perf_counter()
        tracker.log_step(result.history[-1])
        ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        client.log_metric(str(result.run_id), "bare", 1.0)
        bare.append(time.perf_counter() - start)
    tracker.end()
    assert statistics.median(ours) < statistics.median(bare) / 5


# ---------------------------------------------------------------------------------------------------- a real server


@pytest.fixture
def server(workplace: Path, port: int) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    store = f"sqlite:///{workplace}/mlflow.db"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--port", str(port)]
    with (workplace / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--workers", "1", "--artifacts-destination", str(workplace / "artifacts")],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, (workplace / "server.log").read_text()
                time.sleep(0.5)
        yield process, f"http://127.0.0.1:{port}"
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server with its workers."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_run_on_a_real_server(server: tuple[subprocess.Popen[bytes], str]) -> None:
    _, uri = server
    result = optimize(uri, outer_steps=40)
    client = MlflowClient(tracking_uri=uri)
    assert client.get_run(str(result.run_id)).info.status == "FINISHED"
    logged = client.get_metric_history(str(result.run_id), "hyperparameter/decay")
    assert [each.step for each in logged] == list(range(40))
    assert "trajectories.png" in [each.path for each in client.list_artifacts(str(result.run_id))]
    assert str(result.run_link).startswith(f"{uri}/#/experiments/")


@pytest.mark.slow
def test_real_server_that_dies_midway(workplace: Path, server: tuple[subprocess.Popen[bytes], str]) -> None:
    process, uri = server

    def kill(step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        if step.step == 20:
            time.sleep(3.0)  # what was put before is sent
            stop(process)
        if step.step > 20:
            time.sleep(0.1)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = optimize(uri, outer_steps=40, callbacks=[kill])
    assert_same_course(result, hi.optimize(ridge(), "cg", outer_steps=40, inner_steps=2, tracking=False))
    ours = [str(each.message) for each in caught if each.category is HyperoptWarning]
    assert len(ours) == 2
    assert "does not answer" in ours[0]
    assert "what was not sent is in" in ours[1]
    (copy,) = copies(workplace)
    kept = [line["step"] for line in lines(copy) if "step" in line]
    sent = MlflowClient(tracking_uri=f"sqlite:///{workplace}/mlflow.db").get_metric_history(
        str(result.run_id), "loss/training"
    )
    assert sorted([*(each.step for each in sent), *kept]) == list(range(41))
    assert all(math.isfinite(each.value) for each in sent)


@pytest.mark.slow
def test_processes_that_start_at_once_share_a_new_database(tmp_path: Path) -> None:
    """The first to come creates it, which takes seconds; the others wait, and lose nothing."""
    program = (
        "import hyperopt_implicit as hi\n"
        "from hyperopt_implicit.tracking import Tracker\n"
        "tracker = Tracker(hi.Tracking('sqlite:///new.db', system_metrics=False), {'a': 1})\n"
        "tracker.log_metrics({'m': 1.0}, 0)\n"
        "tracker.end()\n"
        "print(tracker.run_id)\n"
    )
    commands = [[sys.executable, "-W", "ignore", "-c", program]] * 3
    started = [subprocess.Popen(each, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for each in commands]
    ids = [process.communicate(timeout=180)[0].strip() for process in started]
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/new.db")
    assert len(set(ids)) == 3
    for run_id in ids:
        assert client.get_run(run_id).data.metrics == {"m": 1.0}
