"""Fixtures of the tests: stores, files and dtypes. What holds in every test is in the ``conftest.py`` above."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from filelock import FileLock

if TYPE_CHECKING:
    from .commands import Command
    from .postgres import Postgres


@pytest.fixture
def float64() -> Iterator[None]:
    """float64 as the default dtype, inside this test only."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def untouched_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.nn.Module]:
    """A model that must be as it was afterwards, in a folder that must be empty afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    yield model
    assert list(tmp_path.iterdir()) == []
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs; it takes seconds to make, so all workers share the one that the first makes."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    database = folder / "empty_mlflow.db"
    with FileLock(f"{database}.lock"):
        if not database.exists():
            from mlflow import MlflowClient

            made = database.with_suffix(".part")
            MlflowClient(tracking_uri=f"sqlite:///{made}").search_experiments()
            made.rename(database)
    return database


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server; skips where there is none to be had."""
    from .postgres import running

    with running() as server:
        yield server


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path) -> Path:
    """The working folder of a test, with an MLflow store of its own in the default place, without settings."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    return tmp_path


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The entry point, in a folder with two files that define a problem."""
    from .commands import FILE, FINISHED, Command

    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(FILE)
    (tmp_path / "finished.py").write_text(FINISHED)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("train", "finished"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return Command(tmp_path, monkeypatch, capsys)
