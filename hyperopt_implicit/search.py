"""Search: Optuna outside, gradients inside.

Optuna proposes the knobs of a trial; within it, everything with a gradient is trained by ``optimize.py``. Samplers,
pruners and storages are Optuna's own. What is searched is in ``knob_space.py``, the study in ``studies.py``, what other
workers of the same study do in ``workers.py``, and one trial in ``trials.py``; here is what a search is as a whole.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hyperopt_implicit.argument_checks import check_list, check_seed, check_switch, checked_callbacks
from hyperopt_implicit.argument_checks import shown as given
from hyperopt_implicit.backend import Spec
from hyperopt_implicit.distributed import several, world_size
from hyperopt_implicit.errors import DistributedError, SearchError
from hyperopt_implicit.guarded_step import check_policy
from hyperopt_implicit.history import Result
from hyperopt_implicit.interrupts import Interrupt, listening
from hyperopt_implicit.kept_trials import KeptTrials
from hyperopt_implicit.knob_space import Builder, KnobSpace
from hyperopt_implicit.messages import nearest, warn
from hyperopt_implicit.optimize import optimize
from hyperopt_implicit.places import counted
from hyperopt_implicit.prepared_run import check_options
from hyperopt_implicit.reporting import Pace
from hyperopt_implicit.search_record import SearchRecord
from hyperopt_implicit.storages import cause, is_storages, shown, without_secrets
from hyperopt_implicit.studies import (
    DEFAULT_STORAGE,
    Plan,
    begin_or_continue,
    name_of,
    pruner_of,
    refuse_another,
    sampler_of,
)
from hyperopt_implicit.telling import FAILURES, OBJECTIVES, Objective, Teller, front
from hyperopt_implicit.tracking import Tracking, resolve
from hyperopt_implicit.trial_checkpoints import TrialCheckpoints
from hyperopt_implicit.trials import TrialPlan, TrialRunner
from hyperopt_implicit.workers import claim, give_back, reclaim

if TYPE_CHECKING:
    from optuna.artifacts._protocol import ArtifactStore
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

_AUTO_POPULATION = 16


@dataclass
class SearchResult:
    """What :func:`search` returns.

    Attributes:
        study: Optuna's study, with every trial.
        best_knobs: the knobs of the best trial.
        best_validation_loss: its value; with several objectives, its first one.
        best_trial: its number; with several objectives, that of the trial on the Pareto front whose first one is
            lowest.
        best_result: its :class:`Result`, where it ran in this call and not in an earlier one or in another process.
        pareto_front: the best trials, as Optuna has them: one, or those that no other beats in all objectives.
        run_id: of the parent MLflow run.
        run_link: where to look at it.
    """

    study: Study
    best_knobs: dict[str, Any]
    best_validation_loss: float
    best_trial: int
    best_result: Result | None
    pareto_front: list[FrozenTrial]
    run_id: str | None
    run_link: str | None


def search(
    builder: Builder,
    backend: Spec | BaseDistribution | Mapping[str, Any] = "neumann",
    *,
    n_trials: int = 20,
    timeout: float | None = None,
    study_name: str | None = None,
    storage: str | BaseStorage | None = DEFAULT_STORAGE,
    sampler: str | BaseSampler | None = None,
    pruner: str | BasePruner | None = None,
    seed: int | None = None,
    objectives: Sequence[str | Objective] = ("validation_loss",),
    constraints: Mapping[str, Objective] | None = None,
    catch: Sequence[type[Exception]] = (),
    warm_start_hyperparameters: bool = False,
    population: int | Literal["auto"] = 1,
    compile: bool = False,
    report_every: int | None = None,
    artifacts: str | Path | ArtifactStore | None = None,
    on_trial: Callable[[FrozenTrial], None] | None = None,
    tracking: Tracking | bool = True,
    **options: Any,
) -> SearchResult:
    """Search the knobs of a problem builder with Optuna; each trial trains its hyperparameters by gradient.

    A trial's value is the lowest validation loss of its run. The validation loss is reported to Optuna at outer steps,
    and the pruner may end the trial there. In MLflow the search is one run, with one nested run for each trial.

    Several processes, on one machine or on many, work on one study where all are given the same ``storage`` and
    ``study_name``. A trial whose process was killed is gone on with from its last outer step. Ctrl-C lets the present
    outer step end, puts the trial back for the next search, and raises KeyboardInterrupt; a second one leaves at once.

    The model and the hyperparameters of the best trial are kept: :func:`load_best` loads them.

    Args:
        builder: a function with :func:`knob` declarations that returns a :class:`BilevelProblem`. Keywords without a
            knob keep their defaults. It is called once more than there are trials, to see before the first one whether
            they can work.
        backend: as for :func:`optimize`; or an Optuna distribution over names; or a dict with ``"name"`` and options,
            any of which may be a distribution. An option is given to those of the backends that have it.
        n_trials: how many trials the study shall have when the search is over; a study that is continued counts those
            it has. A trial that was lost with its process counts as its repetition only.
        timeout: begin no trial after so many seconds.
        study_name: a study of that name in the storage is continued; None begins a new one.
        storage: a URL (``sqlite:///file``, ``journal:///file``, ``postgresql://…``, ``grpc://host:port``), a storage of
            Optuna's, or None for one in memory.
        sampler: a name (``"tpe"``, ``"random"``, ``"gp"``, ``"cmaes"``, ``"qmc"``, ``"nsgaii"``, …) or any sampler of
            Optuna's; by default TPE. A name is seeded with ``seed``.
        pruner: a name (``"median"``, ``"hyperband"``, ``"successive_halving"``, ``"none"``) or any pruner of Optuna's;
            by default the median pruner, which acts from the sixth trial on. Hyperband deals trials out by the study's
            name, so that only a study with a name can be repeated with it.
        seed: for the sampler, and plus the trial's place in the study for each trial; its number, unless trials were
            lost before it.
        objectives: what is minimised: ``"validation_loss"``, ``"seconds"``, or functions of a trial's :class:`Result`.
            With several, the result has the Pareto front, and nothing is pruned.
        constraints: functions of a trial's :class:`Result` by name, which must be at most zero in the best trial.
        catch: further errors that fail a trial and let the search go on; those of losses and hypergradients that are
            not finite and of memory that runs out always do.
        warm_start_hyperparameters: begin each trial's hyperparameters at those of the best finished trial.
        population: train so many trials at once, as one vectorised computation (:func:`optimize_population`);
            ``"auto"`` takes 16 and measures whether that is faster.
        compile: compile that computation.
        report_every: report at every so many outer steps; by default as often as costs about a hundredth of a trial.
        artifacts: folder, or artifact store of Optuna's, for the models of the best trials; by default a folder beside
            the file of a storage, or ``optuna_artifacts``.
        on_trial: called after each trial that ran here, with the trial as Optuna has it.
        tracking: as for :func:`optimize`; here for the parent run.
        **options: of :func:`optimize`, for every trial. ``keep_best_model`` is on. Trials are saved while they run,
            beside ``artifacts``, after each outer step unless that took more than one part in 200 of the time;
            ``checkpoint_every=1`` does it in any case.

    Raises:
        SearchError: there are no knobs, the storage cannot be used, the study was begun with other knobs or objectives,
            or no trial finished.
        HyperoptError: what :func:`optimize` raises for a problem that can never work, before the first trial where that
            can be seen.
        KeyboardInterrupt: on SIGINT and SIGTERM, with how to go on.

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
    if several():
        raise DistributedError(
            "a search has workers that know nothing of each other, each with trials of its own; this process is among "
            f"the {world_size()} of a torch.distributed group. Call search without a group: processes that torchrun "
            "starts share a study's trials by its storage."
        )
    options = {"keep_best_model": True, **options}
    if study_name is not None and not isinstance(study_name, str):
        raise SearchError(f"study_name must be a text, or None; got {given(study_name)}.")
    if isinstance(artifacts, str) and "\x00" in artifacts:
        raise SearchError(f"artifacts must be the path of a folder, or an artifact store; got {given(artifacts)}.")
    if on_trial is not None and not callable(on_trial):
        raise SearchError(f"on_trial must be a function of a trial, or None; got {given(on_trial)}.")
    if not all(isinstance(each, type) and issubclass(each, Exception) for each in _listed("catch", catch)):
        raise SearchError(f"catch must be a list of exceptions' classes; got {given(catch)}.")
    for name, switch in (("warm_start_hyperparameters", warm_start_hyperparameters), ("compile", compile)):
        check_switch(name, switch)
    check_seed(seed, or_none=True)
    checked_callbacks(options.get("callbacks", ()))
    checkpoint_every = options.pop("checkpoint_every", None)
    _check_numbers(n_trials, timeout, population, report_every)
    inspect.signature(optimize).bind(builder, **options)
    check_options(options)
    check_policy(options.get("clip"), options.get("on_failure", "warn"))
    minimised, bounded = _objectives(objectives), _constraints(constraints)
    space = KnobSpace.of(builder, backend)
    settings = {"backend": str(space.fixed), "seed": str(seed)}
    settings |= {name: str(x) for name, x in options.items() if isinstance(x, int | float | str | None)}
    agreed = Plan(space.distributions, list(minimised), list(bounded), settings)
    kept_in = refuse_another(agreed, storage, study_name)
    failures = (*FAILURES, *catch)
    space.check(failures)
    outer_steps = options.get("outer_steps", inspect.signature(optimize).parameters["outer_steps"].default)
    config = resolve(tracking)
    study, created = begin_or_continue(
        agreed, kept_in, study_name, sampler_of(sampler, seed), pruner_of(pruner, outer_steps)
    )
    kept = KeptTrials(study, artifacts, storage)
    teller = Teller(study, minimised, bounded, failures, kept)
    described = {
        "n_trials": n_trials,
        "sampler": name_of(study.sampler),
        "pruner": type(study.pruner).__name__,
        "seed": seed,
        "objectives": ", ".join(minimised),
        "constraints": ", ".join(bounded) or None,
        "population": population,
        "warm_start_hyperparameters": warm_start_hyperparameters,
    }
    record = SearchRecord(study, created, space, described, config)
    plan = TrialPlan(
        space=space,
        seed=seed,
        options=options,
        catch=failures,
        nested=record.nested,
        checkpoints=TrialCheckpoints(study, kept.beside, checkpoint_every),
        warm_start=warm_start_hyperparameters,
        vectorise="auto" if population == "auto" else "always",
        compile=compile,
    )
    with listening("ending after this outer step; interrupt again to leave at once") as interrupt:
        runner = TrialRunner(study, plan, Pace(study, outer_steps, report_every), teller, interrupt)
        try:
            for trials in _batches(study, space, n_trials, timeout, population, runner, interrupt):
                for told in runner.run(trials):
                    record.log(told)
                    if on_trial is not None:
                        on_trial(told)
            if interrupt.requested and not (storage is None and counted(study) >= n_trials):
                raise KeyboardInterrupt(_how_to_go_on(study, storage))
            found = _result(teller, record)
        except BaseException as error:
            record.end(error)
            if is_storages(error):
                raise SearchError(
                    f"the storage {shown(storage)!r} no longer takes what a search has to tell "
                    f"({without_secrets(error, storage)}). What it has is kept; the same search goes on with it once "
                    "it is there again."
                ) from cause(error, storage)
            raise
        record.end(best=teller.best)
    return found


def _batches(
    study: Study,
    space: KnobSpace,
    n_trials: int,
    timeout: float | None,
    population: int | Literal["auto"],
    runner: TrialRunner,
    interrupt: Interrupt,
) -> Iterator[list[Trial]]:
    """Trials to be run next, as many at a time as are trained at once, until the study has all or time is up."""
    until = math.inf if timeout is None else time.monotonic() + timeout
    size = _AUTO_POPULATION if population == "auto" else population
    reclaim(study)
    if counted(study) >= n_trials:
        warn(
            f"study {study.study_name!r} already has {counted(study)} trials, and n_trials={n_trials} asks for no "
            "more; raise it to go on."
        )
    while not interrupt.requested and time.monotonic() < until:
        trials: list[Trial] = []
        try:
            while len(trials) < size:
                trial = claim(study, space.distributions, n_trials)
                if trial is None:
                    break
                trials.append(trial)
        except BaseException:
            for each in trials:
                give_back(study, each)
            raise
        if not trials:
            return
        yield trials
        if runner.teller.exhausted:
            return
        if population == "auto" and runner.gains is False:
            size = 1


def _result(teller: Teller, record: SearchRecord) -> SearchResult:
    """The best of the study.

    Raises:
        SearchError: no trial was completed, or none keeps the constraints.
    """
    study = teller.study
    best = front(study)
    if not best:
        reason = f" The last failure: {teller.failures[-1]}" if teller.failures else ""
        kept = " that keeps the constraints" if teller.constraints else ""
        raise SearchError(f"a search needs at least one completed trial{kept}; of {counted(study)} none was.{reason}")
    ours = teller.best if teller.best is not None and teller.best[0] == best[0].number else None
    return SearchResult(
        study=study,
        best_knobs=dict(best[0].params),
        best_validation_loss=best[0].values[0],
        best_trial=best[0].number,
        best_result=None if ours is None else ours[1],
        pareto_front=best,
        run_id=record.run_id,
        run_link=record.run_link,
    )


def _listed(name: str, value: Any) -> Sequence[Any]:
    check_list(name, value, "them", SearchError)
    return value  # type: ignore[no-any-return]


def _constraints(constraints: Any) -> dict[str, Objective]:
    rule = "constraints must be a dict of functions of a trial's Result by name"
    if constraints is not None and not isinstance(constraints, Mapping):
        raise SearchError(f"{rule}; got {given(constraints)}.")
    found = dict(constraints or {})
    for name, each in found.items():
        if not isinstance(name, str) or not callable(each):
            raise SearchError(f"{rule}; under {name!r} it has {given(each)}.")
    return found


def _objectives(objectives: Sequence[str | Objective]) -> dict[str, Objective]:
    found: dict[str, Objective] = {}
    is_one = isinstance(objectives, str) or callable(objectives)
    for each in [objectives] if is_one else _listed("objectives", objectives):
        if not isinstance(each, str) and not callable(each):
            raise SearchError(f"an objective must be a name, or a function of a trial's Result; got {given(each)}.")
        if isinstance(each, str) and each not in OBJECTIVES:
            raise SearchError(
                f"an objective must be one of {', '.join(OBJECTIVES)}, or a function of a trial's Result; got "
                f"{each!r}.{nearest(each, OBJECTIVES)}"
            )
        name = each if isinstance(each, str) else getattr(each, "__name__", type(each).__name__)
        if name in found:
            raise SearchError(f"each objective needs a name of its own; two are called {name!r}. Rename a function.")
        found[name] = OBJECTIVES[each] if isinstance(each, str) else each
    if not found:
        raise SearchError("a search needs at least one objective; objectives is empty.")
    return found


def _check_numbers(n_trials: Any, timeout: Any, population: Any, report_every: Any) -> None:
    for name, value in (("n_trials", n_trials), ("population", population), ("report_every", report_every)):
        if (name == "population" and value == "auto") or (name == "report_every" and value is None):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            more = ", or 'auto'" if name == "population" else ""
            raise SearchError(f"{name} must be a whole number of at least 1{more}; got {value!r}.")
    if timeout is not None and not (isinstance(timeout, int | float) and timeout > 0):
        raise SearchError(f"timeout must be a positive number of seconds, or None; got {timeout!r}.")


def _how_to_go_on(study: Study, storage: str | BaseStorage | None) -> str:
    if storage is None:
        return "the search was interrupted, and its study was in memory; give it a storage= to go on with one"
    return (
        f"the search was interrupted after {counted(study)} trials; go on with study_name={study.study_name!r}, "
        f"storage={shown(storage)!r}"
    )
