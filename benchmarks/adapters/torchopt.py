"""``torchopt``: implicit gradients by ``custom_root`` with its linear solvers, explicit ones by ``MetaSGD``."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchopt
from torch import Tensor

from adapters import Method, Setting


def implicit(setting: Setting) -> list[Method]:
    ridge = setting.damping or None
    methods = []
    for count in setting.counts:
        solvers = {
            "neumann": ("`solve_inv(ns=True)`", {"ns": True, "maxiter": count, "alpha": setting.step_size}),
            "cg": ("`solve_cg`", {"maxiter": count, "rtol": 0.0}),
        }
        for family, (name, options) in solvers.items():
            make = torchopt.linear_solve.solve_inv if family == "neumann" else torchopt.linear_solve.solve_cg
            call = _call(setting, make(ridge=ridge, **options))
            methods.append(Method("torchopt", family, name, f"{count} products", call))
    return methods


def steady(setting: Setting) -> list[Method]:
    """Its conjugate gradients take a first iterate; a wrapper of the solver hands on the last solution."""
    last: object = None

    def solve(matvec: Callable[..., object], b: object) -> object:
        nonlocal last  # two iterations, and one product for the first residual
        last = torchopt.linear_solve.solve_cg(maxiter=2, rtol=0.0, ridge=setting.damping or None, init=last)(matvec, b)
        return last

    name = "`solve_cg`, last solution as `init`"
    return [Method("torchopt", "cg", name, "3 products", _call(setting, solve), carries=True)]


def _call(setting: Setting, solve: Callable[..., object]) -> Callable[[], list[Tensor]]:
    names = [name for name, _ in setting.losses.named_parameters()]

    def stationary(params: tuple[Tensor, ...], hparams: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        def loss(w: tuple[Tensor, ...]) -> Tensor:
            return setting.losses.at(dict(zip(names, w, strict=True)), dict(zip(setting.raw, hparams, strict=True)))

        return torch.func.grad(loss)(params)

    @torchopt.diff.implicit.custom_root(stationary, argnums=1, solve=solve)
    def solver(params: tuple[Tensor, ...], hparams: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return params  # trained already

    def call() -> list[Tensor]:
        raw = tuple(setting.raw.values())
        at = tuple(p.detach() for p in setting.params)
        params = solver(at, raw)
        loss = setting.losses.at(dict(zip(names, params, strict=True)))
        return list(torch.autograd.grad(loss, raw))

    return call


def unrolled(setting: Setting) -> list[Method]:
    losses, raw = setting.losses, setting.raw

    def call() -> list[Tensor]:
        optimizer = torchopt.MetaSGD(losses, lr=setting.learning_rate)
        before = torchopt.extract_state_dict(losses, by="reference", detach_buffers=True)
        for _ in range(setting.steps):
            optimizer.step(losses(raw))
        found = torch.autograd.grad(losses(), list(raw.values()))
        torchopt.recover_state_dict(losses, before)
        torchopt.stop_gradient(losses)
        return list(found)

    return [Method("torchopt", "unrolled", "`MetaSGD`", f"{setting.steps} steps", call)]
