"""The implicit function theorem for many members at once.

The losses of all members are summed: the Hessian of the sum is block diagonal, so that one product with the vectors of
all members holds the product of each. What a single run does is in ``operators.py`` and ``implicit.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
        decays = [problem.weight_decays for problem in members.problems]
        names = {name for each in decays for name in each}
        self._columns = {
            name: column([each.get(name, 0.0) for each in decays], p)
            for name, p in members.params.items()
            if name in names
        }

    def _decayed(self, product: Sequence[Tensor], vector: Params) -> Params:
        found = dict(zip(self._params, product, strict=True))
        for name, decay in self._columns.items():
            found[name] = found[name] + decay * vector[name]
        return found


class CurvatureOfMembers(MembersOperator):
    """A of each member: its Hessian and the damping.

    Args:
        hessian: of all members.
        params: w of all members.
        damping: δ.
    """

    def __init__(self, hessian: MembersHessian, params: Params, damping: float) -> None:
        self._hessian, self._params, self._damping = hessian, params, damping
        self.columns = {name: p[0].numel() for name, p in params.items()}
        self.products = [0] * len(next(iter(params.values())))
        self._mixed: tuple[Tensor, Params] | None = None

    def multiply(self, vectors: Tensor, going: Sequence[bool], *, mix: bool = False) -> Tensor:
        self.products = [count + g for count, g in zip(self.products, going, strict=True)]
        vector = self.vector(vectors)
        if mix:
            product = matrix(self._hessian.multiply_and_mix(vector))
            self._mixed = vectors, self._hessian.mixed(vector)
        else:
            product = matrix(self._hessian @ vector)
        return product.add_(vectors, alpha=self._damping) if self._damping else product

    def mixed(self, vectors: Tensor) -> Params:
        """(∂²L/∂λ∂w)·u of each member."""
        if self._mixed is not None and self._mixed[0] is vectors:
            return self._mixed[1]
        return self._hessian.mixed(self.vector(vectors))

    def vector(self, vectors: Tensor) -> Params:
        """The rows as parameters."""
        parts = vectors.split(list(self.columns.values()), dim=1)
        return {name: part.view(p.shape) for (name, p), part in zip(self._params.items(), parts, strict=True)}


def matrix(vector: Params) -> Tensor:
    """A row a member; memory of its own."""
    parts = [x.flatten(1) if x.dim() > 1 else x.unsqueeze(1) for x in vector.values()]
    return torch.cat(parts, dim=1)


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
) -> Hypergradients:
    """dF/dλ of each member at its present weights, as ``ImplicitBackend.hypergradient`` gives it alone.

    Args:
        members: whose.
        solve: the backend's solver.
        damping: δ.
        training: the batches over which L is averaged.
        validation: those of F.
        states: what the backend carries for each member.
    """
    inputs = {("w", name): p for name, p in members.params.items()} | {
        ("λ", name): p for name, p in members.hparams.items()
    }
    with torch.enable_grad():
        losses = members.validation_losses(members.params, members.hparams, validation)
        found = gradients(losses.sum(), inputs, create_graph=False)
    with torch.no_grad():
        direct = {name: found["λ", name] for name in members.hparams}
        vectors = matrix({name: found["w", name] for name in members.params})
        starts = norms(vectors)
        alive = [math.isfinite(size) and size > 0.0 for size in starts]
        vectors = chosen(alive, vectors)
    hessian = MembersHessian(members, training)
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
        numbers = torch.stack((losses.detach(), hessian.losses)).tolist()
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


def _of(alive: Sequence[bool], x: Tensor) -> Tensor:
    if all(alive):
        return x
    mask = column([float(each) for each in alive], x).bool()
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))
