"""The package as a whole: its public names, its types, what importing it costs, and which way its imports point."""

from __future__ import annotations

import ast
import importlib.resources
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hyperopt_implicit as hi
from hyperopt_implicit import backends as re_exported

CORE = Path(str(importlib.resources.files("hyperopt_implicit")))
BACKENDS = Path(str(importlib.resources.files("hyperopt_implicit_backends")))


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def imports(path: Path, *, at_run_time_only: bool = False) -> Iterator[str]:
    """Every module that a file imports anywhere; those under ``if TYPE_CHECKING`` can be left out."""
    tree = ast.parse(path.read_text())
    skipped: set[ast.AST] = set()
    if at_run_time_only:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                skipped |= {each for child in node.body for each in ast.walk(child)}
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def importers(package: str, folder: Path) -> list[str]:
    return [path.name for path in files(folder) if any(each.split(".")[0] == package for each in imports(path))]


# ------------------------------------------------------------------------------------------------------ public names


def test_all_equals_the_public_names() -> None:
    modules = {path.stem for path in CORE.iterdir()}
    public = {name for name in vars(hi) if not name.startswith("_") and name not in modules - set(hi.__all__)}
    assert sorted(hi.__all__) == hi.__all__
    assert public == set(hi.__all__)


def test_every_public_name_has_a_docstring() -> None:
    assert [name for name in hi.__all__ if not (getattr(hi, name).__doc__ or "").strip()] == []


def test_every_error_is_public_and_of_one_root() -> None:
    from hyperopt_implicit import errors

    found = {name: each for name, each in vars(errors).items() if isinstance(each, type)}
    assert set(found) <= set(hi.__all__)
    for name, each in found.items():
        assert issubclass(each, hi.HyperoptError) or each is hi.HyperoptWarning, name
        assert name in (errors.__doc__ or "")


def test_every_installed_backend_of_ours_is_re_exported() -> None:
    from hyperopt_implicit.backend import get_backend_class

    ours = {get_backend_class(name) for name in hi.list_backends()}
    ours = {each for each in ours if each.__module__.startswith("hyperopt_implicit_backends.")}
    assert {getattr(re_exported, name) for name in re_exported.__all__} == ours


@pytest.mark.parametrize("folder", [CORE, BACKENDS], ids=lambda folder: folder.name)
def test_types_are_published(folder: Path) -> None:
    assert (folder / "py.typed").exists()


@pytest.mark.parametrize("path", [*files(CORE), *files(BACKENDS)], ids=lambda path: path.name)
def test_every_file_says_what_lives_in_it(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


# ----------------------------------------------------------------------------------------------- the cost of importing


def loaded_after(statement: str) -> set[str]:
    code = f"import sys, json; {statement}; print(json.dumps(sorted(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(found.stdout))


def test_import_brings_in_little_beside_torch() -> None:
    added = {name.split(".")[0] for name in loaded_after("import torch, hyperopt_implicit")}
    added -= {name.split(".")[0] for name in loaded_after("import torch, torch.distributions, torch.func")}
    heavy = {"mlflow", "optuna", "pandas", "matplotlib", "sqlalchemy", "sklearn", "scipy", "typer", "rich", "pydantic"}
    assert added & heavy == set()
    assert "hyperopt_implicit_backends" not in added
    assert added - set(sys.stdlib_module_names) == {"hyperopt_implicit"}


def test_running_without_tracking_imports_neither_tracker_nor_search() -> None:
    run = "from tests.ridge import ridge, hi; hi.optimize(ridge(), 'cg', outer_steps=1, tracking=False)"
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r}); {run}"
    assert not {name.split(".")[0] for name in loaded_after(code)} & {"mlflow", "optuna", "pandas", "matplotlib"}


# ------------------------------------------------------------------------------------------------ which way imports go


def test_only_tracking_imports_mlflow() -> None:
    assert importers("mlflow", CORE) == ["mlflow_run.py"]
    assert importers("mlflow", BACKENDS) == []


def test_only_search_and_knobs_import_optuna() -> None:
    """Those around studies: the command line and the loop know Optuna through them alone."""
    assert importers("optuna", CORE) == [
        "best_trial.py",
        "cli_search.py",
        "heartbeats.py",
        "kept_trials.py",
        "knob_space.py",
        "knobs.py",
        "optuna_warnings.py",
        "places.py",
        "reporting.py",
        "retries.py",
        "search.py",
        "search_record.py",
        "storage_contents.py",
        "storages.py",
        "studies.py",
        "telling.py",
        "trial_checkpoints.py",
        "trial_table.py",
        "trials.py",
        "workers.py",
    ]
    assert importers("optuna", BACKENDS) == []


def test_backends_know_nothing_of_loop_tracking_and_search() -> None:
    above = {
        "optimize",
        "outer_loop",
        "tracking",
        "search",
        "cli",
        "hyper_optimizer",
        "history",
        "sender",
        "run_record",
        "progress",
    }
    for path in files(BACKENDS):
        used = {each.split(".")[1] for each in imports(path) if each.startswith("hyperopt_implicit.")}
        assert used & above == set(), path.name


def test_core_finds_backends_through_their_entry_points_only() -> None:
    for path in files(CORE):
        used = set(imports(path))
        assert "hyperopt_implicit.backends" not in used, path.name
        assert path.name == "backends.py" or not any(each.startswith("hyperopt_implicit_backends") for each in used)


LAYERS = [
    {
        "errors",
        "vectors",
        "randomness",
        "functional",
        "credentials",
        "servers",
        "stopwatch",
        "argument_checks",
        "interrupts",
        "distributed",
        "shares",
    },
    {"messages"},
    {"checkpoint"},
    {"data", "hyperparameters", "knobs", "micro_batches"},
    {"backend"},
    {"carried", "saved_state"},
    {
        "binding",
        "inner_state",
        "replicas",
        "problem",
        "operators",
        "gauss_newton",
        "low_precision",
        "mixed_precision",
        "tracing",
        "compiled",
        "spectrum",
        "implicit",
        "conjugate_gradients",
        "survey",
        "plan",
        "preconditioner",
        "first_order",
        "one_loop",
        "optimizers",
        "updates",
        "reversal",
        "snapshot",
        "inner_loop",
        "trajectory",
        "forward_mode",
        "preflight",
        "out_of_memory",
        "newton",
        "minimizer",
        "alike",
        "members",
        "members_batches",
        "members_update",
        "members_solver",
        "members_conjugate_gradients",
    },
    {"guarded_step"},
    {"hyper_optimizer", "history", "members_curvature"},
    {"population_check", "population_choice", "members_compiled"},
    {"report"},
    {"local_copy"},
    {"figures", "progress", "sender", "run_record"},
    {"mlflow_run"},
    {"tracking"},
    {"plain_training"},
    {"outer_loop", "members_training"},
    {"run_state"},
    {"prepared_run"},
    {"optimize", "population_run"},
    {"population"},
    {
        "optuna_warnings",
        "knob_space",
        "storage_contents",
        "storages",
        "processes",
        "places",
        "heartbeats",
        "retries",
        "workers",
    },
    {"studies", "reporting", "kept_trials", "trial_checkpoints"},
    {"telling"},
    {"trials"},
    {"search_record", "trial_table", "best_trial"},
    {"search"},
    {"loading", "launched"},
    {"backend_page"},
    {"cli_options", "cli_output", "local_workers"},
    {"cli_resume"},
    {"cli_search"},
    {"cli"},
    {"__main__"},
]


def test_imports_point_downwards() -> None:
    """Arrows go one way: cli → search → optimize → … → problem, at run time."""
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    for path in CORE.glob("*.py"):
        if path.stem not in level:
            continue  # re-exports
        used = {
            each.split(".")[1]
            for each in imports(path, at_run_time_only=True)
            if each.startswith("hyperopt_implicit.") and each.split(".")[1] in level
        }
        assert {name for name in used if level[name] > level[path.stem]} == set(), path.name


def test_every_core_file_has_its_layer() -> None:
    """Beside the layers stand the re-exports, and the folder with the conformance suite."""
    assert {path.stem for path in CORE.glob("*.py")} == {"__init__", "backends"} | set().union(*LAYERS)


AUXILIARY = CORE / "auxiliary"


def test_auxiliary_learning_stands_on_the_core_and_below_the_loop() -> None:
    above = {
        "hyper_optimizer",
        "outer_loop",
        "optimize",
        "search",
        "tracking",
        "run_record",
        "sender",
        "loading",
        "cli",
    }
    for path in files(AUXILIARY):
        used = {each.split(".")[1] for each in imports(path) if each.startswith("hyperopt_implicit.")}
        assert used & above == set(), path.name
    for path in CORE.glob("*.py"):
        used = set(imports(path))
        assert path.stem == "__init__" or not any("hyperopt_implicit.auxiliary" in each for each in used), path.name


def test_diagnostics_stand_on_the_core_and_only_the_command_line_on_them() -> None:
    above = {"outer_loop", "optimize", "search", "sender", "loading", "cli"}
    for path in files(CORE / "diagnostics"):
        used = {each.split(".")[1] for each in imports(path) if each.startswith("hyperopt_implicit.")}
        assert used & above == set(), path.name
    for path in CORE.glob("*.py"):
        uses = any("hyperopt_implicit.diagnostics" in each for each in imports(path))
        assert not uses or path.stem in ("__init__", "cli"), path.name


def test_public_names_of_auxiliary_learning() -> None:
    modules = {path.stem for path in AUXILIARY.glob("*.py")}
    assert sorted(hi.auxiliary.__all__) == hi.auxiliary.__all__
    public = {name for name in vars(hi.auxiliary) if not name.startswith("_") and name not in modules}
    assert public == set(hi.auxiliary.__all__)
    assert [name for name in public if not (getattr(hi.auxiliary, name).__doc__ or "").strip()] == []


def test_torchjd_is_only_imported_when_a_method_needs_it() -> None:
    assert "torchjd" not in {name.split(".")[0] for name in loaded_after("import hyperopt_implicit.auxiliary")}
