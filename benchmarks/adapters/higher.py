"""``higher``: gradients through patched modules and differentiable optimizers."""

from __future__ import annotations

import higher
import torch
from torch import Tensor

from adapters import Method, Setting


def unrolled(setting: Setting) -> list[Method]:
    raw = setting.raw
    optimizer = torch.optim.SGD(setting.params, lr=setting.learning_rate)

    def call() -> list[Tensor]:
        with higher.innerloop_ctx(setting.losses, optimizer) as (losses, steps):
            for _ in range(setting.steps):
                steps.step(losses(raw))
            return list(torch.autograd.grad(losses(), list(raw.values())))

    return [Method("higher", "unrolled", "`innerloop_ctx`", f"{setting.steps} steps", call)]
