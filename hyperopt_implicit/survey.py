"""What a problem is like, as far as it decides on a method: measured in the course of one hypergradient.

Which method follows from it is decided by the backend ``auto``.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hyperopt_implicit.backend import State, Status
from hyperopt_implicit.conjugate_gradients import Iterations, conjugate_gradients
from hyperopt_implicit.data import number_of_batches
from hyperopt_implicit.distributed import agree, summed
from hyperopt_implicit.micro_batches import all_parts
from hyperopt_implicit.operators import Damped, LinearOperator, gradients, mean_training_loss
from hyperopt_implicit.randomness import random_states
from hyperopt_implicit.spectrum import lanczos
from hyperopt_implicit.stopwatch import Clock
from hyperopt_implicit.vectors import Params, norm, precision

if TYPE_CHECKING:
    from hyperopt_implicit.problem import BilevelProblem

_PRODUCTS = 20  # for the smallest eigenvalue, where it is negative
_SAMPLED_PRODUCTS = 8  # for the largest one, on a mini-batch
_SAMPLED_RESIDUAL = 1e-3  # to which it is solved at the same time: a start, soon averaged away
_SAMPLED_START = 3  # iterations towards a solution to begin with, on a mini-batch
_NEGATIVE = 1e-3  # of the largest eigenvalue: what is taken for negative curvature on one mini-batch
_CONDITION = 2.0  # by which a preconditioner has to lower the condition number to be taken
_ENTRIES = 512  # entries of a tensor by which batches are told apart


@dataclass(frozen=True)
class Costs:
    """What the parts of a hypergradient cost, in g: one forward and backward of the training loss.

    Attributes:
        seconds: of one g.
        validation: the gradient of F.
        graph: the training gradient with its graph.
        product: one Hessian-vector product.
        mixed: the mixed derivative, where it has a backward of its own.
    """

    seconds: float
    validation: float
    graph: float
    product: float
    mixed: float

    def of(self, products: int, *, shared: bool) -> float:
        """One hypergradient, the mixed derivative with the last product or after it."""
        return self.validation + self.graph + products * self.product + (0.0 if shared else self.mixed)

    def state(self) -> State:
        """As numbers to be carried."""
        return asdict(self)


def time_gradient(
    problem: BilevelProblem, batches: Sequence[Any], clock: Clock, repeats: int = 2
) -> tuple[float, bool]:
    """The seconds of one g, the fastest of a few, and whether the training loss drew random numbers."""
    params = {name: p.detach().requires_grad_() for name, p in problem.params.items()}
    hparams = {name: p.detach() for name, p in problem.hparams.items()}

    def gradient() -> Params:
        with torch.enable_grad():
            return gradients(mean_training_loss(problem, params, hparams, batches), params, create_graph=False)

    before = random_states(problem.device)
    clock(gradient)
    drew = any(not torch.equal(x, y) for x, y in zip(before, random_states(problem.device), strict=False))
    (drew,) = agree(any_=[drew])
    times = [clock.seconds]
    for _ in range(repeats - 1):
        clock(gradient)
        times.append(clock.seconds)
    return min(times), drew


@dataclass(frozen=True)
class Spectrum:
    """What solving, or Lanczos on a mini-batch, tells of A.

    Attributes:
        smallest: the smallest Ritz value; NaN where there was nothing to solve.
        largest: the largest.
        damping: δ, where A is not positive definite: max(1.5·|λ_min|, 0.1·λ_max).
        preconditioned: whether the preconditioner pays.
        solved: where conjugate gradients arrived, with the damping and the preconditioner.
        sampled: whether a mini-batch is all that was seen.
    """

    smallest: float
    largest: float
    damping: float = 0.0
    preconditioned: bool = False
    solved: Iterations | None = None
    sampled: bool = False

    @property
    def words(self) -> str:
        """Of it what decides."""
        if math.isnan(self.largest):
            return "nothing finite to solve with yet"
        if self.damping:
            kind = "an indefinite Hessian" if self.smallest < 0.0 else "a singular Hessian"
            return f"{kind} (eigenvalues from {self.smallest:.2g} to {self.largest:.2g}), damped by {self.damping:.2g}"
        if self.sampled or self.solved is None:
            return f"largest eigenvalue {self.largest:.2g}"
        scaled = " when preconditioned by Adam's second moment" if self.preconditioned else ""
        return f"condition number {condition(self.solved):.2g}{scaled}"


def spectrum(
    operator: LinearOperator, vector: Params, tolerance: float, iterations: int, diagonal: Params | None
) -> Spectrum:
    """Of A on all the data, by solving A u = v; damped where that is not possible without.

    Args:
        operator: A.
        vector: v.
        tolerance: the relative residual to solve to.
        iterations: of conjugate gradients, at most.
        diagonal: of a preconditioner to try as well.
    """
    target = max(tolerance, precision(vector)) * norm(vector)

    def solve(damping: float, diagonal: Params | None = None) -> Iterations:
        damped = Damped(operator, damping) if damping else operator
        return conjugate_gradients(damped, vector, target=target, iterations=iterations, preconditioner=diagonal)

    found, damping = solve(0.0), 0.0
    smallest = found.smallest
    if found.status in (Status.NEGATIVE_CURVATURE, Status.SINGULAR):
        smallest, largest = lanczos(operator, vector, _PRODUCTS)
        if found.status is Status.NEGATIVE_CURVATURE:  # after more iterations than that, perhaps
            smallest = min(smallest, found.smallest)
        damping = max(1.5 * max(-smallest, 0.0), 0.1 * largest)
        while (found := solve(damping)).status is Status.NEGATIVE_CURVATURE:
            damping *= 2.0  # Lanczos sees the smallest eigenvalue from above
    preconditioned, largest = False, found.largest - damping
    if diagonal is not None and not found.status.failed:
        iterations = found.count  # one that needs more than without does not pay
        other = solve(damping, diagonal)
        preconditioned = not other.status.failed and condition(other) * _CONDITION < condition(found)
        found = other if preconditioned else found
    return Spectrum(smallest, largest, damping, preconditioned, found)


def sampled_spectrum(operator: LinearOperator, vector: Params) -> Spectrum:
    """Of A on a mini-batch: its smallest eigenvalue may be a matter of the sample, unless it is far below zero."""
    smallest, largest = lanczos(operator, vector, _SAMPLED_PRODUCTS)
    if smallest < -_NEGATIVE * largest:
        return Spectrum(smallest, largest, max(-1.5 * smallest, 0.1 * largest), sampled=True)
    target = _SAMPLED_RESIDUAL * norm(vector)  # a few iterations are a start; more would follow this one sample
    found = conjugate_gradients(operator, vector, target=target, iterations=_SAMPLED_START)
    return Spectrum(smallest, largest, solved=None if found.status.failed else found, sampled=True)


def condition(found: Iterations) -> float:
    """The condition number, as conjugate gradients saw it."""
    return found.largest / found.smallest if found.smallest > 0.0 else math.inf


def has_more_batches(problem: BilevelProblem, training_batches: Sequence[Any]) -> bool:
    """Whether a hypergradient's batches are other than all of the training data; False where there is no data.

    The validation data does not matter: with all of the training data, A is exact, and so is a hypergradient for its
    validation batch.
    """
    data = problem.training_data
    count = None if data is None else number_of_batches(data)
    return data is not None and (not count or len(all_parts(training_batches)) % count != 0)


def fingerprint(batches: Any) -> list[float]:
    """A few numbers that tell batches apart: of each tensor its size, and a weighted sum of some of its entries.

    Among several processes, the sums over their shares; so for :func:`contents`.
    """
    found: list[float] = []
    sums: list[Tensor] = []
    for leaf in _leaves(batches):
        if isinstance(leaf, Tensor):
            flat = leaf.detach().reshape(-1)
            flat = flat[:: max(len(flat) // _ENTRIES, 1)]
            flat = (torch.view_as_real(flat).sum(-1) if flat.is_complex() else flat).double()
            weights = torch.arange(1, len(flat) + 1, dtype=torch.float64, device=flat.device).sqrt()
            sums.append(torch.dot(torch.nan_to_num(flat, 0.0, 1.0, -1.0), weights))
            found.append(float(leaf.numel()))
        elif isinstance(leaf, int | float | str | bytes):
            found.append(_number(leaf))
    return summed(found + (torch.stack(sums).tolist() if sums else []))


def contents(batches: Any) -> list[float]:
    """Numbers that tell what batches hold, in whatever order of their rows."""
    found: list[Tensor] = []
    others: list[float] = []
    for leaf in _leaves(batches):
        if isinstance(leaf, Tensor):
            x = torch.view_as_real(leaf.detach()) if leaf.is_complex() else leaf.detach()
            x = torch.nan_to_num(x.double(), 0.0, 1.0, -1.0)
            x = x.flatten(1) if x.dim() > 1 else x.reshape(-1, 1)
            # the columns weighted: a sum of all entries is the same for any rows that are one-hot
            rows = x @ torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device).sqrt()
            found += [torch.tensor(float(x.numel()), dtype=x.dtype, device=x.device), rows.sum(), rows.square().sum()]
        elif isinstance(leaf, int | float | str | bytes):
            others.append(_number(leaf))
    sums = torch.stack(found).tolist() if found else []
    return summed([*sums, float(len(others)), math.fsum(others), math.fsum(x * x for x in others)])


def alike(x: Sequence[float], y: Sequence[float]) -> bool:
    """Whether two such lists are equal but for the rounding of sums in another order."""
    return len(x) == len(y) and all(math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9) for a, b in zip(x, y, strict=True))


def _number(leaf: float | str | bytes) -> float:
    if isinstance(leaf, int | float):
        return float(leaf)
    return float(zlib.crc32(leaf.encode() if isinstance(leaf, str) else leaf))


def _leaves(batch: Any) -> Iterator[Any]:
    """What is nested in a batch; objects of somebody's own type are entered where they are made of tensors."""
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Mapping):
            yield from _leaves(list(leaf.values()))
        elif hasattr(leaf, "__array_interface__") and not isinstance(leaf, Tensor):
            with suppress(TypeError):  # of objects
                yield torch.as_tensor(leaf)
        elif hasattr(leaf, "to") and not isinstance(leaf, Tensor | nn.Module) and hasattr(leaf, "__dict__"):
            inside = pytree.tree_leaves(list(vars(leaf).values()))
            yield from _leaves([x for x in inside if isinstance(x, Tensor | Mapping)])
        elif isinstance(leaf, Tensor) and leaf.layout is not torch.strided:
            yield from [leaf._indices(), leaf._values()] if leaf.layout is torch.sparse_coo else [leaf.values()]
        else:
            yield leaf
