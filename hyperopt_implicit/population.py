"""``optimize_population``: many runs of one kind of problem at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hyperopt_implicit.backend import Spec
from hyperopt_implicit.errors import HypergradientError, LossError
from hyperopt_implicit.history import Callback, Result
from hyperopt_implicit.optimize import optimize
from hyperopt_implicit.problem import BilevelProblem
from hyperopt_implicit.tracking import Tracking


@dataclass
class Population:
    """What came of it."""

    outcomes: list[Result | Exception]
    groups: list[list[int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    speedup: float | None = None


def optimize_population(
    problems: Sequence[BilevelProblem],
    backend: Spec = "neumann",
    *,
    seeds: Sequence[int | None] | None = None,
    callbacks: Sequence[Iterable[Callback]] = (),
    tracking: Sequence[Tracking | bool] | Tracking | bool = False,
    knobs: Sequence[Mapping[str, Any]] = (),
    vectorise: Literal["auto", "always"] = "always",
    compile: bool = False,
    **options: Any,
) -> Population:
    """Each by itself, for now."""
    outcomes: list[Result | Exception] = []
    for i, problem in enumerate(problems):
        try:
            outcomes.append(
                optimize(
                    problem,
                    backend,
                    seed=None if seeds is None else seeds[i],
                    callbacks=callbacks[i] if callbacks else (),
                    tracking=tracking[i] if isinstance(tracking, Sequence) else tracking,
                    progress=False,
                    **options,
                )
            )
        except (LossError, HypergradientError) as error:
            outcomes.append(error)
    return Population(outcomes, groups=[[i] for i in range(len(problems))])
