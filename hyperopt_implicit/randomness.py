"""The state of torch's generators: taken down, and put back for a step or a loss that is to draw the same again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def random_states(device: torch.device) -> list[Tensor]:
    """Of the processor's generator, and of those of all GPUs: the layers of one model may stand on several."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    elif device.type == "mps":
        states.append(torch.mps.get_rng_state())
    return states


def set_random_states(states: list[Tensor], device: torch.device) -> None:
    """Put back what :func:`random_states` gave."""
    torch.set_rng_state(states[0])
    if device.type == "mps":
        torch.mps.set_rng_state(states[1])
    elif len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])


@contextmanager
def replaying(states: list[Tensor], device: torch.device) -> Iterator[None]:
    """Inside, the random numbers that followed :func:`random_states`; afterwards the generators go on as before."""
    before = random_states(device)
    try:
        set_random_states(states, device)
        yield
    finally:
        set_random_states(before, device)
