"""A copy of all that inner training changes; who makes one, and puts it back, is ``BilevelProblem``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hyperopt_implicit.vectors import Params


@dataclass
class InnerState:
    """A copy of all that inner training changes: parameters, buffers, and the optimizer's state by parameter."""

    params: Params
    buffers: Params
    optimizer: dict[str, dict[str, Any]]
    scaling: Tensor | None = None
    """Of the loss, where training in float16 has arrived; what holds it is not part of a problem."""


def copied(value: Any) -> Any:
    """An entry of an optimizer's state with memory of its own."""
    return value.detach().clone() if isinstance(value, Tensor) else value
