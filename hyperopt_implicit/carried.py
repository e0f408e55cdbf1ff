"""What a backend carries from one outer step to the next: whether it still fits the problem.

The state itself is the backend's own (``backend.State``). It comes back from a checkpoint, or from a caller who kept
it, and the model may have changed in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hyperopt_implicit.backend import State
from hyperopt_implicit.messages import warn
from hyperopt_implicit.vectors import Params

if TYPE_CHECKING:
    from hyperopt_implicit.problem import BilevelProblem


_HPARAMS = "the set of hyperparameters"


def fitting(state: State, problem: BilevelProblem) -> State:
    """The state, each vector in the order of w or of λ; an empty one, with a warning, where one is like neither."""
    params, hparams = problem.params, problem.hparams
    for name, vector in _vectors("", state):
        if not _alike(vector, params) and not _alike(vector, hparams):
            like_hparams = vector.keys() & hparams.keys() and not vector.keys() & params.keys()
            found = _mismatch(vector, hparams, _HPARAMS) if like_hparams else _mismatch(vector, params, "the model")
            warn(
                "the state carried from earlier outer steps must fit the model: each vector in it has the names, "
                f"shapes, dtypes and device of the trained parameters or of the hyperparameters; {name!r} has "
                f"{found}. It was dropped, and the next hypergradient starts cold: nothing "
                "is wrong with that, it only costs more. Load the checkpoint into the model it was saved from to keep "
                "it."
            )
            return {}
    ordered: State = _in_order(state, params, hparams)
    return ordered


def brought_back(state: Any, problem: BilevelProblem) -> Any:
    """The same, its vectors on the device of w and λ: a file is read into the processor's memory."""
    if not isinstance(state, dict):
        return state
    for space in (problem.params, problem.hparams):
        if state.keys() == space.keys() and all(isinstance(x, Tensor) for x in state.values()):
            return {name: x.to(space[name].device) for name, x in state.items()}
    return {key: brought_back(x, problem) for key, x in state.items()}


def _vectors(name: str, value: Any) -> Iterator[tuple[str, Params]]:
    """The dicts of tensors that are nested in a state, with the key under which each stands."""
    if not isinstance(value, dict):
        return
    if name and value and all(isinstance(x, Tensor) for x in value.values()):
        yield name, value
        return
    for key, x in value.items():
        yield from _vectors(str(key), x)


def _in_order(value: Any, *spaces: Params) -> Any:
    """The same, its vectors in the order that arithmetic takes for granted; the very object where they all are."""
    if not isinstance(value, dict):
        return value
    for space in spaces:
        if value.keys() == space.keys() and all(isinstance(x, Tensor) for x in value.values()):
            return value if list(value) == list(space) else {name: value[name] for name in space}
    ordered = {key: _in_order(x, *spaces) for key, x in value.items()}
    return ordered if any(ordered[key] is not x for key, x in value.items()) else value


def _alike(x: Params, y: Params) -> bool:
    return x.keys() == y.keys() and all(
        (x[name].shape, x[name].dtype, x[name].device) == (y[name].shape, y[name].dtype, y[name].device) for name in x
    )


def _mismatch(vector: Params, space: Params, owner: str) -> str:
    """Where a vector first differs from w or λ, in words."""
    for name, tensor in vector.items():
        if name not in space:
            return f"an entry {name!r}, which {owner} does not have"
        p = space[name]
        if tensor.shape != p.shape:
            return f"{name!r} of shape {tuple(tensor.shape)}, which is {tuple(p.shape)} in {owner}"
        if (tensor.dtype, tensor.device) != (p.dtype, p.device):
            return f"{name!r} as {tensor.dtype} on {tensor.device}, which is {p.dtype} on {p.device} in {owner}"
    missing = next(name for name in space if name not in vector)
    return f"no entry {missing!r}, which {owner} has"
