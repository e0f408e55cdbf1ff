"""Checkpoints in their folder: which stay, which is read, what is refused, and what a fault costs."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import hyperopt_implicit as hi
from hyperopt_implicit import checkpoint
from hyperopt_implicit.checkpoint import Checkpoints

from .resumable import OUTER_STEPS, difference, outcome, train


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def saved(folder: Path, *steps: int) -> Checkpoints:
    """A folder with a checkpoint for each number of steps."""
    kept = Checkpoints(folder, every=1)
    kept.begin({"steps": 0})
    for each in steps:
        assert kept.save({"steps": each}, each)
    return kept


def damage(path: Path) -> None:
    """Turn one bit of what is in a tensor's place, which torch reads without a word."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        part = next(each for each in archive.infolist() if "/data/" in each.filename)
    content[part.header_offset + 200] ^= 1
    path.write_bytes(content)


# ------------------------------------------------------------------------------------------------------- which stay


def test_last_three_stay(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3, 4)
    assert names(tmp_path) == ["step-000000002.pt", "step-000000003.pt", "step-000000004.pt"]


def test_newest_is_read(tmp_path: Path) -> None:
    found = saved(tmp_path, 3, 12).newest()
    assert found is not None
    assert (found.path.name, found.state) == ("step-000000012.pt", {"steps": 12})


def test_none_is_none(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "nowhere").newest() is None
    assert names(tmp_path) == []


def test_file_has_its_name_only_when_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill at any moment leaves whole files under their names, and what was begun under another."""
    seen: list[tuple[str, list[str]]] = []
    flush = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (seen.append(("flush", names(tmp_path))), flush(handle)))
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda a, b: (seen.append(("name", names(tmp_path))), replace(a, b))[1])
    Checkpoints(tmp_path).begin({"steps": 0})
    unfinished = f".step-000000000.pt.{os.getpid()}"
    whole = ["step-000000000.pt"]
    assert seen == [("flush", [unfinished]), ("name", [unfinished]), ("flush", whole)]


def test_what_a_killed_process_had_begun_is_cleared_away(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    (tmp_path / ".step-000000002.pt.4711").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    Checkpoints(tmp_path).prepare()
    assert names(tmp_path) == ["notes.txt", "step-000000000.pt", "step-000000001.pt"]


def test_part_of_a_larger_tensor_is_saved_alone(tmp_path: Path) -> None:
    kept = saved(tmp_path)
    kept.save({"row": torch.zeros(1000, 1000)[0], "rows": [{"x": torch.ones(1000, 1000)[3]}]}, 1)
    assert (tmp_path / "step-000000001.pt").stat().st_size < 20_000


# ---------------------------------------------------------------------------------------------------- when to save


def test_at_every_so_many_steps() -> None:
    kept = Checkpoints("nowhere", every=3)
    assert [step for step in range(1, 10) if kept.is_due(step)] == [3, 6, 9]


def test_as_often_as_costs_next_to_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now)
    kept = Checkpoints(tmp_path)
    assert not kept.is_due(1)
    now += 10.0  # the least time
    assert kept.is_due(1)
    write = torch.save

    def slow(*args: Any) -> None:
        nonlocal now
        now += 2.0
        write(*args)

    monkeypatch.setattr(torch, "save", slow)
    kept.begin({"steps": 0})
    now += 399.0  # 200 times as long as it took
    assert not kept.is_due(2)
    now += 1.0
    assert kept.is_due(2)


def test_first_save_is_thought_to_take_a_millisecond(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0

    def slow(*args: Any) -> None:
        nonlocal now
        now += 0.004

    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now)
    monkeypatch.setattr(torch, "save", slow)
    kept = Checkpoints(tmp_path, least_seconds=0.0, share=0.01)
    due = []
    for step in range(12):
        now += 0.06
        due.append(kept.is_due(step))
        if due[-1]:
            kept.save({}, step)
    assert [step for step in range(12) if due[step]] == [1, 8]  # after 0.1 s, and 0.4 s after that


# ------------------------------------------------------------------------------------------------------ damaged files


@pytest.mark.parametrize("how", ["bit", "cut", "empty", "text"])
def test_damaged_newest_falls_back(tmp_path: Path, how: str) -> None:
    kept = saved(tmp_path)
    for step in (1, 2):
        kept.save({"steps": step, "weights": torch.full((1000,), float(step))}, step)
    newest = tmp_path / "step-000000002.pt"
    if how == "bit":
        damage(newest)
        assert torch.load(newest, weights_only=True)["steps"] == 2  # torch does not see it
    else:
        content = newest.read_bytes()
        newest.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "text": b"hello"}[how])
    with pytest.warns(
        hi.HyperoptWarning, match=r"step-000000002.pt cannot be read \(.+\)\. step-000000001.pt, the one"
    ):
        found = kept.newest()
    assert found is not None and found.state["steps"] == 1


def test_all_damaged_is_refused(tmp_path: Path) -> None:
    kept = saved(tmp_path, 1)
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    with pytest.raises(
        hi.CheckpointError, match=r"a checkpoint that is whole; in .*step-000000001.pt cannot be read.*b"
    ):
        kept.newest()


class Evil:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def test_reading_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save({"format": 1, "evil": Evil()}, folder / "step-000000001.pt")
    with pytest.raises(hi.CheckpointError, match="a checkpoint that is whole"):
        Checkpoints(folder).newest()
    assert names(tmp_path) == ["run"]


# ---------------------------------------------------------------------------------------------------- what is refused


def refused(message: str, folder: Path | str, **options: Any) -> None:
    with pytest.raises(hi.CheckpointError, match=message):
        train("identity", None, **{"checkpoint": folder, **options})


def test_new_run_does_not_write_over_another(tmp_path: Path) -> None:
    train("identity", tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    refused(r"must not write over.*has some, up to step-000000006.pt.*\(resume=True, or --resume\)", tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"outer_lr": 0.02}, "outer_lr was 0.01, now 0.02"),
        ({"seed": 4}, "seed was 3, now 4"),
        ({"inner_steps": 4}, "inner_steps was 3, now 4"),
        ({"backend": "neumann"}, r"backend was Identity\(.*\), now Neumann\(.*\)"),
        ({"keep_best_model": False}, "keep_best_model was True, now False"),
    ],
    ids=lambda x: x if isinstance(x, str) else next(iter(x)),
)
def test_run_with_other_settings(tmp_path: Path, change: dict[str, Any], difference: str) -> None:
    train("identity", tmp_path, outer_steps=2)
    backend = change.pop("backend", "identity")
    with pytest.raises(
        hi.CheckpointError, match=rf"settings that it was begun with.*differs: .*{difference}.*Put them"
    ):
        train(backend, tmp_path, outer_steps=4, **change)


def test_settings_that_only_say_when_to_stop_may_change(tmp_path: Path) -> None:
    whole = outcome(train("identity", None))
    train("identity", tmp_path, outer_steps=2, patience=50)
    longer = outcome(train("identity", tmp_path, patience=40, min_delta=0.5, max_failures=3, on_failure="skip"))
    assert difference(whole, longer) is None


@pytest.mark.parametrize("state", [{"steps": 1}, {"format": 2, "identity": {}}, {"format": 1}], ids=str)
def test_checkpoint_of_another_format(tmp_path: Path, state: dict[str, Any]) -> None:
    assert saved(tmp_path).save(state, 1)
    found = state.get("format")
    refused(f"in format 1; .* has format {found}. Resume it with the version that wrote it", tmp_path, resume=True)


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused("checkpoint must be a folder; .*file is a file. Name another.", tmp_path / "file")


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "often"])
def test_interval_that_is_none(tmp_path: Path, every: Any) -> None:
    refused(
        rf"checkpoint_every must be a whole number of outer steps, at least 1, or None; got {every!r}",
        tmp_path,
        checkpoint_every=every,
    )


@pytest.mark.parametrize("folder", ["", 3, True])
def test_folder_that_is_none(folder: Any) -> None:
    refused(rf"checkpoint must be the name of a folder; got {folder!r}", folder)


@pytest.mark.parametrize("given", [{"resume": True}, {"checkpoint_every": 3}], ids=lambda x: next(iter(x)))
def test_options_without_a_folder(given: dict[str, Any]) -> None:
    with pytest.raises(hi.HyperoptError, match=f"{next(iter(given))} needs the folder of the checkpoints"):
        train("identity", None, **given)


def test_save_into_a_folder_of_another_process_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_LOCK_SECONDS", 0.1)
    other, late = Checkpoints(tmp_path), Checkpoints(tmp_path)
    other.claim()
    with pytest.warns(hi.HyperoptWarning, match=r"belongs to one process .*the checkpoints before stay\.$"):
        assert not late.save({"steps": 1}, 1)
    other.release()
    assert not late.save({"steps": 2}, 2)
    assert names(tmp_path) == []


def test_folder_is_free_after_a_run_that_was_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_LOCK_SECONDS", 0.1)
    train("identity", tmp_path, outer_steps=2)
    refused("outer_lr was 0.01, now 0.02", tmp_path, outer_lr=0.02, resume=True)
    train("identity", tmp_path)


class Secretive:
    """A callback whose state cannot be saved."""

    def __call__(self, step: hi.OuterStep, problem: hi.BilevelProblem) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {"lock": Evil}


def test_state_that_could_not_be_read_again_is_refused_before_training(tmp_path: Path) -> None:
    refused(
        r"so that reading it runs no code; what was to be saved holds an object of tests\.test_checkpoint\.Evil\. Look",
        tmp_path,
        callbacks=[Secretive()],
    )


def test_torch_of_another_version_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = outcome(train("identity", None))
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    train("identity", tmp_path, outer_steps=2)
    monkeypatch.undo()
    with pytest.warns(hi.HyperoptWarning, match=r"written with torch 2\.99\.0, and this is .*last digits may differ"):
        assert difference(whole, outcome(train("identity", tmp_path))) is None


def test_folder_in_which_another_process_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_LOCK_SECONDS", 0.1)
    other = Checkpoints(tmp_path)
    other.claim()
    for resume in (True, False):
        refused("belongs to one process at a time; another one is running in .* Wait for it", tmp_path, resume=resume)
    other.release()
    train("identity", tmp_path)
    train("identity", tmp_path)


# ------------------------------------------------------------------------------------------------------------- faults


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only an administrator can mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_costs_a_warning_and_no_checkpoint(small_disk: Path) -> None:
    whole = outcome(train("identity", None))
    filled = small_disk / "filler"

    def fill(step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        if step.step == 2:
            filled.write_bytes(b"x" * (_free(small_disk)))

    with pytest.warns(hi.HyperoptWarning) as warned:
        full = outcome(train("identity", small_disk / "run", callbacks=[fill]))
    assert difference(whole, full) is None
    texts = [str(each.message) for each in warned]
    assert len(texts) == 1
    assert re.search(
        r"could not be written to after outer step 2 \(.*No space left on device\).*The run goes on", texts[0]
    )
    assert names(small_disk / "run") == ["step-000000000.pt", "step-000000001.pt", "step-000000002.pt"]
    filled.unlink()
    assert difference(whole, outcome(train("identity", small_disk / "run"))) is None


def _free(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def test_folder_that_cannot_be_written_to_is_refused_before_training(small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(b"x" * _free(small_disk))
    refused("checkpoints must be written to .*run, which did not work: .*No space left", small_disk / "run")


def test_writing_works_again_once_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = itertools.chain([False, True, False], itertools.repeat(False))
    write = torch.save

    def save(*args: Any) -> None:
        if next(full):
            raise OSError(28, "No space left on device")
        write(*args)

    monkeypatch.setattr(torch, "save", save)
    with pytest.warns(hi.HyperoptWarning, match="after outer step 0"):
        train("identity", tmp_path)
    assert names(tmp_path)[-1] == f"step-{OUTER_STEPS:09d}.pt"
