"""The commands around studies: what they print, on a terminal and off it, what they refuse, and what stays hidden."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna
import pytest
from mlflow import MlflowClient
from optuna.distributions import FloatDistribution
from optuna.trial import create_trial

import hyperopt_implicit as hi
from hyperopt_implicit import cli_search

from .commands import FILE, Command
from .postgres import PASSWORD, Postgres

SQLITE = "sqlite:///optuna.db"
SHORT = ["--outer-steps", "2", "--inner-steps", "1", "--no-tracking"]
SECRET = "s3cret/pass"


def study(name: str = "decays", objectives: tuple[str, ...] = ("validation_loss",)) -> optuna.Study:
    """A study of three trials, of which one has failed and one was lost."""
    made = optuna.create_study(storage=SQLITE, study_name=name, directions=["minimize"] * len(objectives))
    with pytest.warns(optuna.exceptions.ExperimentalWarning):
        made.set_metric_names(list(objectives))
    at = {"params": {"lr": 0.125}, "distributions": {"lr": FloatDistribution(0.0, 1.0)}}
    made.add_trial(create_trial(values=[0.5, 2.0][: len(objectives)], **at))
    made.add_trial(create_trial(state=optuna.trial.TrialState.FAIL, user_attrs={"failure": "it is [inf]"}, **at))
    lost = {"failure": "its worker was killed", "lost": True}
    made.add_trial(create_trial(state=optuna.trial.TrialState.FAIL, user_attrs=lost, **at))
    return made


# ------------------------------------------------------------------------------------------------------ studies, show


def test_studies_lists_them(command: Command) -> None:
    study("first")
    study("second [draft]", ("validation_loss", "seconds"))
    said = command("studies")
    assert said.startswith("study trials best begun first 3 0.5 20")
    assert re.search(r"second \[draft\] 3 \d{4}-\d\d-\d\d", said)  # two objectives have no best value


def test_studies_of_a_storage_without_any(command: Command) -> None:
    optuna.delete_study(study_name=study().study_name, storage=SQLITE)
    assert command("studies") == f"{SQLITE} holds no study yet."


def test_show_prints_trials_failures_and_the_best(command: Command) -> None:
    study()
    said = command("show", "decays")
    assert said.startswith("trial state validation loss time lr 0* complete 0.5 0.0 s 0.125 1 failed 0.0 s 0.125")
    assert "2 lost 0.0 s 0.125" in said
    assert "trial 1: it is [inf]" in said
    assert "trial 2: its worker was killed" in said
    assert "best of 2 trials: number 0, validation loss 0.5, lr = 0.125" in said  # the lost one does not count


def test_show_prints_the_pareto_front(command: Command) -> None:
    made = study(objectives=("validation_loss", "seconds"))
    at = {"params": {"lr": 0.25}, "distributions": {"lr": FloatDistribution(0.0, 1.0)}}
    for values in ([0.25, 3.0], [0.75, 3.0], [0.125, 9.0]):  # better in the first, beaten, best in the first
        made.add_trial(create_trial(values=values, **at))
    said = command("show", "decays")
    assert re.findall(r"number (\d), validation loss ([\d.]+), seconds (\d)", said) == [
        ("5", "0.125", "9"),
        ("3", "0.25", "3"),
        ("0", "0.5", "2"),
    ]
    assert re.findall(r"(\d)\* complete", said) == ["0", "3", "5"]


def test_show_of_a_study_without_a_complete_trial(command: Command) -> None:
    optuna.create_study(storage=SQLITE, study_name="empty")
    assert "study empty: none of 0 trials is complete" in command("show", "empty")


# ------------------------------------------------------------------------------------------------------------- search


def test_search_off_a_terminal_prints_a_line_a_trial(command: Command) -> None:
    said = command("search", "train.py", "-b", "cg", "-n", "2", "--study", "decays", "--seed", "0", *SHORT)
    found = optuna.load_study(storage=SQLITE, study_name="decays")
    for each in found.trials:
        began = re.escape(f"trial {each.number} complete {each.value:.6g} ")
        knobs = re.escape(f"lr={each.params['lr']:.4g} nesterov={each.params['nesterov']}")
        assert re.search(rf"{began}[\d.]+ s {knobs}", said)
    assert "\x1b" not in said


def test_table_on_a_terminal(tmp_path: Path) -> None:
    slow = FILE.replace(
        "def validation_loss(model, batch):", "def validation_loss(model, batch):\n    time.sleep(0.15)"
    )
    (tmp_path / "train.py").write_text("import time\n" + slow)
    controller, terminal = pty.openpty()
    words = ["search", "train.py", "-b", "cg", "-n", "2", "--study", "decays", "--seed", "0", "--no-tracking"]
    process = subprocess.Popen(
        [sys.executable, "-m", "hyperopt_implicit", *words, "--outer-steps", "15", "--inner-steps", "1"],
        cwd=tmp_path,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "150", "LINES": "40"},
    )
    os.close(terminal)
    written = _all_of(controller)
    assert process.wait(60) == 0, written
    shown = " ".join(re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", written).split())
    first, second = optuna.load_study(storage=f"sqlite:///{tmp_path}/optuna.db", study_name="decays").trials
    assert "trial state validation loss time lr nesterov" in shown
    for each in (first, second):
        knobs = f"{each.params['lr']:.4g} {each.params['nesterov']}"
        assert re.search(rf"{each.number} running [\d.e-]* ?[\d.]+ s {re.escape(knobs)}", shown)
        assert re.search(rf"{each.number}\*? complete {each.value:.6g} [\d.]+ s {re.escape(knobs)}", shown)
    assert "\x1b[?25h" in written  # the cursor is there again
    assert "trial   0" not in written  # no line a trial beside the table


def _all_of(controller: int) -> str:
    parts = []
    until = time.monotonic() + 120.0
    while time.monotonic() < until:
        if not select.select([controller], [], [], 1.0)[0]:
            continue
        try:
            part = os.read(controller, 1 << 16)
        except OSError:  # nobody has the terminal open any more
            break
        if not part:
            break
        parts.append(part)
    os.close(controller)
    return b"".join(parts).decode()


# ---------------------------------------------------------------------------------------------------------- bad input

SEARCH = ("search", "train.py")
REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "population": (
        (*SEARCH, "--population", "x"),
        "--population takes a whole number of at least 1, or 'auto'; got 'x'.",
    ),
    "population of none": (
        (*SEARCH, "--population", "0", "--workers", "2"),
        "--population takes a whole number of at least 1, or 'auto'; got '0'.",
    ),
    "workers": ((*SEARCH, "--workers", "0"), "--workers must be a whole number of at least 1; got 0."),
    "sampler": ((*SEARCH, "--sampler", "zzz"), "sampler must be one of tpe, random, gp, "),
    "sampler of workers": ((*SEARCH, "--sampler", "tpee", "--workers", "2"), "got 'tpee'. Did you mean 'tpe'?"),
    "pruner": ((*SEARCH, "--pruner", "medium"), "got 'medium'. Did you mean 'median'?"),
    "trials": ((*SEARCH, "--trials", "0"), "n_trials must be a whole number of at least 1; got 0."),
    "timeout": ((*SEARCH, "--timeout", "-1"), "timeout must be a positive number of seconds, or None; got -1.0."),
    "storage": ((*SEARCH, "--storage", "sqlte:///x.db"), "Did you mean 'sqlite' or 'mysql'?"),
    "backend": ((*SEARCH, "--backend", "cgg"), "'cgg'"),
    "outer steps": ((*SEARCH, "--outer-steps", "0"), "outer_steps"),
    "study that is not there": (("show", "decays"), "'sqlite:///optuna.db' holds none. Name another."),
    "storage that is not there": (
        ("studies", "--storage", "journal:///no.log"),
        "studies are looked up where there are some; 'journal:///no.log' holds none. Name another.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_made(command: Command, case: str) -> None:
    words, message = REFUSED[case]
    before = sorted(each.name for each in command.folder.iterdir())
    said = command(*words, code=1)
    assert said.startswith("Error: ")
    assert message in said
    assert sorted(each.name for each in command.folder.iterdir() if each.name != "__pycache__") == before


def test_misspelt_study(command: Command) -> None:
    study()
    said = command("show", "decay", code=1)
    assert "there is no study 'decay' in 'sqlite:///optuna.db'; it has decays. Did you mean 'decays'?" in said


def test_knobs_that_have_changed(command: Command) -> None:
    command(*SEARCH, "-b", "cg", "-n", "1", "--study", "decays", *SHORT)
    (command.folder / "train.py").write_text(
        FILE.replace("FloatDistribution(0.01, 0.2)", "FloatDistribution(0.01, 0.4)")
    )
    before = optuna.load_study(storage=SQLITE, study_name="decays").trials
    sys.modules.pop("train", None)
    said = command(*SEARCH, "-b", "cg", "-n", "2", "--study", "decays", *SHORT, code=1)
    assert "lr: was FloatDistribution(step=None, low=0.01, high=0.2, log=False), is " in said
    assert optuna.load_study(storage=SQLITE, study_name="decays").trials == before


# ---------------------------------------------------------------------------------------------------------- passwords


def test_password_of_a_storage_is_in_no_error(command: Command) -> None:
    url = f"postgresql://anna:{SECRET}@127.0.0.1:1/studies"
    for words in ((*SEARCH, *SHORT), ("studies",), ("show", "decays")):
        said = command(*words, "--storage", url, code=1)
        assert SECRET not in said
        assert "anna:***@127.0.0.1:1/studies" in said


def test_password_is_not_in_what_resumes(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def interrupted(*args: Any, **options: Any) -> None:
        given.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_search, "search", interrupted)
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    urls = {"--storage": f"postgresql://anna:{SECRET}@db/studies", "--tracking-uri": "http://anna:0pen@tracks:5000"}
    words = [word for pair in urls.items() for word in pair]
    monkeypatch.setattr(sys, "argv", ["hyperopt-implicit", *SEARCH, "--study", "decays", *words])
    said = _output_of(command)
    assert given["storage"] == urls["--storage"]
    assert given["tracking"] == hi.Tracking(urls["--tracking-uri"], None, None)
    assert SECRET not in said
    assert "0pen" not in said
    assert "postgresql://anna:***@db/studies" in said
    assert "http://anna:***@tracks:5000" in said


def _output_of(command: Command) -> str:
    from hyperopt_implicit import cli

    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 130
    return " ".join(command._capsys.readouterr().out.split())


def test_password_is_not_in_what_a_link_needs(capsys: pytest.CaptureFixture[str]) -> None:
    from hyperopt_implicit.cli_output import print_link

    print_link("http://127.0.0.1:5000/#/experiments/1", f"postgresql://anna:{SECRET.replace('/', '')}@db/runs")
    said = capsys.readouterr().out
    assert SECRET.replace("/", "") not in said
    assert "hyperopt-implicit ui --tracking-uri postgresql://anna:***@db/runs" in said


def test_password_is_not_in_the_record(command: Command, workplace: Path, postgres: Postgres) -> None:
    url = postgres.new_database()
    said = command(*SEARCH, "-b", "cg", "-n", "1", *SHORT[:-1], "--storage", url)
    password = quote(PASSWORD, safe="")
    assert password in url
    found = MlflowClient(f"sqlite:///{workplace}/mlflow.db").search_runs(["1"])
    assert len(found) == 2
    for text in (said, *(str(each.to_dictionary()) for each in found)):
        assert PASSWORD not in text
        assert password not in text
