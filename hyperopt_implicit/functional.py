"""Modules as functions: other tensors in the place of their parameters and buffers, for the time of a call.

``torch.func.functional_call`` does the same and looks every name up anew at each call; a hypergradient calls both
losses once or twice, and on a small model that look-up is a tenth of it. Here the places are found once for as long as
the modules are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from hyperopt_implicit.errors import ProblemError

Place = tuple[dict[str, Tensor | None], str]
"""Where a module keeps a tensor: its dictionary of parameters or buffers, and the key in it."""


class Places:
    """Where modules keep their parameters, and their buffers, which are looked up whenever they are needed.

    The places of parameters are found anew when modules were added, removed or exchanged. A tensor that several
    modules hold (tied weights) is swapped in all of them, by the first of its names.

    Args:
        module: the root; names are those of its ``named_parameters`` and ``named_buffers``.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._modules: list[tuple[str, nn.Module]] = []
        self._parameters: dict[str, list[Place]] = {}
        self._present()

    def buffers(self) -> dict[str, list[Place]]:
        """The places of each buffer by its name; buffers may come, go and be replaced while a model is used."""
        return _places((prefix, each._buffers) for prefix, each in self._present())

    @contextmanager
    def swapped(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Inside, the modules hold ``parameters``, and ``buffers`` or else copies of their own.

        Yields:
            The buffers, which after the call are those that the modules were left with: one may have been replaced.
            One that was taken away stays as it was.

        Raises:
            ProblemError: there is no parameter of a name that is given.
        """
        held = self.buffers()
        new = {name: buffers[name] if name in buffers else tensor.clone() for name, tensor in _tensors(held)}
        swaps = [(place, tensor) for name, tensor in parameters.items() for place in self._of(name)]
        before = [(owner, key, owner[key]) for (owner, key), _ in swaps]
        # as a whole: a module may also fill a buffer that was None, or register another
        owned = [(owner, dict(owner)) for _, each in self._modules if (owner := each._buffers)]
        swaps += [(place, tensor) for name, tensor in new.items() for place in held[name]]
        try:
            for (owner, key), tensor in swaps:
                owner[key] = tensor
            yield new
            new.update(_tensors(held))
        finally:
            for owner, key, tensor_before in before:
                owner[key] = tensor_before
            for owner, buffers_before in owned:
                owner.clear()
                owner.update(buffers_before)

    @contextmanager
    def parameters_swapped(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the modules hold ``parameters``; buffers are their own, and move."""
        self._present()
        before = [(place, place[0][place[1]]) for name in parameters for place in self._of(name)]
        try:
            for name, tensor in parameters.items():
                for owner, key in self._of(name):
                    owner[key] = tensor
            yield
        finally:
            for (owner, key), tensor_before in before:
                owner[key] = tensor_before

    def _present(self) -> list[tuple[str, nn.Module]]:
        """The modules as they stand, for which the places of parameters then hold."""
        modules = list(self._module.named_modules())
        if modules != self._modules:
            self._modules = modules
            self._parameters = _places((prefix, each._parameters) for prefix, each in modules)
        return modules

    def _of(self, name: str) -> list[Place]:
        places = self._parameters.get(name, [])
        if not places or any(key not in owner for owner, key in places):
            raise ProblemError(
                f"the model must keep the parameters that it had when the problem was built; {name!r} is not among "
                "them any more. Change the model first (parametrizations, new layers), and then build the inner "
                "optimizer and the problem."
            )
        return places


def _places(owners: Iterable[tuple[str, dict[str, Tensor | None]]]) -> dict[str, list[Place]]:
    """Where each tensor stands, by the first of its names."""
    found: dict[str, list[Place]] = {}
    names: dict[int, str] = {}
    for prefix, owner in owners:
        for key, tensor in owner.items():
            if tensor is not None:
                name = names.setdefault(id(tensor), f"{prefix}.{key}" if prefix else key)
                found.setdefault(name, []).append((owner, key))
    return found


def _tensors(places: Mapping[str, list[Place]]) -> Iterator[tuple[str, Tensor]]:
    """What stands at the first place of each name, where anything does."""
    for name, ((owner, key), *_) in places.items():
        tensor = owner.get(key)
        if tensor is not None:
            yield name, tensor
