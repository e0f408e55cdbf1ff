"""What a step is differentiated with: the last steps alone, random masks, running statistics."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hyperopt_implicit as hi
from hyperopt_implicit.testing.assertions import same
from hyperopt_implicit.testing.oracles import finite_differences, unrolled_hypergradient
from hyperopt_implicit.testing.specimens import network_problem, ridge_problem, seeded
from hyperopt_implicit_backends import Unrolled

from .test_optimizers import (
    BATCHES,
    OPTIMIZERS,
    VALIDATION,
    assert_each_close,
    assert_same_state,
    hypergradient,
    make_problem,
    train,
)

pytestmark = pytest.mark.usefixtures("float64")

# ------------------------------------------------------------------------------------------------ the last steps


@pytest.mark.parametrize("optimizer", [row for row in OPTIMIZERS if row.name in ("sgd momentum", "adam")], ids=str)
@pytest.mark.parametrize("last", [1, 2, 5])
def test_last_differentiates_the_last_steps(optimizer, last):
    """It is the whole derivative of a run that begins where the last steps do."""
    problem, later = make_problem(optimizer, lr=0.05), make_problem(optimizer, lr=0.05)
    train(later, BATCHES[:-last])
    with pytest.warns(hi.HyperoptWarning, match="wrong sign or a fraction of its size"):
        result = hypergradient(problem, Unrolled(last=last))
    expected = hypergradient(later, batches=BATCHES[-last:])
    assert_each_close(result.gradients, expected.gradients, 1e-11)
    assert (result.status, result.iterations, result.hvps) == (hi.Status.TRUNCATED, last, last)
    assert_same_state(result.endpoint, expected.endpoint)


def test_last_of_as_many_steps_as_there_are():
    problem = make_problem(torch.optim.Adam)
    result, whole = hypergradient(problem, Unrolled(last=len(BATCHES))), hypergradient(problem)
    assert same(result.gradients, whole.gradients)
    assert (result.status, result.iterations) == (hi.Status.CONVERGED, len(BATCHES))


def test_last_of_more_steps_than_there_are_is_refused():
    with pytest.raises(hi.BackendError) as caught:
        hypergradient(make_problem(torch.optim.Adam), Unrolled(last=7))
    assert str(caught.value) == (
        "last must be at most the number of inner steps; last=7 was asked for, of 6. Lower it, train for more inner "
        "steps between outer steps, or leave it out to differentiate all of them."
    )


# ------------------------------------------------------------------------------------------------ layers with state


def test_dropout_is_replayed_with_the_masks_of_the_first_sweep():
    """Against one long graph under the same seed, and against differences of real runs under it."""
    problem = network_problem(seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))))
    start = problem.inner_state()

    def run() -> float:
        problem.load_inner_state(start)
        torch.manual_seed(1)
        train(problem, BATCHES)
        return float(problem.validation_loss(VALIDATION))

    torch.manual_seed(1)
    result = hypergradient(problem)
    torch.manual_seed(1)
    expected = unrolled_hypergradient(problem, BATCHES, VALIDATION)
    assert_each_close(result.gradients, expected, 1e-11)
    assert_each_close(result.gradients, finite_differences(run, problem.hparams), 1e-6)
    run()
    assert_same_state(result.endpoint, problem.inner_state())


def test_random_numbers_go_on_where_training_left_them():
    """The backward sweep replays draws; the global generator ends where plain training would have left it."""
    problem = ridge_problem(nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.5)))
    torch.manual_seed(1)
    hypergradient(problem)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    train(problem, BATCHES)
    assert torch.equal(after, torch.get_rng_state())


@pytest.mark.parametrize("in_place", [True, False])
def test_running_statistics_move_along_the_trajectory_only(in_place):
    """Changed in place (BatchNorm) or replaced (a hand-written average); in the copy, never in the model."""
    layer = nn.BatchNorm1d(2) if in_place else RunningMean()
    problem = network_problem(seeded(lambda: nn.Sequential(nn.Linear(3, 2), layer, nn.Tanh(), nn.Linear(2, 1))))
    before = problem.inner_state()
    result = hypergradient(problem)
    assert_same_state(problem.inner_state(), before, 0.0)
    assert_each_close(result.gradients, unrolled_hypergradient(problem, BATCHES, VALIDATION), 1e-11)
    train(problem, BATCHES)
    assert_same_state(result.endpoint, problem.inner_state())
    assert result.validation_loss == pytest.approx(float(problem.validation_loss(VALIDATION)), rel=1e-12)


class RunningMean(nn.Module):
    """Subtracts a running mean that it assigns anew."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
        return x - self.mean
