"""The implicit function theorem for many members at once.

The losses of all members are summed: the Hessian of the sum is block diagonal, so that one product with the vectors of
all members holds the product of each. What a single run does is in ``operators.py`` and ``implicit.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hyperopt_implicit.backend import Hypergradient, State, Status
from hyperopt_implicit.guarded_step import honest
from hyperopt_implicit.members import Members, column
from hyperopt_implicit.members_batches import Part
from hyperopt_implicit.members_solver import MembersOperator, MembersSolution, SolveMembers, chosen, norms
from hyperopt_implicit.operators import LossHessian, gradients, twice_differentiable
from hyperopt_implicit.vectors import Params


class MembersHessian(LossHessian):
    """The Hessians of all members, of the training loss averaged over batches.

    Args:
        members: whose.
        batches: at least one, of each member.

    Attributes:
        losses: L of each member.
    """

    def __init__(self, members: Members, batches: Sequence[Sequence[Part]]) -> None:
        with torch.enable_grad(), twice_differentiable(members.problems[0]):
            found = [members.training_losses(members.params, members.hparams, parts) for parts in batches]
            losses = found[0] if len(found) == 1 else torch.stack(found).mean(0)
            super().__init__(losses.sum(), members.params, members.hparams)
        self.losses = losses.detach()
        self._hold_decays(members)

    def _hold_decays(self, members: Members) -> None:
        """The decay of each member and parameter, as rows, where there is any."""
        self._shapes = members.params
        self._decay: Tensor | None = None
        decays = [problem.weight_decays for problem in members.problems]
        if any(decays):
            columns = {
                name: column([each.get(name, 0.0) for each in decays], p).expand_as(p)
                for name, p in members.params.items()
            }
            self._decay = matrix(columns)

    def multiply_rows(self, vectors: Tensor) -> Tensor:
        """H·vector of each member, a row each."""
        product = self @ rows_as(vectors, self._shapes)
        return self._decayed_rows(matrix(product), vectors)

    def multiply_and_mix_rows(self, vectors: Tensor) -> tuple[Tensor, Params]:
        """The same, and (∂²L/∂λ∂w)·vector."""
        vector = rows_as(vectors, self._shapes)
        product = self.multiply_and_mix(vector)
        return self._decayed_rows(matrix(product), vectors), self.mixed(vector)

    def mixed_rows(self, vectors: Tensor) -> Params:
        """(∂²L/∂λ∂w)·vector."""
        return self.mixed(rows_as(vectors, self._shapes))

    def _decayed_rows(self, product: Tensor, vectors: Tensor) -> Tensor:
        return product if self._decay is None else torch.addcmul(product, self._decay, vectors)


class CurvatureOfMembers(MembersOperator):
    """A of each member: its Hessian and the damping.

    Args:
        hessian: of all members.
        params: w of all members.
        damping: δ.
    """

    def __init__(self, hessian: MembersHessian, params: Params, damping: float) -> None:
        self._hessian, self._damping = hessian, damping
        self.columns = {name: p[0].numel() for name, p in params.items()}
        self.products = [0] * len(next(iter(params.values())))
        self._mixed: tuple[Tensor, Params] | None = None

    def multiply(self, vectors: Tensor, going: Sequence[bool], *, mix: bool = False) -> Tensor:
        self.products = [count + g for count, g in zip(self.products, going, strict=True)]
        if mix:
            product, mixed = self._hessian.multiply_and_mix_rows(vectors)
            self._mixed = vectors, mixed
        else:
            product = self._hessian.multiply_rows(vectors)
        return product.add(vectors, alpha=self._damping) if self._damping else product

    def mixed(self, vectors: Tensor) -> Params:
        """(∂²L/∂λ∂w)·u of each member."""
        if self._mixed is not None and self._mixed[0] is vectors:
            return self._mixed[1]
        return self._hessian.mixed_rows(vectors)


def rows_as(vectors: Tensor, like: Params) -> Params:
    """Rows as parameters; of the same memory."""
    parts = vectors.split([p[0].numel() for p in like.values()], dim=1)
    return {name: part.view(p.shape) for (name, p), part in zip(like.items(), parts, strict=True)}


def matrix(vector: Params) -> Tensor:
    """A row a member; memory of its own."""
    parts = [x.flatten(1) if x.dim() > 1 else x.unsqueeze(1) for x in vector.values()]
    return torch.cat(parts, dim=1)


class Compiled(Protocol):
    """What ``members_compiled.py`` offers; None where a kind of batch is not compiled."""

    def validation(self, parts: Sequence[Part]) -> tuple[Tensor, Tensor, Params] | None:
        """F of each member, ∂F/∂w as rows, and ∂F/∂λ."""

    def hessian(self, batches: Sequence[Sequence[Part]]) -> MembersHessian | None:
        """The Hessians of all members."""


@dataclass
class Hypergradients:
    """dF/dλ of all members.

    Attributes:
        gradients: by name, with a leading axis over the members.
        sizes: the norm of each member's.
        results: of each member.
    """

    gradients: Params
    sizes: list[float]
    results: list[Hypergradient]


def hypergradients(
    members: Members,
    solve: SolveMembers,
    damping: float,
    training: Sequence[Sequence[Part]],
    validation: Sequence[Part],
    states: Sequence[State],
    compiled: Compiled | None = None,
) -> Hypergradients:
    """dF/dλ of each member at its present weights, as ``ImplicitBackend.hypergradient`` gives it alone.

    Args:
        members: whose.
        solve: the backend's solver.
        damping: δ.
        training: the batches over which L is averaged.
        validation: those of F.
        states: what the backend carries for each member.
        compiled: compiled forms of both losses, where there are.
    """
    found = compiled.validation(validation) if compiled is not None else None
    losses, vectors, direct = _validation(members, validation) if found is None else found
    with torch.no_grad():
        starts = norms(vectors)
        alive = [math.isfinite(size) and size > 0.0 for size in starts]
        vectors = chosen(alive, vectors)
    hessian = (compiled.hessian(training) if compiled is not None else None) or MembersHessian(members, training)
    operator = CurvatureOfMembers(hessian, members.params, damping)
    with torch.no_grad():
        if any(alive):
            solution = solve(operator, vectors, states, alive)
            mixed = operator.mixed(solution.value)
            total = {name: direct[name] - _of(alive, mixed[name]) for name in direct}
        else:
            blank = len(members)
            solution = MembersSolution(vectors, [Status.CONVERGED] * blank, [0] * blank, [0.0] * blank, list(states))
            total = direct
        sizes = norms(matrix(total))
        numbers = torch.stack((losses, hessian.losses)).tolist()
    rows = {name: x.unbind(0) for name, x in total.items()}
    results = []
    for i in range(len(members)):
        status, iterations, residual = solution.statuses[i], solution.iterations[i], solution.residuals[i]
        state = solution.states[i]
        if not alive[i]:
            lost = not math.isfinite(starts[i])
            status, iterations = (Status.NON_FINITE if lost else Status.CONVERGED), 0
            residual, state = (math.nan if lost else 0.0), states[i]
        results.append(
            honest(
                Hypergradient(
                    gradients={name: x[i] for name, x in rows.items()},
                    status=status if math.isfinite(sizes[i]) else Status.NON_FINITE,
                    iterations=iterations,
                    residual=residual,
                    hvps=operator.products[i],
                    validation_loss=numbers[0][i],
                    training_loss=numbers[1][i],
                    state=state,
                )
            )
        )
    return Hypergradients(total, sizes, results)


def _validation(members: Members, parts: Sequence[Part]) -> tuple[Tensor, Tensor, Params]:
    """F of each member, ∂F/∂w as rows, and the direct term ∂F/∂λ."""
    inputs = {("w", name): p for name, p in members.params.items()} | {
        ("λ", name): p for name, p in members.hparams.items()
    }
    with torch.enable_grad():
        losses = members.validation_losses(members.params, members.hparams, parts)
        found = gradients(losses.sum(), inputs, create_graph=False)
    with torch.no_grad():
        vectors = matrix({name: found["w", name] for name in members.params})
    return losses.detach(), vectors, {name: found["λ", name] for name in members.hparams}


def _of(alive: Sequence[bool], x: Tensor) -> Tensor:
    if all(alive):
        return x
    mask = column([float(each) for each in alive], x).bool()
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))
