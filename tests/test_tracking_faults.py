"""Killed runs that go on, servers that come late or come back, full disks: nothing is lost, and nothing there twice."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

import hyperopt_implicit as hi
from hyperopt_implicit import mlflow_run, sender
from hyperopt_implicit.errors import HyperoptWarning
from hyperopt_implicit.mlflow_run import MlflowRun
from hyperopt_implicit.run_record import metrics_of
from hyperopt_implicit.tracking import RunTracker, Tracker

from .mlflow_server import ProcessServer, ThreadServer
from .ridge import ridge

STEPS = 12
BACKEND = hi.get_backend("cg")


@pytest.fixture
def store(workplace: Path) -> str:
    return f"sqlite:///{workplace}/mlflow.db"


@pytest.fixture
def quick(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults are noticed and over in no time."""
    monkeypatch.setattr(sender, "_INTERVAL_SECONDS", 0.02)
    monkeypatch.setattr(sender, "_LONGEST_PAUSE", 0.2)
    monkeypatch.setattr(mlflow_run, "_CONNECT_SECONDS", 0.1)
    monkeypatch.setattr(mlflow_run, "_BUSY_SECONDS", 0.2)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture
def server(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadServer]:
    made = ThreadServer(workplace, monkeypatch)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def result() -> hi.Result:
    """A whole run, whose steps are tracked in the tests."""
    return hi.optimize(ridge(), "cg", outer_steps=STEPS, inner_steps=2, tracking=False)


def optimize(uri: str, **options: Any) -> hi.Result:
    defaults: dict[str, Any] = {"outer_steps": 5, "inner_steps": 2}
    return hi.optimize(ridge(), "cg", tracking=hi.Tracking(uri, system_metrics=False), **{**defaults, **options})


def begin(uri: str, options: dict[str, Any] | None = None, **continued: Any) -> RunTracker:
    tracking = hi.Tracking(uri, system_metrics=False, figures=False)
    return RunTracker(tracking, ridge(), BACKEND, {"outer_steps": STEPS} if options is None else options, **continued)


def go_on(uri: str, result: hi.Result, run_id: str | None, saved: int, **options: Any) -> RunTracker:
    """What a process does that goes on after the outer steps before ``saved``, to the end."""
    tracker = begin(uri, resume=run_id, history=result.history[:saved], **options)
    for step in result.history[saved:]:
        tracker.log_step(step)
    tracker.close(result)
    return tracker


def steps(client: MlflowClient, run_id: str | None, name: str) -> list[int]:
    return [each.step for each in client.get_metric_history(str(run_id), name)]


def assert_whole(uri: str, run_id: str | None, result: hi.Result, *, last: Sequence[str] = ()) -> None:
    """Every metric of every step is there once, with its value and in the order of time, and the summary once."""
    client = MlflowClient(tracking_uri=uri)
    run = client.get_run(str(run_id))
    assert run.info.status == "FINISHED"
    assert run.info.end_time >= run.info.start_time
    expected = metrics_of(result.history[0])
    assert {name for name in run.data.metrics if not name.startswith("summary/")} == expected.keys()
    for name in expected:
        logged = client.get_metric_history(run.info.run_id, name)
        values = {each.step: metrics_of(each)[name] for each in result.history}
        assert Counter(each.step for each in logged) == Counter(range(len(result.history))), name
        assert all(each.value == values[each.step] for each in logged)
        assert [each.step for each in sorted(logged, key=lambda each: each.timestamp)] == sorted(values), name
    for name in ("best_validation_loss", "seconds"):
        assert steps(client, run.info.run_id, f"summary/{name}") == [len(result.history)]
    assert run.data.params["outer_steps"] == str(STEPS)
    assert run.data.params["version.torch"]
    assert run.data.tags["stop_reason"] == "all outer steps done"


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Life:
    """Makes the calls that reach MLflow stop for ever at one of them, as when the process is killed there."""

    calls = ("log_batch", "set_tag", "log_artifact", "set_terminated")

    def __init__(self, patch: pytest.MonkeyPatch, at: int, *, applied: bool) -> None:
        self.count, self.over, self._freed = 0, threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []
        for name in self.calls:
            patch.setattr(MlflowClient, name, self._counted(getattr(MlflowClient, name), at, applied))

    def _counted(self, call: Callable[..., Any], at: int, applied: bool) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            self.count += 1
            if self.count < at:
                return call(*args, **options)
            if applied and self.count == at:
                call(*args, **options)
            self.over.set()
            self._freed.wait()
            raise ConnectionError("dead")

        return counted

    def end(self, tracker: Tracker) -> None:
        """Let its thread go, which sends nothing any more."""
        assert tracker._sender is not None
        tracker._sender._abandoned = True
        self._freed.set()
        tracker._sender._thread.join(10.0)
        assert not tracker._sender._thread.is_alive()


# ------------------------------------------------------------------------------------------- a run that was killed


# the calls: params, source file, steps in pairs, summary, a tag, files, the end
@pytest.mark.parametrize(
    ("at", "applied", "saved"),
    [
        *[(1, False, 3), (1, True, 0), (2, False, 5), (4, True, 0), (5, False, 8), (6, True, 4), (9, True, 11)],
        *[(10, False, 10), (10, True, 10), (11, False, 6), (12, False, 12), (15, True, 12)],
    ],
)
def test_run_that_was_killed_goes_on_as_one_run(
    store: str, quick: None, result: hi.Result, at: int, applied: bool, saved: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MlflowRun, "metrics_a_call", 2 * len(metrics_of(result.history[0])))
        life = Life(patch, at, applied=applied)
        dead = begin(store)
        run_id = dead.run_id
        for step in result.history:
            dead.log_step(step)
        closing = threading.Thread(target=dead.close, args=(result,), daemon=True)
        closing.start()
        assert life.over.wait(20.0)
        with patch.context() as silent:
            silent.setattr(sender, "warn", lambda text: None)
            silent.setattr("hyperopt_implicit.local_copy.LocalCopy.keep", lambda *args: "nowhere")
            life.end(dead)
            closing.join(10.0)
    tracker = go_on(store, result, run_id, saved)
    assert tracker.run_id == run_id
    assert_whole(store, run_id, result)


def test_run_that_was_killed_within_a_record_has_no_number_twice(
    store: str, quick: None, result: hi.Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record of more metrics than one call takes: each part of it is looked for by itself."""
    monkeypatch.setattr(MlflowRun, "metrics_a_call", 5)
    with pytest.MonkeyPatch.context() as patch:
        life = Life(patch, 8, applied=True)
        dead = begin(store)
        for step in result.history[:6]:
            dead.log_step(step)
        assert life.over.wait(20.0)
        life.end(dead)
    go_on(store, result, dead.run_id, 4)
    assert_whole(store, dead.run_id, result)


def test_what_reports_saw_is_not_sent_twice(store: str, quick: None, result: hi.Result) -> None:
    class Seen(hi.Report):
        def __call__(self, step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
            return None

        def metrics(self) -> dict[str, float]:
            return {"seen/a": 1.0, "seen/b": 2.0, "loss/training": 7.0}

    dead = begin(store, reports=[Seen()])
    for step in result.history[:8]:
        dead.log_step(step)
    assert dead._sender is not None
    until(lambda: not dead._sender._queue)  # type: ignore[union-attr]
    dead._sender._abandoned = True
    tracker = begin(store, reports=[Seen()], resume=dead.run_id, history=result.history[:4])
    for step in result.history[4:]:
        tracker.log_step(step)
    tracker.close(result)
    client = MlflowClient(tracking_uri=store)
    for name in ("seen/a", "seen/b", "loss/training", "loss/validation"):
        assert steps(client, dead.run_id, name) == list(range(STEPS))
    assert {each.value for each in client.get_metric_history(str(dead.run_id), "loss/training")} == {7.0}


def test_params_that_differ_are_left_as_they_were(store: str, result: hi.Result) -> None:
    first = begin(store, {"outer_steps": STEPS, "patience": 3})
    first.end(KeyboardInterrupt())
    go_on(store, result, first.run_id, 0, options={"outer_steps": 99, "patience": 3, "new": 1})
    run = MlflowClient(tracking_uri=store).get_run(str(first.run_id))
    assert [run.data.params[name] for name in ("outer_steps", "patience", "new")] == [str(STEPS), "3", "1"]
    assert "error" not in run.data.tags  # that was another life
    assert run.info.status == "FINISHED"


@pytest.mark.parametrize("gone", ["deleted", "never there", "not an id"])
def test_run_that_is_gone_is_begun_anew_with_its_whole_history(store: str, result: hi.Result, gone: str) -> None:
    client = MlflowClient(tracking_uri=store)
    run_id = {"deleted": begin(store), "never there": "0" * 32, "not an id": "../../evil"}[gone]
    if isinstance(run_id, RunTracker):
        run_id.end()
        run_id = str(run_id.run_id)
        client.delete_run(run_id)
    tracker = go_on(store, result, str(run_id), 7)
    assert tracker.run_id not in (None, run_id)
    assert_whole(store, tracker.run_id, result)
    assert str(tracker.run_link).endswith(f"/runs/{tracker.run_id}?workflowType=machine_learning")


def test_history_without_a_run_begins_one(store: str, result: hi.Result) -> None:
    """A trial that is run again, under another number."""
    tracker = go_on(store, result, None, 7)
    assert_whole(store, tracker.run_id, result)


def test_history_may_grow_in_the_meantime(store: str, result: hi.Result) -> None:
    history = hi.History()
    for step in result.history[:5]:
        history.append(step)
    tracker = begin(store, history=history)
    for step in result.history[5:]:
        history.append(step)
        tracker.log_step(step)
    tracker.close(result)
    assert_whole(store, tracker.run_id, result)


def test_system_metrics_go_on_where_they_were(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    name, client = "system/cpu_utilization_percentage", MlflowClient(tracking_uri=store)
    run_id: str | None = None
    for life in range(2):
        tracker = RunTracker(hi.Tracking(store), ridge(), BACKEND, {}, resume=run_id)
        run_id = tracker.run_id
        _until_longer(client, run_id, name, 3 * (life + 1))
        tracker.end()
    logged = steps(client, run_id, name)
    assert logged == list(range(len(logged)))


def _until_longer(client: MlflowClient, run_id: str | None, name: str, length: int) -> None:
    until(lambda: len(steps(client, run_id, name)) > length)


PROGRAM = """
import os, signal, sys, time
import hyperopt_implicit as hi
sys.path.insert(0, {tests!r})
from tests.ridge import ridge

def kill(step, problem):
    time.sleep(0.05)
    if step.step == 20:
        from mlflow import MlflowClient
        client = MlflowClient({uri!r})
        while not any(run.data.metrics for run in client.search_runs(["1"])):
            time.sleep(0.1)
    if step.step == 30:
        os.kill(os.getpid(), signal.SIGKILL)

hi.optimize(
    ridge(), "cg", outer_steps=100, inner_steps=2, callbacks=[kill],
    tracking=hi.Tracking({uri!r}, run_name="killed", system_metrics=False))
"""


def killed(uri: str) -> str:
    """The id of a run whose process was killed after 30 outer steps."""
    program = PROGRAM.format(tests=str(Path(__file__).parents[1]), uri=uri)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    (run,) = MlflowClient(tracking_uri=uri).search_runs(["1"], "attributes.run_name = 'killed'")
    return str(run.info.run_id)


def assert_goes_on(uri: str, saved: int) -> None:
    run_id = killed(uri)
    sent = steps(MlflowClient(tracking_uri=uri), run_id, "loss/validation")
    assert 0 < len(sent) < 31  # some were lost with it
    whole = hi.optimize(ridge(), "cg", outer_steps=40, inner_steps=2, tracking=False)
    tracker = begin(uri, resume=run_id, history=whole.history[:saved])
    for step in whole.history[saved:]:
        tracker.log_step(step)
    tracker.close(whole)
    client = MlflowClient(tracking_uri=uri)
    for name in ("loss/validation", "loss/training", "hyperparameter/decay", "time/inner_seconds"):
        assert Counter(steps(client, run_id, name)) == Counter(range(40)), name
    values = [each.value for each in client.get_metric_history(run_id, "hyperparameter/decay")]
    assert values == [each.hyperparameters["decay"] for each in whole.history]
    assert client.get_run(run_id).info.status == "FINISHED"


def test_process_that_was_killed(store: str) -> None:
    assert_goes_on(store, saved=10)


# ------------------------------------------------------------------------------- servers that come late or come back


def test_server_that_comes_late_gets_everything(
    quick: None, server: ThreadServer, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def come(step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        if step.step == 4:
            assert tracked[0].run_id is None
            server.start()
            until(lambda: tracked[0].run_id is not None)

    tracked: list[Tracker] = []
    monkeypatch.setattr(MlflowRun, "check", _noting(MlflowRun.check, tracked))
    with pytest.warns(HyperoptWarning, match="could not be used") as caught:
        result = optimize(server.uri, outer_steps=STEPS, callbacks=[come])
    assert len(caught) == 1
    assert_whole(server.uri, result.run_id, result)
    assert str(result.run_link).startswith(f"{server.uri}/#/experiments/1/runs/{result.run_id}")
    assert not (workplace / "unsent_mlflow").exists()


def _noting(call: Callable[..., Any], seen: list[Any]) -> Callable[..., Any]:
    def noted(self: Any, **options: Any) -> Any:
        seen.append(self)
        return call(self, **options)

    return noted


def test_run_that_goes_on_while_its_server_is_away_keeps_its_id(
    quick: None, server: ThreadServer, result: hi.Result, workplace: Path
) -> None:
    server.start()
    first = begin(server.uri)
    for step in result.history[:3]:
        first.log_step(step)
    first.leave()
    server.stop()
    second = begin(server.uri, resume=first.run_id, history=result.history[:5])
    assert second.run_id == first.run_id
    with pytest.warns(HyperoptWarning, match="could not be used"):
        second.log_step(result.history[5])
    for step in result.history[6:8]:
        second.log_step(step)
    assert second.run_id == first.run_id
    assert second.run_link is None
    server.start()
    for step in result.history[8:]:
        second.log_step(step)
    second.close(result)
    assert_whole(server.uri, first.run_id, result)
    assert not (workplace / "unsent_mlflow").exists()


def test_run_that_goes_on_without_its_server_is_kept_under_its_id(
    quick: None, server: ThreadServer, result: hi.Result, workplace: Path
) -> None:
    with pytest.warns(HyperoptWarning):
        go_on(server.uri, result, "abc", 5)
    kept = workplace / "unsent_mlflow" / "abc.jsonl"
    assert kept.read_text().count('"step": ') == STEPS + 1
    before = kept.read_bytes()
    with pytest.warns(HyperoptWarning) as caught:
        go_on(server.uri, result, "abc", 5)
    assert "abc-2.jsonl" in str(caught[-1].message)
    assert kept.read_bytes() == before


def test_server_that_goes_and_comes_back_gets_everything_once(
    quick: None, server: ThreadServer, workplace: Path
) -> None:
    """It goes with an answer that is lost: what was asked for had been done."""

    def go(step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        if step.step == 3:
            until(lambda: server.asked[-1].endswith("log-artifact") or "log-batch" in server.asked[-1])
            server.loses = lambda path: path.endswith("log-batch")
        if step.step == 5:
            count = len(server.asked)
            until(lambda: any(path.endswith("log-batch") for path in server.asked[count:]))
            server.stop()
            server.loses = lambda path: False
        if step.step == 8:
            time.sleep(0.3)
            server.start()

    server.start()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = optimize(server.uri, outer_steps=STEPS, callbacks=[go])
    assert len([each for each in caught if each.category is HyperoptWarning]) == 1
    assert_whole(server.uri, result.run_id, result)
    assert not (workplace / "unsent_mlflow").exists()


def test_run_is_begun_once_though_the_answer_was_lost(quick: None, server: ThreadServer, workplace: Path) -> None:
    server.loses = lambda path: path.endswith("runs/create")
    server.start()
    tracker = Tracker(hi.Tracking(server.uri, system_metrics=False))
    assert tracker.run_id is None
    server.loses = lambda path: False
    tracker.end()
    (run,) = MlflowClient(tracking_uri=server.uri).search_runs(["1"])
    assert run.info.run_id == tracker.run_id


def test_search_whose_server_comes_late_keeps_its_trials(
    quick: None, server: ThreadServer, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optuna.distributions import FloatDistribution

    @hi.knob("momentum", FloatDistribution(0.0, 0.5))
    def builder(*, momentum: float) -> hi.BilevelProblem:
        return ridge()

    def come(step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        seen.append(step.step)
        if len(seen) == 4:  # in the second trial
            server.start()
            until(lambda: any(path.endswith("runs/create") for path in server.asked))

    seen: list[int] = []
    tracking = hi.Tracking(server.uri, system_metrics=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = hi.search(
            builder, "cg", n_trials=4, storage=None, tracking=tracking, outer_steps=3, inner_steps=2, callbacks=[come]
        )
    said = [str(each.message) for each in caught if "MLflow" in str(each.message)]
    client = MlflowClient(tracking_uri=server.uri)
    trials = client.search_runs(["1"], "tags.trial != ''")
    kept = list((workplace / "unsent_mlflow").glob("*.jsonl"))
    assert len(trials) + len(kept) == 4
    assert sorted(each.data.tags["trial"] for each in trials)[-2:] == ["2", "3"]
    assert {run.data.tags.get("mlflow.parentRunId") for run in trials if run.data.tags["trial"] in "23"} == {
        found.run_id
    }
    assert found.run_id is not None
    assert {each.step for each in client.get_metric_history(found.run_id, "search/validation_loss")} == set(range(4))
    assert "could not be used" in said[0]
    assert len(said) == 2
    assert str(kept[0].relative_to(workplace)) in said[1]


# -------------------------------------------------------------------------- databases, disks and folders that refuse


class Lock:
    """Another process holds a database."""

    def __init__(self, file: Path) -> None:
        program = (
            "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=20)\n"
            "c.execute('BEGIN EXCLUSIVE'); print('held', flush=True); sys.stdin.read()"
        )
        command = [sys.executable, "-c", program, str(file)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None and self._process.stdout.readline() == b"held\n"

    def release(self) -> None:
        self._process.communicate()


@pytest.mark.parametrize("when", ["from the start", "midway"])
def test_database_that_is_locked_for_a_while_gets_everything(
    quick: None, workplace: Path, store: str, when: str
) -> None:
    locks = [Lock(workplace / "mlflow.db")] if when == "from the start" else []
    times: list[float] = []

    def change(step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        if step.step == 2 and not locks:
            time.sleep(0.1)
            locks.append(Lock(workplace / "mlflow.db"))
        if step.step == 9:
            time.sleep(0.5)
            locks[0].release()
        times.append(time.perf_counter())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HyperoptWarning)
        result = optimize(store, outer_steps=STEPS, callbacks=[change])
    assert_whole(store, result.run_id, result)
    assert not (workplace / "unsent_mlflow").exists()
    gaps = [after - before for before, after in pairwise(times[3:9])]
    assert max(gaps) < times[9] - times[8]  # no step that was taken meanwhile waited, as this one did


def test_database_that_stays_locked_leaves_a_complete_copy(quick: None, workplace: Path, store: str) -> None:
    locks: list[Lock] = []

    def lock(step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        if step.step == 2:
            until(lambda: len(steps(MlflowClient(tracking_uri=store), _only(store), "loss/training")) == 2)
            locks.append(Lock(workplace / "mlflow.db"))

    with pytest.warns(HyperoptWarning, match=r"database is locked\); what was not sent is in"):
        result = optimize(store, callbacks=[lock])
    locks[0].release()
    (copy,) = (workplace / "unsent_mlflow").glob("*.jsonl")
    assert copy.stem == result.run_id
    assert steps(MlflowClient(tracking_uri=store), result.run_id, "loss/training") == [0, 1]
    assert copy.read_text().count('"loss/training"') == 3


def _only(uri: str) -> str:
    (run,) = MlflowClient(tracking_uri=uri).search_runs(["1"])
    return str(run.info.run_id)


def test_artifact_that_finds_no_space_costs_one_warning(workplace: Path, store: str) -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "import resource\n"
        "from tests.ridge import hi, ridge\n"
        f"tracking = hi.Tracking({store!r}, system_metrics=False)\n"
        "def full(step, problem):\n"
        "    if step.step == 2: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "result = hi.optimize(ridge(), 'cg', outer_steps=5, inner_steps=2, tracking=tracking)\n"
        "limited = hi.optimize(ridge(), 'cg', outer_steps=5, inner_steps=2, tracking=tracking, callbacks=[full])\n"
        "assert limited.validation_loss == result.validation_loss\n"
        "print(limited.run_id)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("HyperoptWarning") == 1, ended.stderr
    assert "File too large" in ended.stderr
    assert "Traceback" not in ended.stderr


USER = 65534  # nobody


@pytest.mark.parametrize("elsewhere", [True, False], ids=["with a temporary folder", "without"])
def test_folder_that_cannot_be_written_costs_one_warning(elsewhere: bool) -> None:
    """As a user who may not write here; a store that cannot be made is no reason not to run."""
    with tempfile.TemporaryDirectory() as base:  # pytest's own are closed to other users
        assert_runs_without_a_folder(Path(base), elsewhere)


def assert_runs_without_a_folder(base: Path, elsewhere: bool) -> None:
    folder, temporary = base / "work", base / "temporary"
    for each in (folder, temporary):
        each.mkdir()
    temporary.chmod(0o777 if elsewhere else 0o555)
    folder.chmod(0o555)
    base.chmod(0o755)
    program = (
        "import os, sys, tempfile\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "import warnings\n"
        "from tests.ridge import hi, ridge\n"
        "with warnings.catch_warnings():\n"  # imports all that is needed, which this user may not read
        "    warnings.simplefilter('ignore')\n"
        f"    first = hi.Tracking('http://127.0.0.1:9', local_copy={str(base / 'first')!r})\n"
        "    hi.optimize(ridge(), 'cg', outer_steps=1, tracking=first)\n"
        f"tempfile.tempdir = {str(temporary)!r}\n"
        f"os.geteuid() or os.setuid({USER})\n"
        "result = hi.optimize(ridge(), 'cg', outer_steps=5, inner_steps=2)\n"
        "print(len(result.history), result.run_id)\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environment |= {"MPLCONFIGDIR": str(temporary), "HOME": str(temporary)}
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "5 None\n"
    said = [line for line in ended.stderr.splitlines() if "what was not sent" in line]
    assert len(said) == 1, ended.stderr
    assert "Permission denied" in said[0]
    assert "Traceback" not in ended.stderr
    if elsewhere:
        (kept,) = temporary.glob("unsent_mlflow-*/*.jsonl")
        assert f"what was not sent is in {kept}" in said[0]
        assert kept.read_text().count('"loss/training"') == 5
    else:
        assert "what was not sent could not be written" in said[0]


def test_clock_that_is_set_back(store: str, result: hi.Result, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an hour, within a life and between two."""
    clock = time.time
    tracker = begin(store)
    for step in result.history[:4]:
        tracker.log_step(step)
    monkeypatch.setattr(time, "time", lambda: clock() - 3600.0)
    for step in result.history[4:6]:
        tracker.log_step(step)
    tracker.leave()
    second = begin(store, resume=tracker.run_id, history=result.history[:6])
    monkeypatch.setattr(time, "time", lambda: clock() - 7200.0)
    for step in result.history[6:]:
        second.log_step(step)
    second.close(result)
    client = MlflowClient(tracking_uri=store)
    logged = client.get_metric_history(str(tracker.run_id), "loss/validation")
    times = {each.step: each.timestamp for each in logged}
    assert [times[step] for step in range(STEPS)] == sorted(times.values())
    info = client.get_run(str(tracker.run_id)).info
    assert info.start_time <= info.end_time
    assert_whole(store, tracker.run_id, result)


# ----------------------------------------------------------------------------------------------------- true servers


@pytest.fixture
def process(workplace: Path) -> Iterator[ProcessServer]:
    made = ProcessServer(workplace)
    yield made
    made.kill()


@pytest.mark.slow
def test_process_that_was_killed_with_a_server(process: ProcessServer) -> None:
    process.start()
    assert_goes_on(process.uri, saved=10)


@pytest.mark.slow
def test_server_process_that_comes_late(process: ProcessServer, workplace: Path) -> None:
    def come(step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        if step.step == 3:
            process.begin()
        if step.step == 6:
            process.wait()

    with pytest.warns(HyperoptWarning, match="could not be used"):
        result = optimize(process.uri, outer_steps=STEPS, callbacks=[come])
    assert_whole(process.uri, result.run_id, result)
    assert not (workplace / "unsent_mlflow").exists()


@pytest.mark.slow
def test_server_process_that_is_killed_and_comes_back(process: ProcessServer, workplace: Path) -> None:
    def change(step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        time.sleep(0.05)
        if step.step == 40:
            process.kill()
        if step.step == 80:
            process.start()

    process.start()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HyperoptWarning)
        result = optimize(process.uri, outer_steps=120, callbacks=[change])
    client = MlflowClient(tracking_uri=process.uri)
    for name in ("loss/validation", "hyperparameter/decay", "solver/residual"):
        assert Counter(steps(client, result.run_id, name)) == Counter(range(120)), name
    assert client.get_run(str(result.run_id)).info.status == "FINISHED"
    assert not (workplace / "unsent_mlflow").exists()


@pytest.mark.slow
def test_database_locked_for_longer_than_mlflow_waits(workplace: Path, store: str) -> None:
    """25 seconds, with the limits as they are."""
    locks: list[Lock] = []

    def lock(step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        if step.step == 2:
            locks.append(Lock(workplace / "mlflow.db"))
            threading.Timer(25.0, locks[0].release).start()
        time.sleep(0.3)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HyperoptWarning)
        result = optimize(store, outer_steps=STEPS, callbacks=[lock])
        deadline = time.monotonic() + 60
    with sqlite3.connect(workplace / "mlflow.db", timeout=60) as connection:
        connection.execute("SELECT count(*) FROM metrics").fetchone()
    assert time.monotonic() < deadline
    sent = set(steps(MlflowClient(tracking_uri=store), result.run_id, "loss/training"))
    kept = "".join(each.read_text() for each in (workplace / "unsent_mlflow").glob("*.jsonl"))
    assert len(sent) + kept.count('"loss/training"') == STEPS
