"""The command line on files of one's own: what it runs, what it prints, and errors of one paragraph."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from mlflow import MlflowClient

import hyperopt_implicit as hi
from hyperopt_implicit import cli

from .commands import FILE, FINISHED, Command

# ------------------------------------------------------------------------------------------------------------- run

IDLE = "@hi.hyperparameter('idle', init=0.0)\n@hi.hyperparameter("
SHORT = ("--outer-steps", "3", "--inner-steps", "2", "--no-tracking")


def test_run_prints_start_best_and_last(command: Command) -> None:
    said = command("run", "finished.py", *SHORT, "--seed", "1", "--outer-lr", "0.1")
    assert "hyperparameter start best last decay 0.5 " in said
    assert "validation loss: best " in said
    assert "3 outer steps in" in said
    assert "(all outer steps done)" in said
    assert "MLflow" not in said


def test_run_takes_options_of_backend_and_loop(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    real = cli.optimize

    def spy(problem: hi.BilevelProblem, backend: hi.Backend, **options: Any) -> hi.Result:
        seen.update(options, backend=backend, lr=problem.optimizer.param_groups[0]["lr"])
        seen["nesterov"] = problem.optimizer.param_groups[0]["nesterov"]
        return real(problem, backend, **{**options, "tracking": False})

    monkeypatch.setattr(cli, "optimize", spy)
    command(
        *("run", "train.py", "-b", "neumann", "-o", "terms=7", "--option", "step_size=0.5", "-k", "lr=0.05"),
        *("--knob", "nesterov=True", "--outer-steps", "2", "--inner-steps", "3", "--warmup-steps", "4"),
        *("--outer-lr", "0.5", "--clip", "2", "--hessian-batches", "2", "--patience", "9", "--seed", "3"),
        *("--accumulate", "2", "--inner-precision", "bfloat16"),
        *("--checkpoint", "saved", "--checkpoint-every", "1", "--resume"),
        *("--tracking-uri", "sqlite:///x.db", "--experiment", "mine", "--run-name", "first", "--device", "cpu"),
    )
    assert seen == {
        "backend": hi.get_backend("neumann", terms=7, step_size=0.5),
        "lr": 0.05,
        "nesterov": True,
        "outer_steps": 2,
        "inner_steps": 3,
        "warmup_steps": 4,
        "outer_lr": 0.5,
        "clip": 2.0,
        "hessian_batches": 2,
        "accumulate": 2,
        "inner_precision": "bfloat16",
        "patience": 9,
        "seed": 3,
        "checkpoint": Path("saved"),
        "checkpoint_every": 1,
        "resume": True,
        "tracking": hi.Tracking("sqlite:///x.db", "mine", "first"),
    }


def test_run_with_a_seed_repeats_itself(command: Command) -> None:
    said = {command("run", "finished.py", *SHORT, "--seed", "4").split(" in ")[0] for _ in range(2)}
    assert len(said) == 1


def test_run_is_tracked_and_prints_its_link(workplace: Path, command: Command) -> None:
    said = command("run", "finished.py", "--outer-steps", "2", "--experiment", "mine")
    client = MlflowClient(tracking_uri=f"sqlite:///{workplace}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.source.name"] == "finished.py"
    assert said.endswith(
        f"MLflow: 'hyperopt-implicit ui', then http://127.0.0.1:5000/#/experiments/{run.info.experiment_id}/runs/"
        f"{run.info.run_id}?workflowType=machine_learning"
    )


def test_warning_is_one_paragraph(command: Command) -> None:
    text = FINISHED.replace("*, decay)", "*, decay, idle)").replace("@hi.hyperparameter(", IDLE, 1)
    (command.folder / "warned.py").write_text(text)
    said = command("run", "warned.py", *SHORT)
    assert "Warning: hyperparameter 'idle' influences neither the training gradient nor the validation loss" in said
    assert "HyperoptWarning" not in said
    assert "warned.py" not in said.split("Warning:")[1]


# ----------------------------------------------------------------------------------------------------------- search


def test_search_prints_trials_and_the_best(command: Command) -> None:
    said = command("search", "train.py", "-b", "cg", "--trials", "3", "--study", "decays", *SHORT, "--seed", "0")
    for number in range(3):
        assert f"trial {number} complete" in said
    assert "best of 3 trials: number " in said
    assert "continue it with --study decays and a larger --trials" in said
    study = optuna.load_study(storage="sqlite:///optuna.db", study_name="decays")
    assert f"validation loss {study.best_value:.6g}" in said
    more = command("search", "train.py", "-b", "cg", "-n", "4", "--study", "decays", *SHORT, "--seed", "0")
    assert "trial 3 complete" in more
    assert "trial 2" not in more


# ------------------------------------------------------------------------------------------------- backends and ui


def test_backends_lists_each_with_its_options(command: Command) -> None:
    said = command("backends")
    for name in hi.list_backends():
        assert f" {name} " in f" {said} "
    for option in ("terms 10", "step_size 'auto'", "tolerance", "max_iterations", "damping", "last None"):
        assert option in said


def test_backends_shows_one_in_full(command: Command) -> None:
    said = command("backends", "neumann")
    assert said.startswith("neumann (hyperopt_implicit_backends.neumann.Neumann) family implicit gives a truncated")
    for words in (
        "costs K products (K = terms), 1 more for the step size",
        "paper Lorraine et al. 2020 needs two derivatives of L sees hyperparameters of the losses Truncated Neumann",
        "Lorraine, Vicol, Duvenaud",
        "terms = 10: number of terms K of the series",
    ):
        assert words in said


def test_check_says_right_or_not(command: Command) -> None:
    said = command("check", "finished.py", "--backend", "cg", "--warmup-steps", "300", "--threads", "1")
    assert "ConjugateGradient on" in said and "right: the hypergradient is within" in said
    said = command("check", "finished.py", "-b", "neumann", "-o", "terms=1", "-o", "step_size=1e-4", code=1)
    assert "not right: the hypergradient is off by" in said


def test_compare_shows_and_logs_every_backend(command: Command) -> None:
    said = command("compare", "finished.py", "--warmup-steps", "50", "--threads", "1", "--figure", "backends.png")
    for name in ("cg", "exact", "neumann", "unrolled", "forward", "soba", "identity", "f2sa"):
        assert f" {name} " in said
    assert "left out: saba:" in said or " saba " in said
    assert (command.folder / "backends.png").stat().st_size > 10_000
    (run,) = MlflowClient(f"sqlite:///{command.folder}/mlflow.db").search_runs(["1"])
    assert run.data.metrics["exact/error"] < 1e-4
    assert run.data.tags["kind"] == "comparison"


def test_ui_serves_the_store_of_the_runs(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    called: list[tuple[list[str], str]] = []
    monkeypatch.setattr(
        subprocess, "call", lambda each, env: called.append((each, env["MLFLOW_BACKEND_STORE_URI"])) or 0
    )
    (command.folder / "mlflow.db").touch()
    said = command("ui", "--port", "5050")
    assert "http://127.0.0.1:5050/#/experiments?workflowType=machine_learning" in said
    store = f"sqlite:///{command.folder}/mlflow.db"
    expected = ["server", "--host", "127.0.0.1", "--port", "5050"]  # nobody else's machine, unless asked for
    assert called == [([sys.executable, "-m", "mlflow", *expected], store)]
    command("ui", "--host", "0.0.0.0")
    assert called[1][0][-4:] == ["--host", "0.0.0.0", "--port", "5000"]


def test_ui_shows_no_password(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither here nor in the list of processes, which everybody on the machine can read."""
    uri = "postgresql://me:secret@127.0.0.1/runs"
    called: list[tuple[list[str], str]] = []
    monkeypatch.setattr(
        subprocess, "call", lambda each, env: called.append((each, env["MLFLOW_BACKEND_STORE_URI"])) or 0
    )
    assert "secret" not in command("ui", "--tracking-uri", uri)
    assert "secret" not in " ".join(called[0][0])
    assert called[0][1] == uri


def test_ui_of_a_server_is_a_link(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.org/")
    said = command("ui")
    assert said.endswith("mlflow.org/#/experiments?workflowType=machine_learning")
    assert "secret" not in said


def test_ui_that_cannot_start(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(subprocess, "call", lambda each, env: 3)
    said = command("ui", code=1)
    assert said.startswith("Error: there is no store at sqlite:///")
    assert said.endswith("mlflow.db yet; log a run first, or name another with --tracking-uri.")
    (command.folder / "mlflow.db").touch()
    assert "MLflow's UI ended with code 3; is port 5000 taken? Choose another with --port." in command("ui", code=1)


# ------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("name", ["run", "search", "backends", "ui"])
def test_help_lists_every_option(command: Command, name: str) -> None:
    from typer.main import get_command

    said = command(name, "--help")
    found = get_command(cli.app).commands[name]  # type: ignore[attr-defined]
    for parameter in found.params:
        for flag in parameter.opts if parameter.param_type_name == "option" else []:
            assert flag in said
        assert getattr(parameter, "help", None), parameter.name
    assert found.help.splitlines()[0][:40] in said


def test_help_lists_every_command(command: Command) -> None:
    said = command("--help")
    for name in ("run", "search", "backends", "ui"):
        assert f" {name} " in said
    assert "Gradient-based hyperparameter optimization for PyTorch" in said


# ------------------------------------------------------------------------------------------------- files and flags


def test_misspelt_flag_is_a_usage_error(command: Command) -> None:
    assert "No such option: --outer-step" in command("run", "train.py", "--outer-step", "3", code=2)


def test_problem_is_chosen_by_name_or_as_the_only_one(command: Command) -> None:
    several = FINISHED.replace("problem = problem(lr=0.1)", "first = problem(lr=0.1)\nsecond = problem(lr=0.2)")
    (command.folder / "several.py").write_text(several)
    assert "3 outer steps" in command("run", "several.py", "--problem", "second", *SHORT)
    (command.folder / "only.py").write_text(FINISHED.replace("problem = problem", "mine = problem") + "del problem\n")
    assert "3 outer steps" in command("run", "only.py", *SHORT)


def test_file_may_import_its_neighbours(command: Command) -> None:
    (command.folder / "neighbour_of_train.py").write_text(FILE)
    sub = command.folder / "elsewhere"
    sub.mkdir()
    (command.folder / "importing.py").write_text("from neighbour_of_train import problem\nproblem = problem(lr=0.1)\n")
    os.chdir(sub)
    assert "3 outer steps" in command("run", "../importing.py", *SHORT)


# ------------------------------------------------------------------------------------------------- a real process


def test_entry_point_in_a_process_of_its_own(command: Command) -> None:
    script = Path(sys.executable).with_name("hyperopt-implicit")
    found = subprocess.run([script, "run", "absent.py"], capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert found.stderr.split() == (
        [
            "Error:",
            "FILE",
            "must",
            "be",
            "a",
            "Python",
            "file",
            "that",
            "defines",
            "a",
            "problem;",
            "there",
            "is",
            "no",
            "absent.py.",
        ]
    )
    assert found.stdout == ""


def test_seed_covers_the_building_of_the_problem(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = []

    def spy(problem: hi.BilevelProblem, *_: Any, **__: Any) -> hi.Result:
        weights.append(problem.model.weight.detach().clone())
        raise hi.CommandError("enough")

    monkeypatch.setattr(cli, "optimize", spy)
    for _ in range(2):
        command("run", "finished.py", "--seed", "5", code=1)
    assert torch.equal(weights[0], weights[1])
