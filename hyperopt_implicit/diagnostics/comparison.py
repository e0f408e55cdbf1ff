"""The outcome of ``compare``: rows, a table, a figure of error against time, and an MLflow run."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperopt_implicit.backend import Status
from hyperopt_implicit.figures import grid
from hyperopt_implicit.problem import BilevelProblem
from hyperopt_implicit.run_record import problem_params, source_of, source_tags
from hyperopt_implicit.tracking import Tracker, Tracking, resolve
from hyperopt_implicit.vectors import Params

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One backend on one problem.

    Attributes:
        name: its name, with the options that were given.
        family: as its card says.
        differentiates: ``"solution"`` or ``"trajectory"``: what it was compared with.
        status: how it ended.
        residual: of the system that it solved, where it did.
        products: Hessian-vector products of a call.
        calls: how often it was called, state carried, until it had settled.
        seconds: median time of a call then.
        peak_bytes: memory held during a call, beyond what was held before.
        gradients: dF/dλ, in float64.
        error: relative to what it approximates; NaN where that is unknown.
        cosine: with it.
        minimum_error: relative to the gradient at a minimum of L; NaN where none was found.
        minimum_cosine: with it.
    """

    name: str
    family: str
    differentiates: str
    status: Status
    residual: float | None
    products: int
    calls: int
    seconds: float
    peak_bytes: int
    gradients: Params = field(repr=False)
    error: float = math.nan
    cosine: float = math.nan
    minimum_error: float = math.nan
    minimum_cosine: float = math.nan


@dataclass
class Comparison:
    """The outcome of :func:`hyperopt_implicit.compare`; ``print`` shows it as a table.

    Attributes:
        rows: one for each backend, in the order in which they were measured.
        left_out: backends that cannot handle the problem, and why.
        gradient_seconds: time of one forward and backward of L, the unit of the column g.
        minimum_found: whether the columns against a minimum of L are filled.
        run_id: of the MLflow run, where there is one.
        run_link: where to look at it.
    """

    rows: list[Row]
    left_out: dict[str, str]
    gradient_seconds: float
    minimum_found: bool
    run_id: str | None = None
    run_link: str | None = None

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        console = Console(file=text, width=120, color_system=None)
        console.print(self.table())
        console.print(self.legend(), soft_wrap=True)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    def table(self) -> Table:
        """For rich, sorted by family and error."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        columns = ["backend", "against", "error", "cosine", "ms", "g", "products", "MB", "calls", "status"]
        if self.minimum_found:
            columns[4:4] = ["error*", "cosine*"]
        for column in columns:
            table.add_column(column, justify="left" if column in ("backend", "against", "status") else "right")
        for row in self.sorted_rows():
            at_minimum = [f"{row.minimum_error:.2g}", f"{row.minimum_cosine:.3f}"] if self.minimum_found else []
            table.add_row(
                escape(row.name),
                "theorem" if row.differentiates == "solution" else "training",
                _number(row.error, ".2g"),
                _number(row.cosine, ".3f"),
                *at_minimum,
                f"{1e3 * row.seconds:.3g}",
                f"{row.seconds / self.gradient_seconds:.1f}",
                str(row.products),
                f"{row.peak_bytes / 2**20:.2g}",
                str(row.calls),
                f"[red]{row.status.value}[/red]" if row.status.failed else row.status.value,
            )
        return table

    def legend(self) -> str:
        """What the columns mean, and what was left out."""
        lines = [
            "against: the theorem solved to rounding at the present weights, or all training steps differentiated; "
            f"g: one forward and backward of L, {1e3 * self.gradient_seconds:.3g} ms; calls: until state settled."
        ]
        if self.minimum_found:
            lines.append("*: against the gradient at a minimum of L.")
        if any(math.isnan(row.error) for row in self.rows):
            lines.append("–: what it would be compared with could not be computed.")
        names_by_reason: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            names_by_reason.setdefault(reason, []).append(name)
        lines += [f"left out: {', '.join(names)}: {reason}" for reason, names in names_by_reason.items()]
        return "\n".join(lines)

    def sorted_rows(self) -> list[Row]:
        """By what they are compared with, and then by error."""
        return sorted(
            self.rows, key=lambda row: (row.differentiates, row.error if math.isfinite(row.error) else math.inf)
        )

    def figure(self) -> Figure:
        """Error against time, both on logarithmic axes; up and to the right is worse in both."""
        from matplotlib import colormaps

        figure, (ax,) = grid(1)
        figure.set_size_inches(8.5, 5.0)
        known = [row for row in self.sorted_rows() if math.isfinite(row.error)]
        for i, row in enumerate(known):
            ax.scatter(
                1e3 * row.seconds,
                max(row.error, 1e-16),
                marker="o" if row.differentiates == "solution" else "s",
                color=colormaps["tab20"](i % 20),
                edgecolors="black",
                linewidths=0.5,
                s=60,
                label=row.name,
            )
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("milliseconds for a hypergradient")
        ax.set_ylabel("relative error")
        ax.set_title("round: against the theorem; square: against all training steps", fontsize="medium")
        ax.grid(alpha=0.3)
        if known:
            figure.legend(loc="outside right upper", fontsize="small")
        return figure

    def write_csv(self, path: Path) -> None:
        """The rows, gradients left out."""
        names = [name for name in Row.__dataclass_fields__ if name != "gradients"]
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(names)
            writer.writerows([getattr(row, name) for name in names] for row in self.rows)

    def track(self, tracking: Tracking | bool, problem: BilevelProblem, options: Mapping[str, Any]) -> None:
        """Log the comparison as an MLflow run: metrics by backend, the table as text and as CSV, and the figure."""
        config = resolve(tracking)
        source = source_of(problem.loss_source())
        tags = {**source_tags(source), "kind": "comparison", "mlflow.note.content": f"```\n{self}\n```"}
        tracker = Tracker(config, {**problem_params(problem), **options}, tags)
        for row in self.rows:
            numbers = {
                "error": row.error,
                "cosine": row.cosine,
                "minimum_error": row.minimum_error,
                "seconds": row.seconds,
                "products": float(row.products),
                "peak_megabytes": row.peak_bytes / 2**20,
            }
            tracker.log_metrics(
                {f"{row.name}/{key}": value for key, value in numbers.items() if math.isfinite(value)}, 0
            )

        def files(folder: Path) -> list[tuple[Path, str | None]]:
            self.figure().savefig(folder / "error_against_time.png", dpi=120)
            self.write_csv(folder / "comparison.csv")
            (folder / "comparison.txt").write_text(str(self))
            return [(folder / name, None) for name in ("error_against_time.png", "comparison.csv", "comparison.txt")]

        tracker.log_files(files)
        tracker.end()
        self.run_id, self.run_link = tracker.run_id, tracker.run_link


def _number(value: float, how: str) -> str:
    return format(value, how) if math.isfinite(value) else "–"
