"""The page about a backend, made from the backend itself: its card, its docstring and its options.

The command line prints it and the docs show it, so neither can differ from the code.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap

from hyperopt_implicit.backend import Backend, get_backend_class, option_types, options_of

CARD_ROWS = {
    "family": "family",
    "gives": "gives",
    "cost": "costs",
    "memory": "vectors held",
    "conditions": "right when",
    "use": "for",
    "paper": "paper",
}


def page(name: str) -> str:
    """Everything about a backend as plain text, 100 columns wide.

    Raises:
        BackendError: there is no backend of that name.
    """
    backend = get_backend_class(name)
    lines = [f"{name}  ({backend.__module__}.{backend.__qualname__})", ""]
    for label, text in card_rows(backend):
        lines += textwrap.wrap(text, 100, initial_indent=f"{label:<14}", subsequent_indent=" " * 14)
    lines += ["", plain(inspect.cleandoc(backend.__doc__ or "")), "", "Options:"]
    for option, default, what in option_rows(backend):
        lines += textwrap.wrap(
            f"{option} = {default}: {what}", 100, initial_indent="    ", subsequent_indent="        "
        )
    return "\n".join(lines)


def summary(name: str) -> str:
    """The first sentence of a backend's docstring."""
    return plain(inspect.cleandoc(get_backend_class(name).__doc__ or "").splitlines()[0])


def card_rows(backend: type[Backend]) -> list[tuple[str, str]]:
    """The card as labels and texts, with what the contract says of the backend; empty where it has no card."""
    if backend.card is None:
        return []
    rows = [(label, str(getattr(backend.card, field))) for field, label in CARD_ROWS.items()]
    wants = "two derivatives of L" if backend.needs_second_derivative else "one derivative of L"
    sees = "options of the optimizer too" if backend.differentiates == "trajectory" else "hyperparameters of the losses"
    validation = "" if backend.needs_validation_gradient else ", none of F"
    return [*rows, ("needs", f"{wants}{validation}"), ("sees", sees)]


def option_rows(backend: type[Backend]) -> list[tuple[str, str, str]]:
    """Name, default and description of each option."""
    types = option_types(backend)
    rows = []
    for option in options_of(backend):
        metadata = getattr(types[option.name], "__metadata__", ())
        description = next((each.description for each in metadata if getattr(each, "description", None)), "")
        default = "" if option.default is dataclasses.MISSING else repr(option.default)
        rows.append((option.name, default, description))
    return rows


def plain(docstring: str) -> str:
    """A docstring without the marks of its markup."""
    return re.sub(r":\w+:`~?([^`]*)`", r"\1", docstring).replace("``", "")
