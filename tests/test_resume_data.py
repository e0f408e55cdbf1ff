"""Where a stream of batches stands can be saved and found again, whatever the data is; or else it is said."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import hyperopt_implicit as hi
from hyperopt_implicit.data import BatchStream
from hyperopt_implicit.randomness import AllGenerators

CPU = torch.device("cpu")
NUMBERS = TensorDataset(torch.arange(10.0))


class Noisy(Dataset[Tensor]):
    """Draws from every global generator with each sample."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([index, float(torch.rand(())), numpy.random.rand(), random.random()])


class Stream(IterableDataset[Tensor]):
    """Has no indices."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.arange(10.0)


class Own:
    """A re-iterable with generators of its own, in the order of a buffer that is shuffled."""

    def __init__(self) -> None:
        self.inner = {"generators": [numpy.random.default_rng(3), random.Random(4), numpy.random.RandomState(5)]}

    def __iter__(self) -> Iterator[Tensor]:
        drawn, chosen, old = self.inner["generators"]
        numbers = list(range(6))
        chosen.shuffle(numbers)
        for number in numbers:
            yield torch.tensor([number, drawn.random(), old.rand()])


class Jitter(Dataset[Tensor]):
    """Its noise comes from a generator that a part of it holds."""

    def __init__(self) -> None:
        self.transform = {"noise": seeded()}

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Tensor:
        return index + torch.rand((), generator=self.transform["noise"])


class KnowsItsPlace:
    """Data in the manner of torchdata's loaders."""

    def __init__(self) -> None:
        self.at = 0
        self.read: list[int] = []

    def __iter__(self) -> Iterator[Tensor]:
        while self.at < 7:
            self.at += 1
            self.read.append(self.at)
            yield torch.tensor(float(self.at))
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def loader(data: Any = NUMBERS, **options: Any) -> DataLoader[Any]:
    return DataLoader(data, **{"batch_size": 2, **options})


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


KINDS = {
    "list": lambda: [torch.tensor(float(i)) for i in range(4)],
    "in order": loader,
    "shuffled": lambda: loader(shuffle=True),
    "own generator": lambda: loader(shuffle=True, generator=seeded()),
    "random samples": lambda: loader(sampler=RandomSampler(NUMBERS, True, 14, generator=seeded())),
    "weights": lambda: loader(sampler=WeightedRandomSampler([1.0] * 10, 6)),
    "subset": lambda: loader(sampler=SubsetRandomSampler(range(8), generator=seeded())),
    "last one dropped": lambda: loader(batch_size=3, shuffle=True, drop_last=True),
    "noisy": lambda: loader(Noisy(), shuffle=True),
    "workers": lambda: loader(Noisy(), shuffle=True, num_workers=2),
    "no indices": lambda: loader(Stream()),
    "own": Own,
    "far inside": lambda: loader(Subset(Jitter(), range(9))),
    "knows its place": KnowsItsPlace,
    "distributed": lambda: loader(sampler=DistributedSampler(NUMBERS, num_replicas=2, rank=0)),
}


def opened(data: Any) -> tuple[BatchStream, AllGenerators]:
    generators = AllGenerators(CPU, [data])
    stream = BatchStream(data, CPU, "training_data")
    stream.remember(generators)
    return stream, generators


def taken(stream: BatchStream, count: int, *, noise: bool = True) -> list[Any]:
    """Batches, between which a training draws random numbers too."""
    found = []
    for _ in range(count):
        found.append(stream.next())
        if noise:
            torch.rand(3)
    return found


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


@pytest.mark.parametrize("before", [0, 1, 2, 5, 7, 11])
@pytest.mark.parametrize("kind", KINDS)
def test_what_follows_is_the_same(kind: str, before: int) -> None:
    for each in (torch.manual_seed, numpy.random.seed, random.seed):
        each(1)
    stream, generators = opened(KINDS[kind]())
    taken(stream, before)
    if before == 2:
        stream.peek()
    state = through_a_file([stream.state_dict(), generators.states()])
    wanted = taken(stream, 12)

    for each in (torch.manual_seed, numpy.random.seed, random.seed):
        each(2)
    again, generators = opened(KINDS[kind]())
    again.load_state_dict(state[0])
    generators.put_back(state[1])
    torch.testing.assert_close(taken(again, 12), wanted, rtol=0, atol=0)


def test_share_of_another_size_goes_on_at_the_same_place_in_the_pass() -> None:
    """Twice as many processes have half as many batches each."""
    data = [torch.tensor(float(i)) for i in range(12)]
    stream, _ = opened(data)
    taken(stream, 12 + 4)
    again, _ = opened(data[:6])
    again.load_state_dict(stream.state_dict())
    assert [float(each) for each in taken(again, 5)] == [2.0, 3.0, 4.0, 5.0, 0.0]


def test_samples_that_were_taken_are_not_loaded_again() -> None:
    """A loader without workers is moved on by its indices."""
    loaded: list[int] = []

    class Recorded(Noisy):
        def __getitem__(self, index: int) -> Tensor:
            loaded.append(index)
            return super().__getitem__(index)

    stream, generators = opened(loader(Recorded(), shuffle=True))
    taken(stream, 4)
    state = [stream.state_dict(), generators.states()]
    again, generators = opened(loader(Recorded(), shuffle=True))
    loaded.clear()
    again.load_state_dict(state[0])
    assert loaded == []


def test_data_that_knows_its_place_reads_nothing_twice() -> None:
    stream, _ = opened(KnowsItsPlace())
    taken(stream, 4)
    data = KnowsItsPlace()
    again, _ = opened(data)
    again.load_state_dict(stream.state_dict())
    taken(again, 2)
    assert data.read == [5, 6]


def test_sampler_is_told_the_pass() -> None:
    """Torch's DistributedSampler gives the same order in each pass to those who do not tell it."""
    sampler = DistributedSampler(NUMBERS, num_replicas=2, rank=0)
    stream, _ = opened(loader(sampler=sampler))
    orders = [torch.cat([batch[0] for batch in taken(stream, 3)]).tolist() for _ in range(3)]
    assert len({tuple(each) for each in orders}) == 3
    assert [sorted(each) for each in orders] != orders


class Undecided:
    """Draws from torch's own generator with each batch, and keeps what it has drawn."""

    def __iter__(self) -> Iterator[Tensor]:
        numbers = list(range(6))
        while numbers:
            yield torch.tensor(numbers.pop(int(torch.randint(len(numbers), ()))))


def test_place_that_cannot_be_found_again_is_told() -> None:
    stream, _ = opened(Undecided())
    taken(stream, 3)
    again, _ = opened(Undecided())
    with pytest.warns(
        hi.HyperoptWarning, match=r"training_data is iterated.*draws from torch's generator with each batch"
    ):
        again.load_state_dict(stream.state_dict())


def test_persistent_workers_are_told() -> None:
    data = loader(Noisy(), num_workers=1, persistent_workers=True)
    stream, _ = opened(data)
    taken(stream, 2)
    again, _ = opened(loader(Noisy(), num_workers=1, persistent_workers=True))
    with pytest.warns(hi.HyperoptWarning, match="persistent_workers=True, what its workers draw depends on all passes"):
        again.load_state_dict(stream.state_dict())
