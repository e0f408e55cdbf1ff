"""``hypergrad``: three functions of objectives and parameters, on functorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypergrad.approx_hypergrad import conjugate_gradient, neumann, nystrom
from torch import Tensor

from adapters import Method, Setting


def implicit(setting: Setting) -> list[Method]:
    methods = []
    for count in setting.counts:
        for family, function, options in (
            ("neumann", neumann, {"num_iters": count, "lr": setting.step_size}),
            # lr only scales: with 1 the iteration is that of the textbook, but for the residual in the direction
            ("cg", conjugate_gradient, {"num_iters": count, "lr": 1.0}),
        ):
            name = f"`{function.__name__}`"
            methods.append(Method("hypergrad", family, name, f"{count} products", _call(setting, function, options)))
        rho = setting.damping or setting.regulariser
        methods.append(
            Method(
                "hypergrad",
                "nystrom",
                "`nystrom`",
                f"{count} products",
                _call(setting, nystrom, {"rank": count, "rho": rho}, proximal=False),  # ρ is its damping
            )
        )
    return methods


def _call(
    setting: Setting, function: Callable[..., tuple[Tensor, ...]], options: dict[str, float], proximal: bool = True
) -> Callable[[], list[Tensor]]:
    names = [name for name, _ in setting.losses.named_parameters()]

    def call() -> list[Tensor]:
        at = tuple(p.detach() for p in setting.params)

        def inner(params: tuple[Tensor, ...], hparams: tuple[Tensor, ...]) -> Tensor:
            loss = setting.losses.at(
                dict(zip(names, params, strict=True)), dict(zip(setting.raw, hparams, strict=True))
            )
            return loss + setting.proximal(list(params), list(at)) if proximal else loss

        def outer(params: tuple[Tensor, ...], hparams: tuple[Tensor, ...]) -> Tensor:
            return setting.losses.at(dict(zip(names, params, strict=True)))

        with torch.no_grad():
            return list(function(inner, outer, at, tuple(p.detach() for p in setting.raw.values()), **options))

    return call
