"""Checkpoints of a run in a folder: written so that no moment to be killed at costs more than the newest one.

A file is written under another name, flushed to the disk, and only then given its own; the last three stay. Reading
takes the newest that is whole. What is in a checkpoint is the business of ``run_state.py``.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hyperopt_implicit.errors import CheckpointError
from hyperopt_implicit.messages import first_line, warn

if TYPE_CHECKING:
    from filelock import FileLock

KEPT = 3
_LOCK = ".lock"
_LOCK_SECONDS = 10.0  # the workers of a killed process's loaders, which have inherited its lock, take five to notice
_NAME = re.compile(r"step-(\d{9})\.pt")
_UNFINISHED = re.compile(rf"\.{_NAME.pattern}\.\d+")
_LEAST_SECONDS = 10.0
_FIRST_COST = 1e-3  # seconds that a save is thought to take before the first one
_SHARE = 0.005  # of the time between two saves that a save may take, where their distance is not given


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read.

    Attributes:
        path: its file.
        state: what was saved.
    """

    path: Path
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, in a folder of their own.

    Args:
        folder: made when the first one is saved.
        every: save after so many outer steps; None saves when ``least_seconds`` have passed since the last time, and
            long enough for a save to be no more than a ``share`` of the time.
        least_seconds: see ``every``.
        share: of the time between two saves that a save may take, where ``every`` is None.
        durable: whether a file is flushed to the disk before it counts, so that it outlasts a loss of power. One that
            is not outlasts the death of its process.

    Attributes:
        folder: as given, and so ``least_seconds`` and ``share``.

    Raises:
        CheckpointError: the folder is a file, or ``every`` is no number of steps.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        every: int | None = None,
        least_seconds: float = _LEAST_SECONDS,
        share: float = _SHARE,
        durable: bool = True,
    ) -> None:
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise CheckpointError(
                f"checkpoint_every must be a whole number of outer steps, at least 1, or None; got {every!r}."
            )
        if not isinstance(folder, str | Path) or not str(folder):
            raise CheckpointError(f"checkpoint must be the name of a folder; got {folder!r}.")
        self.folder = Path(folder)
        self._place = self.folder.absolute()  # wherever the process goes from here
        if self._place.exists() and not self._place.is_dir():
            raise CheckpointError(f"checkpoint must be a folder; {self.folder} is a file. Name another.")
        self._every = every
        self.least_seconds, self.share = least_seconds, share
        self._durable = durable
        self._cost = _FIRST_COST
        self._last = time.monotonic()
        self._warned = False
        self._lock: FileLock | None = None
        self._claimed = self._barred = False

    def claim(self) -> None:
        """Keep other processes out of the folder, which is made, until :meth:`release` or the end of this one.

        Raises:
            CheckpointError: another process is in it, or the folder cannot be made.
        """
        from filelock import FileLock, Timeout

        self._claimed = True
        try:
            self.prepare()
            self._lock = FileLock(self._place / _LOCK)
            self._lock.acquire(timeout=_LOCK_SECONDS)
        except Timeout:
            raise CheckpointError(
                f"a folder of checkpoints belongs to one process at a time; another one is running in {self.folder}. "
                "Wait for it or end it, or name another folder."
            ) from None
        except NotImplementedError:  # a file system without locks
            pass
        except OSError as error:
            raise self._unwritable(error) from error

    def release(self) -> None:
        """Let others in."""
        if self._lock is not None:
            self._lock.release()

    # ---------------------------------------------------------------------------------------------------------- reading

    def newest(self) -> Saved | None:
        """The newest checkpoint that is whole; None where there is none at all.

        Raises:
            CheckpointError: there are some, and none can be read.

        Warns:
            HyperoptWarning: a newer one is damaged.
        """
        failures: list[str] = []
        for path in reversed(self._files()):
            try:
                state = _read(path)
            except Exception as error:  # whatever is in a damaged file
                failures.append(f"{path.name} cannot be read ({first_line(error)})")
                continue
            if failures:
                warn(f"checkpoint: {'; '.join(failures)}. {path.name}, the one before, is used.")
            return Saved(path, state)
        if failures:
            raise CheckpointError(
                f"a run is resumed from a checkpoint that is whole; in {self.folder}, {'; '.join(failures)}. Restore "
                "one of them from a backup, or begin anew with another folder."
            )
        return None

    def refuse_others(self) -> None:
        """Refuse a folder in which another run has left checkpoints.

        Raises:
            CheckpointError: with what to do.
        """
        files = self._files()
        if files:
            raise CheckpointError(
                f"a new run must not write over the checkpoints of another; {self.folder} has some, up to "
                f"{files[-1].name}. Go on with that run (resume=True, or --resume), or name another folder."
            )

    def clear(self) -> None:
        """Remove all checkpoints: those of a run that is begun anew would pass for its newest."""
        for path in self._files():
            with contextlib.suppress(OSError):
                path.unlink()

    def _files(self) -> list[Path]:
        """The checkpoints, oldest first."""
        if not self._place.is_dir():
            return []
        return sorted(path for path in self._place.iterdir() if _NAME.fullmatch(path.name))

    # ---------------------------------------------------------------------------------------------------------- writing

    def is_due(self, steps: int) -> bool:
        """Whether it is time to save, after so many outer steps."""
        if self._every is not None:
            return steps % self._every == 0
        return self.is_due_by_time()

    def is_due_by_time(self) -> bool:
        """Whether saving now would be rare enough to cost next to nothing."""
        return time.monotonic() - self._last >= max(self.least_seconds, self._cost / self.share)

    def begin(self, state: Mapping[str, Any]) -> None:
        """The first checkpoint of a run, before its first step, which is read again to see whether that can be done.

        Raises:
            CheckpointError: it cannot be written, or would not be read by ``torch.load(…, weights_only=True)``.
        """
        try:
            self.prepare()
            _read(self._write(state, 0))
        except OSError as error:
            raise self._unwritable(error) from error
        except Exception as error:
            raise CheckpointError(
                "a checkpoint may hold tensors, numbers, text and containers of them, so that reading it runs no code; "
                f"what was to be saved holds {_foreign(error)}. Look at the options of the optimizers and "
                "schedulers, and at what callbacks, data and modules return from state_dict and get_extra_state."
            ) from error

    def prepare(self) -> None:
        """Make the folder, and clear away what processes that were killed had begun to write.

        Raises:
            OSError: that cannot be done.
        """
        self._place.mkdir(parents=True, exist_ok=True)
        for path in self._place.iterdir():
            if _UNFINISHED.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def save(self, state: Mapping[str, Any], steps: int) -> bool:
        """Save a state after so many outer steps; says whether that was possible. Costs a warning where it was not."""
        if self._barred:
            return False
        try:
            if not self._claimed:
                self.claim()
            self._write(state, steps)
        except (OSError, CheckpointError) as error:
            self._barred = isinstance(error, CheckpointError)
            if not self._warned:
                self._warned = True
                what_next = "" if self._barred else ", and it is tried again"
                warn(
                    f"checkpoint: {self.folder} could not be written to after outer step {steps - 1} "
                    f"({first_line(error)}). The run goes on, the checkpoints before stay{what_next}."
                )
            return False
        return True

    def _unwritable(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"checkpoints must be written to {self.folder}, which did not work: {first_line(error)}. Name another "
            "folder, or make room."
        )

    def _write(self, state: Mapping[str, Any], steps: int) -> Path:
        began = time.monotonic()
        path = self._place / f"step-{steps:09d}.pt"
        unfinished = self._place / f".{path.name}.{os.getpid()}"
        try:
            with unfinished.open("wb") as file:
                torch.save(_compact(state), file)
                if self._durable:
                    file.flush()
                    os.fsync(file.fileno())
            unfinished.replace(path)
            if self._durable:
                _flush_folder(self._place)
        except BaseException as error:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
                raise error.__context__ from None  # torch's writer reports a full disk as it closes the archive
            raise
        for old in self._files()[:-KEPT]:
            with contextlib.suppress(OSError):
                old.unlink()
        self._last = time.monotonic()
        self._cost = self._last - began
        return path


def _compact(state: Any) -> Any:
    """The same, with copies of tensors that are parts of larger ones, which would be saved with them."""
    if isinstance(state, Tensor):
        return state.clone() if state.untyped_storage().nbytes() > state.nbytes else state
    if isinstance(state, Mapping):
        return {key: _compact(value) for key, value in state.items()}
    return [_compact(each) for each in state] if isinstance(state, list) else state


def _read(path: Path) -> dict[str, Any]:
    """A checkpoint, all of whose bytes were compared with their checksums: torch itself does not look at them."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise CheckpointError(f"its part {damaged} does not have the checksum that was written with it")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise CheckpointError(f"it holds a {type(state).__name__}")
    return state


def _foreign(error: Exception) -> str:
    """What torch would not read, where that is what an error is about."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f"an object of {found.group(1)}" if found is not None else f"more ({first_line(error)})"


def _flush_folder(folder: Path) -> None:
    """See to it that a new name outlasts a loss of power, where folders can be flushed."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
