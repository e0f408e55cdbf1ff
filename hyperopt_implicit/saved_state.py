"""The state of modules and optimizers to the bit: what ``state_dict`` and ``load_state_dict`` leave out as well.

Torch does not save buffers that are not persistent, refuses those that were registered or replaced as the model ran,
and converts what an optimizer keeps to the type of its parameter. When all that is saved is not known here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def module_state(module: nn.Module) -> dict[str, Any]:
    """All parameters and buffers of a module, with what its ``state_dict`` adds; shares memory with them."""
    kept = module.state_dict()
    return {"kept": dict(kept), "versions": dict(getattr(kept, "_metadata", {})), "apart": state_apart(module)}


def load_module_state(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Put back what :func:`module_state` gave, into memory that the module has where it is of the right kind.

    Raises:
        KeyError: the module has other parts.
        RuntimeError: the same, as torch says it.
    """
    kept = OrderedDict(state["kept"])
    kept._metadata = OrderedDict(state["versions"])  # type: ignore[attr-defined]  # modules convert what is older
    _make_buffers(module, state["kept"], persistent=True)
    module.load_state_dict(kept)
    load_state_apart(module, state["apart"])


def state_apart(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that a module's ``state_dict`` leaves out."""
    kept = module.state_dict()
    return {name: x.detach() for name, x in _tensors(module).items() if name not in kept}


@torch.no_grad()
def load_state_apart(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put back what :func:`state_apart` gave.

    Raises:
        KeyError: the module has other parts.
    """
    _make_buffers(module, state, persistent=False)
    tensors = _tensors(module)
    for name, x in state.items():
        tensors[name].copy_(x)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load what an optimizer's ``state_dict`` gave, each tensor in the type in which it was kept.

    Raises:
        ValueError: of torch's; the optimizer has other groups.
    """
    optimizer.load_state_dict(dict(state))
    numbers = [i for group in state["param_groups"] for i in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in zip(numbers, params, strict=True):
        for key, x in state["state"].get(i, {}).items():
            loaded = optimizer.state[p].get(key)
            if isinstance(x, Tensor) and isinstance(loaded, Tensor) and loaded.dtype != x.dtype:
                optimizer.state[p][key] = x.to(loaded.device, copy=True)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _make_buffers(module: nn.Module, state: Mapping[str, Any], *, persistent: bool) -> None:
    """Have the module hold buffers of the kinds in a state: one may have been registered, or replaced, since."""
    known = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    device = next((x.device for x in module.parameters()), torch.device("cpu"))
    for name, x in state.items():
        path, _, key = name.rpartition(".")
        if name in known or not isinstance(x, Tensor):
            continue
        try:
            owner = module.get_submodule(path)
        except AttributeError:
            continue  # which loading complains of
        if key in owner._parameters or (key not in owner._buffers and hasattr(owner, key)):
            continue
        held = owner._buffers.get(key)
        if held is None or (held.shape, held.dtype) != (x.shape, x.dtype):
            fresh = torch.empty_like(x, device=device if held is None else held.device)
            if key in owner._buffers:
                owner._buffers[key] = fresh
            else:
                owner.register_buffer(key, fresh, persistent=persistent)
