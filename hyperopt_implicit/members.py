"""Problems of one kind side by side: each tensor of theirs is a slice of one stack, and their losses one computation.

The members stay what they are: their parameters, buffers and hyperparameters point into the stacks, so that whatever is
done to a stack has happened to each of them. How they are trained is in ``members_training.py``, how they are
differentiated in ``members_curvature.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions.transforms import (
    CatTransform,
    ComposeTransform,
    IndependentTransform,
    StackTransform,
    Transform,
)

from hyperopt_implicit.errors import HyperoptError
from hyperopt_implicit.hyperparameters import Declaration, Value, marked_where_lost
from hyperopt_implicit.members_batches import Part
from hyperopt_implicit.problem import BilevelProblem, evaluating
from hyperopt_implicit.vectors import Params


class UnvectorisableError(HyperoptError):
    """Why members cannot be one computation, in a sentence; becomes a note in ``population.py``."""


class Members:
    """Problems that differ in the values of their tensors only, with those tensors in stacks.

    Args:
        problems: at least one; their tensors are made to point into the stacks.

    Attributes:
        problems: the members, in order.
        params: w of all of them, by name; leaves of a graph, with a leading axis over the members.
        hparams: λ of all of them, the same.
        buffers: the buffers of the models that are not shared between members.
    """

    def __init__(self, problems: Sequence[BilevelProblem]) -> None:
        self.problems = list(problems)
        self._stack()

    def __len__(self) -> int:
        return len(self.problems)

    @property
    def device(self) -> torch.device:
        """Where the members are."""
        return self.problems[0].device

    def _stack(self) -> None:
        rows = _tensors(self.problems)
        trained = {f"model.{name}" for name in self.problems[0].params}
        tuned = {f"hyperparameters.{name}" for name in self.problems[0].hparams}
        self.params, self.hparams, self.buffers = {}, {}, {}
        self._frozen: Params = {}
        self._dims: dict[str, int | None] = {}
        for name, (tensors, is_buffer) in rows.items():
            shared = len(tensors) > 1 and name not in trained | tuned and all(x is tensors[0] for x in tensors)
            stack = tensors[0].detach() if shared else torch.stack([x.detach() for x in tensors])
            if not shared:
                point(tensors, stack)
            self._dims[name] = None if shared else 0
            if name in trained:
                self.params[name.removeprefix("model.")] = stack.requires_grad_()
            elif name in tuned:
                self.hparams[name.removeprefix("hyperparameters.")] = stack.requires_grad_()
            elif is_buffer:
                if not shared:
                    self.buffers[name] = stack
            else:
                self._frozen[name] = stack

    def free(self, member: int) -> None:
        """Give a member memory of its own; what happens in its place is nobody's from here on."""
        for tensors, _ in _tensors([self.problems[member]]).values():
            for tensor in tensors:
                tensor.data = tensor.detach().clone()

    def keep(self, members: Sequence[int]) -> None:
        """Go on with these members only; the others get memory of their own and stay as they are."""
        for i in set(range(len(self))) - set(members):
            self.free(i)
        self.problems = [self.problems[i] for i in members]
        if self.problems:
            self._stack()

    @torch.no_grad()
    def values(self) -> Params:
        """The constrained hyperparameters of all members; without those that are modules."""
        return {name: vectorised(each.transform)(self.hparams[name]) for name, each in self._declared().items()}

    @torch.no_grad()
    def inside(self) -> list[bool]:
        """For each member, whether all values are finite, and none was rounded onto the edge of its constraint."""
        values = self.values()
        try:
            back = [
                marked_where_lost(each.transform, self.hparams[name], vectorised(each.transform.inv)(values[name]))
                for name, each in self._declared().items()
            ]
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # of whichever member
            return [each.hyperparameters.is_inside() for each in self.problems]
        held = [x for name, x in self._frozen.items() if name.startswith("hyperparameters.") and self._dims[name] == 0]
        tensors = [x for x in (*self.hparams.values(), *held, *values.values(), *back) if x.numel()]
        largest = torch.stack([torch.linalg.vector_norm(x.reshape(len(self), -1), math.inf, dim=1) for x in tensors])
        found: list[bool] = largest.isfinite().all(0).tolist()
        return found

    def _declared(self) -> dict[str, Declaration]:
        declared = self.problems[0].hyperparameters.declarations
        return {name: declared[name] for name in self.hparams if name in declared}

    # -------------------------------------------------------------------------------------------------------- losses

    def training_losses(
        self, params: Params, hparams: Params, parts: Sequence[Part], buffers: Params | None = None, **options: Any
    ) -> Tensor:
        """L of each member, from w and λ of all; buffers are changed in place where given, and else copies of them."""
        return self._losses("training_loss", params, hparams, parts, buffers, **options)

    def validation_losses(self, params: Params, hparams: Params, parts: Sequence[Part], **options: Any) -> Tensor:
        """F of each member, in eval mode."""
        with evaluating(self.problems[0].model):
            return self._losses("validation_loss", params, hparams, parts, None, **options)

    def _losses(
        self,
        role: str,
        params: Params,
        hparams: Params,
        parts: Sequence[Part],
        buffers: Params | None,
        values: Params | None = None,
        randomness: str = "different",
    ) -> Tensor:
        tensors = {f"model.{name}": x for name, x in params.items()}
        tensors |= {f"hyperparameters.{name}": x for name, x in hparams.items()}
        tensors |= self._frozen
        held = {name: x.clone() for name, x in self.buffers.items()} if buffers is None else buffers
        if len(parts) == 1 and parts[0].members is None:
            return self._part(role, tensors, held, values or {}, parts[0], randomness)
        losses: list[Tensor | None] = [None] * len(self)
        for part in parts:
            members = part.members or []
            index = torch.tensor(members, device=self.device)
            some = {name: x if self._dims[name] is None else x[index] for name, x in tensors.items()}
            moving = {name: x[index] for name, x in held.items()}
            given = {name: x[index] for name, x in (values or {}).items()}
            found = self._part(role, some, moving, given, part, randomness)
            for name, x in moving.items():
                held[name][index] = x
            for i, loss in zip(members, found, strict=True):
                losses[i] = loss
        return torch.stack([x for x in losses if x is not None])

    def _part(self, role: str, tensors: Params, buffers: Params, values: Params, part: Part, randomness: str) -> Tensor:
        template = self.problems[0]
        names, held, known = list(tensors), list(buffers), list(values)
        networks = dict(template.hyperparameters.named_children())

        def one(own: list[Tensor], moving: list[Tensor], constrained: list[Tensor], given: list[Tensor]) -> Tensor:
            state = dict(zip(held, moving, strict=True))
            ready: dict[str, Value] = {**networks, **dict(zip(known, constrained, strict=True))}
            loss, left = template.evaluate_with(
                role, dict(zip(names, own, strict=True)), state, part.make(given), ready if known else None
            )
            if any(left[name] is not state[name] for name in state):
                raise UnvectorisableError("a module puts another tensor in the place of a buffer.")
            return loss

        dims = ([self._dims[name] for name in names], [0] * len(held), [0] * len(known), part.dims)
        inputs = [tensors.values(), buffers.values(), values.values(), part.tensors]
        found: Tensor = torch.vmap(one, in_dims=_dims(dims), randomness=randomness)(*map(list, inputs))
        return found


def _dims(dims: tuple[list[Any], ...]) -> tuple[Any, ...]:
    """In the form of torch.vmap, which takes None for an empty list."""
    return tuple(each if each else None for each in dims)


def vectorised(function: Transform) -> Callable[[Tensor], Tensor]:
    """A map between constrained and unconstrained values, for a stack of them."""
    if type(function) in (IndependentTransform, CatTransform, StackTransform, ComposeTransform):
        return torch.vmap(function)
    return function  # those of torch take any number of leading axes


def _tensors(problems: Sequence[BilevelProblem]) -> dict[str, tuple[list[Tensor], bool]]:
    """Every tensor of each member by its name, and whether it is a buffer."""
    found: dict[str, tuple[list[Tensor], bool]] = {}
    for problem in problems:
        for prefix, module in (("model", problem.model), ("hyperparameters", problem.hyperparameters)):
            for name, p in module.named_parameters(prefix):
                found.setdefault(name, ([], False))[0].append(p)
            for name, buffer in module.named_buffers(prefix):
                found.setdefault(name, ([], True))[0].append(buffer)
    return found


@torch.no_grad()
def point(tensors: Sequence[Tensor], stack: Tensor) -> None:
    """Make each of the tensors a slice of the stack."""
    for tensor, row in zip(tensors, stack.unbind(0), strict=True):
        tensor.data = row


def column(numbers: Sequence[float] | Tensor, like: Tensor) -> Tensor:
    """One number a member, shaped so that it multiplies a stack."""
    if not isinstance(numbers, Tensor):
        numbers = torch.tensor(numbers, dtype=torch.float64)
    return numbers.to(like.device, like.dtype).view(-1, *[1] * (like.dim() - 1))
