"""``boat_torch``: operations chosen by name in a configuration, on modules patched by ``higher``."""

from __future__ import annotations

import boat_torch
import higher
import torch
from torch import Tensor, nn

from adapters import Losses, Method, Setting


class _Upper(nn.Module):
    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.values = nn.ParameterDict(setting.raw)
        self.setting = setting


def lower_loss(feed: dict[str, object], upper: _Upper, lower: Losses, params: list[Tensor] | None = None) -> Tensor:
    """L; configurations name it."""
    loss = lower(dict(upper.values.items()), **({} if params is None else {"params": params}))
    if params is None:
        return loss
    return loss + upper.setting.proximal(params, [p.detach() for p in params])


def upper_loss(feed: dict[str, object], upper: _Upper, lower: Losses, params: list[Tensor] | None = None) -> Tensor:
    """F."""
    return lower(**({} if params is None else {"params": params}))


def implicit(setting: Setting) -> list[Method]:
    methods = []
    for count in setting.counts:
        for family, operation in (("neumann", "NS"), ("cg", "CG")):  # CG solves with αH, and does not mind α
            call = _Call(setting, operation, setting.step_size, products=count)
            methods.append(Method("boat", family, f"`{operation}`", f"{count} products", call))
    return methods


def unrolled(setting: Setting) -> list[Method]:
    call = _Call(setting, "RAD", setting.learning_rate, steps=setting.steps)
    return [Method("boat", "unrolled", "`RAD`", f"{setting.steps} steps", call)]


class _Call:
    """What ``Problem.run_iter`` does, without the two losses that it then evaluates and logs to a file."""

    def __init__(
        self, setting: Setting, operation: str, step_size: float, products: int = 0, steps: int | None = None
    ) -> None:
        upper = _Upper(setting)
        self._optimizer = torch.optim.SGD(setting.params, lr=step_size)
        config = {
            "fo_op": None, "gm_op": ["NGD"], "na_op": [operation],
            "lower_level_model": setting.losses, "upper_level_model": upper,
            "lower_level_var": setting.params, "upper_level_var": list(setting.raw.values()),
            "lower_level_opt": self._optimizer,
            "upper_level_opt": torch.optim.SGD(list(setting.raw.values()), lr=1.0),
            "lower_iters": steps or 1, "device": str(setting.params[0].device), "loss_log_path": "",
            "CG": {"tolerance": 0.0, "k": products}, "RGT": {"truncate_iter": 0},
            "GDA": {"alpha_init": 0.0, "alpha_decay": 0.1}, "DI": {"lr": 0.0}, "FD": {"r": 1e-2},
            "accumulate_grad": False, "return_grad": True, "copy_last_param": False,
        }  # fmt: skip
        losses = {
            f"{level}_level_loss": {"function": f"adapters.boat.{level}_loss", "params": {}}
            for level in ("lower", "upper")
        }
        self._problem = boat_torch.Problem(config, losses).build_ll_solver().build_ul_solver()
        self._setting, self._trains = setting, steps is not None

    def __call__(self) -> list[Tensor]:
        problem, raw = self._problem, list(self._setting.raw.values())
        for p in raw:
            p.grad = None
        with higher.innerloop_ctx(
            self._setting.losses, self._optimizer, copy_initial_weights=False,
            device=problem._device, track_higher_grads=problem._track_opt_traj,
        ) as (model, optimizer):  # fmt: skip
            if self._trains:
                problem._ll_solver.optimize(
                    ll_feed_dict={}, ul_feed_dict={}, auxiliary_model=model, auxiliary_opt=optimizer, current_iter=0
                )
            problem._ul_solver.compute_gradients(
                ll_feed_dict={}, ul_feed_dict={}, auxiliary_model=model, max_loss_iter=-1
            )
        found = [p.grad for p in raw]
        for p in raw:
            p.grad = None
        return found
