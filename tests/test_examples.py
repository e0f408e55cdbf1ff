"""Each example runs in its short form, and its problem from the command line's side."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
SHARED = {"comparison", "protocol", "over_seeds"}  # imported by the problems beside it
UNROLLED = ["--backend", "unrolled"]  # what is learned shows in the steps of training alone
OPTIONS = {
    "learning_rate": [*UNROLLED, "--inner-steps", "40"],  # one for each value of the schedule
    "momentum": UNROLLED,
    "distilled_data": UNROLLED,
    "meta_learning": UNROLLED,
}
EXAMPLES = sorted(path for path in FOLDER.rglob("*.py") if path.stem not in SHARED)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_in_its_short_form(example: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", str(example), "--quick", "--no-tracking"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    assert "seed(s)" in run.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_can_be_run_from_the_command_line(example: Path, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("hyperopt-implicit")), "run", str(example), "--threads", "1"]
    options = ["--outer-steps", "1", "--inner-steps", "1", "--no-tracking", *OPTIONS.get(example.stem, [])]
    run = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    assert "validation loss" in run.stdout
