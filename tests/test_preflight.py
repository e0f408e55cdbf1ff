"""Before any training: operators without a second derivative are named, and nothing is changed by finding them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hyperopt_implicit as hi
from hyperopt_implicit.preflight import preflight
from hyperopt_implicit.testing.assertions import assert_unchanged
from hyperopt_implicit.testing.specimens import (
    TRAINING,
    VALIDATION,
    Linear,
    gradient_descent,
    half_mean_square,
    ridge_problem,
)


def bag_loss(model, batch, *, decay):
    return model(batch).square().mean() + decay


def ctc_loss(model, batch, *, decay):
    log_probabilities = model(batch).log_softmax(-1).transpose(0, 1)
    targets = torch.ones(2, 2, dtype=torch.long)
    lengths = torch.full((2,), 6), torch.full((2,), 2)
    return F.ctc_loss(log_probabilities, targets, *lengths) + decay


def cdist_loss(model, batch, *, decay):
    return torch.cdist(model(batch), batch).mean() + decay


class Distances(nn.Module):
    """cdist inside a module."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, x + 1.0)


WITHOUT = {
    "EmbeddingBag": (
        lambda: nn.Sequential(nn.EmbeddingBag(10, 4, mode="mean"), nn.Linear(4, 1)),
        bag_loss,
        torch.arange(6).reshape(2, 3),
        r"'embedding_bag' in module '0' \(EmbeddingBag\), line \d+ of test_preflight.py, has no second derivative",
    ),
    "ctc": (
        lambda: nn.Linear(4, 5),
        ctc_loss,
        torch.ones(2, 6, 4),
        r"'ctc_loss' in the training loss itself, .*line \d+",
    ),
    "cdist": (
        lambda: nn.Linear(4, 4),
        cdist_loss,
        torch.ones(2, 6, 4),
        r"'cdist' in the training loss itself, .*line \d+",
    ),
    "cdist in a module": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Sequential(Distances())),
        bag_loss,
        torch.ones(2, 6, 4),
        r"'cdist' in module '1\.0' \(Distances\), line \d+ of test_preflight",
    ),
}


@pytest.mark.parametrize("backend", ["neumann", "cg", "exact", "unrolled"])
@pytest.mark.parametrize(("build", "loss", "batch", "message"), WITHOUT.values(), ids=WITHOUT.keys())
def test_operators_without_a_second_derivative_are_named(build, loss, batch, message, backend):
    """With the module that called them, before anything was trained; and the model is as it was."""
    problem = hi.BilevelProblem(
        build(),
        hi.hyperparameter("decay", init=0.1)(loss),
        lambda model, batch: model(batch).square().mean(),
        optimizer=gradient_descent,
    )
    with assert_unchanged(problem), pytest.raises(hi.SecondDerivativeError, match=message):
        hi.hypergradient(problem, backend, training_batches=[batch], validation_batch=batch)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in problem.model.modules())


def test_preflight_draws_nothing_from_the_global_generator():
    """It tries the losses, dropout and all, and puts the generator back."""
    problem = ridge_problem(nn.Sequential(Linear(4), nn.Dropout(0.5)))
    with assert_unchanged(problem):
        preflight(problem, hi.get_backend("cg"), TRAINING, VALIDATION)


@pytest.mark.parametrize("backend", ["cg", "unrolled"])
def test_a_problem_without_hyperparameters_is_refused(backend):
    problem = hi.BilevelProblem(Linear(4), half_mean_square, half_mean_square, optimizer=gradient_descent)
    with pytest.raises(hi.ProblemError, match="at least one hyperparameter"):
        hi.hypergradient(problem, backend, training_batches=[TRAINING], validation_batch=VALIDATION)
