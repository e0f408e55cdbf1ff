"""Workers of a study, each a process of its own, and what must hold of the study that they have shared."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import TrialState

from hyperopt_implicit.heartbeats import Heartbeat
from hyperopt_implicit.workers import claim

from .postgres import Postgres

KNOBS = {
    "lr": FloatDistribution(0.01, 1.0, log=True),
    "layers": IntDistribution(1, 9, step=2),
    "width": CategoricalDistribution([64, 128]),
}

KINDS = ["sqlite", "journal", "postgresql"]

_PROGRAM = Path(__file__).with_name("worker_process.py")
_SECONDS = 240.0  # before a worker that hangs fails its test


def url_of(kind: str, folder: Path, request: pytest.FixtureRequest) -> str:
    """A storage of that kind that is not there yet."""
    if kind != "postgresql":
        return f"{kind}:///{folder / 'studies'}"
    server: Postgres = request.getfixturevalue("postgres")
    return server.new_database()


def run(study: Study, n_trials: int) -> list[int]:
    """Claim and tell until there is nothing to claim; the numbers of the trials."""
    ran = []
    while (trial := claim(study, KNOBS, n_trials)) is not None:
        with Heartbeat(study, trial):
            ran.append(trial.number)
            study.tell(trial, trial.params["lr"])
    return ran


def states(study: Study) -> list[TrialState]:
    return [each.state for each in study.get_trials(deepcopy=False)]


def start(task: str, url: str, n_trials: int, go: Path, name: str = "shared") -> subprocess.Popen[str]:
    """A worker that waits for the file ``go``; see ``worker_process.py``."""
    command = [sys.executable, "-W", "error", str(_PROGRAM), task, url, name, str(n_trials), str(go)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        raise AssertionError(process.communicate()[1])
    return process


def at_once(url: str, n_trials: int, folder: Path, workers: int = 2, name: str = "shared") -> list[list[int]]:
    """The numbers of the trials that each of several workers has run, which began at the same moment."""
    go = folder / f"go-{name}"
    started = [start("work", url, n_trials, go, name) for _ in range(workers)]
    go.touch()
    ran = []
    for process in started:
        output, errors = process.communicate(timeout=_SECONDS)
        assert process.returncode == 0, errors
        ran.append([int(each) for each in output.split()])
    return ran


@contextmanager
def hanging(
    url: str, folder: Path, n_trials: int = 10, name: str = "shared"
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A worker in the middle of a trial, and the number of that trial; killed at the end."""
    go = folder / "go-hanging"
    go.touch()
    process = start("hang", url, n_trials, go, name)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise AssertionError(process.communicate()[1])
        yield process, int(line)
    finally:
        process.kill()
        process.communicate()


def assert_shared(storage: BaseStorage, ran: Sequence[Sequence[int]], n_trials: int, name: str = "shared") -> None:
    """A study has exactly the trials that were asked for, and each was run by one worker."""
    study = optuna.load_study(storage=storage, study_name=name)
    complete = [each.number for each in study.trials if each.state is TrialState.COMPLETE]
    assert len(complete) == n_trials
    assert sorted(number for each in ran for number in each) == complete
    others = [each for each in study.trials if each.number not in complete]
    assert all(each.state is TrialState.FAIL and each.user_attrs["surplus"] for each in others)
