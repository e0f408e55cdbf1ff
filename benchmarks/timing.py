"""How the benchmarks measure time: two calls taking turns in one process, medians of processor time."""

from __future__ import annotations

import ctypes
import statistics
import sys
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


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed for the next call.

    Otherwise large tensors come fresh from the system, or not, by where the heap happens to end; the page faults of the
    same operations then differ by a third between two functions, and from run to run.
    """
    if sys.platform == "linux":
        trim_threshold, mmap_threshold = -1, -3
        libc = ctypes.CDLL("libc.so.6")
        for option in (trim_threshold, mmap_threshold):
            libc.mallopt(option, 2**31 - 1)
