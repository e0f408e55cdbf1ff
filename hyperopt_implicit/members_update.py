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

from hyperopt_implicit.members import column
from hyperopt_implicit.optimizers import scalar_dtype
from hyperopt_implicit.vectors import Params

Found = dict[str, Tensor | None]
"""The gradient of each parameter, of all members; None where the loss does not depend on it."""

Coefficient = float | Tensor

_FLAGS = ("nesterov", "maximize", "amsgrad", "decoupled_weight_decay")


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
        self._gone: set[int] = set()
        places = {id(p): name for p, name in zip(owned[0], stacks, strict=True)}
        self._names = [
            [places[id(p)] for p in group["params"] if id(p) in places] for group in optimizers[0].param_groups
        ]

    @abstractmethod
    def step(self, gradients: Found) -> None:
        """One update of all members."""

    def release(self, member: int) -> None:  # noqa: B027  (nothing to do where there are no stacks)
        """Before a member's own optimizer steps by itself: leave it nothing that it has not come to keep."""

    def adopt(self, member: int) -> None:  # noqa: B027
        """Take over what a member's own optimizer has come to keep by itself."""

    def copy(self) -> Any:
        """A copy of all that is kept."""
        return None

    def put_back(self, copy: Any, members: Sequence[int]) -> None:  # noqa: B027
        """What some members kept when :meth:`copy` was called."""

    def picked(self, copy: Any, members: Sequence[int]) -> Any:
        """The part of a copy that belongs to some members."""
        return copy

    def merged(self, copy: Any, members: Sequence[int]) -> Any:
        """A copy that is new for some members, and as it was for the others."""
        return copy

    def free(self, member: int) -> None:
        """Give a member that leaves memory of its own; what happens in its place is nobody's from here on."""
        self._gone.add(member)
        state = self._optimizers[member].state
        for p in self._owned[member]:
            if p in state:
                state[p] = {key: x.clone() if isinstance(x, Tensor) else x for key, x in state[p].items()}


class OwnOptimizers(MembersOptimizer):
    """Any optimizer: each member's own one, on its slices."""

    def step(self, gradients: Found) -> None:
        for i, (optimizer, params) in enumerate(zip(self._optimizers, self._owned, strict=True)):
            if i in self._gone:
                continue
            for p, grad in zip(params, gradients.values(), strict=True):
                p.grad = None if grad is None else grad[i].detach()
            optimizer.step()
            for p in params:
                p.grad = None


class _Vectorised(MembersOptimizer):
    """What the vectorised updates have in common.

    A slot is a stack, zero for members that keep nothing there yet: they are marked in ``_blank``. Step counters are
    slots of one number.
    """

    slots: tuple[str, ...] = ()
    counter: str | None = None

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        owned: Sequence[Sequence[Tensor]],
        stacks: Params,
    ) -> None:
        super().__init__(optimizers, owned, stacks)
        self._index = {name: i for i, name in enumerate(stacks)}
        self._kept: dict[str, Params] = {}
        self._blank: dict[str, list[bool]] = {}
        self._known: dict[tuple[int, str], tuple[list[float], Coefficient]] = {}
        for name in stacks:
            if any(self._states(name)):
                self._begin(name)

    def _states(self, name: str) -> list[dict[str, Any]]:
        """What each member's own optimizer keeps of a parameter."""
        i = self._index[name]
        return [
            optimizer.state.get(params[i], {}) for optimizer, params in zip(self._optimizers, self._owned, strict=True)
        ]

    @torch.no_grad()
    def _begin(self, name: str) -> None:
        """Stacks for the slots of a parameter, from what the members keep of it."""
        stack, states = self._stacks[name], self._states(name)
        self._kept[name] = {key: torch.zeros_like(stack, requires_grad=False) for key in self.slots}
        if self.counter is not None:
            self._kept[name][self.counter] = torch.zeros(len(states), dtype=scalar_dtype())
        self._blank[name] = [True] * len(states)
        for i in range(len(states)):
            self._fill(name, i, states[i])
        self._point(name)

    def _fill(self, name: str, member: int, state: dict[str, Any]) -> None:
        self._blank[name][member] = state.get(self.slots[0]) is None
        for key, stack in self._kept[name].items():
            value = state.get(key)
            if value is None:
                stack[member].zero_()
            else:
                stack[member].copy_(torch.as_tensor(value))

    def _point(self, name: str) -> None:
        """Make the members' states slices of the stacks."""
        i = self._index[name]
        for key, stack in self._kept[name].items():
            for j, row in enumerate(stack.unbind(0)):
                if j not in self._gone:
                    self._optimizers[j].state[self._owned[j][i]][key] = row

    def release(self, member: int) -> None:
        for name, blank in self._blank.items():
            if blank[member]:
                self._optimizers[member].state.pop(self._owned[member][self._index[name]], None)

    @torch.no_grad()
    def adopt(self, member: int) -> None:
        for name in self._stacks:
            state = dict(self._states(name)[member])
            if name in self._kept:
                self._fill(name, member, state)
                self._point(name)
            elif state:
                self._begin(name)

    @torch.no_grad()
    def copy(self) -> Any:
        kept = {name: {key: x.clone() for key, x in each.items()} for name, each in self._kept.items()}
        return kept, {name: list(each) for name, each in self._blank.items()}

    @torch.no_grad()
    def put_back(self, copy: Any, members: Sequence[int]) -> None:
        before, blank = copy
        for name, kept in self._kept.items():
            for i in members:
                self._blank[name][i] = blank[name][i] if name in blank else True
                for key, stack in kept.items():
                    if name in before:
                        stack[i].copy_(before[name][key][i])
                    else:
                        stack[i].zero_()

    @torch.no_grad()
    def picked(self, copy: Any, members: Sequence[int]) -> Any:
        kept, blank = copy
        rows = list(members)
        return (
            {name: {key: x[rows] for key, x in each.items()} for name, each in kept.items()},
            {name: [each[i] for i in rows] for name, each in blank.items()},
        )

    @torch.no_grad()
    def merged(self, copy: Any, members: Sequence[int]) -> Any:
        kept, blank = self.copy()
        before, was_blank = copy
        for name, each in kept.items():
            for i in set(range(len(self._optimizers))) - set(members):
                blank[name][i] = was_blank[name][i] if name in was_blank else True
                for key, x in each.items():
                    x[i] = before[name][key][i] if name in before else 0.0
        return kept, blank

    def _coefficient(self, group: int, key: str, of: Callable[[dict[str, Any]], float]) -> Coefficient:
        """A number of the options: one for all members where they have the same, or a tensor of one for each."""
        numbers = [of(optimizer.param_groups[group]) for optimizer in self._optimizers]
        known = self._known.get((group, key))
        if known is None or known[0] != numbers:
            known = numbers, merged(numbers, next(iter(self._stacks.values())))
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
                direction = _added(gradient.neg() if first["maximize"] else gradient, p, decay)
                if first["momentum"]:
                    buffer = self._moved(name, direction, momentum, fresh)
                    direction = _added(direction, buffer, momentum) if first["nesterov"] else buffer
                _add_(p, direction, rate, -1.0)

    def _moved(self, name: str, direction: Tensor, momentum: Coefficient, fresh: Coefficient) -> Tensor:
        """The buffer after this step: the direction itself where there was none."""
        if name not in self._kept:
            self._begin(name)
        buffer, blank = self._kept[name]["momentum_buffer"], self._blank[name]
        if any(blank):
            weights = torch.ones(len(blank), dtype=direction.dtype, device=direction.device) * fresh
            fresh = weights.masked_fill(torch.tensor(blank, device=direction.device), 1.0)
            self._blank[name] = [False] * len(blank)
        return _add_(buffer.mul_(_shaped(momentum, buffer)), direction, fresh, 1.0)


class MembersAdam(_Vectorised):
    """torch.optim.Adam and AdamW."""

    slots = ("exp_avg", "exp_avg_sq")
    counter = "step"

    @torch.no_grad()
    def step(self, gradients: Found) -> None:
        for i, names in enumerate(self._names):
            met = [name for name in names if gradients[name] is not None]
            for name in met:
                if name not in self._kept:
                    self._begin(name)
            corrections = self._corrections(i, met)
            first = self._optimizers[0].param_groups[i]
            rest = self._coefficient(i, "rest", lambda group: 1.0 - float(group["betas"][0]))
            kept = self._coefficient(i, "kept", lambda group: float(group["betas"][1]))
            square = self._coefficient(i, "square", lambda group: 1.0 - float(group["betas"][1]))
            decay = self._coefficient(i, "weight_decay", lambda group: float(group["weight_decay"]))
            shrink = self._coefficient(
                i, "shrink", lambda group: 1.0 - float(group["lr"]) * float(group["weight_decay"])
            )
            eps = self._coefficient(i, "eps", lambda group: float(group["eps"]))
            for name in met:
                gradient, p = gradients[name], self._stacks[name].detach()
                assert gradient is not None
                mean, squares = self._kept[name]["exp_avg"], self._kept[name]["exp_avg_sq"]
                step_size, root = corrections[name]
                direction = gradient.neg() if first["maximize"] else gradient
                if not first.get("decoupled_weight_decay"):
                    direction = _added(direction, p, decay)
                elif not (isinstance(shrink, float) and shrink == 1.0):
                    p.mul_(_shaped(shrink, p))
                mean.lerp_(direction, _shaped(rest, p))
                _add_(squares.mul_(_shaped(kept, p)), direction * direction, square, 1.0)
                divisor = squares.sqrt().div_(_shaped(root, p)).add_(_shaped(eps, p))
                _add_(p, mean / divisor, step_size, -1.0)

    def _corrections(self, group: int, names: Sequence[str]) -> dict[str, tuple[Coefficient, Coefficient]]:
        """The step size and the root of the second correction, for each parameter; computed once where they agree."""
        groups = [optimizer.param_groups[group] for optimizer in self._optimizers]
        found: dict[str, tuple[Coefficient, Coefficient]] = {}
        known: dict[tuple[float, ...], tuple[Coefficient, Coefficient]] = {}
        for name in names:
            self._kept[name]["step"] += 1
            self._blank[name] = [False] * len(groups)
            steps = tuple(self._kept[name]["step"].tolist())
            if steps not in known:
                rows = list(zip(groups, steps, strict=True))
                sizes = [float(each["lr"]) / (1.0 - float(each["betas"][0]) ** t) for each, t in rows]
                roots = [(1.0 - float(each["betas"][1]) ** t) ** 0.5 for each, t in rows]
                known[steps] = merged(sizes, self._stacks[name]), merged(roots, self._stacks[name])
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
    kinds_of_member = [
        (
            type(each),
            [[group.get(key) for key in _FLAGS] + [bool(group.get("momentum"))] for group in each.param_groups],
        )
        for each in optimizers
    ]
    if (
        any(each != kinds_of_member[0] for each in kinds_of_member)
        or any(group.get(key) for group in groups for key in special)
        or any(x.is_complex() for x in stacks.values())
        or any(each._optimizer_step_pre_hooks or each._optimizer_step_post_hooks for each in optimizers)
    ):
        found = OwnOptimizers
    return found(optimizers, owned, stacks)


def merged(numbers: list[float], like: Tensor) -> Coefficient:
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
