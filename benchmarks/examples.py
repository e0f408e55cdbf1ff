"""Run every example in full and write the docs page with what they print.

python benchmarks/examples.py docs/examples.md
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from versions import versions_line

OTHER_SEEDS = {"auxiliary_digits": ["--first-seed", "5"]}  # as a check on settings that were chosen on few seeds
EXAMPLES = Path(__file__).parent.parent / "examples"
_LINK = re.compile(r"MLflow|http://")  # where the run was logged means nothing to a reader


def section(example: Path) -> str:
    """One example: what its docstring says first, and what its commands printed."""
    documentation = ast.get_docstring(ast.parse(example.read_text())) or ""
    printed = output(example, [])
    if example.stem in OTHER_SEEDS:
        printed += output(example, OTHER_SEEDS[example.stem])
    return f"## {example.stem}\n\n{documentation.split('.')[0]}.\n\n{printed}"


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
    command = " ".join(["python", f"examples/{example.name}", *arguments])
    return f"`{command}`, {seconds:.0f} seconds with everything:\n\n```text\n{printed}\n```\n\n"


def main() -> None:
    sections = [section(example) for example in sorted(EXAMPLES.glob("*.py"))]
    introduction = [
        "# Examples",
        "",
        "Each is one file in `examples/`, on real data, and prints the table below. Written by `make examples`.",
        "",
        versions_line(),
        "",
    ]
    Path(sys.argv[1]).write_text("\n".join(introduction) + "\n" + "".join(sections).rstrip() + "\n")


if __name__ == "__main__":
    main()
