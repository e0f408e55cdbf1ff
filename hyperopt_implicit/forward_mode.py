"""Forward mode: the derivative of training in given directions, carried along with it; and directions to take.

Where a :class:`~hyperopt_implicit.trajectory.Trajectory` goes back through the steps and must keep them, a tangent
∂w_t/∂λ·d goes forward beside the weights, and only the present one is held.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hyperopt_implicit.distributed import from_first, several
from hyperopt_implicit.inner_loop import InnerSteps, Iterate, flat, leaves, slot_leaves
from hyperopt_implicit.mixed_precision import linear, scaled
from hyperopt_implicit.vectors import Params, clone, is_finite

if TYPE_CHECKING:
    from hyperopt_implicit.inner_state import InnerState
    from hyperopt_implicit.problem import BilevelProblem


@dataclass(frozen=True)
class ForwardSweep:
    """Where training arrived, and how that depends on λ.

    Attributes:
        endpoint: the state after the last step.
        losses: L before each step.
        tangents: ∂w_T/∂λ·d for each direction d.
    """

    endpoint: InnerState
    losses: list[float]
    tangents: list[Params]

    @property
    def is_finite(self) -> bool:
        """Whether every loss, the last iterate and its tangents are finite."""
        return math.isfinite(sum(self.losses)) and all(map(is_finite, [self.endpoint.params, *self.tangents]))


def push_forward(problem: BilevelProblem, batches: Sequence[Any], directions: Sequence[Params]) -> ForwardSweep:
    """Inner steps from the model's present state, on copies, with the tangents in the given directions.

    A step takes the gradient of L with its graph, one Hessian-vector product a direction, and the optimizer's update
    with its derivative. Memory for the parameters and the optimizer's state, once and once more a direction, whatever
    the number of steps.

    Args:
        problem: the problem; its model, optimizer and hyperparameters are read and not changed.
        batches: one batch for each step.
        directions: in λ-space, shaped like λ.
    """
    steps = InnerSteps(problem)
    hparams = leaves(problem.hparams)
    current = steps.start()
    tangents: list[Params] = [{} for _ in directions]
    losses: list[float] = []
    for t, batch in enumerate(batches):
        loss, current, tangents = _push_step(steps, t, current, hparams, batch, tangents, directions)
        losses.append(loss)
        if not math.isfinite(loss):
            break
    end = current.inner_state
    zeros = {name: torch.zeros_like(p) for name, p in end.params.items()}
    return ForwardSweep(end, losses, [{n: z.get(f"w:{n}", zero) for n, zero in zeros.items()} for z in tangents])


def _push_step(
    steps: InnerSteps,
    t: int,
    before: Iterate,
    hparams: Params,
    batch: Any,
    tangents: list[Params],
    directions: Sequence[Params],
) -> tuple[float, Iterate, list[Params]]:
    """One step, with its tangents: those of weights and slots, by the names of ``flat``; what is missing is zero."""
    params, at = leaves(before.params), replace(before, buffers=clone(before.buffers))
    loss, by_params, by_hparams = steps.gradients(
        params, hparams, batch, at.buffers, graph=True, of_hparams=True, scaling=at.scaling
    )
    number = float(loss)
    if not steps.is_taken(by_params, at):
        return number, replace(at, scaling=steps.scaling_after(at, taken=False)), tangents
    pushed = [
        _gradient_tangent(params, by_params, by_hparams, tangent, direction, at.scaling)
        for tangent, direction in zip(tangents, directions, strict=True)
    ]
    gradient = leaves(by_params)
    del by_params, by_hparams  # the graph of L ends here, before that of the update is built

    params, slots = leaves(before.params), slot_leaves(before.slots)
    new_params, new_slots = steps.update(t, params, gradient, slots, hparams)
    inputs = {f"g:{name}": g for name, g in gradient.items()}
    inputs |= {key: x for key, x in flat(params, slots).items() if key.partition(":")[2] in gradient}
    inputs |= {f"λ:{name}": hparams[name] for name in steps.problem.hyperparameters.names("optimizer")}
    outputs = {key: x for key, x in flat(new_params, new_slots).items() if key.partition(":")[2] in gradient}
    given = [
        tangent | {f"g:{name}": x for name, x in through.items()} | {f"λ:{name}": x for name, x in direction.items()}
        for tangent, through, direction in zip(tangents, pushed, directions, strict=True)
    ]
    moved = [tangent | new for tangent, new in zip(tangents, _jacobian_products(outputs, inputs, given), strict=True)]
    slots = {name: {key: s.detach() for key, s in each.items()} for name, each in new_slots.items()}
    scaling = steps.scaling_after(at, taken=True)
    return number, Iterate({name: p.detach() for name, p in new_params.items()}, slots, at.buffers, scaling), moved


def _gradient_tangent(
    params: Params,
    by_params: Params,
    by_hparams: Params,
    tangent: Params,
    direction: Params,
    scaling: Tensor | None,
) -> Params:
    """δ(∂L/∂w) = ∂/∂w ⟨∇L, (δw, δλ)⟩, backward through the graph of ∇L: the Hessian of L in (w, λ) is symmetric."""
    pairs = [(g, tangent.get(f"w:{name}")) for name, g in by_params.items()]
    pairs += [(g, direction[name]) for name, g in by_hparams.items()]
    # where L is linear in an input, that derivative has no graph and is a constant
    found = [(g, x) for g, x in pairs if x is not None and g.requires_grad]
    moved = {name: params[name] for name in by_params}
    if not found:
        return {name: torch.zeros_like(p) for name, p in moved.items()}
    along = [x for _, x in found]
    grads = linear(
        lambda factor: torch.autograd.grad(
            [g for g, _ in found], list(moved.values()), scaled(along, factor), retain_graph=True, allow_unused=True
        ),
        along,
        scaling,
    )
    return {name: torch.zeros_like(moved[name]) if g is None else g for name, g in zip(moved, grads, strict=True)}


def _jacobian_products(outputs: Params, inputs: Params, given: Sequence[Params]) -> list[Params]:
    """J·x for each x of ``given``, in which zeros may be missing; J = ∂outputs/∂inputs.

    Jᵀu is linear in u, and its derivative with respect to u, pulled back along x, is J·x: two backwards where
    torch.optim changes tensors in place and forward-mode numbers would not follow.
    """
    outputs = {key: x for key, x in outputs.items() if x.requires_grad}
    if not outputs or not given:
        return [{} for _ in given]
    with torch.enable_grad():
        probes = {key: torch.zeros_like(x, requires_grad=True) for key, x in outputs.items()}
        pulled = torch.autograd.grad(
            list(outputs.values()), list(inputs.values()), list(probes.values()), create_graph=True, allow_unused=True
        )
    found: list[Params] = []
    for x in given:
        pairs = [
            (p, x[key]) for key, p in zip(inputs, pulled, strict=True) if p is not None and p.requires_grad and key in x
        ]
        if not pairs:
            found.append({})
            continue
        grads = torch.autograd.grad(
            [p for p, _ in pairs],
            list(probes.values()),
            [y for _, y in pairs],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        found.append(dict(zip(outputs, grads, strict=True)))
    return found


# ------------------------------------------------------------------------------------------------- directions in λ


def number_of_entries(x: Params) -> int:
    """m: the scalar hyperparameters."""
    return sum(tensor.numel() for tensor in x.values())


def basis(like: Params) -> list[Params]:
    """One direction for each entry, in their order."""
    return _shaped(torch.eye(number_of_entries(like), dtype=torch.float64), like)


@dataclass(frozen=True)
class RandomDirections:
    """Directions d with E[scale·Σ d dᵀ] = I.

    Attributes:
        directions: shaped like λ.
        scale: what a sum over them is multiplied by.
        complete: whether scale·Σ d dᵀ is I itself, not in expectation only.
    """

    directions: list[Params]
    scale: float
    complete: bool


def random_directions(
    like: Params, count: int, *, orthogonal: bool, generator: torch.Generator | None
) -> RandomDirections:
    """Random directions in the space of ``like``, with m entries.

    Args:
        like: gives names, shapes, dtypes and devices.
        count: k, how many.
        orthogonal: orthonormal ones, from the QR decomposition of a Gaussian matrix, at most m, with scale m/k;
            otherwise independent Gaussian ones, with scale 1/k.
        generator: what they are drawn from; None for torch's global one.
    """
    m = number_of_entries(like)
    k = min(count, m) if orthogonal else count
    matrix = torch.randn(m, k, generator=generator, dtype=torch.float64)
    if generator is None and several():  # the processes' global generators need not be in the same state
        from_first(matrix)
    if not orthogonal:
        return RandomDirections(_shaped(matrix.T, like), 1.0 / k, complete=False)
    return RandomDirections(_shaped(torch.linalg.qr(matrix).Q.T, like), m / k, complete=k == m)


def seeded_generator(seed: int, call: int) -> torch.Generator:
    """A generator of its own for each call under a seed, which moves no other."""
    return torch.Generator().manual_seed(1_000_003 * seed + call)


def _shaped(rows: Tensor, like: Params) -> list[Params]:
    sizes = [tensor.numel() for tensor in like.values()]
    return [
        {name: piece.reshape(x.shape).to(x) for (name, x), piece in zip(like.items(), row.split(sizes), strict=True)}
        for row in rows
    ]
