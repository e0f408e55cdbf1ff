"""What ``unrolled`` refuses and warns of: budgets, folders, a learning rate seen by the last steps alone."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from torch import nn
from torch.distributions import constraints
from torch.optim import SGD

import hyperopt_implicit as hi
from hyperopt_implicit_backends import Unrolled

from .test_unrolled import batches, built, drawing_layers, hypergradient, problem_with


def test_a_budget_for_less_than_two_iterates_is_refused():
    problem = problem_with(built(lambda: nn.Linear(3, 1)))  # 4 weights, 4 momenta, and generators with 5056 bytes
    with pytest.raises(hi.BackendError) as caught:
        Unrolled(memory="10 kB").check(problem)
    assert str(caught.value) == (
        "memory must hold at least two iterates, one that is kept and one that walks; an iterate of this problem "
        "(weights, optimizer state, buffers, generators) takes 5.088 kB, and memory is 10 kB. Give at least "
        "memory=10176, or folder= to keep iterates on disk."
    )
    with pytest.raises(hi.BackendError, match="memory must hold at least two iterates"):
        hypergradient(problem, batches(3), memory=10175)
    hypergradient(problem, batches(3), memory=10176)


@pytest.mark.parametrize("value", ["fifty", "-5 MB", 0, -3, 1.5, True, [1]])
def test_what_is_no_amount_of_memory_is_refused(value):
    with pytest.raises(hi.BackendError) as caught:
        Unrolled(memory=value)
    assert str(caught.value) == (
        "Unrolled option 'memory': must be a positive number of bytes, a string such as '50 MB', 'auto', or None; got "
        f"{value!r}."
    )


@pytest.mark.parametrize(
    ("value", "size"), [("50 MB", 50_000_000), ("1MiB", 2**20), ("123", 123), (7, 7), ("auto", "auto"), (None, None)]
)
def test_amounts_of_memory(value, size):
    assert Unrolled(memory=value).memory == size


def test_a_folder_must_exist_and_be_alone(tmp_path):
    problem = problem_with(built(lambda: nn.Linear(3, 1)))
    missing = str(tmp_path / "missing")
    with pytest.raises(hi.BackendError) as caught:
        Unrolled(folder=missing).check(problem)
    assert str(caught.value) == (f"folder must be a directory that exists; got {missing!r}. Make it, or name another.")
    with pytest.raises(hi.BackendError) as caught:
        Unrolled(folder=str(tmp_path), memory="1 MB").check(problem)
    assert str(caught.value) == (
        "memory and folder exclude each other: iterates are kept in memory or on disk; got memory=1000000 and "
        f"folder={str(tmp_path)!r}. Leave one of them out."
    )


def test_a_folder_must_have_room(tmp_path, monkeypatch):
    problem, data = problem_with(built(lambda: nn.Linear(3, 1))), batches(3)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, 40_000))
    with pytest.raises(hi.BackendError) as caught:
        hypergradient(problem, data, folder=str(tmp_path))
    assert str(caught.value) == (
        "folder must have room for the iterates of all steps; 9 of 5.088 kB take 45.79 kB, and "
        f"{str(tmp_path)!r} has 40 kB left. Take another folder, or memory= in its place, which keeps fewer."
    )
    assert hypergradient(problem, data, folder=str(tmp_path), last=5).iterations == 5


def test_last_with_a_learning_rate_warns_and_is_wrong():
    """w ← w − α h (w − 1) for h = 1 and 0.1: the slow direction gains from every step, not from the last alone."""
    h = torch.tensor([1.0, 0.1])

    @hi.hyperparameter("lr", init=0.5, constraint=constraints.positive, target="optimizer")
    def training_loss(model, batch):
        return 0.5 * (h * (model.weight - 1.0).square()).sum()

    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    problem = hi.BilevelProblem(
        model,
        training_loss,
        lambda model, batch: 0.5 * (model.weight - 1.0).square().sum(),
        optimizer=lambda params: SGD(params, lr=1.0),
    )
    given = {"training_batches": [None] * 20, "validation_batch": None}
    whole = hi.hypergradient(problem, Unrolled(memory="auto"), **given).gradients["lr"]
    error = 1.0 - 0.5 * h
    assert float(whole) == pytest.approx(float((0.5 * -20 * h * error**39).sum()), rel=1e-5)
    with pytest.warns(hi.HyperoptWarning) as caught:
        last = hi.hypergradient(problem, Unrolled(last=1), **given).gradients["lr"]
    assert len(caught) == 1
    assert str(caught[0].message) == (
        "last=1 leaves out how the learning rate acted in the steps before, and gives the gradient of 'lr' the wrong "
        "sign or a fraction of its size where training is longer. Leave last out; memory='auto' differentiates all "
        "steps in little memory."
    )
    assert float(last) == pytest.approx(float(whole) / 20, rel=1e-5)


def test_a_run_that_blows_up_in_little_memory():
    problem = problem_with(drawing_layers(), lambda params: SGD(params, lr=1e30))
    result = hypergradient(problem, batches(3), memory="auto")
    assert result.status is hi.Status.NON_FINITE
    assert not math.isfinite(result.training_loss + result.validation_loss)
