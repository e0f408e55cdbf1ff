"""Is the adapter to blame? Every method on a quadratic whose hypergradient is known without any of the libraries.

L(w, λ) = ½ wᵀAw − wᵀBλ and F(w) = ½‖w − t‖², with five weights and three hyperparameters in float64, so that
dF/dλ = Bᵀu with (A + δI) u = w − t. A method is compared with what its own formula gives: the finite sum for Neumann
series, the solution for conjugate gradients with five products and for Nyström's with all five columns, and the
derivative of the steps for unrolled ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from adapters import Losses, Method, Setting, ours
from torch import Tensor, nn

import hyperopt_implicit as hi

WEIGHTS, HYPERPARAMETERS = 5, 3


@dataclass
class Quadratic:
    """The problem, put to the adapters by ``setting``, and its answers."""

    damping: float = 0.3

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        rotation = torch.linalg.qr(torch.randn(WEIGHTS, WEIGHTS, generator=draw, dtype=torch.float64)).Q
        self.A = rotation @ torch.diag(torch.linspace(0.5, 4.0, WEIGHTS, dtype=torch.float64)) @ rotation.T
        self.B = torch.randn(WEIGHTS, HYPERPARAMETERS, generator=draw, dtype=torch.float64)
        self.t = torch.randn(WEIGHTS, generator=draw, dtype=torch.float64)
        self.start = torch.randn(WEIGHTS, generator=draw, dtype=torch.float64)
        self.shift = torch.randn(HYPERPARAMETERS, generator=draw, dtype=torch.float64)

        @hi.hyperparameter("shift", init=self.shift)
        def training_loss(model: nn.Module, batch: object, *, shift: Tensor) -> Tensor:
            w = model.weight[0]
            return 0.5 * w @ self.A @ w - w @ self.B @ shift

        def validation_loss(model: nn.Module, batch: object) -> Tensor:
            return 0.5 * (model.weight[0] - self.t).square().sum()

        model = nn.Linear(WEIGHTS, 1, bias=False).double()
        with torch.no_grad():
            model.weight[0] = self.start
        problem = hi.BilevelProblem(
            model, training_loss, validation_loss, optimizer=lambda params: torch.optim.SGD(params, lr=0.1)
        )
        losses = Losses(model, lambda m, raw: training_loss(m, None, **raw), lambda m: validation_loss(m, None))
        self.setting = Setting(
            problem, (None, None), problem.hparams, losses, self.damping,
            step_size=0.2, learning_rate=0.1, steps=10, regulariser=0.3, counts=(WEIGHTS,),
        )  # fmt: skip

    def answer(self, family: str) -> Tensor:
        """What a method of that family gives if it does what it says."""
        identity = torch.eye(WEIGHTS, dtype=torch.float64)
        s, v = self.setting, self.start - self.t
        curvature = self.A + self.damping * identity
        if family == "neumann":
            powers = [torch.linalg.matrix_power(identity - s.step_size * curvature, k) for k in range(WEIGHTS + 1)]
            return self.B.T @ (s.step_size * sum(powers) @ v)
        if family == "nystrom":
            return self.B.T @ torch.linalg.solve(self.A + (self.damping or s.regulariser) * identity, v)
        if family == "unrolled":
            step, w, sensitivity = identity - s.learning_rate * self.A, self.start, torch.zeros_like(self.B)
            for _ in range(s.steps):
                w = step @ w + s.learning_rate * self.B @ self.shift
                sensitivity = step @ sensitivity + s.learning_rate * self.B
            return sensitivity.T @ (w - self.t)
        return self.B.T @ torch.linalg.solve(curvature, v)

    def methods(self, adapters: list[Any]) -> list[Method]:
        """Everybody's that has an answer of its own."""
        return [
            method
            for adapter in [ours, *adapters]
            for kind in ("implicit", "unrolled")
            if hasattr(adapter, kind)
            for method in getattr(adapter, kind)(self.setting)
        ]

    def error(self, method: Method) -> float:
        """Relative to the answer."""
        expected = self.answer(method.family)
        return float((method.call()[0].detach() - expected).norm() / expected.norm())
