"""Batches: endless streams over re-iterable data, and moving a batch of any nesting to a device.

What a batch contains is the losses' business; nothing here looks inside beyond finding its tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data.dataloader import _DatasetKind, _SingleProcessDataLoaderIter

from hyperopt_implicit.errors import DataError
from hyperopt_implicit.messages import warn
from hyperopt_implicit.randomness import AllGenerators, differing

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
        return batch.to(device) if hasattr(batch, "to") and not isinstance(batch, nn.Module | type) else batch
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

    Its place can be saved and found again. In a list that is a number. Data with ``state_dict`` and
    ``load_state_dict`` (torchdata's loaders) knows its place itself. In other data, the generators are put back to
    where they stood when the pass began, and what was taken of it is taken again: of a DataLoader without workers, only
    its indices.

    A sampler that wants to know the number of the pass (``set_epoch`` of torch's DistributedSampler) is told.

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
        self._passes = 0
        self._taken = 0
        self._generators: AllGenerators | None = None
        self._start: dict[str, Any] | None = None

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

    def close(self) -> None:
        """Let go of the data, and so of a loader's workers: left to the garbage collector, they are waited for."""
        if not self.is_list:  # which others may go on reading
            self._iterator, self._ahead = iter(()), []

    def _fetch(self) -> Any:
        nothing = object()
        batch = next(self._iterator, nothing)
        if batch is nothing:
            self._begin_pass()
            batch = next(self._iterator, nothing)
        if batch is nothing:
            raise _empty(self._role)
        self._taken += 1
        return to_device(batch, self._device)

    def _begin_pass(self) -> None:
        set_epoch = getattr(getattr(self._data, "sampler", None), "set_epoch", None)
        if callable(set_epoch):
            set_epoch(self._passes)
        self._passes, self._taken = self._passes + 1, 0
        if self._generators is not None:
            self._start = self._generators.states()
        self._iterator = iter(self._data)

    # -------------------------------------------------------------------------------------------------------- its place

    def remember(self, generators: AllGenerators) -> None:
        """From now on, note where the generators stand when a pass begins; without, :meth:`state_dict` is of no use."""
        if not self.is_list:
            self._generators = generators

    def state_dict(self) -> dict[str, Any]:
        """The place of the stream, with a batch that was looked at and not yet taken."""
        # a batch may hold what no checkpoint can; the very first, at which a run looks before it begins, is read again
        only_looked = self._start is not None and self._passes == self._taken == len(self._ahead) == 1
        knows = _knows_its_place(self._data) and not only_looked
        return {
            "passes": self._passes,
            "taken": self._taken,
            "length": number_of_batches(self._data),
            "ahead": [] if self.is_list or only_looked else list(self._ahead),
            "looked": len(self._ahead),
            "only_looked": only_looked,
            "start": self._start,
            "now": None if self._start is None or self._generators is None else self._generators.states(),
            "own": self._data.state_dict() if knows else None,  # type: ignore[attr-defined]
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a place that :meth:`state_dict` gave. Afterwards the generators stand anywhere.

        Warns:
            HyperoptWarning: the place cannot be found again for certain.
        """
        self._passes, self._taken, self._start = state["passes"], state["taken"], state["start"]
        length = number_of_batches(self._data)
        if length is not None and state["length"] not in (length, None):  # other processes share the data
            self._taken = round(self._taken * length / state["length"])
        self._ahead = [to_device(each, self._device) for each in state["ahead"]]
        if self.is_list:
            self._taken -= state["looked"]
            self._iterator = islice(iter(self._data), self._taken, None)
        elif state["only_looked"]:
            assert self._generators is not None and self._start is not None
            self._generators.put_back(self._start)
            self._passes, self._iterator = 0, iter(())
            self.peek()
        elif state["own"] is not None:
            self._data.load_state_dict(state["own"])  # type: ignore[attr-defined]
            self._iterator = iter(self._data)
        elif self._start is None:
            self._iterator = iter(())  # no pass was begun
        else:
            self._begin_again(state["now"])  # one that is through as well: it may draw once more as it finds that out

    def _begin_again(self, now: Mapping[str, Any]) -> None:
        """Begin the present pass once more, and leave out what was taken of it.

        Args:
            now: where the generators stand after that, and after all else that has drawn from them in the meantime.
        """
        assert self._generators is not None and self._start is not None
        set_epoch = getattr(getattr(self._data, "sampler", None), "set_epoch", None)
        if callable(set_epoch):
            set_epoch(self._passes - 1)
        self._generators.put_back(self._start)
        self._iterator = iter(self._data)
        index = _next_index(self._iterator)
        take = index if index is not None else lambda: next(self._iterator, None)
        first: dict[str, Any] | None = None
        for _ in range(self._taken):
            take()
            first = first or self._generators.states()
        last = self._generators.states()
        drawn = set() if first is None else differing(first, last)
        shared = drawn & differing(last, now)
        torchs = any(kind == "torch" for kind, _ in (shared if index is not None else drawn))
        persistent = index is None and getattr(self._data, "persistent_workers", False)
        if torchs or shared or persistent:
            warn(
                f"{self._role} is iterated in a way whose place cannot be found again for certain: "
                + (
                    "it draws from torch's generator with each batch, as the training does in between. "
                    if torchs
                    else "it draws with each batch from a generator that something else draws from as well. "
                    if shared
                    else "with persistent_workers=True, what its workers draw depends on all passes before. "
                )
                + "What follows may differ from what a run without a break would have seen. Give it a generator of its "
                "own, or the methods state_dict and load_state_dict."
            )


def _knows_its_place(data: Any) -> bool:
    return callable(getattr(data, "state_dict", None)) and callable(getattr(data, "load_state_dict", None))


def _next_index(iterator: Iterator[Any]) -> Callable[[], Any] | None:
    """What moves a DataLoader's iterator on by a batch without loading it, where it loads in this process by index."""
    if not isinstance(iterator, _SingleProcessDataLoaderIter) or iterator._dataset_kind != _DatasetKind.Map:
        return None
    return iterator._next_index


def _empty(role: str) -> DataError:
    return DataError(
        f"{role} must have at least one batch; it is empty. Check the split, the batch size and drop_last of its "
        "loader."
    )
