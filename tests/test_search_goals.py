"""What a search is after, and by what means: objectives, constraints, samplers, pruners, failures, warm starts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from torch import nn

import hyperopt_implicit as hi
from hyperopt_implicit.reporting import Pace
from hyperopt_implicit.studies import SAMPLERS

from .ridge import ridge, training_loss
from .test_search import SQLITE, builder, drawn, search


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# --------------------------------------------------------------------------------------------- objectives, constraints


def weight_norm(result: hi.Result) -> float:
    return float(sum(p.detach().square().sum() for p in result.problem.params.values()))


def test_several_objectives_give_the_pareto_front() -> None:
    found = search(objectives=["validation_loss", weight_norm], n_trials=6)
    points = {t.number: tuple(t.values) for t in found.study.trials}

    def is_beaten(point: tuple[float, ...]) -> bool:
        return any(q != point and all(a <= b for a, b in zip(q, point, strict=True)) for q in points.values())

    front = {number for number, point in points.items() if not is_beaten(point)}
    assert {each.number for each in found.pareto_front} == front
    assert found.best_trial == min(front, key=lambda n: points[n])
    assert found.study.metric_names == ["validation_loss", "weight_norm"]
    assert all(not each.intermediate_values for each in found.study.trials)  # several values cannot be pruned by


def test_seconds_can_be_an_objective() -> None:
    found = search(objectives=["validation_loss", "seconds"], n_trials=2)
    assert all(each.values[1] > 0.0 for each in found.study.trials)


def test_best_trial_keeps_the_constraints() -> None:
    free = search(n_trials=6, sampler="random")
    values = {each.number: each.value for each in free.study.trials}
    lrs = {each.number: each.params["lr"] for each in free.study.trials}
    bound = sorted(lrs.values())[2]

    def too_fast(result: hi.Result) -> float:
        return result.problem.optimizer.param_groups[0]["lr"] - bound

    found = search(n_trials=6, sampler="random", constraints={"lr": too_fast})
    inside = [n for n in values if lrs[n] <= bound]
    assert 0 < len(inside) < 6
    assert found.best_trial == min(inside, key=lambda n: values[n])
    assert {t.number: t.constraints["lr"] for t in found.study.trials} == pytest.approx(
        {n: lr - bound for n, lr in lrs.items()}
    )


def test_no_trial_keeps_the_constraints() -> None:
    with pytest.raises(hi.SearchError) as caught:
        search(n_trials=2, constraints={"never": lambda result: 1.0})
    assert str(caught.value) == (
        "a search needs at least one completed trial that keeps the constraints; of 2 none was."
    )


def test_objective_that_is_not_finite_fails_its_trial() -> None:
    def odd(result: hi.Result) -> float:
        return math.nan if result.problem.optimizer.param_groups[0]["momentum"] else 1.0

    found = search(objectives=["validation_loss", odd], n_trials=6)
    states = {each.params["momentum"]: each.state for each in found.study.trials}
    assert states == {0.0: TrialState.COMPLETE, 0.5: TrialState.FAIL}
    assert {t.user_attrs.get("failure") for t in found.study.trials} == {None, "'odd' of its result is nan"}


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        (
            ["validation_los"],
            "an objective must be one of validation_loss, seconds, or a function of a trial's Result; got "
            "'validation_los'. Did you mean 'validation_loss'?",
        ),
        ([], "a search needs at least one objective; objectives is empty."),
        (
            [weight_norm, weight_norm],
            "each objective needs a name of its own; two are called 'weight_norm'. Rename a function.",
        ),
    ],
)
def test_objectives_are_refused(objectives: Any, message: str) -> None:
    with pytest.raises(hi.SearchError) as caught:
        search(objectives=objectives)
    assert str(caught.value) == message


def test_study_with_other_objectives_is_refused() -> None:
    search(storage=SQLITE, study_name="goals", n_trials=1)
    with pytest.raises(hi.SearchError) as caught:
        search(storage=SQLITE, study_name="goals", n_trials=2, objectives=["validation_loss", "seconds"])
    assert str(caught.value) == (
        "a search minimises 2 objectives; study 'goals' was begun elsewhere, with the directions minimize. Give the "
        "search another name."
    )
    with pytest.raises(hi.SearchError) as caught:
        search(storage=SQLITE, study_name="goals", n_trials=2, constraints={"fast": lambda result: 0.0})
    assert str(caught.value) == (
        "a study is continued with the constraints it was begun with; study 'goals' has none, and fast was asked for. "
        "Give the study another name, or put them back."
    )


# ------------------------------------------------------------------------------------------------- samplers and pruners


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"brute_force", "cmaes"}))
def test_named_samplers_draw_by_their_seed(name: str) -> None:
    once, again, other = (search(sampler=name, n_trials=4, seed=seed, outer_steps=1) for seed in (1, 1, 2))
    assert drawn(once) == drawn(again) != drawn(other)
    assert len({each["lr"] for each in drawn(once)}) > 1


def test_study_that_is_continued_draws_what_it_would_have_drawn() -> None:
    whole = search(n_trials=14, outer_steps=1)  # beyond the ten that TPE draws at random
    for trials in (3, 12, 14):
        found = search(storage=SQLITE, study_name="pieces", n_trials=trials, outer_steps=1)
    assert drawn(found) == drawn(whole)


def test_sampler_of_the_users_own_is_used_as_it_is() -> None:
    sampler = optuna.samplers.RandomSampler(seed=3)
    assert search(sampler=sampler).study.sampler is sampler


def test_unknown_sampler_and_pruner() -> None:
    with pytest.raises(hi.SearchError) as caught:
        search(sampler="tpee")
    assert str(caught.value) == (
        "sampler must be one of tpe, random, gp, cmaes, qmc, nsgaii, nsgaiii, brute_force, or an object of "
        "optuna.samplers; got 'tpee'. Did you mean 'tpe'?"
    )
    with pytest.raises(hi.SearchError) as caught:
        search(pruner="medium")
    assert str(caught.value) == (
        "pruner must be one of median, hyperband, successive_halving, none, or an object of optuna.pruners; got "
        "'medium'. Did you mean 'median'?"
    )


def test_hyperband_counts_outer_steps() -> None:
    found = search(pruner="hyperband", outer_steps=27, n_trials=12, report_every=1)
    pruner = found.study.pruner
    assert isinstance(pruner, optuna.pruners.HyperbandPruner)
    lengths = {max(each.intermediate_values) + 1 for each in found.study.trials}
    assert max(lengths) == 27
    assert min(lengths) < 27  # some were stopped


class _Study:
    def __init__(self) -> None:
        self.user_attrs: dict[str, Any] = {}

    def set_user_attr(self, name: str, value: Any) -> None:
        self.user_attrs[name] = value


@pytest.mark.parametrize(
    ("step_seconds", "report_seconds", "every"),
    [
        (1.0, 0.007, 1),  # 100 reports are .7 s of 100 s
        (0.1, 0.007, 8),  # a hundredth of 10 s is .1 s, 14 reports: every 7th step, and then a power of two
        (0.001, 0.0001, 1),  # a hundred reports in 10 ms
        (0.001, 0.005, 32),  # 10 ms are two reports; three are the least
        (0.001, 0.5, 32),
    ],
)
def test_reports_take_a_hundredth_of_a_trial(step_seconds: float, report_seconds: float, every: int) -> None:
    study: Any = _Study()
    pace = Pace(study, outer_steps=100, every=None)
    for step in range(3):
        assert pace.is_due(step)
        pace.measure(step, step_seconds, report_seconds)
    assert pace.every == study.user_attrs["report_every"] == every
    assert [step for step in range(100) if pace.is_due(step)] == list(range(every - 1, 100, every))
    assert Pace(study, outer_steps=100, every=None).every == every  # the trials to come keep to it
    assert Pace(study, outer_steps=100, every=5).every == 5


# ------------------------------------------------------------------------------------------------- what fails, and what
# ------------------------------------------------------------------------------------------------- a trial begins with


def test_errors_that_are_caught_fail_their_trial_only() -> None:
    @hi.knob("size", IntDistribution(1, 4))
    def sometimes(*, size: int) -> hi.BilevelProblem:
        if size == 2:
            raise ZeroDivisionError("two is odd here")
        return ridge()

    found = search(sometimes, n_trials=8, catch=[ZeroDivisionError], sampler="random")
    for each in found.study.trials:
        assert (each.params["size"] == 2) == (each.state is TrialState.FAIL)
        assert each.user_attrs.get("failure") == (
            "ZeroDivisionError: two is odd here" if each.params["size"] == 2 else None
        )
    assert {each.state for each in found.study.trials} == {TrialState.COMPLETE, TrialState.FAIL}
    with pytest.raises(ZeroDivisionError):
        search(sometimes, n_trials=8, sampler="random")


def test_trial_that_met_an_error_of_the_program_does_not_count() -> None:
    calls = []

    def broken(step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        calls.append(step.step)
        raise TypeError("a typing mistake")

    with pytest.raises(TypeError, match="a typing mistake"):
        search(storage=SQLITE, study_name="broken", callbacks=[broken])
    found = search(storage=SQLITE, study_name="broken", n_trials=2)
    assert [each.state for each in found.study.trials].count(TrialState.COMPLETE) == 2


def test_hyperparameters_begin_at_those_of_the_best_trial() -> None:
    starts = []

    def begin(step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        if step.step == 0:
            starts.append(dict(step.hyperparameters))

    options: dict[str, Any] = {"n_trials": 3, "callbacks": [begin], "outer_lr": 0.3}
    search(**options)
    assert starts[0] == starts[1] == starts[2]
    starts.clear()
    found = search(warm_start_hyperparameters=True, **options)
    assert starts[0] != starts[1]
    first = found.study.trials[0]
    assert first.value is not None
    alone = hi.optimize(
        builder(**first.params), "cg", outer_steps=3, inner_steps=2, outer_lr=0.3, seed=0, tracking=False
    )
    for name, value in alone.best_hyperparameters.items():
        assert isinstance(value, torch.Tensor)
        torch.testing.assert_close(torch.tensor(starts[1][name]), value.float().cpu(), rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------------------------- the best trial


@pytest.mark.parametrize("storage", [SQLITE, "journal:///studies.log"])
def test_best_trial_is_loaded_in_one_line(storage: str) -> None:
    found = search(storage=storage, study_name="decays", n_trials=4, outer_steps=5)
    best = hi.load_best(builder, "decays", storage=storage)
    assert (best.number, best.knobs) == (found.best_trial, found.best_knobs)
    assert best.values == {"validation_loss": found.best_validation_loss}
    (batch,) = best.problem.validation_data
    assert float(best.problem.validation_loss(batch)) == pytest.approx(found.best_validation_loss, rel=1e-6)
    assert found.best_result is not None
    for name, value in found.best_result.best_hyperparameters.items():
        torch.testing.assert_close(best.problem.hyperparameters.values()[name], value)
    kept = list(Path().glob("*.artifacts/*"))
    assert len(kept) == 1  # those of trials that are not best any more are gone


def test_loading_what_is_not_there() -> None:
    with pytest.raises(hi.SearchError) as caught:
        hi.load_best(builder, "decays", storage=SQLITE)
    assert "optuna.db" in str(caught.value)
    assert not Path("optuna.db").exists()
    search(storage=SQLITE, study_name="decays", n_trials=2)
    with pytest.raises(hi.SearchError) as caught:
        hi.load_best(builder, "decay", storage=SQLITE)
    assert str(caught.value) == (
        "there is no study 'decay' in 'sqlite:///optuna.db'; it has decays. Did you mean 'decays'?"
    )
    with pytest.raises(hi.SearchError, match="only the best trials of a study can be loaded; study 'decays' has "):
        hi.load_best(builder, "decays", storage=SQLITE, trial=7)
    (file,) = Path("optuna.artifacts").iterdir()
    file.write_bytes(b"no state")
    with pytest.raises(hi.SearchError) as caught:
        hi.load_best(builder, "decays", storage=SQLITE)
    assert "of study 'decays' cannot be read: " in str(caught.value)
    assert str(caught.value).endswith(
        "Only those of the best trials are kept; name the folder or store that the search had with artifacts=."
    )


# ------------------------------------------------------------------------------------------- refused before any trial


def refused(build: Any, backend: Any = "cg", **options: Any) -> str:
    with pytest.raises(hi.HyperoptError) as caught:
        search(build, backend, storage=SQLITE, study_name="never", **options)
    path = Path("optuna.db")
    assert not path.exists() or optuna.get_all_study_summaries(SQLITE) == []
    return str(caught.value)


def test_knob_that_is_a_hyperparameter_too() -> None:
    @hi.knob("decay", FloatDistribution(0.1, 1.0))
    def both(*, decay: float) -> hi.BilevelProblem:
        return ridge()

    assert refused(both) == (
        "a name is either a knob, searched by Optuna, or a hyperparameter, trained by its gradient; 'decay' is both. "
        "Keep the hyperparameter, or rename the knob where it is the hyperparameter's initial value (decay_start, "
        "say)."
    )


def test_builder_that_returns_no_problem() -> None:
    @hi.knob("lr", FloatDistribution(0.1, 1.0))
    def nothing(*, lr: float) -> Any:
        return None

    assert refused(nothing) == "nothing must return a BilevelProblem; it returned NoneType."


def test_backend_among_the_choices_that_cannot_see_a_hyperparameter() -> None:
    @hi.knob("width", IntDistribution(1, 2))
    def tuned_rate(*, width: int) -> hi.BilevelProblem:
        declared = hi.hyperparameter("lr", init=0.1, target="optimizer")(training_loss)
        return ridge(training_loss=declared)

    message = refused(tuned_rate, CategoricalDistribution(["unrolled", "cg"]))
    assert message.startswith("backend 'cg' cannot see ") or "'lr'" in message
    assert message.endswith("Leave 'cg' out of the knob 'backend'; no trial was begun.")


def test_options_that_cannot_hold() -> None:
    assert "clip" in refused(builder, clip=-1.0)
    assert "on_failure" in refused(builder, on_failure="ignore")
    assert refused(builder, population=0) == "population must be a whole number of at least 1, or 'auto'; got 0."
    assert refused(builder, timeout=-1) == "timeout must be a positive number of seconds, or None; got -1."
    assert refused(builder, report_every=0) == "report_every must be a whole number of at least 1; got 0."


def test_time_out_begins_no_further_trial() -> None:
    found = search(n_trials=50, timeout=1e-9 + 0.05)
    assert 1 <= len(found.study.trials) < 50


def test_model_is_that_of_the_best_step() -> None:
    """F rises again: what is kept is the state at the lowest, not the last."""
    found = search(storage=SQLITE, study_name="rising", n_trials=1, outer_steps=30, outer_lr=2.0, warmup_steps=20)
    assert found.best_result is not None
    last = found.best_result.validation_loss
    assert last > found.best_validation_loss * (1 + 1e-6)
    best = hi.load_best(builder, "rising", storage=SQLITE)
    assert isinstance(best.problem.model, nn.Module)
    (batch,) = best.problem.validation_data
    assert float(best.problem.validation_loss(batch)) == pytest.approx(found.best_validation_loss, rel=1e-6)
