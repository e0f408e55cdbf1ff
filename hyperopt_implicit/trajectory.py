"""Inner steps from the model's present state, on copies, and an adjoint carried back through them.

A :class:`Trajectory` walks forward, keeps the iterates that its plan says, in memory or on disk, and goes back to them
to differentiate one step at a time. Which iterates those are is decided in ``reversal.py``.
"""

from __future__ import annotations

import math
import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hyperopt_implicit.inner_loop import InnerSteps, Iterate
from hyperopt_implicit.problem import BilevelProblem
from hyperopt_implicit.randomness import random_states, replaying, set_random_states
from hyperopt_implicit.reversal import Action, Plan
from hyperopt_implicit.vectors import Params, is_finite


class Trajectory:
    """Inner steps from the model's present state, on copies. A context, at whose end what was kept is given up.

    A step that is taken again redraws its random numbers and starts from the same running statistics, by the same
    operations, so that it leads to the same iterate, to the bit where the operations are deterministic.

    Args:
        problem: the problem; its model, optimizer and hyperparameters are read and not changed.
        batches: one batch for each step.
        last: how many of the last steps can be differentiated; None for all.
        slots: how many iterates may be kept at a time; None for one a step.
        folder: where to keep them on disk, in a temporary directory of its own; None to keep them in memory.

    Attributes:
        plan: the steps that can be differentiated, and how.
        losses: L before each step.
        endpoint: the state after the last step.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        batches: Sequence[Any],
        last: int | None = None,
        *,
        slots: int | None = None,
        folder: str | None = None,
    ) -> None:
        self._steps = InnerSteps(problem)
        self._batches = batches
        self._hparams = {name: p.detach() for name, p in problem.hparams.items()}
        length = len(batches) if last is None else min(last, len(batches))
        self._first = len(batches) - length
        self.plan = Plan(length, min(length, slots or length))
        self._actions = self.plan.actions
        self._iterates: _Iterates = _InMemory() if folder is None else _OnDisk(folder)
        self.losses = array("d")  # a list of numbers would take more than the iterates of a small model
        self._present: Iterate | None = self._steps.start()
        self._t = 0
        try:
            self._advance(self._first)
            for action in self._actions:
                if action.kind == "reverse" or not self._may_go_on:
                    break
                self._do(action)
        except BaseException:
            self.close()
            raise
        self.endpoint = self._current.inner_state

    def __enter__(self) -> Trajectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give up the iterates that are kept."""
        self._iterates.close()

    @property
    def is_finite(self) -> bool:
        """Whether every loss and the last iterate are finite."""
        return math.isfinite(sum(self.losses)) and is_finite(self.endpoint.params)

    def pull_back(self, adjoint: Params) -> tuple[Params, int]:
        """dF/dλ through the kept steps, without the direct term, and the number of steps differentiated.

        It can be called once, on a trajectory that is finite.

        Args:
            adjoint: ∂F/∂w at the end of the trajectory.
        """
        if self._present is None:
            raise RuntimeError("a trajectory can be pulled back through once; walk it again")
        total = {name: torch.zeros_like(p) for name, p in self._hparams.items()}
        adjoints: dict[str, Tensor] = {f"w:{name}": a for name, a in adjoint.items()}
        device = self._steps.problem.device
        with replaying(random_states(device), device):
            for action in self._actions:
                if action.kind != "reverse":
                    self._do(action)
                    continue
                before = self._kept(action.at, give_up=True) if action.kept else self._current
                self._present = None
                t = self._first + action.at
                adjoints, gradient = self._steps.pull_back(t, before, self._hparams, self._batches[t], adjoints)
                del before  # not to be held while others are restored
                for name, g in gradient.items():
                    total[name] += g
        return total, self.plan.steps

    # ------------------------------------------------------------------------------------------------------ actions

    @property
    def _current(self) -> Iterate:
        if self._present is None:
            raise RuntimeError("nothing is present; restore an iterate first")
        return self._present

    @property
    def _may_go_on(self) -> bool:
        return not self.losses or math.isfinite(self.losses[-1])

    def _do(self, action: Action) -> None:
        if action.kind == "advance":
            self._advance(self._first + action.at)
        elif action.kind == "restore":
            self._present, self._t = self._kept(action.at, give_up=False), self._first + action.at
        elif self._is_model(action.at):
            self._start_random = random_states(self._steps.problem.device)
        else:
            self._iterates.put(action.at, self._current, random_states(self._steps.problem.device))

    def _is_model(self, at: int) -> bool:
        """Whether this is where the model still stands, so that no copy is needed."""
        return self._first + at == 0

    def _advance(self, to: int) -> None:
        while self._t < to and self._may_go_on:
            loss = self._steps.advance(self._t, self._current, self._hparams, self._batches[self._t])
            if self._t == len(self.losses):
                self.losses.append(loss)
            self._t += 1

    def _kept(self, at: int, *, give_up: bool) -> Iterate:
        """What was kept, with the generators as they were."""
        if self._is_model(at):
            found, random = self._steps.start(), self._start_random
        else:
            found, random = self._iterates.pop(at) if give_up else self._iterates.get(at)
        set_random_states(random, self._steps.problem.device)
        return found


class _Iterates(Protocol):
    """Iterates with the generators' states, by the number of their step."""

    def put(self, at: int, iterate: Iterate, random: list[Tensor]) -> None:
        """Keep a copy."""

    def get(self, at: int) -> tuple[Iterate, list[Tensor]]:
        """A copy."""

    def pop(self, at: int) -> tuple[Iterate, list[Tensor]]:
        """What was kept itself, which is kept no longer."""

    def close(self) -> None:
        """Keep nothing any longer."""


_Layout = tuple[list[tuple[Any, ...]], Any]
"""Size, stride, dtype and device of each tensor of an iterate, and how they are put together."""


class _InMemory:
    def __init__(self) -> None:
        self._held: dict[int, tuple[Iterate, list[Tensor]]] = {}
        self._random: list[Tensor] = []

    def put(self, at: int, iterate: Iterate, random: list[Tensor]) -> None:
        # where nothing draws, the generators' state is larger than a small model, and the same for every iterate
        if len(self._random) != len(random) or not all(map(torch.equal, self._random, random)):
            self._random = random
        self._held[at] = iterate.copy(), self._random

    def get(self, at: int) -> tuple[Iterate, list[Tensor]]:
        iterate, random = self._held[at]
        return iterate.copy(), random

    def pop(self, at: int) -> tuple[Iterate, list[Tensor]]:
        return self._held.pop(at)

    def close(self) -> None:
        self._held.clear()


class _OnDisk:
    """One file an iterate: the bytes of its tensors, one after another."""

    def __init__(self, folder: str) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="hyperopt-implicit-", dir=folder)
        self._layouts: dict[int, _Layout] = {}
        self._last: _Layout | None = None

    def put(self, at: int, iterate: Iterate, random: list[Tensor]) -> None:
        scaling = [] if iterate.scaling is None else [iterate.scaling]
        held = (iterate.params, iterate.slots, iterate.buffers, scaling, random)
        tensors, structure = pytree.tree_flatten(held)
        tensors = [_dense(x) for x in tensors]
        layout = [(x.size(), x.stride(), x.dtype, x.device) for x in tensors], structure
        if layout != self._last:
            self._last = layout
        self._layouts[at] = self._last
        with self._file(at).open("wb") as file:
            for x in tensors:
                file.write(_bytes(x.cpu()))

    def get(self, at: int) -> tuple[Iterate, list[Tensor]]:
        kinds, structure = self._layouts[at]
        tensors = []
        with self._file(at).open("rb") as file:
            for size, stride, dtype, device in kinds:
                x = torch.empty_strided(size, stride, dtype=dtype)
                file.readinto(_bytes(x))
                tensors.append(x.to(device))
        params, slots, buffers, scaling, random = pytree.tree_unflatten(tensors, structure)
        return Iterate(params, slots, buffers, *scaling), random

    def pop(self, at: int) -> tuple[Iterate, list[Tensor]]:
        found = self.get(at)
        self._file(at).unlink()
        del self._layouts[at]
        return found

    def close(self) -> None:
        self._layouts.clear()
        self._directory.cleanup()

    def _file(self, at: int) -> Path:
        return Path(self._directory.name) / str(at)


def _dense(x: Tensor) -> Tensor:
    """The tensor, or a copy, whose storage holds its elements and nothing else; in the same order where it can be."""
    return x if x.untyped_storage().nbytes() == x.numel() * x.element_size() else x.clone()


def _bytes(x: Tensor) -> Any:
    """The memory of a dense tensor, to be read or written."""
    return torch.empty(0, dtype=torch.uint8).set_(x.detach().untyped_storage()).numpy()
