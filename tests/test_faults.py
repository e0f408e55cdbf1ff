"""Faults from outside that a run survives, or stops for with an error that says what happened."""

from __future__ import annotations

import ast
import importlib.resources
import math
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.utils.data import DataLoader, Dataset

import hyperopt_implicit as hi

from .cases import CASES
from .ridge import TRAINING, VALIDATION, Batch, ridge, training_loss, validation_loss
from .test_failures import SLOW, Switch, assert_all_finite

# ------------------------------------------------------------------------------------------------ exploding curvature

# zero with a zero gradient at every w, so that training goes on as if nothing were
CURVATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "1e30": lambda w: 0.5e30 * (w - w.detach()).square().sum(),
    "squares overflow": lambda w: 0.5e300 * (w - w.detach()).square().sum(),
    "products are nan": lambda w: ((w - w.detach()).abs() ** 1.5).sum(),
}


@pytest.mark.filterwarnings("ignore::hyperopt_implicit.errors.HyperoptWarning")
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_curvature_that_explodes_for_two_steps_is_left_behind(name: str, curvature: str) -> None:
    switch = Switch({3, 4})

    @hi.hyperparameter("decay", init=1.0, constraint=constraints.positive)
    def loss(model: nn.Module, batch: Batch, *, decay: Tensor) -> Tensor:
        value = training_loss(model, batch, decay=decay)
        return value + CURVATURES[curvature](model.weight) if switch.on else value

    options = {"outer_steps": 10, "inner_steps": 3, "seed": 0, "tracking": False, **SLOW, "outer_lr": 0.1}
    result = hi.optimize(ridge(training_loss=loss), name, callbacks=[switch.callback], **options)
    assert_all_finite(result)
    assert result.stop_reason == "all outer steps done"
    assert all(each.applied for each in result.history[:3])
    assert all(each.applied for each in result.history[6:])  # nothing of it was carried along
    assert not any(each.status is hi.Status.NON_FINITE for each in result.history[6:])


@pytest.mark.filterwarnings("ignore::hyperopt_implicit.errors.HyperoptWarning")
@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_curvature_that_has_exploded_for_good_ends_nothing_but_the_run(name: str) -> None:
    switch = Switch(range(3, 100))

    @hi.hyperparameter("decay", init=1.0, constraint=constraints.positive)
    def loss(model: nn.Module, batch: Batch, *, decay: Tensor) -> Tensor:
        value = training_loss(model, batch, decay=decay)
        return value + CURVATURES["products are nan"](model.weight) if switch.on else value

    options = {"outer_steps": 10, "inner_steps": 3, "max_failures": 3, "tracking": False, **SLOW, "outer_lr": 0.1}
    result = hi.optimize(ridge(training_loss=loss), name, callbacks=[switch.callback], **options)
    assert_all_finite(result)
    failed = [each.step for each in result.history if not each.applied]
    assert failed == ([3, 4, 5] if result.stop_reason == "too many failed steps" else [])


# ------------------------------------------------------------------------------------------- a loss or data that raises


def of_run(folder: Path) -> Any:
    """The one run of the default store."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("hyperopt_implicit")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return run


class DamagedError(Exception):
    """What no library raises."""


class Rows(Dataset[Batch]):
    """Rows of a batch; one of them cannot be read."""

    def __init__(self, batch: Batch, bad: int | None = None) -> None:
        self.batch, self.bad = batch, bad

    def __len__(self) -> int:
        return len(self.batch[0])

    def __getitem__(self, index: int) -> Batch:
        if index == self.bad:
            raise DamagedError(f"row {index} of the archive is damaged")
        x, y = self.batch
        return x[index], y[index]


def loader(batch: Batch, bad: int | None, workers: int) -> DataLoader[Batch]:
    return DataLoader(Rows(batch, bad), batch_size=4, num_workers=workers)


def weights_after(steps: int) -> Tensor:
    """w after so many steps, on the first batches of a loader."""
    x, y = TRAINING
    problem = ridge()
    for i in range(steps):
        at = slice(4 * i, 4 * i + 4)
        problem.optimizer.zero_grad()
        problem.training_loss((x[at], y[at])).backward()
        problem.optimizer.step()
    return problem.model.weight.detach()  # type: ignore[no-any-return, operator]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("role", ["training_data", "validation_data"])
def test_error_of_a_loader_reaches_the_user_as_it_is(role: str, workers: int, workplace: Path) -> None:
    batch, bad = (TRAINING, 13) if role == "training_data" else (VALIDATION, 5)  # in the fourth batch, in the second
    data = {
        "training_data": loader(TRAINING, None, 0),
        "validation_data": loader(VALIDATION, None, 0),
        role: loader(batch, bad, workers),
    }
    problem = ridge(**data)
    decays = [0.0]
    callbacks = [lambda step, problem: decays.append(problem.hparams["decay"].item())]
    with pytest.raises(DamagedError, match=f"row {bad} of the archive is damaged") as caught:
        hi.optimize(problem, "cg", outer_steps=9, inner_steps=6, callbacks=callbacks)
    assert type(caught.value) is DamagedError
    assert problem.hparams["decay"].item() == decays[-1]
    if role == "training_data":
        torch.testing.assert_close(problem.model.weight.detach(), weights_after(3), rtol=1e-12, atol=0)
    else:
        assert len(decays) == 2  # the first step, and where it began
    run = of_run(workplace)
    assert run.info.status == "FAILED"
    assert "DamagedError" in run.data.tags["error"]
    assert f"row {bad} of the archive is damaged" in run.data.tags["error"]


class Shrinking:
    """Batches whose passes have fewer and fewer of them, down to so many."""

    def __init__(self, batch: Batch, lengths: list[int]) -> None:
        self.batch, self.lengths, self.passes = batch, lengths, 0

    def __len__(self) -> int:
        return self.lengths[0]

    def __iter__(self) -> Iterator[Batch]:
        length = self.lengths[min(self.passes, len(self.lengths) - 1)]
        self.passes += 1
        return iter([self.batch] * length)


@pytest.mark.parametrize("role", ["training_data", "validation_data"])
def test_data_that_becomes_empty(role: str) -> None:
    batch = TRAINING if role == "training_data" else VALIDATION
    problem = ridge(**{role: Shrinking(batch, [5, 2, 0])})
    with pytest.raises(hi.DataError) as caught:
        hi.optimize(problem, "cg", outer_steps=20, inner_steps=3, tracking=False)
    assert str(caught.value) == (
        f"{role} must have at least one batch; it is empty. Check the split, the batch size and drop_last of its "
        "loader."
    )
    assert bool(problem.model.weight.isfinite().all())
    assert math.isfinite(problem.hparams["decay"].item())


@pytest.mark.parametrize("role", ["training_data", "validation_data"])
def test_passes_that_get_shorter_are_passes_all_the_same(role: str) -> None:
    batch = TRAINING if role == "training_data" else VALIDATION
    data = Shrinking(batch, [5, 2, 1, 7])
    result = hi.optimize(ridge(**{role: data}), "cg", outer_steps=20, inner_steps=3, tracking=False)
    same = hi.optimize(ridge(), "cg", outer_steps=20, inner_steps=3, tracking=False)
    assert data.passes > 3
    assert result.hyperparameters["decay"] == same.hyperparameters["decay"]


@pytest.mark.parametrize("role", ["training_loss", "validation_loss"])
def test_loss_that_raises_in_one_batch_ends_the_run_between_two_steps(role: str, workplace: Path) -> None:
    calls = 0

    def count(here: str) -> None:
        nonlocal calls
        calls += here == role
        if calls == 18:
            raise DamagedError("label 7 is out of range")

    @hi.hyperparameter("decay", init=1.0, constraint=constraints.positive)
    def training(model: nn.Module, batch: Batch, *, decay: Tensor) -> Tensor:
        count("training_loss")
        return training_loss(model, batch, decay=decay)

    def validation(model: nn.Module, batch: Batch) -> Tensor:
        count("validation_loss")
        return validation_loss(model, batch)

    problem = ridge(training_loss=training, validation_loss=validation)
    seen: list[float] = []
    callbacks = [lambda step, problem: seen.append(problem.hparams["decay"].item())]
    with pytest.raises(DamagedError, match=r"^label 7 is out of range$"):
        hi.optimize(problem, "cg", outer_steps=20, inner_steps=6, callbacks=callbacks)
    assert len(seen) == (2 if role == "training_loss" else 16)
    assert problem.hparams["decay"].item() == seen[-1]
    assert bool(problem.model.weight.isfinite().all())
    assert of_run(workplace).info.status == "FAILED"


# ------------------------------------------------------------------------------------------------------------- clocks


def running_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock on the wall is put back by an hour at each look, as by a time server that has changed its mind."""
    now = time.time()

    def jumping() -> float:
        nonlocal now
        now -= 3600.0
        return now

    monkeypatch.setattr(time, "time", jumping)


def test_a_run_while_the_clock_jumps_back(monkeypatch: pytest.MonkeyPatch, workplace: Path) -> None:
    running_backwards(monkeypatch)
    result = hi.optimize(ridge(), "cg", outer_steps=5)
    monkeypatch.undo()
    assert all(each.inner_seconds >= 0 and each.outer_seconds >= 0 for each in result.history)
    assert 0 <= result.seconds < 60
    assert of_run(workplace).info.status == "FINISHED"


def test_a_search_with_heartbeats_while_the_clock_jumps_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from optuna.distributions import FloatDistribution

    from hyperopt_implicit import heartbeats

    @hi.knob("lr", FloatDistribution(0.1, 0.5))
    def problem(*, lr: float) -> hi.BilevelProblem:
        return ridge(optimizer=lambda params: torch.optim.SGD(params, lr=lr))

    monkeypatch.setattr(heartbeats, "_interval", lambda study: 0.01)
    running_backwards(monkeypatch)
    found = hi.search(
        problem, "cg", n_trials=3, storage=f"journal:///{tmp_path}/studies.log", study_name="clock", seed=0,
        timeout=500.0, tracking=False, outer_steps=3,
    )  # fmt: skip
    assert [each.state.name for each in found.study.trials] == ["COMPLETE"] * 3


def test_no_duration_is_taken_from_the_clock_on_the_wall() -> None:
    """It may be set at any time. Only what is written down for others to read has its time from there."""
    folders = [
        Path(str(importlib.resources.files(each))) for each in ("hyperopt_implicit", "hyperopt_implicit_backends")
    ]
    found = [
        path.name
        for folder in folders
        for path in sorted(folder.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "time.time"
    ]
    assert found == ["sender.py"]


# --------------------------------------------------------------------------------------------- nowhere to write

WITHOUT_OVERRIDE = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # root may write everywhere, unless this is taken from it
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
IN_A_READ_ONLY_FOLDER = """
import os, sys
try:
    open("probe", "w")
except PermissionError:
    pass
else:
    os.unlink("probe")
    sys.exit(77)
sys.path.insert(0, sys.argv[1])
import hyperopt_implicit as hi
from tests.ridge import ridge
for backend in ("cg", "unrolled"):
    result = hi.optimize(ridge(), backend, outer_steps=3, tracking=False)
    assert len(result.history) == 3
"""


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions are otherwise elsewhere")
def test_a_run_without_tracking_writes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "read-only"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    script = ["-c", IN_A_READ_ONLY_FOLDER, str(Path(__file__).parents[1])]
    command = ["-c", WITHOUT_OVERRIDE, *script] if os.geteuid() == 0 else script
    try:
        found = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False)
        if found.returncode == 77:
            pytest.skip("this user may write everywhere")
        assert found.returncode == 0, found.stderr
        assert list(folder.iterdir()) == []
    finally:
        folder.chmod(stat.S_IRWXU)
