"""What methods without second derivatives share: first derivatives of L at any weights, and differences of them.

Between two evaluations only the weights change: the batches are the same, random layers draw what they drew before,
and running statistics are copies. The methods themselves are backends.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hyperopt_implicit.errors import BackendError
from hyperopt_implicit.micro_batches import parts_of
from hyperopt_implicit.operators import validation_gradients
from hyperopt_implicit.optimizers import existing_slots, update_rule
from hyperopt_implicit.randomness import random_states, replaying
from hyperopt_implicit.updates import apply_update
from hyperopt_implicit.vectors import Params, add, norm, same_shapes, zeros_like

if TYPE_CHECKING:
    from hyperopt_implicit.problem import BilevelProblem


class SameDraws:
    """A context whose first use draws random numbers as always, and each later use draws the same again."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._states: list[Tensor] | None = None

    def __call__(self) -> AbstractContextManager[None]:
        if self._states is None:
            self._states = random_states(self._device)
            return nullcontext()
        return replaying(self._states, self._device)


@dataclass(frozen=True)
class Derivatives:
    """Of the training loss, averaged over batches.

    Attributes:
        loss: L, a Python number.
        objective: what training minimises: L, and ½·decay·‖w‖² for a weight decay that the inner optimizer couples to
            the gradient.
        weights: ∂L/∂w, zero where L does not depend on a weight.
        inner: the derivative of the objective with respect to w.
        hparams: ∂L/∂λ.
        used: the parameters on which L depends; torch.optim leaves the others alone.
    """

    loss: float
    objective: float
    weights: Params
    inner: Params
    hparams: Params
    used: frozenset[str]


class TrainingDerivatives:
    """First derivatives of L, averaged over batches with equal weight, at whatever weights are asked for.

    Each evaluation costs a forward and a backward a batch, and holds the graph of one batch, or micro-batch, at a time.

    Args:
        problem: whose training loss; λ is taken as it stands.
        batches: at least one.
    """

    def __init__(self, problem: BilevelProblem, batches: Sequence[Any]) -> None:
        self._problem = problem
        self._parts = [(part, len(parts) * len(batches)) for parts in map(parts_of, batches) for part in parts]
        self._decays = problem.weight_decays
        self._draws = SameDraws(problem.device)

    def at(self, weights: Params) -> Derivatives:
        """L and its derivatives with respect to w and λ."""
        params = {name: p.detach().requires_grad_() for name, p in weights.items()}
        hparams = self.hparams()
        inputs = {("w", name): p for name, p in params.items()} | {("λ", name): p for name, p in hparams.items()}
        loss, sums = self._differentiate(params, hparams, inputs)
        used = frozenset(name for name in params if sums["w", name] is not None)
        dense = {key: torch.zeros_like(x) if sums[key] is None else sums[key] for key, x in inputs.items()}
        gradient = {name: dense["w", name] for name in params}
        decays = {name: decay for name, decay in self._decays.items() if name in used}
        inner = {
            name: g + decays[name] * params[name].detach() if name in decays else g for name, g in gradient.items()
        }
        objective = loss + sum(0.5 * decay * norm({name: weights[name]}) ** 2 for name, decay in decays.items())
        return Derivatives(loss, objective, gradient, inner, {name: dense["λ", name] for name in hparams}, used)

    def hparams_at(self, weights: Params) -> Params:
        """∂L/∂λ alone."""
        hparams = self.hparams()
        inputs = {("λ", name): p for name, p in hparams.items()}
        _, sums = self._differentiate({name: p.detach() for name, p in weights.items()}, hparams, inputs)
        return {
            name: torch.zeros_like(x) if (found := sums["λ", name]) is None else found for name, x in hparams.items()
        }

    @torch.no_grad()
    def loss_at(self, weights: Params) -> float:
        """L alone: a forward a batch."""
        with self._draws():
            return sum(
                float(self._problem.functional_training_loss(weights, self._problem.hparams, part)) / count
                for part, count in self._parts
            )

    def hparams(self) -> Params:
        """λ, as leaves of a graph of their own."""
        return {name: p.detach().requires_grad_() for name, p in self._problem.hparams.items()}

    def _differentiate(
        self, params: Params, hparams: Params, inputs: dict[tuple[str, str], Tensor]
    ) -> tuple[float, dict[tuple[str, str], Any]]:
        total, sums = 0.0, dict.fromkeys(inputs)
        with self._draws(), torch.enable_grad():  # the caller may be inside torch.no_grad()
            for part, count in self._parts:
                loss = self._problem.functional_training_loss(params, hparams, part)
                total += float(loss.detach()) / count
                if not loss.requires_grad:
                    continue
                grads = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
                del loss  # or it would be held while the next one is built
                for key, g in zip(inputs, grads, strict=True):
                    if g is not None:  # out of place: autograd may hand out one tensor twice
                        so_far: Any = sums[key]
                        sums[key] = g / count if so_far is None else so_far + g / count
        return total, sums


class ValidationDerivatives:
    """F and its derivatives at whatever weights are asked for, on one batch."""

    def __init__(self, problem: BilevelProblem, batch: Any) -> None:
        self._problem, self._batch = problem, batch
        self._draws = SameDraws(problem.device)

    def at(self, weights: Params) -> tuple[float, Params, Params]:
        """F, ∂F/∂w and ∂F/∂λ; not to be changed in place."""
        with self._draws():
            return validation_gradients(self._problem, self._batch, weights)

    @torch.no_grad()
    def loss_at(self, weights: Params) -> float:
        """F alone."""
        with self._draws():
            return float(self._problem.functional_validation_loss(weights, self._problem.hparams, self._batch))


def present_weights(problem: BilevelProblem) -> Params:
    """w without its graph; the memory is the model's."""
    return {name: p.detach() for name, p in problem.params.items()}


def carried_weights(state: dict[str, Any], weights: Params) -> Params:
    """Weights that a backend carries from call to call; the model's where there are none that fit it."""
    carried = state.get("weights")
    return carried if carried is not None and same_shapes(carried, weights) else weights


def mixed_difference(training: TrainingDerivatives, weights: Params, direction: Params, length: float) -> Params:
    """(∂²L/∂λ∂w)·direction, by a central difference between weights moved by ``length`` to either side.

    The error is ‖direction‖·(length²/6 times the third derivative ∂⁴L/∂λ∂w³ along the direction, and rounding:
    the relative precision of ∂L/∂λ divided by length).
    """
    size = norm(direction)
    if size == 0.0:
        return zeros_like(training.hparams())
    step = length / size
    ahead = training.hparams_at(add(weights, direction, step))
    behind = training.hparams_at(add(weights, direction, -step))
    return {name: (x - behind[name]) / (2.0 * step) for name, x in ahead.items()}


def step_sizes(problem: BilevelProblem, step_size: float | str) -> dict[str, float]:
    """The step size of each parameter: the number, or with ``"lr"`` the inner optimizer's learning rate of its group.

    Negative where the inner optimizer climbs (``maximize=True``).
    """
    found = {}
    for group, names in problem.parameter_groups:
        size = float(group["lr"]) if isinstance(step_size, str) else step_size
        found.update(dict.fromkeys(names, -size if group.get("maximize") else size))
    return found


def refuse_ascent(problem: BilevelProblem, name: str) -> None:
    """Refuse an inner optimizer that climbs, for a method that descends on L itself.

    Raises:
        BackendError: with what to do.
    """
    if any(group.get("maximize") for group in problem.optimizer.param_groups):
        raise BackendError(
            f"backend {name!r} descends on the training loss, and the inner optimizer climbs on it (maximize=True). "
            "Return the negative of the loss and leave maximize out."
        )


def scaled(x: Params, factors: dict[str, float]) -> Params:
    """x with each tensor multiplied by its own factor."""
    return {name: factors[name] * tensor for name, tensor in x.items()}


def update_adjoint(problem: BilevelProblem, weights: Params, gradient: Derivatives, vector: Params) -> Params:
    """(∂Φ/∂g)ᵀ·vector, where w ← w − Φ(g) is the inner optimizer's next update and g the gradient that it is given.

    The optimizer's state is taken as it stands; a parameter that the update leaves alone has a row of zeros.
    """
    rule = update_rule(problem.optimizer)
    params = problem.params
    adjoint = zeros_like(vector)
    for group, held in problem.parameter_groups:
        names = [name for name in held if name in gradient.used]
        if not names:
            continue
        grads = [gradient.weights[name].detach().requires_grad_() for name in names]
        slots = [existing_slots(rule, group, problem.optimizer.state.get(params[name], {})) for name in names]
        with torch.enable_grad():
            moved, _ = apply_update(rule, group, {}, [weights[name] for name in names], grads, slots)
        pulled = torch.autograd.grad(
            moved, grads, [-vector[name] for name in names], allow_unused=True, materialize_grads=True
        )
        adjoint.update(zip(names, pulled, strict=True))
    return adjoint
