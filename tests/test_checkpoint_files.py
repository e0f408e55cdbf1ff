"""What else may be in a folder of checkpoints, and what file systems do: none of it costs a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch

import hyperopt_implicit as hi
from hyperopt_implicit.checkpoint import Checkpoints

from .resumable import train
from .test_checkpoint import names, refused, saved


def test_old_one_that_cannot_be_removed_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = saved(tmp_path, 1, 2)

    def refuse(path: Path, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    assert kept.save({"steps": 3}, 3)
    monkeypatch.undo()
    kept.save({"steps": 4}, 4)
    assert names(tmp_path) == ["step-000000002.pt", "step-000000003.pt", "step-000000004.pt"]


def test_file_that_may_be_lost_with_the_power_is_not_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing takes most of the time, and a trial is saved after each of its steps."""
    monkeypatch.setattr(os, "fsync", lambda handle: pytest.fail("it was flushed"))
    Checkpoints(tmp_path, durable=False).begin({"steps": 0})
    assert names(tmp_path) == ["step-000000000.pt"]


def test_files_with_other_names_are_neither_read_nor_removed(tmp_path: Path) -> None:
    others = ["my step-000000009.pt", "step-000000008.pt.bak", "step-7.pt", ".step-000000006.pt.4711"]
    kept = saved(tmp_path, 1, 2)
    for each in others:
        torch.save({"steps": 9}, tmp_path / each)
    kept.save({"steps": 3}, 3)
    found = kept.newest()
    assert found is not None and found.state == {"steps": 3}
    assert set(others) < set(names(tmp_path))


def test_file_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    torch.save([torch.zeros(2)], tmp_path / "step-000000001.pt")
    refused(r"step-000000001.pt cannot be read \(.*it holds a list", tmp_path, resume=True)


def test_full_disk_that_torch_finds_as_it_closes_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It raises an error of its own then, with the system's behind it."""
    kept = saved(tmp_path)

    def save(*args: Any) -> None:
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", save)
    with pytest.warns(hi.HyperoptWarning, match=r"could not be written to after outer step 0 \(.*No space left on dev"):
        assert not kept.save({"steps": 1}, 1)
    assert names(tmp_path) == ["step-000000000.pt"]


def test_folder_that_cannot_be_made_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused("checkpoints must be written to .*run, which did not work: .*Name another folder", tmp_path / "file/run")


def test_file_system_without_locks_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def acquire(*args: Any, **options: Any) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    train("identity", tmp_path, outer_steps=2)
    assert names(tmp_path)[-1] == "step-000000002.pt"
