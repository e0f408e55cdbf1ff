"""Inner training steps: plain ones on the real model, and a trajectory that can be differentiated.

Plain steps are any training loop's. A :class:`Trajectory` walks the same steps on copies, keeps the iterates, and
carries an adjoint back through them one step at a time, so that no graph is longer than one step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hyperopt_implicit.operators import twice_differentiable
from hyperopt_implicit.optimizers import Slots, apply_update, existing_slots, optimizer_state, update_rule
from hyperopt_implicit.problem import BilevelProblem, InnerState
from hyperopt_implicit.randomness import random_states, replaying
from hyperopt_implicit.vectors import Params, is_finite

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
class _Iterate:
    """Where training stood before a step: all that replaying the step needs."""

    params: Params
    slots: dict[str, Slots]
    buffers: Params
    random: list[Tensor]


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
        self._problem = problem
        self._rule = update_rule(problem.optimizer)
        self._batches = batches
        self._hparams = {name: p.detach() for name, p in problem.hparams.items()}
        self._groups = _groups(problem)
        kept_from = 0 if keep is None else max(len(batches) - keep, 0)
        self._first_kept = kept_from
        self._iterates: list[_Iterate] = []
        self.losses: list[float] = []
        current = self._start()
        for t, batch in enumerate(batches):
            if t >= kept_from:
                self._iterates.append(current)
            buffers = {name: b.clone() for name, b in current.buffers.items()}
            loss, params, slots = self._step(
                t, current.params, current.slots, self._hparams, buffers, batch, graph=False
            )
            self.losses.append(float(loss))
            current = _Iterate(params, slots, buffers, random_states(problem.device))
            if not math.isfinite(self.losses[-1]):
                break
        self.endpoint = InnerState(current.params, current.buffers, optimizer_state(current.slots))

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
        params = {name: p.detach().requires_grad_() for name, p in before.params.items()}
        slots = {
            name: {key: s if key == "step" else s.detach().requires_grad_() for key, s in each.items()}
            for name, each in before.slots.items()
        }
        hparams = {name: p.detach().requires_grad_() for name, p in self._hparams.items()}
        buffers = {name: b.clone() for name, b in before.buffers.items()}
        with replaying(before.random, self._problem.device), torch.enable_grad():
            _, new_params, new_slots = self._step(t, params, slots, hparams, buffers, self._batches[t], graph=True)
        inputs = _flat(params, slots)
        outputs = {key: x for key, x in _flat(new_params, new_slots).items() if key in adjoints and x.requires_grad}
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

    def _start(self) -> _Iterate:
        problem = self._problem
        state = problem.inner_state()
        slots = {
            name: existing_slots(self._rule, group, state.optimizer[name])
            for group, names in self._groups
            for name in names
        }
        return _Iterate(state.params, slots, state.buffers, random_states(problem.device))

    def _step(
        self,
        t: int,
        params: Params,
        slots: dict[str, Slots],
        hparams: Params,
        buffers: Params,
        batch: Any,
        *,
        graph: bool,
    ) -> tuple[Tensor, Params, dict[str, Slots]]:
        with torch.enable_grad(), twice_differentiable(self._problem):
            leaves = params if graph else {name: p.detach().requires_grad_() for name, p in params.items()}
            loss = self._problem.functional_training_loss(leaves, hparams, batch, buffers)
            grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=graph, allow_unused=True)
        # like torch.optim, an update leaves a parameter without a gradient alone: no decay, no momentum, no state
        gradient = {name: g for name, g in zip(leaves, grads, strict=True) if g is not None}
        with torch.set_grad_enabled(graph):
            tuned = self._tuned_options(hparams)
            new_params, new_slots = dict(params), dict(slots)
            for group, held in self._groups:
                names = [name for name in held if name in gradient]
                moved, state = apply_update(
                    self._rule,
                    group,
                    tuned,
                    [params[name] for name in names],
                    [gradient[name] for name in names],
                    [slots[name] for name in names],
                )
                new_params.update(zip(names, moved, strict=True))
                new_slots.update(zip(names, state, strict=True))
        return loss.detach(), new_params, new_slots

    def _tuned_options(self, hparams: Params) -> dict[str, Tensor]:
        declarations = self._problem.hyperparameters.declarations
        return {
            name: declarations[name].transform(hparams[name]).reshape(())
            for name in self._problem.hyperparameters.names("optimizer")
        }


def _groups(problem: BilevelProblem) -> list[tuple[dict[str, Any], list[str]]]:
    names = {id(p): name for name, p in problem.params.items()}
    return [
        (group, [names[id(p)] for p in group["params"] if id(p) in names]) for group in problem.optimizer.param_groups
    ]


def _flat(params: Params, slots: dict[str, Slots]) -> dict[str, Tensor]:
    flat = {f"w:{name}": p for name, p in params.items()}
    for name, each in slots.items():
        flat.update((f"{key}:{name}", s) for key, s in each.items() if key != "step")
    return flat
