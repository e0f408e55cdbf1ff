"""The generators' states: those of every GPU are taken down and put back, by stand-ins for torch's own functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import hyperopt_implicit as hi
from hyperopt_implicit.randomness import AllGenerators, random_states, replaying, set_random_states

from .ridge import ridge

CPU, MPS = torch.device("cpu"), torch.device("mps")


class Generators:
    """So many generators, each of which counts its draws."""

    def __init__(self, count: int) -> None:
        self.drawn = [0] * count

    def states(self) -> list[Tensor]:
        return [torch.tensor(each) for each in self.drawn]

    def put(self, states: list[Tensor]) -> None:
        self.drawn = [int(each) for each in states]


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> Generators:
    """Three CUDA devices in use."""
    generators = Generators(3)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", generators.states)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", generators.put)
    return generators


@pytest.mark.parametrize("device", [CPU, torch.device("cuda", 1)], ids=str)  # a model's first layer may be on either
def test_every_gpu_draws_the_same_again(three: Generators, device: torch.device) -> None:
    before = random_states(device)
    three.drawn = [1, 2, 3]
    with replaying(before, device):
        assert three.drawn == [0, 0, 0]
        three.drawn = [7, 8, 9]
    assert three.drawn == [1, 2, 3]
    set_random_states(before, device)
    assert three.drawn == [0, 0, 0]


def test_gpus_of_another_number_are_left_alone(three: Generators) -> None:
    generators = AllGenerators(CPU, [])
    states = generators.states()
    wanted = torch.rand(3)
    three.drawn = [4, 5]
    generators.put_back(states)
    assert three.drawn == [4, 5]
    assert torch.equal(torch.rand(3), wanted)


def test_generators_are_put_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Generators(1)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: one.states()[0])
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: one.put([state]))
    before = random_states(MPS)
    torch.manual_seed(3)
    now, one.drawn = torch.get_rng_state(), [5]

    def fail() -> None:
        with replaying(before, MPS):
            assert one.drawn == [0] and torch.equal(torch.get_rng_state(), before[0])
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        fail()
    assert one.drawn == [5] and torch.equal(torch.get_rng_state(), now)


@pytest.mark.parametrize("kind", ["PCG64", "MT19937", "Philox", "SFC64", "RandomState"])
def test_every_generator_of_numpy_goes_on_from_a_file(kind: str, tmp_path: Path) -> None:
    def made(seed: int) -> Any:
        old = kind == "RandomState"
        return numpy.random.RandomState(seed) if old else numpy.random.Generator(getattr(numpy.random, kind)(seed))

    drawn = made(1)
    drawn.standard_normal(3)
    torch.save(AllGenerators(CPU, [[drawn]]).states(), tmp_path / "states")
    wanted = drawn.standard_normal(5).tolist()
    other = made(2)
    AllGenerators(CPU, [[other]]).put_back(torch.load(tmp_path / "states", weights_only=True))
    assert other.standard_normal(5).tolist() == wanted


def test_a_seed_leaves_no_gpu_seeded(monkeypatch: pytest.MonkeyPatch, three: Generators) -> None:
    monkeypatch.setattr(torch, "manual_seed", lambda seed: three.put([torch.tensor(seed)] * 3))
    three.drawn = [1, 2, 3]
    hi.optimize(ridge(), "identity", outer_steps=1, inner_steps=1, seed=4, tracking=False)
    assert three.drawn == [1, 2, 3]
