"""What the command line says when a signal has ended it: the command that goes on."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import typer
from rich.markup import escape

from hyperopt_implicit.cli_output import out
from hyperopt_implicit.distributed import is_first, several

_INTERRUPTED = 130  # the exit code of what Ctrl-C has ended


def present_command(context: typer.Context, name: str, instead: Mapping[str, object]) -> list[str]:
    """The present command as a list of words; options may be replaced or added by name.

    Args:
        context: of the command.
        name: of the command.
        instead: the values of options; True for a flag that is set.
    """
    words = [name]
    for each in context.command.params:
        source = context.get_parameter_source(str(each.name))
        if each.name in instead or source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[str(each.name)]
        if each.param_type_name == "argument":
            words.append(str(value))
        elif getattr(each, "is_flag", False):
            words.append(each.opts[0])
        else:
            values = value if isinstance(value, list | tuple) else [value]
            words += [word for x in values for word in (each.opts[0], str(x))]
    for option, value in instead.items():
        words += [f"--{option}"] if value is True else [f"--{option}", str(value)]
    return words


@contextmanager
def resumable(
    context: typer.Context, name: str, instead: Mapping[str, object], hidden: Mapping[str, str]
) -> Iterator[None]:
    """On a signal, print the command that goes on and exit with the code for it.

    Args:
        context: see :func:`present_command`, as for ``name`` and ``instead``.
        name: the same.
        instead: the same.
        hidden: words with a secret in them, and how they can be shown.
    """
    try:
        yield
    except KeyboardInterrupt:
        words = [hidden.get(word, word) for word in present_command(context, name, instead)]
        command = shlex.join(["hyperopt-implicit", *words])
        how = "start all processes again, each with" if several() else "go on with"
        if is_first():
            out.print(f"interrupted; {how}\n  {escape(command)}", soft_wrap=True, highlight=False)
        raise typer.Exit(_INTERRUPTED) from None
