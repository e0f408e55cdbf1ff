"""What MLflow holds of a search beyond its numbers: figures, a table, and one run however often it is gone on with."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import optuna
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

import hyperopt_implicit as hi
from hyperopt_implicit.errors import HyperoptWarning
from hyperopt_implicit.search_record import files_of, study_figures

from .ridge import ridge

SQLITE = "sqlite:///optuna.db"


@hi.knob("lr", FloatDistribution(0.1, 0.6))
@hi.knob("momentum", FloatDistribution(0.0, 0.5))
def builder(*, lr: float, momentum: float) -> hi.BilevelProblem:
    return ridge(optimizer=lambda params: torch.optim.SGD(params, lr=lr, momentum=momentum))


def search(**options: Any) -> hi.SearchResult:
    defaults: dict[str, Any] = {
        "n_trials": 3,
        "storage": SQLITE,
        "study_name": "recorded",
        "seed": 0,
        "tracking": hi.Tracking(system_metrics=False),
        "outer_steps": 3,
        "inner_steps": 2,
        "report_every": 1,
    }
    return hi.search(builder, "cg", **{**defaults, **options})


def client() -> MlflowClient:
    return MlflowClient(f"sqlite:///{Path('mlflow.db').absolute()}")


def parents() -> list[str]:
    found = client().search_runs(["1"], "tags.search = 'recorded'", order_by=["attributes.start_time"])
    return [each.info.run_id for each in found]


def norm(result: hi.Result) -> float:
    return float(next(result.problem.model.parameters()).detach().norm())


def history(run_id: str, name: str) -> dict[int, float]:
    return {each.step: each.value for each in client().get_metric_history(run_id, name)}


def study_of(points: list[tuple[float, float, list[float]]], objectives: int = 1) -> optuna.Study:
    """A study with these knobs and values."""
    made = optuna.create_study(directions=["minimize"] * objectives)
    both = {name: FloatDistribution(0.0, 1.0) for name in ("lr", "momentum")}
    for lr, momentum, values in points:
        reported = {step: values[0] + 1.0 / (step + 1) for step in range(4)} if objectives == 1 else {}
        params = {"lr": lr, "momentum": momentum}
        made.add_trial(create_trial(values=values, params=params, distributions=both, intermediate_values=reported))
    return made


POINTS = [(0.1, 0.2, [3.0]), (0.5, 0.4, [1.0]), (0.9, 0.6, [2.0]), (0.3, 0.9, [1.5])]


# ------------------------------------------------------------------------------------------------------------ the run


def test_run_has_params_metrics_and_a_best_that_falls(workplace: Path) -> None:
    found = search(n_trials=4)
    assert found.run_id is not None
    data = client().get_run(found.run_id).data
    expected = {
        "study": "recorded",
        "n_trials": "4",
        "sampler": "TPESampler",
        "pruner": "MedianPruner",
        "seed": "0",
        "objectives": "validation_loss",
        "population": "1",
        "knob.lr": str(FloatDistribution(0.1, 0.6)),
        "knob.momentum": str(FloatDistribution(0.0, 0.5)),
    }
    assert expected.items() <= data.params.items()
    assert data.tags["search"] == "recorded"
    values = {each.number: each.value for each in found.study.trials}
    assert history(found.run_id, "search/validation_loss") == values
    best = {n: min(v for k, v in values.items() if v is not None and k <= n) for n in values}
    assert history(found.run_id, "search/best") == best


def test_run_of_two_objectives(workplace: Path) -> None:
    found = search(objectives=["validation_loss", norm], n_trials=4)
    assert found.run_id is not None
    for i, name in enumerate(("validation_loss", "norm")):
        values = {each.number: each.values[i] for each in found.study.trials}
        assert history(found.run_id, f"search/{name}") == values
    assert history(found.run_id, "search/pareto_front")[3] == len(found.pareto_front)
    numbers = ", ".join(str(each.number) for each in found.pareto_front)
    assert client().get_run(found.run_id).data.tags["best_trial"] == numbers
    assert [each.path for each in client().list_artifacts(found.run_id, "figures")] == ["figures/pareto_front.png"]


def test_table_is_the_study(workplace: Path, tmp_path: Path) -> None:
    found = search(n_trials=3, constraints={"small": lambda result: norm(result) - 1e9})
    assert found.run_id is not None
    table = pd.read_csv(client().download_artifacts(found.run_id, "trials.csv", str(tmp_path)))
    assert list(table["trial"]) == [0, 1, 2]
    for row, each in zip(table.to_dict("records"), found.study.trials, strict=True):
        assert row["state"] == "complete"
        assert row["validation_loss"] == pytest.approx(each.value, rel=1e-15)
        assert row["knob.lr"] == pytest.approx(each.params["lr"], rel=1e-15)
        assert row["knob.momentum"] == pytest.approx(each.params["momentum"], rel=1e-15)
        assert row["constraint.small"] == pytest.approx(each.constraints["small"], rel=1e-15)
        assert each.duration is not None
        assert row["seconds"] == pytest.approx(each.duration.total_seconds())
        assert row["run_id"] == each.user_attrs["run_id"]


def test_table_says_why_a_trial_failed_and_has_no_surplus(tmp_path: Path) -> None:
    study = study_of(POINTS[:1])
    study.add_trial(create_trial(state=TrialState.FAIL, user_attrs={"failure": 'a "quoted", reason'}))
    study.add_trial(create_trial(state=TrialState.FAIL, user_attrs={"surplus": True}))
    assert list(files_of(study, [], tmp_path)) == [(tmp_path / "trials.csv", None)]
    table = pd.read_csv(tmp_path / "trials.csv")
    assert list(table["state"]) == ["complete", "fail"]
    assert list(table["failure"])[1] == 'a "quoted", reason'


# ---------------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize(
    ("objectives", "points", "names"),
    [
        (1, POINTS, {"history", "importances", "parallel_coordinates", "slices", "learning_curves"}),
        (2, [(lr, m, [v[0], 4.0 - v[0]]) for lr, m, v in POINTS], {"pareto_front"}),
        (1, POINTS[:1], set()),
    ],
)
def test_figures_are_drawn_and_nothing_is_left_of_it(
    objectives: int, points: Any, names: set[str], tmp_path: Path
) -> None:
    mine = plt.figure()
    open_before, style = plt.get_fignums(), dict(plt.rcParams)
    study = study_of(points, objectives)
    files = {path.name: place for path, place in files_of(study, study_figures(study), tmp_path)}
    assert plt.get_fignums() == open_before
    assert dict(plt.rcParams) == style
    plt.close(mine)
    assert files == {"trials.csv": None, **{f"{name}.png": "figures" for name in names}}
    for name in names:
        pixels = plt.imread(tmp_path / f"{name}.png")
        assert min(pixels.shape[:2]) > 200
        inside = pixels[pixels.shape[0] // 4 : -pixels.shape[0] // 4, pixels.shape[1] // 4 : -pixels.shape[1] // 4, :3]
        assert len(np.unique(inside.reshape(-1, 3), axis=0)) > 3, name  # something is drawn within the axes


def test_trials_that_are_all_alike_cost_no_figure_but_theirs() -> None:
    names = {name for name, _ in study_figures(study_of([(0.5, 0.5, [1.0])] * 3))}
    assert "importances" not in names or "history" in names
    assert "history" in names


# ------------------------------------------------------------------------------------------------------- going on


def test_study_that_goes_on_has_the_same_run(workplace: Path) -> None:
    first = search(n_trials=2)
    second = search(n_trials=4)
    assert first.run_id == second.run_id
    assert parents() == [first.run_id]
    assert client().get_run(str(second.run_id)).info.status == "FINISHED"
    assert history(str(second.run_id), "search/validation_loss").keys() == {0, 1, 2, 3}
    assert len(client().search_runs(["1"], f"tags.`mlflow.parentRunId` = '{first.run_id}'")) == 4


def test_run_that_was_deleted_is_replaced(workplace: Path) -> None:
    first = search(n_trials=1)
    client().delete_run(str(first.run_id))
    second = search(n_trials=2)
    assert second.run_id not in (None, first.run_id)
    assert parents() == [second.run_id]
    assert client().get_run(str(second.run_id)).data.params["study"] == "recorded"
    assert search(n_trials=3).run_id == second.run_id


def test_runs_of_trials_that_were_lost_are_closed(workplace: Path) -> None:
    def interrupt(step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        if step.step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(callbacks=[interrupt])
    (parent,) = parents()
    (lost,) = client().search_runs(["1"], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert (client().get_run(parent).info.status, lost.info.status) == ("KILLED", "KILLED")
    client().update_run(lost.info.run_id, status="RUNNING")  # as a worker leaves it that is killed
    search(n_trials=2)
    nested = client().search_runs(["1"], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert sorted(each.info.status for each in nested) == ["FINISHED", "FINISHED", "KILLED"]
    assert client().get_run(lost.info.run_id).info.status == "KILLED"
    assert client().get_run(parent).info.status == "FINISHED"


def test_run_is_left_open_while_others_work(workplace: Path) -> None:
    search(n_trials=1)
    study = optuna.load_study(study_name="recorded", storage=SQLITE)
    theirs = study.ask()
    found = search(n_trials=3)
    assert client().get_run(str(found.run_id)).info.status == "RUNNING"
    study.tell(theirs, 1.0)
    with pytest.warns(HyperoptWarning, match="already has 3 trials"):
        search(n_trials=3)
    assert client().get_run(str(found.run_id)).info.status == "FINISHED"


def test_server_that_is_not_there_costs_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = search(tracking=hi.Tracking("http://127.0.0.1:9", system_metrics=False))
    assert [each.state for each in found.study.trials] == [TrialState.COMPLETE] * 3
    assert found.run_id is None
    said = [str(each.message) for each in caught if "MLflow" in str(each.message)]
    assert len(said) == 3  # at the start, and at the end where the rest was put: the search's own, and the trials'
    assert "could not be used" in said[0]
    kept = {each.name: each.read_text() for each in Path("unsent_mlflow").glob("*.jsonl")}
    (rest,) = [name for name, text in kept.items() if "search/validation_loss" in text]
    assert rest in said[1]
    assert len(kept) == 4
    assert any(name in said[2] for name in kept.keys() - {rest})
    assert "(3 trials in all)" in said[2]
    for name, text in kept.items():
        assert name == rest or text.count("loss/training") == 3
