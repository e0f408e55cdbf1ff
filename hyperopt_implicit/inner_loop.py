"""Inner training steps: plain ones on the real model, and the same as a function that can be differentiated.

Plain steps are any training loop's. :class:`InnerSteps` is the step as a function of weights, optimizer state and
hyperparameters, on copies. A :class:`Trajectory` walks it, keeps the iterates, and carries an adjoint back through them
one step at a time, so that no graph is longer than one step; ``forward_mode.py`` carries tangents forward with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hyperopt_implicit.operators import twice_differentiable
from hyperopt_implicit.optimizers import Slots, apply_update, existing_slots, optimizer_state, update_rule
from hyperopt_implicit.problem import BilevelProblem, InnerState, write_option
from hyperopt_implicit.randomness import random_states, replaying
from hyperopt_implicit.vectors import Params, clone, is_finite

if TYPE_CHECKING:
    from hyperopt_implicit.hyperparameters import Value


def train_step(problem: BilevelProblem, batch: Any, values: dict[str, Value]) -> float:
    """One plain step of the inner optimizer; returns L before it. A non-finite L leaves the model as it was."""
    loss = problem.training_loss(batch, values)
    number = float(loss.detach())
    if math.isfinite(number):
        problem.optimizer.zero_grad(set_to_none=True)
        loss.backward(inputs=list(problem.params.values()))
        problem.optimizer.step()
    return number


@dataclass
class Iterate:
    """Where training stands between two steps: all that taking the next one needs.

    Attributes:
        params: w.
        slots: what the optimizer keeps, by parameter.
        buffers: the model's.
        random: the state of torch's generators.
    """

    params: Params
    slots: dict[str, Slots]
    buffers: Params
    random: list[Tensor]

    @property
    def inner_state(self) -> InnerState:
        """The same, as a problem can load it."""
        return InnerState(self.params, self.buffers, optimizer_state(self.slots))


class InnerSteps:
    """The inner optimizer's step as a function of all that it depends on; changes nothing.

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

    def start(self) -> Iterate:
        """A copy of the model's present state."""
        state = self.problem.inner_state()
        slots = {
            name: existing_slots(self._rule, group, state.optimizer[name])
            for group, names in self._groups
            for name in names
        }
        return Iterate(state.params, slots, state.buffers, random_states(self.problem.device))

    def walk(self, hparams: Params, batches: Sequence[Any]) -> Iterator[tuple[float, Iterate]]:
        """Plain steps from the present state, one a batch: L before each, and where it led.

        A step whose loss is not finite is the last.
        """
        current = self.start()
        for t, batch in enumerate(batches):
            params, buffers = leaves(current.params), clone(current.buffers)
            loss, gradient, _ = self.gradients(params, hparams, batch, buffers, graph=False)
            moved, slots = self.update(t, current.params, gradient, current.slots, hparams, graph=False)
            current = Iterate(moved, slots, buffers, random_states(self.problem.device))
            yield float(loss), current
            if not math.isfinite(float(loss)):
                return

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
        self,
        t: int,
        params: Params,
        gradient: Params,
        slots: dict[str, Slots],
        hparams: Params,
        *,
        graph: bool,
    ) -> tuple[Params, dict[str, Slots]]:
        """The optimizer's update at step t; with ``graph``, differentiable in all its arguments.

        Like torch.optim, it leaves a parameter without a gradient alone: no decay, no momentum, no state.
        """
        with torch.set_grad_enabled(graph):
            tuned = self._options(hparams, t)
            new_params, new_slots = dict(params), dict(slots)
            for options, held in self._groups:
                names = [name for name in held if name in gradient]
                moved, state = apply_update(
                    self._rule,
                    _with_values(options, tuned),
                    tuned if graph else {},  # as numbers, they go through the very operations of torch.optim
                    [params[name] for name in names],
                    [gradient[name] for name in names],
                    [slots[name] for name in names],
                )
                new_params.update(zip(names, moved, strict=True))
                new_slots.update(zip(names, state, strict=True))
        return new_params, new_slots

    def _options(self, hparams: Params, t: int) -> dict[str, Tensor]:
        declarations = self.problem.hyperparameters.declarations
        values = {
            name: declarations[name].transform(hparams[name]).reshape(-1)
            for name in self.problem.hyperparameters.names("optimizer")
        }
        return {name: value[min(t, len(value) - 1)] for name, value in values.items()}


class Trajectory:
    """Inner steps from the model's present state, on copies.

    Args:
        problem: the problem; its model, optimizer and hyperparameters are read and not changed.
        batches: one batch for each step.
        keep: how many of the last steps can be differentiated; None for all.

    Attributes:
        losses: L before each step.
        endpoint: the state after the last step.
    """

    def __init__(self, problem: BilevelProblem, batches: Sequence[Any], keep: int | None = None) -> None:
        self._steps = InnerSteps(problem)
        self._batches = batches
        self._hparams = {name: p.detach() for name, p in problem.hparams.items()}
        self._first_kept = 0 if keep is None else max(len(batches) - keep, 0)
        self._iterates: list[Iterate] = []
        self.losses: list[float] = []
        before = self._steps.start()
        for t, (loss, after) in enumerate(self._steps.walk(self._hparams, batches)):
            if t >= self._first_kept:
                self._iterates.append(before)
            self.losses.append(loss)
            before = after
        self.endpoint = before.inner_state

    @property
    def is_finite(self) -> bool:
        """Whether every loss and the last iterate are finite."""
        return math.isfinite(sum(self.losses)) and is_finite(self.endpoint.params)

    def pull_back(self, adjoint: Params) -> tuple[Params, int]:
        """dF/dλ through the kept steps, without the direct term, and the number of steps differentiated.

        Args:
            adjoint: ∂F/∂w at the end of the trajectory.
        """
        total = {name: torch.zeros_like(p) for name, p in self._hparams.items()}
        adjoints: dict[str, Tensor] = {f"w:{name}": a for name, a in adjoint.items()}
        for t in range(len(self.losses) - 1, self._first_kept - 1, -1):
            adjoints, gradient = self._pull_back_step(t, adjoints)
            for name, g in gradient.items():
                total[name] += g
        return total, len(self.losses) - self._first_kept

    def _pull_back_step(self, t: int, adjoints: dict[str, Tensor]) -> tuple[dict[str, Tensor], Params]:
        before = self._iterates[t - self._first_kept]
        params, slots, hparams = leaves(before.params), slot_leaves(before.slots), leaves(self._hparams)
        with replaying(before.random, self._steps.problem.device):
            _, gradient, _ = self._steps.gradients(params, hparams, self._batches[t], clone(before.buffers), graph=True)
        new_params, new_slots = self._steps.update(t, params, gradient, slots, hparams, graph=True)
        inputs = flat(params, slots)
        outputs = {key: x for key, x in flat(new_params, new_slots).items() if key in adjoints and x.requires_grad}
        if not outputs:
            return {}, {}
        grads = torch.autograd.grad(
            list(outputs.values()),
            [*inputs.values(), *hparams.values()],
            [adjoints[key] for key in outputs],
            allow_unused=True,
            materialize_grads=True,
        )
        return dict(zip(inputs, grads, strict=False)), dict(zip(hparams, grads[len(inputs) :], strict=True))


def leaves(x: Params) -> Params:
    """The same tensors at the beginning of a graph."""
    return {name: tensor.detach().requires_grad_() for name, tensor in x.items()}


def slot_leaves(slots: dict[str, Slots]) -> dict[str, Slots]:
    """The same for what the optimizer keeps; its step counters are constants."""
    return {
        name: {key: s if key == "step" else s.detach().requires_grad_() for key, s in each.items()}
        for name, each in slots.items()
    }


def flat(params: Params, slots: dict[str, Slots]) -> dict[str, Tensor]:
    """Parameters and slots side by side, without the step counters: what a derivative of a step is carried in."""
    found = {f"w:{name}": p for name, p in params.items()}
    for name, each in slots.items():
        found.update((f"{key}:{name}", s) for key, s in each.items() if key != "step")
    return found


def _with_values(options: dict[str, Any], tuned: dict[str, Tensor]) -> dict[str, Any]:
    group = {key: x.clone() if isinstance(x, Tensor) else x for key, x in options.items()}
    for name, value in tuned.items():
        write_option(group, name, float(value.detach()))
    return group
