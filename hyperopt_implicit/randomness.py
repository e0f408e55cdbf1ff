"""The state of torch's generators: taken down, and put back for a step or a loss that is to draw the same again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def random_states(device: torch.device) -> list[Tensor]:
    """Of the processor's generator, and of the device's own."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_random_states(states: list[Tensor], device: torch.device) -> None:
    """Put back what :func:`random_states` gave."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


@contextmanager
def replaying(states: list[Tensor], device: torch.device) -> Iterator[None]:
    """Inside, the random numbers that followed :func:`random_states`; afterwards the generators go on as before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        set_random_states(states, device)
        yield
