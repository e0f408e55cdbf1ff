"""Digits with few labels: auxiliary tasks that help, distract and harm, told apart by their hypergradients.

The problem. Real handwritten digits (scikit-learn's, 8 x 8 pixels) stand in rows of three, as in a house number; the
task is to read the one in the middle. 100 rows are labelled to train on, 100 more form the auxiliary set. With so few
a network does not find out where to look. Each labelled row comes with three companions, rows without the digit's
name, and the auxiliary losses of a row are means over its companions. What each task does on its own, beside the main
one with weight 1 (test accuracy, train and auxiliary set, seeds 100 to 105):

    rotation   by how many quarter turns was the middle digit turned?                     -1.0 ± 0.9
    denoising  restore the middle digit from pixels of which 30 % are lost                +2.8 ± 0.9
    parity     is the middle digit even? A coarse label, known of the companions as well  +3.1 ± 0.5
    neighbour  restore the left neighbour, which is of no use here                        -3.7 ± 1.2
    random     labels drawn by lot, to be learned by heart                                -9.6 ± 0.6

What learned weights do with that: denoising rises, neighbour and random fall, for every seed or nearly so. Parity is
not found reliably: its weight ends above 1 for some seeds and near 0 for others, although it helps.

The loss on the auxiliary set is the Brier score, the squared error of the probabilities; cross-entropy in its place
does as well (seeds 100 to 111). Settings were chosen on seeds 100 to 105, by the retrained network; those reported are
0 to 4, all.

    python examples/auxiliary_learning/digits.py [--seeds 5] [--first-seed 0] [--quick] [--no-tracking]
    hyperopt-implicit run examples/auxiliary_learning/digits.py
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
import typer
from comparison import run
from protocol import AuxiliaryProblem, Split, bilevel
from sklearn.datasets import load_digits
from torch import Tensor, nn

import hyperopt_implicit as hi

TASKS = ("digit", "rotation", "denoising", "parity", "neighbour", "random")
TRAIN, AUXILIARY, VALIDATION, COMPANIONS = 100, 100, 200, 3
LOST = 0.3


class Rows(NamedTuple):
    """Rows of three digits [rows, 192 pixels] with the label of the middle one, and their companions [rows, 3, …]."""

    rows: Tensor
    labels: Tensor
    companions: Tensor
    parity: Tensor
    lots: Tensor
    turned: Tensor
    turns: Tensor
    damaged: Tensor
    middle: Tensor
    left: Tensor


class Network(nn.Module):
    """A shared trunk, and a head for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(192, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh())
        sizes = {"digit": 10, "rotation": 4, "denoising": 64, "parity": 2, "neighbour": 64, "random": 10}
        self.heads = nn.ModuleDict({task: nn.Linear(32, size) for task, size in sizes.items()})

    def forward(self, rows: Tensor) -> Tensor:
        logits: Tensor = self.heads["digit"](self.trunk(rows))
        return logits


def losses(model: Network, batch: Rows) -> Tensor:
    """One row for each labelled row, one column for each of ``TASKS``."""
    seen, turned, damaged = (model.trunk(x) for x in (batch.companions, batch.turned, batch.damaged))
    columns = [
        F.cross_entropy(model(batch.rows), batch.labels, reduction="none"),
        mean_cross_entropy(model.heads["rotation"](turned), batch.turns),
        10 * (model.heads["denoising"](damaged) - batch.middle).square().mean(dim=(1, 2)),
        mean_cross_entropy(model.heads["parity"](seen), batch.parity),
        10 * (model.heads["neighbour"](damaged) - batch.left).square().mean(dim=(1, 2)),
        mean_cross_entropy(model.heads["random"](seen), batch.lots),
    ]
    return torch.stack(columns, dim=1)


def mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """[rows, companions, classes] and [rows, companions] to [rows]."""
    return F.cross_entropy(logits.movedim(-1, 1), labels, reduction="none").mean(dim=1)


def brier_score(model: Network, batch: Rows) -> Tensor:
    return (model(batch.rows).softmax(dim=1) - F.one_hot(batch.labels, 10)).square().sum(dim=1).mean()


def accuracy(model: Network, batch: Rows) -> float:
    return 100 * (model(batch.rows).argmax(dim=1) == batch.labels).float().mean().item()


def trunk(model: Network) -> Iterable[nn.Parameter]:
    return model.trunk.parameters()


@cache
def images() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)


def data(seed: int) -> Split:
    """Rows whose middle images are all different; test rows consist of images that are in no other row."""
    pixels, labels = images()
    random = torch.Generator().manual_seed(seed)
    labelled = (TRAIN, AUXILIARY, VALIDATION)
    unlabelled = COMPANIONS * (TRAIN + AUXILIARY)
    order = torch.randperm(len(pixels), generator=random)
    *middles, others, test = order.split([*labelled, unlabelled, len(pixels) - sum(labelled) - unlabelled])

    def in_rows(middle: Tensor, among: Tensor) -> Tensor:
        left, right = among[torch.randint(len(among), (2, *middle.shape), generator=random)]
        return torch.stack([pixels[left], pixels[middle], pixels[right]], dim=-3)  # […, 3, 8, 8]

    def part(middle: Tensor, companions: Tensor, among: Tensor) -> Rows:
        plain = in_rows(companions, among)
        turns = torch.randint(4, companions.shape, generator=random)
        quarters = torch.stack([torch.rot90(plain[:, :, 1], k, (-2, -1)) for k in range(4)])
        turned = plain.clone()
        turned[:, :, 1] = quarters.gather(0, turns[None, :, :, None, None].expand(1, *plain[:, :, 1].shape))[0]
        kept = torch.rand(*companions.shape, 192, generator=random) > LOST
        return Rows(
            rows=in_rows(middle, among).flatten(1),
            labels=labels[middle],
            companions=plain.flatten(2),
            parity=labels[companions] % 2,
            lots=torch.randint(10, companions.shape, generator=random),
            turned=turned.flatten(2),
            turns=turns,
            damaged=plain.flatten(2) * kept,
            middle=plain[:, :, 1].flatten(2),
            left=plain[:, :, 0].flatten(2),
        )

    of_train, of_auxiliary = others.view(-1, COMPANIONS).split([TRAIN, AUXILIARY])
    return Split(
        train=part(middles[0], of_train, others),
        auxiliary=part(middles[1], of_auxiliary, others),
        validation=part(middles[2], middles[2].new_empty(VALIDATION, 0), others),  # only read, so without companions
        test=part(test, test.new_empty(len(test), 0), test),
    )


PROBLEM = AuxiliaryProblem(
    name="digits",
    tasks=TASKS,
    data=data,
    model=Network,
    losses=losses,
    metric=accuracy,
    metric_name="accuracy",
    held_out_loss=brier_score,
    shared=trunk,
    decay=3e-3,
    steps=300,
    warmup_steps=100,
    inner_steps=5,
    backend={"name": "cg", "max_iterations": 5, "damping": 0.05},
    outer_lr=0.1,
)


def problem(*, seed: int = 0) -> hi.BilevelProblem:
    return bilevel(PROBLEM, seed)


def main(seeds: int = 5, first_seed: int = 0, quick: bool = False, tracking: bool = True, jobs: int = 1) -> None:
    """Compare all methods over the seeds 0, 1, …"""
    run(PROBLEM, seeds=seeds, first_seed=first_seed, quick=quick, tracking=tracking, jobs=jobs)


if __name__ == "__main__":
    typer.run(main)
