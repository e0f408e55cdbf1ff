"""Checkpoints of the trials that run, so that a trial whose process is killed goes on where it was.

A trial and those that repeat it share a folder. It is beside what is kept of the best trials (``kept_trials.py``), and
goes when the trial has ended.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from hyperopt_implicit.checkpoint import Checkpoints
from hyperopt_implicit.places import GONE_ON_FROM, origin
from hyperopt_implicit.run_state import RunKeeper

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import Trial


class TrialCheckpoints:
    """Where the trials of a study are saved while they run.

    A checkpoint is not flushed to the disk: it outlasts its process, whenever that is killed, but not a loss of power.

    Args:
        study: the study.
        folder: of what is kept of a study; None saves nothing.
        every: after so many outer steps; None saves after each one, or where that would take more than one part in 200
            of the time, as often as takes that much.
    """

    def __init__(self, study: Study, folder: Path | None, every: int | None) -> None:
        self._folder = None if folder is None else folder / "running" / f"study-{quote(study.study_name, safe='')}"
        self._every = every
        self._origins: dict[int, int] = {}  # each costs a question to the storage

    def keeper(self, trial: Trial, knobs: Mapping[str, Any]) -> RunKeeper | None:
        """Who saves a trial with these knobs, and brings back what another process has saved of it."""
        place = self._of(trial)
        if place is None:
            return None
        checkpoints = Checkpoints(place, every=self._every, least_seconds=0.0, durable=False)
        return RunKeeper(
            checkpoints,
            resume=True,
            lenient=True,
            goes_on=lambda steps: trial.set_user_attr(GONE_ON_FROM, steps),
            # a study of the same name that is gone may have left a trial of other knobs
            apart={f"knob {name}": repr(value) for name, value in sorted(knobs.items())},
        )

    def forget(self, trial: Trial) -> None:
        """Remove what was saved of a trial."""
        place = self._of(trial)
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)
            with suppress(OSError):  # they hold other trials, or other studies
                place.parent.rmdir()
                place.parent.parent.rmdir()

    def _of(self, trial: Trial) -> Path | None:
        if self._folder is None:
            return None
        if trial.number not in self._origins:
            self._origins[trial.number] = origin(trial)
        return self._folder / f"trial-{self._origins[trial.number]}"
