"""What holds in every test and doctest: one thread, and a seed of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """The same random numbers in any order of tests and on any worker."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
