"""Where the commands of the command line print, and what several of them print."""

from __future__ import annotations

from rich.console import Console

from hyperopt_implicit.credentials import without_credentials

out = Console()
err = Console(stderr=True)


def print_link(link: str | None, uri: str | None) -> None:
    """Where to look at a run; with the command that starts a server, where there is none."""
    if link is None:
        return
    flag = f" --tracking-uri {without_credentials(uri)}" if uri is not None else ""
    served = link.startswith("http://127.0.0.1:5000")
    prefix = f"MLflow: 'hyperopt-implicit ui{flag}', then " if served else "MLflow: "
    out.print(f"{prefix}{link}", soft_wrap=True, highlight=False)
