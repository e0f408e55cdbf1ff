"""A run that was stopped and resumed is the run that was never stopped: bit by bit, for every backend."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import hyperopt_implicit as hi

from .resumable import OUTER_STEPS, difference, outcome, train


pytestmark = pytest.mark.filterwarnings("ignore:hypergradient:hyperopt_implicit.HyperoptWarning")


class Stopped(Exception):
    """What ends a run in these tests."""


class StopAfter:
    """A callback that ends the process, as far as the run can tell."""

    def __init__(self, step: int) -> None:
        self._step = step

    def __call__(self, step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        if step.step == self._step:
            raise Stopped


def stop(backend: str, folder: Path, after: int, **options: Any) -> None:
    """A run that ends in the course of an outer step; what was saved before it remains."""
    with pytest.raises(Stopped):
        train(backend, folder, callbacks=[StopAfter(after)], **options)


@pytest.mark.parametrize("backend", [each for each in hi.list_backends() if each != "auto"])
def test_resumed_twice_is_the_same_as_never_stopped(backend: str, tmp_path: Path) -> None:
    whole = outcome(train(backend, None))
    stop(backend, tmp_path, 1)
    stop(backend, tmp_path, 3)
    resumed = outcome(train(backend, tmp_path))
    assert len(resumed["history"]) == OUTER_STEPS
    assert difference(whole, resumed) is None


@pytest.mark.parametrize(("workers", "steps"), [(0, range(1, OUTER_STEPS)), (2, [3])], ids=["alone", "workers"])
def test_any_step_will_do(workers: int, steps: Sequence[int], tmp_path: Path) -> None:
    """Passes end at different steps in training and validation data; each of them may have just ended."""
    whole = outcome(train("identity", None, workers=workers))
    for step in steps:
        stop("identity", tmp_path / str(step), step, workers=workers)
        assert difference(whole, outcome(train("identity", tmp_path / str(step), workers=workers))) is None, step


@pytest.mark.filterwarnings("ignore:auto met an indefinite Hessian:hyperopt_implicit.HyperoptWarning")
def test_resumed_from_what_auto_has_measured(tmp_path: Path) -> None:
    """Another run would measure anew, and the clock has a say in that; so one run is gone on with from its middle."""

    def copy(step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        if step.step == 3:
            shutil.copytree(tmp_path / "run", tmp_path / "copy")

    whole = outcome(train("auto", tmp_path / "run", callbacks=[copy]))
    assert [path.name for path in sorted((tmp_path / "copy").iterdir())][-1] == "step-000000003.pt"
    assert difference(whole, outcome(train("auto", tmp_path / "copy"))) is None
