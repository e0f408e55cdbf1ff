"""The command line on files of one's own: what it runs, what it prints, and errors of one paragraph."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from mlflow import MlflowClient

import hyperopt_implicit as hi
from hyperopt_implicit import cli

FILE = """
import torch
import hyperopt_implicit as hi
from torch.distributions import constraints
from optuna.distributions import CategoricalDistribution, FloatDistribution

batch = (torch.linspace(-1, 1, 12).reshape(6, 2), torch.linspace(0, 1, 6).reshape(6, 1))

@hi.hyperparameter("decay", init=0.5, constraint=constraints.positive)
def training_loss(model, batch, *, decay):
    return (model(batch[0]) - batch[1]).square().mean() + decay * model.weight.square().sum()

def validation_loss(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()

@hi.knob("lr", FloatDistribution(0.01, 0.2))
@hi.knob("nesterov", CategoricalDistribution([True, False]))
def problem(*, lr, nesterov=False):
    assert isinstance(nesterov, bool)
    return hi.BilevelProblem(
        torch.nn.Linear(2, 1), training_loss, validation_loss, training_data=[batch], validation_data=[batch],
        optimizer=lambda params: torch.optim.SGD(params, lr=lr, momentum=0.5, nesterov=nesterov))
"""
FINISHED = FILE + "\nproblem = problem(lr=0.1)\n"


class Command:
    """Runs the entry point in this process; what it printed has its line breaks taken out."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: str, code: int = 0) -> str:
        self._monkeypatch.setattr(sys, "argv", ["hyperopt-implicit", *arguments])
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            with pytest.raises(SystemExit) as end:
                cli.main()
        out, err = self._capsys.readouterr()
        assert (end.value.code or 0) == code, out + err
        assert bool(err) == (code != 0) or "Warning" in err
        return " ".join((out + err).split())


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(FILE)
    (tmp_path / "finished.py").write_text(FINISHED)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("train", "finished"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return Command(tmp_path, monkeypatch, capsys)


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
        "patience": 9,
        "seed": 3,
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
    assert said.startswith("neumann (hyperopt_implicit_backends.neumann.Neumann) Truncated Neumann series")
    assert "Lorraine, Vicol, Duvenaud" in said
    assert "terms 10 number of terms K of the series" in said


def test_ui_serves_the_store_of_the_runs(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    called: list[list[str]] = []
    monkeypatch.setattr(subprocess, "call", lambda each: called.append(each) or 0)
    (command.folder / "mlflow.db").touch()
    said = command("ui", "--port", "5050")
    assert "http://127.0.0.1:5050/#/experiments?workflowType=machine_learning" in said
    store = f"sqlite:///{command.folder}/mlflow.db"
    expected = ["server", "--backend-store-uri", store, "--host", "127.0.0.1", "--port", "5050"]
    assert called == [[sys.executable, "-m", "mlflow", *expected]]


def test_ui_of_a_server_is_a_link(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.org/")
    said = command("ui")
    assert said.endswith("mlflow.org/#/experiments?workflowType=machine_learning")
    assert "secret" not in said


def test_ui_that_cannot_start(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(subprocess, "call", lambda each: 3)
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


# ----------------------------------------------------------------------------------------------------------- errors


ERRORS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "no file": ("", ("run", "absent.py"), "FILE must be a Python file that defines a problem; there is no absent.py."),
    "file that raises": (
        "x = 1\nraise ValueError('no data here')\n",
        ("run", "bad.py"),
        "bad.py could not be loaded: ValueError: no data here (line 2).",
    ),
    "syntax error": (
        "def f(:\n",
        ("run", "bad.py"),
        "bad.py could not be loaded: SyntaxError: invalid syntax (bad.py, line 1).",
    ),
    "missing package": (
        "import no_such_package\n",
        ("run", "bad.py"),
        "bad.py could not be loaded: ModuleNotFoundError: No module named 'no_such_package' (line 1).",
    ),
    "no problem": (
        "x = 1\n",
        ("run", "bad.py"),
        "bad.py must define a BilevelProblem, or a function that builds one, called 'problem': it defines neither.",
    ),
    "several problems": (
        FILE + "\nfirst = problem(lr=0.1)\nsecond = problem(lr=0.2)\ndel problem\n",
        ("run", "bad.py"),
        "bad.py must define a BilevelProblem, or a function that builds one, called 'problem': it defines first, second; "
        "choose one with --problem NAME.",
    ),
    "misspelt problem": (
        FINISHED,
        ("run", "bad.py", "--problem", "problme"),
        "bad.py defines no 'problme'. Did you mean 'problem'?",
    ),
    "problem of the wrong type": (
        "problem = 3\n",
        ("run", "bad.py"),
        "'problem' must be a BilevelProblem or a function that builds one; it is a int.",
    ),
    "builder that returns something else": (
        "def problem(): return 3\n",
        ("run", "bad.py"),
        "problem must return a BilevelProblem; it returned int.",
    ),
    "declaration that cannot hold": (
        "import hyperopt_implicit as hi\nhi.hyperparameter('a b', init=1)\n",
        ("run", "bad.py"),
        "a hyperparameter's name must be a Python identifier; got 'a b'.",
    ),
    "knob without a value": (
        FILE,
        ("run", "bad.py"),
        "problem needs a value for lr. Give each with --knob lr=VALUE, give it a default in the file, or let "
        "'hyperopt-implicit search' choose it.",
    ),
    "unknown knob": (
        FILE,
        ("run", "bad.py", "-k", "rl=1"),
        "problem has no knob 'rl'; it takes lr, nesterov. Did you mean 'lr'?",
    ),
    "knob of a finished problem": (
        FINISHED,
        ("run", "bad.py", "-k", "lr=1"),
        "--knob is for functions that build a problem; this file defines a finished one.",
    ),
    "knob without equals sign": (FILE, ("run", "bad.py", "-k", "lr"), "--knob takes NAME=VALUE; got 'lr'."),
    "option without name": (FILE, ("run", "bad.py", "-o", "=3"), "--option takes NAME=VALUE; got '=3'."),
    "unknown backend": (
        FILE,
        ("run", "bad.py", "-b", "gc"),
        "there is no backend 'gc'; installed are cg, exact, neumann, unrolled. Did you mean 'cg'?",
    ),
    "option of the wrong type": (
        FILE,
        ("run", "bad.py", "-o", "terms=many"),
        "Neumann option 'terms': input should be a valid integer, unable to parse string as an integer; got 'many'.",
    ),
    "unknown device": (FILE, ("run", "bad.py", "--device", "abacus"), "--device abacus cannot be used here: "),
    "count of the loop": (
        FINISHED,
        ("run", "bad.py", "--outer-steps", "0"),
        "outer_steps must be a whole number of at least 1; got 0.",
    ),
    "search of a finished problem": (
        FINISHED,
        ("search", "bad.py"),
        "a search needs a function with @knob declarations; this file defines a finished problem. Use 'run'.",
    ),
    "error in a user's builder": (
        "def problem(): return {}['missing']\n",
        ("run", "bad.py"),
        "KeyError: 'missing'. Run it again with --debug to see where.",
    ),
}


@pytest.mark.parametrize(("text", "arguments", "message"), ERRORS.values(), ids=ERRORS)
def test_error_is_one_paragraph_without_a_traceback(
    command: Command, text: str, arguments: tuple[str, ...], message: str
) -> None:
    (command.folder / "bad.py").write_text(text)
    before = sorted(command.folder.iterdir())
    said = command(*arguments, code=1)
    assert said.startswith(f"Error: {message}")
    assert said.endswith(message) or "--device" in message
    assert "Traceback" not in said
    assert [path for path in sorted(command.folder.iterdir()) if path.name != "__pycache__"] == before


def test_debug_raises(command: Command) -> None:
    with pytest.raises(hi.CommandError, match=r"there is no absent\.py"):
        command("run", "absent.py", "--debug")
    (command.folder / "bad.py").write_text("1 / 0")
    with pytest.raises(hi.CommandError) as caught:
        command("run", "bad.py", "--debug")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


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
