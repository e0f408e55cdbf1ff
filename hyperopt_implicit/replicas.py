"""What must be the same in all processes of a run: compared, handed out by the first one, kept together.

Each process holds the whole model, all hyperparameters and the optimizers' state, and moves them by the same numbers.
Here is what makes them the same at the start, and what is said where that cannot be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hyperopt_implicit.data import number_of_batches
from hyperopt_implicit.distributed import exchanged, from_first, largest, mean, several, world_size
from hyperopt_implicit.errors import DistributedError

if TYPE_CHECKING:
    from hyperopt_implicit.backend import Backend
    from hyperopt_implicit.problem import BilevelProblem

Facts = dict[str, str]
"""What a process is about to do, by the name of each part."""


def check_alike(problem: BilevelProblem, backend: Backend, options: Mapping[str, Any] | None = None) -> None:
    """Compare what the processes are about to do, and give all of them the first one's values; called by all.

    Compared are the names, shapes and dtypes of parameters, hyperparameters and buffers, the backend, the inner
    optimizer's options, the number of batches, the options given, and what rounding depends on (torch, the kind of
    device, the number of threads). The first process's parameters, buffers, hyperparameters and state of the inner
    optimizer are then everybody's, as ``DistributedDataParallel`` does it.

    Args:
        problem: what is trained.
        backend: how it is differentiated.
        options: more that must be the same, by name.

    Raises:
        DistributedError: processes differ; with the first part in which they do, and which of them.
    """
    if not several():
        return
    _compare(exchanged(_facts(problem, backend, options or {})))
    for x in _values(problem):
        from_first(x)


def refuse_differences(problem: BilevelProblem, backend: Backend) -> None:
    """The same comparison, of the values of parameters and hyperparameters as well; nobody's are changed.

    Raises:
        DistributedError: processes differ.
    """
    if not several():
        return
    values = {f"parameter {name!r}": x for name, x in problem.params.items()}
    values |= {f"hyperparameter {name!r}": x for name, x in problem.hparams.items()}
    sums = {f"the values of {name}": _sum(x) for name, x in values.items()}
    _compare(exchanged(_facts(problem, backend, {}) | sums))


def sync_buffers(model: nn.Module) -> None:
    """Make a model's buffers the same in all processes; called by all.

    Floating-point ones that differ (the running statistics of batch normalisation, each of its own share) become their
    mean, and others the first process's. Those that are the same stay as they are, to the bit.
    """
    if not several():
        return
    buffers = [b for b in model.buffers() if b.numel() > 0]
    real = [b for b in buffers if b.is_floating_point()]
    for dtype, device in dict.fromkeys((b.dtype, b.device) for b in real):
        alike = [b for b in real if (b.dtype, b.device) == (dtype, device)]
        row = torch.cat([b.detach().reshape(-1) for b in alike])
        high = largest(torch.cat([row, -row]))
        found = torch.where(high[: len(row)] == -high[len(row) :], row, mean(row))
        with torch.no_grad():
            for b, piece in zip(alike, found.split([b.numel() for b in alike]), strict=True):
                b.copy_(piece.view(b.shape))
    for b in buffers:
        if not b.is_floating_point():
            from_first(b)


def _facts(problem: BilevelProblem, backend: Backend, options: Mapping[str, Any]) -> Facts:
    facts: Facts = {"the number of parameters": str(len(problem.params))}
    for kind, tensors in (
        ("parameter", problem.params),
        ("hyperparameter", problem.hparams),
        ("buffer", dict(problem.model.named_buffers())),
    ):
        facts |= {f"{kind} {name!r}": f"{tuple(x.shape)} {x.dtype}" for name, x in tensors.items()}
    facts["the backend"] = repr(backend)
    facts["the inner optimizer"] = type(problem.optimizer).__name__
    for i, group in enumerate(problem.optimizer.param_groups):
        for key, value in group.items():
            if key != "params":
                facts[f"option {key!r} of the inner optimizer's group {i}"] = _shown(value)
    for name, x in _optimizer_state(problem):
        facts[f"state {name}"] = f"{tuple(x.shape)} {x.dtype}"
    for role in ("training_data", "validation_data"):
        data = getattr(problem, role)
        facts[f"the number of batches of {role}"] = str(None if data is None else number_of_batches(data))
    facts |= {f"option {name!r}": _shown(value) for name, value in options.items()}
    facts["the version of torch"] = torch.__version__
    facts["the kind of device"] = problem.device.type
    facts["the number of threads (torch.get_num_threads())"] = str(torch.get_num_threads())
    return facts


def _compare(everybody: list[Facts]) -> None:
    mine = everybody[0]
    for number, theirs in enumerate(everybody[1:], 1):
        for name in [*mine, *(name for name in theirs if name not in mine)]:
            here, there = mine.get(name, "not there"), theirs.get(name, "not there")
            if here != there:
                raise DistributedError(
                    f"all processes of a run must do the same; they differ in {name}: in process 0 of {world_size()} "
                    f"it is {here}, in process {number} it is {there}. {_remedy(name)}"
                )


def _remedy(name: str) -> str:
    if name.startswith("the number of batches"):
        return "Give each process as many batches as the others, as a DistributedSampler with drop_last=True does."
    if name.startswith("the number of threads"):
        return "Set OMP_NUM_THREADS, or torch.set_num_threads, to one number for all: sums are rounded by it."
    if name.startswith(("the version", "the kind")):
        return "Run all of them with the same versions and on the same kind of device: they decide by their numbers."
    if name.startswith("the values"):
        return "Load the same into all of them, or call check_alike first, which gives all the first one's."
    return "Build the model, the problem and the run from the same code and arguments in each of them."


def _values(problem: BilevelProblem) -> Iterator[Tensor]:
    """All that processes must hold alike, in an order that is the same in each."""
    yield from problem.params.values()
    yield from (p for p in problem.model.parameters() if not any(p is q for q in problem.params.values()))
    yield from (b for b in problem.model.buffers() if b.numel() > 0)
    yield from problem.hyperparameters.parameters()
    yield from problem.hyperparameters.buffers()
    yield from (x for _, x in _optimizer_state(problem))


def _optimizer_state(problem: BilevelProblem) -> Iterator[tuple[str, Tensor]]:
    for name, p in problem.params.items():
        kept = problem.optimizer.state.get(p, {})
        for key in sorted(map(str, kept)):
            if isinstance(kept[key], Tensor):
                yield f"{key!r} of the inner optimizer for {name!r}", kept[key]


def _sum(x: Tensor) -> str:
    """A number by which values are told apart; others with the same sum of squares are not meant to be found."""
    x = torch.view_as_real(x.detach()) if x.is_complex() else x.detach()
    return f"a tensor of norm {float(x.double().norm()):.17g} and sum {float(x.double().sum()):.17g}"


def _shown(value: Any) -> str:
    return str(value.tolist()) if isinstance(value, Tensor) and value.numel() <= 16 else repr(value)[:200]
