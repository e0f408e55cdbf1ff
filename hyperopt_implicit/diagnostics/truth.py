"""What a hypergradient should be: finite differences of F through the whole inner problem, and the theorem solved.

Finite differences know nothing of derivatives: the inner problem is minimised anew, or trained through anew, for other
hyperparameters, and F is read off. Several step sizes tell the error of truncation, which falls with the step, from
that of rounding, which grows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hyperopt_implicit.backend import Hypergradient, Status, get_backend
from hyperopt_implicit.diagnostics.twin import Twin
from hyperopt_implicit.distributed import first_decides
from hyperopt_implicit.errors import BackendError
from hyperopt_implicit.implicit import ImplicitBackend
from hyperopt_implicit.newton import inner_hessian, newton
from hyperopt_implicit.operators import Damped, LossHessian
from hyperopt_implicit.vectors import Params, dot, norm, scale_

STEPS = (1e-1, 1e-2, 1e-3, 1e-4)
_DENSE = 1500  # parameters up to which a Hessian is formed
_SOLVED = 1e-7  # gradient of L, beside that of F, at which a place counts as a minimum


@dataclass(frozen=True)
class Slope:
    """dF/dλ along one direction, by central differences [F(λ + hd) − F(λ − hd)] / 2h.

    Attributes:
        name: the hyperparameter that is moved, or ``"all"``.
        direction: d, of norm 1, in unconstrained values.
        steps: h, falling.
        quotients: the difference quotient for each.
    """

    name: str
    direction: Params
    steps: tuple[float, ...]
    quotients: tuple[float, ...]

    @property
    def _best(self) -> int:
        gaps = [abs(a - b) for a, b in zip(self.quotients, self.quotients[1:], strict=False)]
        return min(range(len(gaps)), key=lambda i: gaps[i] if math.isfinite(gaps[i]) else math.inf)

    @property
    def value(self) -> float:
        """From the two neighbouring steps that agree best, their error of order h² removed (Richardson)."""
        i = self._best
        ratio = (self.steps[i] / self.steps[i + 1]) ** 2
        return (ratio * self.quotients[i + 1] - self.quotients[i]) / (ratio - 1.0)

    @property
    def uncertainty(self) -> float:
        """How far those two are apart."""
        i = self._best
        return abs(self.quotients[i] - self.quotients[i + 1])

    @property
    def best_step(self) -> float:
        """The smaller one of those two steps: larger ones are truncated, smaller ones rounded off."""
        return self.steps[self._best + 1]


def along(gradients: Params, slope: Slope) -> float:
    """⟨gradient, d⟩."""
    return dot(*({name: x.double() for name, x in each.items()} for each in (gradients, slope.direction)))


def directions(twin: Twin, seed: int, most: int = 6) -> list[tuple[str, Params]]:
    """One random direction of norm 1 for each declared hyperparameter, and one for all where there are several."""
    generator = torch.Generator().manual_seed(seed)
    hparams = twin.problem.hparams
    drawn = {name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for name, p in hparams.items()}
    declared = list(dict.fromkeys(name.split(".")[0] for name in hparams))
    groups = [(name, {name}) for name in declared[:most]]
    if len(declared) > 1:
        groups.append(("all", set(declared)))
    found = []
    for label, names in groups:
        direction = {key: x.clone() if key.split(".")[0] in names else torch.zeros_like(x) for key, x in drawn.items()}
        found.append((label, scale_(direction, 1.0 / norm(direction))))
    return found


def slope(twin: Twin, label: str, direction: Params, after: Callable[[], object]) -> Slope:
    """F after ``after()``, which minimises or trains, differenced along a direction for every step size."""

    def value(offset: float) -> float:
        with twin.displaced(direction, offset):
            after()
            return twin.validation_loss()

    quotients = tuple((value(h) - value(-h)) / (2.0 * h) for h in STEPS)
    return Slope(label, direction, STEPS, quotients)


# --------------------------------------------------------------------------------------------------- the inner minimum


@dataclass(frozen=True)
class Minimum:
    """How far minimising the inner problem came.

    Attributes:
        gradient_norm: ‖∂L/∂w‖ that is left.
        solved: whether it is as good as zero beside ‖∂F/∂w‖, and L curves upwards there.
        curves_down: whether it is as good as zero where L curves downwards: a saddle point.
        iterations: Newton steps.
    """

    gradient_norm: float
    solved: bool
    curves_down: bool
    iterations: int


def minimise(twin: Twin, *, target: float = 0.0, seconds: float = 60.0, max_iterations: int = 200) -> Minimum:
    """Newton's method with conjugate gradients and a line search, from the twin's weights, which it moves.

    It stops at ``target``, or where rounding lets the gradient fall no further.
    """
    vector, _ = twin.validation_gradients()
    floor = max(target, 1e-15 * norm(vector))
    if not twin.is_twice_differentiable():
        _descend(twin, floor, seconds)
        return _minimum(twin, 0)
    hparams = twin.problem.hparams

    def hessian_at(params: Params) -> LossHessian:
        with twin.seeded():
            return inner_hessian(twin.problem, params, hparams, twin.training)

    found = newton(
        hessian_at, twin.problem.params, target=floor, scale=norm(vector), max_steps=max_iterations, seconds=seconds
    )
    with torch.no_grad():
        for name, p in twin.problem.params.items():
            p.copy_(found.params[name])
    return _minimum(twin, found.steps)


def _minimum(twin: Twin, iterations: int) -> Minimum:
    size, scale = norm(twin.gradient()), norm(twin.validation_gradients()[0])
    flat = math.isfinite(size) and size <= _SOLVED * scale
    curves_down = flat and twin.is_twice_differentiable() and _curves_down(twin)
    return Minimum(size, flat and not curves_down, curves_down, iterations)


@torch.no_grad()
def _curves_down(twin: Twin) -> bool:
    """Whether conjugate gradients from a random vector meet a direction of negative curvature."""
    generator = torch.Generator().manual_seed(0)
    vector = {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        for name, p in twin.problem.params.items()
    }
    solver = get_backend("cg", tolerance=1e-4, max_iterations=100, warm_start=False)
    assert isinstance(solver, ImplicitBackend)
    return solver.solve(twin.hessian(), vector, {}).status is Status.NEGATIVE_CURVATURE


def _descend(twin: Twin, target: float, seconds: float) -> None:
    """L-BFGS, for losses that can be differentiated only once."""
    params = list(twin.problem.params.values())
    optimizer = torch.optim.LBFGS(
        params, max_iter=100, history_size=50, tolerance_grad=0.0, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        for p, g in zip(params, twin.gradient().values(), strict=True):
            p.grad = g
        return twin.training_loss()

    until, last = time.perf_counter() + seconds, math.inf
    while first_decides(time.perf_counter() < until):
        optimizer.step(closure)
        size = norm(twin.gradient())
        if size <= target or not size < 0.9 * last:
            break
        last = size
    for p in params:
        p.grad = None


# -------------------------------------------------------------------------------------------------------- the theorem


def theorem(twin: Twin, like: ImplicitBackend | None = None) -> Hypergradient:
    """∂F/∂λ − (∂²L/∂λ∂w) A⁻¹ ∂F/∂w at the twin's weights, solved to rounding.

    A is H, or what ``like`` makes of it by its damping and its choice of curvature.
    """
    size = sum(p.numel() for p in twin.problem.params.values())
    choice = {} if like is None else {"damping": like.damping, "curvature": like.curvature}
    if size <= _DENSE:
        backend = get_backend("exact", max_parameters=_DENSE, **choice)
    else:
        backend = get_backend("minres", tolerance=1e-12, max_iterations=2000, warm_start=False, **choice)
    return twin.hypergradient(backend)[0]


def true_residual(twin: Twin, backend: ImplicitBackend) -> tuple[float, float | None] | None:
    """‖Au − v‖/‖v‖ worked out anew from u, and as the backend's solver reports it; None where it solves nothing."""
    vector, _ = twin.validation_gradients()
    if not norm(vector) > 0.0:
        return None
    with twin.seeded():
        curvature = backend.linearise(twin.problem, twin.training)
    with torch.no_grad():
        try:
            solution = backend.solver(twin.problem)(backend.damped(curvature), vector, {})
        except BackendError:
            return None
        product = Damped(curvature, backend.damping) @ solution.value  # a backend may add the damping by itself
    left = norm({name: x - vector[name] for name, x in product.items()})
    return left / norm(vector), solution.residual


def unrolled(twin: Twin) -> Hypergradient:
    """dF/dλ through all steps of the twin's training batches, by reverse differentiation."""
    return twin.hypergradient(get_backend("unrolled"))[0]


def difference(x: Params, y: Params) -> float:
    """‖x − y‖, in float64."""
    return norm({name: x[name].double() - y[name].double() for name in x})
