"""What a check measured, and how it is shown: numbers, a table, a verdict in a sentence."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from hyperopt_implicit.backend import Backend, Hypergradient
from hyperopt_implicit.diagnostics.truth import Minimum, Slope, along, difference
from hyperopt_implicit.vectors import Params, cosine, norm


@dataclass
class Measurements:
    """What was measured; all gradients are dF/dλ by name, in unconstrained values.

    Attributes:
        backend: the backend that was checked.
        result: its hypergradient at the present weights, in the problem's own precision.
        calls: how often it was called, with the state carried, for that.
        in_float64: the same in float64.
        first: what it gave at its first call, without state, in float64.
        reproducible: whether it gave that twice.
        changed: what it changed of the problem, which must be nothing.
        direct: ∂F/∂λ.
        validation_gradient_norm: ‖∂F/∂w‖.
        training_gradient_norm: ‖∂L/∂w‖ at the present weights.
        spread: root mean square distance of the hypergradients from single batches to that from all; None for one.
        parameters: the number of entries of w.
        hyperparameters: the number of entries of λ.
        batches: how many training and validation batches there were.
        notes: what could not be measured as planned.
        theorem: the implicit function theorem, solved at the present weights; None for a trajectory.
        target: what the backend approximates there: the theorem with its damping, or all training steps differentiated.
        minimum: how far the minimisation of L came; None for a trajectory.
        at_minimum: the theorem at that minimum.
        slopes: finite differences through minima, or through training.
        true_residual: ‖Au − v‖/‖v‖ as worked out anew, and as reported.
        solved_by: the method that solved: the backend, or the one that it chose.
    """

    backend: Backend
    result: Hypergradient
    calls: int
    in_float64: Params
    first: Params
    reproducible: bool
    changed: list[str]
    direct: Params
    validation_gradient_norm: float
    training_gradient_norm: float
    spread: float | None
    parameters: int
    hyperparameters: int
    batches: tuple[int, int]
    notes: list[str]
    theorem: Params | None = None
    target: Params | None = None
    minimum: Minimum | None = None
    at_minimum: Params | None = None
    slopes: list[Slope] = field(default_factory=list)
    true_residual: tuple[float, float | None] | None = None
    solved_by: Backend | None = None

    @property
    def truth(self) -> Params | None:
        """The best that is known of the whole gradient; None where only its slopes are known."""
        return self.at_minimum if self.at_minimum is not None else self.target

    @property
    def rounding(self) -> float:
        """What F, in the precision of the result, cannot tell from zero: shorter gradients are all the same."""
        eps = max(torch.finfo(g.dtype).eps for g in self.result.gradients.values())
        size = abs(self.result.validation_loss)
        return eps * size if math.isfinite(size) else 0.0

    @property
    def size(self) -> float:
        """The norm of the truth, or of the rounding of F where that is longer: what errors are relative to."""
        slopes = math.hypot(*(each.value for each in self.slopes))
        return max((norm(self.truth) if self.truth is not None else 0.0) or slopes, self.rounding) or 1.0

    @property
    def formula_error(self) -> float | None:
        """How far the slopes by differentiation are from those by finite differences, relative to the latter."""
        if self.truth is None or not self.slopes:
            return None
        return self._off(self.truth)

    @property
    def uncertainty(self) -> float | None:
        """How far the finite differences can be trusted, relative to them."""
        size = math.hypot(*(each.value for each in self.slopes))
        return math.hypot(*(each.uncertainty for each in self.slopes)) / size if size > 0.0 else None

    @property
    def finite_differences_hold(self) -> bool:
        """Whether they say something: where F jumps, or a minimum is not reached, quotients differ from each other."""
        return self.uncertainty is not None and self.uncertainty < 0.05

    @property
    def relative_error(self) -> float:
        """‖hypergradient − truth‖/‖truth‖, along the slopes where finite differences contradict differentiation.

        NaN where there is nothing to compare with.
        """
        if self._trusted is not None:
            return difference(self.result.gradients, self._trusted) / self.size
        return self._off(self.result.gradients)

    @property
    def cosine(self) -> float:
        """Between the hypergradient and the truth, likewise."""
        mine = self.result.gradients
        if self._trusted is not None:
            return cosine(mine, self._trusted)
        if not self.slopes:
            return math.nan
        slopes = [(along(mine, each), each.value) for each in self.slopes]
        ours, theirs = torch.tensor(slopes, dtype=torch.float64).T
        return cosine({"": ours}, {"": theirs})

    @property
    def _trusted(self) -> Params | None:
        """The truth, unless finite differences that can be relied on contradict it."""
        formula = self.formula_error
        contradicted = formula is not None and self.finite_differences_hold and formula > 0.01
        return None if contradicted else self.truth

    def _off(self, gradients: Params) -> float:
        """How far a gradient is from the slopes, relative to them; NaN where there are none."""
        if not self.slopes:
            return math.nan
        size = max(math.hypot(*(each.value for each in self.slopes)), self.rounding)
        off = math.hypot(*(along(gradients, each) - each.value for each in self.slopes))
        return off / size if size > 0.0 else off

    @property
    def parts(self) -> dict[str, float]:
        """What the error is made of, each part relative to the truth; parts can cancel, so they need not add up."""
        parts: dict[str, float] = {}
        if self.at_minimum is not None and self.theorem is not None:
            parts["inner problem not solved"] = difference(self.theorem, self.at_minimum) / self.size
        if self.theorem is not None and self.target is not self.theorem and self.target is not None:
            parts["damping and curvature"] = difference(self.target, self.theorem) / self.size
        if self.target is not None:
            parts["solver"] = difference(self.in_float64, self.target) / self.size
        if self.spread is not None:
            parts["one batch for all"] = self.spread / self.size
        if any(g.dtype is not self.in_float64[name].dtype for name, g in self.result.gradients.items()):
            parts["precision"] = difference(self.result.gradients, self.in_float64) / self.size
        if self.formula_error is not None:
            parts["the losses' own derivatives"] = self.formula_error
        return parts


@dataclass
class CheckReport:
    """The outcome of :func:`hyperopt_implicit.check`; ``print`` shows it as a table with a verdict.

    Attributes:
        measured: all that was measured.
        tolerance: the relative error that was allowed.
        ok: whether the hypergradient is right within it.
        verdict: one sentence.
        advice: what to change; empty where nothing needs to be.
    """

    measured: Measurements
    tolerance: float
    ok: bool
    verdict: str
    advice: str

    @property
    def relative_error(self) -> float:
        """‖hypergradient − truth‖/‖truth‖."""
        return self.measured.relative_error

    @property
    def cosine(self) -> float:
        """Cosine of the angle between hypergradient and truth."""
        return self.measured.cosine

    @property
    def parts(self) -> dict[str, float]:
        """What the error is made of, by cause, relative to the truth."""
        return self.measured.parts

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=110, color_system=None).print(*self.renderables(), sep="\n")
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    def renderables(self) -> Sequence[object]:
        """The report for rich: a heading, two tables, notes and the verdict."""
        from rich.markup import escape
        from rich.table import Table

        found = self.measured
        heading = (
            f"{type(found.backend).__name__} on {found.parameters:,} parameters and {found.hyperparameters:,} "
            f"hyperparameters, {found.batches[0]} training and {found.batches[1]} validation batches"
        )
        errors = Table(box=None, pad_edge=False)
        for column, justify in (("", "left"), ("relative error", "right"), ("", "left")):
            errors.add_column(column, justify=justify)  # type: ignore[arg-type]
        errors.add_row("hypergradient", f"{found.relative_error:.2g}", escape(self._what_it_is_compared_with()))
        for name, value in found.parts.items():
            errors.add_row(f"  {name}", f"{value:.2g}", escape(self._behind(name)))
        slopes = Table(box=None, pad_edge=False)
        for column in ("along", "finite differences", "±", "step", "hypergradient"):
            slopes.add_column(column, justify="left" if column == "along" else "right")
        for each in found.slopes:
            ours = along(found.result.gradients, each)
            slopes.add_row(
                escape(each.name),
                f"{each.value:.6g}",
                f"{each.uncertainty:.1g}",
                f"{each.best_step:.0e}",
                f"{ours:.6g}",
            )
        shown: list[object] = [escape(heading), "", errors]
        if found.slopes:
            shown += ["", slopes]
        if found.notes:
            shown += ["", *(escape(note) for note in found.notes)]
        mark = "[green]right[/green]" if self.ok else "[red]not right[/red]"
        return [*shown, "", f"{mark}: {escape(self.verdict)}", *([escape(self.advice)] if self.advice else [])]

    def _what_it_is_compared_with(self) -> str:
        found = self.measured
        if found.slopes:
            through = "all training steps" if found.minimum is None else "minima of L"
            return f"cosine {found.cosine:.4f}; finite differences through {through}"
        return f"cosine {found.cosine:.4f}; the theorem at the present weights"

    def _behind(self, part: str) -> str:
        found, result = self.measured, self.measured.result
        if part == "inner problem not solved":
            return (
                f"‖∂L/∂w‖ = {found.training_gradient_norm:.2g}, beside ‖∂F/∂w‖ = {found.validation_gradient_norm:.2g}"
            )
        if part == "solver":
            residual = "" if result.residual is None else f", residual {result.residual:.2g}"
            calls = "" if found.calls == 1 else f", {found.calls} calls"
            return f"{result.status.value} after {result.hvps} products{residual}{calls}"
        if part == "one batch for all":
            return "spread of the hypergradients from single batches"
        if part == "precision":
            dtypes = {str(g.dtype).removeprefix("torch.") for g in result.gradients.values()}
            return f"{', '.join(sorted(dtypes))} against float64"
        if part == "damping and curvature":
            method = found.solved_by
            return f"damping {getattr(method, 'damping', 0):.3g}, curvature {getattr(method, 'curvature', '')}"
        return "differentiation against finite differences"
