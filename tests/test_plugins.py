"""A stranger's package adds a backend: a real second distribution is built, installed and used by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .cases import CASES
from .commands import FINISHED

SCRIPT = """
import json
import hyperopt_implicit as hi
from finished import problem

found = {}
for options in ({}, {"sweeps": 3}):
    spec = {"name": "richardson", **options}
    result = hi.optimize(problem, spec, outer_steps=2, inner_steps=5, tracking=False)
    found[str(hi.get_backend(spec))] = [each.iterations for each in result.history]
try:
    hi.get_backend("richardsen")
except hi.BackendError as error:
    found["error"] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which pip installed the stranger's distribution, beside a file with a problem."""
    folder = tmp_path_factory.mktemp("stranger")
    source = shutil.copytree(Path(__file__).with_name("plugin_distribution"), folder / "source")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    command += ["--disable-pip-version-check", "--target", str(folder / "site"), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (folder / "site" / "finished.py").write_text(FINISHED)
    return folder / "site"


def run(installed: Path, *command: str | Path) -> str:
    path = os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}
    found = subprocess.run(command, env=environment, cwd=installed, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_backend_of_a_stranger_is_used_by_name_and_with_options(installed: Path) -> None:
    found = json.loads(run(installed, sys.executable, "-c", SCRIPT))
    names = ", ".join(sorted([*(case.name for case in CASES), "richardson"]))
    assert found == {
        "Richardson(damping=0.0, curvature='hessian', sweeps=50, step_size=0.3)": [50, 50],
        "Richardson(damping=0.0, curvature='hessian', sweeps=3, step_size=0.3)": [3, 3],
        "error": f"there is no backend 'richardsen'; installed are {names}. Did you mean 'richardson'?",
    }


def test_command_line_lists_and_runs_it(installed: Path) -> None:
    script = Path(sys.executable).with_name("hyperopt-implicit")
    listed = run(installed, script, "backends").split("\n")
    (line,) = [line for line in listed if line.startswith("richardson")]
    assert "Richardson iteration: u ← u + α (v − Hu), a fixed number of times." in line
    assert any("sweeps" in line and "50" in line and "number of iterations" in line for line in listed)
    assert any(line.startswith("neumann") for line in listed)
    said = run(
        *(installed, script, "run", "finished.py", "--backend", "richardson", "--option", "sweeps=4"),
        *("--outer-steps", "2", "--no-tracking"),
    )
    assert "2 outer steps in" in said
