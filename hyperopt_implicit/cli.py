"""The command line: ``run``, ``check``, ``compare``, ``backends`` and ``ui``; ``search`` is in ``cli_search.py``.

Only parsing and printing; the work is elsewhere.
"""

from __future__ import annotations

import os
import subprocess  # nosec B404 # for MLflow's own server, without a shell
import sys
import traceback
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hyperopt_implicit.backend import get_backend, get_backend_class, list_backends
from hyperopt_implicit.backend_page import option_rows, page, summary
from hyperopt_implicit.cli_options import (
    Accumulate,
    BackendName,
    Checkpoint,
    CheckpointEvery,
    Clip,
    Debug,
    Device,
    Experiment,
    File,
    HessianBatches,
    InnerPrecision,
    InnerSteps,
    Knobs,
    NoTracking,
    Options,
    OuterLr,
    OuterSteps,
    Patience,
    Problem,
    Resume,
    RunName,
    Seed,
    Threads,
    Uri,
    Warmup,
    check_device,
    pairs,
    set_threads,
)
from hyperopt_implicit.cli_output import err, out, print_link
from hyperopt_implicit.cli_resume import resumable
from hyperopt_implicit.cli_search import search_command, show, studies
from hyperopt_implicit.credentials import censored, without_credentials
from hyperopt_implicit.diagnostics import check, compare
from hyperopt_implicit.distributed import is_first
from hyperopt_implicit.errors import CommandError, HyperoptError, HyperoptWarning
from hyperopt_implicit.history import Result, summarise
from hyperopt_implicit.launched import launched_group
from hyperopt_implicit.loading import build, find_problem, load_file
from hyperopt_implicit.optimize import optimize
from hyperopt_implicit.problem import BilevelProblem
from hyperopt_implicit.tracking import MODEL_TRAINING_VIEW, Tracking

app = typer.Typer(
    name="hyperopt-implicit",
    help="Gradient-based hyperparameter optimization for PyTorch. Declare hyperparameters in a Python file, then run "
    "or search it here.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.command(name="search")(search_command)
app.command()(studies)
app.command()(show)


@app.command()
def run(
    context: typer.Context,
    file: File,
    problem: Problem = None,
    backend: BackendName = "neumann",
    option: Options = None,
    knob: Knobs = None,
    outer_steps: OuterSteps = 100,
    inner_steps: InnerSteps = 10,
    warmup_steps: Warmup = 0,
    outer_lr: OuterLr = 1e-2,
    clip: Clip = None,
    hessian_batches: HessianBatches = 1,
    accumulate: Accumulate = 1,
    inner_precision: InnerPrecision = None,
    patience: Patience = None,
    checkpoint: Checkpoint = None,
    checkpoint_every: CheckpointEvery = None,
    resume: Resume = False,
    seed: Seed = None,
    device: Device = None,
    threads: Threads = None,
    tracking_uri: Uri = None,
    experiment: Experiment = None,
    run_name: RunName = None,
    no_tracking: NoTracking = False,
    debug: Debug = False,
) -> None:
    """Train a model and its hyperparameters together, once.

    Example: `hyperopt-implicit run train.py --backend cg --option max_iterations=10 --outer-steps 200`

    Processes that a launcher has started share each batch: `torchrun --nproc-per-node 2 -m hyperopt_implicit run …`
    """
    found = get_backend(backend, **pairs(option, "--option"))
    hidden = {} if tracking_uri is None else {tracking_uri: without_credentials(tracking_uri)}
    going_on = nullcontext() if checkpoint is None else resumable(context, "run", {"resume": True}, hidden)
    with going_on, launched_group(device) as own_device:
        built = _built(file, problem, knob, seed, own_device, threads)
        start = summarise(built.hyperparameters.values(), built.hyperparameters.element_names)
        result = optimize(
            built,
            found,
            outer_steps=outer_steps,
            inner_steps=inner_steps,
            warmup_steps=warmup_steps,
            outer_lr=outer_lr,
            clip=clip,
            hessian_batches=hessian_batches,
            accumulate=accumulate,
            inner_precision=inner_precision,
            patience=patience,
            seed=seed,
            tracking=not no_tracking and Tracking(tracking_uri, experiment, run_name),
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            resume=resume,
        )
        if is_first():
            _print_result(result, start)
            print_link(result.run_link, tracking_uri)


@app.command(name="check")
def check_command(
    file: File,
    problem: Problem = None,
    backend: BackendName = "neumann",
    option: Options = None,
    knob: Knobs = None,
    inner_steps: InnerSteps = 10,
    warmup_steps: Warmup = 0,
    tolerance: Annotated[float, typer.Option(help="Relative error up to which a hypergradient is right.")] = 0.1,
    seed: Seed = None,
    device: Device = None,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Is the hypergradient right? Compares it with finite differences of the whole inner problem; exit code 1 if not.

    Example: `hyperopt-implicit check train.py --backend cg --warmup-steps 500`
    """
    chosen = get_backend(backend, **pairs(option, "--option"))
    built = _built(file, problem, knob, seed, device, threads)
    report = check(
        built, chosen, inner_steps=inner_steps, warmup_steps=warmup_steps, tolerance=tolerance, seed=seed or 0
    )
    for each in report.renderables():
        _wide().print(each, highlight=False)
    if not report.ok:
        raise typer.Exit(1)


@app.command(name="compare")
def compare_command(
    file: File,
    problem: Problem = None,
    backend: Annotated[
        list[str] | None, typer.Option("--backend", "-b", help="Only these; may be repeated [default: all].")
    ] = None,
    knob: Knobs = None,
    inner_steps: InnerSteps = 10,
    warmup_steps: Warmup = 0,
    hessian_batches: HessianBatches = 1,
    figure: Annotated[Path | None, typer.Option(help="Write the figure of error against time here.")] = None,
    seed: Seed = None,
    device: Device = None,
    threads: Threads = None,
    tracking_uri: Uri = None,
    experiment: Experiment = None,
    run_name: RunName = None,
    no_tracking: NoTracking = False,
    debug: Debug = False,
) -> None:
    """Measure every backend that can handle a problem on it: error, cosine, time, products, memory.

    Example: `hyperopt-implicit compare train.py --warmup-steps 500 --figure backends.png`
    """
    built = _built(file, problem, knob, seed, device, threads)
    found = compare(
        built,
        backend,
        inner_steps=inner_steps,
        warmup_steps=warmup_steps,
        hessian_batches=hessian_batches,
        seed=seed or 0,
        tracking=not no_tracking and Tracking(tracking_uri, experiment, run_name),
    )
    _wide().print(found.table(), highlight=False)
    out.print(escape(found.legend()), soft_wrap=True, highlight=False)
    if figure is not None:
        found.figure().savefig(figure, dpi=120)
    print_link(found.run_link, tracking_uri)


@app.command()
def backends(
    name: Annotated[str | None, typer.Argument(help="Show this one in full.")] = None,
    debug: Debug = False,
) -> None:
    """List the hypergradient backends that are installed, with their options."""
    if name is not None:
        out.print(escape(page(name)), highlight=False, soft_wrap=True)
        return
    table = Table(box=None, pad_edge=False)
    for column in ("backend", "option", "default", "what"):
        table.add_column(column, overflow="fold")
    for each in list_backends():
        table.add_row(f"[bold]{each}[/bold]", "", "", escape(summary(each)))
        for option in option_rows(get_backend_class(each)):
            table.add_row("", *(escape(cell) for cell in option))
    out.print(table)


@app.command()
def ui(
    tracking_uri: Uri = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 5000,
    debug: Debug = False,
) -> None:
    """Open MLflow's UI on the store that runs are logged to, and print the link to its model-training view."""
    uri = Tracking(uri=tracking_uri).resolved_uri
    if uri.startswith("http"):
        out.print(
            f"Runs are on a server already: {without_credentials(uri).rstrip('/')}/#/experiments{MODEL_TRAINING_VIEW}",
            soft_wrap=True,
        )
        return
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise CommandError(f"there is no store at {uri} yet; log a run first, or name another with --tracking-uri.")
    out.print(
        f"Runs: http://{host}:{port}/#/experiments{MODEL_TRAINING_VIEW}  (takes some seconds to start; Ctrl-C stops "
        "it)",
        soft_wrap=True,
    )
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        host,
        "--port",
        str(port),
    ]
    try:
        # the store has its password in its URI, and a command line can be read by everybody on the machine
        code = subprocess.call(command, env={**os.environ, "MLFLOW_BACKEND_STORE_URI": uri})  # nosec B603 # no shell
    except KeyboardInterrupt:
        return
    if code != 0:
        raise CommandError(f"MLflow's UI ended with code {code}; is port {port} taken? Choose another with --port.")


def main() -> None:
    """Entry point: errors are one paragraph and exit code 1, unless --debug."""
    warnings.showwarning = _show_warning
    try:
        app()
    except Exception as error:
        if "--debug" in sys.argv:
            sys.excepthook = _show_error
            raise
        ours = isinstance(error, HyperoptError)
        text = str(error) if ours else f"{type(error).__name__}: {error}. Run it again with --debug to see where."
        text = _printable(text)
        # wrapped between words only: a path that was broken in two could not be copied
        err.print(f"[bold red]Error:[/bold red] {escape(text)}", highlight=False, overflow="ignore", crop=False)
        sys.exit(1)


def _show_warning(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
    label = "Warning" if issubclass(category, HyperoptWarning) else category.__name__
    err.print(f"[yellow]{label}:[/yellow] {escape(_printable(str(message)))}", highlight=False)


def _show_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(_printable("".join(traceback.format_exception(kind, error, trace))))


def _printable(text: str) -> str:
    """Without the secrets of any URI that the command was given: an error of a driver may have them in its text."""
    for word in [*sys.argv[1:], os.environ.get("MLFLOW_TRACKING_URI", "")]:
        if "://" in word or "@" in word:
            text = censored(text, word.partition("=")[2] if word.startswith("--") else word)
    return text


def _built(
    file: Path,
    problem: str | None,
    knob: list[str] | None,
    seed: int | None,
    device: str | None,
    threads: int | None,
) -> BilevelProblem:
    check_device(device)
    set_threads(threads)
    if seed is not None:
        torch.manual_seed(seed)
    built = build(find_problem(load_file(file), problem), pairs(knob, "--knob"))
    return built if device is None else built.to(device)


def _wide() -> Console:
    """A console on which a report keeps its columns: lines longer than the terminal are left to it."""
    return Console(width=max(out.width, 130), soft_wrap=False)


def _print_result(result: Result, start: dict[str, float]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("hyperparameter", "start", "best", "last"):
        table.add_column(column, justify="left" if column == "hyperparameter" else "right")
    names = result.problem.hyperparameters.element_names
    best, last = (summarise(each, names) for each in (result.best_hyperparameters, result.hyperparameters))
    for name, value in start.items():
        table.add_row(name, f"{value:.4g}", f"{best[name]:.4g}", f"{last[name]:.4g}")
    out.print(table)
    steps = len(result.history)
    where = "" if result.best_step is None else f" at outer step {result.best_step}"
    out.print(
        f"\nvalidation loss: best {result.best_validation_loss:.6g}{where}, last {result.validation_loss:.6g}; "
        f"{steps} outer steps in {result.seconds:.1f} s ({result.stop_reason})",
        highlight=False,
    )
