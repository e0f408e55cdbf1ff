"""Which trials of a study count, and which take a place among those that were asked for.

A trial and those that repeat it, because their worker was killed or interrupted, take one place together. What became
of a trial is in its user attributes, which are set before its state: once it has ended they stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

WORKER = "worker"
FAILURE = "failure"
LOST = "lost"  # ended without having run; another takes its place
ABANDONED = "abandoned"  # likewise, and none does
SURPLUS = "surplus"  # never needed
RETRY_OF = "retry_of"
GONE_ON_FROM = "gone_on_from"  # the outer steps that were saved by those which it repeats

FIRST = "failed_trial"  # attributes of Optuna's, as its own retries have them
HISTORY = "retry_history"
FIXED = "fixed_params"


def origin(trial: Trial | FrozenTrial) -> int:
    """The number of the trial that this one repeats, or its own where it repeats none.

    Args:
        trial: a trial.

    Returns:
        The number of the first of those that have had these knobs.

    Example:
        >>> import optuna
        >>> from hyperopt_implicit.places import origin
        >>> origin(optuna.create_study().ask())
        0
    """
    return int(trial.user_attrs.get(RETRY_OF, trial.number))


def counted(study: Study) -> int:
    """How many finished trials count: failed ones do, lost, interrupted and surplus ones do not.

    Args:
        study: the study.

    Returns:
        Their number.

    Example:
        >>> import optuna
        >>> from hyperopt_implicit.places import counted
        >>> from hyperopt_implicit.workers import claim, give_back
        >>> study = optuna.create_study()
        >>> _ = study.tell(claim(study, {}, n_trials=2), 1.0)
        >>> give_back(study, claim(study, {}, n_trials=2))
        >>> counted(study)
        1
    """
    return sum(
        each.state.is_finished() and not is_lost(each) and not each.user_attrs.get(SURPLUS)
        for each in study.get_trials(deepcopy=False)
    )


def visible_trials(study: Study) -> list[FrozenTrial]:
    """The trials of a study without those that were handed out in vain.

    Args:
        study: the study.

    Returns:
        All that are to be shown, by number.

    Example:
        >>> import optuna
        >>> from hyperopt_implicit.places import visible_trials
        >>> visible_trials(optuna.create_study())
        []
    """
    return [each for each in study.get_trials(deepcopy=False) if not each.user_attrs.get(SURPLUS)]


def is_lost(trial: FrozenTrial) -> bool:
    """Whether a trial was given up before its end, by a signal or with its worker, and does not count."""
    from optuna.trial import TrialState

    # the mark is set before the state; a worker that was taken for dead may have been faster
    return trial.state is TrialState.FAIL and bool(trial.user_attrs.get(LOST))


def places(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The first trial of each place that is taken."""
    abandoned = {origin(each) for each in trials if is_lost(each) and each.user_attrs.get(ABANDONED)}
    return [
        each
        for each in trials
        if origin(each) == each.number and not each.user_attrs.get(SURPLUS) and each.number not in abandoned
    ]


def place_of(study: Study, trial: Trial | FrozenTrial) -> int:
    """Which place a trial takes, from zero: what is drawn by it is drawn again after trials were lost.

    Args:
        study: the study.
        trial: one of its trials; all that repeat each other have the same place.

    Returns:
        How many trials before it were no repetition and had not been handed out in vain.

    Example:
        >>> import optuna
        >>> from hyperopt_implicit.places import place_of
        >>> from hyperopt_implicit.workers import claim, give_back
        >>> study = optuna.create_study()
        >>> give_back(study, claim(study, {}, n_trials=2))
        >>> trials = [claim(study, {}, n_trials=2) for _ in range(2)]
        >>> [(each.number, place_of(study, each)) for each in trials]
        [(1, 0), (2, 1)]
    """
    first = origin(trial)
    return sum(
        each.number < first and origin(each) == each.number and not each.user_attrs.get(SURPLUS)
        for each in study.get_trials(deepcopy=False)
    )


def history(trial: FrozenTrial) -> list[int]:
    """The numbers of the trials that have had these knobs before."""
    return list(trial.system_attrs.get(HISTORY, []))


def repeated(trial: FrozenTrial) -> int | None:
    """The number of the last of those, which this one repeats."""
    before = history(trial)
    return before[-1] if before else None
