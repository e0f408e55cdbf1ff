"""What ``check`` and ``compare`` are run on: steps of warm-up, batches, and counts that hold."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from hyperopt_implicit.argument_checks import check_list, check_seed, shown
from hyperopt_implicit.data import to_device
from hyperopt_implicit.errors import HyperoptError, ProblemError
from hyperopt_implicit.inner_loop import train_step
from hyperopt_implicit.problem import BilevelProblem, check_problem

MOST_BATCHES = 16


@contextmanager
def warmed_up(problem: BilevelProblem, steps: int, seed: int) -> Iterator[BilevelProblem]:
    """A copy of the problem after plain training steps; inside, torch draws from the seed."""
    check_problem(problem)
    check_seed(seed)
    start = problem.copy()
    with torch.random.fork_rng(devices=[problem.device] if problem.device.type == "cuda" else []):
        torch.manual_seed(seed)
        if steps:
            stream, values = start.stream("training_data"), start.hyperparameters.values()
            for _ in range(steps):
                train_step(start, stream.next(), values)
        yield start


def batches_of(problem: BilevelProblem, role: str, given: Sequence[Any] | None, count: int | None) -> list[Any]:
    """The batches given, or else the first ``count`` of the problem's data, or else one pass of it, cut at sixteen.

    Raises:
        ProblemError: none were given and the problem has no data, or the list is empty.
    """
    if given is not None:
        check_list(role.replace("data", "batches"), given, "batches", ProblemError)
        if len(given) == 0:
            raise ProblemError(f"{role.replace('data', 'batches')} must hold at least one batch; it is empty.")
        return [to_device(batch, problem.device) for batch in given]
    stream = problem.stream(role)
    if count is not None:
        return stream.take(count)
    data = problem.training_data if role == "training_data" else problem.validation_data
    assert data is not None
    return [to_device(batch, problem.device) for batch in itertools.islice(iter(data), MOST_BATCHES)]


def check_count(name: str, value: Any, least: int) -> None:
    """Refuse what is no whole number of at least ``least``.

    Raises:
        HyperoptError: with the option, what it must be and what it is.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise HyperoptError(f"{name} must be a whole number of at least {least}; got {value!r}.")


def check_seconds(name: str, value: Any) -> None:
    """Refuse what is no time.

    Raises:
        HyperoptError: with what it is.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise HyperoptError(f"{name} must be a number of seconds; got {shown(value)}.")
