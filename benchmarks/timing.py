"""How the benchmarks measure time: two calls taking turns in one process, medians of processor time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def interleaved(ours: Callable[[], object], theirs: Callable[[], object], seconds: float) -> tuple[float, float]:
    """Median processor time of each, taking turns for about so many seconds, after a warm-up."""
    for _ in range(3):
        ours(), theirs()
    times: dict[int, list[float]] = {0: [], 1: []}
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times[0]) < 5:
        for which, call in enumerate((ours, theirs)):
            started = time.thread_time()  # on shared cores, wall-clock time measures the neighbours
            call()
            times[which].append(time.thread_time() - started)
    return statistics.median(times[0]), statistics.median(times[1])
