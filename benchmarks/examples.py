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

EXAMPLES = Path(__file__).parent.parent / "examples"
_MLFLOW_HINT = re.compile(r"^.*(MLflow|hyperopt-implicit ui).*$", re.MULTILINE)


def section(example: Path) -> str:
    """One example: what its docstring says first, the command, and what it printed."""
    documentation = ast.get_docstring(ast.parse(example.read_text())) or ""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "COLUMNS": "110",
            "NO_COLOR": "1",
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        }
        run = subprocess.run(
            [sys.executable, str(example)], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
    if run.returncode != 0:
        raise SystemExit(f"{example.name} failed:\n{run.stderr}")
    printed = _MLFLOW_HINT.sub("", run.stdout).rstrip()
    seconds = time.perf_counter() - started
    return "\n".join(
        [
            f"## {example.stem}",
            "",
            documentation.split("\n\n")[0],
            "",
            f"`python examples/{example.name}`, {seconds:.0f} seconds with everything:",
            "",
            "```text",
            printed,
            "```",
            "",
        ]
    )


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
    Path(sys.argv[1]).write_text("\n".join(introduction) + "\n" + "\n".join(sections))


if __name__ == "__main__":
    main()
