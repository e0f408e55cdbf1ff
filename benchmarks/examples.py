"""Run examples in full and write the docs page with what they print.

python benchmarks/examples.py docs/examples.md             every file in examples/
python benchmarks/examples.py docs/auxiliary-results.md    every problem in examples/auxiliary_learning/
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from versions import versions_line

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
_AT_ONCE = 2
# in words: to be read again, and corrected, after every new run
_CONCLUSIONS = """\
**What it comes to.** Weights that were learned and then used to train anew on all samples are the best of all
methods on the illustrative problem and on the digits, beyond one standard error against each. On the tabular
problem they beat the main task alone and are hardly ahead of equal weights. On yeast five seeds tell nothing apart,
since splits differ by far more than methods do; thirty show learned weights ahead of equal weights, and by little
of the main task alone, and networks with room for all tasks would leave nothing to win. Random tasks, where there
are any, are turned down everywhere.

**Where they do not win.** The run that learns the weights trains on fewer samples than the others are given, and
mostly loses to them: the gain is in the weights, not in that model. A network in the place of a weighted sum is
never better than the sum, and on yeast it is worse: the held-out set is too small to learn more from. Learned
labels beat no labels; on the digits an untrained generator does as well, and on parity plain clusters do better.
Uncertainty weighting needs no held-out set and is the one to beat on the illustrative problem when its noise is
larger. Settings were chosen for learned weights, and data and decay are the same for all; nothing was tuned for
another method."""
_LINK = re.compile(r"MLflow|http://")  # where the run was logged means nothing to a reader


@dataclass(frozen=True)
class Page:
    """A docs page of examples.

    Attributes:
        title: its heading.
        introduction: what stands below it, as Markdown.
        files: the examples, in order.
        arguments: of the command of each example, by its name; a list for each time that it is run.
        pictures: Markdown below an example's output, by its name.
    """

    title: str
    introduction: str
    files: Sequence[Path]
    arguments: dict[str, list[list[str]]] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)


def documentation_of(file: Path) -> str:
    return ast.get_docstring(ast.parse(file.read_text())) or ""


def only(*methods: str) -> list[str]:
    """The arguments that leave out all other methods."""
    return [part for method in methods for part in ("--only", method)]


def _auxiliary() -> Page:
    folder = EXAMPLES / "auxiliary_learning"
    order = ("illustrative", "digits", "yeast", "labels", "tabular")
    picture = ROOT / "docs" / "images" / "illustrative.png"
    return Page(
        title="Auxiliary learning, compared",
        introduction=(
            "What learned weights win over other ways of weighting the same tasks, and where they do not. Five "
            "problems in `examples/auxiliary_learning/`, every method on the same split, the same network and the same "
            "number of steps; every run is logged in MLflow. Written by `make auxiliary`.\n\n"
            + _CONCLUSIONS
            + "\n\n```text\n"
            + documentation_of(folder / "comparison.py").split("\n\n", 1)[1]
            + "\n```"
        ),
        files=[folder / f"{name}.py" for name in order],
        arguments={
            "illustrative": [["--figure", str(picture)]],
            "yeast": [[], ["--first-seed", "200", "--seeds", "30", *only("single", "equal", "learned weights")]],
        },
        pictures={
            "illustrative": f"![Training with equal and with learned weights of the tasks](images/{picture.name})",
        },
    )


def _examples() -> Page:
    return Page(
        title="Examples",
        introduction=(
            "Each is one file in `examples/`, on real or generated data, and prints the table below. Written by "
            "`make examples`. The comparison of methods for auxiliary learning has "
            "[its own page](auxiliary-results.md)."
        ),
        files=[file for file in sorted(EXAMPLES.glob("*.py")) if file.stem != "over_seeds"],  # what they share
        # other seeds, as a check on settings that were chosen on few
        arguments={"auxiliary_digits": [[], ["--first-seed", "5"]]},
    )


PAGES = {"examples.md": _examples, "auxiliary-results.md": _auxiliary}


def section(page: Page, example: Path) -> str:
    """One example: what its docstring says first, and what its commands printed."""
    printed = "".join(output(example, arguments) for arguments in page.arguments.get(example.stem, [[]]))
    picture = page.pictures.get(example.stem)
    below = "" if picture is None else f"{picture}\n\n"
    return f"## {example.stem}\n\n{documentation_of(example).split('.')[0]}.\n\n{printed}{below}"


def output(example: Path, arguments: list[str]) -> str:
    """A command, its time, and what it printed."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "COLUMNS": "110",
            "NO_COLOR": "1",
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        }
        run = subprocess.run(
            [sys.executable, str(example), *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    if run.returncode != 0:
        raise SystemExit(f"{example.name} failed:\n{run.stderr}")
    printed = "\n".join(line.rstrip() for line in run.stdout.splitlines() if not _LINK.search(line)).strip()
    seconds = time.perf_counter() - started
    shown = [Path(each).name if Path(each).is_absolute() else each for each in arguments]
    command = shlex.join(["python", str(example.relative_to(ROOT)), *shown])
    print(f"{command}: {seconds:.0f} seconds", file=sys.stderr)
    return f"`{command}`, {seconds:.0f} seconds with everything:\n\n```text\n{printed}\n```\n\n"


def main() -> None:
    target = Path(sys.argv[1])
    page = PAGES[target.name]()
    head = "\n\n".join([f"# {page.title}", page.introduction, versions_line()])
    with ThreadPoolExecutor(_AT_ONCE) as pool:  # each example is a process, of one thread
        sections = "".join(pool.map(partial(section, page), page.files))
    target.write_text(f"{head}\n\n{sections.rstrip()}\n")


if __name__ == "__main__":
    main()
