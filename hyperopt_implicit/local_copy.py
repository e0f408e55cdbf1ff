"""What no receiver has taken, in a file: one JSON object a line, and the files beside it in a folder of the same name.

When entries come here is decided in ``sender.py``. An existing copy is never written over.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from hyperopt_implicit.messages import first_line

WriteFiles = Callable[[Path], Iterable[tuple[Path, str | None]]]
"""Writes files into the folder given, and names each with its place among the artifacts."""


class LocalCopy:
    """A place for what could not be sent.

    Args:
        folder: where it goes; a new temporary folder takes its place where nothing can be written there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, name: str, lines: Sequence[Mapping[str, Any]], files: Sequence[WriteFiles]) -> str:
        """Write it; says where it is, or why it is not.

        Args:
            name: of the file; what would lead out of the folder is taken out of it.
            lines: what is written, a line each.
            files: written into a folder beside it.
        """
        name = re.sub(r"[^\w\-]", "_", name) or "_"
        text = "".join(f"{json.dumps(_finite(line), default=str)}\n" for line in lines)
        try:
            path = _written(self._folder, name, text)
        except OSError as error:
            try:
                path = _written(Path(tempfile.mkdtemp(prefix=f"{self._folder.name}-")), name, text)
            except OSError:
                return f"what was not sent could not be written to {self._folder} either ({first_line(error)})"
        failure = None
        for write in files:
            try:
                _keep_files(path.with_suffix(""), write)
            except Exception as error:  # a figure that cannot be drawn, or a full disk, must not cost the numbers
                failure = error
        if failure is not None:
            return f"what was not sent is in {path}, without some of its files ({first_line(failure)})"
        return f"what was not sent is in {path}"


def _written(folder: Path, name: str, text: str) -> Path:
    """A new file with the text, whose name is not taken and neither is that of the folder that goes with it."""
    folder.mkdir(parents=True, exist_ok=True)
    path, file = _new(folder, name)
    try:
        with file:
            file.write(text)
    except OSError:
        with suppress(OSError):
            path.unlink()
        raise
    return path


def _new(folder: Path, name: str) -> tuple[Path, IO[str]]:
    count = 1
    while True:
        path = folder / (f"{name}.jsonl" if count == 1 else f"{name}-{count}.jsonl")
        if not path.with_suffix("").exists():
            with suppress(FileExistsError):
                return path, path.open("x")
        count += 1


def _finite(line: Mapping[str, Any]) -> Mapping[str, Any]:
    """JSON has no infinity."""
    metrics = line.get("metrics")
    if not isinstance(metrics, Mapping):
        return line
    return {**line, "metrics": {name: value if math.isfinite(value) else None for name, value in metrics.items()}}


def _keep_files(target: Path, write: WriteFiles) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for path, place in write(Path(folder)):
            inside = [re.sub(r"[^\w.\- ]", "_", part) for part in Path(place or "").parts]
            kept = target.joinpath(*(part for part in inside if part.strip("._")))
            kept.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, kept)
