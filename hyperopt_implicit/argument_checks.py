"""Checks of single arguments that several functions take: is it a number, a function, a switch. Nothing else.

What options mean together, and what a problem must be like, is checked where they are used.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hyperopt_implicit.errors import HyperoptError


def is_number(value: Any) -> bool:
    """Whether a value is one real, finite number that fits into a float; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return math.isfinite(float(value))
    except (OverflowError, ValueError):
        return False


def shown(value: Any) -> str:
    """A value in a message: short, and whatever its ``repr`` does."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # somebody else's
        return f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}…"


def check_switch(name: str, value: Any, *, or_none: bool = False) -> None:
    """Refuse what is neither True nor False; a text such as ``"False"`` would be taken for True.

    Raises:
        HyperoptError: with what it is.
    """
    if not (isinstance(value, bool) or (or_none and value is None)):
        words = "True, False or None" if or_none else "True or False"
        raise HyperoptError(f"{name} must be {words}; got {shown(value)}.")


def check_function(value: Any, rule: str, error: type[HyperoptError]) -> None:
    """Refuse what cannot be called with names, as a number or a builtin without a signature.

    Args:
        value: what was given.
        rule: what it must be, as the message begins.
        error: what is raised.
    """
    if callable(value):
        try:
            inspect.signature(value)
            return
        except (TypeError, ValueError):
            raise error(f"{rule}; got {shown(value)}, which does not say what it takes. Wrap it in a def.") from None
    raise error(f"{rule}; got {shown(value)}.")


def check_list(
    name: str, value: Any, of: str, error: type[HyperoptError] = HyperoptError, *, sized: bool = True
) -> None:
    """Refuse what is no list of things, or one thing in the place of a list of them.

    Args:
        name: of the argument.
        value: what was given.
        of: what it holds, in the plural.
        error: what is raised.
        sized: whether it has to know how many there are.
    """
    is_one = isinstance(value, Tensor | Mapping | str | bytes)
    if is_one or not isinstance(value, Iterable) or (sized and not hasattr(value, "__len__")):
        raise error(f"{name} must be a list of {of}; got {shown(value)}. Put one into a list, too.")


def check_seed(value: Any, *, or_none: bool = False) -> None:
    """Refuse what no generator can be seeded with.

    Raises:
        HyperoptError: with what it is.
    """
    if value is None and or_none:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise HyperoptError(f"seed must be a whole number{', or None' if or_none else ''}; got {shown(value)}.")
    if not -(2**63) <= value < 2**64:
        raise HyperoptError(f"seed must be a whole number that fits into 64 bits; got {shown(value)}.")


def checked_callbacks(callbacks: Any) -> list[Callable[..., Any]]:
    """The callbacks of a run as a list.

    Raises:
        HyperoptError: they are none.
    """
    rule = "callbacks must be a list of functions of an OuterStep and the problem"
    if not isinstance(callbacks, Iterable) or isinstance(callbacks, Tensor):
        raise HyperoptError(f"{rule}; got {shown(callbacks)}. Pass [callback].")
    found = list(callbacks)
    for each in found:
        if not callable(each):
            raise HyperoptError(f"{rule}; one of them is {shown(each)}.")
    return found


def scheduler_of(name: str, make: Any, optimizer: torch.optim.Optimizer) -> Any:
    """The scheduler that a factory makes for an optimizer.

    Raises:
        HyperoptError: it makes none.
    """
    rule = f"{name} must be a function that makes a learning-rate scheduler from an optimizer"
    if not callable(make):
        raise HyperoptError(f"{rule}; got {shown(make)}. For instance lambda optimizer: ExponentialLR(optimizer, 0.9).")
    made = make(optimizer)
    if not callable(getattr(made, "step", None)):
        raise HyperoptError(f"{rule}; it made {shown(made)}.")
    return made
