"""How a disease progresses, learned from few patients: other blood measurements as auxiliary tasks.

The problem. 442 patients with diabetes (scikit-learn's), seven measurements of each (age, sex, body mass index, blood
pressure, s1, s2, s3) and all their products, 34 numbers. The main task is how the disease stands a year later. It is
known of 40 patients in the training data; the auxiliary targets are known of all 180:

    s4, s5, s6          the three other measurements of the blood serum
    random 1, random 2  numbers drawn by lot, which nobody can predict

A network with many inputs and few labels overfits; whoever predicts s5, a measure of the blood fats that goes along
with the disease, learns which inputs matter.

The metric is R2, in per cent. The methods and the protocol are those of ``comparison.py``. Inputs, sizes, decay and
steps were chosen on seeds 100 to 109, on which learned weights beat the main task alone and tie with equal weights.
It is the third setting that was tried. Without the products, and on the measurements of tumours in scikit-learn's other
medical table, the main task needs no help: training on all labels without auxiliary tasks was better than any weights.

    python examples/auxiliary_learning/tabular.py [--seeds 5] [--quick] [--no-tracking] [--jobs 2]
    hyperopt-implicit run examples/auxiliary_learning/tabular.py --backend cg --warmup-steps 100
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
import typer
from comparison import run
from protocol import AuxiliaryProblem, Split, bilevel, main_known
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

import hyperopt_implicit as hi

TASKS = ("progression", "s4", "s5", "s6", "random 1", "random 2")
INPUTS = ("age", "sex", "bmi", "bp", "s1", "s2", "s3")
FEATURES = 34
TRAIN, LABELLED, AUXILIARY, VALIDATION = 180, 40, 100, 60  # the test has the other 102


class Patients(NamedTuple):
    """Inputs [rows, 34], targets [rows, tasks], and whether the main one is known [rows]."""

    inputs: Tensor
    targets: Tensor
    known: Tensor


def data(seed: int) -> Split:
    measured, progression = load_diabetes(return_X_y=True, as_frame=True)
    random = torch.Generator().manual_seed(seed)
    parts = torch.randperm(len(measured), generator=random).tensor_split(
        [TRAIN, TRAIN + AUXILIARY, TRAIN + AUXILIARY + VALIDATION]
    )
    train, labelled = parts[0], parts[0][:LABELLED]
    inputs = standardised(torch.tensor(measured[list(INPUTS)].to_numpy(), dtype=torch.float32), train)
    first, second = torch.triu_indices(len(INPUTS), len(INPUTS))
    new = ~((first == 1) & (second == 1))  # the square of a sex, one of two values, says what the sex does
    products = standardised(inputs[:, first[new]] * inputs[:, second[new]], train)
    targets = torch.cat(
        [
            standardised(torch.tensor(progression.to_numpy(), dtype=torch.float32)[:, None], labelled),
            standardised(torch.tensor(measured[["s4", "s5", "s6"]].to_numpy(), dtype=torch.float32), train),
            torch.randn(len(measured), 2, generator=random),
        ],
        dim=1,
    )
    inputs = torch.cat([inputs, products], dim=1)
    split = Split(*(Patients(inputs[p], targets[p], torch.ones(len(p))) for p in parts))
    known = (torch.arange(TRAIN) < LABELLED).float()
    return Split(split.train._replace(known=known), split.auxiliary, split.validation, split.test)


def standardised(values: Tensor, rows: Tensor) -> Tensor:
    """Columns with mean 0 and standard deviation 1 on the rows given."""
    return (values - values[rows].mean(dim=0)) / values[rows].std(dim=0)


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, len(TASKS)))


def losses(model: nn.Sequential, batch: Patients) -> Tensor:
    return main_known((model(batch.inputs) - batch.targets).square(), batch.known)


def trunk(model: nn.Sequential) -> list[nn.Parameter]:
    return list(model[0].parameters())


def r_squared(model: nn.Sequential, batch: Patients) -> float:
    target = batch.targets[:, 0]
    error = F.mse_loss(model(batch.inputs)[:, 0], target)
    return 100 * (1 - error / target.var(correction=0)).item()


PROBLEM = AuxiliaryProblem(
    name="tabular",
    tasks=TASKS,
    data=data,
    model=model,
    losses=losses,
    metric=r_squared,
    metric_name="R2",
    shared=trunk,
    optimizer=partial(torch.optim.Adam, lr=5e-3),
    decay=0.1,
    steps=400,
    warmup_steps=100,
    backend={"name": "cg", "max_iterations": 5},
    outer_lr=0.1,
)


def problem(*, seed: int = 0, method: str = "learned weights") -> hi.BilevelProblem:
    return bilevel(PROBLEM, seed, method)


def main(seeds: int = 5, first_seed: int = 0, quick: bool = False, tracking: bool = True, jobs: int = 1) -> None:
    """Compare all methods over the seeds 0, 1, …"""
    run(PROBLEM, seeds=seeds, first_seed=first_seed, quick=quick, tracking=tracking, jobs=jobs)


if __name__ == "__main__":
    typer.run(main)
