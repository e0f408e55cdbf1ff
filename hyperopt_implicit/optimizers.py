"""The inner optimizers' updates as functions: torch.optim's own functional forms, and how each is to be called.

A table says, for each optimizer class, which function computes its update, which state it keeps for a parameter, and
which options can be hyperparameters. ``updates.py`` takes updates by it and differentiates them, and
``inner_loop.py`` walks through training with those.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim.adadelta import adadelta
from torch.optim.adagrad import adagrad
from torch.optim.adam import adam
from torch.optim.adamax import adamax
from torch.optim.asgd import asgd
from torch.optim.nadam import nadam
from torch.optim.radam import radam
from torch.optim.rmsprop import rmsprop
from torch.optim.rprop import rprop
from torch.optim.sgd import sgd

from hyperopt_implicit.errors import ProblemError

Group = dict[str, Any]
Slots = dict[str, Tensor]

SCALARS = ("step", "mu_product", "eta", "mu")
"""Slots that are one number for each parameter; torch.optim keeps them in its own dtype."""

COUNTERS = ("step", "mu_product", "mu")
"""Those of them that depend on the number of steps alone, and have no derivative."""


@dataclass(frozen=True)
class UpdateRule:
    """One optimizer class's update.

    Attributes:
        function: torch.optim's functional form.
        slots: what is kept for each parameter: the key in ``optimizer.state``, and the argument of ``function``.
        lists: arguments of ``function`` that take a list, empty where no slot fills them.
        tunable: options that can be hyperparameters beside ``weight_decay``.
        initial: what a slot starts from, where that is not zero; the learning rate may be a tensor with its graph.
        steps: whether a step counter is kept.
        roots: whether the update takes square roots of what can be zero.
        affine: whether the update is affine in the learning rate.
        signs_only: whether only the signs of the gradient enter, so that the derivative with respect to it is zero.
    """

    function: Callable[..., None]
    slots: Callable[[Group], dict[str, str]]
    lists: tuple[str, ...]
    tunable: tuple[str, ...] = ("lr",)
    initial: Callable[[Group, Any], dict[str, Any]] = lambda group, lr: {}
    steps: bool = True
    roots: bool = True
    affine: bool = True
    signs_only: bool = False


def _moments(group: Group) -> dict[str, str]:
    return {"exp_avg": "exp_avgs", "exp_avg_sq": "exp_avg_sqs"}


_RULES: dict[type[torch.optim.Optimizer], UpdateRule] = {
    torch.optim.SGD: UpdateRule(
        sgd,
        slots=lambda group: {"momentum_buffer": "momentum_buffer_list"} if group["momentum"] else {},
        lists=("momentum_buffer_list",),
        tunable=("lr", "momentum"),
        steps=False,
        roots=False,
    ),
    torch.optim.Adam: UpdateRule(
        adam,
        slots=lambda group: {
            **_moments(group),
            **({"max_exp_avg_sq": "max_exp_avg_sqs"} if group["amsgrad"] else {}),
        },
        lists=("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"),
        tunable=("lr", "beta1", "beta2", "eps"),
    ),
    torch.optim.Adamax: UpdateRule(
        adamax,
        slots=lambda group: {"exp_avg": "exp_avgs", "exp_inf": "exp_infs"},
        lists=("exp_avgs", "exp_infs"),
        roots=False,
    ),
    torch.optim.NAdam: UpdateRule(
        nadam,
        slots=lambda group: {**_moments(group), "mu_product": "mu_products"},
        lists=("exp_avgs", "exp_avg_sqs", "mu_products"),
        initial=lambda group, lr: {"mu_product": 1.0},
    ),
    torch.optim.RAdam: UpdateRule(radam, slots=_moments, lists=("exp_avgs", "exp_avg_sqs")),
    torch.optim.RMSprop: UpdateRule(
        rmsprop,
        slots=lambda group: {
            "square_avg": "square_avgs",
            **({"momentum_buffer": "momentum_buffer_list"} if group["momentum"] else {}),
            **({"grad_avg": "grad_avgs"} if group["centered"] else {}),
        },
        lists=("square_avgs", "grad_avgs", "momentum_buffer_list"),
        tunable=("lr", "momentum"),
    ),
    torch.optim.Adagrad: UpdateRule(
        adagrad,
        slots=lambda group: {"sum": "state_sums"},
        lists=("state_sums",),
        initial=lambda group, lr: {"sum": group["initial_accumulator_value"]},
    ),
    torch.optim.Adadelta: UpdateRule(
        adadelta,
        slots=lambda group: {"square_avg": "square_avgs", "acc_delta": "acc_deltas"},
        lists=("square_avgs", "acc_deltas"),
    ),
    torch.optim.ASGD: UpdateRule(
        asgd,
        slots=lambda group: {"ax": "axs", "eta": "etas", "mu": "mus"},
        lists=("axs", "etas", "mus"),
        initial=lambda group, lr: {"eta": lr, "mu": 1.0},
        roots=False,
        affine=False,
    ),
    torch.optim.Rprop: UpdateRule(
        rprop,
        slots=lambda group: {"prev": "prevs", "step_size": "step_sizes"},
        lists=("prevs", "step_sizes"),
        initial=lambda group, lr: {"step_size": lr},
        roots=False,
        affine=False,
        signs_only=True,
    ),
}
_RULES[torch.optim.AdamW] = _RULES[torch.optim.Adam]

_WITHOUT: dict[type[torch.optim.Optimizer], str] = {
    torch.optim.Adafactor: "it takes the norms of weights and update as Python numbers, so that their part of the "
    "derivative is lost",
    torch.optim.Muon: "it computes its step in bfloat16, whose rounding hides the derivative",
    torch.optim.LBFGS: "it evaluates the loss as often as its line search needs, and has no functional form",
    torch.optim.SparseAdam: "it takes sparse gradients, which have no second derivative",
}


def optimizer_names() -> str:
    """The optimizer classes whose updates can be differentiated, as prose."""
    return ", ".join(sorted(each.__name__ for each in _RULES))


def update_rule(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """The rule for an optimizer.

    Raises:
        ProblemError: no functional form of this class can be differentiated.
    """
    rule = _RULES.get(type(optimizer))
    if rule is None:
        why = next((f" ({reason})" for kind, reason in _WITHOUT.items() if type(optimizer) is kind), "")
        raise ProblemError(
            f"differentiating through training needs an inner optimizer that torch.optim offers in functional form: "
            f"{optimizer_names()}; got {type(optimizer).__name__}{why}. Use one of these, or an implicit backend "
            "('cg', 'neumann')."
        )
    return rule


def check_tunable(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> None:
    """Refuse optimizer options as hyperparameters where the update has no derivative with respect to them.

    Raises:
        ProblemError: with the options that can be tuned.
    """
    rule = update_rule(optimizer)
    tunable = [*rule.tunable]
    if all("weight_decay" in group for group in optimizer.param_groups):
        tunable.insert(1, "weight_decay")
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


@cache
def accepted(function: Callable[..., None]) -> frozenset[str]:
    """The names of a functional form's arguments."""
    return frozenset(inspect.signature(function).parameters)


def arguments_of(rule: UpdateRule, group: Group) -> Group:
    """The options of a parameter group under the names of the functional form's arguments."""
    named = {**group}
    for key, parts in _PAIRS.items():
        if key in group:
            named.update(zip(parts, named.pop(key), strict=True))
    apart = ("params", "foreach", "fused", "capturable", "differentiable")
    names = accepted(rule.function)
    return {key: x for key, x in named.items() if key in names and key not in apart}


_PAIRS = {
    "betas": ("beta1", "beta2"),
    "etas": ("etaminus", "etaplus"),
    "step_sizes": ("step_size_min", "step_size_max"),
}
"""Options that torch.optim keeps two by two."""


# ----------------------------------------------------------------------------------------------- what is kept


def scalar_dtype() -> torch.dtype:
    """In which torch.optim keeps step counters and other numbers."""
    return torch.float64 if torch.get_default_dtype() is torch.float64 else torch.float32


def existing_slots(rule: UpdateRule, group: Group, state: dict[str, Any]) -> Slots:
    """What torch.optim keeps for one parameter as tensors; empty where it has not been updated yet.

    What the present options do not use, such as the buffer of a momentum that was set to zero, is kept along.
    """
    ever = rule.slots({**group, "momentum": True, "amsgrad": True, "centered": True})
    slots = {key: state[key].detach().clone() for key in ever if state.get(key) is not None}
    if rule.steps and slots:
        step = state["step"]
        slots["step"] = step.detach().clone() if isinstance(step, Tensor) else torch.tensor(float(step))
    return slots


def first_slots(rule: UpdateRule, group: Group, lr: Any, grad: Tensor) -> dict[str, Any]:
    """What torch.optim starts from at the first update of a parameter; SGD's first buffer is made by the update."""
    if rule.function is sgd:
        return dict.fromkeys(rule.slots(group))
    initial = rule.initial(group, lr)
    slots = {key: _filled(key, initial.get(key, 0.0), grad) for key in rule.slots(group)}
    return {**slots, "step": torch.tensor(0.0, dtype=scalar_dtype())}


def _filled(key: str, value: Any, grad: Tensor) -> Tensor:
    if isinstance(value, Tensor):  # it may have a graph
        return value.reshape(()).to(scalar_dtype()) if key in SCALARS else torch.zeros_like(grad) + value
    if key in SCALARS:
        return torch.tensor(float(value), dtype=scalar_dtype())
    return torch.full_like(grad, float(value)).detach()


def slot_bytes(rule: UpdateRule, group: Group, param: Tensor) -> int:
    """The memory of all that is kept for one parameter."""
    keys = [*rule.slots(group), *(["step"] if rule.steps else [])]
    return sum(scalar_dtype().itemsize if key in SCALARS else param.numel() * param.element_size() for key in keys)


def optimizer_state(slots: dict[str, Slots]) -> dict[str, dict[str, Any]]:
    """The slots of all parameters in the form in which torch.optim keeps them."""
    return {
        name: {key: value.to(scalar_dtype()) if key in SCALARS else value for key, value in each.items()}
        for name, each in slots.items()
    }
