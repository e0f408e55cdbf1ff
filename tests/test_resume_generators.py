"""Batches of any type, and random generators wherever they are kept, in runs that are resumed.

The places of streams by themselves are in ``test_resume_data.py``.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    default_collate,
)

import hyperopt_implicit as hi
from hyperopt_implicit.randomness import generators_in

from .stopped_runs import StoppedError, X, Y, assert_resumes, decayed, loader, problem, run, stop

pytestmark = pytest.mark.filterwarnings("ignore:hypergradient:hyperopt_implicit.HyperoptWarning")


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


class Own:
    """A batch of a type that no file may hold."""

    def __init__(self, samples: list[tuple[Tensor, Tensor]]) -> None:
        self.parts = default_collate(samples)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.parts)


def pairs(samples: list[tuple[Tensor, Tensor]]) -> Pair:
    return Pair(*default_collate(samples))


@pytest.mark.parametrize("collate", [pairs, Own])
@pytest.mark.parametrize("role", ["training", "validation"])
@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_batches_of_any_type(collate: Any, role: str, warmup_steps: int, tmp_path: Path) -> None:
    """The first ones are looked at before the first step, and would have been saved."""
    data = functools.partial(loader, collate_fn=collate)
    assert_resumes(lambda: problem(**{role: data}), tmp_path, warmup_steps=warmup_steps)


GENERATOR = torch.Generator()


def by_global_name(samples: Any) -> list[Tensor]:
    x, y = default_collate(samples)
    return [x + 0.1 * torch.randn(x.shape, generator=GENERATOR), y]


class OfItsClass(Dataset[Any]):
    generator = torch.Generator()

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        return X[index] + 0.1 * torch.randn(3, generator=self.generator), Y[index]


class InASlot:
    __slots__ = ("generator",)

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(2)

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Any]:
        for i in range(3):
            yield X[8 * i : 8 * i + 8] + 0.1 * torch.randn(8, 3, generator=self.generator), Y[8 * i : 8 * i + 8]


def hidden(kind: str) -> Any:
    """Data that draws from a generator which no attribute of an object says."""
    generator = torch.Generator().manual_seed(2)
    GENERATOR.manual_seed(2)
    OfItsClass.generator.manual_seed(2)

    def noisy(samples: Any, generator: torch.Generator = generator) -> list[Tensor]:
        x, y = default_collate(samples)
        return [x + 0.1 * torch.randn(x.shape, generator=generator), y]

    kinds: dict[str, Callable[[], Any]] = {
        "closure": lambda: loader(collate_fn=lambda samples: noisy(samples, generator)),
        "default": lambda: loader(collate_fn=noisy),
        "partial": lambda: loader(collate_fn=functools.partial(noisy, generator=torch.Generator().manual_seed(2))),
        "global": lambda: loader(collate_fn=by_global_name),
        "class": lambda: DataLoader(OfItsClass(), batch_size=6),
        "slot": InASlot,
    }
    return kinds[kind]()


@pytest.mark.parametrize("kind", ["closure", "default", "partial", "global", "class", "slot"])
def test_generators_are_found_wherever_data_keeps_them(kind: str, tmp_path: Path) -> None:
    assert_resumes(lambda: problem(training=lambda: hidden(kind)), tmp_path)


class NoisyLayer(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 1)
        self.generator = torch.Generator().manual_seed(4)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=self.generator) if self.training else 0.0
        return super().forward(x + 0.1 * noise)


def test_generators_of_the_model_and_the_losses(tmp_path: Path) -> None:
    def make() -> hi.BilevelProblem:
        generator = random.Random(3)

        @hi.hyperparameter("decay", init=-3.0)
        def loss(model: nn.Module, batch: Any, *, decay: Tensor) -> Tensor:
            return decayed(model, batch, decay=decay) * generator.uniform(0.9, 1.1)

        return problem(NoisyLayer, loss=loss)

    assert_resumes(make, tmp_path)


def test_generators_are_looked_for_in_no_library() -> None:
    assert generators_in(loader(collate_fn=default_collate)) == []


class OneByOne(Sampler[int]):
    """Draws as it goes, and remembers what it has drawn."""

    def __len__(self) -> int:
        return 24

    def __iter__(self) -> Iterator[int]:
        left = list(range(24))
        while left:
            yield left.pop(int(torch.randint(len(left), ())))


class Shuffled(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        left = list(range(24))
        while left:
            i = left.pop(random.randrange(len(left)))
            yield X[i], Y[i]


def of_one_generator() -> hi.BilevelProblem:
    generator = torch.Generator().manual_seed(1)
    sampler = RandomSampler(range(24), generator=generator, num_samples=100)
    return problem(
        training=lambda: loader(shuffle=None, generator=generator, sampler=sampler),
        validation=lambda: loader(generator=generator),
    )


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (
            lambda: problem(training=lambda: loader(shuffle=None, sampler=OneByOne())),
            "from torch's generator with each",
        ),
        (of_one_generator, "from a generator that something else draws from as well"),
        (
            lambda: problem(
                training=lambda: DataLoader(Shuffled(), batch_size=6),
                validation=lambda: DataLoader(Shuffled(), batch_size=8),
            ),
            "from a generator that something else draws from as well",
        ),
    ],
    ids=["sampler", "one generator for both", "Python's for both"],
)
def test_place_that_may_be_another_is_told(make: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        run(make, tmp_path, callbacks=[stop], inner_steps=2)
    with pytest.warns(hi.HyperoptWarning, match=f"place cannot be found again for certain: it draws.* {why}"):
        run(make, tmp_path, inner_steps=2)


def test_place_of_data_that_alone_draws_from_a_generator_is_certain(tmp_path: Path) -> None:
    def make() -> hi.BilevelProblem:
        random.seed(0)
        return problem(training=lambda: DataLoader(Shuffled(), batch_size=5))

    assert_resumes(make, tmp_path)
