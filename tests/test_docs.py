"""The documentation is code: every Python block of every page runs, and every command line in it parses and runs.

The blocks of a page share one namespace and one empty folder. A block with ``title="FILE"`` is written to that file as well;
a block ``text title="Output"`` must be what the Python block before it prints.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import shlex
import sys
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from hyperopt_implicit.cli import app

ROOT = Path(__file__).parent.parent
_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+)(?P<info>[^\n]*)\n(?P<body>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE
)
_TITLE = re.compile(r'title="([^"]+)"')
_OUTPUT = "Output"
_SHORT = ["--no-tracking", "--outer-steps", "2", "--inner-steps", "2", "--warmup-steps", "0"]


@dataclass(frozen=True)
class Block:
    """A fenced block: what its language is, which title it has, and the line on which its body begins."""

    language: str
    title: str | None
    body: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    blocks = []
    for found in _FENCE.finditer(text):
        title = _TITLE.search(found["info"])
        line = text.count("\n", 0, found.start()) + 2
        body = textwrap.dedent(found["body"])
        blocks.append(Block(found["language"], title and title[1], body, line))
    return blocks


def commands_of(page: Path) -> list[list[str]]:
    """The arguments of every ``hyperopt-implicit`` command in the shell blocks of a page."""
    lines = [
        line.removeprefix("$ ")
        for block in blocks_of(page)
        if block.language == "bash"
        for line in block.body.replace("\\\n", " ").splitlines()
    ]
    return [
        words[1:] for words in (shlex.split(line, comments=True) for line in lines) if words[:1] == ["hyperopt-implicit"]
    ]


def pages() -> list[Path]:
    return [page for page in sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]) if page.is_file()]


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


PAGES_WITH_CODE = [page for page in pages() if any(block.language == "python" for block in blocks_of(page))]
PAGES_WITH_COMMANDS = [page for page in pages() if commands_of(page)]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working folder, no tracking server from outside, one thread, and nothing left behind."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.setenv(name, "")  # set, so that what a page sets is undone
    monkeypatch.setattr(sys, "path", [*sys.path])
    modules = set(sys.modules)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def run_blocks(page: Path) -> None:
    """Run a page from its first block to its last."""
    module = types.ModuleType("__main__")
    printed = ""
    for block in blocks_of(page):
        if block.title is not None and block.title != _OUTPUT:
            Path(block.title).parent.mkdir(parents=True, exist_ok=True)
            Path(block.title).write_text(block.body, encoding="utf-8")
        if block.language == "python":
            # the empty lines make a traceback point into the page
            code = compile("\n" * (block.line - 1) + block.body, str(page), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(code, module.__dict__)
            printed = output.getvalue()
        elif block.title == _OUTPUT:
            options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            assert doctest.OutputChecker().check_output(block.body, printed, options), (
                f"{named(page)}:{block.line}: the page shows\n{block.body}\nand its code prints\n{printed}"
            )


@pytest.mark.parametrize("page", PAGES_WITH_CODE, ids=named)
def test_the_code_of_a_page_runs(page: Path) -> None:
    run_blocks(page)


@pytest.mark.parametrize("page", PAGES_WITH_COMMANDS, ids=named)
def test_the_commands_of_a_page_work(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks_of(page):
        if block.title is not None and block.title != _OUTPUT:
            Path(block.title).write_text(block.body, encoding="utf-8")
    root: Any = typer.main.get_command(app)
    for arguments in commands_of(page):
        name, *rest = arguments
        root.commands[name].make_context(name, list(rest))  # raises what the command line would say
        if name in ("run", "search") and Path(rest[0]).exists():
            app([name, *rest, *_SHORT, *(["--trials", "1"] if name == "search" else [])], standalone_mode=False)
        elif name == "backends":
            app(arguments, standalone_mode=False)


def test_every_page_is_in_the_navigation() -> None:
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads mkdocs.yml, in which tags may name Python objects."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)
    navigation = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"]  # noqa: S506
    listed = set(re.findall(r"[\w/-]+\.md", str(navigation)))
    written = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert listed == written
