"""The tables and pages about backends, made from the backends themselves while the docs are built.

``<!-- methods -->`` in a page becomes one table a family; every backend gets a page of its own, with its card, its
docstring and its options. Nothing about a method is written twice, so nothing can differ from the code.
"""

from __future__ import annotations

from typing import Any

from mkdocs.structure.files import File, Files

from hyperopt_implicit.backend import Backend, get_backend_class, list_backends
from hyperopt_implicit.backend_page import CARD_ROWS, card_rows

MARK = "<!-- methods -->"
FAMILIES = {
    "implicit": "Implicit: solve A u = v at the present weights",
    "one-loop": "One-loop and stochastic: carry u from outer step to outer step, or sample its batches",
    "unrolled": "Through training: differentiate the steps taken",
    "first-order": "First-order: no second derivative of the training loss",
}


def on_files(files: Files, *, config: Any) -> Files:
    """Adds a page for each backend of ours."""
    for name in _ours():
        files.append(File.generated(config, f"backends/{name}.md", content=backend_page(name)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **kwargs: Any) -> str:
    """Puts the tables where they are asked for."""
    up = "../" * page.file.src_uri.count("/")
    return markdown.replace(MARK, methods(f"{up}backends/"))


def _ours() -> list[str]:
    return [n for n in list_backends() if get_backend_class(n).__module__.startswith("hyperopt_implicit_backends.")]


def backend_page(name: str) -> str:
    """One backend: card, docstring, options."""
    backend = get_backend_class(name)
    rows = "\n".join(f"| **{label}** | {_cell(text)} |" for label, text in card_rows(backend))
    return "\n".join(
        [
            "---",
            "hide: [toc]",
            "---",
            f"# {name}",
            "",
            "| | |",
            "|---|---|",
            rows,
            "",
            f"`hyperopt-implicit backends {name}` prints this page. n: number of weights, m: of hyperparameters.",
            "",
            f"::: {backend.__module__}.{backend.__qualname__}",
            "",
        ]
    )


def methods(folder: str) -> str:
    """A table for each family, with a link to each backend's page."""
    lines = []
    for family, heading in FAMILIES.items():
        members = [name for name in _ours() if _family(get_backend_class(name)) == family]
        columns = [label for field, label in CARD_ROWS.items() if field not in ("family", "conditions")]
        lines += [f"**{heading}**", "", f"| backend | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
        for name in members:
            cells = dict(card_rows(get_backend_class(name)))
            lines.append(
                f"| [`{name}`]({folder}{name}.md) | {' | '.join(_cell(cells[column]) for column in columns)} |"
            )
        lines.append("")
    return "\n".join(lines)


def _family(backend: type[Backend]) -> str:
    return "" if backend.card is None else backend.card.family


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
