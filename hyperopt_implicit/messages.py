"""The wording that errors and warnings share, and a warning that points at the user's own line.

What kinds of errors there are is in ``errors.py``.
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable

from hyperopt_implicit.distributed import is_first
from hyperopt_implicit.errors import HyperoptWarning

_OURS = ("hyperopt_implicit", "hyperopt_implicit_backends")


def warn(text: str) -> None:
    """Warn about something that the run survives, at the first line outside this library that led to it.

    Among several processes the first one does, for all of them.
    """
    if not is_first():
        return
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _OURS:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, HyperoptWarning, stacklevel=level)


def nearest(name: str, known: Iterable[str]) -> str:
    """``' Did you mean 'neumann'?'``, or nothing where no known name is near."""
    by_lower_case = {each.lower(): each for each in known}
    found = difflib.get_close_matches(name.lower(), list(by_lower_case), n=2, cutoff=0.6)
    matches = [by_lower_case[each] for each in found]
    return f" Did you mean {' or '.join(map(repr, matches))}?" if matches else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
