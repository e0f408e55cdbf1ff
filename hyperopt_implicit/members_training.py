"""Plain inner steps of many members at once, many in a row, with one look at all their losses.

A member whose loss was not finite is put back and taken through the same batches by itself, with a look at each loss,
as ``plain_training.py`` does it; the others are not touched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hyperopt_implicit.data import bytes_of
from hyperopt_implicit.hyperparameters import Value
from hyperopt_implicit.inner_loop import train_step
from hyperopt_implicit.members import Members
from hyperopt_implicit.members_batches import Generators, MembersStream, put_together
from hyperopt_implicit.members_compiled import CompiledMembers
from hyperopt_implicit.members_update import MembersOptimizer, OwnOptimizers
from hyperopt_implicit.plain_training import MOST_BATCHES, MOST_BYTES
from hyperopt_implicit.snapshot import Snapshot
from hyperopt_implicit.vectors import Params


class MembersSnapshot:
    """A copy of parameters, buffers and optimizer states of all members, and the way back for some of them."""

    def __init__(self, members: Members, optimizer: MembersOptimizer) -> None:
        self._members, self._optimizer = members, optimizer
        self._own = [Snapshot(each) for each in members.problems] if isinstance(optimizer, OwnOptimizers) else None
        self._stacks: list[Tensor] = []
        self._kept: Any = None

    @torch.no_grad()
    def take(self, members: Sequence[int] | None = None) -> None:
        """Copy the present state, over the last one; of some members where they are named."""
        if self._own is not None:
            for i in range(len(self._own)) if members is None else members:
                self._own[i].take()
            return
        live = self._live()
        if members is not None and self._stacks:
            for stack, x in zip(self._stacks, live, strict=True):
                stack[members] = x[members]
            self._kept = self._optimizer.merged(self._kept, members)
            return
        if len(self._stacks) != len(live):
            self._stacks = [x.clone() for x in live]
        else:
            torch._foreach_copy_(self._stacks, live)
        self._kept = self._optimizer.copy()

    @torch.no_grad()
    def kept(self, members: Members, optimizer: MembersOptimizer, rest: Sequence[int]) -> MembersSnapshot:
        """The same for those members who are left, in their new stacks."""
        found = MembersSnapshot(members, optimizer)
        if self._own is not None:
            found._own = [self._own[i] for i in rest]
            return found
        found._stacks = [x[list(rest)] for x in self._stacks]
        found._kept = self._optimizer.picked(self._kept, rest)
        return found

    def of(self, member: int) -> Snapshot:
        """The part of one member; it is taken with the others."""
        return _Part(self, member)

    @torch.no_grad()
    def restore(self, members: Sequence[int]) -> None:
        """Put some members back."""
        if self._own is not None:
            for i in members:
                self._own[i].restore()
            return
        for stack, before in zip(self._live(), self._stacks, strict=True):
            for i in members:
                stack[i].copy_(before[i])
        self._optimizer.put_back(self._kept, members)

    def _live(self) -> list[Tensor]:
        return [x.detach() for x in (*self._members.params.values(), *self._members.buffers.values())]


class _Part(Snapshot):
    """What a snapshot of many holds of one."""

    def __init__(self, whole: MembersSnapshot, member: int) -> None:
        self._whole, self._member = whole, member

    def take(self) -> None:
        """Nothing: the whole is taken at once."""

    def restore(self) -> None:
        self._whole.restore([self._member])


class MembersTraining:
    """Steps of the inner optimizers on the batches of the members' streams.

    Args:
        members: who is trained.
        optimizer: theirs.
        stream: of training batches.
        generators: of each member.
        compiled: a compiled form of the step, where there is one.

    Attributes:
        gone: members whose places are nobody's any more.
    """

    def __init__(
        self,
        members: Members,
        optimizer: MembersOptimizer,
        stream: MembersStream,
        generators: Generators,
        compiled: CompiledMembers | None = None,
    ) -> None:
        self._members, self._optimizer = members, optimizer
        self._stream, self._generators, self._compiled = stream, generators, compiled
        self.gone: set[int] = set()

    def take(
        self, steps: int, stacked: Params, values: Sequence[dict[str, Value]], before: MembersSnapshot
    ) -> list[list[float]]:
        """Train for so many steps; for each member, L before each.

        Args:
            steps: how many.
            stacked: the constrained hyperparameters of all members.
            values: those of each member.
            before: a snapshot of the members as they stand.
        """
        losses: list[list[float]] = [[] for _ in values]
        while len(losses[0]) < steps:
            if losses[0]:
                before = MembersSnapshot(self._members, self._optimizer)
                before.take()
            for own, more in zip(losses, self._row(steps - len(losses[0]), stacked, values, before), strict=True):
                own += more
        return losses

    def _row(
        self, steps: int, stacked: Params, values: Sequence[dict[str, Value]], before: MembersSnapshot
    ) -> list[list[float]]:
        """A row of steps, as long as it may be, with one look at their losses."""
        held: list[list[Any]] = []
        found: list[Tensor] = []
        size, failure = 0, False
        while len(held) < min(steps, MOST_BATCHES) and (size <= MOST_BYTES or not held):
            batches = self._stream.next()
            size += 0 if self._stream.is_resident else sum(map(bytes_of, batches))
            held.append(batches)
            if not failure:
                try:
                    found.append(self._step(batches, stacked))
                except Exception:  # of weights that are not finite any more, or of the loss: each member alone shows it
                    failure = True
                    steps = len(held)
        numbers = torch.stack(found).tolist() if found else []
        losses = [[row[i] for row in numbers] for i in range(len(values))]
        for i, own in enumerate(losses):
            if i not in self.gone and (failure or not all(map(math.isfinite, own))):
                losses[i] = self._alone(i, held, values[i], before)
        return losses

    def _step(self, batches: list[Any], stacked: Params) -> Tensor:
        members, parts = self._members, put_together(batches)
        ready = None if self._compiled is None else self._compiled.step(parts, stacked)
        if ready is not None:
            self._optimizer.step(dict(zip(members.params, ready[1], strict=True)))
            return ready[0]
        hparams = {name: x.detach() for name, x in members.hparams.items()}
        losses = members.training_losses(members.params, hparams, parts, members.buffers, values=stacked)
        params = list(members.params.values())
        found = torch.autograd.grad(losses.sum(), params, allow_unused=True)
        self._optimizer.step(dict(zip(members.params, found, strict=True)))
        return losses.detach()

    def _alone(
        self, member: int, held: list[list[Any]], values: dict[str, Value], before: MembersSnapshot
    ) -> list[float]:
        """The same steps of one member from the same start, with a look at each loss."""
        before.restore([member])
        problem = self._members.problems[member]
        self._optimizer.release(member)
        with self._generators.of(member):
            losses = [train_step(problem, batches[member], values) for batches in held]
        self._optimizer.adopt(member)
        return losses
