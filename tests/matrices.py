"""Matrices with a known spectrum, and what solvers are asked and checked with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hyperopt_implicit.implicit import ImplicitBackend, Solution
from hyperopt_implicit.testing.oracles import DenseOperator
from hyperopt_implicit.vectors import Params


def basis(size: int, seed: int = 0) -> Tensor:
    """A random orthogonal matrix [size, size]; its columns are the eigenvectors of :func:`with_spectrum`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


def with_spectrum(eigenvalues: Sequence[float], seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues in a random basis."""
    q = basis(len(eigenvalues), seed)
    return q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T


def spread(least: float, most: float, size: int) -> list[float]:
    """Eigenvalues from ``least`` to ``most``, evenly spaced."""
    return torch.linspace(least, most, size, dtype=torch.float64).tolist()


def right_hand_side(size: int, seed: int = 1) -> Params:
    """A random vector, in two tensors where there is room for two."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(size, generator=generator, dtype=torch.float64)
    return {"a": v[: size // 2], "b": v[size // 2 :]} if size > 1 else {"a": v}


def flat(x: Params) -> Tensor:
    """All entries in one vector."""
    return torch.cat(list(x.values()))


def solve(backend: ImplicitBackend, matrix: Tensor, vector: Params, state: dict | None = None) -> tuple[Solution, int]:
    """The solution, and the number of products that it took."""
    operator = DenseOperator(matrix)
    with torch.no_grad():
        solution = backend.solve(backend.damped(operator), vector, state or {})
    return solution, operator.products


def true_residual(matrix: Tensor, solution: Solution, vector: Params) -> float:
    """‖Hu − v‖/‖v‖, worked out from the matrix."""
    v = flat(vector)
    return float((matrix @ flat(solution.value) - v).norm() / v.norm())


def error(matrix: Tensor, solution: Solution, vector: Params) -> Tensor:
    """u − H⁻¹v."""
    return flat(solution.value) - torch.linalg.solve(matrix, flat(vector))


def assert_residual_is_true(matrix: Tensor, solution: Solution, vector: Params) -> None:
    """The residual that was reported is that of the value that was returned."""
    expected = true_residual(matrix, solution, vector)
    assert abs(solution.residual - expected) <= 1e-9 * expected + 1e-13, (solution.residual, expected)


def assert_solves(matrix: Tensor, solution: Solution, vector: Params, relative: float = 1e-10) -> None:
    """The value is H⁻¹v."""
    wanted = torch.linalg.solve(matrix, flat(vector)).norm()
    found = error(matrix, solution, vector).norm()
    assert found <= relative * wanted, f"relative error {found / wanted:.3g}"
