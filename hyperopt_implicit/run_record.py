"""What is said about a run: its params, tags, metrics and files, in the words in which they are tracked.

No tracker is known here; ``tracking.py`` sends what this file describes.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import platform
import re
import subprocess  # nosec B404 # for git, without a shell
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hyperopt_implicit import figures
from hyperopt_implicit.backend import Backend, options_of
from hyperopt_implicit.history import OuterStep, Result
from hyperopt_implicit.problem import BilevelProblem
from hyperopt_implicit.report import Report


def params_of(problem: BilevelProblem, backend: Backend) -> dict[str, Any]:
    """Everything that was decided before the run: backend and options, model, hyperparameters, versions."""
    return {
        "backend": type(backend).__name__,
        **{f"backend.{option.name}": getattr(backend, option.name) for option in options_of(type(backend))},
        **problem_params(problem),
    }


def problem_params(problem: BilevelProblem) -> dict[str, Any]:
    """Model, inner optimizer, hyperparameters and versions."""
    return {
        "model": type(problem.model).__name__,
        "model.parameters": sum(p.numel() for p in problem.params.values()),
        "inner_optimizer": type(problem.optimizer).__name__,
        "device": problem.device,
        "hyperparameters": sum(p.numel() for p in problem.hparams.values()),
        **{f"hyperparameter.{name}": each.constraint for name, each in problem.hyperparameters.declarations.items()},
        **versions(),
    }


def versions() -> dict[str, str]:
    """The versions that a run's numbers depend on."""
    names = ("hyperopt-implicit", "torch", "mlflow", "optuna")
    found = {f"version.{name}": importlib.metadata.version(name) for name in names}
    return {**found, "version.python": platform.python_version()}


def metrics_of(step: OuterStep) -> dict[str, float]:
    """One outer step as metrics, grouped by prefix."""
    metrics = {
        "loss/training": step.training_loss,
        "loss/validation_sweep": step.validation_loss_sweep,
        "solver/hypergradient_norm": step.hypergradient_norm,
        "solver/iterations": float(step.iterations),
        "solver/products": float(step.hvps),
        "solver/failed": float(step.status.failed),
        "solver/not_applied": float(not step.applied),
        "solver/failed_inner_steps": float(step.failed_inner_steps),
        "time/inner_seconds": step.inner_seconds,
        "time/outer_seconds": step.outer_seconds,
    }
    if step.residual is not None:
        metrics["solver/residual"] = step.residual
    metrics.update((f"hyperparameter/{name}", value) for name, value in step.hyperparameters.items())
    metrics["loss/validation"] = step.validation_loss  # the last, by which a record is known to be there
    return metrics


def summary_of(result: Result) -> dict[str, float]:
    """What a whole run came to."""
    return {
        "summary/best_validation_loss": result.best_validation_loss,
        "summary/best_step": -1.0 if result.best_step is None else float(result.best_step),
        "summary/steps_not_applied": float(result.failed_steps),
        "summary/seconds": result.seconds,
    }


def source_of(function: Callable[..., Any]) -> Path | None:
    """The file in which a function is written, where there is one."""
    try:
        path = Path(inspect.getsourcefile(inspect.unwrap(function)) or "")
    except TypeError:
        return None
    return path if path.is_file() else None


def source_tags(source: Path | None) -> dict[str, str]:
    """The name of the source file and the git commit it is at."""
    if source is None:
        return {}
    tags = {"mlflow.source.name": source.name, "mlflow.source.type": "LOCAL"}
    # no shell, and the only word that is not fixed is a folder that exists
    command = ["git", "-C", str(source.parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)  # nosec B603
    except (OSError, subprocess.SubprocessError):
        return tags
    return {**tags, "mlflow.source.git.commit": found.stdout.strip()} if found.returncode == 0 else tags


def description_of(reports: Iterable[Report]) -> str | None:
    """What the reports have to say, as a list in Markdown; None where they say nothing."""
    lines = [f"- {line}" for report in reports for line in report.lines()]
    return "\n".join(lines) or None


def figures_of(result: Result, folder: Path, reports: Sequence[Report] = ()) -> Iterator[Path]:
    """Draw losses, hyperparameters, and what the reports have to show, into a folder."""
    drawn = {
        "trajectories": figures.trajectories(result.history),
        "hyperparameters": figures.histograms(result.hyperparameters),
    }
    for report in reports:
        drawn.update(report.figures())
    taken: set[str] = set()
    for name, figure in drawn.items():
        if figure is not None:
            name = re.sub(r"[^\w\- ]", "_", name)  # a report's, which must not lead out of the folder
            while name in taken:
                name += "_"
            taken.add(name)
            figure.savefig(folder / f"{name}.png", dpi=120)
            yield folder / f"{name}.png"


def files_of(
    result: Result, folder: Path, *, save_state: bool, draw: bool = True, reports: Sequence[Report] = ()
) -> Iterator[tuple[Path, str | None]]:
    """Write figures, history, values and states into a folder; gives each file with its place among the artifacts."""
    if not len(result.history):
        return
    if draw:
        for path in figures_of(result, folder, reports):
            yield path, None
    result.history.to_dataframe().to_csv(folder / "history.csv", index=False)
    yield folder / "history.csv", None
    if result.history.notes:
        lines = [f"outer step {step}: {note}\n" for step, note in result.history.notes.items()]
        (folder / "backend_choices.txt").write_text("".join(lines))
        yield folder / "backend_choices.txt", None
    for name, values in (("last", result.hyperparameters), ("best", result.best_hyperparameters)):
        plain = {key: value.state_dict() if isinstance(value, nn.Module) else value for key, value in values.items()}
        torch.save(plain, folder / f"{name}.pt")
        yield folder / f"{name}.pt", "hyperparameters"
    if save_state:
        for name, module in (
            ("model", result.problem.model),
            ("hyperparameters", result.problem.hyperparameters),
        ):
            torch.save(module.state_dict(), folder / f"{name}.pt")
            yield folder / f"{name}.pt", "state"
