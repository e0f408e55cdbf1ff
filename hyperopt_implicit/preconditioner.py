"""A preconditioner for the linear system that the inner optimizer has already paid for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hyperopt_implicit.vectors import Params

if TYPE_CHECKING:
    from hyperopt_implicit.problem import BilevelProblem

FLOOR = 1e-2
"""The least entry, as a share of the root mean square: weights that never had a gradient have a second moment of zero."""


def adam_preconditioner(problem: BilevelProblem) -> Params | None:
    """The square root of Adam's second moment, scaled to a mean square of 1; None before the optimizer's first step.

    Near a minimum, gradients of samples have a second moment that goes with the curvature, so that its root evens out
    the eigenvalues of H.
    """
    moments: Params = {}
    for name, p in problem.params.items():
        moment = problem.optimizer.state.get(p, {}).get("exp_avg_sq")
        if moment is None:
            return None
        moments[name] = moment.detach()
    mean = sum(float(m.sum()) for m in moments.values()) / sum(m.numel() for m in moments.values())
    if not 0.0 < mean < float("inf"):
        return None
    return {name: (moment / mean).sqrt().clamp_min(FLOOR) for name, moment in moments.items()}


def keeps_second_moments(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer is one of Adam's kind."""
    return isinstance(
        optimizer, torch.optim.Adam | torch.optim.AdamW | torch.optim.NAdam | torch.optim.RAdam
    )
