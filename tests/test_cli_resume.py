"""``run`` with checkpoints: begun, ended by a signal or a kill, and gone on with by the command that was printed."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .commands import FINISHED, Command

RUN = ["run", "slow.py", "--outer-steps", "12", "--inner-steps", "2", "--seed", "1", "--no-tracking"]
SLOW = "import time\n" + FINISHED.replace(
    "def validation_loss(model, batch):", "def validation_loss(model, batch):\n    time.sleep(SECONDS)"
)
SECONDS = 120.0  # before a process that hangs fails its test


def table(said: str) -> str:
    """What was printed of a run, but for the time that it took."""
    return re.sub(r"in [\d.]+ s", "in … s", said[said.index("hyperparameter") :])


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    """The command, with outer steps that take a while, in a process of its own."""
    (folder / "slow.py").write_text(SLOW.replace("SECONDS", "0.1"))
    return subprocess.Popen(
        [sys.executable, "-m", "hyperopt_implicit", *RUN, "--checkpoint", "saved here", *more],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "120"},
    )


def until(holds: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + SECONDS
    while not holds():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.01)


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "saved here").glob("step-*"))


@pytest.fixture
def whole(tmp_path: Path, command: Command) -> str:
    """What the run prints that nothing ends."""
    (tmp_path / "slow.py").write_text(SLOW.replace("SECONDS", "0.0"))
    return table(command(*RUN))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_signal_prints_the_command_that_goes_on(number: signal.Signals, whole: str, tmp_path: Path) -> None:
    process = start(tmp_path, "--checkpoint-every", "1")
    until(lambda: len(saved(tmp_path)) == 3, process)
    process.send_signal(number)
    said, warned = process.communicate(timeout=SECONDS)
    assert process.returncode == 130, warned
    assert "saving after this outer step; interrupt again to leave at once" in warned
    (command,) = re.findall(r"interrupted; go on with\n  hyperopt-implicit (.*)\n", said)
    given = shlex.split(command)
    assert sorted(given) == sorted([*RUN, "--checkpoint", "saved here", "--checkpoint-every", "1", "--resume"])
    (tmp_path / "slow.py").write_text(SLOW.replace("SECONDS", "0.0"))
    again = subprocess.run(
        f"{sys.executable} -m hyperopt_implicit {command}",
        shell=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=True,
        env={**os.environ, "COLUMNS": "120"},
    )
    assert table(again.stdout).split() == whole.split()


def test_killed_run_is_gone_on_with(whole: str, tmp_path: Path) -> None:
    process = start(tmp_path, "--checkpoint-every", "1")
    until(lambda: "step-000000003.pt" in saved(tmp_path), process)
    process.kill()
    process.communicate()
    last = saved(tmp_path)[-1]
    process = start(tmp_path, "--checkpoint-every", "1", "--resume")
    said, warned = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, warned
    assert table(said).split() == whole.split()
    assert last < "step-000000012.pt" == saved(tmp_path)[-1]


def test_folder_of_another_run_is_refused(whole: str, tmp_path: Path, command: Command) -> None:
    command(*RUN, "--checkpoint", "saved here")
    said = command(*RUN, "--checkpoint", "saved here", code=1)
    assert "a new run must not write over the checkpoints of another; saved here has some" in said
    assert "(resume=True, or --resume)" in said
    assert table(command(*RUN, "--checkpoint", "saved here", "--resume")).split() == whole.split()


def test_resume_without_a_folder(command: Command) -> None:
    assert "resume needs the folder of the checkpoints" in command("run", "finished.py", "--resume", code=1)
