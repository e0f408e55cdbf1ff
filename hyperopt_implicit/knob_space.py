"""What a search draws from: the knobs of a builder, and the backend with its options where these are searched as well.

Which values are tried is Optuna's to say (``studies.py``); what a trial does with them is in ``trials.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hyperopt_implicit.backend import Backend, Spec, get_backend, get_backend_class, options_of
from hyperopt_implicit.errors import BackendError, DeclarationError, SearchError
from hyperopt_implicit.knobs import knobs_of
from hyperopt_implicit.messages import nearest
from hyperopt_implicit.problem import BilevelProblem

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

_BACKEND = "backend"

Builder = Callable[..., BilevelProblem]


@dataclass(frozen=True)
class KnobSpace:
    """The knobs of a search.

    Attributes:
        builder: makes a problem from the values of its own knobs.
        distributions: of all knobs by name, those of the backend under ``backend`` and ``backend.option``.
        fixed: the backend, or what is fixed of it.
    """

    builder: Builder
    distributions: dict[str, BaseDistribution]
    fixed: Spec

    @classmethod
    def of(cls, builder: Builder, backend: Spec | BaseDistribution | Mapping[str, Any]) -> KnobSpace:
        """The knobs on a builder, and those of a backend of which any part may be a distribution.

        Raises:
            SearchError: there is none.
            BackendError: a backend, or an option, that nobody has.
        """
        searched, fixed = _split(backend)
        own = {each.name: each.distribution for each in knobs_of(builder)}
        for name in own:
            if _is_of_backend(name):
                raise DeclarationError(
                    f"a knob {name!r} is taken for the backend's, which is searched by backend=; rename the knob of "
                    f"{getattr(builder, '__name__', builder)!r}."
                )
        distributions = {**own, **searched}
        for name, each in distributions.items():
            odd = [x for x in getattr(each, "choices", ()) if not isinstance(x, bool | int | float | str | None)]
            if odd:
                raise DeclarationError(
                    f"the choices of a knob must be None, bool, int, float or str, which every storage gives back as "
                    f"they were; knob {name!r} has {odd[0]!r}. Let the builder look it up by a name."
                )
        if not distributions:
            raise SearchError(
                f"a search needs at least one knob; {getattr(builder, '__name__', builder)!r} has none. Put @knob(name,"
                " distribution) on it, or call optimize, which needs none."
            )
        return cls(builder, distributions, fixed)

    def build(self, values: Mapping[str, Any], seed: int | None = None) -> BilevelProblem:
        """The problem of a trial, from random numbers that follow from the seed; the generators are put back.

        Raises:
            SearchError: the builder returns something else.
        """
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            problem = self.builder(**{name: x for name, x in values.items() if not _is_of_backend(name)})
        if not isinstance(problem, BilevelProblem):
            raise SearchError(
                f"{getattr(self.builder, '__name__', self.builder)} must return a BilevelProblem; it returned "
                f"{type(problem).__name__}."
            )
        return problem

    def backend(self, values: Mapping[str, Any]) -> Spec:
        """The backend of a trial; an option is given to those that have it."""
        if not isinstance(self.fixed, Mapping):
            return self.fixed
        spec = dict(self.fixed)
        for name, value in values.items():
            if _is_of_backend(name):
                spec["name" if name == _BACKEND else name.removeprefix(f"{_BACKEND}.")] = value
        options = {option.name for option in options_of(get_backend_class(spec["name"]))}
        return {key: value for key, value in spec.items() if key == "name" or key in options}

    def check(self, catch: tuple[type[Exception], ...] = ()) -> None:
        """Build a problem with some value of each knob, and refuse what no trial could do; nothing else is run.

        Args:
            catch: errors that may come of one value and not of others, and say nothing here.

        Raises:
            SearchError: the builder returns no problem.
            DeclarationError: a knob is a hyperparameter as well.
            BackendError: a backend that may be drawn cannot see one of the hyperparameters.
        """
        values = {name: _some_value(each) for name, each in self.distributions.items()}
        with torch.random.fork_rng():
            try:
                problem = self.build(values)
            except catch:
                return
        both = sorted(self.distributions.keys() & problem.hyperparameters.declarations.keys())
        if both:
            raise DeclarationError(
                "a name is either a knob, searched by Optuna, or a hyperparameter, trained by its gradient; "
                f"{', '.join(map(repr, both))} is both. Keep the hyperparameter, or rename the knob where it is the "
                f"hyperparameter's initial value ({both[0]}_start, say)."
            )
        names = self.distributions.get(_BACKEND)
        for name in getattr(names, "choices", (None,)):
            spec = self.backend(values if name is None else {**values, _BACKEND: name})
            try:
                get_backend(spec).for_problem(problem).check(problem)
            except BackendError as error:
                if name is None:
                    raise
                raise BackendError(f"{error} Leave {name!r} out of the knob 'backend'; no trial was begun.") from error


def _some_value(distribution: BaseDistribution) -> Any:
    """One that a trial may draw as well; in the middle of a range."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[0]
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high = distribution.low, distribution.high
    middle = math.sqrt(low * high) if distribution.log else (low + high) / 2
    if isinstance(distribution, IntDistribution):
        return low + round((middle - low) / distribution.step) * distribution.step
    return middle if distribution.step is None else low + round((middle - low) / distribution.step) * distribution.step


def _is_of_backend(name: str) -> bool:
    return name == _BACKEND or name.startswith(f"{_BACKEND}.")


def _split(backend: Any) -> tuple[dict[str, BaseDistribution], Spec]:
    """The parts of ``backend=`` that are searched, and the part that is fixed; refuses names and options nobody has."""
    from optuna.distributions import BaseDistribution, CategoricalDistribution

    if isinstance(backend, BaseDistribution):
        backend = {"name": backend}
    if not isinstance(backend, Mapping) or not any(isinstance(value, BaseDistribution) for value in backend.values()):
        return {}, get_backend(backend)
    name = backend.get("name")
    if isinstance(name, BaseDistribution) and not isinstance(name, CategoricalDistribution):
        raise BackendError(f"a backend as a knob needs a CategoricalDistribution of names; got {name}.")
    names = list(name.choices) if isinstance(name, CategoricalDistribution) else [name]
    classes: list[type[Backend]] = [get_backend_class(str(each)) for each in names]
    known = sorted({option.name for each in classes for option in options_of(each)})
    searched: dict[str, BaseDistribution] = {}
    fixed: dict[str, Any] = {}
    for key, value in backend.items():
        if key != "name" and key not in known:
            raise BackendError(
                f"none of the backends {', '.join(map(str, names))} has an option {key!r}.{nearest(key, known)}"
            )
        if isinstance(value, BaseDistribution):
            searched[_BACKEND if key == "name" else f"{_BACKEND}.{key}"] = value
        else:
            fixed[key] = value
    return searched, fixed
