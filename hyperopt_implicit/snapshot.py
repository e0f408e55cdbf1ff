"""Copies of tensors that change, kept in memory that is allocated once and written again each time."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hyperopt_implicit.inner_state import InnerState
from hyperopt_implicit.problem import BilevelProblem

_SET_FROM_OUTSIDE = {"params", "lr", "initial_lr", "momentum", "betas", "weight_decay"}
"""Entries of an optimizer's groups that schedules and hyperparameters write; in others, some optimizers count."""
_HELD = ("buffers", "slots", "plain", "groups")


class Copies:
    """Copies of a row of tensors; new memory is taken only where the row has others than the last time.

    Attributes:
        tensors: the copies.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._kinds: list[Any] = []
        self._alike: list[list[int]] = []

    @torch.no_grad()
    def take(self, live: Sequence[Tensor]) -> None:
        """Copy the tensors as they are now."""
        kinds = [(each.shape, each.dtype, each.device) for each in live]
        if kinds != self._kinds:
            self.tensors = [each.detach().clone() for each in live]
            self._kinds = kinds
            places: dict[Any, list[int]] = {}
            for i, (_, dtype, device) in enumerate(kinds):
                places.setdefault((dtype, device), []).append(i)
            self._alike = list(places.values())  # on a GPU, one kernel copies all those of a kind
            return
        for alike in self._alike:
            torch._foreach_copy_([self.tensors[i] for i in alike], [live[i] for i in alike])


class Buffers:
    """A copy of the buffers of modules, and the way back to it."""

    def __init__(self, roots: Sequence[nn.Module]) -> None:
        self._held = [
            (each._buffers, key, buffer, buffer.clone())
            for root in roots
            for each in root.modules()
            for key, buffer in each._buffers.items()
            if buffer is not None
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Put the buffers back, those too that a module has replaced."""
        for owner, key, buffer, before in self._held:
            owner[key] = buffer.copy_(before) if buffer.shape == before.shape else before


class Snapshot:
    """A copy of parameters, buffers and the inner optimizer's state of a problem, and the way back to it.

    What the optimizer counts in its groups is part of its state; learning rates and other options that schedules and
    hyperparameters write there are not.
    """

    def __init__(self, problem: BilevelProblem) -> None:
        self._problem = problem
        self._copies = Copies()
        self._buffers: list[str] = []
        self._slots: list[list[str]] = []
        self._plain: list[dict[str, Any]] = []
        self._groups: list[dict[str, Any]] = []

    def take(self) -> None:
        """Copy the present state, over the last one."""
        live: list[Tensor] = list(self._problem.params.values())
        kept = [self._problem.optimizer.state.get(p, {}) for p in live]
        buffers = dict(self._problem.model.named_buffers())
        self._buffers = list(buffers)
        self._slots = [[key for key, x in each.items() if isinstance(x, Tensor)] for each in kept]
        self._plain = [{key: _plain(x) for key, x in each.items() if not isinstance(x, Tensor)} for each in kept]
        groups = self._problem.optimizer.param_groups
        self._groups = [{key: _plain(group[key]) for key in self._counted(group)} for group in groups]
        live += buffers.values()
        live += [each[key] for each, slots in zip(kept, self._slots, strict=True) for key in slots]
        self._copies.take(live)

    def restore(self) -> None:
        """Put the state back."""
        copies = iter(self._copies.tensors)
        params = {name: next(copies) for name in self._problem.params}
        buffers = {name: next(copies) for name in self._buffers}
        optimizer = {
            name: {key: _plain(x) for key, x in plain.items()} | {key: next(copies) for key in slots}
            for name, plain, slots in zip(params, self._plain, self._slots, strict=True)
        }
        self._problem.load_inner_state(InnerState(params, buffers, optimizer))
        for group, kept in zip(self._problem.optimizer.param_groups, self._groups, strict=True):
            for key in self._counted(group) - kept.keys():
                del group[key]
            group.update({key: _plain(x) for key, x in kept.items()})

    def state_dict(self) -> dict[str, Any]:
        """The copy, as tensors and plain values by name; shares its memory."""
        return {name: getattr(self, f"_{name}") for name in _HELD} | {"tensors": self._copies.tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Hold the copy that :meth:`state_dict` gave."""
        for name in _HELD:
            setattr(self, f"_{name}", state[name])
        self._copies.take([each.to(self._problem.device) for each in state["tensors"]])

    def _counted(self, group: dict[str, Any]) -> set[str]:
        return group.keys() - _SET_FROM_OUTSIDE - set(self._problem.hyperparameters.names("optimizer"))


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | None) else copy.deepcopy(value)
