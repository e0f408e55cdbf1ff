"""Hypergradients and training loops as an expert would write them by hand for one problem: the mark to measure against.

They work on the model's own parameters and on lists of tensors, with no checks, no state and no report.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from problems import Case
from torch import Tensor, nn

Solver = Callable[[Callable[[list[Tensor]], list[Tensor]], list[Tensor]], list[Tensor]]


def hypergradient(case: Case, model: nn.Module, raw: dict[str, Tensor], solve: Solver) -> list[Tensor]:
    """dF/dλ on a retained graph: one training gradient with its graph, and all products through that graph."""
    params = list(model.parameters())
    hparams = list(raw.values())
    values = {name: case.constrain[name](value) for name, value in raw.items()}
    loss = case.training_loss(model, case.training_batch, **values)
    grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True, materialize_grads=True)
    vector = torch.autograd.grad(
        case.validation_loss(model, case.validation_batch), params, allow_unused=True, materialize_grads=True
    )

    def product(x: list[Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(grads, params, x, retain_graph=True))

    with torch.no_grad():
        solution = solve(product, list(vector))
    mixed = torch.autograd.grad(grads, hparams, solution)
    return [-m for m in mixed]


def neumann(terms: int, step_size: float) -> Solver:
    """The series with a given step size."""

    def solve(product: Callable[[list[Tensor]], list[Tensor]], vector: list[Tensor]) -> list[Tensor]:
        term = [v.clone() for v in vector]
        total = [torch.zeros_like(v) for v in vector]
        for _ in range(terms):
            for s, t in zip(total, term, strict=True):
                s.add_(t, alpha=step_size)
            for t, h in zip(term, product(term), strict=True):
                t.sub_(h, alpha=step_size)
        return total

    return solve


def conjugate_gradient(iterations: int, damping: float) -> Solver:
    """A fixed number of iterations from zero, on H + damping·I."""

    def solve(product: Callable[[list[Tensor]], list[Tensor]], vector: list[Tensor]) -> list[Tensor]:
        x = [torch.zeros_like(v) for v in vector]
        r = [v.clone() for v in vector]
        p = [v.clone() for v in vector]
        squared = _dot(r, r)
        for _ in range(iterations):
            q = product(p)
            if damping:
                for a, b in zip(q, p, strict=True):
                    a.add_(b, alpha=damping)
            step = squared / _dot(p, q)
            for a, b in zip(x, p, strict=True):
                a.add_(b, alpha=step)
            for a, b in zip(r, q, strict=True):
                a.sub_(b, alpha=step)
            previous, squared = squared, _dot(r, r)
            for a, b in zip(p, r, strict=True):
                a.mul_(squared / previous).add_(b)
        return x

    return solve


def _dot(x: list[Tensor], y: list[Tensor]) -> float:
    return float(sum(torch.dot(a.reshape(-1), b.reshape(-1)) for a, b in zip(x, y, strict=True)))


def train_with_hypergradients(
    case: Case,
    model: nn.Module,
    raw: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    solve: Solver,
    outer_steps: int,
    inner_steps: int,
) -> list[float]:
    """The whole loop: inner steps, hypergradient, Adam on λ; returns the validation losses."""
    outer = torch.optim.Adam(list(raw.values()), lr=1e-2)
    seen = []
    for _ in range(outer_steps):
        values = {name: case.constrain[name](value).detach() for name, value in raw.items()}
        for _ in range(inner_steps):
            optimizer.zero_grad()
            case.training_loss(model, case.training_batch, **values).backward()
            optimizer.step()
        grads = hypergradient(case, model, raw, solve)
        for value, grad in zip(raw.values(), grads, strict=True):
            value.grad = grad
        outer.step()
        with torch.no_grad():
            seen.append(float(case.validation_loss(model, case.validation_batch)))
    return seen


def auxilearn_step(
    training_loss: Tensor,
    validation_loss: Tensor,
    params: list[Tensor],
    hparams: list[Tensor],
    outer: torch.optim.Optimizer,
    step_size: float,
    terms: int,
    max_norm: float,
) -> list[Tensor]:
    """An outer step as AuxiLearn takes it: the gradient by Σ_{k≤K} (I − αH)ᵏ v, without the factor α; clipped."""
    vector = torch.autograd.grad(validation_loss, params, retain_graph=True)
    grads = torch.autograd.grad(training_loss, params, create_graph=True)
    term = total = list(vector)
    for _ in range(terms):
        products = torch.autograd.grad(grads, params, term, retain_graph=True)
        term = [t - step_size * h for t, h in zip(term, products, strict=True)]
        total = [s + t for s, t in zip(total, term, strict=True)]
    gradient = [-m for m in torch.autograd.grad(grads, hparams, total, retain_graph=True)]
    for p, g in zip(hparams, gradient, strict=True):
        p.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(hparams, max_norm)
    outer.step()
    return gradient
