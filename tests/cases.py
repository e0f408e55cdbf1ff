"""One row for each backend: under which options it is tested, how accurate it then is, and what it differentiates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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

    @property
    def backend(self) -> hi.Backend:
        """The instance under test."""
        return hi.get_backend(self.name, **self.options)


CASES = [
    Case("cg", 1e-9, "solution", {"tolerance": 1e-12, "max_iterations": 100}),
    Case("exact", 1e-9, "solution"),
    Case("neumann", 1e-8, "solution", {"tolerance": 1e-10, "terms": 5000}),
    Case("unrolled", 1e-8, "trajectory"),
]

INSTALLED = ", ".join(sorted(case.name for case in CASES))
"""As a message lists them."""
