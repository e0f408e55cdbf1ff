"""``compare``: every backend that can handle a problem, on that problem: how wrong, how long, how much memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hyperopt_implicit.argument_checks import check_list
from hyperopt_implicit.backend import Backend, Spec, get_backend, list_backends, options_of
from hyperopt_implicit.diagnostics.batches import batches_of, check_count, check_seconds, warmed_up
from hyperopt_implicit.diagnostics.comparison import Comparison, Row
from hyperopt_implicit.diagnostics.measuring import peak_bytes, seconds
from hyperopt_implicit.diagnostics.truth import difference, minimise, theorem, unrolled
from hyperopt_implicit.diagnostics.twin import Twin, float64_twin
from hyperopt_implicit.errors import BackendError, HyperoptError, ProblemError
from hyperopt_implicit.problem import BilevelProblem
from hyperopt_implicit.tracking import Tracking, resolve
from hyperopt_implicit.vectors import Params, cosine, norm


def compare(
    problem: BilevelProblem,
    backends: Sequence[Spec] | None = None,
    *,
    training_batches: Sequence[Any] | None = None,
    validation_batch: Any = None,
    inner_steps: int = 10,
    hessian_batches: int = 1,
    warmup_steps: int = 0,
    calls: int = 50,
    repeats: int = 3,
    seconds_to_minimise: float = 20.0,
    seed: int = 0,
    tracking: Tracking | bool = True,
) -> Comparison:
    """Measure backends on a problem, at its present weights: error, cosine, time, products and memory.

    Each backend is compared with what it approximates, computed in float64: the theorem solved to rounding for one that
    differentiates the solution, all training steps differentiated for one that differentiates the trajectory. Where a
    minimum of L is found in time, each is compared with the gradient there as well, which is what both are after. A
    backend that carries state is called until its number has settled, and timed like that. Everything happens on
    copies.

    Args:
        problem: the bilevel problem, with the model at the weights at which to compare.
        backends: names, dicts of names and options, or instances; by default all that are installed.
        training_batches: over which an implicit backend averages L, or through which a trajectory steps; by default the
            first ``hessian_batches``, or ``inner_steps``, of the problem's data.
        validation_batch: F; by default the first of the problem's data.
        inner_steps: length of a trajectory.
        hessian_batches: number of batches for the others.
        warmup_steps: plain training steps on the copy before anything is measured.
        calls: how often a backend with state is called, at most, until it has settled.
        repeats: timed calls, of which the median counts.
        seconds_to_minimise: after which the search for a minimum of L is given up.
        seed: of random layers.
        tracking: an MLflow run with the default settings (True), with others (a :class:`Tracking`), or none (False).

    Returns:
        One row for each backend, and why others were left out; ``print`` shows a table.

    Raises:
        HyperoptError: an option out of its range, or no backend at all can handle the problem.

    Example:
        >>> import torch, hyperopt_implicit as hi
        >>> @hi.hyperparameter("decay", init=0.5)
        ... def training_loss(model, batch, *, decay):
        ...     return ((model(batch) - 1) ** 2).mean() + decay * model.weight.square().sum()
        >>> batch = torch.tensor([[1.0], [2.0]])
        >>> problem = hi.BilevelProblem(
        ...     torch.nn.Linear(1, 1), training_loss, lambda model, batch: (model(batch) ** 2).mean(),
        ...     training_data=[batch], validation_data=[batch],
        ...     optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
        >>> found = hi.compare(problem, ["cg", "unrolled"], warmup_steps=100, tracking=False)
        >>> [row.name for row in found.rows]
        ['cg', 'unrolled']
    """
    counts = {"inner_steps": inner_steps, "hessian_batches": hessian_batches, "calls": calls, "repeats": repeats}
    for name, value in counts.items():
        check_count(name, value, 1)
    check_count("warmup_steps", warmup_steps, 0)
    check_seconds("seconds_to_minimise", seconds_to_minimise)
    resolve(tracking)  # refused now, rather than when all is done
    with warmed_up(problem, warmup_steps, seed) as start:
        validation = batches_of(start, "validation_data", None if validation_batch is None else [validation_batch], 1)
        settings = {
            through: _Setting(start, batches_of(start, "training_data", training_batches, count), validation, seed)
            for through, count in ((False, hessian_batches), (True, inner_steps))
        }
        rows, left_out = [], {}
        given = [backends] if isinstance(backends, str | Mapping | Backend) else backends
        if given is not None:
            check_list("backends", given, "backends")
        for spec in list_backends() if given is None else given:
            label, named = _labelled(spec)
            chosen = named.for_problem(start)
            setting = settings[chosen.differentiates == "trajectory"]
            try:
                chosen.check(start)
                chosen.check_steps(len(setting.twin.training))
                rows.append(setting.row(label, chosen, calls, repeats))
            except (BackendError, ProblemError) as error:
                if backends is not None:
                    raise
                left_out[label] = str(error)
        if not rows:
            raise HyperoptError(
                "no installed backend can handle this problem: "
                + " ".join(f"{name}: {reason}" for name, reason in left_out.items())
            )
        truth = settings[False].at_minimum(seconds_to_minimise)
    if truth is not None:
        for i, row in enumerate(rows):
            off, along = _distances(row.gradients, truth)
            rows[i] = dataclasses.replace(row, minimum_error=off, minimum_cosine=along)
    comparison = Comparison(
        rows, left_out, gradient_seconds=settings[False].gradient_seconds, minimum_found=truth is not None
    )
    comparison.track(tracking, start, {**counts, "warmup_steps": warmup_steps, "seed": seed})
    return comparison


class _Setting:
    """The copies on which all backends of a kind are measured, and what they are compared with."""

    def __init__(self, problem: BilevelProblem, training: list[Any], validation: list[Any], seed: int) -> None:
        self.as_given = Twin(problem, training, validation, seed=seed)
        self.twin = float64_twin(problem, training, validation, seed, [])
        self._targets: dict[str, Params | None] = {}

    @property
    def gradient_seconds(self) -> float:
        """One forward and backward of L."""
        return seconds(self.as_given.gradient, 3)

    def row(self, label: str, backend: Backend, calls: int, repeats: int) -> Row:
        result, done = self.as_given.hypergradient(backend, calls=calls)
        given, twin = self.as_given, self.as_given.problem

        def call() -> object:
            with given.seeded():
                return backend.hypergradient(twin, given.training, given.validation, result.state)

        target = self._target(backend.differentiates)
        error, along = (math.nan, math.nan) if target is None else _distances(result.gradients, target)
        return Row(
            name=label,
            family="other" if backend.card is None else backend.card.family,
            differentiates=backend.differentiates,
            status=result.status,
            residual=result.residual,
            products=result.hvps,
            calls=done,
            seconds=seconds(call, repeats),
            peak_bytes=peak_bytes(call, twin.device),
            gradients={name: g.double() for name, g in result.gradients.items()},
            error=error,
            cosine=along,
        )

    def _target(self, kind: str) -> Params | None:
        if kind not in self._targets:
            self._targets[kind] = self._solved(kind)
        return self._targets[kind]

    def _solved(self, kind: str) -> Params | None:
        if not self.twin.is_twice_differentiable():
            return None
        if kind == "solution":
            return theorem(self.twin).gradients
        try:
            return unrolled(self.twin).gradients
        except (BackendError, ProblemError):
            return None

    def at_minimum(self, limit: float) -> Params | None:
        """The gradient where L is at a minimum, if there is one within reach and a hyperparameter that acts on it."""
        if self.twin.problem.hyperparameters.names("optimizer") or not self.twin.is_twice_differentiable():
            return None
        return theorem(self.twin).gradients if minimise(self.twin, seconds=limit).solved else None


def _distances(gradients: Params, truth: Params) -> tuple[float, float]:
    """Relative error, and cosine."""
    return difference(gradients, truth) / (norm(truth) or 1.0), cosine(gradients, truth)


def _labelled(spec: Spec) -> tuple[str, Backend]:
    chosen = get_backend(spec)
    if isinstance(spec, str):
        return spec, chosen
    if isinstance(spec, Mapping):
        options = ", ".join(f"{name}={value}" for name, value in spec.items() if name != "name")
        return f"{spec['name']}({options})" if options else str(spec["name"]), chosen
    changed = [o for o in options_of(type(spec)) if getattr(spec, o.name) != o.default]
    options = ", ".join(f"{o.name}={getattr(spec, o.name)}" for o in changed)
    return f"{type(spec).__name__}({options})", chosen
