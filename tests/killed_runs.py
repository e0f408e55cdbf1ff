"""Runs in processes of their own, killed with SIGKILL at random moments and begun again until they are through.

The processes come from one that has imported everything already, so that a life takes no more than the run itself.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

import hyperopt_implicit as hi

from .resumable import outcome, train

STEPS = 40
_SECONDS = 120.0  # before a run that hangs fails its test
_LIVES = 30


def run_to_end(
    backend: str, folder: Path | None, result: Path, workers: int, tracking: hi.Tracking | bool, steps: int
) -> None:
    """What a process does: a run, resumed where it can be, and its outcome in a file."""
    os.setsid()
    torch.set_num_threads(1)
    found = train(
        backend, folder, workers=workers, outer_steps=steps, warmup_steps=70, tracking=tracking, on_failure="skip"
    )
    unfinished = result.with_suffix(".part")
    torch.save(outcome(found), unfinished)
    unfinished.rename(result)


class KilledRun:
    """A run that is killed.

    Args:
        backend: its name.
        folder: for checkpoints and outcomes.
        workers: of its loader.
        tracking: where it is tracked.
    """

    def __init__(
        self, backend: str, folder: Path, *, workers: int = 0, tracking: hi.Tracking | bool = False, steps: int = STEPS
    ) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.killed_runs", "mlflow", "sqlalchemy"])
        self._backend, self._folder, self._workers = backend, folder, workers
        self._tracking, self._steps = tracking, steps
        self.kills = 0

    def never_stopped(self) -> dict[str, Any]:
        """The outcome of the same run without a break, and how long it takes."""
        began = time.monotonic()
        process = self._begin(None, self._folder / "whole.pt", False)
        process.join(_SECONDS)
        assert process.exitcode == 0
        self.seconds = time.monotonic() - began
        return self._outcome("whole.pt")

    def killed(self, kills: int, seed: int) -> dict[str, Any]:
        """The outcome of a run that was killed so many times, at moments that are drawn from a seed."""
        draw = random.Random(seed)
        for _ in range(_LIVES + kills):
            process = self._begin(self._folder / "checkpoints", self._folder / "killed.pt", self._tracking)
            if self.kills < kills:
                process.join(draw.uniform(0.0, 1.0) * self.seconds / kills)
                if process.is_alive():
                    _kill(process)
                    self.kills += 1
                    continue
            process.join(_SECONDS)
            assert process.exitcode == 0
            return self._outcome("killed.pt")
        raise AssertionError("the run does not come to its end")

    def _begin(self, folder: Path | None, result: Path, tracking: hi.Tracking | bool) -> BaseProcess:
        process = self._context.Process(
            target=run_to_end, args=(self._backend, folder, result, self._workers, tracking, self._steps)
        )
        process.start()
        return process

    def _outcome(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = torch.load(self._folder / name, weights_only=True)
        return found


def _kill(process: BaseProcess) -> None:
    """Kill a run with the workers of its loaders."""
    assert process.pid is not None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has no group of its own yet
        process.kill()
    process.join()
