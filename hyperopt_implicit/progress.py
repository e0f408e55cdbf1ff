"""The progress bar of a run, drawn by rich on a terminal, and what the backend has to say, there and elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from hyperopt_implicit.argument_checks import check_switch
from hyperopt_implicit.history import OuterStep


class ProgressBar:
    """A bar over the outer steps with the present losses; a context manager.

    Args:
        total: number of outer steps.
        enabled: whether to draw; None draws on a terminal only, and False keeps silent altogether.
        done: how many of them were taken before.
    """

    def __init__(self, total: int, enabled: bool | None = None, *, done: int = 0) -> None:
        check_switch("progress", enabled, or_none=True)
        self._total, self._done = total, done
        self._speaks = enabled is not False
        self._enabled = sys.stderr.isatty() if enabled is None else enabled
        self._progress: Any = None
        self._task: Any = None

    def __enter__(self) -> ProgressBar:
        if self._enabled:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("outer step"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True))
            self._progress.start()
            self._task = self._progress.add_task("", total=self._total, completed=self._done)
        return self

    def update(self, step: OuterStep) -> None:
        """Show one more step; what the backend has to say stays above the bar, and is said without a bar as well."""
        if step.note is not None and self._speaks:
            line = f"outer step {step.step}: {step.note}"
            if self._progress is not None:
                self._progress.console.print(line, markup=False, highlight=False)
            else:
                print(line, file=sys.stderr)
        if self._progress is not None:
            text = (
                f"training {step.training_loss:.4g}  validation {step.validation_loss_sweep:.4g}  {step.status.value}"
            )
            self._progress.update(self._task, advance=1, description=text)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
