"""What the commands of the command line have in common: their options, and how values are read from text."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from hyperopt_implicit.errors import CommandError

File = Annotated[
    Path,
    typer.Argument(metavar="FILE.py", help="Python file that defines a problem, or a function that builds one."),
]
Problem = Annotated[
    str | None, typer.Option("--problem", metavar="NAME", help="Which one, where the file defines several.")
]
BackendName = Annotated[str, typer.Option("--backend", "-b", help="Hypergradient backend by name; see `backends`.")]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", metavar="NAME=VALUE", help="Option of the backend; may be repeated."),
]
OuterSteps = Annotated[int, typer.Option(help="How often the hyperparameters move.")]
InnerSteps = Annotated[int, typer.Option(help="Training steps before each move.")]
Warmup = Annotated[int, typer.Option("--warmup-steps", help="Training steps before the first move.")]
OuterLr = Annotated[float, typer.Option(help="Learning rate of the outer optimizer (Adam).")]
Clip = Annotated[float | None, typer.Option(help="Largest norm of the hypergradient.")]
HessianBatches = Annotated[int, typer.Option(help="Training batches over which the Hessian is averaged.")]
Accumulate = Annotated[int, typer.Option(help="Batches of the training data that are the micro-batches of one.")]
Checkpoint = Annotated[
    Path | None, typer.Option(help="Folder for checkpoints; Ctrl-C then saves and prints the command that goes on.")
]
CheckpointEvery = Annotated[
    int | None, typer.Option(help="Save after so many outer steps [default: as often as costs next to nothing].")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the run in the folder of --checkpoint, or begin it there.")
]
InnerPrecision = Annotated[
    str | None, typer.Option(help="Training steps under autocast in bfloat16, or in float16 with a scaled loss.")
]
Patience = Annotated[int | None, typer.Option(help="Stop after so many outer steps without a lower validation loss.")]
Seed = Annotated[int | None, typer.Option(help="Seed for building the problem and for the run.")]
Threads = Annotated[
    int | None,
    typer.Option(help="Threads for torch; 1 is often fastest for small models."),
]
Device = Annotated[str | None, typer.Option(help="Where to train: cpu, cuda, cuda:1, mps.")]
Knobs = Annotated[
    list[str] | None,
    typer.Option("--knob", "-k", metavar="NAME=VALUE", help="Value of a knob; may be repeated."),
]
Uri = Annotated[
    str | None,
    typer.Option("--tracking-uri", help="MLflow tracking URI [default: $MLFLOW_TRACKING_URI or sqlite:///mlflow.db]."),
]
Experiment = Annotated[
    str | None,
    typer.Option(help="MLflow experiment [default: $MLFLOW_EXPERIMENT_NAME or hyperopt_implicit]."),
]
RunName = Annotated[str | None, typer.Option(help="Name of the MLflow run.")]
NoTracking = Annotated[bool, typer.Option("--no-tracking", help="Log nothing.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def pairs(items: list[str] | None, flag: str) -> dict[str, Any]:
    """NAME=VALUE items as a dict.

    Raises:
        CommandError: an item has no such form.
    """
    pairs = {}
    for item in items or []:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise CommandError(f"{flag} takes NAME=VALUE; got {item!r}.")
        pairs[name.strip()] = _literal(value.strip())
    return pairs


def _literal(text: str) -> Any:
    """A number, True, None … where the text reads as one, else the text; nothing is evaluated."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def check_device(device: str | None) -> None:
    """Refuse a device that torch cannot use here.

    Raises:
        CommandError: with torch's reason.
    """
    if device is None:
        return
    try:
        torch.empty((), device=device)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error


def set_threads(threads: int | None) -> None:
    """Give torch so many threads.

    Raises:
        CommandError: it is no positive number.
    """
    if threads is None:
        return
    if threads < 1:
        raise CommandError(f"--threads must be a whole number of at least 1; got {threads}.")
    torch.set_num_threads(threads)
