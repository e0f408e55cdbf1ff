"""What tests say about hypergradients, each under a name, with a message that shows both sides.

They raise AssertionError themselves, so that they read well outside pytest and where asserts are not rewritten.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError  # nosec B403 # the error alone; nothing is unpickled here
from typing import Any

import torch
from torch import Tensor

from hyperopt_implicit.backend import State
from hyperopt_implicit.problem import BilevelProblem
from hyperopt_implicit.testing.oracles import flatten
from hyperopt_implicit.vectors import Params


def relative_error(actual: Params, expected: Params) -> float:
    """‖actual − expected‖/‖expected‖ over all names, or ‖actual‖ where zero is expected."""
    difference = float((flatten(actual) - flatten(expected)).norm())
    size = float(flatten(expected).norm())
    return difference / size if size > 0.0 else difference


def assert_close(actual: Params, expected: Params, relative: float, what: str = "the hypergradient") -> None:
    """Both have the same names and shapes, and differ by no more than ``relative`` in norm."""
    _assert_same_shapes(actual, expected, what)
    error = relative_error(actual, expected)
    if not error <= relative:
        raise AssertionError(
            f"{what} is off by {error:.3g}, with {relative:.3g} allowed:\n  it is      {actual}\n"
            f"  instead of {expected}"
        )


def cosine(x: Params, y: Params) -> float:
    """⟨x, y⟩/(‖x‖·‖y‖) over all names; 1 where both are zero, and 0 where one is."""
    flat, other = flatten(x), flatten(y)
    sizes = float(flat.norm()) * float(other.norm())
    return float(flat @ other) / sizes if sizes > 0.0 else float(bool(flat.norm() == other.norm()))


def assert_points_along(actual: Params, expected: Params, least: float, what: str = "the hypergradient") -> None:
    """Both have the same names and shapes, and a cosine of at least ``least``; rounding apart, zero stays zero."""
    if float(flatten(expected).norm()) < 1e-12:
        assert_close(actual, expected, 1e-8, what)
        return
    _assert_same_shapes(actual, expected, what)
    found = cosine(actual, expected)
    if not found >= least:
        raise AssertionError(
            f"{what} must have a cosine of at least {least} with the truth; it has {found:.3g}:\n  it is {actual}\n"
            f"  and the truth {expected}"
        )


def _assert_same_shapes(actual: Params, expected: Params, what: str) -> None:
    shapes = {name: tuple(x.shape) for name, x in actual.items()}
    wanted = {name: tuple(x.shape) for name, x in expected.items()}
    if shapes != wanted:
        raise AssertionError(f"{what} must have the names and shapes {wanted}; it has {shapes}")


def assert_finite(x: Params, what: str = "the hypergradient") -> None:
    """No entry is NaN or infinite."""
    if not bool(torch.isfinite(flatten(x)).all()):
        raise AssertionError(f"{what} is not finite: {x}")


@contextmanager
def assert_unchanged(problem: BilevelProblem, *, random_state: bool = True) -> Iterator[None]:
    """Inside, nothing that belongs to a problem changes, nor (unless told otherwise) torch's global random state."""
    before = _everything(problem)
    generator = torch.get_rng_state()
    yield
    after = _everything(problem)
    changed = [name for name in before if not same(before[name], after.get(name))]
    if changed or before.keys() != after.keys():
        raise AssertionError(f"these must not change: {changed or sorted(before.keys() ^ after.keys())}")
    if random_state and not torch.equal(generator, torch.get_rng_state()):
        raise AssertionError("torch's global random state must not move where no loss draws from it")


def _everything(problem: BilevelProblem) -> dict[str, Any]:
    modules = {"model": problem.model, "hyperparameters": problem.hyperparameters}
    found: dict[str, Any] = {"optimizer": problem.optimizer.state_dict()}
    for label, module in modules.items():
        found |= {f"{label}: {name}": x for name, x in module.state_dict().items()}
        found |= {f"{label}: gradient of {name}": p.grad for name, p in module.named_parameters()}
        found |= {f"{label}: {name} requires grad": p.requires_grad for name, p in module.named_parameters()}
        found |= {f"{label}: mode of {name!r}": each.training for name, each in module.named_modules()}
    return copy.deepcopy(found)


def same(x: Any, y: Any) -> bool:
    """Whether two nestings of dicts, lists, tensors and numbers are equal to the bit."""
    if isinstance(x, dict):
        return isinstance(y, dict) and x.keys() == y.keys() and all(same(x[key], y[key]) for key in x)
    if isinstance(x, list | tuple):
        return type(x) is type(y) and len(x) == len(y) and all(map(same, x, y))
    return isinstance(y, Tensor) and torch.equal(x, y) if isinstance(x, Tensor) else bool(x == y)


def saved_and_loaded(state: State) -> State:
    """A state as it comes back from a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    try:
        loaded = torch.load(file, weights_only=True)
    except UnpicklingError as error:
        raise AssertionError(f"a state consists of tensors, dicts and numbers, to be saved; it is {state}") from error
    if not same(loaded, state):
        raise AssertionError(f"a state must survive torch.save and torch.load; it is {state}")
    return dict(loaded)
