"""Optuna's parts that may still change: used here on purpose, so their users need not be told."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def accepting_experimental() -> Iterator[None]:
    """Inside, Optuna does not warn that a part of it is experimental."""
    from optuna.exceptions import ExperimentalWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield
