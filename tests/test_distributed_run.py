"""``torchrun … run``: one run in several processes, which prints, warns and tracks once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

import hyperopt_implicit as hi
from hyperopt_implicit.launched import launched_group

FILE = """
import sys
import torch
import hyperopt_implicit as hi
from torch.distributions import constraints

x = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(12, 2)
y = torch.linspace(0, 1, 12, dtype=torch.float64).reshape(12, 1) ** 2
several = torch.distributed.is_initialized()
rank, count = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if several else (0, 1)
batch = (x[rank::count], y[rank::count])

@hi.hyperparameter("decay", init=0.5, constraint=constraints.positive)
def training_loss(model, batch, *, decay):
    return (model(batch[0]) - batch[1]).square().mean() + decay * model.weight.square().sum()

def validation_loss(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()

model = torch.nn.Linear(2, 1).double()
torch.nn.init.constant_(model.weight, 0.1 + rank)
torch.nn.init.zeros_(model.bias)
problem = hi.BilevelProblem(
    model, training_loss, validation_loss, training_data=[batch], validation_data=[batch],
    optimizer=lambda params: torch.optim.SGD(params, lr=0.2))
"""
COMMAND = ["-m", "hyperopt_implicit", "run", "train.py", "-b", "cg", "--outer-steps", "5", "--inner-steps", "4"]
SECONDS = 300.0


@pytest.fixture
def folder(workplace: Path) -> Path:
    """Where the processes work: an MLflow store, and a problem."""
    (workplace / "train.py").write_text(FILE)
    return workplace


def run(*words: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    found = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=SECONDS, env=environment, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return re.sub(r"in [0-9.]+ s", "in … s", found.stdout)


def together(*words: str, count: int = 2) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "--no-python"]
    return run(*launcher, sys.executable, *words)


def test_two_processes_print_what_one_does(folder: Path) -> None:
    assert together(*COMMAND, "--no-tracking") == run(*COMMAND, "--no-tracking")


def test_two_processes_track_one_run(folder: Path) -> None:
    together(*COMMAND)
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    (experiment,) = [each for each in client.search_experiments() if each.name == "hyperopt_implicit"]
    (tracked,) = client.search_runs([experiment.experiment_id])
    assert tracked.info.status == "FINISHED"
    assert tracked.data.params["backend"] == "ConjugateGradient"


# ----------------------------------------------------------------------------------------------- the launcher's group


@pytest.mark.parametrize(
    "said", [{}, {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "localhost"}, {"WORLD_SIZE": "2"}]
)
def test_without_a_launcher_there_is_no_group(said: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    with launched_group("cpu") as device:
        assert device == "cpu"
        assert not torch.distributed.is_initialized()


def test_a_group_that_does_not_come_together_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "5", "MASTER_ADDR": "localhost", "MASTER_PORT": "nowhere"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(hi.CommandError) as caught, launched_group(None):
        pass
    assert str(caught.value).startswith(
        "the 2 processes that were started must find each other at localhost:nowhere; they do not (torch says: "
    )
    assert str(caught.value).endswith("Start them with torchrun, or unset WORLD_SIZE for a run in one process.")
