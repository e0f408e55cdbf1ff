"""Products in bfloat16, and the float32 residuals that keep solvers honest about them.

The graph whose products are taken is built under autocast; weights, u, residuals and inner products stay in the model's
own dtype. Rounding makes each product A₁₆u wrong by some tenths of a percent, and the solution with it. A float32 graph
of the same loss, with the same masks of random layers, gives c = (A₁₆ − A₃₂)u, and A₁₆u = v + c has the solution of
A₃₂u = v: iterative refinement (Wilkinson, "Rounding Errors in Algebraic Processes", 1963, section 3), written with
another right-hand side. Solvers know nothing of it: they are handed A₁₆ and v + c.

c cannot be kept for later calls: it is rounding, and is drawn anew as soon as weights move by the spacing of bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from hyperopt_implicit.backend import State, Status
from hyperopt_implicit.errors import BackendError
from hyperopt_implicit.messages import first_line, warn
from hyperopt_implicit.operators import Hessian, LinearOperator, LossHessian
from hyperopt_implicit.randomness import random_states, replaying
from hyperopt_implicit.stopwatch import quickest
from hyperopt_implicit.vectors import Params, add, is_finite, norm, precision, same_shapes

if TYPE_CHECKING:
    from hyperopt_implicit.implicit import Solution, Solve
    from hyperopt_implicit.problem import BilevelProblem

KEY = "bfloat16"
"""Under which the measured speed-up stands in a backend's state."""

COARSE = 0.25
"""The share of ‖v‖ above which c is no correction any more."""

_TELLING = 2.0  # a float32 residual within so many times that of the bfloat16 system is not due to rounding
_ROUNDING = 100.0  # residual, in units of rounding, below which a solution counts as exact


# ------------------------------------------------------------------------------------------------- where there is any


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies matrices in bfloat16 itself, and does not only store it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        units = torch.cpu.get_capabilities()
        return any(bool(units.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))  # x86, then ARM
    return bool(torch.amp.is_autocast_available(device.type))


def can_lower(problem: BilevelProblem) -> bool:
    """Whether autocast has anything to lower: it leaves float64 as it is."""
    return any(p.dtype is torch.float32 for p in problem.params.values())


def check_bfloat16(problem: BilevelProblem) -> None:
    """Refuse a device that has no units for it, and warn where no parameter is in float32.

    Raises:
        BackendError: products in bfloat16 would only cost.
    """
    if not can_lower(problem):
        dtype = next(iter(problem.params.values())).dtype
        warn(
            "precision='bfloat16' lowers products of a float32 model by autocast, which leaves other types as they "
            f"are; the trained parameters are in {dtype}, and products stay in it. Leave the option out, or train in "
            "float32."
        )
    elif not has_bfloat16(problem.device):
        raise BackendError(
            "precision='bfloat16' needs a device that multiplies in bfloat16; "
            f"{_name(problem.device)} has no units for it, and would convert back and forth at every operation. Leave "
            "the option out."
        )


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    return f"this processor ({device})" if device.type == "cpu" else f"device '{device}'"


_speedups: WeakKeyDictionary[BilevelProblem, dict[type[Hessian], float]] = WeakKeyDictionary()


def bfloat16_speedup(problem: BilevelProblem, training_batches: Sequence[Any], kind: type[Hessian] = Hessian) -> float:
    """How many times faster a product is in bfloat16 than in the model's own dtype.

    Measured with a few products of each on the first of the batches, once for each problem and kind of curvature; 0
    where the device has no units for it or the model is not in float32. Neither the model nor the global random state
    moves.
    """
    if not can_lower(problem) or not has_bfloat16(problem.device):
        return 0.0
    known = _speedups.setdefault(problem, {})
    if kind not in known:
        full, low = product_seconds(problem, training_batches[0], kind)
        known[kind] = full / low
    return known[kind]


def product_seconds(problem: BilevelProblem, batch: Any, kind: type[Hessian]) -> tuple[float, float]:
    """Seconds for a product in the model's own dtype, and in bfloat16."""
    states = random_states(problem.device)
    forms: list[LossHessian] = []
    make = partial(kind, problem, [batch])
    for build in (make, partial(lowered, make)):
        with replaying(states, problem.device):
            forms.append(build())
    vector = {name: torch.ones_like(p) for name, p in problem.params.items()}
    full, low = quickest([partial(hessian.__matmul__, vector) for hessian in forms], problem.device)
    return full, low


def speedup_or_warning(
    problem: BilevelProblem, training_batches: Sequence[Any], state: State, kind: type[Hessian]
) -> float:
    """The speed-up, measured or carried; with a warning, once for each problem and kind, where there is none.

    Raises:
        BackendError: the device has no units for it.
    """
    carried: State = state.get(KEY, {})
    if "speedup" in carried:
        return float(carried["speedup"])
    if kind in _speedups.get(problem, {}):
        return _speedups[problem][kind]
    check_bfloat16(problem)  # a caller may have left the backend's own check out
    speedup = bfloat16_speedup(problem, training_batches, kind)
    if speedup < 1.0:
        warn(
            f"precision='bfloat16' is slower on this problem: a Hessian-vector product takes {1.0 / speedup:.2f} times "
            f"as long as in {next(iter(problem.params.values())).dtype} (measured on the first training batch). Leave "
            "the option out; it pays where most of the work is in large matrix products."
        )
    return speedup


def lowered(make: Callable[[torch.dtype | None], LossHessian]) -> LossHessian:
    """What is made in bfloat16, with the project's error where the loss runs in its own dtype, but not in that."""
    try:
        return make(torch.bfloat16)
    except RuntimeError as error:
        if "dtype" not in str(error) and "BFloat16" not in str(error):
            raise
        make(None)  # raises where the error is of the loss itself
        raise BackendError(
            "precision='bfloat16' runs the training loss under torch.autocast, and the loss must allow for results in "
            f"bfloat16; this one does not (torch says: {first_line(error)}). Convert with .float() or .to(other.dtype) "
            "where that happens, or leave the option out."
        ) from error


# ------------------------------------------------------------------------------------------------------ two precisions


class LowPrecision(LossHessian):
    """Curvature whose products are in bfloat16, beside the same in the model's own dtype, built when asked for.

    Random layers draw the same masks in both.

    Args:
        problem: whose training loss.
        make: builds the curvature in the dtype of autocast that it is given, or in the model's own where that is None.

    Attributes:
        loss: L, of the graph in bfloat16 until the other is built.
    """

    def __init__(self, problem: BilevelProblem, make: Callable[[torch.dtype | None], LossHessian]) -> None:
        self._make, self._device = make, problem.device
        self._random = random_states(problem.device)
        self._low = lowered(make)
        self._full: LossHessian | None = None
        self._first: tuple[Params, Params] | None = None
        self._last: tuple[Params, Params] | None = None
        self.loss, self.gradient = self._low.loss, self._low.gradient

    def __matmul__(self, vector: Params) -> Params:
        """The product in bfloat16."""
        if self._first is not None and self._first[0] is vector:
            return self._first[1]
        self.products += 1
        return self._low @ vector

    def multiply_and_mix(self, vector: Params) -> Params:
        """The product and the mixed derivative in bfloat16."""
        self.products += 1
        self._last = vector, self._low.multiply_and_mix(vector)
        return self._last[1]

    def mixed(self, vector: Params) -> Params:
        """The mixed derivative, of the graph in the model's own dtype where there is one."""
        return (self._low if self._full is None else self._full).mixed(vector)

    def full_product(self, vector: Params) -> Params:
        """The product in the model's own dtype; its mixed derivative is then known."""
        if self._full is None:
            with replaying(self._random, self._device):
                self._full = self._make(None)
            self.loss, self.gradient = self._full.loss, self._full.gradient
        self.products += 1
        return self._full.multiply_and_mix(vector)

    def lost(self, vector: Params, full: Params) -> Params:
        """What the product in bfloat16 has too much, beside the full one."""
        known = self._last is not None and self._last[0] is vector
        return add(self._last[1] if known and self._last is not None else self @ vector, full, -1.0)

    def lost_at_first(self, vector: Params) -> Params:
        """The same of a vector that nobody changes, and which the solver is likely to multiply by first."""
        self._first = vector, self @ vector
        return add(self._first[1], self.full_product(vector), -1.0)


# -------------------------------------------------------------------------------------------------------- refinement


@dataclass(frozen=True)
class Refinement:
    """How a solver is wrapped.

    Attributes:
        damping: δ.
        count: solves in addition to the first at most, where the float32 residual asks for them; with 0 nothing is ever
            multiplied in float32.
        tolerance: of the relative residual; 0 for a solver that has none.
        speedup: of a product in bfloat16, to be carried.
    """

    damping: float
    count: int
    tolerance: float
    speedup: float


def refined(solve: Solve, hessian: LowPrecision, how: Refinement) -> Solve:
    """A solver of A₃₂u = v, from one that is given A₁₆ and another right-hand side.

    The residual reported is that of A₃₂u = v. With no refinements it is the solver's own, of A₁₆u = v.
    """

    def solve_refined(operator: LinearOperator, vector: Params, state: State) -> Solution:
        carried: State = state.get(KEY, {})
        kept: State = {"speedup": how.speedup}
        own = {name: x for name, x in state.items() if name != KEY}
        if how.count == 0:
            found = solve(operator, vector, own)
        else:
            found, coarse = _Refined(solve, hessian, how, operator, vector).run(own)
            if coarse is not None:
                kept["coarse"] = coarse
                if "coarse" not in carried:
                    _warn_of_coarseness(coarse)
        return replace(found, state={**found.state, KEY: kept})

    return solve_refined


@dataclass(frozen=True)
class _Seen:
    """A solution, and what is left of v in float32."""

    found: Solution
    product: Params
    residual: Params
    size: float


class _Refined:
    def __init__(
        self, solve: Solve, hessian: LowPrecision, how: Refinement, operator: LinearOperator, vector: Params
    ) -> None:
        self._solve, self._hessian, self._how, self._operator, self._vector = solve, hessian, how, operator, vector
        self._norm = norm(vector)
        self._exact = _ROUNDING * precision(vector)

    def run(self, state: State) -> tuple[Solution, float | None]:
        """The solution, and ‖c‖/‖v‖ where that is too large to correct for."""
        last: Params | None = state.get("solution")
        target = self._vector
        if last is not None and same_shapes(last, target) and is_finite(last):
            c = self._hessian.lost_at_first(last)
            if self._share(c) <= COARSE:
                target = add(target, c)
        found = self._solve(self._operator, target, state)
        if found.status.failed or found.residual is None:  # where a method measures none, it is biased by design
            return found, None
        here, count, coarse = self._look(found), found.iterations, None
        for _ in range(self._how.count):
            if not self._is_due_to_rounding(here):
                break
            c = self._hessian.lost(here.found.value, here.product)
            if not self._share(c) <= COARSE:
                coarse = self._share(c)
                break
            better = self._corrected(here, c)
            count += better.iterations
            if better.status.failed or not is_finite(better.value):
                break
            there = self._look(better)
            if not there.size < here.size:
                break
            here = there
        status = here.found.status
        if status is Status.CONVERGED and here.size > max(self._how.tolerance, self._exact):
            status = Status.TRUNCATED
        return replace(here.found, status=status, iterations=count, residual=here.size), coarse

    def _look(self, found: Solution) -> _Seen:
        product = self._hessian.full_product(found.value)
        residual = add(add(self._vector, product, -1.0), found.value, -self._how.damping)
        return _Seen(found, product, residual, self._share(residual))

    def _is_due_to_rounding(self, here: _Seen) -> bool:
        """Whether more is left than was allowed, and than the solver itself left of the system in bfloat16."""
        if not math.isfinite(here.size) or here.size <= max(self._how.tolerance, self._exact):
            return False
        return here.found.residual is None or here.size > _TELLING * here.found.residual

    def _corrected(self, here: _Seen, c: Params) -> Solution:
        if "solution" in here.found.state:  # a solver that goes on from where it was
            return self._solve(self._operator, add(self._vector, c), here.found.state)
        step = self._solve(self._operator, here.residual, here.found.state)
        return replace(step, value=add(here.found.value, step.value))

    def _share(self, x: Params) -> float:
        return norm(x) / self._norm


def _warn_of_coarseness(share: float) -> None:
    warn(
        f"products in bfloat16 must be near those in float32 for the solution to be corrected; here they differ by "
        f"{share:.0%} of ‖∂F/∂w‖, and it was not. The Hessian is badly conditioned, or random layers draw other masks "
        "in bfloat16. Use precision='full', or more damping."
    )
