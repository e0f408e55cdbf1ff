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

from hyperopt_implicit.distributed import average_gradients, mean, several
from hyperopt_implicit.inner_state import InnerState
from hyperopt_implicit.micro_batches import parts_of
from hyperopt_implicit.mixed_precision import linear, scaled
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
from hyperopt_implicit.problem import BilevelProblem, write_option
from hyperopt_implicit.randomness import random_states
from hyperopt_implicit.snapshot import Buffers
from hyperopt_implicit.updates import Adjoint, adjoint_of, apply_update, update_in_place
from hyperopt_implicit.vectors import Params

if TYPE_CHECKING:
    from hyperopt_implicit.hyperparameters import Value


def train_step(problem: BilevelProblem, batch: Any, values: dict[str, Value]) -> float:
    """One plain step of the inner optimizer; returns L before it.

    A non-finite L leaves the model as it was, running statistics included, and those of networks that are tuned. So
    does, but for running statistics, a gradient that is too large for float16, where training is in that.
    """
    networks = [value for value in values.values() if isinstance(value, nn.Module)]
    before = Buffers([problem.model, *networks])
    loss, rest = begin_step(problem, batch, values)
    number = float(mean(loss))
    if math.isfinite(number):
        descend(problem, rest)
    else:
        before.restore()
    return number


def begin_step(problem: BilevelProblem, batch: Any, values: dict[str, Value]) -> tuple[Tensor, Tensor]:
    """L without its graph, and what of it :func:`descend` has still to differentiate.

    Of micro-batches that is the last one's: gradients of the others are in ``.grad`` by then, and their graphs gone.
    Among several processes L is that of this one's share of the batch.
    """
    problem.optimizer.zero_grad(set_to_none=True)
    *first, last = parts_of(batch)
    total: Tensor | None = None
    for part in first:
        loss = _part_of_loss(problem, part, values, len(first) + 1)
        total = loss.detach() if total is None else total + loss.detach()
        _backward(problem, loss)
        del loss  # or it would be held while the next one is built
    loss = _part_of_loss(problem, last, values, len(first) + 1)
    return (loss.detach() if total is None else total + loss.detach()), loss


def descend(problem: BilevelProblem, loss: Tensor) -> None:
    """Move the model one step of its optimizer down a loss that :func:`begin_step` gave, whatever that loss is.

    Among several processes the step is down the mean of what each of them gives.
    """
    _backward(problem, loss)
    if several():
        average_gradients(list(problem.params.values()))
    problem.inner_precision.step(problem.optimizer)


def _part_of_loss(problem: BilevelProblem, part: Any, values: dict[str, Value], count: int) -> Tensor:
    loss = problem.inner_precision.loss(lambda: problem.share_of_training_loss(part, values))
    return loss if count == 1 else loss / count


def _backward(problem: BilevelProblem, loss: Tensor) -> None:
    problem.inner_precision.scaled(loss).backward(inputs=list(problem.params.values()))


@dataclass
class Iterate:
    """Where training stands between two steps: all that taking the next one needs.

    Attributes:
        params: w.
        slots: what the optimizer keeps, by parameter.
        buffers: the model's.
        scaling: of the loss, where training is in float16.
    """

    params: Params
    slots: dict[str, Slots]
    buffers: Params
    scaling: Tensor | None = None

    @property
    def inner_state(self) -> InnerState:
        """The same, as a problem can load it."""
        return InnerState(self.params, self.buffers, optimizer_state(self.slots), self.scaling)

    def copy(self) -> Iterate:
        """One that shares no memory."""
        slots = {name: {key: s.clone() for key, s in each.items()} for name, each in self.slots.items()}
        return Iterate(
            {name: p.clone() for name, p in self.params.items()},
            slots,
            {name: b.clone() for name, b in self.buffers.items()},
            self.scaling,
        )


class InnerSteps:
    """The inner optimizer's step as a function of all that it depends on; changes nothing but the iterate it is given.

    An option of the optimizer that is a hyperparameter has one value, or one for each step of a walk, of which the last
    stays from there on.

    Steps are in the problem's ``inner_precision``. With float16 the loss is scaled by the iterate's own scale and the
    gradient scaled back; a gradient that is not finite leaves weights and slots where they are, and lowers the scale.

    Raises:
        ProblemError: the optimizer has no functional form.
    """

    def __init__(self, problem: BilevelProblem) -> None:
        self.problem = problem
        self._precision = problem.inner_precision
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
        return Iterate(state.params, slots, state.buffers, self._precision.scaling())

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
        loss, gradient, _ = self.gradients(
            leaves(current.params), hparams, batch, current.buffers, graph=False, scaling=current.scaling
        )
        if not self.is_taken(gradient, current):
            current.scaling = self.scaling_after(current, taken=False)
            return float(loss)
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
        current.scaling = self.scaling_after(current, taken=True)
        return float(loss)

    def is_taken(self, gradient: Params, at: Iterate) -> bool:
        """Whether the optimizer steps: it does not where a scaled gradient was too large for float16."""
        return at.scaling is None or all(bool(g.isfinite().all()) for g in gradient.values())

    def scaling_after(self, before: Iterate, *, taken: bool) -> Tensor | None:
        """Of the loss, after a step that the optimizer took or left out."""
        return None if before.scaling is None else self._precision.after(before.scaling, good=taken)

    def gradients(
        self,
        params: Params,
        hparams: Params,
        batch: Any,
        buffers: Params,
        *,
        graph: bool,
        of_hparams: bool = False,
        scaling: Tensor | None = None,
    ) -> tuple[Tensor, Params, Params]:
        """L, ∂L/∂w and, where asked for, ∂L/∂λ; those on which L does not depend are left out.

        Args:
            params: w, which require grad.
            hparams: λ.
            batch: one training batch.
            buffers: changed in place.
            graph: whether the derivatives can be differentiated.
            of_hparams: whether ∂L/∂λ is wanted; λ requires grad then.
            scaling: of the loss, while it is differentiated.
        """
        wanted = [*params.values(), *(hparams.values() if of_hparams else ())]
        parts, scale = parts_of(batch), 1.0 if scaling is None else float(scaling[0])
        losses: list[Tensor] = []
        sums: list[Tensor | None] = [None] * len(wanted)
        with torch.enable_grad(), twice_differentiable(self.problem):
            for part in parts:  # without a graph that is wanted, that of one part is held at a time
                loss = self._part_of_loss(params, hparams, part, buffers)
                factor = scale / len(parts)
                output = loss if factor == 1.0 else loss * factor
                grads = torch.autograd.grad(output, wanted, create_graph=graph, allow_unused=True)
                sums = [x if y is None else y if x is None else x + y for x, y in zip(sums, grads, strict=True)]
                losses.append(loss.detach())
                del loss, output
            found = [x if x is None or scale == 1.0 else x / scale for x in sums]
        by_params = {name: g for name, g in zip(params, found, strict=False) if g is not None}
        by_hparams = {name: g for name, g in zip(hparams, found[len(params) :], strict=False) if g is not None}
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean(), by_params, by_hparams

    def _part_of_loss(self, params: Params, hparams: Params, part: Any, buffers: Params) -> Tensor:
        return self._precision.loss(lambda: self.problem.functional_training_loss(params, hparams, part, buffers))

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
        _, gradient, _ = self.gradients(params, own, batch, before.buffers, graph=True, scaling=before.scaling)
        if not self.is_taken(gradient, before):
            return adjoints, {}
        found, total = self._pull_back_update(t, before, gradient, hparams, adjoints)
        # where L is linear in a parameter, its derivative has no graph and is a constant
        of_gradient = {name: found.pop(f"g:{name}", None) for name in gradient}
        pairs = [(g, p) for name, g in gradient.items() if g.requires_grad and (p := of_gradient[name]) is not None]
        if pairs:
            outputs, along = [g for g, _ in pairs], [p for _, p in pairs]
            inputs = [*params.values(), *own.values()]
            pulled = linear(
                lambda factor: torch.autograd.grad(
                    outputs, inputs, scaled(along, factor), retain_graph=before.scaling is not None, allow_unused=True
                ),
                along,
                before.scaling,
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
