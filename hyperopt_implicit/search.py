"""Search: Optuna outside, gradients inside.

Optuna proposes the knobs of a trial; within it, everything with a gradient is trained by ``optimize.py``. Samplers,
pruners and storages are Optuna's own.
"""

from __future__ import annotations

import inspect
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

import torch

from hyperopt_implicit.backend import Backend, Spec, get_backend, get_backend_class, options_of
from hyperopt_implicit.errors import BackendError, HypergradientError, LossError, SearchError
from hyperopt_implicit.history import OuterStep, Result
from hyperopt_implicit.knobs import knobs_of
from hyperopt_implicit.messages import nearest, warn
from hyperopt_implicit.optimize import check_options, optimize
from hyperopt_implicit.problem import BilevelProblem
from hyperopt_implicit.run_record import source_of, source_tags, versions
from hyperopt_implicit.tracking import Tracker, Tracking, resolve

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.study import Study
    from optuna.trial import Trial

DEFAULT_STORAGE = "sqlite:///optuna.db"
_BACKEND_KNOB = "backend"


@dataclass
class SearchResult:
    """What :func:`search` returns.

    Attributes:
        study: Optuna's study, with every trial.
        best_knobs: the knobs of the best trial.
        best_validation_loss: its lowest validation loss.
        best_trial: its number.
        best_result: its :class:`Result`, where it ran in this call and not in an earlier one.
        run_id: of the parent MLflow run.
        run_link: where to look at it.
    """

    study: Study
    best_knobs: dict[str, Any]
    best_validation_loss: float
    best_trial: int
    best_result: Result | None
    run_id: str | None
    run_link: str | None


def search(
    builder: Callable[..., BilevelProblem],
    backend: Spec | BaseDistribution | Mapping[str, Any] = "neumann",
    *,
    n_trials: int = 20,
    study_name: str | None = None,
    storage: str | None = DEFAULT_STORAGE,
    sampler: BaseSampler | None = None,
    pruner: BasePruner | None = None,
    seed: int | None = None,
    on_trial: Callable[[int, dict[str, Any], str, float | None], None] | None = None,
    tracking: Tracking | bool = True,
    **options: Any,
) -> SearchResult:
    """Search the knobs of a problem builder with Optuna; each trial trains its hyperparameters by gradient.

    A trial's value is the lowest validation loss of its run. The validation loss of every outer step is reported to
    Optuna, which may prune the trial there. In MLflow the search is one run, with one nested run for each trial.

    Args:
        builder: a function with :func:`knob` declarations that returns a :class:`BilevelProblem`. Keywords without a
            knob keep their defaults.
        backend: as for :func:`optimize`; or an Optuna distribution over names; or a dict with ``"name"`` and options,
            any of which may be a distribution. An option is given to those of the backends that have it.
        n_trials: how many trials the study shall have when the search is over; a study that is continued counts those
            it has.
        study_name: a study of that name in the storage is continued; None begins a new one.
        storage: any Optuna storage URL; None keeps the study in memory.
        sampler: any Optuna sampler; by default TPE with ``seed``.
        pruner: any Optuna pruner; by default the median pruner, which acts from the sixth trial on.
        seed: for the sampler, and plus the trial's number for each trial.
        on_trial: called after each trial with its number, knobs, state and value.
        tracking: as for :func:`optimize`; here for the parent run.
        **options: of :func:`optimize`, for every trial.

    Raises:
        SearchError: there are no knobs, the storage cannot be used, the study was begun with other knobs, or no trial
            finished.
        HyperoptError: what :func:`optimize` raises for a problem that can never work. A trial in which a loss is not
            finite is recorded as failed instead, and the search goes on.

    Example:
        >>> import torch, hyperopt_implicit as hi
        >>> from optuna.distributions import FloatDistribution
        >>> @hi.hyperparameter("shift", init=0.0)
        ... def training_loss(model, batch, *, shift):
        ...     return ((model.weight - shift) ** 2).sum()
        >>> @hi.knob("inner_lr", FloatDistribution(0.01, 0.5))
        ... def problem(*, inner_lr):
        ...     return hi.BilevelProblem(
        ...         torch.nn.Linear(1, 1, bias=False), training_loss,
        ...         lambda model, batch: ((model.weight - 2.0) ** 2).sum(),
        ...         training_data=[0], validation_data=[0],
        ...         optimizer=lambda params: torch.optim.SGD(params, lr=inner_lr))
        >>> found = hi.search(
        ...     problem, "cg", n_trials=3, storage=None, seed=0, tracking=False, outer_steps=20, outer_lr=0.1)
        >>> list(found.best_knobs), len(found.study.trials)
        (['inner_lr'], 3)
    """
    if not isinstance(n_trials, int) or n_trials < 1:
        raise SearchError(f"n_trials must be a whole number of at least 1; got {n_trials!r}.")
    inspect.signature(optimize).bind(builder, **options)
    check_options(options)
    backend_distributions, fixed_backend = _split_backend(backend)
    distributions = {**{each.name: each.distribution for each in knobs_of(builder)}, **backend_distributions}
    if not distributions:
        raise SearchError(
            f"a search needs at least one knob; {getattr(builder, '__name__', builder)!r} has none. Put @knob(name, "
            "distribution) on it, or call optimize, which needs none."
        )
    study = _open_study(storage, study_name, sampler, pruner, seed, distributions)
    config = resolve(tracking)
    source = source_of(builder)
    described = {
        "n_trials": n_trials,
        "study": study.study_name,
        "sampler": type(study.sampler).__name__,
        "seed": seed,
    }
    described |= {f"knob.{name}": each for name, each in distributions.items()}
    parent = Tracker(config, {**described, **versions()}, {**source_tags(source), "search": study.study_name})
    runner = _Runner(builder, distributions, fixed_backend, seed, options, config, parent)
    try:
        for _ in range(_remaining(study, n_trials)):
            number, values, state, value = runner.run(study)
            if on_trial is not None:
                on_trial(number, values, state, value)
        found = runner.result(study)
    except BaseException as error:
        parent.end(error)
        raise
    parent.log_files(lambda folder: _trials_table(study, folder))
    parent.set_tag("best_trial", str(found.best_trial))
    parent.end()
    return found


class _Runner:
    """Runs trials one after another and keeps the result of the best."""

    def __init__(
        self,
        builder: Callable[..., BilevelProblem],
        distributions: Mapping[str, BaseDistribution],
        fixed_backend: Spec,
        seed: int | None,
        options: Mapping[str, Any],
        config: Tracking | None,
        parent: Tracker,
    ) -> None:
        self._builder = builder
        self._distributions = dict(distributions)
        self._fixed_backend = fixed_backend
        self._seed = seed
        self._options = dict(options)
        self._config = config
        self._parent = parent
        self._best: tuple[int, Result] | None = None
        self._failures: list[str] = []

    def run(self, study: Study) -> tuple[int, dict[str, Any], str, float | None]:
        """One trial, from its knobs to its value: number, knobs, state and value."""
        from optuna.trial import TrialState

        trial = study.ask(self._distributions)
        state, value = TrialState.FAIL, None
        try:
            result, pruned = self._train(trial)
            value = result.best_validation_loss
            if not math.isfinite(value):
                raise LossError("no outer step had a finite validation loss")
            state = TrialState.PRUNED if pruned else TrialState.COMPLETE
        except (LossError, HypergradientError, torch.OutOfMemoryError) as error:
            trial.set_user_attr("failure", str(error))
            self._failures.append(f"trial {trial.number}: {error}")
            value = None
        finally:
            study.tell(trial, value if state is TrialState.COMPLETE else None, state=state)
        if state is TrialState.COMPLETE and study.best_trial.number == trial.number:
            self._best = (trial.number, result)
        self._parent.log_metrics(
            {"search/value": math.nan if value is None else value, "search/best": _best_value(study)},
            trial.number,
        )
        return trial.number, dict(trial.params), state.name.lower(), value

    def _train(self, trial: Trial) -> tuple[Result, bool]:
        knobs, backend = self._settings(trial)
        pruned = False

        def report(step: OuterStep, problem: BilevelProblem) -> bool:
            nonlocal pruned
            if math.isfinite(step.validation_loss_sweep):
                trial.report(step.validation_loss_sweep, step.step)
                pruned = trial.should_prune()
            return pruned

        seed = None if self._seed is None else self._seed + trial.number
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            problem = self._builder(**knobs)
        if not isinstance(problem, BilevelProblem):
            raise SearchError(
                f"{self._builder.__name__} must return a BilevelProblem; it returned {type(problem).__name__}."
            )
        options = {"progress": False, **self._options}
        callbacks = [*options.pop("callbacks", ()), report]
        result = optimize(problem, backend, seed=seed, callbacks=callbacks, tracking=self._nested(trial), **options)
        trial.set_user_attr("run_id", result.run_id)
        return result, pruned

    def _settings(self, trial: Trial) -> tuple[dict[str, Any], Spec]:
        """The builder's keywords and the backend of a trial."""
        knobs = {name: value for name, value in trial.params.items() if not _is_backend_knob(name)}
        chosen = {name: value for name, value in trial.params.items() if _is_backend_knob(name)}
        if not isinstance(self._fixed_backend, Mapping):
            return knobs, self._fixed_backend
        spec = dict(self._fixed_backend)
        for name, value in chosen.items():
            spec["name" if name == _BACKEND_KNOB else name.removeprefix(f"{_BACKEND_KNOB}.")] = value
        options = {option.name for option in options_of(get_backend_class(spec["name"]))}
        return knobs, {key: value for key, value in spec.items() if key == "name" or key in options}

    def _nested(self, trial: Trial) -> Tracking | bool:
        if self._config is None:
            return False
        return replace(
            self._config,
            run_name=f"{self._config.run_name or 'trial'}-{trial.number}",
            parent_run_id=self._parent.run_id,
            params={
                **self._config.params,
                "trial": trial.number,
                **{f"knob.{k}": v for k, v in trial.params.items()},
            },
        )

    def result(self, study: Study) -> SearchResult:
        """The best of the study.

        Raises:
            SearchError: no trial was completed.
        """
        if math.isnan(_best_value(study)):
            reason = f" The last failure: {self._failures[-1]}" if self._failures else ""
            raise SearchError(f"a search needs at least one completed trial; of {len(study.trials)} none was.{reason}")
        best = study.best_trial
        ours = self._best is not None and self._best[0] == best.number
        return SearchResult(
            study=study,
            best_knobs=dict(best.params),
            best_validation_loss=_best_value(study),
            best_trial=best.number,
            best_result=self._best[1] if ours and self._best is not None else None,
            run_id=self._parent.run_id,
            run_link=self._parent.run_link,
        )


def _is_backend_knob(name: str) -> bool:
    return name == _BACKEND_KNOB or name.startswith(f"{_BACKEND_KNOB}.")


def _split_backend(backend: Any) -> tuple[dict[str, BaseDistribution], Spec]:
    """The parts of ``backend=`` that are searched, and the part that is fixed; refuses names and options nobody has."""
    from optuna.distributions import BaseDistribution, CategoricalDistribution

    if isinstance(backend, BaseDistribution):
        backend = {"name": backend}
    if not isinstance(backend, Mapping) or not any(isinstance(value, BaseDistribution) for value in backend.values()):
        return {}, get_backend(backend)
    name = backend.get("name")
    if isinstance(name, BaseDistribution) and not isinstance(name, CategoricalDistribution):
        raise BackendError(f"a backend as a knob needs a CategoricalDistribution of names; got {name}.")
    names = list(name.choices) if isinstance(name, CategoricalDistribution) else [name]
    classes: list[type[Backend]] = [get_backend_class(str(each)) for each in names]
    known = sorted({option.name for each in classes for option in options_of(each)})
    searched: dict[str, BaseDistribution] = {}
    fixed: dict[str, Any] = {}
    for key, value in backend.items():
        if key != "name" and key not in known:
            raise BackendError(
                f"none of the backends {', '.join(map(str, names))} has an option {key!r}.{nearest(key, known)}"
            )
        if isinstance(value, BaseDistribution):
            searched[_BACKEND_KNOB if key == "name" else f"{_BACKEND_KNOB}.{key}"] = value
        else:
            fixed[key] = value
    return searched, fixed


def _open_study(
    storage: str | None,
    name: str | None,
    sampler: BaseSampler | None,
    pruner: BasePruner | None,
    seed: int | None,
    distributions: Mapping[str, BaseDistribution],
) -> Study:
    import optuna
    from optuna.distributions import distribution_to_json

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    described = {each: json.loads(distribution_to_json(distribution)) for each, distribution in distributions.items()}
    try:
        study = optuna.create_study(
            storage=storage,
            study_name=name or f"search-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}",
            sampler=sampler,
            pruner=pruner or optuna.pruners.MedianPruner(n_warmup_steps=5),
            load_if_exists=name is not None,
        )
        if sampler is None:  # a study that is continued must not draw the same knobs again
            study.sampler = optuna.samplers.TPESampler(seed=None if seed is None else seed + len(study.trials))
        before = study.user_attrs.get("knobs")
        if before is None:
            study.set_user_attr("knobs", described)
    except Exception as error:  # whatever the storage's driver raises
        detail = str(error).splitlines()[0]
        raise SearchError(
            f"the study cannot be kept in {storage!r}: {detail}. Choose another storage; nothing was changed."
        ) from error
    if before is not None and before != described:
        changed = sorted(key for key in {*before, *described} if before.get(key) != described.get(key))
        raise SearchError(
            f"a study is continued with the knobs it was begun with; in study {name!r} these differ: "
            + "; ".join(f"{key}: was {_short(before.get(key))}, is {_short(described.get(key))}" for key in changed)
            + ". Give the study another name, or put the knobs back."
        )
    return study


def _short(described: Mapping[str, Any] | None) -> str:
    if described is None:
        return "absent"
    return f"{described['name']}({', '.join(f'{k}={v}' for k, v in described['attributes'].items())})"


def _remaining(study: Study, n_trials: int) -> int:
    done = sum(trial.state.is_finished() for trial in study.trials)
    if done >= n_trials:
        warn(
            f"study {study.study_name!r} already has {done} trials, and n_trials={n_trials} asks for no more; raise "
            "it to go on."
        )
    return max(n_trials - done, 0)


def _best_value(study: Study) -> float:
    from optuna.trial import TrialState

    values = [t.value for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if t.value is not None]
    return min(values, default=math.nan)


def _trials_table(study: Study, folder: Any) -> Any:
    study.trials_dataframe().to_csv(folder / "trials.csv", index=False)
    yield folder / "trials.csv", None
