"""Knobs: what has no gradient (sizes, learning rates under an implicit backend, choices) and is searched by Optuna.

A knob is attached to the function that builds a problem. What has a gradient is declared in ``hyperparameters.py``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from hyperopt_implicit.argument_checks import check_function, shown
from hyperopt_implicit.errors import DeclarationError
from hyperopt_implicit.messages import nearest

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

BuilderT = TypeVar("BuilderT", bound=Callable[..., Any])


@dataclass(frozen=True)
class Knob:
    """A keyword of a problem builder, and the Optuna distribution from which its values are drawn."""

    name: str
    distribution: BaseDistribution


def knob(name: str, distribution: BaseDistribution) -> Callable[[BuilderT], BuilderT]:
    """Declare a keyword of a problem builder that Optuna searches; one line for each.

    Args:
        name: the builder's keyword.
        distribution: an object of ``optuna.distributions``.

    Raises:
        DeclarationError: the builder has no such keyword, the knob is declared twice, or the distribution is none.

    Example:
        >>> import hyperopt_implicit as hi
        >>> from optuna.distributions import FloatDistribution
        >>> @hi.knob("inner_lr", FloatDistribution(1e-3, 1.0, log=True))
        ... def problem(*, inner_lr):
        ...     ...
        >>> [knob.name for knob in hi.knobs_of(problem)]
        ['inner_lr']
    """
    from optuna.distributions import BaseDistribution

    if not isinstance(name, str) or not name.isidentifier():
        raise DeclarationError(f"a knob's name must be a Python identifier; got {shown(name)}.")
    if not isinstance(distribution, BaseDistribution):
        raise DeclarationError(
            f"knob {name!r}: the distribution must come from optuna.distributions (FloatDistribution, "
            f"IntDistribution, CategoricalDistribution); got {type(distribution).__name__}."
        )

    def decorate(builder: BuilderT) -> BuilderT:
        check_function(builder, f"@knob({name!r}, …) stands on a function that builds a problem", DeclarationError)
        parameters = inspect.signature(builder).parameters.values()
        keywords = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if name not in keywords and not any(p.kind is p.VAR_KEYWORD for p in parameters):
            raise DeclarationError(
                f"a knob must be a keyword of the function it stands on; {builder.__name__} takes "
                f"{', '.join(keywords) or 'no keyword'}, not {name!r}.{nearest(name, keywords)}"
            )
        if any(each.name == name for each in knobs_of(builder)):
            raise DeclarationError(f"each knob is declared once; {name!r} stands twice on {builder.__name__}.")
        builder.__knobs__ = (Knob(name, distribution), *knobs_of(builder))  # type: ignore[attr-defined]
        return builder

    return decorate


def knobs_of(builder: Callable[..., Any]) -> tuple[Knob, ...]:
    """The knobs on a problem builder, from the top decorator down; empty where there is none."""
    return getattr(builder, "__knobs__", ())
