"""Runs killed with SIGKILL at any moment and resumed until they are through: the same, bit by bit, as never killed."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

import hyperopt_implicit as hi

from .killed_runs import KilledRun
from .resumable import difference

pytestmark = pytest.mark.filterwarnings("ignore::hyperopt_implicit.HyperoptWarning")


@pytest.mark.parametrize(("backend", "workers"), [("cg", 2), ("unrolled", 0), ("heavy_ball", 0)])
def test_a_killed_run_is_the_same_as_one_that_was_not(backend: str, workers: int, tmp_path: Path) -> None:
    run = KilledRun(backend, tmp_path, workers=workers)
    whole = run.never_stopped()
    killed = run.killed(2, seed=1)
    assert run.kills > 0
    assert difference(whole, killed) is None


def test_a_killed_run_has_each_step_once_in_mlflow(workplace: Path) -> None:
    uri = f"sqlite:///{workplace / 'mlflow.db'}"
    tracking = hi.Tracking(uri, system_metrics=False, local_copy=str(workplace / "unsent"))
    run = KilledRun("identity", workplace, tracking=tracking)
    run.never_stopped()
    history = run.killed(3, seed=4)["history"]
    assert run.kills > 0
    client = MlflowClient(uri)
    found = client.search_runs(["1"])
    resumed = [each for each in found if each.info.status == "FINISHED"]
    for name, field in [("loss/validation", "validation_loss"), ("loss/training", "training_loss")]:
        logged = client.get_metric_history(resumed[0].info.run_id, name)
        assert [(each.step, each.value) for each in logged] == [(step["step"], step[field]) for step in history]
    for name in resumed[0].data.metrics:
        steps = [each.step for each in client.get_metric_history(resumed[0].info.run_id, name)]
        assert len(set(steps)) == len(steps)
    assert len(found) == 1
    assert not (workplace / "unsent").exists()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("backend", [each for each in hi.list_backends() if each != "auto"])
def test_every_backend_survives_kills(backend: str, workers: int, tmp_path: Path) -> None:
    run = KilledRun(backend, tmp_path, workers=workers)
    whole = run.never_stopped()
    killed = run.killed(3, seed=2)
    assert difference(whole, killed) is None
