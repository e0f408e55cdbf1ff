"""What a backend decides for itself is said: printed once where it changes, kept in the history, and tracked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from torch.distributions import constraints

import hyperopt_implicit as hi
from hyperopt_implicit.testing.specimens import regression_data, ridge_problem
from hyperopt_implicit_backends import Auto, Exact, Unrolled

NOTES = ["first", "first", "second", None, "second"]


@dataclass(frozen=True)
class Talks(Exact):
    """Says one of NOTES at each call."""

    def hypergradient(
        self, problem: hi.BilevelProblem, training: Sequence[Any], validation: Any, state: dict[str, Any], /
    ) -> hi.Hypergradient:
        result = super().hypergradient(problem, training, validation, state)
        call = state.get("call", 0)
        return dataclasses.replace(result, note=NOTES[call], state={"call": call + 1})


def optimize(**options: Any) -> hi.Result:
    problem = ridge_problem()
    problem.training_data, problem.validation_data = [regression_data(0)], [regression_data(1)]
    return hi.optimize(problem, Talks(), **{"outer_steps": len(NOTES), "inner_steps": 1, **options})


def test_a_note_is_recorded_where_it_changes() -> None:
    history = optimize(tracking=False, progress=False).history
    assert [step.note for step in history] == ["first", None, "second", None, "second"]
    assert history.notes == {0: "first", 2: "second", 4: "second"}
    assert [step.note for step in history[1:3]] == [None, "second"]


def test_notes_are_printed_on_the_error_stream(capsys: pytest.CaptureFixture[str]) -> None:
    optimize(tracking=False)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["outer step 0: first", "outer step 2: second", "outer step 4: second"]


def test_notes_stay_above_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    optimize(tracking=False, progress=True)
    assert "outer step 2: second" in capsys.readouterr().err


def test_without_progress_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    optimize(tracking=False, progress=False)
    assert capsys.readouterr().err == ""


def test_notes_are_tracked(workplace: Path) -> None:
    result = optimize(progress=False, tracking=hi.Tracking(system_metrics=False))
    client = MlflowClient(tracking_uri=f"sqlite:///{workplace}/mlflow.db")
    assert result.run_id is not None
    assert client.get_run(result.run_id).data.tags["backend.choice"] == "second"
    file = Path(client.download_artifacts(result.run_id, "backend_choices.txt", str(workplace)))
    assert file.read_text() == "outer step 0: first\nouter step 2: second\nouter step 4: second\n"


def test_a_backend_without_notes_leaves_none(workplace: Path) -> None:
    problem = ridge_problem()
    problem.training_data, problem.validation_data = [regression_data(0)], [regression_data(1)]
    result = hi.optimize(problem, "cg", outer_steps=2, tracking=hi.Tracking(system_metrics=False), progress=False)
    client = MlflowClient(tracking_uri=f"sqlite:///{workplace}/mlflow.db")
    assert result.run_id is not None
    assert result.history.notes == {}
    assert "backend.choice" not in client.get_run(result.run_id).data.tags
    assert "backend_choices.txt" not in {each.path for each in client.list_artifacts(result.run_id)}


def learning_rate_problem() -> hi.BilevelProblem:
    def loss(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return (model(batch[0]).squeeze(-1) - batch[1]).square().mean()

    tuned = hi.hyperparameter("lr", init=0.05, constraint=constraints.positive, target="optimizer")
    batch = (torch.ones(4, 2), torch.ones(4))
    return hi.BilevelProblem(
        torch.nn.Linear(2, 1),
        tuned(lambda model, batch: loss(model, batch)),
        loss,
        training_data=[batch],
        validation_data=[batch],
        optimizer=lambda params: torch.optim.SGD(params, lr=0.05),
    )


def test_auto_leaves_hyperparameters_of_the_optimizer_to_unrolled() -> None:
    problem = learning_rate_problem()
    assert isinstance(hi.HyperOptimizer(problem, backend="auto").backend, Unrolled)
    batch = problem.training_data[0]  # type: ignore[index]
    single = hi.hypergradient(problem, "auto", training_batches=[batch], validation_batch=batch)
    assert (
        single.gradients
        == hi.hypergradient(problem, "unrolled", training_batches=[batch], validation_batch=batch).gradients
    )
    assert "Unrolled" in str(hi.check(problem, "auto", inner_steps=3))
    assert isinstance(hi.HyperOptimizer(ridge_problem(), backend="auto").backend, Auto)
