"""What is known of an operator's eigenvalues: estimated by a few products, and followed from call to call."""

from __future__ import annotations

import torch

from hyperopt_implicit.backend import State
from hyperopt_implicit.operators import LinearOperator
from hyperopt_implicit.vectors import Params, clone, norm, same_shapes, scale_

COLD_POWER_ITERATIONS = 8


def largest_eigenvalue(operator: LinearOperator, vector: Params, state: State) -> tuple[float, State]:
    """The largest absolute eigenvalue by power iteration, from where the last call stopped; ‖Hx‖ never exceeds it."""
    last: Params = state.get("eigenvector", {})
    warm = same_shapes(last, vector)
    direction = last
    if not warm:
        # the right-hand side alone could be orthogonal to the leading eigenvector; a fixed ripple makes that improbable
        direction = clone(vector)
        ripple = norm(vector) / max(sum(x.numel() for x in vector.values()), 1) ** 0.5
        for tensor in direction.values():
            tensor.add_(
                ripple
                * torch.cos(torch.arange(tensor.numel(), device=tensor.device).mul(1.7)).view_as(tensor).to(tensor)
            )
    eigenvalue = 0.0
    for _ in range(1 if warm else COLD_POWER_ITERATIONS):
        direction = scale_(clone(direction), 1.0 / norm(direction))
        product = operator @ direction
        size = norm(product)
        if not 0.0 < size < float("inf"):
            return max(eigenvalue, 0.0), {}
        eigenvalue, direction = size, product
    return eigenvalue, {
        "eigenvector": scale_(clone(direction), 1.0 / norm(direction)),
        "largest_eigenvalue": eigenvalue,
    }
