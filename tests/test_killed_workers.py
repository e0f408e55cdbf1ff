"""Workers that are killed: it is noticed, and their trials are run again, once."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import BaseStorage, RDBStorage
from optuna.study import Study
from optuna.trial import TrialState, create_trial

from hyperopt_implicit import heartbeats, processes, retries, workers
from hyperopt_implicit.heartbeats import Heartbeat
from hyperopt_implicit.optuna_warnings import accepting_experimental
from hyperopt_implicit.places import GONE_ON_FROM, counted, is_lost, origin
from hyperopt_implicit.processes import identity, lives
from hyperopt_implicit.retries import MAX_RETRIES
from hyperopt_implicit.storages import open_storage
from hyperopt_implicit.workers import claim, give_back, reclaim

from .study_workers import KINDS, KNOBS, at_once, hanging, run, states, url_of


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return url_of(request.param, tmp_path, request)


@pytest.fixture(params=["memory", *KINDS])
def study(request: pytest.FixtureRequest, tmp_path: Path) -> Study:
    storage = open_storage(None if request.param == "memory" else url_of(request.param, tmp_path, request))
    return optuna.create_study(storage=storage, study_name="shared", sampler=optuna.samplers.RandomSampler(seed=0))


def test_a_killed_worker_s_trial_is_repeated_at_once(url: str, tmp_path: Path) -> None:
    storage = open_storage(url)
    study = optuna.create_study(storage=storage, study_name="shared")
    with hanging(url, tmp_path) as (process, number):
        assert reclaim(study) == []
        process.send_signal(signal.SIGKILL)
        while lives(study.trials[number].user_attrs["worker"]) is not False:  # the signal is on its way
            time.sleep(0.01)
        assert reclaim(study) == [number]
        assert reclaim(study) == []
    lost = study.trials[number]
    assert lost.state is TrialState.FAIL
    assert lost.user_attrs["failure"] == "its worker was killed"
    assert lost.user_attrs["lost"] is True
    again = claim(study, {}, 10)
    assert again is not None
    assert again.params == lost.params
    assert origin(again) == number


def test_two_workers_share_a_study_and_the_trial_of_a_killed_one(url: str, tmp_path: Path) -> None:
    with hanging(url, tmp_path, n_trials=40) as (process, _):
        process.kill()
        process.wait()
    ran = at_once(url, 40, tmp_path)
    study = optuna.load_study(storage=open_storage(url), study_name="shared")
    complete = [each for each in study.trials if each.state is TrialState.COMPLETE]
    assert len(complete) == counted(study) == 40
    assert sorted(number for each in ran for number in each) == [each.number for each in complete]
    assert [origin(each) for each in complete if origin(each) != each.number] == [0]


def dead() -> dict[str, Any]:
    """A process that has ended."""
    process = subprocess.Popen(["true"])
    gone = {**identity(), "pid": process.pid, "started": -1.0}
    process.wait()
    return gone


def add_running(study: Study, worker: dict[str, Any] | None) -> int:
    attributes = {} if worker is None else {"worker": worker}
    study.add_trial(create_trial(state=TrialState.RUNNING, user_attrs=attributes, params={}, distributions={}))
    return study.get_trials(deepcopy=False)[-1].number


def test_to_claim_is_to_reclaim(study: Study) -> None:
    number = add_running(study, dead())
    again = claim(study, {}, 1)
    assert again is not None and origin(again) == number


def test_a_pid_that_is_used_again_is_another_process(study: Study) -> None:
    add_running(study, identity())
    number = add_running(study, {**identity(), "started": identity()["started"] - 1})
    assert reclaim(study) == [number]


def test_a_process_that_has_ended_and_was_not_waited_for_is_gone() -> None:
    with subprocess.Popen(["true"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read()
        until = time.monotonic() + 60
        while lives({**identity(), "pid": process.pid, "started": None}) is not False and time.monotonic() < until:
            time.sleep(0.01)
        assert process.returncode is None  # nobody has asked
        assert lives({**identity(), "pid": process.pid, "started": None}) is False


@pytest.mark.parametrize("name", ["host", "machine", "namespace"])
def test_of_processes_elsewhere_nothing_is_known(name: str) -> None:
    assert lives(dead()) is False
    assert lives({**dead(), name: "another"}) is None


def test_a_machine_that_was_started_anew_has_none_of_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {**processes._surroundings(), "machine": "abc"}
    monkeypatch.setattr(processes, "_surroundings", lambda: here)
    assert lives(identity())
    assert lives({**identity(), "boot": "before"}) is False
    here["machine"] = None  # a namesake can be on another machine
    assert lives({**identity(), "boot": "before"}) is None


def test_without_proc_a_process_is_known_by_its_pid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "Path", lambda path: Path("/nowhere", path.lstrip("/")))
    assert lives(identity())
    assert lives(dead()) is False
    monkeypatch.setattr(processes, "find_spec", lambda name: None)
    assert identity()["started"] is None
    assert lives(identity())
    assert lives({**dead(), "started": None}) is False


def short_heartbeats(url: str) -> BaseStorage:
    with accepting_experimental():
        return RDBStorage(url, heartbeat_interval=1, grace_period=2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_on_another_host_is_gone_when_its_heart_stops(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = url_of(kind, tmp_path, request)
    storage = open_storage(url)
    monkeypatch.setattr(heartbeats, "HEARTBEAT_SECONDS", 1)
    monkeypatch.setattr(heartbeats, "GRACE_SECONDS", 2)
    if kind != "journal":
        storage = short_heartbeats(url)
    study = optuna.create_study(storage=storage, study_name="shared")
    elsewhere = {**dead(), "host": "elsewhere"}
    with monkeypatch.context() as there:
        for module in (workers, heartbeats):
            there.setattr(module, "identity", lambda: elsewhere)
        alive, stopped = claim(study, KNOBS, 3), claim(study, KNOBS, 3)
        assert alive is not None and stopped is not None
        beating = Heartbeat(study, alive)
        beating.__enter__()
    assert reclaim(study) == []
    until = time.monotonic() + 60
    given_up: list[int] = []
    while not given_up and time.monotonic() < until:
        time.sleep(0.2)
        given_up = reclaim(study)
    assert given_up == [stopped.number]
    time.sleep(2.5)
    assert reclaim(study) == []
    study.tell(alive, 1.0)
    beating.__exit__(None, None, None)
    assert study.trials[stopped.number].user_attrs["failure"] == "its worker was killed"
    again = claim(study, {}, 3)
    assert again is not None and again.params == stopped.params
    if isinstance(storage, RDBStorage):
        storage.engine.dispose()


def test_a_worker_that_is_seen_alive_may_be_silent(tmp_path: Path) -> None:
    """As one is that was asleep together with its machine."""
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    open_storage(url)
    storage = short_heartbeats(url)
    study = optuna.create_study(storage=storage)
    trial = claim(study, KNOBS, 1)
    assert trial is not None
    until = time.monotonic() + 60
    while not study._storage._get_stale_trial_ids(study._study_id) and time.monotonic() < until:  # type: ignore[attr-defined]
        time.sleep(0.2)
    assert reclaim(study) == []
    assert states(study) == [TrialState.RUNNING]
    storage.engine.dispose()  # type: ignore[attr-defined]


def test_databases_have_heartbeats(tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path / 'studies.db'}")
    assert isinstance(storage, RDBStorage)
    assert storage.get_heartbeat_interval() is not None
    study = optuna.create_study(storage=storage)
    claim(study, KNOBS, 1)
    with storage.engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM trial_heartbeats").scalar() == 1


def test_a_heart_beats_on_where_the_database_is_away_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    study = optuna.create_study()
    trial = claim(study, KNOBS, 1)
    assert trial is not None
    beats = []

    def beat(*args: Any) -> None:
        beats.append(len(beats))
        if len(beats) < 3:
            raise ConnectionError("away")

    monkeypatch.setattr(heartbeats, "_interval", lambda study: 0.01)
    monkeypatch.setattr(heartbeats, "beat", beat)
    with Heartbeat(study, trial):
        until = time.monotonic() + 60
        while len(beats) < 4 and time.monotonic() < until:
            time.sleep(0.01)
    assert len(beats) >= 4
    at_the_end = len(beats)
    time.sleep(0.1)
    assert len(beats) == at_the_end


def test_a_trial_that_never_got_its_mark_is_given_up_after_a_while(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = add_running(study, None)
    assert reclaim(study) == []
    monkeypatch.setattr(workers, "_UNMARKED", workers._UNMARKED * 0)
    assert reclaim(study) == [number]


def test_a_trial_that_kills_its_workers_counts_as_failed_in_the_end(study: Study) -> None:
    add_running(study, dead())
    for number in range(MAX_RETRIES):
        assert reclaim(study) == [number]
        trial = claim(study, {}, 1)
        assert trial is not None
        trial.set_user_attr("worker", dead())
    assert reclaim(study) == [MAX_RETRIES]
    last = study.trials[-1]
    assert last.number == MAX_RETRIES
    assert last.user_attrs["failure"] == "its worker was killed, 4 times"
    assert counted(study) == 1
    assert claim(study, {}, 1) is None


def test_a_trial_that_gets_further_is_run_until_it_ends(study: Study) -> None:
    """What kills it is the machine, not the trial."""
    add_running(study, dead())
    for number in range(3 * MAX_RETRIES):
        assert reclaim(study) == [number]
        trial = claim(study, {}, 1)
        assert trial is not None
        trial.set_user_attr(GONE_ON_FROM, 10 * (number // 2))  # every other time
        trial.set_user_attr("worker", dead())
    reclaim(study)
    assert is_lost(study.trials[3 * MAX_RETRIES])
    assert claim(study, {}, 1) is not None


def test_interruptions_are_no_kills(study: Study) -> None:
    for _ in range(2 * MAX_RETRIES):
        trial = claim(study, {}, 1)
        assert trial is not None
        give_back(study, trial)
    trial = claim(study, {}, 1)
    assert trial is not None
    trial.set_user_attr("worker", dead())
    reclaim(study)
    assert claim(study, {}, 1) is not None


def test_what_a_killed_worker_had_not_put_in_the_queue_is_put_there(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = claim(study, KNOBS, 1)
    assert trial is not None
    with monkeypatch.context() as patched:
        patched.setattr(retries, "repeat", lambda *args: None)
        give_back(study, trial)
    assert claim(study, KNOBS, 1) is None  # it may be on its way
    monkeypatch.setattr(retries, "_UNREPEATED", retries._UNREPEATED * 0)
    again = claim(study, KNOBS, 1)
    assert again is not None and again.params == trial.params


def test_a_trial_that_was_put_in_the_queue_twice_is_repeated_once(study: Study) -> None:
    trial = claim(study, KNOBS, 2)
    assert trial is not None
    give_back(study, trial)
    retries.repeat(study, study.trials[0])
    assert run(study, 2) == [1, 3]
    assert counted(study) == 2
    assert study.trials[2].user_attrs["surplus"]


def test_a_worker_that_was_taken_for_dead_keeps_what_it_has_told(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = claim(study, KNOBS, 1)
    assert trial is not None
    end = retries.end

    def told_before(*args: Any) -> bool:
        study.tell(trial, 1.0)
        return end(*args)

    monkeypatch.setattr(retries, "end", told_before)
    monkeypatch.setattr(workers, "lives", lambda worker: False)
    assert reclaim(study) == []
    assert states(study) == [TrialState.COMPLETE]
    assert counted(study) == 1
    assert claim(study, KNOBS, 1) is None


def test_a_mark_fits_into_a_database() -> None:
    assert len(str(identity())) < 1000
    assert identity()["pid"] == os.getpid()
