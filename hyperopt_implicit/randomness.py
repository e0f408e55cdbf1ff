"""The state of random generators: taken down, and put back for what is to draw the same again.

Torch's own are enough for a step or a loss that is done over. A run that another process goes on with needs all of
them: numpy's, Python's, and those that its data, its losses and its model hold.
"""

from __future__ import annotations

import functools
import random
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

_DEPTH = 5  # of attributes and containers in which data is searched for generators
_LIBRARIES = ("builtins", "torch", "numpy", "random", "typing", "abc", "collections", "hyperopt_implicit")
_MANY = 1000  # a container of more is data, and not looked through


def random_states(device: torch.device) -> list[Tensor]:
    """Of the processor's generator, and of those of all GPUs: the layers of one model may stand on several."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    elif device.type == "mps":
        states.append(torch.mps.get_rng_state())
    return states


def set_random_states(states: list[Tensor], device: torch.device) -> None:
    """Put back what :func:`random_states` gave."""
    torch.set_rng_state(states[0])
    if device.type == "mps":
        torch.mps.set_rng_state(states[1])
    elif len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])


@contextmanager
def replaying(states: list[Tensor], device: torch.device) -> Iterator[None]:
    """Inside, the random numbers that followed :func:`random_states`; afterwards the generators go on as before."""
    before = random_states(device)
    try:
        set_random_states(states, device)
        yield
    finally:
        set_random_states(before, device)


class AllGenerators:
    """Every generator that a run may draw from: torch's, numpy's, Python's, and those that what it works with holds.

    Args:
        device: of the run.
        holders: what is searched for generators: loaders, with their samplers and datasets, losses, modules.
    """

    def __init__(self, device: torch.device, holders: Sequence[Any]) -> None:
        self._device = device
        self._holders = list(holders)

    @cached_property
    def _own(self) -> list[Any]:
        """Looked for when they are first needed: that takes a millisecond."""
        return [generator for each in self._holders for generator in generators_in(each)]

    def states(self) -> dict[str, Any]:
        """Their states, as tensors, numbers and containers of them."""
        numpy = sys.modules.get("numpy")
        return {
            "torch": random_states(self._device),
            "python": _words(random.getstate()),
            "numpy": None if numpy is None else _plain(numpy.random.get_state(legacy=False)),
            "own": [_state_of(each) for each in self._own],
        }

    def put_back(self, states: Mapping[str, Any]) -> None:
        """Put back what :meth:`states` gave. A number of GPUs that is another one now leaves these alone."""
        now = random_states(self._device)
        same = len(now) == len(states["torch"])
        set_random_states(states["torch"] if same else [states["torch"][0], *now[1:]], self._device)
        random.setstate(_from_words(states["python"]))
        if states["numpy"] is not None:
            import numpy

            numpy.random.set_state(_with_arrays(states["numpy"]))
        for each, state in zip(self._own, states["own"], strict=False):
            _put_into(each, state)


def differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> set[tuple[str, int]]:
    """Which generators stand elsewhere in the second of two that :meth:`AllGenerators.states` gave."""
    kinds = {kind: ([before[kind]], [after[kind]]) for kind in ("python", "numpy")}
    kinds |= {kind: (before[kind], after[kind]) for kind in ("torch", "own")}
    return {
        (kind, i)
        for kind, (left, right) in kinds.items()
        for i, (x, y) in enumerate(zip(left, right, strict=False))
        if not (torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y)
    }


def generators_in(holder: Any) -> list[Any]:
    """The generators of torch, numpy and Python that are reachable from an object.

    By attributes, its own and its class's, by containers, and from functions by what they close over, their defaults,
    and the global names that they use. Modules inside are left out: each is a holder of its own.
    """
    found: list[Any] = []
    seen: set[int] = set()
    level = [holder]
    for _ in range(_DEPTH):
        deeper: list[Any] = []
        for each in level:
            inner = isinstance(each, nn.Module) and each is not holder
            if id(each) in seen or inner or isinstance(each, Tensor | str | bytes | type):
                continue
            seen.add(id(each))
            if _is_generator(each):
                found.append(each)
            else:
                deeper += _parts_of(each)
        level = deeper
    return found


def _parts_of(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values()) if len(value) <= _MANY else []
    if isinstance(value, list | tuple | set):
        return list(value) if len(value) <= _MANY else []
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    parts = list(getattr(value, "__dict__", {}).values())
    if isinstance(value, FunctionType):
        return [*parts, *_used_by(value)]
    for kind in type(value).__mro__:
        if kind.__module__.partition(".")[0] in _LIBRARIES:
            continue
        slots = kind.__dict__.get("__slots__", ())
        parts += [getattr(value, name, None) for name in ((slots,) if isinstance(slots, str) else slots)]
        parts += [each for each in kind.__dict__.values() if isinstance(each, FunctionType) or _is_generator(each)]
    return parts


def _used_by(function: FunctionType) -> list[Any]:
    """What a function draws on: cells, defaults, generators and functions of its own file by their global names."""
    used = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        try:
            used.append(cell.cell_contents)
        except ValueError:  # it is not set yet
            continue
    if function.__module__ is None or function.__module__.partition(".")[0] not in _LIBRARIES:
        named = [function.__globals__.get(name) for name in function.__code__.co_names]
        used += [
            each
            for each in named
            if _is_generator(each) or (isinstance(each, FunctionType) and each.__globals__ is function.__globals__)
        ]
    return used


def _is_generator(value: Any) -> bool:
    if isinstance(value, torch.Generator | random.Random):
        return True
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.random.Generator | numpy.random.RandomState)


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return _words(generator.getstate())
    if hasattr(generator, "bit_generator"):
        return _plain(generator.bit_generator.state)
    return _plain(generator.get_state(legacy=False))


def _put_into(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(_from_words(state))
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = _with_arrays(state)
    else:
        generator.set_state(_with_arrays(state))


def _words(state: tuple[Any, ...]) -> dict[str, Any]:
    """A state of Python's generator with its row of numbers as bytes: saving them one by one takes milliseconds."""
    version, numbers, *rest = state
    return {"version": version, "words": array("Q", numbers).tobytes(), "rest": rest}


def _from_words(state: Mapping[str, Any]) -> tuple[Any, ...]:
    return (state["version"], tuple(array("Q", state["words"])), *state["rest"])


def _plain(state: Any) -> Any:
    """A state of numpy's with its arrays as bytes."""
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    if getattr(state, "shape", ()):
        return {"dtype": str(state.dtype), "bytes": state.tobytes()}
    return state.item() if hasattr(state, "item") else state


def _with_arrays(state: Any) -> Any:
    import numpy

    if not isinstance(state, dict):
        return state
    if state.keys() == {"dtype", "bytes"}:
        return numpy.frombuffer(state["bytes"], dtype=state["dtype"]).copy()
    return {key: _with_arrays(value) for key, value in state.items()}
