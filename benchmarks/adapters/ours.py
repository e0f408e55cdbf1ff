"""Our own backends, put as those of others are."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

import hyperopt_implicit as hi
from adapters import Method, Setting

OURS = "hyperopt_implicit"

STEADY: dict[str, dict[str, object]] = {
    "cg": {"max_iterations": 2, "tolerance": 0.0},  # and one product for the first residual
    "soba": {},
    "heavy_ball": {},
    "auto": {},
}
"""The backends that carry a state from one outer step to the next, with options."""


def implicit(setting: Setting) -> list[Method]:
    δ, α, methods = setting.damping, setting.step_size, []
    for count in setting.counts:
        neumann = hi.get_backend(  # the same sum as others have from so many products
            "neumann", terms=count + 1, step_size=α, measure_residual=False, damping=δ
        )
        cg = hi.get_backend("cg", max_iterations=count, tolerance=0.0, warm_start=False, damping=δ)
        nystrom = hi.get_backend("nystrom", rank=count, measure_residual=False, damping=δ or setting.regulariser)
        for family, backend in (("neumann", neumann), ("cg", cg), ("nystrom", nystrom)):
            methods.append(Method(OURS, family, f"`{family}`", f"{count} products", _call(setting, backend)))
    size = sum(p.numel() for p in setting.params)
    if size <= 2000:
        methods.append(
            Method(OURS, "exact", "`exact`", f"{size} products", _call(setting, hi.get_backend("exact", damping=δ)))
        )
    return methods


def steady(setting: Setting) -> list[Method]:
    methods = []
    for name, options in STEADY.items():
        if name in hi.list_backends():
            takes = {field.name for field in dataclasses.fields(hi.get_backend(name))}
            damping = {"damping": setting.damping} if "damping" in takes else {}
            spent: list[int] = []
            call = _call(setting, hi.get_backend(name, **options, **damping), spent=spent)
            methods.append(Method(OURS, name, f"`{name}`", "", call, carries=True, spent=spent))
    return methods


def unrolled(setting: Setting) -> list[Method]:
    problem = copy.copy(setting.problem)  # the same model and hyperparameters, another optimizer
    problem.optimizer = torch.optim.SGD(setting.params, lr=setting.learning_rate)
    call = _call(setting, hi.get_backend("unrolled"), problem=problem, batches=setting.steps)
    return [Method(OURS, "unrolled", "`unrolled`", f"{setting.steps} steps", call)]


def _call(
    setting: Setting,
    backend: hi.Backend,
    *,
    spent: list[int] | None = None,
    problem: hi.BilevelProblem | None = None,
    batches: int = 1,
) -> Callable[[], list[Tensor]]:
    """A call that begins anew every time, or, with ``spent``, where the last one ended."""
    training, validation = setting.batches
    state: dict[str, object] = {}

    def call() -> list[Tensor]:
        nonlocal state
        found = backend.hypergradient(problem or setting.problem, [training] * batches, validation, state)
        if spent is not None:
            state = found.state
            spent.append(found.hvps)
        return [found.gradients[name] for name in setting.raw]

    return call
