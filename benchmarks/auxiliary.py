"""What ``MetaOptimizer`` costs through a non-linear combiner, against AuxiLearn's formula written by hand.

python benchmarks/auxiliary.py                              print the table
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import by_hand
import torch
import torch.nn.functional as F
from timing import interleaved, keep_freed_memory
from torch import Tensor, nn

from hyperopt_implicit.auxiliary import MetaOptimizer, NonlinearCombiner

TERMS = 3
STEP_SIZE = 1e-2
EVERY = 30  # training steps for one hypergradient


@dataclass(frozen=True)
class AuxiliaryRow:
    """One comparison; what a hypergradient by hand costs is given in training gradients too."""

    problem: str
    what: str
    by_hand_ms: float
    ratio: float
    allowed: float
    difference: float


class _Setting:
    """A network with a shared trunk and three heads, a non-linear combiner, and a batch of each kind."""

    def __init__(self, trunk: Callable[[], nn.Module], shape: tuple[int, ...], features: int, batch: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(trunk(), nn.Linear(features, 30))
        self.combiner = NonlinearCombiner(3, hidden_sizes=(16,))
        self.training = (torch.randn(batch, *shape), torch.randint(10, (batch, 3)))
        self.validation = (torch.randn(batch, *shape), torch.randint(10, (batch, 3)))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)

    def losses(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """[batch, tasks]"""
        x, labels = batch
        return F.cross_entropy(self.model(x).reshape(len(x), 10, 3), labels, reduction="none")

    def training_loss(self) -> Tensor:
        return self.combiner(self.losses(self.training))

    def validation_loss(self) -> Tensor:
        return self.losses(self.validation)[:, 0].mean()

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.training_loss().backward(inputs=list(self.model.parameters()))
            self.optimizer.step()


def _settings() -> dict[str, Callable[[], _Setting]]:
    def mlp() -> nn.Module:
        return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())

    def cnn() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
        )

    return {
        "MLP 784-256-256, 3 heads, batch 256": lambda: _Setting(mlp, (784,), 256, 256),
        "CNN 3×32×32, 3 heads, batch 64": lambda: _Setting(cnn, (3, 32, 32), 512, 64),
    }


class _Still(torch.optim.Optimizer):
    """Moves nothing, so that the same two losses can be differentiated again and again."""

    def step(self, closure: object = None) -> None:
        return


def compare_step(name: str, make: Callable[[], _Setting], seconds: float) -> AuxiliaryRow:
    """One outer step from the same two loss tensors: ours, and by hand with clipping."""
    setting = make()
    setting.train(20)
    params, hparams = list(setting.model.parameters()), list(setting.combiner.parameters())
    training, validation = setting.training_loss(), setting.validation_loss()
    outer = _Still(hparams, {})
    meta = MetaOptimizer(outer, STEP_SIZE, TERMS, max_grad_norm=10)

    def ours() -> list[Tensor] | None:
        return meta.step(training, validation, params, hparams, return_grads=True)

    def theirs() -> list[Tensor]:
        return by_hand.auxilearn_step(training, validation, params, hparams, outer, STEP_SIZE, TERMS, 10.0)

    mine, hand = ours() or [], theirs()
    scaled = [STEP_SIZE * h for h in hand]  # AuxiLearn's sum lacks the factor
    error = math.hypot(*[float((m - s).norm()) for m, s in zip(mine, scaled, strict=True)])
    size = math.hypot(*[float(s.norm()) for s in scaled])
    ours_seconds, hand_seconds = interleaved(ours, theirs, seconds)
    what = f"outer step, {TERMS} products"
    return AuxiliaryRow(name, what, hand_seconds * 1e3, ours_seconds / hand_seconds, 1.05, error / size)


def compare_loop(name: str, make: Callable[[], _Setting], seconds: float) -> AuxiliaryRow:
    """Training with an outer step every so many steps, forward passes and all."""
    mine, hand = make(), make()
    meta = MetaOptimizer(torch.optim.Adam(mine.combiner.parameters(), lr=1e-3), STEP_SIZE, TERMS, max_grad_norm=10)
    outer = torch.optim.Adam(hand.combiner.parameters(), lr=1e-3)

    def ours() -> None:
        mine.train(EVERY)
        meta.step(mine.training_loss(), mine.validation_loss(), mine.model.parameters(), mine.combiner.parameters())

    def theirs() -> None:
        hand.train(EVERY)
        params, hparams = list(hand.model.parameters()), list(hand.combiner.parameters())
        by_hand.auxilearn_step(
            hand.training_loss(), hand.validation_loss(), params, hparams, outer, STEP_SIZE, TERMS, 10.0
        )

    ours_seconds, hand_seconds = interleaved(ours, theirs, seconds)
    trained = [nn.utils.parameters_to_vector(each.model.parameters()).detach() for each in (mine, hand)]
    difference = float((trained[0] - trained[1]).norm() / trained[1].norm())
    what = f"{EVERY} training steps and an outer step"
    return AuxiliaryRow(name, what, hand_seconds * 1e3, ours_seconds / hand_seconds, 1.03, difference)


def rows(seconds: float) -> list[AuxiliaryRow]:
    """All comparisons."""
    return [
        compare(name, make, seconds) for name, make in _settings().items() for compare in (compare_step, compare_loop)
    ]


def section(found: list[AuxiliaryRow]) -> list[str]:
    """The lines of the docs page."""
    lines = [
        "## Auxiliary learning, against AuxiLearn's formula written by hand",
        "",
        f"`MetaOptimizer` with `truncate_iter={TERMS}` through a non-linear combiner of three tasks (16 hidden units), "
        "against the same products and clipping on the same losses with nothing around them.",
        "",
        "| problem | what | by hand | ours / by hand | allowed | difference |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        lines.append(
            f"| {row.problem} | {row.what} | {row.by_hand_ms:.1f} ms | {row.ratio:.3f} | {row.allowed:.2f} | "
            f"{row.difference:.0e} |"
        )
    return [
        *lines,
        "",
        "The difference of an outer step is that of the gradients, by hand times the step size that AuxiLearn's sum "
        "lacks; that of a loop is of the trained weights.",
        "",
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    keep_freed_memory()
    for row in rows(seconds=6.0):
        print(row)
