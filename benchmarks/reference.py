"""The exact answers in float64 that approximations are compared with, each of which checks itself.

Plain autograd on a float64 copy of the losses, with none of the code that is being compared.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from adapters import Losses
from torch import Tensor


class Reference:
    """H + δI, v and the mixed derivative at fixed weights, in float64 on one retained graph.

    Args:
        losses: L and F in float64, at the weights.
        raw: λ in float64.
        damping: δ.
    """

    def __init__(self, losses: Losses, raw: dict[str, Tensor], damping: float) -> None:
        self._params = [p.detach().requires_grad_() for p in losses.parameters()]
        self._raw = {name: value.detach().requires_grad_() for name, value in raw.items()}
        names = [name for name, _ in losses.named_parameters()]
        at = dict(zip(names, self._params, strict=True))
        assert all(p.dtype == torch.float64 for p in self._params)
        self.damping = damping
        self._gradient = torch.autograd.grad(losses.at(at, self._raw), self._params, create_graph=True)
        self.vector = _flat(torch.autograd.grad(losses.at(at), self._params, allow_unused=True, materialize_grads=True))

    def product(self, vector: Tensor) -> Tensor:
        """(H + δI)·vector, flat."""
        pieces = vector.split([p.numel() for p in self._params])
        tangents = [piece.view_as(p) for piece, p in zip(pieces, self._params, strict=True)]
        return _flat(torch.autograd.grad(self._gradient, self._params, tangents, retain_graph=True)) + (
            self.damping * vector
        )

    def hypergradient(self, solution: Tensor) -> Tensor:
        """−(∂²L/∂λ∂w)·solution, flat; F does not depend on λ directly in any problem here."""
        pieces = solution.split([p.numel() for p in self._params])
        tangents = [piece.view_as(p) for piece, p in zip(pieces, self._params, strict=True)]
        return -_flat(torch.autograd.grad(self._gradient, list(self._raw.values()), tangents, retain_graph=True))

    def solve(self, start: Tensor | None = None, tolerance: float = 1e-10, most: int = 2000) -> Tensor:
        """(H + δI)⁻¹v by conjugate gradients, to a relative residual that is computed anew at the end.

        Raises:
            ArithmeticError: the matrix is not positive definite, or the residual was not reached.
        """
        x = torch.zeros_like(self.vector) if start is None else start.clone()
        r = self.vector - self.product(x)
        p, squared, goal = r.clone(), r.dot(r), tolerance * self.vector.norm()
        for _ in range(most):
            if squared.sqrt() <= goal:
                break
            q = self.product(p)
            curvature = p.dot(q)
            if curvature <= 0.0:
                raise ArithmeticError(f"H + {self.damping}·I is not positive definite: no reference")
            x += squared / curvature * p
            r -= squared / curvature * q
            previous, squared = squared, r.dot(r)
            p = r + squared / previous * p
        residual = float((self.vector - self.product(x)).norm() / self.vector.norm())
        if residual > 10 * tolerance:
            raise ArithmeticError(f"the reference has a residual of {residual:.1e}, not {tolerance:.1e}")
        return x

    def dense(self) -> Tensor:
        """H + δI, formed."""
        basis = torch.eye(len(self.vector), dtype=torch.float64, device=self.vector.device)
        return torch.stack([self.product(column) for column in basis], dim=1)

    def largest_eigenvalue(self, iterations: int = 40) -> float:
        """λ_max by Lanczos from v with full orthogonalisation, in as many products."""
        basis = [self.vector / self.vector.norm()]
        diagonal: list[Tensor] = []
        beside: list[Tensor] = []
        for _ in range(min(iterations, len(self.vector))):
            q = self.product(basis[-1])
            diagonal.append(basis[-1].dot(q))
            stacked = torch.stack(basis)
            for _ in range(2):  # once leaves rounding errors behind
                q = q - stacked.T @ (stacked @ q)
            if q.norm() <= 1e-12 * diagonal[0].abs():
                break
            beside.append(q.norm())
            basis.append(q / beside[-1])
        T = torch.diag(torch.stack(diagonal))
        for i in range(len(diagonal) - 1):
            T[i, i + 1] = T[i + 1, i] = beside[i]
        return float(torch.linalg.eigvalsh(T)[-1])


def through_training(losses: Losses, raw: dict[str, Tensor], learning_rate: float, steps: int) -> Tensor:
    """dF/dλ through steps of plain gradient descent from the present weights, as one graph in float64; flat."""
    names = [name for name, _ in losses.named_parameters()]
    params = [p.detach().requires_grad_() for p in losses.parameters()]
    hparams = {name: value.detach().requires_grad_() for name, value in raw.items()}
    for _ in range(steps):
        loss = losses.at(dict(zip(names, params, strict=True)), hparams)
        gradient = torch.autograd.grad(loss, params, create_graph=True)
        params = [p - learning_rate * g for p, g in zip(params, gradient, strict=True)]
    loss = losses.at(dict(zip(names, params, strict=True)))
    return _flat(torch.autograd.grad(loss, list(hparams.values())))


def _flat(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


flat: Callable[[list[Tensor] | tuple[Tensor, ...]], Tensor] = _flat
