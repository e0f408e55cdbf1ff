"""The inner optimizers' updates as differentiable functions: torch.optim's own functional forms, their traps closed.

A table says, for each optimizer class, which function computes its update, which state it keeps for a parameter, and
which options can be hyperparameters. ``inner_loop.py`` walks through training with it.

Three things in torch.optim stop or corrupt a derivative, and are handled here:

- SGD detaches the gradient that its first momentum buffer is made of: the buffer is prepared so that it is never
  missing.
- Adam and its kin take the square root of a second moment that is exactly zero where a gradient has been zero so far,
  where the derivative is infinite and poisons everything with NaN: the derivative there is taken as zero, its value is
  unchanged.
- options enter some updates as Python numbers (``alpha=-lr``), which drop or refuse a graph. Every update is affine in
  the learning rate, and weight decay only changes the gradient or shrinks the parameter, so both are applied outside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adadelta import adadelta
from torch.optim.adagrad import adagrad
from torch.optim.adam import adam
from torch.optim.nadam import nadam
from torch.optim.radam import radam
from torch.optim.rmsprop import rmsprop
from torch.optim.sgd import sgd
from torch.overrides import TorchFunctionMode

from hyperopt_implicit.errors import ProblemError

Group = dict[str, Any]
Slots = dict[str, Tensor]


@dataclass(frozen=True)
class UpdateRule:
    """One optimizer class's update.

    Attributes:
        function: torch.optim's functional form.
        slots: what is kept for each parameter: the key in ``optimizer.state``, and the argument of ``function``.
        options: keyword options that are passed on from the parameter group.
        lists: arguments of ``function`` that take a list, empty where no slot fills them.
        tunable: options that can be hyperparameters beside ``lr`` and ``weight_decay``.
        initial: what a slot starts from.
        steps: whether a step counter is kept.
    """

    function: Callable[..., None]
    slots: Callable[[Group], dict[str, str]]
    options: tuple[str, ...]
    lists: tuple[str, ...]
    tunable: tuple[str, ...] = ()
    initial: Callable[[Group, str], float] = lambda group, key: 0.0
    steps: bool = True


def _moments(group: Group) -> dict[str, str]:
    return {"exp_avg": "exp_avgs", "exp_avg_sq": "exp_avg_sqs"}


_RULES: dict[type[torch.optim.Optimizer], UpdateRule] = {
    torch.optim.SGD: UpdateRule(
        sgd,
        slots=lambda group: {"momentum_buffer": "momentum_buffer_list"} if group["momentum"] else {},
        options=("momentum", "dampening", "nesterov"),
        lists=("momentum_buffer_list",),
        tunable=("momentum",),
        steps=False,
    ),
    torch.optim.Adam: UpdateRule(
        adam,
        slots=_moments,
        options=("amsgrad", "betas", "eps"),
        lists=("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"),
        tunable=("beta1", "beta2", "eps"),
    ),
    torch.optim.RMSprop: UpdateRule(
        rmsprop,
        slots=lambda group: {
            "square_avg": "square_avgs",
            **({"momentum_buffer": "momentum_buffer_list"} if group["momentum"] else {}),
            **({"grad_avg": "grad_avgs"} if group["centered"] else {}),
        },
        options=("alpha", "eps", "momentum", "centered"),
        lists=("square_avgs", "grad_avgs", "momentum_buffer_list"),
        tunable=("momentum",),
    ),
    torch.optim.Adagrad: UpdateRule(
        adagrad,
        slots=lambda group: {"sum": "state_sums"},
        options=("lr_decay", "eps"),
        lists=("state_sums",),
        initial=lambda group, key: float(group["initial_accumulator_value"]),
    ),
    torch.optim.NAdam: UpdateRule(
        nadam,
        slots=lambda group: {**_moments(group), "mu_product": "mu_products"},
        options=("betas", "eps", "momentum_decay"),
        lists=("exp_avgs", "exp_avg_sqs", "mu_products"),
        initial=lambda group, key: float(key == "mu_product"),
    ),
    torch.optim.RAdam: UpdateRule(radam, slots=_moments, options=("betas", "eps"), lists=("exp_avgs", "exp_avg_sqs")),
    torch.optim.Adadelta: UpdateRule(
        adadelta,
        slots=lambda group: {"square_avg": "square_avgs", "acc_delta": "acc_deltas"},
        options=("rho", "eps"),
        lists=("square_avgs", "acc_deltas"),
    ),
}
_RULES[torch.optim.AdamW] = _RULES[torch.optim.Adam]


def update_rule(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """The rule for an optimizer.

    Raises:
        ProblemError: no functional form of this class, or of one of its settings, can be differentiated.
    """
    rule = _RULES.get(type(optimizer))
    if rule is None:
        known = ", ".join(sorted(each.__name__ for each in _RULES))
        raise ProblemError(
            f"differentiating through training needs an inner optimizer that torch.optim offers in functional form: "
            f"{known}; got {type(optimizer).__name__}. Use one of these, or an implicit backend ('cg', 'neumann')."
        )
    for group in optimizer.param_groups:
        if group.get("amsgrad"):
            raise ProblemError(
                "differentiating through Adam with amsgrad=True is not supported: torch's functional form changes "
                "its running maximum in place. Set amsgrad=False, or use an implicit backend ('cg', 'neumann')."
            )
    return rule


def check_tunable(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> None:
    """Refuse optimizer options as hyperparameters where the update has no derivative with respect to them.

    Raises:
        ProblemError: with the options that can be tuned.
    """
    rule = update_rule(optimizer)
    tunable = ("lr", "weight_decay", *rule.tunable)
    for name in names:
        if name not in tunable:
            raise ProblemError(
                f"{name!r} of {type(optimizer).__name__} cannot be a hyperparameter: torch's functional form has no "
                f"derivative with respect to it. It has one for {', '.join(tunable)}; search {name!r} as a knob "
                "instead."
            )
        for group in optimizer.param_groups:
            if name == "momentum" and (group.get("nesterov") or group.get("dampening") or not group["momentum"]):
                raise ProblemError(
                    "momentum as a hyperparameter needs an inner optimizer with momentum > 0, nesterov=False and "
                    "dampening=0: torch's functional form has no derivative with respect to it otherwise."
                )


def existing_slots(rule: UpdateRule, group: Group, state: dict[str, Any]) -> Slots:
    """What torch.optim keeps for one parameter as tensors; empty where it has not been updated yet."""
    slots = {key: state[key].detach().clone() for key in rule.slots(group) if state.get(key) is not None}
    if rule.steps and slots:
        slots["step"] = _scalar(float(state["step"]))
    return slots


def _first_slots(rule: UpdateRule, group: Group, grad: Tensor) -> Slots:
    """What the first update of a parameter starts from."""
    if rule.function is sgd:
        # the update makes momentum·buffer + (1 − dampening)·grad of it; the first buffer has to come out as grad
        return {"momentum_buffer": grad * (group["dampening"] / group["momentum"])} if group["momentum"] else {}
    start = {key: rule.initial(group, key) for key in rule.slots(group)}
    slots = {key: _scalar(x) if key == "mu_product" else torch.full_like(grad, x).detach() for key, x in start.items()}
    return {**slots, "step": _scalar(0.0)}


def _scalar(value: float) -> Tensor:
    # in float64: torch's differentiable forms take the bias corrections from this tensor, not from a Python number
    return torch.tensor(value, dtype=torch.float64)


def optimizer_state(slots: dict[str, Slots]) -> dict[str, dict[str, Any]]:
    """The slots of all parameters in the form in which torch.optim keeps them."""
    dtype = torch.float64 if torch.get_default_dtype() is torch.float64 else torch.float32  # torch.optim's choice
    return {
        name: {key: value.to(dtype) if key in ("step", "mu_product") else value for key, value in each.items()}
        for name, each in slots.items()
    }


def apply_update(
    rule: UpdateRule,
    group: Group,
    tuned: dict[str, Tensor],
    params: list[Tensor],
    grads: list[Tensor],
    slots: list[Slots],
) -> tuple[list[Tensor], list[Slots]]:
    """One update of one parameter group, out of place and differentiable.

    Args:
        rule: which update.
        group: the options of the group, as in ``optimizer.param_groups``.
        tuned: options that are hyperparameters, with their graph; they take precedence.
        params: the parameters before.
        grads: their gradients.
        slots: the optimizer's state of each, empty before its first update; not changed.

    Returns:
        The parameters and the state after the update.
    """
    lr: Any = tuned.get("lr", group["lr"])
    decay: Any = tuned.get("weight_decay", group["weight_decay"])
    if group.get("maximize"):
        grads = [-g for g in grads]
    if isinstance(decay, Tensor) or decay != 0:
        if group.get("decoupled_weight_decay"):
            params = [p * (1 - lr * decay) for p in params]
        else:
            grads = [g + decay * p for g, p in zip(grads, params, strict=True)]
    moved = [p.clone() for p in params]
    state = [
        {key: value.clone() for key, value in each.items()} or _first_slots(rule, group, g)
        for each, g in zip(slots, grads, strict=True)
    ]
    lists: dict[str, Any] = {name: [] for name in rule.lists}
    for key, argument in rule.slots(group).items():
        lists[argument] = [each[key] for each in state]
    if rule.steps:
        lists["state_steps"] = [each["step"] for each in state]
    options = _options(rule, group, tuned)
    scaled = isinstance(lr, Tensor)
    with _SafeSquareRoot():
        grads_name = "d_p_list" if rule.function is sgd else "grads"
        rule.function(
            params=moved,
            **{grads_name: [g.clone() for g in grads]},
            **lists,
            **options,
            lr=1.0 if scaled else lr,
            weight_decay=0.0,
            foreach=False,
        )
    if scaled:
        moved = [p + lr * (m - p) for p, m in zip(params, moved, strict=True)]
    return moved, state


def _options(rule: UpdateRule, group: Group, tuned: dict[str, Tensor]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name in rule.options:
        if name == "betas":
            options["beta1"] = tuned.get("beta1", group["betas"][0])
            options["beta2"] = tuned.get("beta2", group["betas"][1])
        else:
            options[name] = tuned.get(name, group[name])
    if rule.function is not sgd:
        options["differentiable"] = True
    if rule.function is not radam and rule.function is not nadam:
        options["maximize"] = False
    return options


class _SafeSquareRoot(TorchFunctionMode):
    """√x with derivative zero at x = 0 instead of infinity; the values are the same to the bit."""

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.Tensor.sqrt, torch.Tensor.sqrt_, torch.sqrt) and args[0].requires_grad:
            x = args[0]
            zero = x == 0
            return torch.where(zero, x * 0.0, torch.where(zero, 1.0, x).sqrt())
        return function(*args, **(kwargs or {}))
