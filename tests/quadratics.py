"""Batches whose losses are quadratics with different Hessians: what stochastic solvers are averaged over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import hyperopt_implicit as hi
from hyperopt_implicit.backend import Backend, Hypergradient, State
from hyperopt_implicit.testing.specimens import Linear, gradient_descent

from .matrices import spread, with_spectrum


@dataclass(frozen=True)
class Mixture:
    """L_i = ½ wᵀH_i w − s_i·shiftᵀw and F = vᵀw: ∂²L_i/∂λ∂w = −s_i, so that dF/dλ = s_i u for the u of a solver."""

    hessians: list[Tensor]
    scales: list[Tensor]
    v: Tensor
    problem: hi.BilevelProblem

    @property
    def mean(self) -> Tensor:
        """E[H]."""
        return torch.stack(self.hessians).mean(0)

    @property
    def truth(self) -> Tensor:
        """E[H]⁻¹v."""
        return torch.linalg.solve(self.mean, self.v)

    def batch(self, i: int) -> tuple[Tensor, Tensor]:
        """The i-th of the problem's training batches."""
        data: Any = self.problem.training_data
        return data[i]

    def hypergradient(self, backend: Backend, batches: list[int], state: State) -> Hypergradient:
        """One call, on these training batches."""
        data: Any = self.problem.validation_data
        return backend.hypergradient(self.problem, [self.batch(i) for i in batches], data[0], state)


def mixture(batches: int, noise: float, size: int = 4) -> Mixture:
    """Eigenvalues from 0.5 to 2 on average; ``noise`` is the spread of each Hessian around that, all positive."""
    generator = torch.Generator().manual_seed(5)
    hessians, scales = [], []
    for i in range(batches):
        low = torch.rand(size, size, generator=generator, dtype=torch.float64)
        hessians.append(with_spectrum(spread(0.5, 2.0, size)) + noise * low @ low.T / size)
        scales.append(torch.tensor(1.0 + 0.1 * i, dtype=torch.float64))
    v = torch.randn(size, generator=generator, dtype=torch.float64)

    @hi.hyperparameter("shift", init=torch.zeros(size))
    def training_loss(model: Linear, batch: tuple[Tensor, Tensor], *, shift: Tensor) -> Tensor:
        w, (hessian, scale) = model.weight, batch
        return 0.5 * w @ hessian @ w - scale * shift @ w

    problem = hi.BilevelProblem(
        Linear(size),
        training_loss,
        lambda model, batch: batch @ model.weight,
        training_data=list(zip(hessians, scales, strict=True)),
        validation_data=[v],
        optimizer=gradient_descent,
    )
    return Mixture(hessians, scales, v, problem)
