"""What search must not lose, mix or hide: errors half-way, models that cannot be kept, studies that others change."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

import hyperopt_implicit as hi

from .ridge import ridge
from .test_search import SQLITE, builder, search
from .test_search_goals import refused


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_name_of_a_knob_that_is_the_backends() -> None:
    @hi.knob("backend", CategoricalDistribution(["torch", "jax"]))
    def odd(*, backend: str) -> hi.BilevelProblem:
        return ridge()

    assert refused(odd) == (
        "a knob 'backend' is taken for the backend's, which is searched by backend=; rename the knob of 'odd'."
    )


@pytest.mark.filterwarnings("ignore:Choices for a categorical distribution")
def test_choices_that_a_storage_would_change() -> None:
    @hi.knob("sizes", CategoricalDistribution([(1, 2), (3,)]))
    def odd(*, sizes: Any) -> hi.BilevelProblem:
        return ridge()

    assert refused(odd) == (
        "the choices of a knob must be None, bool, int, float or str, which every storage gives back as they were; "
        "knob 'sizes' has (1, 2). Let the builder look it up by a name."
    )


def test_sampler_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperopt_implicit.studies.find_spec", lambda name: None)
    assert refused(builder, sampler="cmaes") == ("sampler 'cmaes' needs the package cmaes: `pip install cmaes`.")


def test_errors_of_objectives_and_constraints_are_caught_too() -> None:
    def boom(result: hi.Result) -> float:
        raise ZeroDivisionError("boom")

    with pytest.raises(hi.SearchError, match="The last failure: trial 1: boom"):
        search(n_trials=2, objectives=[boom], catch=[ZeroDivisionError])
    with pytest.raises(hi.SearchError, match="The last failure: trial 1: boom"):
        search(n_trials=2, constraints={"boom": boom}, catch=[ZeroDivisionError])
    with pytest.raises(ZeroDivisionError):
        search(n_trials=2, objectives=[boom])


def test_builder_that_fails_at_one_value_only_is_no_reason_not_to_begin() -> None:
    @hi.knob("k", IntDistribution(1, 3))
    def middle(*, k: int) -> hi.BilevelProblem:
        if k == 2:
            raise ZeroDivisionError
        return ridge()

    found = search(middle, sampler="brute_force", n_trials=3, catch=[ZeroDivisionError])
    assert {each.params["k"]: each.state for each in found.study.trials} == {
        1: TrialState.COMPLETE,
        2: TrialState.FAIL,
        3: TrialState.COMPLETE,
    }


@pytest.mark.parametrize("n_trials", [2, 5])
def test_search_ends_where_there_is_nothing_more_to_try(n_trials: int) -> None:
    @hi.knob("k", IntDistribution(1, 2))
    def two(*, k: int) -> hi.BilevelProblem:
        return ridge()

    seen: list[int] = []
    found = search(two, sampler="brute_force", n_trials=n_trials, on_trial=lambda each: seen.append(each.number))
    assert seen == [0, 1]
    assert {each.params["k"] for each in found.study.trials} == {1, 2}
    space = {"lr": [0.1, 0.6], "momentum": [0.0]}
    found = search(sampler=optuna.samplers.GridSampler(space), n_trials=n_trials)
    assert len(found.study.trials) == 2


def test_problem_that_draws_when_it_is_built_is_built_again_as_it_was() -> None:
    @hi.knob("lr", FloatDistribution(0.1, 0.6))
    def random(*, lr: float) -> hi.BilevelProblem:
        x = torch.randn(40, 3, dtype=torch.float64)
        return ridge(validation_data=[(x, x.sum(1))])

    found = search(random, storage=SQLITE, study_name="drawn", n_trials=3, seed=5)
    best = hi.load_best(random, "drawn", storage=SQLITE)
    (batch,) = best.problem.validation_data
    assert float(best.problem.validation_loss(batch)) == pytest.approx(found.best_validation_loss, rel=1e-6)


class _FullDisk:
    """An artifact store that takes one file."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.writes = 0

    def open_reader(self, artifact_id: str) -> Any:
        return io.BytesIO(self.files[artifact_id])

    def write(self, artifact_id: str, content_body: Any) -> None:
        self.writes += 1
        if self.writes > 1:
            raise OSError(28, "No space left on device")
        self.files[artifact_id] = content_body.read()

    def remove(self, artifact_id: str) -> None:
        del self.files[artifact_id]


def test_model_stays_where_a_better_one_cannot_be_kept() -> None:
    store = _FullDisk()
    losses = iter([3.0, 2.0, 1.0])

    def falling(result: hi.Result) -> float:
        return next(losses)

    with pytest.warns(hi.HyperoptWarning, match=r"the model of trial \d could not be kept"):
        search(n_trials=3, objectives=[falling], artifacts=store)
    assert (store.writes, len(store.files)) == (3, 1)


def test_training_that_came_to_nothing_fails_its_trial() -> None:
    @hi.knob("lr", CategoricalDistribution([0.1, 1e30]))
    def odd(*, lr: float) -> hi.BilevelProblem:
        return ridge(optimizer=lambda params: torch.optim.SGD(params, lr=lr))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hi.HyperoptWarning)
        found = search(odd, sampler="brute_force", n_trials=2, outer_steps=20, max_failures=5)
    states = {each.params["lr"]: each.state for each in found.study.trials}
    assert states == {0.1: TrialState.COMPLETE, 1e30: TrialState.FAIL}
    (failure,) = (each.user_attrs["failure"] for each in found.study.trials if each.state is TrialState.FAIL)
    assert failure.startswith("training ended at outer step ")


def test_trial_that_somebody_else_has_ended_is_left_alone() -> None:
    def end_it(step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        study = optuna.load_study(storage=SQLITE, study_name="taken")
        if step.step == 1 and len(study.trials) == 1:
            study._storage.set_trial_state_values(study.trials[0]._trial_id, TrialState.FAIL)

    with pytest.warns(hi.HyperoptWarning, match="trial 0 was ended by somebody else while it ran here"):
        found = search(storage=SQLITE, study_name="taken", n_trials=3, callbacks=[end_it], report_every=1)
    assert [each.state for each in found.study.trials] == [TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]


def test_other_settings_of_a_study_are_said() -> None:
    search(storage=SQLITE, study_name="settings", n_trials=1)
    with pytest.warns(hi.HyperoptWarning, match=r"\(outer_steps: was 3, is 4\)"):
        search(storage=SQLITE, study_name="settings", n_trials=2, outer_steps=4)


def test_missing_model_is_no_reason_not_to_go_on() -> None:
    options: dict[str, Any] = {"storage": SQLITE, "study_name": "warm", "warm_start_hyperparameters": True}
    search(n_trials=1, **options)
    (file,) = Path("optuna.artifacts").iterdir()
    file.unlink()
    with pytest.warns(hi.HyperoptWarning, match="a trial could not start from the hyperparameters of trial 0"):
        found = search(n_trials=2, **options)
    assert len(found.study.trials) == 2


def test_trials_that_ended_well_are_told_before_an_error_ends_the_search() -> None:
    def once(result: hi.Result) -> float:
        calls.append(1)
        if len(calls) == 2:
            raise TypeError("a typing mistake")
        return result.best_validation_loss

    calls: list[int] = []
    with pytest.raises(TypeError):
        search(storage=SQLITE, study_name="mistake", n_trials=4, population=4, objectives=[once])
    states = [each.state for each in optuna.load_study(storage=SQLITE, study_name="mistake").trials]
    assert states == [TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]


def test_claimed_trials_are_given_back_where_a_later_claim_fails() -> None:
    class Failing(optuna.samplers.RandomSampler):
        def sample_independent(self, study: Any, trial: Any, *args: Any) -> Any:
            if trial.number == 2:
                raise TypeError("a sampler's mistake")
            return super().sample_independent(study, trial, *args)

    with pytest.raises(TypeError):
        search(storage=SQLITE, study_name="claims", n_trials=4, population=4, sampler=Failing(seed=0))
    trials = optuna.load_study(storage=SQLITE, study_name="claims").trials
    assert not [each for each in trials if each.state is TrialState.RUNNING]


def test_study_that_is_deleted_while_it_is_searched() -> None:
    def delete(step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        if step.step == 1:
            optuna.delete_study(study_name="deleted", storage=SQLITE)

    with pytest.raises(hi.SearchError) as caught:
        search(storage=SQLITE, study_name="deleted", n_trials=3, callbacks=[delete])
    assert str(caught.value).startswith("the storage 'sqlite:///optuna.db' no longer takes what a search has to tell (")
