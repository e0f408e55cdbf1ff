"""One weight decay per input feature, tuned by its gradient, against the best single weight decay of a grid.

The problem. Softmax regression on scikit-learn's handwritten digits (1,797 real images of 8 x 8 pixels), of which few
are for training. Beside each image stand four others, drawn at random; the label is that of the first. So 64 features
say something and 256 are as real but irrelevant, and nothing tells the model which. One weight decay for all would have
to be strong for the distractors and weak for the digit; a decay per feature, 320 of them, can be both. No grid covers
320 dimensions; a gradient does. The same comparison without distractors shows what is left of it where most features
matter.

The methods:

    grid     one global weight decay: the best of 25 values by the loss on the validation set
    learned  a weight decay per feature, moved by hypergradients of the validation loss

Why the comparison is fair. Both see the same images in the same roles: 250 for training, 250 for validation, and the
other 1,297 for nothing but the test. For the decays that a method found, the model is trained anew, to convergence, by
the same solver. 320 hyperparameters can overfit a validation set as parameters overfit a training set, so "learned"
spends half of the validation set on hypergradients and stops by the other half, while "grid" has all of it. The
validation columns therefore flatter "learned", and only the test columns count. Settings were chosen on seeds 100 to
104; those reported are 0 to 4, all of them.

What it does not show: that this beats methods made for irrelevant features. An L1 penalty, its strength from a grid,
reaches the same test accuracy with distractors.

    python examples/weight_decay.py [--seeds 5] [--quick] [--no-tracking]
    hyperopt-implicit run examples/weight_decay.py
    hyperopt-implicit search examples/weight_decay.py

The matrices are small: where other processes share the cores, OMP_NUM_THREADS=1 makes the commands much faster.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
import typer
from optuna.distributions import FloatDistribution
from over_seeds import standard_error, with_error
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.distributions import constraints

import hyperopt_implicit as hi

Batch = tuple[Tensor, Tensor]

PIXELS, CLASSES = 64, 10
TRAINING, VALIDATION = 250, 250
GRID = np.logspace(-5, 1, 25)


# ------------------------------------------------------------------------------------------------- the bilevel problem


@hi.hyperparameter("decay", init=lambda model: torch.full((model.in_features,), 1e-2), constraint=constraints.positive)
def training_loss(model: nn.Linear, batch: Batch, *, decay: Tensor) -> Tensor:
    penalty = (decay * model.weight.square()).sum()  # weight is [classes, features]: one decay a column, or one for all
    return validation_loss(model, batch) + penalty


def validation_loss(model: nn.Module, batch: Batch) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


@hi.knob("inner_lr", FloatDistribution(1e-3, 1e-1, log=True))
def problem(*, inner_lr: float = 0.02, seed: int = 0, distractors: int = 4) -> hi.BilevelProblem:
    training, validation, _ = load(seed, distractors)
    return hi.BilevelProblem(
        untrained(training),
        training_loss,
        validation_loss,
        training_data=[training],  # one full batch
        validation_data=[halves(validation)[0]],
        optimizer=lambda params: torch.optim.Adam(params, lr=inner_lr),
    )


# ----------------------------------------------------------------------------------------------------- data and models


def load(seed: int, distractors: int) -> tuple[Batch, Batch, Batch]:
    """Training, validation and test images with their labels, standardised by the training images."""
    images, labels = load_digits(return_X_y=True)
    random = np.random.default_rng(seed)
    images = np.hstack([images, *(random.permutation(images) for _ in range(distractors))])
    x_training, x_rest, y_training, y_rest = train_test_split(
        images, labels, train_size=TRAINING, stratify=labels, random_state=seed
    )
    x_validation, x_test, y_validation, y_test = train_test_split(
        x_rest, y_rest, train_size=VALIDATION, stratify=y_rest, random_state=seed
    )
    scaler = StandardScaler().fit(x_training)

    def batch(x: np.ndarray, y: np.ndarray) -> Batch:
        return torch.tensor(scaler.transform(x), dtype=torch.float32), torch.tensor(y)

    return batch(x_training, y_training), batch(x_validation, y_validation), batch(x_test, y_test)


def halves(batch: Batch) -> tuple[Batch, Batch]:
    images, labels = batch
    middle = len(labels) // 2
    return (images[:middle], labels[:middle]), (images[middle:], labels[middle:])


def untrained(training: Batch) -> nn.Linear:
    model = nn.Linear(training[0].shape[1], CLASSES)
    for p in model.parameters():
        nn.init.zeros_(p)
    return model


def trained(training: Batch, decay: Tensor) -> nn.Linear:
    """The model for these decays; the loss is convex, so where L-BFGS ends does not depend on luck."""
    model = untrained(training)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = training_loss(model, training, decay=decay)
        loss.backward()
        return loss

    optimizer.step(closure)
    return model


@torch.no_grad()
def scores(model: nn.Module, *batches: Batch) -> list[float]:
    """Loss and accuracy in per cent on each batch."""
    numbers: list[float] = []
    for images, labels in batches:
        right = model(images).argmax(dim=1) == labels
        numbers += [validation_loss(model, (images, labels)).item(), 100 * right.float().mean().item()]
    return numbers


# --------------------------------------------------------------------------------------------------------- the methods


def best_of_grid(training: Batch, validation: Batch, values: np.ndarray) -> Tensor:
    def loss(decay: Tensor) -> float:
        return scores(trained(training, decay), validation)[0]

    return min((torch.tensor(value, dtype=torch.float32) for value in values), key=loss)


class StopByHoldout:
    """Ends a run when the loss on held-out data stops falling, and keeps the decays where it was lowest."""

    def __init__(self, batch: Batch, patience: int = 20) -> None:
        self.batch = batch
        self.patience = patience
        self.lowest = math.inf
        self.step = 0
        self.decay = torch.empty(0)

    def __call__(self, step: hi.OuterStep, problem: hi.BilevelProblem) -> bool:
        loss = problem.validation_loss(self.batch).item()
        if loss < self.lowest:
            self.lowest, self.step = loss, step.step
            self.decay = problem.hyperparameters.values()["decay"]
        return step.step - self.step >= self.patience


def learned(validation: Batch, seed: int, distractors: int, outer_steps: int, tracking: bool) -> Tensor:
    holdout = StopByHoldout(halves(validation)[1])
    name = f"weight decay per feature, {distractors} distractors, seed {seed}"
    hi.optimize(
        problem(seed=seed, distractors=distractors),
        backend="cg",  # the training loss is convex: conjugate gradients solve for the inverse Hessian product
        outer_steps=outer_steps,
        inner_steps=10,
        warmup_steps=200,
        outer_lr=0.1,
        callbacks=[holdout],
        progress=False,
        tracking=tracking and hi.Tracking(run_name=name, params={"seed": seed, "distractors": distractors}),
    )
    return holdout.decay


# ------------------------------------------------------------------------------------------------------ the comparison


def compare(distractors: int, seeds: int, quick: bool, tracking: bool, console: Console) -> Table:
    results: dict[str, list[list[float]]] = {"grid": [], "learned": []}
    decays: list[Tensor] = []
    for seed in track(range(seeds), f"{distractors} distractors", console=console, transient=True):
        training, validation, test = load(seed, distractors)
        found = {
            "grid": best_of_grid(training, validation, GRID[::6] if quick else GRID),
            "learned": learned(validation, seed, distractors, 5 if quick else 200, tracking),
        }
        for method, decay in found.items():
            results[method].append(scores(trained(training, decay), validation, test))
        decays.append(found["learned"])

    grid, per_feature = np.array(results["grid"]), np.array(results["learned"])
    table = Table(title=f"{PIXELS} pixels of the digit, {distractors * PIXELS} of distractors", title_justify="left")
    table.add_column("weight decay")
    for data in ("validation", "test"):
        table.add_column(f"{data}\nloss", justify="right")
        table.add_column(f"{data}\naccuracy %", justify="right")
    table.add_row("grid", *summary(grid))
    table.add_row("learned", *summary(per_feature), end_section=True)
    table.add_row("difference", *summary(per_feature - grid, "+"))
    table.caption = verdict((per_feature - grid)[:, 3])
    table.caption_justify = "left"
    if distractors:
        digit, rest = torch.stack(decays).log().split((PIXELS, PIXELS * distractors), dim=1)
        means = f"{digit.mean().exp():.2g} on the digit, {rest.mean().exp():.2g} on distractors"
        table.caption += f"\nGeometric mean of the learned decays: {means}."
    return table


def summary(values: np.ndarray, sign: str = "") -> list[str]:
    """Mean ± standard error over the seeds of a row [seeds, (loss, accuracy, loss, accuracy)]."""
    return [with_error(column, digits, sign) for column, digits in zip(values.T, (3, 1, 3, 1), strict=True)]


def verdict(gain: np.ndarray) -> str:
    """In words, and without favour: a difference counts from two standard errors on."""
    if len(gain) < 2:
        return "One seed says nothing about which is better."
    if abs(gain.mean()) < 2 * standard_error(gain):
        return "No difference in test accuracy beyond two standard errors."
    return f"A decay per feature {'beats' if gain.mean() > 0 else 'LOSES to'} the grid in test accuracy."


def main(seeds: int = 5, quick: bool = False, tracking: bool = True) -> None:
    """Compare both methods over the seeds 0, 1, … of the split."""
    torch.set_num_threads(1)  # the matrices are small; threads would wait for one another
    seeds = 1 if quick else seeds
    console = Console()
    tables = [compare(distractors, seeds, quick, tracking, console) for distractors in (4, 0)]
    for table in tables:
        console.print(table)
    console.print(f"Mean ± standard error over {seeds} seed(s), differences paired by seed.")


if __name__ == "__main__":
    typer.run(main)
