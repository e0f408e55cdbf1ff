"""``betty``: two problems and an engine; the hypergradient is what the upper problem's backward leaves in ``.grad``."""

from __future__ import annotations

import logging

import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from torch import Tensor, nn

from adapters import Method, Setting


class _Hyperparameters(nn.Module):
    def __init__(self, raw: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = nn.ParameterDict(raw)


class _Upper(ImplicitProblem):
    def training_step(self, batch: object) -> Tensor:
        losses = self.lower.module
        # it asks for the gradient of every weight, and raises where the validation loss leaves one unused
        return losses() + sum(0.0 * p.sum() for p in self.unused)


class _Lower(ImplicitProblem):
    def training_step(self, batch: object) -> Tensor:
        params = self.trainable_parameters()
        loss = self.module(dict(self.upper.module.values.items()))
        return loss + self.setting.proximal(params, [p.detach() for p in params])


def implicit(setting: Setting) -> list[Method]:
    methods = []
    for count in setting.counts:
        for family, name, config in (
            ("neumann", "`neumann`", Config(type="neumann", neumann_iterations=count, neumann_alpha=setting.step_size)),
            # with any other cg_alpha its step lengths are wrong
            ("cg", "`cg`", Config(type="cg", cg_iterations=count, cg_alpha=1.0)),
        ):
            methods.append(Method("betty", family, name, f"{count} products", _Call(setting, config)))
    return methods


class _Call:
    """The upper problem's loss and backward, as in its ``one_step_descent``, without the optimizer's step."""

    def __init__(self, setting: Setting, config: Config) -> None:
        logging.disable(logging.INFO)  # an engine announces every problem
        batches = [(torch.zeros(1),)]  # the losses hold their batches
        device = setting.params[0].device
        lower = _Lower("lower", config, setting.losses, torch.optim.SGD(setting.params, lr=1.0), None, batches, device)
        upper_module = _Hyperparameters(setting.raw)
        optimizer = torch.optim.SGD(upper_module.parameters(), lr=1.0)
        upper = _Upper("upper", Config(first_order=True), upper_module, optimizer, None, batches, device)
        lower.setting = setting
        Engine(
            problems=[upper, lower],
            config=EngineConfig(),
            dependencies={"u2l": {upper: [lower]}, "l2u": {lower: [upper]}},
        )
        logging.disable(logging.NOTSET)
        lower.cur_batch = batches[0]
        used = torch.autograd.grad(setting.losses(), setting.params, allow_unused=True)
        upper.unused = [p for p, g in zip(setting.params, used, strict=True) if g is None]
        self._setting, self._upper, self._batch = setting, upper, batches[0]

    def __call__(self) -> list[Tensor]:
        upper = self._upper
        for p in self._setting.raw.values():
            p.grad = None
        loss, _ = upper.get_loss(self._batch)
        upper.backward(
            loss=loss, params=upper.trainable_parameters(), paths=upper._paths,
            create_graph=not upper._first_order, retain_graph=upper._retain_graph, allow_unused=upper._allow_unused,
        )  # fmt: skip
        found = [p.grad for p in self._setting.raw.values()]
        for p in self._setting.raw.values():
            p.grad = None
        return found
