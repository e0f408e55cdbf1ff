"""Ctrl-C with manners: the first signal lets the present step end, the second one leaves at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any


@dataclass
class Interrupt:
    """Whether a signal has asked for an end."""

    signal: int | None = None

    @property
    def requested(self) -> bool:
        return self.signal is not None


@contextmanager
def listening(message: str | None) -> Iterator[Interrupt]:
    """Inside, SIGINT and SIGTERM only leave a note, and ``message`` goes to stderr; a second one is KeyboardInterrupt.

    Outside of the main thread signals cannot be caught, and are left to whoever does.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def leave(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    def note(number: int, frame: FrameType | None) -> None:
        interrupt.signal = number
        for each in before:
            signal.signal(each, leave)
        if message is not None:
            sys.stderr.write(f"\n{message}\n")

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield interrupt
    finally:
        restore()
