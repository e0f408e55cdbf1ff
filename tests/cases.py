"""One row for each backend: under which options it is tested, how accurate it then is, and what it differentiates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.utils import _pytree as pytree

import hyperopt_implicit as hi


@dataclass(frozen=True)
class Case:
    """A backend as the conformance suite is run on it."""

    name: str
    accuracy: float
    differentiates: str
    options: dict[str, Any] = field(default_factory=dict)
    cosine: float | None = None
    calls: int = 1
    attach_data: bool = False

    @property
    def backend(self) -> hi.Backend:
        """The instance under test."""
        return hi.get_backend(self.name, **self.options)

    def prepare(self, problem: hi.BilevelProblem, training_batches: Sequence[Any], validation_batch: Any) -> None:
        """Makes the batches the problem's data, each once, for a backend that has to find them there."""
        if self.attach_data:
            each_once = {tuple(map(id, pytree.tree_leaves(batch))): batch for batch in training_batches}
            problem.training_data, problem.validation_data = list(each_once.values()), [validation_batch]


CASES = [
    Case("cg", 1e-9, "solution", {"tolerance": 1e-12, "max_iterations": 100}),
    Case("exact", 1e-9, "solution"),
    Case("neumann", 1e-8, "solution", {"tolerance": 1e-10, "terms": 5000}),
    Case("unrolled", 1e-8, "trajectory"),
    Case("evolution", 1e-6, "trajectory", {"sigma": 1e-4, "pairs": 32}),
    Case("forward", 1e-8, "trajectory"),
    Case("forward_gradient", 1e-8, "trajectory", {"directions": 32}),
    Case("finite_difference", 1e-6, "solution", cosine=0.98),
    Case("sama", 1e-6, "solution", cosine=0.98),
    Case("f2sa", 1e-3, "solution", {"penalty": 1e5, "steps": 500, "step_size": "auto", "tolerance": 1e-7}),
    Case("bome", 1e-6, "solution", {"steps": 20, "step_size": 0.02}, cosine=0.98, calls=10),
    Case("minres", 1e-9, "solution", {"tolerance": 1e-12, "max_iterations": 100}),
    Case("nystrom", 1e-8, "solution", {"rank": 64, "damping": 1e-13}),
    Case("fixed_point", 1e-8, "solution", {"tolerance": 1e-11, "iterations": 20000}),
    Case("identity", 1.0, "solution", {"step_size": 0.1, "measure_residual": True}, cosine=0.99),
    Case("soba", 1e-5, "solution", calls=600),
    Case("saba", 1e-5, "solution", calls=600, attach_data=True),
    Case("heavy_ball", 1e-8, "solution", {"tolerance": 1e-9, "max_iterations": 200}),
    Case("auto", 1e-8, "solution", {"tolerance": 1e-9}),
    Case("amigo", 1e-8, "solution", {"steps": 5000}),
    Case("stocbio", 1e-8, "solution", {"terms": 5000}),
]

INSTALLED = ", ".join(sorted(case.name for case in CASES))
"""As a message lists them."""
