"""Batches: endless streams over re-iterable data, and moving a batch of any nesting to a device.

What a batch contains is the losses' business; nothing here looks inside beyond finding its tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hyperopt_implicit.errors import DataError

Data = Iterable[Any]


def check_data(data: Any, role: str) -> None:
    """Refuse what would be iterated wrongly: a batch in place of a list of batches, a generator, nothing at all."""
    if isinstance(data, Tensor | Mapping | str) or (
        isinstance(data, tuple) and any(isinstance(x, Tensor) for x in data)
    ):
        raise DataError(
            f"{role} must be a re-iterable of batches; got a single {type(data).__name__}, which would be iterated "
            "row by row. Wrap it in a list, [batch], to use it as one full batch."
        )
    if isinstance(data, Iterator):
        raise DataError(
            f"{role} must be iterable more than once; got {type(data).__name__}, which is spent after one pass. Pass a "
            f"list of batches, a DataLoader, or an object whose __iter__ starts anew."
        )
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise DataError(f"{role} must be a re-iterable of batches (a DataLoader, a list); got {type(data).__name__}.")
    if number_of_batches(data) == 0:
        raise _empty(role)


def number_of_batches(data: Data) -> int | None:
    """How many batches one pass has, where the data can say."""
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError:
        return None


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with everything that has a ``.to`` moved to the device; dicts, lists and (named) tuples are entered."""
    if isinstance(batch, Tensor):
        # from pinned memory to CUDA the caller need not wait; other copies could be read before they have arrived
        return batch.to(device, non_blocking=device.type == "cuda")
    if type(batch) is tuple:  # the common case, at a tenth of what a tree costs
        return tuple([to_device(each, device) for each in batch])
    if pytree.tree_is_leaf(batch):
        return batch.to(device) if hasattr(batch, "to") and not isinstance(batch, nn.Module) else batch
    return pytree.tree_map(lambda leaf: to_device(leaf, device), batch)


def bytes_of(batch: Any) -> int:
    """The memory of all tensors in a batch of any nesting, those that objects of somebody's own type hold as well."""
    total, seen, waiting = 0, set(), [batch]
    while waiting:
        each = waiting.pop()
        if isinstance(each, Tensor):
            total += each.numel() * each.element_size()
        elif id(each) not in seen and not isinstance(each, nn.Module):
            seen.add(id(each))
            if isinstance(each, Mapping):
                waiting.extend(each.values())
            elif isinstance(each, list | tuple):
                waiting.extend(each)
            elif hasattr(each, "to"):
                waiting.extend(getattr(each, "__dict__", {}).values())
    return total


class BatchStream:
    """An endless stream over re-iterable data: pass after pass, each batch moved to the device when it is taken.

    Attributes:
        is_list: whether the batches stand in a list, so that taking one draws no random numbers.
        is_resident: whether they are in memory anyway, so that holding one takes none.
    """

    def __init__(self, data: Data, device: torch.device, role: str) -> None:
        self._data = data
        self.is_list = type(data) in (list, tuple)  # a subclass may iterate otherwise
        self.is_resident = self.is_list and device.type == "cpu"
        self._device = device
        self._role = role
        self._iterator: Iterator[Any] = iter(())
        self._ahead: list[Any] = []

    def next(self) -> Any:
        """The next batch; a new pass begins when the data is through."""
        return self._ahead.pop() if self._ahead else self._fetch()

    def take(self, count: int) -> list[Any]:
        """The next ``count`` batches."""
        return [self.next() for _ in range(count)]

    def peek(self) -> Any:
        """The batch that :meth:`next` will return, without consuming it."""
        if not self._ahead:
            self._ahead.append(self._fetch())
        return self._ahead[0]

    def _fetch(self) -> Any:
        nothing = object()
        batch = next(self._iterator, nothing)
        if batch is nothing:
            self._iterator = iter(self._data)
            batch = next(self._iterator, nothing)
        if batch is nothing:
            raise _empty(self._role)
        return to_device(batch, self._device)


def _empty(role: str) -> DataError:
    return DataError(
        f"{role} must have at least one batch; it is empty. Check the split, the batch size and drop_last of its "
        "loader."
    )
