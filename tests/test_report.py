"""A callback's metrics, numbers, figures and sentences in the MLflow run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from mlflow import MlflowClient

import hyperopt_implicit as hi

from .ridge import ridge


class Everything(hi.Report):
    """Reports all that can be reported."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen = 0

    def __call__(self, step: hi.OuterStep, problem: hi.BilevelProblem) -> bool:
        self.seen += 1
        return self.seen == 3

    def metrics(self) -> dict[str, float]:
        return {f"{self.name}/seen": float(self.seen)}

    def summary(self) -> dict[str, float]:
        return {f"{self.name}/in all": 10.0 * self.seen}

    def figures(self) -> dict[str, Figure]:
        return {f"{self.name}_figure": Figure()}

    def lines(self) -> list[str]:
        return [f"{self.name} saw {self.seen} steps", "and was content"]


class Nothing(hi.Report):
    """Reports nothing beyond being called."""

    def __call__(self, step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        return None


def run(*callbacks: Any, workplace: Path) -> tuple[hi.Result, MlflowClient]:
    result = hi.optimize(ridge(), "cg", outer_steps=5, callbacks=callbacks, progress=False)
    return result, MlflowClient(tracking_uri=f"sqlite:///{workplace}/mlflow.db")


def test_all_of_it_is_in_the_run(workplace: Path) -> None:
    result, client = run(Everything("first"), Everything("second"), workplace=workplace)
    found = client.get_run(result.run_id).data
    for name in ("first", "second"):
        history = client.get_metric_history(result.run_id, f"{name}/seen")
        assert [(each.step, each.value) for each in history] == [(0, 1.0), (1, 2.0), (2, 3.0)]
        assert found.metrics[f"{name}/in all"] == 30.0
    assert found.tags["mlflow.note.content"].splitlines() == [
        "- first saw 3 steps",
        "- and was content",
        "- second saw 3 steps",
        "- and was content",
    ]
    names = {each.path for each in client.list_artifacts(result.run_id)}
    assert {"first_figure.png", "second_figure.png", "trajectories.png"} <= names
    assert result.stop_reason == "stopped by a callback"


def test_a_report_may_have_nothing_to_show(workplace: Path) -> None:
    result, client = run(Nothing(), lambda step, problem: None, workplace=workplace)
    assert "mlflow.note.content" not in client.get_run(result.run_id).data.tags


def test_reports_are_callbacks_without_tracking() -> None:
    report = Everything("only")
    hi.optimize(ridge(), "cg", outer_steps=5, callbacks=[report], tracking=False)
    assert report.seen == 3


def test_names_that_mlflow_does_not_take_cost_the_run_nothing(workplace: Path) -> None:
    """It refuses whole batches for one percent sign; tasks and metrics are named by people."""

    class Percent(Nothing):
        def metrics(self) -> dict[str, float]:
            return {"accuracy %": 50.0, "task/a=b/weight": 1.0}

    result, client = run(Percent(), workplace=workplace)
    found = client.get_run(result.run_id).data.metrics
    assert (found["accuracy _"], found["task/a_b/weight"]) == (50.0, 1.0)
    assert "loss/validation" in found
