"""Compiled products: the gradient-vector product is traced, cut where the vector comes in, and both halves compiled.

The half before the cut is run once for a hypergradient, as building a graph is; the half after it once for a product.
Compiling takes seconds to tens of seconds for each kind of batch, so what is compiled is kept here, by problem, and
never in a backend. How the trace is cut and compiled is in ``tracing.py``.

What a trace cannot see it takes for a constant: a number that the loss computes outside of tensors. The gradient of the
compiled half is therefore compared with that of autograd at the first calls for each kind of batch, and every so many
after that.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hyperopt_implicit.distributed import several
from hyperopt_implicit.messages import warn
from hyperopt_implicit.operators import LossHessian, gradients, mean_training_loss, twice_differentiable
from hyperopt_implicit.randomness import random_states, replaying, set_random_states
from hyperopt_implicit.stopwatch import quickest
from hyperopt_implicit.tracing import Call, Program, UntraceableError, program
from hyperopt_implicit.vectors import Params, add, is_finite, norm, precision

if TYPE_CHECKING:
    from hyperopt_implicit.problem import BilevelProblem

MOST_KINDS = 3
"""Kinds of batch (shapes, dtypes, modes of the model) that are compiled for one problem; more stay with autograd."""

CHECKED_AT = (1, 2, 4, 8, 16)
"""Calls with a kind of batch in which the gradient is compared with autograd's, beside every ``CHECKED_EVERY``-th."""

CHECKED_EVERY = 20

_logger = logging.getLogger(__name__)


@dataclass
class _Kept:
    """What is compiled for a problem, and its calls, by kind of batch; what has been given up; ‖A x‖/‖x‖ as met."""

    programs: dict[Any, Program | None] = field(default_factory=dict)
    calls: Counter[Any] = field(default_factory=Counter)
    full: bool = False
    stiffness: float = 0.0
    given_up: bool = False


_kept: WeakKeyDictionary[BilevelProblem, _Kept] = WeakKeyDictionary()


def compiled(
    problem: BilevelProblem,
    training_batches: Sequence[Any],
    lowered: torch.dtype | None,
    eager: Callable[[], LossHessian],
    *,
    gauss_newton: bool = False,
) -> LossHessian:
    """The curvature with compiled products; that of ``eager`` where there can be none, with a warning that says why.

    Args:
        problem: whose training loss.
        training_batches: the batches over which it is averaged.
        lowered: the dtype of autocast, or None.
        eager: builds the same with autograd.
        gauss_newton: whether the curvature is the Gauss-Newton matrix.
    """
    kept = _kept.setdefault(problem, _Kept())
    if several() and not kept.given_up:
        kept.given_up = True
        warn(
            "compile=True compiles what happens within one process; among several, the processes answer each other in "
            "the middle of each product. Products are not compiled. Leave the option out."
        )
    if kept.given_up:
        return eager()
    call = Call.of(problem, training_batches, lowered, gauss_newton)
    if call.key not in kept.programs:
        if len(kept.programs) < MOST_KINDS:
            _make(problem, call, eager, kept)
        elif not kept.full:
            kept.full = True
            warn(
                f"compile=True compiles for {MOST_KINDS} kinds of batches at most (shapes, dtypes, numbers in the "
                "batch, modes of the model), and this is another; products are not compiled for it, nor for any "
                "other. Give batches of one shape, as a DataLoader does with drop_last=True, and numbers that vary as "
                "tensors."
            )
    found = kept.programs.get(call.key)
    if found is None:
        return eager()
    kept.calls[call.key] += 1
    count = kept.calls[call.key]
    before = random_states(problem.device)
    hessian = CompiledHessian(problem, found, call)
    if count in CHECKED_AT or count % CHECKED_EVERY == 0:
        with replaying(before, problem.device):
            loss, gradient = _by_autograd(problem, training_batches, lowered)
        if not _agree(hessian, loss, gradient, kept.stiffness, lowered):
            kept.given_up = True
            warn(
                "compile=True needs a training loss whose numbers are computed from tensors; the compiled loss is "
                f"{hessian.loss:.7g} here, autograd's is {loss:.7g}, and the gradients differ by "
                f"{_difference(hessian.gradient, gradient):.2g}, so something has changed since it was traced: a "
                "Python number such as a step count or a schedule, or a tensor that was replaced. Products are not "
                "compiled from here on. Make such a number part of the batch, or a buffer of the model, as a tensor."
            )
            set_random_states(before, problem.device)
            return eager()
    return hessian


class CompiledHessian(LossHessian):
    """The curvature of a loss whose product was traced and compiled.

    Args:
        problem: whose training loss.
        program: the compiled halves.
        call: the tensors that the first of them takes.
    """

    def __init__(self, problem: BilevelProblem, program: Program, call: Call) -> None:
        self._params, self._hparams, self._decays = problem.params, problem.hparams, problem.weight_decays
        self._program = program
        self._mixed = None
        with torch.no_grad():
            loss, slopes, self._saved = program.begin(call.inputs)
        self.loss = float(loss)
        self.gradient = dict(zip(self._params, slopes, strict=True))

    @property
    def params(self) -> Params:
        """w."""
        return self._params

    def __matmul__(self, vector: Params) -> Params:
        """A·vector."""
        self.products += 1
        with torch.no_grad():
            return self._decayed(self._program.multiply(self._saved, list(vector.values())), vector)

    def multiply_and_mix(self, vector: Params) -> Params:
        """A·vector, and the mixed derivative with it."""
        self.products += 1
        with torch.no_grad():
            product, mixed = self._program.multiply_and_mix(self._saved, list(vector.values()))
        self._mixed = vector, dict(zip(self._hparams, mixed, strict=True))
        return self._decayed(product, vector)

    def mixed(self, vector: Params) -> Params:
        """(∂²L/∂λ∂w)·vector."""
        if self._mixed is None or self._mixed[0] is not vector:
            with torch.no_grad():
                _, mixed = self._program.multiply_and_mix(self._saved, list(vector.values()))
            self._mixed = vector, dict(zip(self._hparams, mixed, strict=True))
        return self._mixed[1]


def _make(problem: BilevelProblem, call: Call, eager: Callable[[], LossHessian], kept: _Kept) -> None:
    """Keep what :func:`_made` gives; nothing where numbers are not finite, so that the next call tries again."""
    states = random_states(problem.device)
    with replaying(states, problem.device):
        theirs = eager()
    ones = {name: torch.ones_like(p) for name, p in problem.params.items()}
    vector = next(x for x in (theirs.gradient, {n: p.detach() for n, p in problem.params.items()}, ones) if norm(x))
    expected = theirs @ vector
    if is_finite(theirs.gradient) and is_finite(expected):
        kept.stiffness = max(kept.stiffness, norm(expected) / norm(vector))
        kept.programs[call.key] = _made(problem, call, states, theirs, vector, expected)


def _made(
    problem: BilevelProblem,
    call: Call,
    states: list[Tensor],
    theirs: LossHessian,
    vector: Params,
    expected: Params,
) -> Program | None:
    """The compiled halves, tried on a product; None, with a warning, where they fail or gain nothing."""
    started = time.perf_counter()
    try:
        with replaying(states, problem.device):
            made = program(problem, call)
            ours = CompiledHessian(problem, made, call)
            product = ours @ vector
    except UntraceableError as error:
        warn(
            "compile=True needs a training loss that can be traced, with nothing decided by the values of tensors; "
            f"{error} Products are not compiled. Write the loss without that, or leave the option out."
        )
        return None
    seconds = time.perf_counter() - started
    wrong = _difference(product, expected)
    if not wrong <= (10.0 if call.lowered is None else 30.0) * _rounding(product, call.lowered):
        warn(
            "compile=True must give the products of autograd, and on this training loss they differ by "
            f"{wrong:.2g} of their size. Products are not compiled. Leave the option out."
        )
        return None
    before, after = quickest([lambda: theirs @ vector, lambda: ours @ vector], problem.device)
    if after >= before:
        warn(
            f"compile=True does not pay on this problem: a compiled product takes {after * 1e3:.3g} ms, and one by "
            f"autograd {before * 1e3:.3g} ms. Products are not compiled. Leave the option out."
        )
        return None
    _logger.info(
        "compiled in %.0f s: a product takes %.3g ms instead of %.3g ms, which pays after %.0f products",
        seconds, after * 1e3, before * 1e3, seconds / (before - after),
    )  # fmt: skip
    return made


def _by_autograd(
    problem: BilevelProblem, training_batches: Sequence[Any], lowered: torch.dtype | None
) -> tuple[float, Params]:
    """L and ∂L/∂w."""
    params = {name: p.detach().requires_grad_() for name, p in problem.params.items()}
    hparams = {name: p.detach() for name, p in problem.hparams.items()}
    with torch.enable_grad(), twice_differentiable(problem):
        loss = mean_training_loss(problem, params, hparams, training_batches, lowered)
        return float(loss.detach()), gradients(loss, params, create_graph=False)


def _difference(x: Params, y: Params) -> float:
    """‖x − y‖/‖y‖."""
    size = norm(y)
    off = norm(add(x, y, -1.0))
    return off / size if size > 0.0 else off


def _rounding(x: Params, lowered: torch.dtype | None) -> float:
    """The relative difference that other kernels and another order of sums can make."""
    return max(1e3 * precision(x), 0.0 if lowered is None else torch.finfo(lowered).eps)


def _agree(ours: CompiledHessian, loss: float, gradient: Params, stiffness: float, lowered: torch.dtype | None) -> bool:
    """Whether L and ∂L/∂w are the same up to rounding.

    A gradient is a sum that cancels near a minimum, and its rounding goes with the terms: with ‖w‖ times the curvature.
    Where one is not finite, neither may the other be.
    """
    if not (math.isfinite(loss) and is_finite(gradient)):
        return not (math.isfinite(ours.loss) and is_finite(ours.gradient))
    allowed = _rounding(gradient, lowered)
    if not abs(ours.loss - loss) <= allowed * abs(loss):
        return False
    scale = norm(gradient) + stiffness * norm(ours.params)
    return norm(add(ours.gradient, gradient, -1.0)) <= 10.0 * allowed * scale
