"""Modules as functions: other tensors in the place of their parameters and buffers, for the time of a call.

``torch.func.functional_call`` does the same and looks every name up anew at each call; a hypergradient calls both
losses once or twice, and on a small model that look-up is a tenth of it. Here the places are found once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

Place = tuple[dict[str, Tensor | None], str]
"""Where a module keeps a tensor: its dictionary of parameters or buffers, and the key in it."""


class Places:
    """Where modules keep their parameters, found once, and their buffers, which are looked up when they are needed.

    A tensor that several modules hold (tied weights) is swapped in all of them, by the first of its names.

    Args:
        module: the root; names are those of its ``named_parameters`` and ``named_buffers``.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._parameters: dict[str, list[Place]] = {}
        names: dict[int, str] = {}
        for prefix, each in module.named_modules():
            for key, p in each._parameters.items():
                if p is not None:
                    name = names.setdefault(id(p), f"{prefix}.{key}" if prefix else key)
                    self._parameters.setdefault(name, []).append((each._parameters, key))

    def buffers(self) -> dict[str, list[Place]]:
        """The places of each buffer by its name; buffers may come, go and be replaced while a model is used."""
        found: dict[str, list[Place]] = {}
        names: dict[int, str] = {}
        for prefix, each in self._module.named_modules():
            for key, b in each._buffers.items():
                if b is not None:
                    name = names.setdefault(id(b), f"{prefix}.{key}" if prefix else key)
                    found.setdefault(name, []).append((each._buffers, key))
        return found

    @contextmanager
    def swapped(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Inside, the modules hold ``parameters``, and ``buffers`` or else copies of their own.

        Yields:
            The buffers, which after the call are those that the modules were left with: one may have been replaced.
            One that was taken away stays as it was.
        """
        held = self.buffers()
        new = {name: buffers[name] if name in buffers else tensor.clone() for name, tensor in _tensors(held)}
        swaps = [(self._parameters[name], tensor) for name, tensor in parameters.items()]
        swaps += [(held[name], tensor) for name, tensor in new.items()]
        before = [(place, place[0][place[1]]) for places, _ in swaps for place in places]
        try:
            for places, tensor in swaps:
                for owner, key in places:
                    owner[key] = tensor
            yield new
            new.update(_tensors(held))
        finally:
            for (owner, key), tensor_before in before:
                owner[key] = tensor_before


def _tensors(places: Mapping[str, list[Place]]) -> Iterator[tuple[str, Tensor]]:
    """What stands at the first place of each name, where anything does."""
    for name, ((owner, key), *_) in places.items():
        tensor = owner.get(key)
        if tensor is not None:
            yield name, tensor
