"""How ``auto`` tells batches apart, knows the same rows in another order, and asks whether there are more."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import hyperopt_implicit as hi
from hyperopt_implicit.survey import (
    alike,
    contents,
    fingerprint,
    has_more_batches,
)
from hyperopt_implicit.testing.specimens import TRAINING, VALIDATION, ridge_problem


def generated(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------- batches told apart

X = generated(30, 4)
SWAPPED = X[[1, 0, *range(2, 30)]]


class Record:
    """A batch of somebody's own type."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.name = x, "record"

    def to(self, device: torch.device) -> Record:
        return self


@pytest.mark.parametrize(
    ("batch", "other"),
    [
        (X, X + 1e-9),
        (X, SWAPPED),
        (X, X[:29]),
        (X, X.reshape(-1)[torch.randperm(120, generator=torch.Generator().manual_seed(0))].reshape(30, 4)),
        ((X, X[:3]), (X[:3], X)),
        ([X, SWAPPED], [SWAPPED, X]),
        ({"a": {"b": X, "c": [1]}}, {"a": {"b": SWAPPED, "c": [1]}}),
        ({"a": {"b": X, "c": [1]}}, {"a": {"b": X, "c": [2]}}),
        ((X, 3), (X, 4)),
        ((X, 0.5), (X, 0.25)),
        (torch.arange(40), torch.arange(40).flip(0)),
        (torch.tensor([True, False]), torch.tensor([False, True])),
        (generated(100_000), generated(100_000, seed=1)),
        (["a", "b"], ["b", "a"]),
        ((b"ab",), (b"ba",)),
        (X.numpy(), SWAPPED.numpy()),
        (Record(X), Record(SWAPPED)),
        (X.to_sparse(), SWAPPED.to_sparse()),
        (torch.complex(X, X), torch.complex(X, SWAPPED)),
    ],
)
def test_batches_that_differ(batch, other):
    assert fingerprint(batch) != fingerprint(other)


@pytest.mark.parametrize(
    "make",
    [
        lambda: X.clone(),
        lambda: (X.clone(), {"a": [3, 0.5, None, "text", True]}),
        lambda: torch.tensor([math.nan, 1.0, math.inf, -math.inf]),
        lambda: torch.zeros(0, 3),
        lambda: Record(X.clone()),
        lambda: np.arange(5),
        lambda: np.array([None, "x"], dtype=object),
        lambda: X.t().contiguous().t(),
        lambda: None,
    ],
)
def test_batches_that_are_the_same(make):
    """Whatever memory they are in; missing values included."""
    found = fingerprint([make(), make()])
    assert found == fingerprint([make(), make()])
    assert all(type(x) is float and math.isfinite(x) for x in found)


def test_a_fingerprint_costs_little_and_changes_nothing():
    """A few hundred entries of a tensor are looked at, whatever its size; integers count as they are."""
    batch = torch.arange(1_000_000, dtype=torch.int32)
    before = batch.clone()
    weights = torch.arange(1, 514, dtype=torch.float64).sqrt()
    size, total = fingerprint(batch)
    assert size == 1e6 and total == pytest.approx(float(weights[: len(batch[::1953])] @ batch[::1953].double()))
    assert torch.equal(batch, before)


ORDER = torch.randperm(30, generator=torch.Generator().manual_seed(3))
ONE_HOT = torch.eye(6)


@pytest.mark.parametrize(
    "make",
    [
        lambda order: X[order],
        lambda order: (X[order], torch.arange(30)[order]),
        lambda order: {"x": 1e6 + X[order], "kind": torch.eye(5, dtype=torch.bool)[torch.arange(30) % 5][order]},
        lambda order: torch.complex(X, 2.0 * X)[order],
        lambda order: [f"row {i}" for i in order.tolist()],
        lambda order: [(i, 0.5 * i) for i in order.tolist()],
        lambda order: Record(X[order]),
        lambda order: X[order].numpy(),
        lambda order: torch.where(X > 2.0, math.nan, X)[order],
        lambda order: (torch.zeros(0, 3), torch.tensor(3.0), None),
    ],
)
def test_the_same_rows_in_another_order(make):
    found = contents(make(ORDER))
    assert alike(found, contents(make(torch.arange(30))))
    assert all(type(x) is float and math.isfinite(x) for x in found)


@pytest.mark.parametrize(
    ("batch", "other"),
    [
        (X, X[:29]),
        (X, torch.cat([X[:29], X[:1]])),
        (X, X + 1e-6),
        (ONE_HOT[[0, 1]], ONE_HOT[[2, 3]]),
        (X[:2].sign(), X[2:4].sign()),
        ((X, 3), (X, 4)),
        ([1, 2], [0, 3]),
        ([2, 3], [2, 4]),
        (["a", "b"], ["a", "c"]),
        (torch.tensor([1, 4]), torch.tensor([2, 3])),
        ((X, torch.ones(30)), (X, torch.zeros(30))),
        ([X], [X, X]),
    ],
)
def test_other_rows(batch, other):
    """Rows that are one-hot, or standardised, have the same sums of entries and of squares."""
    assert not alike(contents(batch), contents(other))


# ---------------------------------------------------------------------------------------------------- is there more?


class Endless(IterableDataset):
    def __iter__(self):
        return iter([X])


def data(**given: object) -> hi.BilevelProblem:
    problem = ridge_problem()
    problem.training_data, problem.validation_data = given.get("training"), given.get("validation")
    return problem


ROWS = TensorDataset(X)


@pytest.mark.parametrize(
    ("training", "validation", "given", "more"),
    [
        (None, None, 1, False),
        ([TRAINING], [VALIDATION], 1, False),
        ([TRAINING] * 2, [VALIDATION], 1, True),
        ([TRAINING] * 2, [VALIDATION], 2, False),
        ([TRAINING] * 2, [VALIDATION], 3, True),
        ([TRAINING] * 2, [VALIDATION], 4, False),
        ([TRAINING] * 3, None, 4, True),
        ([TRAINING] * 3, None, 6, False),
        ([TRAINING] * 3, None, 2, True),
        ([TRAINING], [VALIDATION] * 2, 1, False),
        ([TRAINING] * 2, [VALIDATION] * 2, 2, False),
        (None, [VALIDATION] * 2, 1, False),
        (DataLoader(ROWS, batch_size=30), None, 1, False),
        (DataLoader(ROWS, batch_size=10, shuffle=True), None, 1, True),
        (DataLoader(ROWS, batch_size=10, shuffle=True), None, 3, False),
        (DataLoader(Endless(), batch_size=None), None, 1, True),
    ],
)
def test_whether_there_are_more_batches(training, validation, given, more):
    problem = data(training=training, validation=validation)
    assert has_more_batches(problem, [None] * given) is more
