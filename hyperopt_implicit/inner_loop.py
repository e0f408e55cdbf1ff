"""Inner training steps: plain ones on the real model, and the same as a function that can be differentiated.

Plain steps are any training loop's. :class:`InnerSteps` is the step as a function of weights, optimizer state and
hyperparameters, on copies: taken forward, or with an adjoint pulled back through it, so that no graph is longer than
one step. ``trajectory.py`` goes through many steps with it, backward, and ``forward_mode.py`` forward with tangents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hyperopt_implicit.operators import twice_differentiable
from hyperopt_implicit.optimizers import (
    COUNTERS,
    Group,
    Slots,
    existing_slots,
    optimizer_state,
    slot_bytes,
    update_rule,
)
from hyperopt_implicit.problem import BilevelProblem, InnerState, write_option
from hyperopt_implicit.randomness import random_states
from hyperopt_implicit.snapshot import Buffers
from hyperopt_implicit.updates import Adjoint, adjoint_of, apply_update, update_in_place
from hyperopt_implicit.vectors import Params

if TYPE_CHECKING:
    from hyperopt_implicit.hyperparameters import Value


def train_step(problem: BilevelProblem, batch: Any, values: dict[str, Value]) -> float:
    """One plain step of the inner optimizer; returns L before it.

    A non-finite L leaves the model as it was, running statistics included, and those of networks that are tuned.
    """
    networks = [value for value in values.values() if isinstance(value, nn.Module)]
    before = Buffers([problem.model, *networks])
    loss = problem.training_loss(batch, values)
    number = float(loss.detach())
    if math.isfinite(number):
        descend(problem, loss)
    else:
        before.restore()
    return number


def descend(problem: BilevelProblem, loss: Tensor) -> None:
    """Move the model one step of its optimizer down a loss that was computed on it, whatever that loss is."""
    problem.optimizer.zero_grad(set_to_none=True)
    loss.backward(inputs=list(problem.params.values()))
    problem.optimizer.step()


@dataclass
class Iterate:
    """Where training stands between two steps: all that taking the next one needs.

    Attributes:
        params: w.
        slots: what the optimizer keeps, by parameter.
        buffers: the model's.
    """

    params: Params
    slots: dict[str, Slots]
    buffers: Params

    @property
    def inner_state(self) -> InnerState:
        """The same, as a problem can load it."""
        return InnerState(self.params, self.buffers, optimizer_state(self.slots))

    def copy(self) -> Iterate:
        """One that shares no memory."""
        slots = {name: {key: s.clone() for key, s in each.items()} for name, each in self.slots.items()}
        return Iterate(
            {name: p.clone() for name, p in self.params.items()},
            slots,
            {name: b.clone() for name, b in self.buffers.items()},
        )


class InnerSteps:
    """The inner optimizer's step as a function of all that it depends on; changes nothing but the iterate it is given.

    An option of the optimizer that is a hyperparameter has one value, or one for each step of a walk, of which the last
    stays from there on.

    Raises:
        ProblemError: the optimizer has no functional form.
    """

    def __init__(self, problem: BilevelProblem) -> None:
        self.problem = problem
        self._rule = update_rule(problem.optimizer)
        self._groups = [
            ({key: x for key, x in group.items() if key != "params"}, names)
            for group, names in problem.parameter_groups
        ]
        complex_ = any(p.is_complex() for p in problem.params.values())  # which torch.optim takes apart
        self._adjoint = None if complex_ else adjoint_of(self._rule, [options for options, _ in self._groups])

    def start(self) -> Iterate:
        """A copy of the model's present state."""
        state = self.problem.inner_state()
        slots = {
            name: existing_slots(self._rule, group, state.optimizer[name])
            for group, names in self._groups
            for name in names
        }
        return Iterate(state.params, slots, state.buffers)

    def iterate_bytes(self) -> int:
        """The memory of an iterate and the state of the generators, once every parameter has been updated."""
        params = self.problem.params
        held = [*params.values(), *self.problem.model.buffers(), *random_states(self.problem.device)]
        slots = [slot_bytes(self._rule, group, params[name]) for group, names in self._groups for name in names]
        return sum(x.numel() * x.element_size() for x in held) + sum(slots)

    # ------------------------------------------------------------------------------------------------------ forward

    def walk(self, hparams: Params, batches: Sequence[Any]) -> Iterator[tuple[float, Iterate]]:
        """Plain steps from the present state, one a batch: L before each, and the iterate, which the next one moves on.

        A step whose loss is not finite is the last.
        """
        current = self.start()
        for t, batch in enumerate(batches):
            loss = self.advance(t, current, hparams, batch)
            yield loss, current
            if not math.isfinite(loss):
                return

    def advance(self, t: int, current: Iterate, hparams: Params, batch: Any) -> float:
        """Step t, by which ``current`` is moved on in place; returns L before it.

        A step that is taken again from the same iterate, with generators in the same state, is the same to the bit
        where the operations are deterministic.
        """
        loss, gradient, _ = self.gradients(leaves(current.params), hparams, batch, current.buffers, graph=False)
        with torch.no_grad():
            tuned = self._options(hparams, t)
            for options, held in self._groups:
                names = [name for name in held if name in gradient]
                update_in_place(
                    self._rule,
                    _with_values(options, tuned),  # as numbers, they go through the very operations of torch.optim
                    [current.params[name] for name in names],
                    [gradient[name] for name in names],
                    [current.slots[name] for name in names],
                )
        return float(loss)

    def gradients(
        self,
        params: Params,
        hparams: Params,
        batch: Any,
        buffers: Params,
        *,
        graph: bool,
        of_hparams: bool = False,
    ) -> tuple[Tensor, Params, Params]:
        """L, ∂L/∂w and, where asked for, ∂L/∂λ; those on which L does not depend are left out.

        Args:
            params: w, which require grad.
            hparams: λ.
            batch: one training batch.
            buffers: changed in place.
            graph: whether the derivatives can be differentiated.
            of_hparams: whether ∂L/∂λ is wanted; λ requires grad then.
        """
        with torch.enable_grad(), twice_differentiable(self.problem):
            loss = self.problem.functional_training_loss(params, hparams, batch, buffers)
            wanted = [*params.values(), *(hparams.values() if of_hparams else ())]
            found = torch.autograd.grad(loss, wanted, create_graph=graph, allow_unused=True)
        by_params = {name: g for name, g in zip(params, found, strict=False) if g is not None}
        by_hparams = {name: g for name, g in zip(hparams, found[len(params) :], strict=False) if g is not None}
        return loss.detach(), by_params, by_hparams

    def update(
        self, t: int, params: Params, gradient: Params, slots: dict[str, Slots], hparams: Params
    ) -> tuple[Params, dict[str, Slots]]:
        """The optimizer's update at step t, differentiable in all its arguments.

        Like torch.optim, it leaves a parameter without a gradient alone: no decay, no momentum, no state.
        """
        with torch.enable_grad():
            tuned = self._options(hparams, t)
            new_params, new_slots = dict(params), dict(slots)
            for options, held in self._groups:
                names = [name for name in held if name in gradient]
                moved, state = apply_update(
                    self._rule,
                    _with_values(options, tuned),
                    tuned,
                    [params[name] for name in names],
                    [gradient[name] for name in names],
                    [slots[name] for name in names],
                )
                new_params.update(zip(names, moved, strict=True))
                new_slots.update(zip(names, state, strict=True))
        return new_params, new_slots

    # ----------------------------------------------------------------------------------------------------- backward

    def pull_back(
        self, t: int, before: Iterate, hparams: Params, batch: Any, adjoints: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], Params]:
        """(∂Φ/∂w)ᵀp and (∂Φ/∂λ)ᵀp of step t, w and p with the optimizer's slots, under the names of ``flat``.

        Args:
            t: the step.
            before: where it began; its buffers are changed.
            hparams: λ.
            batch: the step's.
            adjoints: p after the step; what is missing is zero.
        """
        params, own = leaves(before.params), leaves(hparams)
        _, gradient, _ = self.gradients(params, own, batch, before.buffers, graph=True)
        found, total = self._pull_back_update(t, before, gradient, hparams, adjoints)
        # where L is linear in a parameter, its derivative has no graph and is a constant
        of_gradient = {name: found.pop(f"g:{name}", None) for name in gradient}
        pairs = [(g, p) for name, g in gradient.items() if g.requires_grad and (p := of_gradient[name]) is not None]
        if pairs:
            pulled = torch.autograd.grad(
                [g for g, _ in pairs], [*params.values(), *own.values()], [p for _, p in pairs], allow_unused=True
            )
            for name, p in zip(params, pulled, strict=False):
                _add(found, f"w:{name}", p)
            for name, p in zip(own, pulled[len(params) :], strict=True):
                _add(total, name, p)
        return found, total

    def _pull_back_update(
        self, t: int, before: Iterate, gradient: Params, hparams: Params, adjoints: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The adjoints of w, the slots and, as ``g:…``, the gradient, through the update alone; and those of λ."""
        tuned = self.problem.hyperparameters.names("optimizer")
        if self._adjoint is not None and not tuned:
            return self._written_out(self._adjoint, before, gradient, adjoints), {}
        params, own = leaves(before.params), leaves({name: hparams[name] for name in tuned})
        inputs, slots = leaves(gradient), slot_leaves(before.slots)
        moved, after = self.update(t, params, inputs, slots, {**hparams, **own})
        outputs = {key: x for key, x in flat(moved, after).items() if key in adjoints and x.requires_grad}
        of = {**flat(params, slots), **{f"g:{name}": g for name, g in inputs.items()}}
        if not outputs:
            return {}, {}
        pulled = torch.autograd.grad(
            list(outputs.values()),
            [*of.values(), *own.values()],
            [adjoints[key] for key in outputs],
            allow_unused=True,
        )
        found = {key: p for key, p in zip(of, pulled, strict=False) if p is not None}
        return found, {name: p for name, p in zip(own, pulled[len(of) :], strict=True) if p is not None}

    def _written_out(
        self, adjoint: Adjoint, before: Iterate, gradient: Params, adjoints: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        of: dict[str, Slots] = {}
        for key, p in adjoints.items():
            what, _, name = key.partition(":")
            of.setdefault(name, {})[what] = p
        for options, held in self._groups:
            for name in held:
                if name in gradient and "w" in of.get(name, {}):
                    w, g = before.params[name], gradient[name].detach()
                    of[name] = adjoint(options, w, g, before.slots[name], of[name])
        return {f"{what}:{name}": p for name, each in of.items() for what, p in each.items()}

    def _options(self, hparams: Params, t: int) -> dict[str, Tensor]:
        names = self.problem.hyperparameters.names("optimizer")
        declarations = self.problem.hyperparameters.declarations
        values = {name: declarations[name].transform(hparams[name]).reshape(-1) for name in names}
        return {name: value[min(t, len(value) - 1)] for name, value in values.items()}


def leaves(x: Params) -> Params:
    """The same tensors at the beginning of a graph."""
    return {name: tensor.detach().requires_grad_() for name, tensor in x.items()}


def slot_leaves(slots: dict[str, Slots]) -> dict[str, Slots]:
    """The same for what the optimizer keeps; what only counts steps is constant."""
    return {
        name: {key: s if key in COUNTERS else s.detach().requires_grad_() for key, s in each.items()}
        for name, each in slots.items()
    }


def flat(params: Params, slots: dict[str, Slots]) -> dict[str, Tensor]:
    """Parameters and slots side by side, without what counts steps: what a derivative of a step is carried in."""
    found = {f"w:{name}": p for name, p in params.items()}
    for name, each in slots.items():
        found.update((f"{key}:{name}", s) for key, s in each.items() if key not in COUNTERS)
    return found


def _add(to: dict[str, Tensor], key: str, x: Tensor | None) -> None:
    """Out of place: autograd may hand out one tensor for two inputs."""
    if x is not None:
        to[key] = to[key] + x if key in to else x


def _with_values(options: Group, tuned: dict[str, Tensor]) -> Group:
    group = {key: x.clone() if isinstance(x, Tensor) else x for key, x in options.items()}
    for name, value in tuned.items():
        write_option(group, name, float(value.detach()))
    return group
