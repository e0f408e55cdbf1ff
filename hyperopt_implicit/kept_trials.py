"""What is kept of the best trials of a study beyond their numbers: model and hyperparameters, to be loaded again.

States go through Optuna's artifact stores, so that a folder, S3 or Google Cloud Storage will do; the study says which
trial has which.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hyperopt_implicit.errors import SearchError
from hyperopt_implicit.messages import first_line, warn

if TYPE_CHECKING:
    from optuna.artifacts._protocol import ArtifactStore
    from optuna.storages import BaseStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

    from hyperopt_implicit.history import Result

_STATE = "state"  # the user attribute with the artifact's name
_FOLDER = "optuna_artifacts"


@dataclass
class TrialState:
    """A trained model and its hyperparameters, as state dicts, and how to build the problem around them.

    Attributes:
        model: the ``state_dict`` of the model, at the lowest validation loss where that was kept.
        hyperparameters: the constrained values there, by name; a module's as its ``state_dict``.
        seed: that of the trial, from which its builder has drawn.
    """

    model: dict[str, Tensor]
    hyperparameters: dict[str, Any]
    seed: int | None = None

    @classmethod
    def of(cls, result: Result, seed: int | None) -> TrialState:
        """The state of a run at its lowest validation loss."""
        model = result.best_model_state
        return cls(
            model=dict(result.problem.model.state_dict()) if model is None else model,
            hyperparameters={
                name: value.state_dict() if isinstance(value, nn.Module) else value
                for name, value in result.best_hyperparameters.items()
            },
            seed=seed,
        )


class KeptTrials:
    """The states of the trials that are best so far; those of others are removed.

    Args:
        study: the study.
        artifacts: a folder, or an artifact store of Optuna's. By default a folder beside the file of a sqlite or
            journal storage, ``optuna_artifacts`` with a storage on a server, and memory with one in memory.
        storage: what the study is kept in, as it was named.

    Attributes:
        beside: the folder for what else is kept of the study; None where it is in memory.
    """

    def __init__(
        self, study: Study, artifacts: str | Path | ArtifactStore | None, storage: str | BaseStorage | None
    ) -> None:
        self._study = study
        self._folder: Path | None = None  # made when there is something to keep
        self.beside = None if storage is None else _beside(storage)
        self._store: ArtifactStore | None = None
        self._in_memory: dict[int, TrialState] = {}
        if artifacts is not None and not isinstance(artifacts, str | Path):
            self._store = artifacts
        elif artifacts is not None or storage is not None:
            from optuna.artifacts import FileSystemArtifactStore

            self._folder = _beside(storage) if artifacts is None else Path(artifacts)
            self.beside = self._folder
            self._store = FileSystemArtifactStore(self._folder)

    def keep(self, trial: Trial, state: TrialState) -> bool:
        """Keep the state of a trial that is not over yet; whether that was possible.

        A store that cannot be written to costs a warning, and the search goes on.

        Raises:
            UpdateFinishedTrialError: of Optuna's; somebody else has ended the trial.
        """
        if self._store is None:
            self._in_memory[trial.number] = state
            return True
        from optuna.artifacts import upload_artifact
        from optuna.exceptions import UpdateFinishedTrialError

        try:
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, f"trial-{trial.number}.pt")
                torch.save(vars(state), path)
                name = upload_artifact(artifact_store=self._store, file_path=str(path), study_or_trial=trial)
            trial.set_user_attr(_STATE, name)
            return True
        except UpdateFinishedTrialError:
            raise
        except Exception as error:  # whatever a disk or a server answers; the trial's numbers are safe in the study
            warn(f"the model of trial {trial.number} could not be kept: {first_line(error)}. The search goes on.")
            return False

    def load(self, trial: FrozenTrial) -> TrialState | None:
        """The state of a trial; None where none was kept.

        Raises:
            SearchError: it is not there any more, or damaged.
        """
        name = trial.user_attrs.get(_STATE)
        if self._store is None or name is None:
            return self._in_memory.get(trial.number)
        try:
            with self._store.open_reader(name) as file, tempfile.TemporaryFile() as copy:
                shutil.copyfileobj(file, copy)
                copy.seek(0)
                return TrialState(**torch.load(copy, weights_only=True, map_location="cpu"))
        except Exception as error:  # whatever a disk or a server answers, and whatever is in a file
            raise SearchError(
                f"the model of trial {trial.number} of study {self._study.study_name!r} cannot be read: "
                f"{first_line(error)}. Only those of the best trials are kept; name the folder or store that the "
                "search had with artifacts=."
            ) from error

    def forget(self, trials: Iterable[FrozenTrial]) -> None:
        """Remove the states of trials that are not among the best any more."""
        for trial in trials:
            self._in_memory.pop(trial.number, None)
            name = trial.user_attrs.get(_STATE)
            if self._store is not None and name is not None:
                with suppress(Exception):  # it may be gone already: another worker clears up as well
                    self._store.remove(name)


def _beside(storage: str | BaseStorage | None) -> Path:
    """Where the file of a storage is, or the present folder."""
    scheme, _, file = storage.partition(":///") if isinstance(storage, str) else ("", "", "")
    if scheme in ("sqlite", "journal") and file:
        return Path(file).with_suffix(".artifacts")
    return Path(_FOLDER)
