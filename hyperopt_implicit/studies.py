"""Studies: begun, continued, and listed. What is recorded with a study is checked when it is continued.

The storages themselves are in ``storages.py``, and whose turn it is among several workers in ``workers.py``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from hyperopt_implicit.argument_checks import shown as given_as
from hyperopt_implicit.errors import SearchError
from hyperopt_implicit.messages import first_line, nearest, warn
from hyperopt_implicit.optuna_warnings import accepting_experimental
from hyperopt_implicit.places import place_of
from hyperopt_implicit.storages import cause, open_storage, shown, without_secrets

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.study import Study

DEFAULT_STORAGE = "sqlite:///optuna.db"

SAMPLERS: dict[str, str] = {
    "tpe": "TPESampler",
    "random": "RandomSampler",
    "gp": "GPSampler",
    "cmaes": "CmaEsSampler",
    "qmc": "QMCSampler",
    "nsgaii": "NSGAIISampler",
    "nsgaiii": "NSGAIIISampler",
    "brute_force": "BruteForceSampler",
}
"""Optuna's samplers by the names that are taken for them."""

PRUNERS: dict[str, str] = {
    "median": "MedianPruner",
    "hyperband": "HyperbandPruner",
    "successive_halving": "SuccessiveHalvingPruner",
    "none": "NopPruner",
}
"""Optuna's pruners, likewise."""

_WARMUP_STEPS = 5  # outer steps, in which a validation loss says little of where it will end


@dataclass(frozen=True)
class Plan:
    """What a study is made from, and has to agree with when it is continued.

    Attributes:
        distributions: of the knobs.
        objectives: names of what is minimised.
        constraints: names of what must be at most zero.
        settings: what trials have in common beyond that, as text; they may be changed, with a warning.
    """

    distributions: Mapping[str, BaseDistribution]
    objectives: Sequence[str]
    constraints: Sequence[str]
    settings: Mapping[str, str]

    @property
    def described(self) -> dict[str, Any]:
        """As it stands in the storage."""
        from optuna.distributions import distribution_to_json

        return {
            "knobs": {name: json.loads(distribution_to_json(each)) for name, each in self.distributions.items()},
            "objectives": list(self.objectives),
            "constraints": list(self.constraints),
            "settings": dict(self.settings),
        }


def refuse_another(plan: Plan, storage: str | BaseStorage | None, name: str | None) -> BaseStorage:
    """The storage, opened; nothing is changed in it.

    Raises:
        SearchError: it cannot be used, or holds a study of that name with another plan.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kept = open_storage(storage)
    try:
        study = optuna.load_study(storage=kept, study_name=name) if name is not None else None
        before = {} if study is None else study.user_attrs
    except KeyError:
        return kept
    except Exception as error:  # whatever the storage's driver raises
        raise unusable(storage, error) from cause(error, storage)
    if study is not None:
        _check_same(study, before, plan.described)
    return kept


def begin_or_continue(
    plan: Plan, kept: BaseStorage, name: str | None, sampler: BaseSampler, pruner: BasePruner
) -> tuple[Study, bool]:
    """The study of that name, made where there is none; and whether this call has made it.

    Of several that begin the same study at once, exactly one is told that it did.

    Raises:
        SearchError: the storage cannot be used, or the study was begun with another plan; nothing is changed then.
    """
    import optuna
    from optuna.exceptions import DuplicatedStudyError

    study_name = name or f"search-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
    try:
        try:
            study = optuna.create_study(
                storage=kept,
                study_name=study_name,
                sampler=sampler,
                pruner=pruner,
                directions=["minimize"] * len(plan.objectives),
            )
            created = True
        except DuplicatedStudyError:
            study = optuna.load_study(storage=kept, study_name=study_name, sampler=sampler, pruner=pruner)
            created = False
        before = study.user_attrs
        if not created:
            _check_same(study, before, plan.described)
        if study.metric_names is None:  # the process that made the study may have come no further
            with accepting_experimental():
                study.set_metric_names(list(plan.objectives))
        for key, value in plan.described.items():
            if key not in before:
                study.set_user_attr(key, value)
        return study, created
    except SearchError:
        raise
    except Exception as error:  # whatever the storage's driver raises
        raise unusable(kept, error) from cause(error, kept)


def open_study(name: str, storage: str | BaseStorage | None) -> Study:
    """A study that exists.

    Raises:
        SearchError: it does not, or the storage cannot be used.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if not isinstance(name, str):
        raise SearchError(f"the name of a study must be a text; got {given_as(name)}.")
    kept = open_storage(storage, must_exist=True)
    try:
        return optuna.load_study(storage=kept, study_name=name)
    except KeyError:
        names = [each.study_name for each in optuna.get_all_study_summaries(kept, include_best_trial=False)]
        raise SearchError(
            f"there is no study {name!r} in {shown(storage)!r}; it has {', '.join(names) or 'none'}."
            f"{nearest(name, names)}"
        ) from None


def unusable(storage: str | BaseStorage | None, error: BaseException) -> SearchError:
    """What to say where a storage's driver has raised."""
    return SearchError(
        f"the study cannot be kept in {shown(storage)!r}: {without_secrets(error, storage)}. Choose another storage; "
        "nothing was changed."
    )


def _check_same(study: Study, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse a study whose knobs, objectives or constraints are others than they were."""
    from optuna.study import StudyDirection

    name = study.study_name
    if study.directions != [StudyDirection.MINIMIZE] * len(now["objectives"]):
        raise SearchError(
            f"a search minimises {len(now['objectives'])} objectives; study {name!r} was begun elsewhere, with the "
            f"directions {', '.join(each.name.lower() for each in study.directions)}. Give the search another name."
        )
    for key in ("objectives", "constraints"):
        if key in before and list(before[key]) != list(now[key]):
            raise SearchError(
                f"a study is continued with the {key} it was begun with; study {name!r} has "
                f"{', '.join(before[key]) or 'none'}, and {', '.join(now[key]) or 'none'} was asked for. Give the "
                "study another name, or put them back."
            )
    old, new = before.get("knobs"), now["knobs"]
    if old is None or old == new:
        _warn_of_settings(name, before.get("settings", {}), now["settings"])
        return
    changed = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    raise SearchError(
        f"a study is continued with the knobs it was begun with; in study {name!r} these differ: "
        + "; ".join(f"{key}: was {_short(old.get(key))}, is {_short(new.get(key))}" for key in changed)
        + ". Give the study another name, or put the knobs back."
    )


def _warn_of_settings(name: str, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if before and changed:
        differ = "; ".join(f"{key}: was {before.get(key, 'absent')}, is {now.get(key, 'absent')}" for key in changed)
        warn(
            f"study {name!r} goes on with other settings than it was begun with ({differ}): the values of its trials "
            "are compared all the same. Give the study another name where they should not be."
        )


def _short(described: Mapping[str, Any] | None) -> str:
    if described is None:
        return "absent"
    return f"{described['name']}({', '.join(f'{k}={v}' for k, v in described['attributes'].items())})"


# -------------------------------------------------------------------------------------------------- samplers, pruners


def sampler_of(sampler: str | BaseSampler | None, seed: int | None) -> BaseSampler:
    """An instance as it is; a name as that sampler of Optuna's, seeded for each trial by ``seed`` and its place.

    So the k-th trial draws the same whether the study was interrupted or not, and other knobs than its neighbours,
    whoever else draws at the same time. Samplers that follow one sequence (``qmc``) have the same seed throughout.

    Raises:
        SearchError: the name is unknown, or the sampler needs a package that is not installed.
    """
    import optuna

    if sampler is not None and not isinstance(sampler, str):
        return _of("sampler", sampler, optuna.samplers.BaseSampler)  # type: ignore[no-any-return]
    if sampler == "cmaes" and find_spec("cmaes") is None:
        raise SearchError("sampler 'cmaes' needs the package cmaes: `pip install cmaes`.")
    kind = getattr(optuna.samplers, _known("sampler", sampler or "tpe", SAMPLERS))

    def make(**options: Any) -> BaseSampler:
        with accepting_experimental():
            return kind(**options)  # type: ignore[no-any-return]

    try:
        if seed is None:
            return make()
        make(seed=0)
    except ImportError as error:
        raise SearchError(f"sampler {sampler!r} cannot be used: {first_line(error)}") from error
    if sampler == "qmc":
        return make(seed=seed % 2**32)
    return _seeded_by_trial(lambda place: make(seed=_mixed(seed, place)))


def pruner_of(pruner: str | BasePruner | None, outer_steps: int) -> BasePruner:
    """An instance as it is; a name as that pruner of Optuna's, counting outer steps.

    Raises:
        SearchError: the name is unknown.
    """
    import optuna

    if pruner is not None and not isinstance(pruner, str):
        return _of("pruner", pruner, optuna.pruners.BasePruner)  # type: ignore[no-any-return]
    name = _known("pruner", pruner or "median", PRUNERS)
    if name == "MedianPruner":
        return optuna.pruners.MedianPruner(n_warmup_steps=_WARMUP_STEPS)
    if name == "HyperbandPruner":
        return optuna.pruners.HyperbandPruner(min_resource=min(_WARMUP_STEPS, outer_steps), max_resource=outer_steps)
    return getattr(optuna.pruners, name)()  # type: ignore[no-any-return]


def _of(what: str, given: Any, kind: type) -> Any:
    if not isinstance(given, kind):
        raise SearchError(f"{what} must be a name, or an object of optuna.{what}s; got {given_as(given)}.")
    return given


def _known(what: str, name: str, names: Mapping[str, str]) -> str:
    if name not in names:
        raise SearchError(
            f"{what} must be one of {', '.join(names)}, or an object of optuna.{what}s; got {name!r}."
            f"{nearest(name, names)}"
        )
    return names[name]


def _seeded_by_trial(make: Callable[[int], BaseSampler]) -> BaseSampler:
    """A sampler that is made anew for each trial, from its place in the study."""
    from optuna.samplers import BaseSampler as Base

    class SeededByTrial(Base):
        """See :func:`sampler_of`."""

        def __init__(self) -> None:
            self.now = make(0)

        def __str__(self) -> str:
            return str(self.now)

        def before_trial(self, study: Any, trial: Any) -> None:
            self.now = make(place_of(study, trial))
            self.now.before_trial(study, trial)

        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, BaseDistribution]:
            return self.now.infer_relative_search_space(study, trial)

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
            return self.now.sample_relative(study, trial, search_space)

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            return self.now.sample_independent(study, trial, param_name, param_distribution)

        def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
            self.now.after_trial(study, trial, state, values)

    return SeededByTrial()


def _mixed(seed: int, place: int) -> int:
    """A seed for a trial; searches with neighbouring seeds have none in common."""
    import numpy as np

    return int(np.random.SeedSequence([abs(seed), int(seed < 0), place]).generate_state(1)[0])


def name_of(sampler: BaseSampler) -> str:
    """The name of a sampler's class, whoever wraps it."""
    return type(getattr(sampler, "now", sampler)).__name__


@dataclass(frozen=True)
class Summary:
    """A study in a few words: its name, how many trials it has, its best value, and when it was begun."""

    name: str
    trials: int
    best: str
    begun: str


def summaries(storage: str | BaseStorage | None) -> list[Summary]:
    """The studies of a storage, the latest last.

    Raises:
        SearchError: the storage cannot be used.
    """
    import optuna

    found = optuna.get_all_study_summaries(open_storage(storage, must_exist=True))
    found.sort(key=lambda each: each.datetime_start or datetime.max)
    return [
        Summary(
            name=each.study_name,
            trials=each.n_trials,
            best=f"{each.best_trial.value:.6g}" if len(each.directions) == 1 and each.best_trial is not None else "",
            begun="" if each.datetime_start is None else f"{each.datetime_start:%Y-%m-%d %H:%M}",
        )
        for each in found
    ]
