"""What one process computes on whole batches and several on their shares, to be compared; and how they are started.

A task is a function of ``share``, which takes this process's part of a batch, and returns tensors and numbers by name.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints

import hyperopt_implicit as hi
from hyperopt_implicit.distributed import rank
from hyperopt_implicit.inner_loop import train_step
from hyperopt_implicit.testing.specimens import logistic_problem, seeded

from .cases import CASES, Case

Share = Callable[[Any], Any]
Found = dict[str, Any]

WORKER = Path(__file__).with_name("distributed_worker.py")
ROWS = 24  # of a whole batch: two shares, or three, are equal ones
SECONDS = 300.0  # before processes that hang fail their test


# --------------------------------------------------------------------------------------------------------------- shares


def whole(batch: Any) -> Any:
    """All of a batch: what one process has."""
    return batch


def share_of(number: int, count: int) -> Share:
    """Every ``count``-th row of a batch."""

    def share(batch: Any) -> Any:
        return tuple(x[number::count] for x in batch)

    return share


def signs(seed: int) -> tuple[Tensor, Tensor]:
    """x [rows, 4] and labels ±1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(ROWS, generator=generator, dtype=torch.float64)
    return x, torch.sign(x.sum(1) + noise)


TRAINING, VALIDATION = signs(0), signs(1)


# --------------------------------------------------------------------------------------------------------------- models


class Network(nn.Module):
    """Two layers, and parameters that the output does not depend on at all, or only linearly."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 1)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))).squeeze(-1)


class Recurrent(nn.Module):
    """A network whose layer holds its weights in a list of its own as well."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(1, 2, batch_first=True), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x.unsqueeze(-1))[0][:, -1]).squeeze(-1)


def network_problem(
    model: nn.Module | None = None,
    *,
    training_data: Any = None,
    validation_data: Any = None,
    optimizer: Any = None,
    training_loss: Any = None,
) -> hi.BilevelProblem:
    """Logistic loss of a network with a decay, and a weight for the error on the first feature's positive side."""

    @hi.hyperparameter("side", init=torch.tensor([0.5, 1.5]), constraint=constraints.positive)
    @hi.hyperparameter("decay", init=0.2, constraint=constraints.positive)
    def loss(model: nn.Module, batch: Any, *, decay: Tensor, side: Tensor) -> Tensor:
        x, y = batch
        errors = torch.log1p(torch.exp(-y * model(x)))
        weight = torch.where(x[:, 0] > 0, side[0], side[1])
        penalty = torch.stack([p.square().sum() for name, p in model.named_parameters() if name != "unused"]).sum()
        return (weight * errors).mean() + 0.5 * decay * penalty

    def validation_loss(model: nn.Module, batch: Any, *, decay: Tensor) -> Tensor:
        x, y = batch
        return torch.log1p(torch.exp(-y * model(x))).mean() + 0.01 * decay

    return hi.BilevelProblem(
        seeded(Network) if model is None else model,
        training_loss or loss,
        validation_loss,
        training_data=training_data,
        validation_data=validation_data,
        optimizer=optimizer or (lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01)),
    )


# ---------------------------------------------------------------------------------------------------------------- tasks


SHORTER: dict[str, dict[str, Any]] = {
    "neumann": {"terms": 30},
    "evolution": {"sigma": 0.1, "pairs": 2},  # a difference at 1e-4 is all rounding in its last ten digits
    "f2sa": {"steps": 30},
    "fixed_point": {"iterations": 100},
    "amigo": {"steps": 30},
    "stocbio": {"terms": 30},
}
"""Options with which as much is computed as shows that the processes agree; how near that is to the truth is tested
elsewhere."""


def backend(case: Case, share: Share) -> Found:
    """A backend's hypergradient on logistic regression, with the options of its row but for ``SHORTER``."""
    chosen = hi.get_backend(case.name, **{**case.options, **SHORTER.get(case.name, {})})
    problem = logistic_problem()
    batches = [share(TRAINING)] * (5 if case.differentiates == "trajectory" else 1)
    validation = share(VALIDATION)
    case.prepare(problem, batches, validation)
    if case.differentiates == "solution":
        for _ in range(30):
            train_step(problem, batches[0], problem.hyperparameters.values())
    result = hi.hypergradient(problem, chosen, training_batches=batches, validation_batch=validation)
    for _ in range(min(case.calls, 10) - 1):
        result = chosen.hypergradient(problem, batches, validation, result.state)
    return _of(result)


def on_network(spec: dict[str, Any], share: Share, **changes: Any) -> Found:
    """A hypergradient of a network on two batches, with parameters of every kind."""
    torch.manual_seed(rank())  # other random numbers in each process, and in one process the first one's
    problem = network_problem(**changes)
    batches = [share(TRAINING), share(signs(2))]
    return _of(hi.hypergradient(problem, spec, training_batches=batches, validation_batch=share(VALIDATION)))


def _of(result: hi.Hypergradient) -> Found:
    numbers = {"validation_loss": result.validation_loss, "training_loss": result.training_loss}
    return {**result.gradients, **numbers, "status": result.status.value}


def gated() -> hi.BilevelProblem:
    """All of λ, and a layer's bias, are used by samples of one kind only."""

    @hi.hyperparameter("decay", init=0.7)
    def training_loss(model: nn.Module, batch: Any, *, decay: Tensor) -> Tensor:
        x, y = batch
        of_kind = x[:, 0] > 0.5
        hidden = torch.tanh(x @ model.first.weight.T)
        loss = torch.log1p(torch.exp(-y * (hidden @ model.second.weight[0]))).mean()
        loss = loss + 0.1 * model.first.weight.square().sum()
        if bool(of_kind.any()):
            loss = loss + torch.sin(decay * model.second.bias.exp() * x[of_kind, 0]).sum() / len(x)
        return loss

    return network_problem(training_loss=training_loss)


NETWORKS: dict[str, dict[str, Any]] = {
    "gauss_newton": {"name": "cg", "tolerance": 1e-13, "curvature": "gauss_newton", "damping": 0.1},
    "gauss_newton, neumann": {"name": "neumann", "terms": 20, "step_size": 0.1, "curvature": "gauss_newton"},
    "damping": {"name": "cg", "tolerance": 1e-13, "damping": 0.5},
    "unrolled": {"name": "unrolled"},
    "unrolled in little memory": {"name": "unrolled", "memory": 20_000},
    "forward": {"name": "forward"},
    "evolution": {"name": "evolution", "sigma": 0.1, "pairs": 3},
    "evolution, unseeded": {"name": "evolution", "sigma": 0.1, "pairs": 2, "seed": None},
    "heavy_ball": {"name": "heavy_ball", "damping": 0.3},
    "sama": {"name": "sama"},
}


def shared_tasks() -> dict[str, Callable[[Share], Found]]:
    """Those whose results on shares must be those on whole batches, by name."""
    tasks: dict[str, Callable[[Share], Found]] = {
        f"backend {case.name}": lambda share, case=case: backend(case, share) for case in CASES
    }
    from . import distributed_scripts as scripts

    tasks |= {f"network {name}": lambda share, spec=spec: on_network(spec, share) for name, spec in NETWORKS.items()}
    same = ("several_orders", "along_a_vector", "three_levels", "other_parts", "whole_runs", "in_a_loop", "not_finite")
    return tasks | {name: getattr(scripts, name) for name in same}


# -------------------------------------------------------------------------------------------------------- as processes


def start(task: str, folder: Path, count: int = 2, seconds: float = 60.0) -> list[subprocess.Popen[str]]:
    """The processes of a group, each of which runs a task of ``distributed_worker.py``.

    Args:
        task: its name.
        folder: where they meet, and where each leaves what it has found.
        count: how many.
        seconds: the group's timeout.
    """
    folder.mkdir(exist_ok=True)
    return [
        subprocess.Popen(
            [sys.executable, "-W", "error", str(WORKER), task, str(rank), str(count), str(folder), str(seconds)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
        )
        for rank in range(count)
    ]


@contextmanager
def started(task: str, folder: Path, count: int = 2, seconds: float = 60.0) -> Iterator[list[subprocess.Popen[str]]]:
    """The same; what still runs at the end is killed."""
    processes = start(task, folder, count, seconds)
    try:
        yield processes
    finally:
        for each in processes:
            each.kill()
            each.communicate()


def found_by(task: str, folder: Path, count: int = 2) -> list[Any]:
    """What each process of a group has found."""
    with started(task, folder, count) as processes:
        for each in processes:
            output, errors = each.communicate(timeout=SECONDS)
            assert each.returncode == 0, output + errors
    return [pickle.loads((folder / f"{task}-{rank}").read_bytes()) for rank in range(count)]


def assert_same(found: Found, expected: Found, relative: float = 1e-10) -> None:
    """Two results agree, tensor by tensor and number by number."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, str | int | type(None) | list):
            assert found[name] == value, name
            continue
        x, y = (torch.as_tensor(each, dtype=torch.float64) for each in (found[name], value))
        off = float((x - y).norm())
        said = f"{name}: {found[name]} instead of {value}, off by {off:.2g}"
        assert off <= relative * float(y.norm()) or off <= 1e-15, said


def assert_all_same(everybody: Sequence[Found]) -> None:
    """All processes have found the same, to the bit."""
    for each in everybody[1:]:
        assert each.keys() == everybody[0].keys()
        for name, value in each.items():
            same = torch.equal(value, everybody[0][name]) if isinstance(value, Tensor) else value == everybody[0][name]
            assert same, name
