"""The best trial of a study, built and loaded again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperopt_implicit.errors import SearchError
from hyperopt_implicit.kept_trials import KeptTrials
from hyperopt_implicit.knob_space import Builder, KnobSpace
from hyperopt_implicit.problem import BilevelProblem
from hyperopt_implicit.studies import DEFAULT_STORAGE, open_study
from hyperopt_implicit.telling import front, objective_names

if TYPE_CHECKING:
    from optuna.artifacts._protocol import ArtifactStore
    from optuna.storages import BaseStorage


@dataclass
class BestTrial:
    """What :func:`load_best` returns.

    Attributes:
        problem: built with the trial's knobs; its model and its hyperparameters are the trained ones.
        knobs: the trial's.
        values: its objectives, by name.
        number: its number in the study.
    """

    problem: BilevelProblem
    knobs: dict[str, Any]
    values: dict[str, float]
    number: int


def load_best(
    builder: Builder,
    study_name: str,
    *,
    storage: str | BaseStorage | None = DEFAULT_STORAGE,
    artifacts: str | Path | ArtifactStore | None = None,
    trial: int | None = None,
) -> BestTrial:
    """Build the problem of a study's best trial again, and load its trained model and hyperparameters.

    Args:
        builder: the one that was searched.
        study_name: of the study.
        storage: where it is kept.
        artifacts: as it was given to :func:`search`.
        trial: another trial of the Pareto front, by its number.

    Raises:
        SearchError: there is no such study, it has no best trial yet, or what was kept of it cannot be read.

    Example:
        >>> import hyperopt_implicit as hi
        >>> best = hi.load_best(problem, "width")            # doctest: +SKIP
        >>> best.problem.model, best.knobs                   # doctest: +SKIP
    """
    study = open_study(study_name, storage)
    found = front(study)
    chosen = [each for each in found if trial is None or each.number == trial]
    if not chosen:
        have = ", ".join(str(each.number) for each in found) or "none"
        raise SearchError(
            f"only the best trials of a study can be loaded; study {study_name!r} has {have}"
            f"{'' if trial is None else f', and {trial} was asked for'}."
        )
    best = chosen[0]
    state = KeptTrials(study, artifacts, storage).load(best)
    if state is None:
        raise SearchError(
            f"trial {best.number} of study {study_name!r} was run without keeping its model; run its knobs again "
            f"({best.params})."
        )
    problem = KnobSpace.of(builder, "neumann").build(best.params, state.seed)
    problem.model.load_state_dict(state.model)
    problem.hyperparameters.load_values(state.hyperparameters)
    problem.sync_optimizer()
    names = objective_names(study)
    return BestTrial(problem, dict(best.params), dict(zip(names, best.values, strict=True)), best.number)
