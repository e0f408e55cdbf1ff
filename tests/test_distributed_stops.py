"""Runs of several processes that stop before their end: all at the same step, and all go on from one checkpoint."""

from __future__ import annotations

from pathlib import Path

from .distributed_tasks import assert_all_same, assert_same, found_by


def test_a_callback_of_any_process_ends_the_run_in_all(tmp_path: Path) -> None:
    for each in found_by("stopped", tmp_path / "group"):
        assert each == {"by 0": "3: stopped by a callback", "by 1": "3: stopped by a callback"}


def test_a_signal_to_one_process_saves_the_run_and_all_go_on_from_there(tmp_path: Path) -> None:
    everybody = found_by("saved_and_resumed", tmp_path / "group")
    for each in everybody:
        assert each["said"].startswith("the run was interrupted after 3 outer steps and saved in saved")
        assert "step-000000003.pt" in each["files"]
        assert each["steps"] == 6
        assert each["losses"][0] == each["losses"][1]
        assert_same(each["resumed"], each["through"], 0.0)
    assert_all_same([each["resumed"] for each in everybody])
