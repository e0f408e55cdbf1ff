"""Several processes that differ, or one of which ends: the others say so, and end as well."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hyperopt_implicit as hi
from hyperopt_implicit.testing.specimens import gradient_descent, half_mean_square, ridge_problem

from .distributed_tasks import SECONDS, found_by, started

LOST = (
    r"DistributedError: all processes of a run must answer each other; process 0 of 2 \(numbered from 0\) has lost "
    r"process 1, which has ended, or has not answered within the group's timeout. Look at its output for the reason, "
    r"and start all of them again, from the last checkpoint where there is one. \(torch says: %s\)\n"
)
TOGETHER = "Build the model, the problem and the run from the same code and arguments in each of them."


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What both processes were refused with."""
    return found_by("refusals", tmp_path_factory.mktemp("refusals"))


@pytest.mark.parametrize(
    ("what", "part"),
    [
        (
            "other_names",
            f"parameter '0.weight': in process 0 of 2 it is (1, 4) torch.float32, in process 1 it is (2, 4) "
            f"torch.float32. {TOGETHER}",
        ),
        (
            "other_backends",
            f"the backend: in process 0 of 2 it is {hi.get_backend('cg')}, in process 1 it is "
            f"{hi.get_backend('neumann')}. {TOGETHER}",
        ),
        ("other_options", f"option 'inner_steps': in process 0 of 2 it is 10, in process 1 it is 11. {TOGETHER}"),
        (
            "other_counts",
            "the number of batches of training_data: in process 0 of 2 it is 2, in process 1 it is 3. Give each "
            "process as many batches as the others, as a DistributedSampler with drop_last=True does.",
        ),
        (
            "other_values",
            "the values of parameter 'weight': in process 0 of 2 it is a tensor of norm 0 and sum 0, in process 1 it "
            "is a tensor of norm 2 and sum 4. Load the same into all of them, or call check_alike first, which gives "
            "all the first one's.",
        ),
        (
            "other_threads",
            "the number of threads (torch.get_num_threads()): in process 0 of 2 it is 1, in process 1 it is 2. Set "
            "OMP_NUM_THREADS, or torch.set_num_threads, to one number for all: sums are rounded by it.",
        ),
    ],
)
def test_processes_that_differ_are_refused(what: str, part: str, refused: list[dict[str, str]]) -> None:
    for each in refused:
        assert each[what] == f"DistributedError: all processes of a run must do the same; they differ in {part}"


def test_what_cannot_be_shared_is_refused_in_a_group(refused: list[dict[str, str]]) -> None:
    for each in refused:
        assert each["a_population"] == (
            "DistributedError: optimize_population trains its members within one process; this one is among the 2 of a "
            "torch.distributed group. Call it without a group, or train the problems one by one with optimize, which "
            "shares each batch among the processes."
        )
        assert each["a_search"] == (
            "DistributedError: a search has workers that know nothing of each other, each with trials of its own; this "
            "process is among the 2 of a torch.distributed group. Call search without a group: processes that torchrun "
            "starts share a study's trials by its storage."
        )
        assert each["a_meta_optimizer"] == (
            "DistributedError: MetaOptimizer differentiates the losses that it is given, and each of the 2 processes "
            "of a torch.distributed group would give that of its own share. Use HyperOptimizer, whose problem averages "
            "the losses over processes."
        )


@pytest.mark.parametrize(
    ("task", "said", "timeout"),
    [
        ("killed", ".*(Connection|Broken pipe).*", 60.0),
        ("raising", ".*(Connection|Broken pipe).*", 60.0),
        ("hanging", r"Timed out waiting \d+ms .*", 10.0),
    ],
)
def test_who_loses_another_says_so_and_ends(task: str, said: str, timeout: float, tmp_path: Path) -> None:
    with started(task, tmp_path / "group", 2, timeout) as processes:
        first, second = processes
        if task != "hanging":
            second.wait(SECONDS)
        gone = time.monotonic()
        output, errors = first.communicate(timeout=SECONDS)
        if task != "hanging":
            assert time.monotonic() - gone < 30.0  # the group waits for 60
        assert first.returncode == 3, errors
        assert re.fullmatch(LOST % said, output), output
        if task == "raising":
            assert "disk on fire" in second.communicate()[1]


# ---------------------------------------------------------------------------------------------- models that are divided


def problem_of(model: nn.Module) -> hi.BilevelProblem:
    return hi.BilevelProblem(model, half_mean_square, half_mean_square, optimizer=gradient_descent)


@pytest.mark.parametrize(
    "wrap", [lambda model: nn.DataParallel(model), lambda model: nn.Sequential(nn.DataParallel(model))]
)
def test_a_model_that_divides_itself_is_refused(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = wrap(nn.Linear(2, 1))
    where = ", at '0'" if isinstance(model, nn.Sequential) else ""
    with pytest.raises(hi.ProblemError) as caught:
        problem_of(model)
    assert str(caught.value) == (
        f"the model must be the bare module; got a DataParallel{where}. Pass what it wraps (its .module): among "
        "several processes, losses and gradients of every order are averaged here."
    )


def test_a_model_in_shards_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        model = nn.Linear(2, 1)
        mesh = init_device_mesh("cpu", (1,))
        model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh))
        with pytest.raises(hi.ProblemError) as caught:
            problem_of(model)
    finally:
        torch.distributed.destroy_process_group()
    assert str(caught.value) == (
        "each process must hold the whole of every parameter; 'weight' is a DTensor, of which this one holds a shard "
        "(fully_shard, tensor parallelism). Leave the model whole: hypergradients take replicated models over several "
        "processes only."
    )


def test_a_model_in_distributed_data_parallel_is_refused_and_a_group_of_one_is_no_group(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        with pytest.raises(hi.ProblemError, match="the model must be the bare module; got a DistributedDataParallel"):
            problem_of(nn.parallel.DistributedDataParallel(nn.Linear(2, 1)))
        found: Any = hi.HyperOptimizer(ridge_problem(), backend="cg")
        assert found.backend == hi.get_backend("cg")
    finally:
        torch.distributed.destroy_process_group()
