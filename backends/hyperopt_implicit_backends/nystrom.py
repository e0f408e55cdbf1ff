"""``nystrom``: the Hessian replaced by a low-rank approximation from a few of its columns, inverted in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hyperopt_implicit.backend import Card, State, Status
from hyperopt_implicit.implicit import ImplicitBackend, Solution
from hyperopt_implicit.operators import LinearOperator
from hyperopt_implicit.vectors import Params, add, add_, norm, zeros_like

_LEAST = 0.1  # eigenvalues of H_k + ρI, in units of ρ, that are divided by
_NULL = 8  # eigenvalues, in units of rounding times their number, that cannot be told from zero


@dataclass(frozen=True)
class Nystrom(ImplicitBackend):
    """The Nyström approximation of the Hessian from ``rank`` random columns, inverted without iterations.

        u = (H_k + ρI)⁻¹ v,   H_k = H[:, K] H[K, K]⁺ H[K, :],

    with K a set of k = ``rank`` coordinates drawn without replacement from all n, and ρ = ``damping``. The paper
    inverts by Woodbury's identity; here the n × k columns are factored into QR, so that H_k = Q M Qᵀ with a k × k
    matrix M, and

        u = Q (M + ρI)⁻¹ Qᵀ v + (v − Q Qᵀ v)/ρ,

    which is the same number and loses no digits where the columns are nearly dependent. With as many columns as
    coordinates it is (H + ρI)⁻¹ v to rounding, and the status ``converged``; else it is ``truncated``.

    It is exact for a Hessian of rank k or less whose columns in K span its range. Otherwise directions that H_k
    misses are divided by ρ instead of λ + ρ, which makes u too long by the factor 1 + λ/ρ there: ρ should be no
    smaller than the curvature that is left out. A residual above one says that large curvature was missed: raise
    ``rank`` or ``damping``. Each call draws other coordinates, so that the errors of successive outer steps differ;
    the number of calls is what is carried. Coordinates that the training loss does not use have columns of zeros,
    which add nothing to H_k.

    ρ is not added before the approximation but after, so that it is H that is approximated. For an indefinite H, M can
    have negative eigenvalues; directions with an eigenvalue below −0.9ρ are left out of u, and the status is ``negative
    curvature``. (The paper assumes a positive semi-definite H and inverts what it finds.)

    Cost: k products, one more to measure the residual ‖(H + ρI)u − v‖/‖v‖, which ``measure_residual=False`` saves;
    memory for 2k vectors, and nk² operations for the factorisation.

    References:
        Hataya, Yamada, "Nyström Method for Accurate and Scalable Implicit Differentiation", AISTATS 2023, section 3.

    Example:
        >>> import hyperopt_implicit as hi
        >>> hi.get_backend("nystrom", rank=20, damping=0.1)
        Nystrom(damping=0.1, curvature='hessian', rank=20, seed=0, measure_residual=True)
    """

    damping: Annotated[
        float, Field(gt=0, description="ρ, added to the approximation; directions that it misses are divided by it")
    ] = field(default=0.01, kw_only=True)
    rank: Annotated[int, Field(ge=1, description="columns of the Hessian, one product each")] = 10
    seed: Annotated[int, Field(ge=0, description="of the coordinates; each call draws others")] = 0
    measure_residual: Annotated[bool, Field(description="spend one product more on measuring the residual")] = True

    card: ClassVar[Card] = Card(
        family="implicit",
        gives="the inverse of a rank-k approximation plus ρ; exact for rank k, off by up to λ/ρ where missed",
        cost="k products (k = rank), nk² operations",
        memory="2k",
        conditions="A nearly of low rank, positive semi-definite; ρ above the curvature missed",
        use="over-parameterised networks; iterative solvers need many products",
        paper="Hataya & Yamada 2023",
    )

    def damped(self, operator: LinearOperator) -> LinearOperator:
        """H itself: ρ is added to its approximation."""
        return operator

    def solve(self, operator: LinearOperator, vector: Params, state: State, /) -> Solution:
        calls = int(state.get("calls", 0))
        carried: State = {"calls": calls + 1}
        v = _flatten(vector)
        rank = min(self.rank, v.numel())
        chosen = _coordinates(v.numel(), rank, hash((self.seed, calls)))
        columns = torch.stack([_flatten(operator @ _unit(vector, i)) for i in chosen], dim=1)
        if not bool(torch.isfinite(columns).all()):
            return Solution(zeros_like(vector), Status.NON_FINITE, rank, 1.0, carried)
        u, status = self._invert(columns, chosen, v)
        value = _unflatten(u, vector)
        residual = None
        if self.measure_residual:
            left = add_(add(operator @ value, value, self.damping), vector, -1.0)
            residual = norm(left) / norm(vector)
            if not math.isfinite(residual):
                status = Status.NON_FINITE
        return Solution(value, status, rank, residual, carried)

    def _invert(self, columns: Tensor, chosen: list[int], v: Tensor) -> tuple[Tensor, Status]:
        size, rank = columns.shape
        rounding = _NULL * rank * torch.finfo(v.dtype).eps
        core, vectors = torch.linalg.eigh(_symmetric(columns[chosen]))
        kept = core.abs() > rounding * core.abs().max()
        Q, R = torch.linalg.qr(columns)
        RE = R @ vectors[:, kept]
        eigenvalues, eigenvectors = torch.linalg.eigh(_symmetric(RE / core[kept] @ RE.T))
        noise = eigenvalues.abs() <= rounding * eigenvalues.abs().max()
        shifted = torch.where(noise, 0.0, eigenvalues) + self.damping
        downwards = shifted < _LEAST * self.damping
        basis = Q @ eigenvectors
        coordinates = basis.T @ v
        u = basis @ torch.where(downwards, 0.0, coordinates / torch.where(downwards, 1.0, shifted))
        if rank < size:
            outside = v - basis @ coordinates
            outside -= basis @ (basis.T @ outside)  # once more, for what rounding has left is divided by ρ
            u += outside / self.damping
        if bool(downwards.any()):
            return u, Status.NEGATIVE_CURVATURE
        return u, Status.CONVERGED if rank == size else Status.TRUNCATED


def _coordinates(size: int, count: int, seed: int) -> list[int]:
    """``count`` different ones out of ``size``, from a generator of their own, without a list of all of them."""
    generator = torch.Generator().manual_seed(seed % 2**32)
    if 2 * count >= size:
        return torch.randperm(size, generator=generator)[:count].tolist()
    chosen: dict[int, None] = {}
    while len(chosen) < count:
        chosen.setdefault(int(torch.randint(size, (), generator=generator)))
    return list(chosen)


def _unit(like: Params, index: int) -> Params:
    """The basis vector of one coordinate."""
    x = zeros_like(like)
    for tensor in x.values():
        if 0 <= index < tensor.numel():
            tensor.view(-1)[index] = 1.0
        index -= tensor.numel()
    return x


def _symmetric(x: Tensor) -> Tensor:
    return (x + x.T) / 2


def _flatten(x: Params) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in x.values()])


def _unflatten(flat: Tensor, like: Params) -> Params:
    pieces = flat.split([tensor.numel() for tensor in like.values()])
    return {name: piece.view_as(like[name]) for name, piece in zip(like, pieces, strict=True)}
