"""The linear systems of many members at once: what a solver is given, what it returns, and arithmetic by member.

A vector of all members is a matrix with a row for each, the parameters one after another in its columns. Members never
meet in a product: the Hessian of the sum of their losses is block diagonal. Each is to go by the very rules by which
the backend's ``solve`` goes alone: its own step sizes, its own stop, its own state.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hyperopt_implicit.backend import State, Status
from hyperopt_implicit.spectrum import COLD_POWER_ITERATIONS
from hyperopt_implicit.vectors import Params


class MembersOperator(ABC):
    """A of each member, damping included.

    Attributes:
        products: of each member, how often it was multiplied.
        columns: how many columns each parameter has, by name.
    """

    products: list[int]
    columns: dict[str, int]

    @abstractmethod
    def multiply(self, vectors: Tensor, going: Sequence[bool], *, mix: bool = False) -> Tensor:
        """The product of each member, counted for those that are still going; the rows of others mean nothing.

        Args:
            vectors: a row a member.
            going: who still needs it.
            mix: keep the mixed derivative with the same vectors, which is known from the same backward.
        """


@dataclass
class MembersSolution:
    """What a solver found, member by member; see ``Solution``.

    Attributes:
        value: u, a row a member.
        statuses: how the solver ended for each.
        iterations: its terms or iterations.
        residuals: ‖Au − v‖/‖v‖; None where it was not measured.
        states: what the solver wants to be given next time: of vectors, the rows.
    """

    value: Tensor
    statuses: list[Status]
    iterations: list[int]
    residuals: list[float | None]
    states: list[State] = field(default_factory=list)


SolveMembers = Callable[[MembersOperator, Tensor, Sequence[State], Sequence[bool]], MembersSolution]
"""A solver: operator, right-hand sides, the states of the last call, and which members have a system at all.

The right-hand side of a member without one is zero, and what is returned for it is not used."""


def norms(x: Tensor) -> list[float]:
    """‖x‖₂ of each row."""
    found: list[float] = torch.linalg.vector_norm(x, dim=1).tolist()
    return found


def dots(x: Tensor, y: Tensor) -> list[float]:
    """⟨x, y⟩ of each row."""
    found: list[float] = torch.linalg.vecdot(x, y).tolist()
    return found


def weights(numbers: Sequence[float], like: Tensor) -> Tensor:
    """A number a member, as a column that multiplies rows."""
    return torch.tensor(numbers, dtype=torch.float64).to(like.device, like.dtype).unsqueeze(1)


def chosen(which: Sequence[bool], x: Tensor, y: Tensor | float = 0.0) -> Tensor:
    """The rows of x for some members, and those of y, or a number, for the others, whatever stands in x there."""
    if all(which):
        return x
    mask = torch.tensor(which, device=x.device).unsqueeze(1)
    return torch.where(mask, x, torch.as_tensor(y, dtype=x.dtype, device=x.device))


def carried(states: Sequence[State], key: str, vectors: Tensor) -> tuple[list[bool], Tensor]:
    """Who carries a vector of that name, and the vectors; zero for those who do not."""
    held = [isinstance(state.get(key), Tensor) and state[key].shape == vectors.shape[1:] for state in states]
    if not any(held):
        return held, torch.zeros_like(vectors)
    blank = torch.zeros_like(vectors[0])
    return held, torch.stack([state[key] if has else blank for state, has in zip(states, held, strict=True)])


def as_alone(state: State, params: Params) -> State:
    """A member's state as it would be alone: its rows as vectors with the names and shapes of w."""
    sizes = [p.numel() for p in params.values()]
    return {
        key: {name: part.view_as(p) for (name, p), part in zip(params.items(), x.split(sizes), strict=True)}
        if isinstance(x, Tensor) and x.shape == (sum(sizes),)
        else x
        for key, x in state.items()
    }


def largest_eigenvalues(
    operator: MembersOperator, vectors: Tensor, states: Sequence[State], alive: Sequence[bool]
) -> tuple[list[float], list[State]]:
    """The largest absolute eigenvalue of each member, as ``spectrum.largest_eigenvalue`` estimates it alone."""
    count = len(vectors)
    warm, direction = carried(states, "eigenvector", vectors)
    if not all(warm):
        sizes = norms(vectors)
        ripple = torch.cat(
            [torch.cos(torch.arange(n, device=vectors.device).mul(1.7)) for n in operator.columns.values()]
        )
        scale = weights([size / max(vectors.shape[1], 1) ** 0.5 for size in sizes], vectors)
        direction = chosen(warm, direction, vectors + scale * ripple.to(vectors))
    eigenvalues, lost = [0.0] * count, [False] * count
    for iteration in range(COLD_POWER_ITERATIONS):
        going = [
            here and not gone and (iteration == 0 or not known)
            for here, gone, known in zip(alive, lost, warm, strict=True)
        ]
        if not any(going):
            break
        lengths = norms(direction)
        direction = direction * weights(
            [1.0 / x if g and x > 0.0 else 1.0 for x, g in zip(lengths, going, strict=True)], direction
        )
        product = operator.multiply(direction, going)
        sizes = norms(product)
        for i, size in enumerate(sizes):
            if going[i] and not 0.0 < size < math.inf:
                lost[i], going[i] = True, False
            elif going[i]:
                eigenvalues[i] = size
        direction = chosen(going, product, direction)
    lengths = norms(direction)
    direction = direction * weights([1.0 / x if 0.0 < x < math.inf else 1.0 for x in lengths], direction)
    found: list[State] = []
    for i, row in enumerate(direction.unbind(0)):
        if lost[i] or not alive[i]:
            eigenvalues[i] = max(eigenvalues[i], 0.0)
            found.append({})
        else:
            found.append({"eigenvector": row, "largest_eigenvalue": eigenvalues[i]})
    return eigenvalues, found
