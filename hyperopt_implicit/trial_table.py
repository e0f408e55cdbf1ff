"""A study as a table for the terminal: its trials, or the few words on each of many studies."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from hyperopt_implicit.places import is_lost, visible_trials
from hyperopt_implicit.telling import front, objective_names

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial
    from rich.table import Table

_COLOURS = {
    "running": "cyan",
    "complete": "green",
    "pruned": "yellow",
    "failed": "red",
    "lost": "magenta",
    "waiting": "dim",
}


def trial_table(study: Study, most: int | None = None) -> Table:
    """Number, state, values, time and knobs of each trial, the best ones marked.

    Args:
        study: whose trials.
        most: only the best ones and so many of the last.
    """
    from rich.markup import escape
    from rich.table import Table

    trials = visible_trials(study)
    best = {each.number for each in front(study)}
    shown = trials if most is None else [t for i, t in enumerate(trials) if t.number in best or i >= len(trials) - most]
    knobs = list(dict.fromkeys(name for each in trials for name in each.params))
    objectives = objective_names(study)
    table = Table(box=None, pad_edge=False)
    table.add_column("trial", justify="right")
    table.add_column("state")
    for name in [*objectives, "time"]:
        table.add_column(escape(name.replace("_", " ")), justify="right")
    for name in knobs:
        table.add_column(escape(name), justify="right")
    if len(shown) < len(trials):
        table.add_row("…")
    for each in shown:
        state = state_of(each)
        table.add_row(
            f"{each.number}{'*' if each.number in best else ' '}",
            f"[{_COLOURS[state]}]{state}[/]",
            *_values(each, len(objectives)),
            seconds_of(each),
            *(escape(number(each.params.get(name))) for name in knobs),
        )
    return table


def state_of(trial: FrozenTrial) -> str:
    """``complete``, ``pruned``, ``failed``, ``lost`` (to be repeated), ``running`` or ``waiting``."""
    if is_lost(trial):
        return "lost"
    name = trial.state.name.lower()
    return "failed" if name == "fail" else name


def seconds_of(trial: FrozenTrial) -> str:
    """How long a trial took, or has been taking."""
    if trial.datetime_start is None:
        return ""
    seconds = ((trial.datetime_complete or datetime.now()) - trial.datetime_start).total_seconds()
    seconds = max(0.0, seconds)  # the clock may have been set back
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def number(value: Any) -> str:
    """A knob's value, short."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _values(trial: FrozenTrial, count: int) -> Sequence[str]:
    if trial.values is not None:
        return [f"{value:.6g}" for value in trial.values]
    reported = trial.intermediate_values  # of a trial that runs, or was pruned: what it has reported so far
    if count == 1 and reported:
        return [f"{min(reported.values()):.6g}"]
    return [""] * count
