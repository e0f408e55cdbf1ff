"""A run on several processes, one of which is killed: the others end with a message, and the run is gone on with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from .resumable import difference

PROGRAM = """
import os
import signal
import sys

import torch
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import hyperopt_implicit as hi
from hyperopt_implicit import distributed
from tests.resumable import outcome

torch.set_num_threads(1)
if int(os.environ.get("WORLD_SIZE", 1)) > 1:
    torch.distributed.init_process_group("gloo")
rank, count = distributed.rank(), distributed.world_size()
generator = torch.Generator().manual_seed(0)
x = torch.randn(48, 3, generator=generator, dtype=torch.float64)
data = TensorDataset(x, x[:, :1].sin())


@hi.hyperparameter("decay", init=lambda model: torch.full((2,), -2.0, dtype=torch.float64))
def training_loss(model, batch, *, decay):
    weights = [p for p in model.parameters() if p.dim() == 2]
    return mse_loss(model(batch[0]), batch[1]) + sum(
        d.exp() * w.square().sum() for d, w in zip(decay, weights, strict=True))


def validation_loss(model, batch):
    return mse_loss(model(batch[0]), batch[1])


def loader(shuffle):
    sampler = DistributedSampler(data, count, rank, shuffle=shuffle, seed=3)
    return DataLoader(data, batch_size=24 // count, sampler=sampler)


torch.manual_seed(1)
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
problem = hi.BilevelProblem(
    model, training_loss, validation_loss, training_data=loader(True), validation_data=loader(False),
    optimizer=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9))


def end(step, problem):
    if step.step == int(os.environ.get("STEP", -1)) and rank == int(os.environ.get("WHO", -1)):
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))


seen = []
result = hi.optimize(
    problem, sys.argv[1], outer_steps=8, inner_steps=4, seed=2, tracking=False, progress=False, keep_best_model=True,
    checkpoint=sys.argv[2], checkpoint_every=1, resume=True,
    callbacks=[end, lambda step, problem: seen.append(step.step)])
if distributed.is_first():
    torch.save({"outcome": outcome(result), "seen": seen}, sys.argv[3])
if torch.distributed.is_initialized():
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""
ROOT = Path(__file__).parents[1]


def run(folder: Path, backend: str, name: str, count: int = 2, **environment: str) -> tuple[Any, str]:
    """A launch of the program; its outcome, where it had one, and what was said."""
    (folder / "program.py").write_text(PROGRAM)
    result = folder / f"{name}.pt"
    result.unlink(missing_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
    found = subprocess.run(
        [sys.executable, *launcher, str(folder / "program.py"), backend, str(folder / name), str(result)],
        capture_output=True,
        text=True,
        timeout=300.0,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        check=False,
    )
    assert (found.returncode == 0) == result.exists(), found.stderr
    return torch.load(result, weights_only=True) if result.exists() else None, found.stderr


@pytest.mark.parametrize("backend", ["neumann", pytest.param("unrolled", marks=pytest.mark.slow)])
def test_killed_process_is_missed_and_the_run_gone_on_with(backend: str, tmp_path: Path) -> None:
    whole, _ = run(tmp_path, backend, "whole")
    nothing, said = run(tmp_path, backend, "killed", WHO="1", STEP="3", SIGNAL="9")
    assert nothing is None
    # the launcher signals those that are left, which may leave for that before they miss the one that is gone
    assert "process 0 of 2 (numbered from 0) has lost process 1" in said or "KeyboardInterrupt" in said
    resumed, _ = run(tmp_path, backend, "killed")
    assert resumed["seen"] == [3, 4, 5, 6, 7]
    assert difference(whole["outcome"], resumed["outcome"]) is None


def test_signal_to_one_process_ends_all_and_another_number_of_them_goes_on(tmp_path: Path) -> None:
    whole, _ = run(tmp_path, "neumann", "whole", count=1)
    nothing, said = run(tmp_path, "neumann", "stopped", WHO="1", STEP="2", SIGNAL="15")
    assert nothing is None
    assert said.count("the run was interrupted after 3 outer steps and saved in") == 2
    resumed, said = run(tmp_path, "neumann", "stopped", count=1)
    assert "was saved by 2 processes, and there are 1: the run goes on from the same place" in said
    assert resumed["seen"] == [3, 4, 5, 6, 7]
    first, second = (each["outcome"]["losses"][0] for each in (whole, resumed))
    assert second == pytest.approx(first, rel=0.5)
