"""Optuna outside, gradients inside: studies that go on, trials that are pruned or fail, and where they are logged."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from mlflow import MlflowClient
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from torch import Tensor, nn

import hyperopt_implicit as hi
from hyperopt_implicit.errors import HyperoptWarning

from .ridge import Batch, ridge, validation_loss

SQLITE = "sqlite:///optuna.db"


@hi.knob("lr", FloatDistribution(0.1, 0.6))
@hi.knob("momentum", CategoricalDistribution([0.0, 0.5]))
def builder(*, lr: float, momentum: float, decay: float = 0.01) -> hi.BilevelProblem:
    return ridge(optimizer=lambda params: torch.optim.SGD(params, lr=lr, momentum=momentum, weight_decay=decay))


def search(build: Any = builder, backend: Any = "cg", **options: Any) -> hi.SearchResult:
    defaults: dict[str, Any] = {
        "n_trials": 3,
        "storage": None,
        "seed": 0,
        "tracking": False,
        "outer_steps": 3,
        "inner_steps": 2,
    }
    return hi.search(build, backend, **{**defaults, **options})


def drawn(found: hi.SearchResult) -> list[dict[str, Any]]:
    return [trial.params for trial in found.study.trials]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# ------------------------------------------------------------------------------------------------------- the search


def test_finds_the_best_trial(tmp_path: Path) -> None:
    seen: list[tuple[int, dict[str, Any], TrialState, float | None]] = []
    found = search(n_trials=5, on_trial=lambda each: seen.append((each.number, each.params, each.state, each.value)))
    trials = found.study.trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 5
    assert all(trial.params.keys() == {"lr", "momentum"} and 0.1 <= trial.params["lr"] <= 0.6 for trial in trials)
    values = [trial.value for trial in trials]
    assert found.best_validation_loss == min(values)
    assert found.best_trial == values.index(min(values))
    assert found.best_knobs == trials[found.best_trial].params
    assert found.best_result is not None
    assert found.best_result.best_validation_loss == found.best_validation_loss
    assert found.best_result.problem.optimizer.param_groups[0]["lr"] == found.best_knobs["lr"]
    assert seen == [(t.number, t.params, TrialState.COMPLETE, t.value) for t in trials]
    assert list(tmp_path.iterdir()) == []


def test_trial_is_an_ordinary_run_with_its_knobs() -> None:
    found = search(n_trials=1, outer_lr=0.1)
    alone = hi.optimize(
        builder(**found.best_knobs), "cg", outer_steps=3, inner_steps=2, outer_lr=0.1, seed=0, tracking=False
    )
    assert found.best_validation_loss == alone.best_validation_loss


def random_builder(*, width: int) -> hi.BilevelProblem:
    """Random initial weights and dropout: everything that a seed must fix."""
    model = nn.Sequential(nn.Linear(3, width), nn.Dropout(0.2), nn.Linear(width, 1), nn.Flatten(0)).double()
    return ridge(model=model, optimizer=lambda params: torch.optim.SGD(params, lr=0.01))


def test_seed_repeats_a_search() -> None:
    build = hi.knob("width", IntDistribution(1, 16))(random_builder)
    options: dict[str, Any] = {"backend": {"name": "exact", "damping": 5.0}, "build": build}
    torch.manual_seed(1)
    first = search(seed=7, **options)
    before = torch.get_rng_state()
    second = search(seed=7, **options)
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn(first) == drawn(second)
    assert [t.value for t in first.study.trials] == [t.value for t in second.study.trials]
    assert len({t.value for t in first.study.trials}) == 3
    assert drawn(search(seed=8, **options)) != drawn(first)


def test_backend_and_its_options_can_be_knobs() -> None:
    backend = {
        "name": CategoricalDistribution(["cg", "neumann"]),
        "terms": IntDistribution(2, 5),
        "damping": FloatDistribution(0.0, 0.1),
        "tolerance": 1e-3,
    }
    found = search(backend=backend, n_trials=6, sampler=optuna.samplers.RandomSampler(seed=3))
    assert {trial.params["backend"] for trial in found.study.trials} == {"cg", "neumann"}
    for trial in found.study.trials:
        assert trial.params.keys() == {"lr", "momentum", "backend", "backend.terms", "backend.damping"}
        assert trial.params["backend.terms"] in range(2, 6)


def test_names_alone_can_be_the_knob() -> None:
    found = search(backend=CategoricalDistribution(["cg", "unrolled"]), n_trials=8)
    assert {trial.params["backend"] for trial in found.study.trials} == {"cg", "unrolled"}


# -------------------------------------------------------------------------------------------------- storage, resuming


def test_study_is_continued_by_name_and_draws_new_knobs() -> None:
    first = search(storage=SQLITE, study_name="decays", n_trials=2)
    before = drawn(first)
    second = search(storage=SQLITE, study_name="decays", n_trials=5)
    assert len(before) == 2
    assert len(second.study.trials) == 5
    assert drawn(second)[:2] == before
    assert len({params["lr"] for params in drawn(second)}) == 5
    assert second.best_validation_loss <= first.best_validation_loss
    if second.best_trial < 2:
        assert second.best_result is None


def test_study_that_has_its_trials_is_left_as_it_is() -> None:
    first = search(storage=SQLITE, study_name="decays", n_trials=2)
    before = drawn(first)
    with pytest.warns(HyperoptWarning) as caught:
        again = search(storage=SQLITE, study_name="decays", n_trials=2)
    assert str(caught[0].message) == (
        "study 'decays' already has 2 trials, and n_trials=2 asks for no more; raise it to go on."
    )
    assert drawn(again) == before
    assert again.best_validation_loss == first.best_validation_loss
    assert again.best_result is None


def test_default_storage_is_a_file_in_the_working_folder(tmp_path: Path) -> None:
    found = hi.search(builder, "cg", n_trials=1, tracking=False, outer_steps=1, inner_steps=1)
    assert {path.stem for path in tmp_path.iterdir()} == {"optuna"}
    assert {path.suffix for path in tmp_path.iterdir()} - {".db-wal", ".db-shm"} == {".artifacts", ".db"}
    assert found.study.study_name in {each.study_name for each in optuna.get_all_study_summaries(SQLITE)}


def test_changed_knobs_are_refused_with_the_difference() -> None:
    search(storage=SQLITE, study_name="decays", n_trials=1)

    @hi.knob("lr", FloatDistribution(0.1, 0.9))
    @hi.knob("nesterov", CategoricalDistribution([True, False]))
    def changed(*, lr: float, nesterov: bool) -> hi.BilevelProblem:
        raise AssertionError("nothing may be built")

    with pytest.raises(hi.SearchError) as caught:
        search(changed, storage=SQLITE, study_name="decays")
    assert str(caught.value) == (
        "a study is continued with the knobs it was begun with; in study 'decays' these differ: "
        "lr: was FloatDistribution(step=None, low=0.1, high=0.6, log=False), "
        "is FloatDistribution(step=None, low=0.1, high=0.9, log=False); "
        "momentum: was CategoricalDistribution(choices=[0.0, 0.5]), is absent; "
        "nesterov: was absent, is CategoricalDistribution(choices=[True, False]). "
        "Give the study another name, or put the knobs back."
    )
    assert len(search(storage=SQLITE, study_name="decays", n_trials=2).study.trials) == 2


def test_storage_that_cannot_be_used_is_left_as_it_was(tmp_path: Path) -> None:
    broken = tmp_path / "optuna.db"
    broken.write_bytes(b"this is no database " * 50)
    with pytest.raises(hi.SearchError) as caught:
        search(storage=SQLITE, study_name="decays")
    assert "is none, it begins with b'this is no datab'" in str(caught.value)
    assert str(caught.value).endswith("Name another file; nothing was changed.")
    assert broken.read_bytes() == b"this is no database " * 50


def test_database_of_something_else_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "optuna.db") as database:
        database.execute("create table studies (something integer)")
    database.close()
    with pytest.raises(hi.SearchError, match="the study cannot be kept in"):
        search(storage=SQLITE)


# --------------------------------------------------------------------------------------------- pruned and failed trials


class PruneAll(optuna.pruners.BasePruner):
    """Prunes at the second outer step, all trials but the first."""

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        return trial.number > 0 and trial.last_step == 1


def test_pruner_sees_every_outer_step_and_stops_a_trial() -> None:
    states: list[TrialState] = []
    found = search(pruner=PruneAll(), outer_steps=6, report_every=1, on_trial=lambda trial: states.append(trial.state))
    assert states == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.PRUNED]
    complete, *pruned = found.study.trials
    assert sorted(complete.intermediate_values) == [0, 1, 2, 3, 4, 5]
    assert min(complete.intermediate_values.values()) == complete.value
    assert all(sorted(each.intermediate_values) == [0, 1] for each in pruned)
    assert found.best_trial == 0


def test_callbacks_of_the_user_are_called_too() -> None:
    seen: list[int] = []
    search(n_trials=2, callbacks=[lambda step, problem: seen.append(step.step)])
    assert seen == [0, 1, 2, 0, 1, 2]


@hi.knob("scale", CategoricalDistribution([1.0, float("inf")]))
def sometimes_infinite(*, scale: float) -> hi.BilevelProblem:
    def outer(model: nn.Module, batch: Batch) -> Tensor:
        return validation_loss(model, batch) * scale

    return ridge(validation_loss=outer)


def test_failed_trials_are_recorded_with_their_reason_and_the_search_goes_on() -> None:
    seen: list[tuple[TrialState, float | None]] = []
    found = search(
        sometimes_infinite,
        n_trials=8,
        sampler=optuna.samplers.RandomSampler(seed=0),
        on_trial=lambda each: seen.append((each.state, each.value)),
    )
    states = {trial.params["scale"]: trial.state for trial in found.study.trials}
    assert states == {1.0: TrialState.COMPLETE, float("inf"): TrialState.FAIL}
    assert len(seen) == 8
    assert (TrialState.FAIL, None) in seen
    for trial in found.study.trials:
        if trial.state is TrialState.FAIL:
            assert trial.user_attrs["failure"].startswith("validation_loss must be finite at the start; it is inf")
    assert found.best_knobs == {"scale": 1.0}


def test_search_in_which_every_trial_failed_says_why() -> None:
    @hi.knob("scale", CategoricalDistribution([float("inf")]))
    def always_infinite(*, scale: float) -> hi.BilevelProblem:
        return sometimes_infinite(scale=scale)

    with pytest.raises(hi.SearchError) as caught:
        search(always_infinite, n_trials=2)
    assert str(caught.value).startswith(
        "a search needs at least one completed trial; of 2 none was. The last failure: trial 1: validation_loss must "
        "be finite at the start; it is inf on the first batch."
    )


def test_failure_of_a_hypergradient_fails_its_trial_only() -> None:
    backend = {"name": "neumann", "step_size": CategoricalDistribution([0.1, 100.0])}
    found = search(
        backend=backend, n_trials=8, sampler=optuna.samplers.RandomSampler(seed=0), on_failure="raise", inner_steps=20
    )
    states = {trial.params["backend.step_size"]: trial.state for trial in found.study.trials}
    assert states == {0.1: TrialState.COMPLETE, 100.0: TrialState.FAIL}


def test_problem_that_can_never_work_ends_the_search_at_once() -> None:
    @hi.knob("lr", FloatDistribution(0.1, 0.6))
    def wrong(*, lr: float) -> Any:
        return "no problem"

    with pytest.raises(hi.SearchError, match="wrong must return a BilevelProblem; it returned str"):
        search(wrong, storage=SQLITE, study_name="decays")
    assert optuna.get_all_study_summaries(SQLITE) == []  # refused before there is anything to refuse


def test_interrupted_trial_is_put_back() -> None:
    def interrupt(step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(storage=SQLITE, study_name="decays", callbacks=[interrupt])
    first, again = optuna.load_study(storage=SQLITE, study_name="decays").trials
    assert (first.state, again.state) == (TrialState.FAIL, TrialState.WAITING)
    found = search(storage=SQLITE, study_name="decays", n_trials=1)
    assert (found.best_trial, found.best_knobs) == (1, first.params)
    assert found.best_validation_loss == search(n_trials=1).best_validation_loss  # with the first trial's seed


# ----------------------------------------------------------------------------------------------------------- tracking


def test_search_is_one_run_with_one_nested_run_a_trial(workplace: Path) -> None:
    tracking = hi.Tracking(system_metrics=False, run_name="decays", tags={"data": "ridge"}, params={"fold": 1})
    found = search(n_trials=2, tracking=tracking)
    client = MlflowClient(tracking_uri=f"sqlite:///{workplace}/mlflow.db")
    experiment = client.get_experiment_by_name("hyperopt_implicit")
    runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    parent = runs.pop(str(found.run_id))
    assert parent.info.status == "FINISHED"
    assert parent.info.run_name == "decays"
    assert parent.data.params["knob.lr"] == str(FloatDistribution(0.1, 0.6))
    assert parent.data.params["n_trials"] == "2"
    assert parent.data.tags["best_trial"] == str(found.best_trial)
    assert [each.path for each in client.list_artifacts(str(found.run_id))] == ["best_trial", "figures", "trials.csv"]
    values = [
        (each.step, each.value) for each in client.get_metric_history(str(found.run_id), "search/validation_loss")
    ]
    assert values == [(trial.number, trial.value) for trial in found.study.trials]
    assert len(runs) == 2
    for trial in found.study.trials:
        run = runs[trial.user_attrs["run_id"]]
        assert run.data.tags["mlflow.parentRunId"] == found.run_id
        assert run.info.run_name == f"decays-{trial.number}"
        assert run.data.params["trial"] == str(trial.number)
        assert run.data.params["knob.lr"] == str(trial.params["lr"])
        assert run.data.params["fold"] == "1"
        assert run.data.tags["data"] == "ridge"
        assert run.data.metrics["summary/best_validation_loss"] == trial.value


def test_failed_search_ends_its_run(workplace: Path) -> None:
    def fail(step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        search(n_trials=2, tracking=hi.Tracking(system_metrics=False), callbacks=[fail])
    client = MlflowClient(tracking_uri=f"sqlite:///{workplace}/mlflow.db")
    experiment = client.get_experiment_by_name("hyperopt_implicit")
    assert [run.info.status for run in client.search_runs([experiment.experiment_id])] == ["FAILED", "FAILED"]


def test_training_loss_of_the_builder_is_tuned_inside_each_trial() -> None:
    found = search(n_trials=2, outer_lr=0.1)
    assert found.best_result is not None
    assert found.best_result.hyperparameters["decay"].item() != 1.0
