"""Searches as processes: interrupted, killed at any moment, several at once; nothing is lost and nothing left open."""

from __future__ import annotations

import os
import random
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.trial import FrozenTrial, TrialState

import hyperopt_implicit as hi
from hyperopt_implicit.places import WORKER, is_lost, origin
from hyperopt_implicit.storages import open_storage

from .postgres import Postgres

FILE = """
import os
import time
import torch
import hyperopt_implicit as hi
from torch.distributions import constraints
from optuna.distributions import FloatDistribution

batch = (torch.linspace(-1, 1, 12).reshape(6, 2), torch.linspace(0, 1, 6).reshape(6, 1))

@hi.hyperparameter("decay", init=0.5, constraint=constraints.positive)
def training_loss(model, batch, *, decay):
    return (model(batch[0]) - batch[1]).square().mean() + decay * model.weight.square().sum()

def validation_loss(model, batch):
    with open("progress", "ab", buffering=0) as file:
        file.write(b".")
    time.sleep(float(os.environ.get("STEP_SECONDS", 0.0)))
    if "BROKEN" in os.environ:
        raise RuntimeError("disk on fire")
    return (model(batch[0]) - batch[1]).square().mean()

@hi.knob("lr", FloatDistribution(0.01, 0.2))
def problem(*, lr):
    return hi.BilevelProblem(
        torch.nn.Linear(2, 1), training_loss, validation_loss, training_data=[batch], validation_data=[batch],
        optimizer=lambda params: torch.optim.SGD(params, lr=lr))
"""
SQLITE = "sqlite:///optuna.db"
TRIALS, STEPS = 3, 20
SEARCH = ["search", "train.py", "-b", "cg", "-n", str(TRIALS), "--study", "shared", "--seed", "0"]
SEARCH += ["--outer-steps", str(STEPS), "--inner-steps", "2"]
CALLS = STEPS + 1  # of the validation loss, in a trial
SECONDS = 120.0  # before a process that hangs fails its test

Outcome = dict[int, tuple[dict[str, Any], float | None]]


@pytest.fixture
def folder(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the processes work: an MLflow store, and a problem whose outer steps take some time."""
    (workplace / "train.py").write_text(FILE)
    monkeypatch.setenv("STEP_SECONDS", "0.02")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    return workplace


@pytest.fixture
def alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Outcome:
    """Knobs and value of each trial, of a search that nothing disturbs, in this process and without a storage."""
    monkeypatch.setenv("STEP_SECONDS", "0")
    build = runpy.run_path("train.py")["problem"]
    found = hi.search(
        build, "cg", n_trials=TRIALS, seed=0, outer_steps=STEPS, inner_steps=2, storage=None, tracking=False
    )
    monkeypatch.setenv("STEP_SECONDS", "0.02")
    Path("progress").unlink()
    return {each.number: (each.params, each.value) for each in found.study.trials}


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the command; what still runs at the end of the test is killed."""
    begun: list[subprocess.Popen[str]] = []

    def run(*more: str, words: list[str] | None = None, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "hyperopt_implicit", *(words or SEARCH), *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        begun.append(process)
        return process

    yield run
    for process in begun:
        process.kill()
        process.communicate()


def until(holds: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for something to happen in a process that runs."""
    end = time.monotonic() + SECONDS
    while not holds():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def calls() -> int:
    """How often the validation loss was computed, by whomever."""
    return Path("progress").stat().st_size if Path("progress").exists() else 0


def output(process: subprocess.Popen[str], code: int = 0) -> str:
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == code, out + err
    return out + err


def study_in(url: str = SQLITE) -> optuna.Study:
    return optuna.load_study(storage=open_storage(url, must_exist=True), study_name="shared")


def trials_in(state: TrialState, url: str = SQLITE) -> list[FrozenTrial]:
    return [each for each in study_in(url).trials if each.state is state]


def runs() -> tuple[list[Run], list[Run]]:
    """The runs of searches, and those of trials."""
    found = MlflowClient(f"sqlite:///{Path('mlflow.db').absolute()}").search_runs(["1"])
    return [x for x in found if "search" in x.data.tags], [x for x in found if "mlflow.parentRunId" in x.data.tags]


def outcome(study: optuna.Study) -> Outcome:
    """Knobs and value of the trials that count, by their place in the order."""
    counted = [each for each in study.trials if each.state is TrialState.COMPLETE]
    return {i: (each.params, each.value) for i, each in enumerate(sorted(counted, key=origin))}


def assert_whole(alone: Outcome, url: str = SQLITE) -> None:
    """The study is what it would have been, and MLflow has a run for each trial that is closed."""
    study = study_in(url)
    assert outcome(study) == alone
    others = [each for each in study.trials if each.state is not TrialState.COMPLETE]
    assert all(each.state is TrialState.FAIL for each in others)
    (parent,), nested = runs()
    assert parent.info.status == "FINISHED"
    assert {each.data.tags["mlflow.parentRunId"] for each in nested} == {parent.info.run_id}
    finished = {each.info.run_id: each.data for each in nested if each.info.status == "FINISHED"}
    complete = [each for each in study.trials if each.state is TrialState.COMPLETE]
    assert {each.user_attrs["run_id"] for each in complete} == finished.keys()
    for each in complete:
        run = finished[each.user_attrs["run_id"]]
        assert run.metrics["summary/best_validation_loss"] == each.value
        assert run.params["knob.lr"] == str(each.params["lr"])
    assert {each.info.status for each in nested} <= {"FINISHED", "KILLED"}


# ------------------------------------------------------------------------------------------------------------- Ctrl-C


def test_interrupt_ends_the_step_and_prints_what_goes_on(start: Any, alone: Outcome) -> None:
    process = start()
    until(lambda: calls() >= CALLS + 3, process)
    process.send_signal(signal.SIGINT)
    said = output(process, code=130)
    assert calls() < 2 * CALLS  # the trial was cut short
    (waiting,) = trials_in(TrialState.WAITING)
    (lost,) = trials_in(TrialState.FAIL)
    assert is_lost(lost)
    assert lost.params == alone[1][0] == waiting.params
    assert [each.info.status for each in runs()[0]] == ["KILLED"]
    assert sorted(each.info.status for each in runs()[1]) == ["FINISHED", "KILLED"]
    (command,) = re.findall(r"go on with\n  (hyperopt-implicit .*)\n", said)
    subprocess.run(command, shell=True, check=True, timeout=SECONDS, capture_output=True)
    assert calls() == TRIALS * CALLS  # and no step was taken twice
    assert_whole(alone)


def test_second_interrupt_leaves_at_once(start: Any) -> None:
    process = start("--no-tracking", STEP_SECONDS="1000")
    until(lambda: calls() >= 1, process)
    process.send_signal(signal.SIGINT)
    assert "interrupt again to leave at once" in process.stderr.readline() + process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert "go on with" in output(process, code=130)
    assert [each.state for each in study_in().trials] == [TrialState.FAIL, TrialState.WAITING]


# ------------------------------------------------------------------------------------------------------------ SIGKILL


def test_killed_search_is_gone_on_with_by_the_same_command(start: Any, alone: Outcome) -> None:
    """A trial that was killed loses the step that it was in, and no more."""
    for trial in (0, 1):
        process = start("--checkpoint-every", "1", "--tracking-uri", f"sqlite:///{Path('mlflow.db').absolute()}")
        until(lambda trial=trial: calls() >= trial * (CALLS + 5) + 5, process)
        process.kill()
        process.wait()
        assert len(trials_in(TrialState.RUNNING)) == 1
    output(start("--checkpoint-every", "1"))
    assert calls() <= TRIALS * CALLS + 2
    assert_whole(alone)
    killed = [each for each in study_in().trials if each.state is TrialState.FAIL]
    assert [is_lost(each) for each in killed] == [True, True]
    assert not list(Path("optuna.artifacts").rglob("step-*"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments(start: Any, alone: Outcome, seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(8):
        process = start()
        time.sleep(draw.uniform(1.0, 8.0))
        process.kill()
        process.wait()
    process = start()
    process.communicate(timeout=SECONDS)
    assert_whole(alone)


# --------------------------------------------------------------------------------------------------- several processes


def test_two_searches_at_once_on_one_file(start: Any, alone: Outcome) -> None:
    for process in [start(), start()]:
        output(process)
    assert_whole(alone)
    assert not trials_in(TrialState.WAITING)


def test_worker_that_is_killed_costs_a_warning_only(start: Any, alone: Outcome) -> None:
    process = start("--workers", "2")
    until(lambda: calls() >= 3, process)
    worker = trials_in(TrialState.RUNNING)[0].user_attrs[WORKER]["pid"]
    os.kill(worker, signal.SIGKILL)
    said = output(process)
    assert re.search(r"worker [12] ended with code -9; the others have done its share", said)
    assert_whole(alone)


def test_all_workers_failing_is_an_error(start: Any) -> None:
    said = output(start("--workers", "2", "--no-tracking", BROKEN="1"), code=1)
    assert "all 2 workers ended with an error (see above)." in " ".join(said.split())
    assert "disk on fire" in said


def test_two_workers_on_postgresql_one_of_which_is_killed(start: Any, alone: Outcome, postgres: Postgres) -> None:
    url = postgres.new_database()
    first, second = (start("--storage", url) for _ in range(2))
    until(lambda: calls() >= 3, first)
    (lost, *_) = trials_in(TrialState.RUNNING, url)
    pid = lost.user_attrs[WORKER]["pid"]
    killed, other = (first, second) if first.pid == pid else (second, first)
    assert killed.pid == pid
    killed.kill()
    killed.wait()
    output(other)
    output(start("--storage", url))
    assert_whole(alone, url)
    repeated = [
        each.params for each in study_in(url).trials if each.number != lost.number and origin(each) == lost.number
    ]
    assert repeated == [lost.params]
