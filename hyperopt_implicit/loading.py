"""Finding a problem in a user's Python file, for the command line."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from hyperopt_implicit.errors import CommandError, HyperoptError
from hyperopt_implicit.knobs import knobs_of
from hyperopt_implicit.messages import nearest
from hyperopt_implicit.problem import BilevelProblem


def load_file(path: Path) -> ModuleType:
    """Import a Python file, its folder first on the path, as running it would.

    Raises:
        CommandError: there is no such file, or it raises when imported.
    """
    if not path.is_file():
        raise CommandError(f"FILE must be a Python file that defines a problem; there is no {path}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise CommandError(f"FILE must be a Python file; {path} is not (its name should end in .py).")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except HyperoptError:
        raise
    except Exception as error:
        raise CommandError(f"{path} could not be loaded: {_described(error, path)}") from error
    return module


def find_problem(module: ModuleType, name: str | None) -> BilevelProblem | Callable[..., BilevelProblem]:
    """The problem or problem builder of a module: of the name given, or called ``problem``, or the only one there is.

    Raises:
        CommandError: there is none, or several and none called ``problem``.
    """
    candidates = {
        key: value for key, value in vars(module).items() if isinstance(value, BilevelProblem) or knobs_of(value)
    }
    if "problem" in vars(module):
        candidates["problem"] = vars(module)["problem"]
    if name is not None:
        if name not in vars(module):
            raise CommandError(f"{module.__name__}.py defines no {name!r}.{nearest(name, list(vars(module)))}")
        return _checked(vars(module)[name], name)
    if "problem" in candidates:
        return _checked(candidates["problem"], "problem")
    if len(candidates) == 1:
        return _checked(next(iter(candidates.values())), next(iter(candidates)))
    found = (
        f"it defines {', '.join(candidates)}; choose one with --problem NAME" if candidates else "it defines neither"
    )
    raise CommandError(
        f"{module.__name__}.py must define a BilevelProblem, or a function that builds one, called 'problem': {found}."
    )


def _checked(found: Any, name: str) -> BilevelProblem | Callable[..., BilevelProblem]:
    if isinstance(found, BilevelProblem):
        return found
    if callable(found):
        return cast(Callable[..., BilevelProblem], found)
    raise CommandError(
        f"{name!r} must be a BilevelProblem or a function that builds one; it is a {type(found).__name__}."
    )


def build(found: BilevelProblem | Callable[..., BilevelProblem], knobs: dict[str, Any]) -> BilevelProblem:
    """The problem itself, a builder being called with the knobs given and its own defaults for the others.

    Raises:
        CommandError: a knob is unknown or has no value.
    """
    if isinstance(found, BilevelProblem):
        if knobs:
            raise CommandError("--knob is for functions that build a problem; this file defines a finished one.")
        return found
    parameters = inspect.signature(found).parameters
    for name in knobs:
        if name not in parameters:
            raise CommandError(
                f"{found.__name__} has no knob {name!r}; it takes "
                f"{', '.join(parameters) or 'none'}.{nearest(name, list(parameters))}"
            )
    missing = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and name not in knobs and p.kind is not p.VAR_KEYWORD
    ]
    if missing:
        raise CommandError(
            f"{found.__name__} needs a value for {', '.join(missing)}. Give each with --knob {missing[0]}=VALUE, give "
            "it a default in the file, or let 'hyperopt-implicit search' choose it."
        )
    problem = found(**knobs)
    if not isinstance(problem, BilevelProblem):
        raise CommandError(f"{found.__name__} must return a BilevelProblem; it returned {type(problem).__name__}.")
    return problem


def _described(error: Exception, path: Path) -> str:
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename) == path.resolve() or frame.filename == str(path)
    ]
    where = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {error}{where}."
