"""What the examples share: methods measured over seeds, and a table of mean ± standard error, paired by seed.

No problem is defined here; each of the scripts beside it is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor


def compare(
    scores: Callable[[int], dict[str, float]],
    seeds: Sequence[int],
    *,
    title: str,
    measure: str,
    ours: Sequence[str],
    lower_is_better: bool = False,
    digits: int = 1,
    notes: Callable[[], Iterable[str]] = tuple,
) -> None:
    """Run all methods on each seed, and print a table with a column for each of ``ours`` against every other row.

    Args:
        scores: one number for each method, by its name, for a seed.
        seeds: the seeds to run.
        title: of the table.
        measure: what the numbers are.
        ours: the methods that the others are compared with.
        lower_is_better: whether a lower number is the better one.
        digits: decimals to print.
        notes: lines to print below the table; called when all seeds are done.
    """
    torch.set_num_threads(1)  # the matrices are small; threads would wait for one another
    console = Console()
    runs = [scores(seed) for seed in track(seeds, "seeds", console=console, transient=True)]
    values = {method: torch.tensor([run[method] for run in runs], dtype=torch.float64) for method in runs[0]}
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    for column in (measure, *(f"{name}\nis better by" for name in ours)):
        table.add_column(column, justify="right")
    for method, numbers in values.items():
        gains = [(numbers - values[name]) * (1 if lower_is_better else -1) for name in ours]
        cells = [
            "" if name == method else f"{with_error(gain, digits, '+')} {verdict(gain)}"
            for name, gain in zip(ours, gains, strict=True)
        ]
        table.add_row(method, with_error(numbers, digits), *cells)
    console.print(table)
    for note in notes():
        console.print(note, highlight=False)
    console.print(f"Mean ± standard error over {len(runs)} seed(s), differences paired by seed; ", end="")
    console.print("=: within two standard errors.")


def with_error(values: Tensor | np.ndarray, digits: int = 1, sign: str = "") -> str:
    """Mean ± standard error, of the number of values that there are."""
    values = torch.as_tensor(values)
    error = f" ± {standard_error(values):.{digits}f}" if len(values) > 1 else ""
    return f"{float(values.mean()):{sign}.{digits}f}{error}"


def standard_error(values: Tensor | np.ndarray) -> float:
    return float(torch.as_tensor(values).std()) / len(values) ** 0.5


def verdict(gain: Tensor) -> str:
    """One sign, and without favour: a difference counts from two standard errors on."""
    if len(gain) < 2 or abs(float(gain.mean())) <= 2 * standard_error(gain):
        return "="
    return "✓" if gain.mean() > 0 else "✗"
