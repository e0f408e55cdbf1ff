"""``fixed_point``: the adjoint of the inner optimizer's own update map, iterated at the present weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hyperopt_implicit.backend import Card, State, Status
from hyperopt_implicit.errors import BackendError
from hyperopt_implicit.implicit import ImplicitBackend, Solution, Solve, first_iterate
from hyperopt_implicit.operators import LinearOperator
from hyperopt_implicit.vectors import Params, add, clone, norm, precision, zeros_like

if TYPE_CHECKING:
    from hyperopt_implicit.problem import BilevelProblem

_TRANSIENT = 100.0  # how far the residual of a stable iteration may rise above its start before it falls
_ROUNDING = 1000.0  # residuals, in units of rounding, that go up and down by chance


@dataclass(frozen=True)
class FixedPoint(ImplicitBackend):
    """The fixed-point method: the adjoint of the inner optimizer's own update map, iterated to A u = v.

    With Φ the map of one inner step on weights and optimizer state, linearised at a stationary point, u_k is what
    differentiating through k steps at that point gives, and converges as training itself does:

        r_k = v − A u_k,   z_{k+1} = μ z_k + D r_k,   u_{k+1} = u_k + (1 − d) z_{k+1},   u_0 = z_0 = 0.

    For SGD, D is the learning rate α (of each parameter's group), μ the momentum and d the dampening; without
    dampening this is heavy ball, u_{k+1} = u_k + α r_k + μ(u_k − u_{k−1}), and without momentum the Neumann series.
    With Nesterov's momentum, u_{k+1} = u_k + α r_k + μ z_{k+1}. (The adjoint of w' = w − α b', b' = μ b + (1 − d)
    ∂L/∂w carries p for w and q for b; z = α p − q and p = v − A u turn it into the above. A is symmetric, so this is
    the optimizer itself, run on ½ uᵀA u − vᵀu.) For Adam and AdamW, the preconditioner is frozen: D = α/(√ŝ + ε),
    with ŝ the second moment of the optimizer's present state, corrected for its bias; μ = d = β1, and the bias
    correction of the first moment is taken at its limit, one. At a stationary point the update does not depend on the
    second moment to first order, so nothing else is lost by freezing it. For RMSprop, D = α/(√s + ε), centred where
    the optimizer is, μ its momentum and d = 0. AdamW's decay is no part of A, as for every implicit backend, and is
    left out of the map.

    The error is multiplied by the spectral radius of the map's Jacobian an iteration, asymptotically: max |1 − αλ|
    for plain SGD. It is the method to take where the hypergradient should err as unrolling would, without storing
    iterates, and needs no step size of its own. With few iterations it damps the directions in which training is
    slow.

    The residual of a momentum method goes up and down. Where it rises above 100 times its start, or ends above it,
    the learning rate is too large for the curvature (or A is indefinite), and the iterate of least residual is
    returned with status ``diverged``; otherwise it is the last. Parameters of which the optimizer has no state yet,
    though others have, are not moved by it (Adam, RMSprop), and u stays where it began there; where none has, the
    backend refuses.

    Cost: one product an iteration, one more for a warm start; memory for six vectors, one of them carried, and for
    Adam and RMSprop one more. With ``warm_start`` (off for the k-step derivative itself) u_0 is the last outer step's
    solution.

    References:
        Grazzi, Franceschi, Pontil, Salzo, "On the Iteration Complexity of Hypergradient Computation", ICML 2020,
            section 2.2 (the map Φ there is that of any inner solver; the momentum and Adam forms are worked out here).

    Example:
        >>> import hyperopt_implicit as hi
        >>> hi.get_backend("fixed_point", iterations=50)
        FixedPoint(damping=0.0, curvature='hessian', iterations=50, tolerance=0.0, warm_start=True)
    """

    iterations: Annotated[int, Field(ge=1, description="iterations, one product each")] = 20
    tolerance: Annotated[float, Field(ge=0, description="stop early at this relative residual")] = 0.0
    warm_start: Annotated[bool, Field(description="begin at the last outer step's solution")] = True

    card: ClassVar[Card] = Card(
        family="implicit",
        gives="what k unrolled steps of the optimizer would give at a stationary point; converges as training does",
        cost="k products (k = iterations), 1 more for a warm start",
        memory="6, 7 with Adam or RMSprop",
        conditions="the learning rate is stable for A; SGD, Adam, AdamW or RMSprop",
        use="instead of unrolling near a minimum; no step size to choose",
        paper="Grazzi et al. 2020",
    )

    def check(self, problem: BilevelProblem) -> None:
        super().check(problem)
        found = type(problem.optimizer)
        if found not in _MAPS:
            raise BackendError(
                "backend 'fixed_point' iterates the inner optimizer's own update, and knows that of "
                f"{', '.join(each.__name__ for each in _MAPS)}; got {found.__name__}. Use one of these, or 'cg' or "
                "'neumann', which do not look at the optimizer."
            )
        if any(group.get("amsgrad") for group in problem.optimizer.param_groups):
            raise BackendError(
                "backend 'fixed_point' iterates the inner optimizer's own update, and does not know that of "
                f"{found.__name__} with amsgrad=True. Set amsgrad=False, or use 'cg' or 'neumann', which do not look "
                "at the optimizer."
            )

    def solver(self, problem: BilevelProblem) -> Solve:
        updates = _updates(problem)
        return lambda operator, vector, state: self._iterate(operator, vector, state, updates)

    def solve(self, operator: LinearOperator, vector: Params, state: State, /) -> Solution:
        raise BackendError(
            "backend 'fixed_point' iterates the update of the inner optimizer of a BilevelProblem, and there is none "
            "here. Use HyperOptimizer or hypergradient with a BilevelProblem, or the backend 'neumann' or 'cg'."
        )

    def _iterate(self, operator: LinearOperator, vector: Params, state: State, updates: dict[str, _Update]) -> Solution:
        whole = norm(vector)
        target = max(self.tolerance, precision(vector)) * whole
        last = state.get("solution") if self.warm_start else None
        solution, residual, _ = first_iterate(operator, vector, last)
        velocity = zeros_like(vector)
        start = size = norm(residual)
        allowed = max(start, _ROUNDING * precision(vector) * whole)
        best, least = solution, size
        status, iterations = Status.TRUNCATED, 0
        while iterations < self.iterations and size > target:
            velocity = {name: updates[name].velocity(z, residual[name]) for name, z in velocity.items()}
            solution = {name: updates[name].move(u, velocity[name], residual[name]) for name, u in solution.items()}
            residual = add(vector, operator @ solution, -1.0)
            size = norm(residual)
            iterations += 1
            if not math.isfinite(size):
                status = Status.NON_FINITE
                break
            if size < least:
                best, least = solution, size
            if size > _TRANSIENT * allowed:
                status = Status.DIVERGED
                break
        if status is Status.TRUNCATED and size > allowed:
            status = Status.DIVERGED
        if status is Status.TRUNCATED and size <= target:
            status = Status.CONVERGED
        if status.failed:
            solution, size = best, least
        carried = {"solution": clone(solution)} if self.warm_start and status is not Status.NON_FINITE else {}
        return Solution(solution, status, iterations, size / whole, carried)


@dataclass(frozen=True)
class _Update:
    """The update of one parameter, linearised: b' = momentum·b + newest·g, w' = w − rate·b' (look ahead: − rate·…).

    Attributes:
        rate: D, the learning rate times the preconditioner.
        momentum: μ.
        newest: 1 − d.
        nesterov: whether the step is taken along g + μ b'.
    """

    rate: float | Tensor
    momentum: float = 0.0
    newest: float = 1.0
    nesterov: bool = False

    def velocity(self, z: Tensor, r: Tensor) -> Tensor:
        return self.momentum * z + self.rate * r

    def move(self, u: Tensor, z: Tensor, r: Tensor) -> Tensor:
        return u + self.rate * r + self.momentum * z if self.nesterov else u + self.newest * z


Group = dict[str, Any]


def _sgd(group: Group, state: dict[str, Any]) -> _Update:
    return _Update(
        rate=float(group["lr"]),
        momentum=float(group["momentum"]),
        newest=1.0 - float(group["dampening"]) if group["momentum"] else 1.0,
        nesterov=group["nesterov"],
    )


def _adam(group: Group, state: dict[str, Any]) -> _Update:
    beta1, beta2 = (float(beta) for beta in group["betas"])
    second = state["exp_avg_sq"] / (1.0 - beta2 ** float(state["step"]))
    return _Update(rate=_over(group, second), momentum=beta1, newest=1.0 - beta1)


def _rmsprop(group: Group, state: dict[str, Any]) -> _Update:
    second = state["square_avg"]
    if group["centered"]:
        second = second - state["grad_avg"].square()
    return _Update(rate=_over(group, second), momentum=float(group["momentum"]))


def _over(group: Group, second: Tensor) -> Tensor:
    return float(group["lr"]) / (second.sqrt() + float(group["eps"]))


_MAPS: dict[type[torch.optim.Optimizer], Callable[[Group, dict[str, Any]], _Update]] = {
    torch.optim.SGD: _sgd,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.RMSprop: _rmsprop,
}


@torch.no_grad()
def _updates(problem: BilevelProblem) -> dict[str, _Update]:
    """The linearised update of each parameter.

    Raises:
        BackendError: the optimizer's preconditioner is not known yet.
    """
    optimizer = problem.optimizer
    keeps_state = type(optimizer) is not torch.optim.SGD
    if keeps_state and not any(optimizer.state.get(p) for p in problem.params.values()):
        raise BackendError(
            f"backend 'fixed_point' takes the preconditioner of {type(optimizer).__name__} from the optimizer's state, "
            "and the optimizer has not taken a step yet. Train before the first hypergradient, or use 'cg' or "
            "'neumann'."
        )
    found = {}
    for group, names in problem.parameter_groups:
        for name in names:
            state = optimizer.state.get(problem.params[name], {})
            update = _MAPS[type(optimizer)](group, state) if state or not keeps_state else _Update(rate=0.0)
            if group.get("maximize"):
                update = _Update(-update.rate, update.momentum, update.newest, update.nesterov)
            found[name] = update
    return found
