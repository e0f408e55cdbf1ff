"""Where trials are saved while they run: which share a folder, what a checkpoint costs, and what is removed."""

from __future__ import annotations

import os
from pathlib import Path

import optuna
import pytest

from hyperopt_implicit import checkpoint
from hyperopt_implicit.places import RETRY_OF
from hyperopt_implicit.trial_checkpoints import TrialCheckpoints


def places(root: Path) -> list[str]:
    """All folders, and the files that are no locks."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.name != ".lock")


def saved(kept: TrialCheckpoints, trial: optuna.Trial, steps: int = 0) -> Path:
    """The folder of a trial, with a checkpoint in it."""
    keeper = kept.keeper(trial, {})
    assert keeper is not None
    assert keeper._checkpoints.claim() is None and keeper._checkpoints.save({"steps": steps}, steps)
    keeper.release()
    return Path(keeper.place)


def test_trial_that_repeats_another_goes_on_in_its_folder(tmp_path: Path) -> None:
    study = optuna.create_study()
    kept = TrialCheckpoints(study, tmp_path, None)
    first, other, again = study.ask(), study.ask(), study.ask()
    again.set_user_attr(RETRY_OF, first.number)
    assert saved(kept, first) == saved(kept, again) != saved(kept, other)


def test_studies_have_folders_of_their_own_whatever_they_are_called(tmp_path: Path) -> None:
    names = ["one", "two", "../up", "a/b", ".."]
    studies = [optuna.create_study(study_name=name) for name in names]
    found = {saved(TrialCheckpoints(each, tmp_path / "kept", None), each.ask()) for each in studies}
    assert len(found) == len(names)
    assert {path.parents[1] for path in found} == {tmp_path / "kept" / "running"}


def test_ended_trial_leaves_nothing_and_takes_nothing_with_it(tmp_path: Path) -> None:
    studies = [optuna.create_study(study_name=name) for name in ("one", "two")]
    kept = [TrialCheckpoints(each, tmp_path, None) for each in studies]
    trials = [(0, studies[0].ask()), (0, studies[0].ask()), (1, studies[1].ask())]
    folders = [saved(kept[i], trial) for i, trial in trials]
    for ended, (i, trial) in enumerate(trials):
        kept[i].forget(trial)
        assert [folder.exists() for folder in folders] == [j > ended for j in range(3)]
    assert places(tmp_path) == []
    kept[0].forget(trials[0][1])  # there is nothing of it


def test_checkpoints_of_a_trial_are_not_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: pytest.fail("it was flushed"))
    study = optuna.create_study()
    saved(TrialCheckpoints(study, tmp_path, None), study.ask())


@pytest.mark.parametrize(("every", "due"), [(None, [2, 3, 4]), (2, [2, 4])])
def test_trials_are_saved_after_each_step_that_takes_long_enough(
    every: int | None, due: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now)
    study = optuna.create_study()
    keeper = TrialCheckpoints(study, tmp_path, every).keeper(study.ask(), {})
    assert keeper is not None
    found = []
    for steps in range(1, 5):
        now += 0.1 if steps == 1 else 0.25
        if keeper._checkpoints.is_due(steps):
            found.append(steps)
            keeper._checkpoints._last = now
    assert found == due


def test_without_a_folder_nothing_is_saved() -> None:
    study = optuna.create_study()
    kept = TrialCheckpoints(study, None, 1)
    trial = study.ask()
    assert kept.keeper(trial, {}) is None
    kept.forget(trial)
