"""One update of an inner optimizer: taken in place as torch.optim takes it, or as a function that is differentiated.

What the update is, stands in the table of ``optimizers.py``. Four things in torch.optim stop or corrupt a derivative,
and are handled here:

- SGD detaches the gradient that its first momentum buffer is made of: the buffer is prepared so that it is never
  missing.
- Adam and its kin take the square root of a second moment that is exactly zero where a gradient has been zero so far,
  where the derivative is infinite and poisons everything with NaN: the derivative there is taken as zero, its value is
  unchanged.
- options enter some updates as Python numbers (``alpha=-lr``), which drop or refuse a graph. All updates but ASGD's and
  Rprop's are affine in the learning rate, and weight decay only changes the gradient or shrinks the parameter, so both
  are applied outside.
- every update changes parameters and state in place, running maxima included, where a graph may need what was there:
  each is given copies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.asgd import asgd
from torch.optim.sgd import sgd
from torch.overrides import TorchFunctionMode

from hyperopt_implicit.optimizers import SCALARS, Group, Slots, UpdateRule, accepted, arguments_of, first_slots


def update_in_place(
    rule: UpdateRule, group: Group, params: list[Tensor], grads: list[Tensor], slots: list[Slots]
) -> None:
    """One update of one parameter group without a graph, by the very operations of torch.optim.

    Args:
        rule: which update.
        group: the options of the group, as in ``optimizer.param_groups``.
        params: the parameters; changed in place.
        grads: their gradients.
        slots: the optimizer's state of each, empty before its first update; changed in place.
    """
    state: list[dict[str, Any]] = [
        each or first_slots(rule, group, group["lr"], g) for each, g in zip(slots, grads, strict=True)
    ]
    lists = _lists(rule, group, state)
    rule.function(params, grads, **lists, **arguments_of(rule, group), foreach=False)
    for i, each in enumerate(state):
        each.update((key, lists[argument][i]) for key, argument in rule.slots(group).items())
        slots[i].update(each)


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
        The parameters and the state after the update; numbers among the state are in float64.
    """
    lr: Any = tuned.get("lr", group["lr"])
    decay: Any = tuned.get("weight_decay", group.get("weight_decay", 0.0))
    if group.get("maximize"):
        grads = [-g for g in grads]
    if isinstance(decay, Tensor) or decay != 0:
        if group.get("decoupled_weight_decay"):
            params = [p * (1 - lr * decay) for p in params]
        else:
            grads = [g + decay * p for g, p in zip(grads, params, strict=True)]
    if rule.signs_only:
        grads = [g.detach() for g in grads]
    state = [_own(rule, group, lr, each, g) for each, g in zip(slots, grads, strict=True)]
    lists = _lists(rule, group, state)
    options = arguments_of(rule, group)
    options |= {name: value for name, value in tuned.items() if name in options}
    if "differentiable" in accepted(rule.function):
        options["differentiable"] = True
    options |= {name: x for name, x in (("maximize", False), ("weight_decay", 0.0)) if name in options}
    scaled = rule.affine and isinstance(lr, Tensor)
    if "lr" in options:
        options["lr"] = 1.0 if scaled else lr
    moved = [p.clone() for p in params]
    grads = [g.clone() for g in grads]
    if rule.function is asgd:
        moved = _averaged_descent(params, grads, lists, options)
    elif rule.roots:
        with _SafeSquareRoot():
            rule.function(moved, grads, **lists, **options, foreach=False)
    else:
        rule.function(moved, grads, **lists, **options, foreach=False)
    if scaled:
        moved = [p + lr * (m - p) for p, m in zip(params, moved, strict=True)]
    for i, each in enumerate(state):
        each.update((key, lists[argument][i]) for key, argument in rule.slots(group).items())
    return moved, state


def _lists(rule: UpdateRule, group: Group, state: list[dict[str, Any]]) -> dict[str, list[Any]]:
    lists: dict[str, list[Any]] = {name: [] for name in rule.lists}
    for key, argument in rule.slots(group).items():
        lists[argument] = [each[key] for each in state]
    if rule.steps:
        lists["state_steps"] = [each["step"] for each in state]
    return lists


def _own(rule: UpdateRule, group: Group, lr: Any, slots: Slots, grad: Tensor) -> Slots:
    """A copy of the state of one parameter that an update may change, or what its first one starts from.

    Numbers are copied in float64: torch's differentiable forms take the bias corrections from these tensors.
    """
    if not slots and rule.function is sgd:
        # the update makes momentum·buffer + (1 − dampening)·grad of it; the first buffer has to come out as grad
        return {"momentum_buffer": grad * (group["dampening"] / group["momentum"])} if group["momentum"] else {}
    held = slots or first_slots(rule, group, lr, grad)
    own = {key: x.to(torch.float64, copy=True) if key in SCALARS else x.clone() for key, x in held.items()}
    return {**own, "prev": own["prev"].detach()} if rule.signs_only else own


def _averaged_descent(
    params: list[Tensor], grads: list[Tensor], lists: dict[str, list[Any]], options: Group
) -> list[Tensor]:
    """ASGD's update; torch's own takes its rate η, which follows from the learning rate, as a Python number."""
    moved = []
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        lists["state_steps"][i] += 1
        step, eta, mu = float(lists["state_steps"][i]), lists["etas"][i], float(lists["mus"][i])
        moved.append(p * (1 - options["lambd"] * eta) - eta * g)
        average = lists["axs"][i]
        lists["axs"][i] = moved[i] if mu == 1.0 else average + mu * (moved[i] - average)
        lists["etas"][i] = torch.as_tensor(
            options["lr"] / (1 + options["lambd"] * options["lr"] * step) ** options["alpha"], dtype=torch.float64
        )
        lists["mus"][i] = torch.tensor(1.0 / max(1.0, step - options["t0"]), dtype=torch.float64)
    return moved


class _SquareRoot(torch.autograd.Function):
    """√x with derivative zero at x = 0 instead of infinity; the values are the same to the bit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        root = x.sqrt()
        ctx.save_for_backward(root)
        return root

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor) -> Any:
        (root,) = ctx.saved_tensors
        zero = root == 0  # not to be divided by: the quotient is differentiated again, and 0/0 would be NaN
        return (adjoint / (2 * root.masked_fill(zero, 1.0))).masked_fill(zero, 0.0)


class _SafeSquareRoot(TorchFunctionMode):
    """Inside, every square root is :class:`_SquareRoot`."""

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.Tensor.sqrt, torch.Tensor.sqrt_, torch.sqrt) and args[0].requires_grad:
            return _SquareRoot.apply(args[0])
        return function(*args, **(kwargs or {}))


# --------------------------------------------------------------------------------------------------------- adjoints

Adjoint = Callable[[Group, Tensor, Tensor, Slots, Slots], Slots]
"""(∂Φ/∂·)ᵀp of one parameter's update Φ, from the group's options, w, g, the slots before, and p by ``"w"`` and slot.

Its result has the same keys, and ``"g"``; tensors in it may be those that were given."""


def adjoint_of(rule: UpdateRule, groups: list[Group]) -> Adjoint | None:
    """The adjoint of an update where it is written out, which spares recording it; None for autograd."""
    if rule.function is sgd:
        return _descent_adjoint
    if rule.function is adam and not any(group["amsgrad"] for group in groups):
        return _adam_adjoint
    return None


def _descent_adjoint(group: Group, w: Tensor, g: Tensor, slots: Slots, p: Slots) -> Slots:
    """With d = ±g + δw, b' = μb + (1 − τ)d, or d at the first update, and w' = w − α(b', or d + μb' with Nesterov)."""
    rate, momentum = float(group["lr"]), float(group["momentum"])
    if momentum == 0.0:  # torch leaves a buffer alone
        return _through_decay(group, p["w"] * -rate, p)
    scale = -rate * (momentum if group["nesterov"] else 1.0)
    of_buffer = p["w"] * scale if "momentum_buffer" not in p else p["momentum_buffer"].add(p["w"], alpha=scale)
    fresh = 1.0 - float(group["dampening"]) if slots else 1.0
    direction = of_buffer if fresh == 1.0 else of_buffer * fresh
    if group["nesterov"]:
        direction = direction.add(p["w"], alpha=-rate)
    before = {"momentum_buffer": of_buffer * momentum} if slots else {}
    return _through_decay(group, direction, {"w": p["w"], **before})


def _adam_adjoint(group: Group, w: Tensor, g: Tensor, slots: Slots, p: Slots) -> Slots:
    """With d = ±g + δw, m' = β₁m + (1 − β₁)d, s' = β₂s + (1 − β₂)d², and w' = w − αm' / (1 − β₁ᵗ) / (√ŝ + ε).

    ŝ is s'/(1 − β₂ᵗ); the derivative of its root at zero is taken as zero. Adam with decoupled decay shrinks w before.
    """
    rate, decay, eps = float(group["lr"]), float(group["weight_decay"]), float(group["eps"])
    (beta1, beta2), t = map(float, group["betas"]), float(slots["step"]) + 1.0 if slots else 1.0
    correction = (1.0 - beta2**t) ** 0.5
    d = -g if group["maximize"] else g
    if decay and not group["decoupled_weight_decay"]:
        d = d.add(w, alpha=decay)
    mean = slots["exp_avg"].lerp(d, 1.0 - beta1) if slots else d * (1.0 - beta1)
    square = (slots["exp_avg_sq"] * beta2).addcmul_(d, d, value=1.0 - beta2) if slots else d * d * (1.0 - beta2)
    root = square.sqrt_()
    divisor = (root / correction).add_(eps)
    of_mean = (p["w"] / divisor).mul_(-rate / (1.0 - beta1**t))
    of_square = mean.mul_(of_mean).div_(divisor).div_(root.mul_(-2.0 * correction)).masked_fill_(root == 0.0, 0.0)
    if "exp_avg" in p:
        of_mean.add_(p["exp_avg"])
        of_square.add_(p["exp_avg_sq"])
    direction = (d * of_square).mul_(2.0 * (1.0 - beta2)).add_(of_mean, alpha=1.0 - beta1)
    before = {"exp_avg": of_mean.mul_(beta1), "exp_avg_sq": of_square.mul_(beta2)} if slots else {}
    return _through_decay(group, direction, {"w": p["w"], **before})


def _through_decay(group: Group, direction: Tensor, p: Slots) -> Slots:
    """From the adjoint of d = ±g + δw, or of d = ±g and (1 − αδ)w where the decay is decoupled, to those of g and w."""
    decay, of_w = float(group["weight_decay"]), p["w"]
    if decay and group.get("decoupled_weight_decay"):
        of_w = of_w * (1.0 - float(group["lr"]) * decay)
    elif decay:
        of_w = of_w.add(direction, alpha=decay)
    return {**p, "w": of_w, "g": -direction if group["maximize"] else direction}
