"""``saba``: ``soba`` with a memory of what each batch gave at its last visit, which takes the noise out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hyperopt_implicit.backend import Card, Hypergradient, State, Status
from hyperopt_implicit.errors import BackendError
from hyperopt_implicit.micro_batches import all_parts, parts_of
from hyperopt_implicit.one_loop import measured
from hyperopt_implicit.operators import validation_gradients
from hyperopt_implicit.vectors import Params, add, add_, clone, is_finite, norm, same_shapes, zeros_like
from hyperopt_implicit_backends.soba import Soba

if TYPE_CHECKING:
    from hyperopt_implicit.problem import BilevelProblem


@dataclass(frozen=True)
class Saba(Soba):
    """Stochastic average bilevel algorithm: ``soba`` with variance reduction, without its noise floor on mini-batches.

    Each quantity q of a batch (A_i u and (∂²L_i/∂λ∂w) u of a training batch, ∂F_j/∂w and ∂F_j/∂λ of a validation
    batch) is remembered as of its last visit, q̃_i, and SAGA's estimate of the average over all batches,

        q̂ = q_i − q̃_i + (1/N) Σ_k q̃_k,

    takes its place in the two steps of ``soba``: the hypergradient is q̂(∂F/∂λ) − q̂((∂²L/∂λ∂w) u_t) and u_{t+1} = u_t
    − ρ(q̂(A u_t) − q̂(v)). For batches drawn at random it is unbiased, and its variance goes to zero as u and the
    weights settle, so at weights that stay the same u_t converges to A⁻¹v of the average loss at a linear rate, on
    mini-batches and with a constant ρ; ``soba`` on the same batches stops at a noise proportional to ρ. Several
    training batches at a call are averaged, one graph at a time. In the first pass, before all batches were visited,
    averages are over those that were. On one training and one validation batch it is ``soba``.

    ``step_size="auto"`` is 1/(3 λ_max), the step that SAGA's theory asks for, with λ_max of the batches as they come;
    with a single training batch it is 1/λ_max.

    Batches must be told apart: ``training_data`` and ``validation_data`` of the problem are lists of batches on the
    model's device, and a batch is known by its tensors, not by their values. A loader that draws or augments anew at
    each pass has no batches to remember: use ``soba`` there. Status and residual are those of ``soba``, with the
    estimates in the place of A u and v. A residual above 10 empties the memory.

    The paper reduces the variance of the inner steps by the same means. Here they are the inner optimizer's.

    Cost: one product and one mixed derivative for each training batch given, one more product with
    ``step_size="auto"``. Memory, all of it carried and saved: N·(n + m) numbers for N training batches, n weights and m
    hyperparameters, and as much for each validation batch.

    References:
        Dagréou, Ablin, Vaiter, Moreau, "A framework for bilevel optimization that enables stochastic and global
            variance reduction algorithms", NeurIPS 2022.
        Defazio, Bach, Lacoste-Julien, "SAGA: A Fast Incremental Gradient Method With Support for Non-Strongly Convex
            Composite Objectives", NeurIPS 2014.

    Example:
        >>> import hyperopt_implicit as hi
        >>> hi.get_backend("saba", step_size=0.1)
        Saba(damping=0.0, curvature='hessian', step_size=0.1)
    """

    card: ClassVar[Card] = Card(
        family="one-loop",
        gives="the theorem's value on all data in the long run, without a noise floor",
        cost="1 product for each batch given, 1 more for the step size",
        memory="1 and m numbers for each training and each validation batch",
        conditions="data in lists of batches; A positive definite, ρ ≤ 1/(3 λ_max)",
        use="many small outer steps over batches that come back, where noise limits 'soba'",
        paper="Dagréou et al. 2022",
    )

    def check(self, problem: BilevelProblem) -> None:
        super().check(problem)
        _check_batches(_listed(problem.training_data, "training"), "training", problem.device)
        _check_batches(_listed(problem.validation_data, "validation"), "validation", problem.device)

    def hypergradient(
        self,
        problem: BilevelProblem,
        training_batches: Sequence[Any],
        validation_batch: Any,
        state: State,
        /,
    ) -> Hypergradient:
        known = _listed(problem.training_data, "training")
        held_out = _listed(problem.validation_data, "validation")
        training = {_place(batch, known, "training"): batch for batch in all_parts(training_batches)}
        place = _place(validation_batch, held_out, "validation")
        loss, slope, direct = validation_gradients(problem, validation_batch)
        if not is_finite(slope) or not is_finite(direct):  # which must not enter the memory
            return self.differentiate(self.linearise(problem, training_batches), slope, direct, loss, state)
        vector, slopes = reduced(state.get("slopes"), {place: slope}, len(held_out))
        direct, directs = reduced(state.get("directs"), {place: direct}, len(held_out))
        state = {**state, "slopes": slopes, "directs": directs}
        if norm(vector) == 0.0:  # F does not depend on w: nothing to solve
            return self.differentiate(self.linearise(problem, training_batches), vector, direct, loss, state)
        training_losses, hvps = [], 0
        products: dict[str, Params] = {}
        mixeds: dict[str, Params] = {}
        rate, u = 0.0, vector
        spectrum: State = {}
        with torch.no_grad():
            for index, batch in training.items():
                hessian = self.linearise(problem, [batch])
                operator = self.damped(hessian)
                if not products:
                    whole, parts = hessian, len(parts_of(training_batches[0]))
                    if parts > 1 and self.step_size == "auto":
                        whole = self.linearise(problem, training_batches[:1])
                    rate, spectrum = self.rate(self.damped(whole), vector, state)
                    rate = rate / 3 if self.step_size == "auto" and len(known) > parts else rate
                    hvps += whole.products if whole is not hessian else 0
                    del whole
                    u = self.start(vector, state, rate)
                products[index], mixeds[index] = operator @ u, hessian.mixed(u)
                training_losses.append(hessian.loss)
                hvps += hessian.products
                del hessian, operator  # or their graph would be held while the next one is built
            product, remembered = reduced(state.get("products"), products, len(known))
            mixed, remembered_mixed = reduced(state.get("mixeds"), mixeds, len(known))
            seen = measured(u, product, vector)
            solution = seen.report(1, spectrum, carried=add(u, seen.residual, rate))
        # a solution that was replaced by zero has no mixed term
        gradients = add(direct, mixed, -1.0) if solution.value is u else direct
        kept = not seen.lost and is_finite(gradients)
        memory = {"products": remembered, "mixeds": remembered_mixed} if kept else {}
        return Hypergradient(
            gradients=gradients,
            status=solution.status if is_finite(gradients) else Status.NON_FINITE,
            iterations=solution.iterations,
            residual=solution.residual,
            hvps=hvps,
            validation_loss=loss,
            training_loss=sum(training_losses) / len(training_losses),
            state={"slopes": slopes, "directs": directs, **solution.state, **memory},
        )


def reduced(memory: State | None, fresh: Mapping[str, Params], count: int) -> tuple[Params, State]:
    """SAGA's estimate of an average over batches, from what some of them give now, and the new memory.

    Args:
        memory: what the last call returned; forgotten where it is of another number of batches, or of other shapes.
        fresh: what was just computed, by the batch's place.
        count: the number of batches.
    """
    like = next(iter(fresh.values()))
    if memory is None or memory["count"] != count or not same_shapes(memory["mean"], like):
        memory = {"count": count, "mean": zeros_like(like), "last": {}}
    last: dict[str, Params] = dict(memory["last"])
    mean = clone(memory["mean"])
    for place, value in fresh.items():
        if place not in last:
            last[place] = value
            add_(mean, add(value, mean, -1.0), 1.0 / len(last))
    change = zeros_like(like)
    for place, value in fresh.items():
        add_(change, add(value, last[place], -1.0), 1.0 / len(fresh))
    last.update(fresh)
    return add(mean, change), {"count": count, "mean": add_(mean, change, len(fresh) / len(last)), "last": last}


def _listed(data: Any, role: str) -> Sequence[Any]:
    """The data, which has to be a list."""
    if isinstance(data, list | tuple):
        return data
    found = "there is none" if data is None else f"it is a {type(data).__name__}"
    raise BackendError(
        f"backend 'saba' remembers what each batch gave at its last visit, so {role}_data must be a list of batches; "
        f"{found}. Make it a list (list(loader), if every pass may see the same batches), or use 'soba'."
    )


def _check_batches(data: Sequence[Any], role: str, device: torch.device) -> None:
    first: dict[tuple[int, ...], int] = {}
    for place, batch in enumerate(data):
        for leaf in pytree.tree_leaves(batch):
            if isinstance(leaf, Tensor) and leaf.device != device:
                raise BackendError(
                    f"backend 'saba' knows a batch by its tensors, so those of {role}_data must be on the model's "
                    f"device, {device}; batch {place} has one on {leaf.device}. Move them there before the problem "
                    "is built, or use 'soba'."
                )
        earlier = first.setdefault(_identity(batch), place)
        if earlier != place:
            raise BackendError(
                f"backend 'saba' knows a batch by its tensors, so {role}_data must hold each batch once; batches "
                f"{earlier} and {place} are the same. Remove one, or use 'soba'."
            )


def _place(batch: Any, data: Sequence[Any], role: str) -> str:
    """Where in the data a batch is, as a key."""
    identity = _identity(batch)
    for place, each in enumerate(data):
        if _identity(each) == identity:
            return str(place)
    raise BackendError(
        f"backend 'saba' knows a batch by its tensors, and the {role} batch given is none of the {len(data)} in "
        f"{role}_data. Hand over the batches of that list themselves, or use 'soba'."
    )


def _identity(batch: Any) -> tuple[int, ...]:
    return tuple(id(leaf) for leaf in pytree.tree_leaves(batch))
