"""One update of the optimizers of many members: vectorised where the update is known, each by its own elsewhere.

The optimizers' state lives in the members' own ``optimizer.state``, as slices of stacks, so that each of them could go
on by itself at any time. What the updates are, is told in torch.optim's own documentation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hyperopt_implicit.members import column, point
from hyperopt_implicit.optimizers import scalar_dtype
from hyperopt_implicit.vectors import Params

Found = dict[str, Tensor | None]
"""The gradient of each parameter, of all members; None where the loss does not depend on it."""

Coefficient = float | Tensor


class MembersOptimizer(ABC):
    """The optimizers of all members, one each.

    Args:
        optimizers: alike but for numbers.
        owned: the parameters of each member, by name, in the order of ``stacks``.
        stacks: the parameters of all members.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        owned: Sequence[Sequence[Tensor]],
        stacks: Params,
    ) -> None:
        self._optimizers, self._owned, self._stacks = list(optimizers), [list(each) for each in owned], stacks
        places = {id(p): name for p, name in zip(owned[0], stacks, strict=True)}
        self._names = [
            [places[id(p)] for p in group["params"] if id(p) in places] for group in optimizers[0].param_groups
        ]

    @abstractmethod
    def step(self, gradients: Found) -> None:
        """One update of all members."""

    def adopt(self, member: int) -> None:  # noqa: B027  (nothing to do where there are no stacks)
        """Take over what a member's own optimizer has come to keep by itself."""

    def tensors(self) -> list[Tensor]:
        """The stacks of what is kept."""
        return []

    def _options(self, group: int, key: str) -> list[float]:
        return [float(optimizer.param_groups[group][key]) for optimizer in self._optimizers]


class OwnOptimizers(MembersOptimizer):
    """Any optimizer: each member's own one, on its slices."""

    def step(self, gradients: Found) -> None:
        for i, (optimizer, params) in enumerate(zip(self._optimizers, self._owned, strict=True)):
            for p, grad in zip(params, gradients.values(), strict=True):
                p.grad = None if grad is None else grad[i].detach()
            optimizer.step()
            for p in params:
                p.grad = None


class _Vectorised(MembersOptimizer):
    """What the vectorised updates have in common: a stack for each slot of each parameter, zero where there is none yet."""

    slots: tuple[str, ...] = ()

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        owned: Sequence[Sequence[Tensor]],
        stacks: Params,
    ) -> None:
        super().__init__(optimizers, owned, stacks)
        self._kept: dict[str, Params] = {}
        self._known: dict[tuple[int, str], tuple[list[float], Coefficient]] = {}
        for i, name in enumerate(stacks):
            rows = [optimizer.state.get(each[i], {}) for optimizer, each in zip(optimizers, self._owned, strict=True)]
            if any(rows):
                self._begin(name, rows)

    def _begin(self, name: str, rows: Sequence[dict[str, Any]]) -> Params:
        """Stacks for the slots of a parameter, from what the members keep of it."""
        stack = self._stacks[name]
        kept = self._kept[name] = {key: torch.zeros_like(stack, requires_grad=False) for key in self.slots}
        for i, row in enumerate(rows):
            self._fill(kept, i, row)
        self._point(name)
        return kept

    def _fill(self, kept: Params, member: int, row: dict[str, Any]) -> None:
        for key, stack in kept.items():
            value = row.get(key)
            stack[member].zero_() if value is None else stack[member].copy_(value)

    def _point(self, name: str) -> None:
        """Make the members' states slices of the stacks."""
        i = list(self._stacks).index(name)
        for key, stack in self._kept[name].items():
            for row, optimizer, params in zip(stack.unbind(0), self._optimizers, self._owned, strict=True):
                optimizer.state[params[i]][key] = row

    @torch.no_grad()
    def adopt(self, member: int) -> None:
        for i, name in enumerate(self._stacks):
            row = self._optimizers[member].state.get(self._owned[member][i], {})
            if name in self._kept:
                self._fill(self._kept[name], member, dict(row))
                self._point(name)
            elif row:
                rows: list[dict[str, Any]] = [{} for _ in self._optimizers]
                rows[member] = dict(row)
                self._begin(name, rows)

    def tensors(self) -> list[Tensor]:
        return [x for kept in self._kept.values() for x in kept.values()]

    def _coefficient(self, group: int, key: str, of: Callable[[dict[str, Any]], float]) -> Coefficient:
        """A number of the options: one for all members where they have the same, or a tensor of one for each."""
        numbers = [of(optimizer.param_groups[group]) for optimizer in self._optimizers]
        known = self._known.get((group, key))
        if known is None or known[0] != numbers:
            known = numbers, _merged(numbers, next(iter(self._stacks.values())))
            self._known[group, key] = known
        return known[1]


class MembersDescent(_Vectorised):
    """torch.optim.SGD."""

    slots = ("momentum_buffer",)

    @torch.no_grad()
    def step(self, gradients: Found) -> None:
        for i, names in enumerate(self._names):
            first = self._optimizers[0].param_groups[i]
            rate = self._coefficient(i, "lr", lambda group: float(group["lr"]))
            decay = self._coefficient(i, "weight_decay", lambda group: float(group["weight_decay"]))
            momentum = self._coefficient(i, "momentum", lambda group: float(group["momentum"]))
            fresh = self._coefficient(i, "fresh", lambda group: 1.0 - float(group["dampening"]))
            for name in names:
                gradient, p = gradients[name], self._stacks[name].detach()
                if gradient is None:
                    continue
                direction = gradient.neg() if first["maximize"] else gradient
                direction = _added(direction, p, decay)
                if first["momentum"]:
                    buffer = self._moved(name, direction, momentum, fresh)
                    direction = _added(direction, buffer, momentum) if first["nesterov"] else buffer
                _add_(p, direction, rate, -1.0)

    def _moved(self, name: str, direction: Tensor, momentum: Coefficient, fresh: Coefficient) -> Tensor:
        """The buffer after this step: the direction itself where there was none."""
        if name not in self._kept:
            self._begin(name, [{} for _ in self._optimizers])
            self._empty(name)
        buffer = self._kept[name]["momentum_buffer"]
        buffer.mul_(_shaped(momentum, buffer))
        blank = self._blank.pop(name, None)
        if blank is not None and not (isinstance(fresh, float) and fresh == 1.0):
            weights = torch.ones(len(self._optimizers), dtype=torch.float64, device=buffer.device) * fresh
            fresh = torch.where(torch.tensor(blank, device=buffer.device), torch.ones_like(weights), weights)
        return _add_(buffer, direction, fresh, 1.0)

    _blank: dict[str, list[bool]]

    def _begin(self, name: str, rows: Sequence[dict[str, Any]]) -> Params:
        if not hasattr(self, "_blank"):
            self._blank = {}
        found = super()._begin(name, rows)
        self._blank[name] = [row.get("momentum_buffer") is None for row in rows]
        return found

    def _empty(self, name: str) -> None:
        self._blank[name] = [True] * len(self._optimizers)

    @torch.no_grad()
    def adopt(self, member: int) -> None:
        empty = [
            self._optimizers[member].state.get(p, {}).get("momentum_buffer") is None for p in self._owned[member]
        ]
        super().adopt(member)
        for name, is_empty in zip(self._stacks, empty, strict=True):
            if name in self._kept:
                blank = self._blank.setdefault(name, [False] * len(self._optimizers))
                blank[member] = is_empty


class MembersAdam(_Vectorised):
    """torch.optim.Adam and AdamW."""

    slots = ("exp_avg", "exp_avg_sq")
    _steps: Params

    def _begin(self, name: str, rows: Sequence[dict[str, Any]]) -> Params:
        if not hasattr(self, "_steps"):
            self._steps = {}
        self._steps[name] = torch.zeros(len(rows), dtype=scalar_dtype())
        for i, row in enumerate(rows):
            self._steps[name][i] = float(row.get("step", 0.0))
        return super()._begin(name, rows)

    def _point(self, name: str) -> None:
        super()._point(name)
        i = list(self._stacks).index(name)
        for row, optimizer, params in zip(self._steps[name].unbind(0), self._optimizers, self._owned, strict=True):
            optimizer.state[params[i]]["step"] = row

    def _fill(self, kept: Params, member: int, row: dict[str, Any]) -> None:
        super()._fill(kept, member, row)
        name = next(name for name, each in self._kept.items() if each is kept)
        self._steps[name][member] = float(row.get("step", 0.0))

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), *getattr(self, "_steps", {}).values()]

    @torch.no_grad()
    def step(self, gradients: Found) -> None:
        for i, names in enumerate(self._names):
            first = self._optimizers[0].param_groups[i]
            for name in names:
                if gradients[name] is not None and name not in self._kept:
                    self._begin(name, [{} for _ in self._optimizers])
            met = [name for name in names if gradients[name] is not None]
            if not met:
                continue
            corrections = self._corrections(i, met)
            beta1 = self._coefficient(i, "beta1", lambda group: float(group["betas"][0]))
            beta2 = self._coefficient(i, "beta2", lambda group: float(group["betas"][1]))
            rest = self._coefficient(i, "rest", lambda group: 1.0 - float(group["betas"][0]))
            square = self._coefficient(i, "square", lambda group: 1.0 - float(group["betas"][1]))
            decay = self._coefficient(i, "weight_decay", lambda group: float(group["weight_decay"]))
            shrink = self._coefficient(
                i, "shrink", lambda group: 1.0 - float(group["lr"]) * float(group["weight_decay"])
            )
            eps = self._coefficient(i, "eps", lambda group: float(group["eps"]))
            del beta1
            for name in met:
                gradient, p = gradients[name], self._stacks[name].detach()
                assert gradient is not None
                kept = self._kept[name]
                mean, squares = kept["exp_avg"], kept["exp_avg_sq"]
                step_size, root = corrections[name]
                direction = gradient.neg() if first["maximize"] else gradient
                if first.get("decoupled_weight_decay"):
                    p.mul_(_shaped(shrink, p))
                else:
                    direction = _added(direction, p, decay)
                mean.lerp_(direction, _shaped(rest, p))
                squares.mul_(_shaped(beta2, p))
                _add_(squares, direction * direction, square, 1.0)
                divisor = squares.sqrt().div_(_shaped(root, p)).add_(_shaped(eps, p))
                _add_(p, mean / divisor, step_size, -1.0)

    def _corrections(self, group: int, names: Sequence[str]) -> dict[str, tuple[Coefficient, Coefficient]]:
        """The step size and the root of the second correction, for each parameter; computed once where they agree."""
        found: dict[str, tuple[Coefficient, Coefficient]] = {}
        known: dict[tuple[float, ...], tuple[Coefficient, Coefficient]] = {}
        for name in names:
            self._steps[name] += 1
            steps = tuple(self._steps[name].tolist())
            if steps not in known:
                groups = [optimizer.param_groups[group] for optimizer in self._optimizers]
                sizes = [
                    float(each["lr"]) / (1.0 - float(each["betas"][0]) ** t)
                    for each, t in zip(groups, steps, strict=True)
                ]
                roots = [(1.0 - float(each["betas"][1]) ** t) ** 0.5 for each, t in zip(groups, steps, strict=True)]
                like = self._stacks[name]
                known[steps] = _merged(sizes, like), _merged(roots, like)
            found[name] = known[steps]
        return found


def members_optimizer(
    optimizers: Sequence[torch.optim.Optimizer], owned: Sequence[Sequence[Tensor]], stacks: Params
) -> MembersOptimizer:
    """The vectorised update of optimizers that are alike, where there is one; else each member's own."""
    kinds: dict[type[torch.optim.Optimizer], type[MembersOptimizer]] = {
        torch.optim.SGD: MembersDescent,
        torch.optim.Adam: MembersAdam,
        torch.optim.AdamW: MembersAdam,
    }
    found = kinds.get(type(optimizers[0]), OwnOptimizers)
    groups = optimizers[0].param_groups
    special = ("amsgrad", "capturable", "differentiable", "fused")
    if any(group.get(key) for group in groups for key in special) or any(x.is_complex() for x in stacks.values()):
        found = OwnOptimizers
    if any(optimizer.state.default_factory is None for optimizer in optimizers):
        found = OwnOptimizers
    hooked = any(
        optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks for optimizer in optimizers
    )
    return (OwnOptimizers if hooked else found)(optimizers, owned, stacks)


def _merged(numbers: list[float], like: Tensor) -> Coefficient:
    if all(x == numbers[0] for x in numbers):
        return numbers[0]
    return torch.tensor(numbers, dtype=torch.float64).to(like.device, like.dtype)


def _shaped(coefficient: Coefficient, like: Tensor) -> Any:
    return coefficient if isinstance(coefficient, float) else column(coefficient, like)


def _added(x: Tensor, y: Tensor, coefficient: Coefficient) -> Tensor:
    """x + coefficient·y."""
    if isinstance(coefficient, float):
        return x if coefficient == 0.0 else x.add(y, alpha=coefficient)
    return torch.addcmul(x, column(coefficient, y), y)


def _add_(x: Tensor, y: Tensor, coefficient: Coefficient, sign: float) -> Tensor:
    """x ← x + sign·coefficient·y."""
    if isinstance(coefficient, float):
        return x.add_(y, alpha=sign * coefficient)
    return x.addcmul_(column(coefficient, y), y, value=sign)


__all__ = ["MembersOptimizer", "members_optimizer", "point"]
