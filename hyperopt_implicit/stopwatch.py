"""How long calls take, alone and beside each other, on a machine that does other things as well.

Decisions rest on these times, so among several processes they are the first one's in all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from hyperopt_implicit.distributed import first_numbers

ROUNDS = 7
Result = TypeVar("Result")


class Clock:
    """Seconds that calls took, the work that they gave to a device included."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds = 0.0

    def __call__(self, call: Callable[[], Result]) -> Result:
        """Call, and keep the time it took."""
        started = self._now()
        result = call()
        (self.seconds,) = first_numbers([max(self._now() - started, 1e-9)])
        return result

    def _now(self) -> float:
        _wait(self._device)
        # on shared cores, wall-clock time measures the neighbours
        return time.perf_counter() if self._device.type == "cuda" else time.process_time()


def quickest(calls: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Seconds of each call, the least of several rounds in which they take turns, after one that does not count."""
    # processor time is not disturbed by others, but with several threads it is not what a caller waits for
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS + 1):
        for call, each in zip(calls, times, strict=True):
            _wait(device)
            started = clock()
            call()
            _wait(device)
            each.append(clock() - started)
    return first_numbers([min(each[1:]) for each in times])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
