"""Plain inner steps, many in a row, with one look at all their losses.

A step whose loss is not finite must leave the model as it was. A loop that looks at each loss before it steps waits for
the device each time. Here the steps are taken first and their losses are read together; only where one of them was not
finite, model, optimizer and generators go back to before, and the same batches are stepped through again with a look at
each. What comes out is the same, to the bit where the operations are deterministic.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from hyperopt_implicit.data import BatchStream, bytes_of
from hyperopt_implicit.distributed import largest_number, mean, several
from hyperopt_implicit.hyperparameters import Value
from hyperopt_implicit.inner_loop import begin_step, descend, train_step
from hyperopt_implicit.micro_batches import take
from hyperopt_implicit.problem import BilevelProblem
from hyperopt_implicit.randomness import random_states, set_random_states
from hyperopt_implicit.snapshot import Buffers, Snapshot

MOST_BATCHES = 64
"""Batches are held until their losses are read: so many at most,"""
MOST_BYTES = 2**28
"""and no more than this, unless it is less than ``_WORTHWHILE`` of them: then each loss is read at once."""
_WORTHWHILE = 4


class PlainTraining:
    """Steps of the inner optimizer on the batches of a stream.

    Losses are read from the device once in ``MOST_BATCHES`` steps (or ``MOST_BYTES`` of batches). After a loss that was
    not finite they are read at every step, until a row of steps has gone well.

    Attributes:
        wary: whether the last losses that were read were not all finite.
    """

    def __init__(self, problem: BilevelProblem, stream: BatchStream, accumulate: int = 1) -> None:
        self._problem = problem
        self._stream = stream
        self._accumulate = accumulate
        self.wary = False

    def take(self, steps: int, values: dict[str, Value], before: Snapshot | None = None) -> list[float]:
        """Train for so many steps; L before each. A step whose L is not finite leaves the model as it was.

        Args:
            steps: how many.
            values: the constrained hyperparameters, without a graph.
            before: a snapshot of the problem as it stands, from a caller who has one.
        """
        losses: list[float] = []
        between: Snapshot | None = None  # where a later row begins
        while len(losses) < steps:
            left = steps - len(losses)
            if self.wary or left < 2:
                losses += self._careful(left, values)
                continue
            if self._largest_size(self._stream.peek()) * self._accumulate * _WORTHWHILE > MOST_BYTES:
                losses += self._careful(1, values)
                continue
            if losses or before is None:
                before = between = between or Snapshot(self._problem)
                between.take()
            losses += self._row(left, values, before)
        return losses

    def _careful(self, steps: int, values: dict[str, Value]) -> list[float]:
        """Steps with a look at each loss."""
        losses = [train_step(self._problem, self._next(), values) for _ in range(min(steps, MOST_BATCHES))]
        self.wary = not _all_finite(losses)
        return losses

    def _row(self, steps: int, values: dict[str, Value], before: Snapshot) -> list[float]:
        """A row of steps, as long as it may be, with one look at its losses."""
        batch = self._next()
        size = most = self._largest_size(batch)
        row = _Row(self._problem, values, before)
        failure: BaseException | None = None
        try:
            row.step(batch)
            while len(row.batches) < min(steps, MOST_BATCHES) and size <= MOST_BYTES:
                batch = self._next()
                size += most if several() else self._size(batch)  # rows of all processes end at the same step
                row.step(batch, draws=not self._stream.is_list)
        except BaseException as error:
            if several():  # which wait for other numbers than the losses: the end of this process sets them free
                raise
            failure = error
        losses = row.read()
        if not _all_finite(losses):
            self.wary = True
            losses = row.again()
            if row.stepping and isinstance(failure, Exception):
                failure = None  # it came of weights that a look at each loss has now kept away
        if failure is not None:
            raise failure
        return losses

    def _next(self) -> Any:
        return take(self._stream, 1, self._accumulate)[0]

    def _largest_size(self, batch: Any) -> int:
        """The same, of the process that has the largest."""
        size = self._size(batch)
        return int(largest_number(size)) if several() and not self._stream.is_resident else size

    def _size(self, batch: Any) -> int:
        """The bytes that holding a batch takes."""
        return 0 if self._stream.is_resident else bytes_of(batch)


class _Row:
    """Steps that are taken without a look at their losses, and all that taking them again needs.

    Attributes:
        batches: those of the steps so far.
        stepping: whether a step was begun and not ended.
    """

    def __init__(self, problem: BilevelProblem, values: dict[str, Value], before: Snapshot) -> None:
        self._problem, self._values, self._before = problem, values, before
        self._networks = Buffers([value for value in values.values() if isinstance(value, nn.Module)])
        self._random: list[list[Tensor] | None] = []
        self._losses: list[Tensor] = []
        self._scaling = problem.inner_precision.state_dict()
        self.batches: list[Any] = []
        self.stepping = False

    def step(self, batch: Any, *, draws: bool = True) -> None:
        """One more step, whatever its loss is; ``draws`` where random numbers may have been drawn since the last."""
        self.stepping = True
        self._random.append(random_states(self._problem.device) if draws else None)
        self.batches.append(batch)
        loss, rest = begin_step(self._problem, batch, self._values)
        self._losses.append(loss)
        descend(self._problem, rest)
        self.stepping = False

    def read(self) -> list[float]:
        """The losses so far; among several processes, their means."""
        return mean(torch.stack(self._losses)).tolist() if self._losses else []

    def again(self) -> list[float]:
        """The same steps from the same start, with a look at each loss."""
        self._before.restore()
        self._problem.optimizer.zero_grad(set_to_none=True)
        self._networks.restore()
        self._problem.inner_precision.load_state_dict(self._scaling)
        losses = []
        for batch, states in zip(self.batches, self._random, strict=True):
            if states is not None:
                set_random_states(states, self._problem.device)
            losses.append(train_step(self._problem, batch, self._values))
        return losses


def _all_finite(losses: list[float]) -> bool:
    return all(map(math.isfinite, losses))
