"""Workers of one study: who runs which trial, how many are left, and what becomes of those that are given back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.study import Study
from optuna.trial import TrialState

from hyperopt_implicit import workers
from hyperopt_implicit.optuna_warnings import accepting_experimental
from hyperopt_implicit.places import counted, origin, visible_trials
from hyperopt_implicit.processes import identity
from hyperopt_implicit.storages import open_storage
from hyperopt_implicit.workers import claim, give_back

from .study_workers import KINDS, KNOBS, assert_shared, at_once, run, states, url_of


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return url_of(request.param, tmp_path, request)


@pytest.fixture(params=["memory", *KINDS])
def study(request: pytest.FixtureRequest, tmp_path: Path) -> Study:
    storage = open_storage(None if request.param == "memory" else url_of(request.param, tmp_path, request))
    return optuna.create_study(storage=storage, study_name="shared", sampler=optuna.samplers.RandomSampler(seed=0))


# --------------------------------------------------------------------------------------------------------- claiming


def test_a_study_gets_as_many_trials_as_were_asked_for(study: Study) -> None:
    assert run(study, 5) == [0, 1, 2, 3, 4]
    assert counted(study) == 5
    assert run(study, 5) == []
    assert run(study, 7) == [5, 6]


def test_a_claimed_trial_has_its_knobs_and_its_worker(study: Study) -> None:
    trial = claim(study, KNOBS, 1)
    assert trial is not None
    kept = study.get_trials()[0]
    assert kept.state is TrialState.RUNNING
    assert kept.distributions == KNOBS
    assert kept.params == trial.params
    assert kept.user_attrs == {"worker": identity()}


def test_a_claimed_trial_draws_what_ask_would_draw() -> None:
    asked, claimed = (optuna.create_study(sampler=optuna.samplers.TPESampler(seed=3)) for _ in range(2))
    for _ in range(15):
        one, other = asked.ask(KNOBS), claim(claimed, KNOBS, 15)
        assert other is not None and other.params == one.params
        for study, trial in ((asked, one), (claimed, other)):
            study.tell(trial, trial.params["lr"])


def test_the_sampler_sees_the_trials_that_were_claimed_just_before() -> None:
    seen = []

    class Sampler(optuna.samplers.RandomSampler):
        def sample_independent(self, study: Any, *args: Any) -> Any:
            seen.append(len(study._get_trials(deepcopy=False, use_cache=True)))
            return super().sample_independent(study, *args)

    study = optuna.create_study(sampler=Sampler())
    for _ in range(3):
        claim(study, {"lr": KNOBS["lr"]}, 3)
    assert seen == [1, 2, 3]


def test_running_trials_count_for_those_who_claim(study: Study) -> None:
    assert claim(study, KNOBS, 2) is not None
    assert claim(study, KNOBS, 2) is not None
    assert claim(study, KNOBS, 2) is None
    assert counted(study) == 0


def test_failed_and_pruned_trials_count(study: Study) -> None:
    for state in (TrialState.FAIL, TrialState.PRUNED):
        trial = claim(study, KNOBS, 3)
        assert trial is not None
        study.tell(trial, state=state)
    assert counted(study) == 2
    assert run(study, 3) == [2]


def test_two_workers_run_no_waiting_trial_twice(url: str, tmp_path: Path) -> None:
    study = optuna.create_study(storage=open_storage(url), study_name="shared")
    for number in range(40):
        study.enqueue_trial({"lr": 0.01 + number / 100, "width": 64})
    ran = at_once(url, 40, tmp_path)
    assert_shared(open_storage(url), ran, 40)
    ended = study.get_trials(states=(TrialState.COMPLETE,))
    assert sorted(each.params["lr"] for each in ended) == [0.01 + number / 100 for number in range(40)]


def begun_by_another(study: Study) -> Callable[[], None]:
    """Begin a trial the moment before this process does."""
    storage = study._storage
    create = storage.create_new_trial

    def create_second(*args: Any, **options: Any) -> int:
        storage.create_new_trial = create  # type: ignore[method-assign]
        create(study._study_id)
        return create(*args, **options)

    def arm() -> None:
        storage.create_new_trial = create_second  # type: ignore[method-assign]

    return arm


def test_the_second_of_two_that_take_the_last_place_gives_it_back(study: Study) -> None:
    claim(study, KNOBS, 2)
    begun_by_another(study)()
    assert claim(study, KNOBS, 2) is None
    assert states(study) == [TrialState.RUNNING, TrialState.RUNNING, TrialState.FAIL]
    surplus = study.get_trials()[2]
    assert surplus.user_attrs["surplus"]
    assert [each.number for each in visible_trials(study)] == [0, 1]
    study.tell(0, 1.0)
    study.tell(1, 1.0)
    assert counted(study) == 2


def test_a_surplus_trial_costs_no_place(study: Study) -> None:
    claim(study, KNOBS, 2)
    begun_by_another(study)()
    claim(study, KNOBS, 2)
    assert run(study, 5) == [3, 4, 5]


def test_what_waits_in_a_queue_beyond_the_last_place_stays_there(study: Study) -> None:
    for number in range(4):
        study.enqueue_trial({"lr": (number + 1) / 10})
    assert run(study, 2) == [0, 1]
    assert states(study)[2:] == [TrialState.WAITING] * 2
    assert run(study, 4) == [2, 3]
    assert [each.params["lr"] for each in study.trials] == [0.1, 0.2, 0.3, 0.4]


def test_a_surplus_trial_from_the_queue_goes_back_into_it(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    run(study, 2)
    study.enqueue_trial({"lr": 0.25})
    place = workers._has_place
    answers = iter([True])  # what somebody sees who has looked too early
    monkeypatch.setattr(workers, "_has_place", lambda *args: next(answers, None) or place(*args))
    assert claim(study, KNOBS, 2) is None
    assert states(study)[2:] == [TrialState.FAIL, TrialState.WAITING]
    assert run(study, 3) == [3]
    assert study.trials[3].params["lr"] == 0.25


# ------------------------------------------------------------------------------------------------ giving trials back


def test_an_interrupted_trial_is_repeated_with_its_knobs(study: Study) -> None:
    claimed = claim(study, KNOBS, 1)
    assert claimed is not None
    give_back(study, claimed)
    first = study.trials[0]
    assert first.state is TrialState.FAIL and first.user_attrs["failure"] == "interrupted"
    assert counted(study) == 0
    again = claim(study, KNOBS, 1)
    assert again is not None
    assert again.number == 1 and origin(again) == 0
    assert again.params == claimed.params
    study.tell(again, 1.0)
    second = study.trials[1]
    assert second.params == first.params and second.distributions == KNOBS
    assert second.user_attrs["retry_of"] == 0
    assert counted(study) == 1
    assert run(study, 1) == []


def test_optuna_knows_what_repeats_what(study: Study) -> None:
    for _ in range(3):
        claimed = claim(study, KNOBS, 1)
        assert claimed is not None
        give_back(study, claimed)
    with accepting_experimental():
        first = RetryHeartbeatStaleTrialCallback.retried_trial_number(study.trials[3])
        history = RetryHeartbeatStaleTrialCallback.retry_history(study.trials[3])
    assert first == origin(study.trials[3]) == 0
    assert history == [0, 1, 2]


def test_a_trial_that_is_not_to_be_repeated_leaves_its_place(study: Study) -> None:
    claimed = claim(study, KNOBS, 2)
    assert claimed is not None
    give_back(study, claimed, reason="ValueError: of somebody", again=False)
    assert states(study) == [TrialState.FAIL]
    assert study.trials[0].user_attrs["failure"] == "ValueError: of somebody"
    assert run(study, 2) == [1, 2]
    assert counted(study) == 2


def test_a_repeated_trial_that_is_given_up_leaves_its_place(study: Study) -> None:
    for again in (True, False):
        claimed = claim(study, KNOBS, 1)
        assert claimed is not None
        give_back(study, claimed, again=again)
    assert run(study, 1) == [2]
    assert counted(study) == 1


def test_a_trial_that_has_ended_is_not_given_back(study: Study) -> None:
    claimed = claim(study, KNOBS, 1)
    assert claimed is not None
    study.tell(claimed, 1.0)
    give_back(study, claimed)
    assert states(study) == [TrialState.COMPLETE]
    assert counted(study) == 1


def test_a_trial_whose_sampler_fails_leaves_its_place() -> None:
    class Sampler(optuna.samplers.RandomSampler):
        def sample_independent(self, *args: Any) -> Any:
            raise RuntimeError("no idea")

    study = optuna.create_study(sampler=Sampler())
    with pytest.raises(RuntimeError, match="no idea"):
        claim(study, KNOBS, 1)
    study.sampler = optuna.samplers.RandomSampler()
    assert run(study, 1) == [1]


def test_knobs_that_somebody_has_chosen_are_kept_when_a_trial_is_repeated(study: Study) -> None:
    study.enqueue_trial({"lr": 0.125, "width": 128})
    claimed = claim(study, {}, 1)  # interrupted before any knob was drawn
    assert claimed is not None
    give_back(study, claimed)
    again = claim(study, KNOBS, 1)
    assert again is not None
    assert (again.params["lr"], again.params["width"]) == (0.125, 128)
