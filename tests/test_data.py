"""Batches: endless streams over re-iterable data, and batches of any nesting on the model's device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import hyperopt_implicit as hi
from hyperopt_implicit.data import BatchStream, check_data, number_of_batches, to_device

CPU, META = torch.device("cpu"), torch.device("meta")


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


class Graph:
    """A batch of somebody's own type that knows how to move."""

    def __init__(self, where: torch.device) -> None:
        self.where = where

    def to(self, device: torch.device) -> Graph:
        return Graph(device)


def test_every_tensor_of_a_nested_batch_is_moved() -> None:
    module = nn.Linear(1, 1)
    batch = {
        "pair": Pair(torch.ones(2), torch.ones(3)),
        "list": [torch.ones(1), (torch.ones(1), "text")],
        "graph": Graph(CPU),
        "number": 3,
        "nothing": None,
        "module": module,
    }
    moved = to_device(batch, META)
    assert isinstance(moved["pair"], Pair)
    assert [moved["pair"].x.device, moved["pair"].y.device] == [META, META]
    assert [moved["list"][0].device, moved["list"][1][0].device, moved["list"][1][1]] == [META, META, "text"]
    assert moved["graph"].where == META
    assert (moved["number"], moved["nothing"]) == (3, None)
    assert moved["module"] is module
    assert batch["pair"].x.device == CPU  # type: ignore[union-attr]
    assert to_device(torch.ones(1), META).device == META


class Watched(Tensor):
    """A tensor that notes whether it was moved without waiting."""

    waits: list[bool]

    def to(self, *args: Any, **options: Any) -> Watched:  # type: ignore[override]
        self.waits.append(not options.get("non_blocking", False))
        return self


@pytest.mark.parametrize("device", ["cuda", "cpu", "mps"])
def test_only_copies_to_cuda_are_not_waited_for(device: str) -> None:
    """Another device's copy could be read before it has arrived."""
    tensor = torch.ones(2).as_subclass(Watched)
    tensor.waits = []
    to_device((tensor,), torch.device(device))
    assert tensor.waits == [device != "cuda"]


class Shuffled(list[int]):
    """A list that draws its order anew in each pass."""

    def __iter__(self) -> Iterator[int]:
        return iter([self[i] for i in torch.randperm(len(self))])


def test_list_that_iterates_otherwise_is_not_taken_for_a_list() -> None:
    """Its draws are replayed with the steps, and nothing is foretold of which batches come when."""
    assert not BatchStream(Shuffled([1, 2]), CPU, "training_data").is_list
    assert BatchStream([1, 2], CPU, "training_data").is_list and BatchStream((1, 2), CPU, "training_data").is_list


def test_stream_begins_anew_after_each_pass() -> None:
    stream = BatchStream([1, 2, 3], CPU, "training_data")
    assert stream.take(7) == [1, 2, 3, 1, 2, 3, 1]


def test_peek_consumes_nothing() -> None:
    stream = BatchStream([1, 2], CPU, "training_data")
    assert [stream.peek(), stream.peek(), stream.next(), stream.peek(), stream.next(), stream.next()] == [
        1,
        1,
        1,
        2,
        2,
        1,
    ]


def test_shuffled_loader_gives_another_order_each_pass() -> None:
    loader = DataLoader(TensorDataset(torch.arange(20)), batch_size=20, shuffle=True)
    first, second = BatchStream(loader, CPU, "training_data").take(2)
    assert first[0].tolist() != second[0].tolist()
    assert sorted(first[0].tolist()) == sorted(second[0].tolist())


class Endless(IterableDataset[Tensor]):
    """A data set that does not know its length."""

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield torch.ones(1)


@pytest.mark.parametrize(
    ("data", "count"),
    [
        ([1, 2], 2),
        (DataLoader(TensorDataset(torch.ones(5)), batch_size=2), 3),
        (DataLoader(Endless(), batch_size=2), None),
        (Endless(), None),
        ((1, 2, 3), 3),
        ([torch.ones(2)], 1),
        (range(4), 4),
    ],
    ids=["list", "loader", "endless loader", "endless", "tuple of batches", "list of tensors", "range"],
)
def test_data_that_can_be_iterated_again_is_accepted(data: Any, count: int | None) -> None:
    check_data(data, "training_data")
    assert number_of_batches(data) == count
    BatchStream(data, CPU, "training_data").take(3)


def test_data_that_runs_dry_later_is_refused_by_name() -> None:
    batches = [1]
    stream = BatchStream(batches, CPU, "validation_data")
    stream.next()
    batches.clear()
    with pytest.raises(hi.DataError, match=r"^validation_data must have at least one batch"):
        stream.next()
