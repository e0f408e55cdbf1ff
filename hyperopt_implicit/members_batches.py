"""Batches of many members of a population: fetched as each would get them alone, and put together for one computation.

What is done with them is in ``members.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hyperopt_implicit.data import BatchStream
from hyperopt_implicit.randomness import random_states, set_random_states

_PLAIN = (int, float, bool, str, bytes, type(None))


@dataclass(frozen=True)
class Part:
    """The batches of those members that have batches of one structure.

    Attributes:
        members: which, by position; None where it is all of them.
        tensors: the tensors of the batches, those that differ stacked.
        dims: 0 for each that is stacked, and None for one that all of them share.
        make: puts tensors of one member in the place of its own.
    """

    members: list[int] | None
    tensors: list[Tensor]
    dims: list[int | None]
    make: Callable[[Sequence[Tensor]], Any]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Part:
        """The same with other tensors."""
        return replace(self, tensors=list(tensors))


def put_together(batches: Sequence[Any]) -> list[Part]:
    """One batch a member, as few parts as their structures allow."""
    first = batches[0]
    if all(each is first for each in batches):
        return [_part(None, [first])]
    kinds: dict[Any, list[int]] = {}
    for i, each in enumerate(batches):
        kinds.setdefault(structure(each), []).append(i)
    if len(kinds) == 1:
        return [_part(None, batches)]
    return [_part(members, [batches[i] for i in members]) for members in kinds.values()]


def structure(batch: Any) -> Any:
    """What two batches must have in common to be stacked: nesting, shapes, dtypes, and all that is no tensor."""
    leaves, spec = pytree.tree_flatten(batch)
    kinds = tuple((tuple(x.shape), x.dtype, x.device) if isinstance(x, Tensor) else _constant(x) for x in leaves)
    return str(spec), kinds


def _constant(x: Any) -> Any:
    return (type(x), x) if isinstance(x, _PLAIN) else (type(x), id(x))


def _part(members: list[int] | None, batches: Sequence[Any]) -> Part:
    leaves, spec = pytree.tree_flatten(batches[0])
    places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
    rows = [[leaves[i] for i in places]]
    rows += [[x for x in pytree.tree_leaves(each) if isinstance(x, Tensor)] for each in batches[1:]]
    tensors: list[Tensor] = []
    dims: list[int | None] = []
    for column in zip(*rows, strict=True):
        shared = all(x is column[0] for x in column)
        tensors.append(column[0] if shared else torch.stack(column))
        dims.append(None if shared else 0)

    def make(given: Sequence[Tensor]) -> Any:
        if isinstance(batches[0], Tensor):
            return given[0]
        own = list(leaves)
        for place, x in zip(places, given, strict=True):
            own[place] = x
        return pytree.tree_unflatten(own, spec)

    return Part(members, tensors, dims, make)


class Generators:
    """A state of torch's generators for each member: what its run alone would draw from.

    Args:
        states: a member's own; None where it draws from the generators as they stand.
        device: of the members.
    """

    def __init__(self, states: Sequence[list[Tensor] | None], device: torch.device) -> None:
        self._states = list(states)
        self._device = device

    def keep(self, members: Sequence[int]) -> None:
        """Go on with these members only."""
        self._states = [self._states[i] for i in members]

    @contextmanager
    def of(self, member: int) -> Iterator[None]:
        """Inside, the member's generators; what is drawn there, only it has drawn."""
        own = self._states[member]
        if own is None:
            yield
            return
        before = random_states(self._device)
        set_random_states(own, self._device)
        try:
            yield
        finally:
            self._states[member] = random_states(self._device)
            set_random_states(before, self._device)


class MembersStream:
    """The streams of all members, side by side.

    Where all of them hold the same batches in a list, one is read for all.

    Attributes:
        is_resident: whether all batches are in memory anyway.
    """

    def __init__(self, streams: Sequence[BatchStream], data: Sequence[Any], generators: Generators) -> None:
        self._streams, self._data, self._generators = list(streams), list(data), generators
        self._shared = _same_lists(data)
        self._gone: set[int] = set()
        self.is_resident = all(each.is_resident for each in streams)

    def keep(self, members: Sequence[int]) -> None:
        """Go on with these members only."""
        reader, self._gone = self._streams[0], set()
        self._streams = [self._streams[i] for i in members]
        self._data = [self._data[i] for i in members]
        if self._shared and members:
            self._streams[0] = reader

    def drop(self, member: int) -> None:
        """Read no more for a member, and give another's batches in its place."""
        self._gone.add(member)

    def place(self, member: int) -> None:
        """Move the member's own stream to where it would be, had the member read by itself."""
        if self._shared and member:
            self._streams[member].load_state_dict(self._streams[0].state_dict())

    def next(self) -> list[Any]:
        """The next batch of each member."""
        if self._shared:
            return [self._streams[0].next()] * len(self._streams)
        found: list[Any] = []
        for i, stream in enumerate(self._streams):
            if i in self._gone:
                found.append(None)
                continue
            with self._of(i, stream):
                found.append(stream.next())
        if self._gone:
            other = next(i for i in range(len(found)) if i not in self._gone)
            found = [found[other] if i in self._gone else x for i, x in enumerate(found)]
        return found

    def peek(self) -> list[Any]:
        """The batches that :meth:`next` will give."""
        found = []
        for i, stream in enumerate(self._streams):
            with self._of(i, stream):
                found.append(stream.peek())
        return found

    def _of(self, member: int, stream: BatchStream) -> AbstractContextManager[None]:
        return _nothing() if stream.is_list else self._generators.of(member)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _same_lists(data: Sequence[Any]) -> bool:
    """Whether all members read the very same batches in the same order, from lists."""
    first = data[0]
    if any(type(each) not in (list, tuple) or len(each) != len(first) for each in data):
        return False
    return all(_same(x, y) for each in data[1:] for x, y in zip(first, each, strict=True))


def _same(x: Any, y: Any) -> bool:
    if x is y:
        return True
    if type(x) is type(y) and type(x) in (list, tuple) and len(x) == len(y):
        return all(_same(a, b) for a, b in zip(x, y, strict=True))
    return type(x) in (int, float, bool, str) and type(x) is type(y) and x == y
