"""Runs killed with SIGKILL at random moments, and resumed until they are through: the same as never killed, bit by bit."""

from __future__ import annotations

from pathlib import Path

import pytest

import hyperopt_implicit as hi

from .killed_runs import KilledRun
from .resumable import difference

pytestmark = pytest.mark.filterwarnings("ignore::hyperopt_implicit.HyperoptWarning")


@pytest.mark.parametrize(("backend", "workers"), [("cg", 2), ("unrolled", 0), ("heavy_ball", 0)])
def test_a_killed_run_is_the_same_as_one_that_was_not(backend: str, workers: int, tmp_path: Path) -> None:
    run = KilledRun(backend, tmp_path, workers=workers)
    whole = run.never_stopped()
    killed = run.killed(2, seed=1)
    assert run.kills > 0
    assert difference(whole, killed) is None


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("backend", [each for each in hi.list_backends() if each != "auto"])
def test_every_backend_survives_kills(backend: str, workers: int, tmp_path: Path) -> None:
    run = KilledRun(backend, tmp_path, workers=workers)
    whole = run.never_stopped()
    killed = run.killed(3, seed=2)
    assert difference(whole, killed) is None
