"""Whether problems differ in the values of their tensors only, so that one of them can stand in for the others.

A population evaluates the losses of its first member with the tensors of each. What is not a tensor of the problem (a
dropout rate, a number that a loss closes over, the shape of a layer) must then be the same in all. Here each problem is
described by all of that; two can be put together where their descriptions agree, and the first line in which they do
not is the reason in words.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hyperopt_implicit.problem import BilevelProblem

Description = dict[str, Any]
"""What a problem is beside the values of its tensors: by the name of each part, something that can be compared."""

_PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size, torch.layout)
_OWN = {"_parameters", "_buffers", "_modules", "training"}
"""What is described apart, or follows from the rest."""


def difference(x: Description, y: Description) -> str | None:
    """The first part in which two problems differ, in words; None where they can be put together."""
    for name in [*x, *(name for name in y if name not in x)]:
        if name not in x or name not in y:
            return f"{name}: only one of them has it"
        if x[name] != y[name]:
            return f"{name}: {_shown(x[name])} and {_shown(y[name])}"
    return None


def explained(reason: str, groups: Sequence[Sequence[int]], knobs: Sequence[Mapping[str, Any]]) -> str:
    """A difference as a sentence, with the knob that makes it where one is known."""
    part = reason.partition(":")[0]
    name = _knob(groups, knobs)
    if name is None:
        return f"members differ in more than the values of tensors, and are grouped by it: {reason}"
    what = f"changes the {part}" if part.startswith("shape of") else f"makes a difference ({reason})"
    return f"knob {name!r} {what}: trials are grouped by it"


def _knob(groups: Sequence[Sequence[int]], knobs: Sequence[Mapping[str, Any]]) -> str | None:
    """The knob with the fewest values that tells the groups apart."""
    found: dict[str, int] = {}
    for name in knobs[0] if knobs else ():
        values = [{repr(knobs[i].get(name)) for i in group} for group in groups]
        if sum(map(len, values)) == len(set().union(*values)):
            found[name] = sum(map(len, values))
    return min(found, key=lambda name: found[name]) if found else None


def describe(problem: BilevelProblem) -> Description:
    """All of a problem that is not the value of one of its tensors."""
    found: Description = {}
    reader = _Reader(problem)
    for prefix, root in (("", problem.model), ("hyperparameter ", problem.hyperparameters)):
        for kind, tensors in (("", root.named_parameters()), ("buffer ", root.named_buffers())):
            for name, x in tensors:
                found[f"shape of {kind}{prefix}{name!r}"] = tuple(x.shape)
                found[f"dtype of {kind}{prefix}{name!r}"] = (x.dtype, str(x.device), x.requires_grad)
        for name, module in root.named_modules():
            label = f"{prefix}module {name!r}" if name else f"{prefix or 'the '}model"
            found[f"type of {label}"] = Same(parametrize.type_before_parametrizations(module))
            found[f"mode of {label}"] = "train" if module.training else "eval"
            for key, value in vars(module).items():
                refers = isinstance(module, nn.RNNBase) and key.startswith("_flat_weight")  # to its own parameters
                if key not in _OWN and not refers and not (root is problem.hyperparameters and module is root):
                    hooks = key.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))
                    # hooks are numbered through, over all modules there are
                    found[f"{key!r} of {label}"] = reader.read(list(value.values()) if hooks else value)
    found["trained parameters"] = tuple(problem.params)
    for name, each in problem.hyperparameters.declarations.items():
        found[f"constraint of hyperparameter {name!r}"] = reader.read(each.constraint)
        found[f"target of hyperparameter {name!r}"] = each.target
    for role in ("training_loss", "validation_loss"):
        for name, value in reader.function(problem.loss_source(role)):
            found[f"{name} of {role}".strip()] = value
    return found


@dataclass(frozen=True)
class Same:
    """Something that is only equal to itself, such as a class, or an object that cannot be looked into."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


@dataclass(frozen=True)
class Own:
    """A part of the problem itself, by its name: with other tensors put in its place, it stands for any member's."""

    name: str


class Held:
    """A tensor of the problem that is used past its modules; equal to nothing."""

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "a tensor of the problem's own"


class Constant:
    """A tensor that is none of the problem's: equal where it is the same one, or has the same values."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Constant):
            return False
        x, y = self.tensor, other.tensor
        if x is y or (x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()):
            return True
        if (x.shape, x.dtype, x.device) != (y.shape, y.dtype, y.device):
            return False
        return bool(torch.equal(x, y))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        if self.tensor.numel() == 1:
            return f"a tensor of {self.tensor.item()!r}"
        return f"a tensor of shape {tuple(self.tensor.shape)} with other values"


class _Reader:
    """Turns whatever modules and losses hold into something that can be compared."""

    def __init__(self, problem: BilevelProblem) -> None:
        self._problem = problem
        self._modules: dict[int, str] = {id(problem): "the problem", id(problem.hyperparameters): "hyperparameters"}
        self._tensors: set[int] = set()
        for root in (problem.model, problem.hyperparameters):
            self._modules.update((id(module), name or "the model") for name, module in root.named_modules())
            self._tensors.update(id(x) for x in (*root.parameters(), *root.buffers()))
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # or the number of an object that is gone might come back

    def function(self, function: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
        """A loss, part by part: its code, its defaults and what it closes over, by name."""
        if not isinstance(function, types.FunctionType):
            yield "", self.read(function)
            return
        yield "code", function.__code__
        yield "globals", Same(function.__globals__)
        yield "defaults", self.read((function.__defaults__, function.__kwdefaults__))
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            yield f"variable {name!r}", self._cell(cell)

    def _cell(self, cell: Any) -> Any:
        try:
            return self.read(cell.cell_contents)
        except ValueError:  # not assigned yet
            return None

    def read(self, value: Any) -> Any:
        """Something that is equal for two values that do the same in a loss."""
        if isinstance(value, _PLAIN):
            return (type(value).__name__, "nan") if value != value else (type(value).__name__, value)
        if id(value) in self._modules:
            return Own(self._modules[id(value)])
        if id(value) in self._seen:
            return ("met before", self._seen[id(value)])
        self._seen[id(value)] = len(self._seen)
        self._alive.append(value)
        if isinstance(value, Tensor):
            # one that is used past the model is not swapped: of each member, it would be the first's
            if id(value) in self._tensors:
                return Held()
            return Same(value) if value.requires_grad else Constant(value)
        if isinstance(value, types.FunctionType):
            return tuple(self.function(value))
        if isinstance(value, types.MethodType):
            return (self.read(value.__func__), self.read(value.__self__))
        if isinstance(value, functools.partial):
            return (self.read(value.func), self.read(value.args), self.read(value.keywords))
        if isinstance(value, Mapping):
            return (type(value).__name__, tuple((self.read(k), self.read(v)) for k, v in value.items()))
        if isinstance(value, Sequence | set | frozenset) and not isinstance(value, range):
            items = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
            return (type(value).__name__, tuple(self.read(x) for x in items))
        return self._object(value)

    def _object(self, value: Any) -> Any:
        if isinstance(value, type | types.ModuleType | types.BuiltinFunctionType | torch.Generator | range):
            return value if isinstance(value, range) else Same(value)
        if isinstance(value, nn.Module):
            parts = {**vars(value), "training": value.training}
            return (Same(type(value)), self.read({k: v for k, v in parts.items() if k not in ("_forward_hooks",)}))
        if hasattr(value, "__dict__") and type(value).__module__ != "builtins":
            return (Same(type(value)), self.read(vars(value)))
        return Same(value)


def _shown(value: Any) -> str:
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], _PLAIN):
        value = value[1]
    if isinstance(value, Same):
        value = value.value
        return getattr(value, "__qualname__", None) or f"one {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
