"""What the tests of storages have in common: a place with a study, one that must stay as it is, and refusals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
import pytest
from optuna.trial import create_trial

from hyperopt_implicit.errors import SearchError
from hyperopt_implicit.storages import open_storage


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Every file of a folder has the same content afterwards, and there are no others."""

    def content() -> dict[str, bytes | None]:
        return {
            str(each.relative_to(folder)): each.read_bytes() if each.is_file() else None
            for each in sorted(folder.rglob("*"))
        }

    before = content()
    yield
    assert content() == before


def a_study(url: str, trials: int = 3) -> None:
    """Make a storage, with a study."""
    study = optuna.create_study(storage=open_storage(url), study_name="before")
    for number in range(trials):
        study.add_trial(create_trial(value=float(number)))


def refused(url: str, match: str, *, must_exist: bool = False) -> str:
    with pytest.raises(SearchError, match=match) as caught:
        open_storage(url, must_exist=must_exist)
    return str(caught.value)
