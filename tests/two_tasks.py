"""A small network for two tasks, with a combiner of their losses: what ``MetaOptimizer`` is tried on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import hyperopt_implicit as hi
from hyperopt_implicit.auxiliary import LossCombiner, MetaOptimizer, NonlinearCombiner

Batch = tuple[Tensor, Tensor]


def batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x, noise = (torch.randn(12, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, torch.stack([x.sum(1).sin(), x[:, 0]], dim=1) + 0.1 * noise


TRAINING, VALIDATION = batch(0), batch(1)


def validation_loss(model: nn.Module, batch: Batch, *, combiner: nn.Module) -> Tensor:
    """The main task's, and a term that knows the combiner only: the direct term of the hypergradient."""
    penalty = sum(p.square().sum() for p in combiner.parameters())
    return (model(batch[0]) - batch[1])[:, 0].square().mean() + 0.1 * penalty


class Setting:
    """A small network for two tasks, a combiner of their losses, and the two tensors that a step is given.

    With ``decay`` the training loss is strongly convex near its minimum; without, its Hessian is indefinite.
    """

    def __init__(self, decay: float = 1.0, **options: Any) -> None:
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))
        self.combiner = NonlinearCombiner(2, hidden_sizes=(3,), **options)
        self.decay = decay

    @property
    def problem(self) -> hi.BilevelProblem:
        decay = self.decay

        @hi.hyperparameter("combiner", init=self.combiner)
        def training_loss(model: nn.Module, batch: Batch, *, combiner: LossCombiner) -> Tensor:
            squares = sum(p.square().sum() for p in model.parameters())
            return combiner((model(batch[0]) - batch[1]).square()) + decay * squares

        return hi.BilevelProblem(
            self.model, training_loss, validation_loss, optimizer=lambda p: torch.optim.SGD(p, lr=0.1)
        )

    def given(self) -> dict[str, Any]:
        """The arguments of a step, as AuxiLearn's users write them: losses with their graphs, and generators."""
        squares = sum(p.square().sum() for p in self.model.parameters())
        train_loss = self.combiner((self.model(TRAINING[0]) - TRAINING[1]).square()) + self.decay * squares
        return {
            "val_loss": validation_loss(self.model, VALIDATION, combiner=self.combiner),
            "train_loss": train_loss,
            "aux_params": self.combiner.parameters(),
            "parameters": self.model.parameters(),
        }

    def meta(self, lr: float = 1.0, **options: Any) -> MetaOptimizer:
        return MetaOptimizer(torch.optim.SGD(self.combiner.parameters(), lr=lr), **options)
