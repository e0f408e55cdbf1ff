"""The commands around studies: ``search``, alone or with local workers, ``studies`` and ``show``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from hyperopt_implicit.backend import get_backend
from hyperopt_implicit.cli_options import (
    Accumulate,
    BackendName,
    CheckpointEvery,
    Clip,
    Debug,
    Device,
    Experiment,
    File,
    HessianBatches,
    InnerPrecision,
    InnerSteps,
    NoTracking,
    Options,
    OuterLr,
    OuterSteps,
    Patience,
    Problem,
    RunName,
    Seed,
    Threads,
    Uri,
    Warmup,
    check_device,
    pairs,
    set_threads,
)
from hyperopt_implicit.cli_output import out, print_link
from hyperopt_implicit.cli_resume import present_command, resumable
from hyperopt_implicit.credentials import without_credentials
from hyperopt_implicit.errors import CommandError, SearchError
from hyperopt_implicit.knob_space import Builder, KnobSpace
from hyperopt_implicit.knobs import knobs_of
from hyperopt_implicit.loading import build, find_problem, load_file
from hyperopt_implicit.local_workers import run_workers
from hyperopt_implicit.places import counted, visible_trials
from hyperopt_implicit.problem import BilevelProblem
from hyperopt_implicit.search import search
from hyperopt_implicit.storages import open_storage, shown
from hyperopt_implicit.studies import (
    DEFAULT_STORAGE,
    PRUNERS,
    SAMPLERS,
    open_study,
    pruner_of,
    sampler_of,
    summaries,
)
from hyperopt_implicit.telling import front, objective_names
from hyperopt_implicit.tracking import Tracking
from hyperopt_implicit.trial_table import number, seconds_of, state_of, trial_table

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

_LIVE_TRIALS = 12  # of a table that is drawn again each second

Storage = Annotated[
    str,
    typer.Option(help="sqlite:///FILE, journal:///FILE, postgresql://USER@HOST/DATABASE or grpc://HOST:PORT."),
]


def search_command(
    context: typer.Context,
    file: File,
    problem: Problem = None,
    backend: BackendName = "neumann",
    option: Options = None,
    trials: Annotated[int, typer.Option("--trials", "-n", help="Trials the study shall have in all.")] = 20,
    timeout: Annotated[float | None, typer.Option(help="Begin no trial after so many seconds.")] = None,
    study: Annotated[str | None, typer.Option(help="Name of the study; one that exists is continued.")] = None,
    storage: Storage = DEFAULT_STORAGE,
    workers: Annotated[int, typer.Option(help="Processes on this machine that share the study.")] = 1,
    population: Annotated[
        str, typer.Option(help="Trials that are trained at once as one computation: a number, or 'auto'.")
    ] = "1",
    compile: Annotated[bool, typer.Option("--compile", help="Compile the computation of a population.")] = False,
    sampler: Annotated[str, typer.Option(help=f"{', '.join(SAMPLERS)}.")] = "tpe",
    pruner: Annotated[str, typer.Option(help=f"{', '.join(PRUNERS)}.")] = "median",
    warm_start: Annotated[
        bool, typer.Option("--warm-start", help="Begin hyperparameters at those of the best finished trial.")
    ] = False,
    artifacts: Annotated[
        str | None, typer.Option(help="Folder for the models of the best trials [default: beside the storage].")
    ] = None,
    outer_steps: OuterSteps = 100,
    inner_steps: InnerSteps = 10,
    warmup_steps: Warmup = 0,
    outer_lr: OuterLr = 1e-2,
    clip: Clip = None,
    hessian_batches: HessianBatches = 1,
    accumulate: Accumulate = 1,
    inner_precision: InnerPrecision = None,
    patience: Patience = None,
    checkpoint_every: CheckpointEvery = None,
    seed: Seed = None,
    device: Device = None,
    threads: Threads = None,
    tracking_uri: Uri = None,
    experiment: Experiment = None,
    run_name: RunName = None,
    no_tracking: NoTracking = False,
    debug: Debug = False,
) -> None:
    """Search the knobs of a problem with Optuna; each trial trains its hyperparameters by gradient.

    The same command on several machines, with the same `--storage` and `--study`, shares the work.

    Example: `hyperopt-implicit search train.py --backend cg --trials 30 --study decay --workers 2`
    """
    spec = get_backend(backend, **pairs(option, "--option"))
    check_device(device)
    set_threads(threads)
    builder = _builder(file, problem, device)
    name = study or f"search-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
    trained_at_once = _population(population)
    sampler_of(sampler, None)  # names that are unknown are refused here, before there are workers
    pruner_of(pruner, outer_steps)
    if workers < 1:
        raise CommandError(f"--workers must be a whole number of at least 1; got {workers}.")
    with resumable(context, "search", {"study": name}, _hidden(storage, tracking_uri)):
        if workers > 1:
            KnobSpace.of(builder, spec).check()  # what no worker could do is said once
            open_storage(storage)
            with _live(name, storage):
                link = run_workers(present_command(context, "search", {"study": name, "workers": 1}), workers)
            _print_best(open_study(name, storage))
            if link is not None:
                out.print(link, soft_wrap=True, highlight=False)
            return
        with _live(name, storage) as is_live:
            found = search(
                builder,
                spec,
                n_trials=trials,
                timeout=timeout,
                study_name=name,
                storage=storage,
                sampler=sampler,
                pruner=pruner,
                seed=seed,
                warm_start_hyperparameters=warm_start,
                population=trained_at_once,
                compile=compile,
                artifacts=artifacts,
                on_trial=None if is_live else _print_trial,
                tracking=not no_tracking and Tracking(tracking_uri, experiment, run_name),
                outer_steps=outer_steps,
                inner_steps=inner_steps,
                warmup_steps=warmup_steps,
                outer_lr=outer_lr,
                clip=clip,
                hessian_batches=hessian_batches,
                accumulate=accumulate,
                inner_precision=inner_precision,
                patience=patience,
                checkpoint_every=checkpoint_every,
            )
    _print_best(found.study)
    print_link(found.run_link, tracking_uri)


def studies(storage: Storage = DEFAULT_STORAGE, debug: Debug = False) -> None:
    """List the studies of a storage."""
    table = Table(box=None, pad_edge=False)
    for column, justify in (("study", "left"), ("trials", "right"), ("best", "right"), ("begun", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for each in summaries(storage):
        table.add_row(escape(each.name), str(each.trials), each.best, each.begun)
    out.print(table if table.row_count else f"{shown(storage)} holds no study yet.")


def show(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="Name of a study; see `studies`.")],
    storage: Storage = DEFAULT_STORAGE,
    debug: Debug = False,
) -> None:
    """Print a study: all its trials, why some failed, and the best."""
    found = open_study(study, storage)
    out.print(trial_table(found))
    for each in visible_trials(found):
        if "failure" in each.user_attrs:
            out.print(f"trial {each.number}: {escape(each.user_attrs['failure'])}", soft_wrap=True, highlight=False)
    _print_best(found)


def _builder(file: Path, problem: str | None, device: str | None) -> Builder:
    found = find_problem(load_file(file), problem)
    if isinstance(found, BilevelProblem):
        raise CommandError(
            "a search needs a function with @knob declarations; this file defines a finished problem. Use 'run'."
        )
    if device is None:
        return found

    def moved(**knobs: Any) -> BilevelProblem:
        return build(found, knobs).to(device)

    moved.__knobs__ = knobs_of(found)  # type: ignore[attr-defined]
    return moved


def _population(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise CommandError(f"--population takes a whole number of at least 1, or 'auto'; got {text!r}.")
    return int(text)


def _hidden(storage: str, uri: str | None) -> dict[str, str]:
    """How URIs with a password in them are shown."""
    return {storage: shown(storage)} | ({} if uri is None else {uri: without_credentials(uri)})


@contextmanager
def _live(name: str, storage: str) -> Iterator[bool]:
    """On a terminal, a table of the study's trials that is drawn again each second."""
    if not out.is_terminal:
        yield False
        return
    watched: list[Study] = []

    def table() -> Table | str:
        try:
            if not watched:
                watched.append(open_study(name, storage))
            return trial_table(watched[0], most=_LIVE_TRIALS)
        except SearchError:  # it is about to be made
            return ""

    with Live(console=out, get_renderable=table, refresh_per_second=1, redirect_stdout=False):
        yield True


def _print_trial(trial: FrozenTrial) -> None:
    values = " ".join(f"{value:.6g}" for value in trial.values or [])
    knobs = "  ".join(f"{name}={number(each)}" for name, each in trial.params.items())
    failure = f"  {trial.user_attrs['failure']}" if "failure" in trial.user_attrs else ""
    out.print(
        f"trial {trial.number:>3}  {state_of(trial):<9} {values:<12} {seconds_of(trial):>8}  {knobs}{failure}",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )


def _print_best(study: Study) -> None:
    trials = counted(study)
    objectives = [name.replace("_", " ") for name in objective_names(study)]
    best = front(study)
    if not best:
        out.print(f"study {escape(study.study_name)}: none of {trials} trials is complete", highlight=False)
        return
    for each in best:
        values = ", ".join(f"{name} {value:.6g}" for name, value in zip(objectives, each.values, strict=True))
        knobs = ", ".join(f"{name} = {number(value)}" for name, value in each.params.items())
        line = f"best of {trials} trials: number {each.number}, {values}, {escape(knobs)}"
        out.print(line, highlight=False, soft_wrap=True)
    out.print(
        f"continue it with --study {escape(study.study_name)} and a larger --trials; load its model with "
        f"hi.load_best(builder, {escape(repr(study.study_name))})",
        soft_wrap=True,
        highlight=False,
    )
