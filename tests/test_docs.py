"""The documentation is code: every Python block of every page runs, and every command line in it parses and runs.

The blocks of a page share one namespace and one empty folder. A block with ``title="FILE"`` is written to that file
first; a block ``text title="Output"`` must be what the Python block before it prints. A page that writes a
``pyproject.toml`` is installed, and the test classes that a page defines are run.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import shlex
import subprocess
import sys
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from hyperopt_implicit.cli import app

from .cases import CASES

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
    shell = [block.body.replace("\\\n", " ") for block in blocks_of(page) if block.language == "bash"]
    lines = [shlex.split(line.removeprefix("$ "), comments=True) for body in shell for line in body.splitlines()]
    return [words[1:] for words in lines if words[:1] == ["hyperopt-implicit"]]


def commands_in_the_text_of(page: Path) -> list[list[str]]:
    """The same for commands between single backticks."""
    return [
        shlex.split(found) for found in re.findall(r"`hyperopt-implicit ([^`\n]+)`", page.read_text(encoding="utf-8"))
    ]


def pages() -> list[Path]:
    return [page for page in sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]) if page.is_file()]


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


PAGES_WITH_CODE = [page for page in pages() if any(block.language == "python" for block in blocks_of(page))]
PAGES_WITH_COMMANDS = [page for page in pages() if commands_of(page) or commands_in_the_text_of(page)]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working folder, no tracking server from outside, and no module of a page left behind."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.setenv(name, "")  # set, so that what a page sets is undone
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def write_files(page: Path) -> None:
    """Write the blocks that are files."""
    for block in blocks_of(page):
        if block.title is not None and block.title != _OUTPUT:
            Path(block.title).write_text(block.body, encoding="utf-8")


def install(target: Path) -> None:
    """Install the distribution that a page writes, with its entry points, without a network."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--disable-pip-version-check", "--target", target, "."], check=True, capture_output=True)


def run_blocks(page: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Run a page from its first block to its last, in one namespace."""
    monkeypatch.setitem(sys.modules, "page", module := types.ModuleType("page"))
    write_files(page)
    if Path("pyproject.toml").exists():
        install(Path("installed"))
        monkeypatch.syspath_prepend("installed")
    printed = ""
    for block in blocks_of(page):
        if block.language == "python":
            # the empty lines make a traceback point into the page
            code = compile("\n" * (block.line - 1) + block.body, str(page), "exec", dont_inherit=True)
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(code, module.__dict__)
            printed = output.getvalue()
        elif block.title == _OUTPUT:
            options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            assert doctest.OutputChecker().check_output(block.body, printed, options), (
                f"{named(page)}:{block.line}: the page shows\n{block.body}\nand its code prints\n{printed}"
            )
    return module


@pytest.mark.parametrize("page", PAGES_WITH_CODE, ids=named)
def test_the_code_of_a_page_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = run_blocks(page, monkeypatch)
    for name, suite in list(vars(module).items()):
        if name.startswith("Test"):
            for test in (each for each in dir(suite) if each.startswith("test_")):
                getattr(suite(), test)()


@pytest.mark.parametrize("page", PAGES_WITH_COMMANDS, ids=named)
def test_the_commands_of_a_page_work(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_files(page)
    root: Any = typer.main.get_command(app)
    for name, *arguments in [*commands_of(page), *commands_in_the_text_of(page)]:
        assert name in root.commands, f"{named(page)}: there is no command {name!r}"
        root.commands[name].make_context(name, arguments)  # raises what the command line would say
    trials = 0
    for name, *arguments in commands_of(page):
        if name == "compare":
            arguments.append("--no-tracking")
        if name in ("check", "compare") and Path(arguments[0]).exists():
            with contextlib.suppress(typer.Exit):
                app([name, *arguments], standalone_mode=False)
        if name == "backends":
            app([name, *arguments], standalone_mode=False)
        elif name in ("run", "search") and Path(arguments[0]).exists():
            trials += 1
            shortened = [*arguments, *_SHORT, *(["--trials", str(trials)] if name == "search" else [])]
            app([name, *shortened], standalone_mode=False)


def test_every_page_is_in_the_navigation() -> None:
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = set(re.findall(r"[\w/-]+\.md", str(navigation)))
    generated = {f"backends/{case.name}.md" for case in CASES}
    assert listed == generated | {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}


def test_figures_of_the_readme_are_those_that_the_examples_printed() -> None:
    printed = (ROOT / "docs" / "examples.md").read_text()
    figures = re.findall(r"(\d+\.\d ± \d\.\d)", (ROOT / "README.md").read_text())
    assert len(figures) == 7
    for figure in figures:
        assert figure in printed
