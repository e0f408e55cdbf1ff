"""``exact``: the Hessian formed and solved densely; the oracle for the others, and the method for small models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hyperopt_implicit.backend import Card, State, Status
from hyperopt_implicit.errors import BackendError
from hyperopt_implicit.implicit import ImplicitBackend, Solution
from hyperopt_implicit.operators import LinearOperator
from hyperopt_implicit.vectors import Params, norm

if TYPE_CHECKING:
    from hyperopt_implicit.problem import BilevelProblem


@dataclass(frozen=True)
class Exact(ImplicitBackend):
    """Dense solve: exact up to rounding, for models of up to a few thousand parameters.

    Forms A column by column, one product each, and solves A u = v through its eigendecomposition, so that an
    indefinite Hessian is solved as well as a definite one. Where A is singular the solution of least norm is returned,
    with status ``singular`` if a residual is left.

    Cost: as many products as parameters, time cubic and memory quadratic in them; larger models than ``max_parameters``
    are refused before any training.

    Example:
        >>> import hyperopt_implicit as hi
        >>> hi.get_backend("exact")
        Exact(damping=0.0, curvature='hessian', max_parameters=2000)
    """

    max_parameters: Annotated[int, Field(ge=1, description="refuse models with more parameters than this")] = 2000

    card: ClassVar[Card] = Card(
        family="implicit",
        gives="the theorem's value to rounding",
        cost="n products, n³ operations",
        memory="n² numbers",
        conditions="A invertible",
        use="a few thousand weights, or another backend is to be checked",
        paper="the theorem itself",
    )

    def check(self, problem: BilevelProblem) -> None:
        super().check(problem)
        self._check_size(problem.params)

    def _check_size(self, params: Params) -> None:
        size = sum(p.numel() for p in params.values())
        if size > self.max_parameters:
            raise BackendError(
                f"backend 'exact' forms a dense Hessian and takes models of up to max_parameters={self.max_parameters} "
                f"parameters; this one has {size}. Use 'cg', or raise max_parameters if {size}² numbers fit in memory."
            )

    def solve(self, operator: LinearOperator, vector: Params, state: State, /) -> Solution:
        self._check_size(vector)
        v = _flatten(vector)
        columns = []
        for basis in torch.eye(v.numel(), dtype=v.dtype, device=v.device):
            columns.append(_flatten(operator @ _unflatten(basis, vector)))
        A = torch.stack(columns, dim=1)
        if not bool(torch.isfinite(A).all()):
            return Solution(_unflatten(torch.zeros_like(v), vector), Status.NON_FINITE, 1, float("nan"))
        eigenvalues, eigenvectors = torch.linalg.eigh((A + A.T) / 2)
        cutoff = eigenvalues.abs().max() * v.numel() * torch.finfo(v.dtype).eps
        kept = eigenvalues.abs() > cutoff
        coordinates = eigenvectors.T @ v
        u = eigenvectors @ torch.where(kept, coordinates / torch.where(kept, eigenvalues, 1.0), 0.0)
        value = _unflatten(u, vector)
        outside = float(coordinates[~kept].norm() / v.norm())
        status = Status.SINGULAR if outside > torch.finfo(v.dtype).eps ** 0.5 else Status.CONVERGED
        return Solution(value, status, 1, float((A @ u - v).norm()) / norm(vector))


def _flatten(x: Params) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in x.values()])


def _unflatten(flat: Tensor, like: Params) -> Params:
    pieces = flat.split([tensor.numel() for tensor in like.values()])
    return {name: piece.view_as(like[name]) for name, piece in zip(like, pieces, strict=True)}
