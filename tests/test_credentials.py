"""Passwords and tokens of a store: in nothing that is printed, logged or stored, whoever wrote the text."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

import hyperopt_implicit as hi
from hyperopt_implicit import mlflow_run, sender
from hyperopt_implicit.credentials import Censor, censored, without_credentials
from hyperopt_implicit.mlflow_run import MlflowRun

from .mlflow_server import ThreadServer
from .ridge import ridge

SECRET = "s3cr%40t"  # as it stands in a URI; the password itself is s3cr@t


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        (f"https://me:{SECRET}@mlflow.org/base", "https://me:***@mlflow.org/base"),
        (f"https://{SECRET}@mlflow.org/base", "https://***@mlflow.org/base"),
        (f"postgresql://me:{SECRET}@db/runs", "postgresql://me:***@db/runs"),
        (f"mysql+pymysql://me:a@b{SECRET}@db/runs", "mysql+pymysql://me:***@db/runs"),
        (f"postgresql://me@db/runs?password={SECRET}", "postgresql://me@db/runs?password=***"),
        ("postgresql://me@db/runs", "postgresql://me@db/runs"),
        ("sqlite:////folder/me:you@here/mlflow.db", "sqlite:////folder/me:you@here/mlflow.db"),
        ("databricks", "databricks"),
    ],
)
def test_uri_that_is_shown(uri: str, shown: str) -> None:
    assert without_credentials(uri) == shown
    assert "s3cr" not in censored(f"no answer from {uri}/api, nor from {uri.replace('%40', '@')}", uri)


def test_short_password_is_hidden_where_it_stands_in_a_uri() -> None:
    uri = "http://me:a@host"
    assert censored("a message from http://me:a@host:5000/a", uri) == "a message from http://me:***@host:5000/a"


def test_environment_has_passwords_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t0ken")
    assert censored("401 for t0ken", "http://host") == "401 for ***"


def test_password_in_a_traceback_of_a_logger() -> None:
    stream = io.StringIO()
    logger = logging.getLogger("of this test")
    handler = logging.StreamHandler(stream)
    handler.addFilter(Censor("http://me:s3cret@host"))
    logger.addHandler(handler)
    logger.propagate = False
    try:
        raise ValueError("http://me:s3cret@host is bad")
    except ValueError:
        logger.exception("failed to reach %s", "http://me:s3cret@host")
    assert "s3cret" not in stream.getvalue()
    assert stream.getvalue().count("http://me:***@host") == 3
    assert "Traceback" in stream.getvalue()


@pytest.fixture
def server(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadServer]:
    monkeypatch.setattr(sender, "_INTERVAL_SECONDS", 0.02)
    monkeypatch.setattr(sender, "_LONGEST_PAUSE", 0.2)
    monkeypatch.setattr(mlflow_run, "_CONNECT_SECONDS", 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    made = ThreadServer(workplace, monkeypatch)
    yield made
    made.stop()


@pytest.mark.parametrize("fault", ["none", "dies", "loses answers", "loses the first answers"])
def test_password_of_a_server_is_in_nothing(
    server: ThreadServer,
    workplace: Path,
    fault: str,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Neither in what is printed, MLflow's own lines included, nor in any file."""
    uri = server.uri.replace("://", "://me:s3cret@")

    def turn(step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        if step.step == 2 and fault == "dies":
            server.stop()
        if step.step == 2 and fault == "loses answers":
            server.loses = lambda path: True

    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    import mlflow  # noqa: F401

    logging.getLogger("mlflow").addHandler(handler)
    if fault == "loses the first answers":
        server.loses = lambda path: True
    server.start()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = hi.optimize(
                ridge(), "cg", outer_steps=5, inner_steps=2, callbacks=[turn], tracking=hi.Tracking(uri), progress=False
            )
    finally:
        logging.getLogger("mlflow").removeHandler(handler)
    printed = capfd.readouterr()
    said = [str(each.message) for each in caught]
    assert bool(said) == (fault != "none")
    for text in (*said, printed.out, printed.err, stream.getvalue(), str(result.run_link)):
        assert "s3cret" not in text
    for path in workplace.rglob("*"):
        assert path.is_dir() or b"s3cret" not in path.read_bytes(), path
    if fault == "none":
        assert MlflowClient(tracking_uri=server.uri).get_run(str(result.run_id)).info.status == "FINISHED"
        assert "View run" not in printed.out  # a line that MLflow prints, with the URI as it was given


def test_password_in_an_error_of_the_run_is_not_stored(server: ThreadServer, workplace: Path) -> None:
    uri = server.uri.replace("://", "://me:s3cret@")

    def fail(step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        raise RuntimeError(f"cannot read {uri}")

    server.start()
    with pytest.raises(RuntimeError):
        hi.optimize(ridge(), "cg", outer_steps=2, callbacks=[fail], tracking=hi.Tracking(uri, system_metrics=False))
    (run,) = MlflowClient(tracking_uri=server.uri).search_runs(["1"])
    assert run.data.tags["error"] == f"RuntimeError: cannot read {server.uri.replace('://', '://me:***@')}"


def test_error_whose_message_is_long_is_cut_after_it_is_censored() -> None:
    """Half of a password is one too."""
    run = MlflowRun(hi.Tracking("http://me:s3cretpassword@127.0.0.1:9"), {})
    for length in range(150, 215):
        said = run.explain(OSError("x" * length + "http://me:s3cretpassword@127.0.0.1:9"))
        assert "s3c" not in said
        assert len(said) <= 200


def test_settings_show_no_password() -> None:
    assert "s3cret" not in repr(hi.Tracking("http://anna:s3cret@mlflow.example.org", "mine"))
    assert repr(hi.Tracking(experiment="mine")).startswith("Tracking(uri=None, experiment='mine', run_name=None")
