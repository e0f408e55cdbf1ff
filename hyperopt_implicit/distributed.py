"""The processes of one run: who this one is, and what they tell each other.

Several processes train one model where ``torch.distributed`` has a group of more than one, each with its share of every
batch. Here are the few things that they say: means, decisions, numbers of the first one; and the error where one of
them does not answer. How a loss over shares is differentiated is in ``shares.py``, and what must be the same in all
processes in ``replicas.py``. Without a group everything here is that of a process alone, and costs a boolean test.

Every function that says so is called by all processes, in the same order, or they wait for each other.
"""

from __future__ import annotations

import atexit
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from hyperopt_implicit.errors import DistributedError

Kind = tuple[torch.Size, torch.dtype, torch.device]
"""What a tensor is beside its values."""

Result = TypeVar("Result")

_NARROW = (torch.float16, torch.bfloat16)  # sums of many shares are taken in float32


def several() -> bool:
    """Whether this process is one of a group."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def rank() -> int:
    """The number of this process, from 0; 0 for one alone.

    Example:
        >>> from hyperopt_implicit.distributed import rank, world_size
        >>> rank(), world_size()
        (0, 1)
    """
    return distributed.get_rank() if several() else 0


def world_size() -> int:
    """How many processes there are; 1 for one alone."""
    return distributed.get_world_size() if several() else 1


def is_first() -> bool:
    """Whether this is the process that logs, prints and writes files; one alone is.

    Example:
        >>> from hyperopt_implicit.distributed import is_first
        >>> is_first()
        True
    """
    return rank() == 0


# ------------------------------------------------------------------------------------------------------------ decisions


def agree(any_: Sequence[bool] = (), first: Sequence[bool] = ()) -> list[bool]:
    """Decisions that all processes then take alike, in one small message; called by all.

    Args:
        any_: what is done where any process wants it, such as stopping on a signal that only one of them has received.
        first: what the first process decides, such as what depends on time or on a callback.

    Returns:
        Those of ``any_``, then those of ``first``.

    Example:
        >>> from hyperopt_implicit.distributed import agree
        >>> agree(any_=[False, True], first=[True])
        [False, True, True]
    """
    flags = [*any_, *(each and is_first() for each in first)]
    if not several() or not flags:
        return [bool(each) for each in flags]
    said = torch.tensor(flags, dtype=torch.float32, device=_device())
    _all_reduce(said)
    return [each > 0.0 for each in said.tolist()]


def first_decides(flag: bool) -> bool:
    """What the first process says; called by all.

    Example:
        >>> from hyperopt_implicit.distributed import first_decides
        >>> first_decides(True)
        True
    """
    return agree(first=[flag])[0]


def first_numbers(numbers: Sequence[float]) -> list[float]:
    """The first process's, such as times that it has measured; called by all, with the same count.

    Example:
        >>> from hyperopt_implicit.distributed import first_numbers
        >>> first_numbers([0.5, 2.0])
        [0.5, 2.0]
    """
    if not several():
        return list(numbers)
    told = torch.tensor(numbers, dtype=torch.float64, device=_device())
    from_first(told)
    found: list[float] = told.tolist()
    return found


def summed(numbers: Sequence[float]) -> list[float]:
    """The sums over all processes; called by all, with the same count.

    Example:
        >>> from hyperopt_implicit.distributed import summed
        >>> summed([0.5, 2.0])
        [0.5, 2.0]
    """
    if not several():
        return list(numbers)
    told = torch.tensor(numbers, dtype=torch.float64, device=_device())
    _all_reduce(told)
    found: list[float] = told.tolist()
    return found


def largest_number(number: float) -> float:
    """The largest over all processes; called by all.

    Example:
        >>> from hyperopt_implicit.distributed import largest_number
        >>> largest_number(2.0)
        2.0
    """
    return float(largest(torch.tensor(number, dtype=torch.float64, device=_device()))) if several() else number


def agreed_seed(seed: int | None) -> int | None:
    """The first process's seed; called by all.

    Example:
        >>> from hyperopt_implicit.distributed import agreed_seed
        >>> agreed_seed(3)
        3
    """
    return broadcast_object(seed) if several() else seed


def broadcast_object(value: Result) -> Result:
    """The first process's value of anything that can be pickled; called by all.

    Example:
        >>> from hyperopt_implicit.distributed import broadcast_object
        >>> broadcast_object({"path": "runs/1"})
        {'path': 'runs/1'}
    """
    if not several():
        return value
    box = [value]
    _answered(lambda: distributed.broadcast_object_list(box, src=0, device=_device()))
    return box[0]


def gathered(value: Any) -> list[Any] | None:
    """Each process's value, in the order of their numbers, for the first one; None for the others. Called by all.

    Example:
        >>> from hyperopt_implicit.distributed import gathered
        >>> gathered("mine")
        ['mine']
    """
    if not several():
        return [value]
    box: list[Any] | None = [None] * world_size() if is_first() else None
    _answered(lambda: distributed.gather_object(value, box, dst=0))
    return box


def exchanged(value: Any) -> list[Any]:
    """Each process's value, in the order of their numbers, for all of them; called by all."""
    if not several():
        return [value]
    box: list[Any] = [None] * world_size()
    _answered(lambda: distributed.all_gather_object(box, value))
    return box


# -------------------------------------------------------------------------------------------------------------- tensors


def kind_of(x: Tensor) -> Kind:
    """Shape, dtype and device."""
    return x.shape, x.dtype, x.device


@torch.no_grad()
def mean(x: Tensor) -> Tensor:
    """The mean over all processes, element by element; called by all."""
    if not several():
        return x
    found = x.detach().to(_transported(x.dtype), copy=True)
    _all_reduce(torch.view_as_real(found) if found.is_complex() else found)
    return (found / world_size()).to(x.dtype if x.dtype.is_floating_point or x.is_complex() else found.dtype)


@torch.no_grad()
def mean_row(row: Sequence[Tensor | None], kinds: Sequence[Kind]) -> list[Tensor | None]:
    """The means of a row of tensors over all processes, in one message for each dtype and device; called by all.

    A tensor that some processes lack is zero there; one that all of them lack stays missing. Every process sends the
    same number of bytes, whatever it lacks.

    Args:
        row: the tensors.
        kinds: what each of them is, or would be.
    """
    alike: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i, (_, dtype, device) in enumerate(kinds):
        alike.setdefault((dtype, device), []).append(i)
    present: list[float] | None = None
    found: list[Tensor | None] = [None] * len(kinds)
    for (dtype, device), places in alike.items():
        pieces = [_flat(row[i], kinds[i]) for i in places]
        if present is None:  # who has which, beside the first of them
            here = [float(x is not None) for x in row]
            pieces.append(torch.tensor(here, dtype=pieces[0].dtype, device=device))
        message = torch.cat(pieces)
        _all_reduce(message)
        if present is None:
            present = message[-len(row) :].tolist()
            message = message[: -len(row)]
        message.div_(world_size())
        for i, piece in zip(places, message.split([len(each) for each in pieces[: len(places)]]), strict=True):
            if present[i] > 0.0:
                shape = kinds[i][0]
                found[i] = (torch.view_as_complex(piece.view(*shape, 2)) if dtype.is_complex else piece.view(shape)).to(
                    dtype
                )
    return found


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Put the mean over all processes in the place of each parameter's ``grad``, in one message; called by all.

    A parameter without a gradient in any process stays without one.
    """
    row = mean_row([p.grad for p in parameters], [kind_of(p) for p in parameters])
    for p, gradient in zip(parameters, row, strict=True):
        p.grad = gradient


@torch.no_grad()
def from_first(x: Tensor) -> None:
    """Put the first process's values into a tensor; called by all."""
    message = torch.view_as_real(x.detach()) if x.is_complex() else x.detach()
    sent = message.to(_device()).contiguous()
    _answered(lambda: distributed.broadcast(sent, src=0))
    if sent is not message:
        message.copy_(sent)


@torch.no_grad()
def largest(x: Tensor) -> Tensor:
    """The largest over all processes, element by element; called by all."""
    found = x.detach().clone()
    _all_reduce(found, distributed.ReduceOp.MAX)
    return found


def _flat(x: Tensor | None, kind: Kind) -> Tensor:
    """A tensor as the row of real numbers that is sent."""
    shape, dtype, device = kind
    x = torch.zeros(shape, dtype=dtype, device=device) if x is None else x.detach()
    x = x.to_dense() if x.layout is not torch.strided else x
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    return x.reshape(-1).to(_transported(x.dtype))


def _transported(dtype: torch.dtype) -> torch.dtype:
    """In what a sum over processes is taken."""
    if dtype in _NARROW:
        return torch.float32
    return dtype if dtype.is_floating_point or dtype.is_complex else torch.float64


def _device() -> torch.device:
    """Where messages that belong to no tensor are put: gloo sends from memory, NCCL from the GPU of the process."""
    if "gloo" in str(distributed.get_backend_config()):
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    return torch.device("cpu") if kind is None else torch.device(kind.type, torch.accelerator.current_device_index())


def _all_reduce(message: Tensor, how: Any = None) -> None:
    _answered(lambda: distributed.all_reduce(message, how or distributed.ReduceOp.SUM))


def _answered(call: Callable[[], object]) -> None:
    """Send, and wait for the others, one of whom may be gone.

    Raises:
        DistributedError: with what torch says of it.
    """
    try:
        call()
    except RuntimeError as error:
        me, count = rank(), world_size()
        other = f"process {1 - me}" if count == 2 else "one of the others"
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        said = re.sub(r"^\[[^]]*\] ?", "", line).partition(" This is typically")[0].rstrip(".")[:200]
        atexit.register(_leave)
        raise DistributedError(
            f"all processes of a run must answer each other; process {me} of {count} (numbered from 0) has lost "
            f"{other}, which has ended, or has not answered within the group's timeout. Look at its output for the "
            "reason, and start all of them again, from the last checkpoint where there is one. "
            f"(torch says: {said})"
        ) from error


def _leave() -> None:
    """Put away a group that has failed: a thread of it that waits can abort the process at its end."""
    if distributed.is_initialized() and _device().type == "cpu":
        distributed.destroy_process_group()
