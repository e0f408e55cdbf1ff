"""What a stranger's file, name or URL cannot do, and what is never told: code, passwords, and paths."""

from __future__ import annotations

import ast
import importlib.resources
import json
import sqlite3
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna
import pytest
import torch
from optuna.distributions import FloatDistribution
from optuna.storages import RDBStorage
from sqlalchemy.exc import OperationalError

import hyperopt_implicit as hi
from hyperopt_implicit import cli, storages
from hyperopt_implicit.servers import is_secret, without_password
from hyperopt_implicit.storages import open_storage, shown
from hyperopt_implicit.studies import unusable

from .commands import Command
from .ridge import ridge

# ------------------------------------------------------------------------------------------------------ the code itself

FILES = sorted(
    path
    for package in ("hyperopt_implicit", "hyperopt_implicit_backends")
    for path in Path(str(importlib.resources.files(package))).rglob("*.py")
)


def calls() -> Iterator[tuple[Path, ast.Call, str]]:
    """Every call in the package, with the name of what is called."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield path, node, ast.unparse(node.func)


def keywords(call: ast.Call) -> dict[str | None, str]:
    return {each.arg: ast.unparse(each.value) for each in call.keywords}


def test_there_is_code_to_look_at() -> None:
    assert len(FILES) > 100
    assert sum(name == "torch.load" for _, _, name in calls()) >= 2
    assert sum(name.startswith("subprocess.") for _, _, name in calls()) >= 3


def test_nothing_is_unpickled() -> None:
    """A pickle runs what it says. Torch's files are read as tensors, numbers and containers of these alone."""
    for path, call, name in calls():
        if name.rpartition(".")[2] == "load" and name.split(".")[0] in ("torch", "numpy", "np"):
            given = keywords(call)
            assert given.get("weights_only") == "True" or given.get("allow_pickle", "False") == "False" != name[:5], (
                path
            )
        if name == "torch.load":
            assert keywords(call).get("weights_only") == "True", path


def test_nothing_that_unpickles_is_imported() -> None:
    found = {
        (path.name, alias.name if isinstance(node, ast.Import) else f"{node.module}.{alias.name}")
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    unsafe = ("pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "yaml", "jsonpickle")
    assert {each for each in found if each[1].split(".")[0] in unsafe} == {
        ("assertions.py", "pickle.UnpicklingError")  # an error to catch
    }


def test_no_text_is_run() -> None:
    """Options are literals or words. The one file that is run is the user's own, named by the user (loading.py)."""
    for path, _, name in calls():
        assert name not in ("eval", "exec", "__import__"), path
        assert name not in ("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"), path
        assert not name.endswith("exec_module") or path.name == "loading.py", path
        assert name not in ("tempfile.mktemp",), path


def test_no_command_goes_through_a_shell() -> None:
    for path, call, name in calls():
        if name.startswith("subprocess."):
            assert "shell" not in keywords(call), path
            assert not isinstance(call.args[0], ast.Constant | ast.JoinedStr), path  # a list of words


@pytest.mark.parametrize("text", ["__import__('os').system('touch run')", "open('run', 'w')", "(lambda: 1)()"])
def test_an_option_is_a_word_and_nothing_more(command: Command, text: str) -> None:
    said = command("run", "train.py", "-b", "cg", "-o", f"tolerance={text}", "--no-tracking", code=1)
    assert "option 'tolerance'" in said
    assert not (command.folder / "run").exists()


class Harmful:
    """What a pickle could hold."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, ("run", "w")


def test_a_kept_model_is_not_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = search(tmp_path)
    (state,) = (each for each in (tmp_path / "kept").iterdir() if each.is_file())
    torch.save({"model": Harmful(), "hyperparameters": {}, "seed": None}, state)
    with pytest.raises(hi.SearchError, match="cannot be read"):
        hi.load_best(problem, found.study.study_name, storage=found.study._storage, artifacts=tmp_path / "kept")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------- passwords

SECRET = "S3cr3t/p@ss w0rd"
ENCODED = quote(SECRET, safe="")
URLS = {
    "in front of the host": f"postgresql://anna:{ENCODED}@127.0.0.1:1/studies",
    "as it is": f"postgresql://anna:{SECRET}@127.0.0.1:1/studies",
    "in the query": f"postgresql://127.0.0.1:1/studies?user=anna&password={ENCODED}",
    "of the key": f"postgresql://anna@127.0.0.1:1/studies?sslmode=require&sslpassword={ENCODED}",
    "with a slash too few": f"postgresql:/anna:{ENCODED}@127.0.0.1:1/studies",
    "without a scheme": f"anna:{ENCODED}@127.0.0.1:1/studies",
    "of a scheme that there is not": f"postgre://anna:{ENCODED}@127.0.0.1:1/studies",
    "of an encrypted file": f"sqlite+pysqlcipher://:{ENCODED}@/studies.db",
    "of a proxy": f"grpc://anna:{ENCODED}@127.0.0.1:1",
}
COMMANDS = {
    "search": ("search", "train.py", "-n", "1", "--no-tracking", "--storage"),
    "studies": ("studies", "--storage"),
    "show": ("show", "decays", "--storage"),
}


def assert_not_told(*texts: str) -> None:
    for text in texts:
        assert SECRET not in text
        assert ENCODED not in text
        assert "w0rd" not in text  # nor a part


def driver_error(*_: Any, **__: Any) -> Any:
    """As unkind as a driver can be: the secret on its own, escaped, in a URL, and far behind."""
    inner = ValueError(
        f'could not connect with "{SECRET}" ({ENCODED}); {"x" * 150} {URLS["in front of the host"]} {SECRET}'
    )
    raise OperationalError("SELECT 1", {}, inner) from inner


def ended_with_debug(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What Python prints of a command that raises."""
    monkeypatch.setattr(sys, "argv", ["hyperopt-implicit", *words, "--debug"])
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    try:
        cli.main()
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
    return "".join(capsys.readouterr())


@pytest.mark.parametrize("way", URLS)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_password_is_in_no_message(command: Command, name: str, way: str) -> None:
    assert_not_told(command(*COMMANDS[name], URLS[way], code=1))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_password_is_in_no_traceback(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setattr(storages, "_knock", driver_error)
    said = ended_with_debug(monkeypatch, capsys, *COMMANDS[name], URLS["in front of the host"])
    assert "Traceback" in said
    assert "cannot be used: could not connect with" in said
    assert_not_told(said)


def test_a_traceback_of_ones_own_error_shows_no_password_either(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = URLS["in front of the host"]
    (command.folder / "bad.py").write_text(f"raise ValueError({f'no data at {url}'!r})")
    words = ("search", "bad.py", "--storage", url)
    assert_not_told(command(*words, code=1))
    sys.modules.pop("bad", None)
    said = ended_with_debug(monkeypatch, capsys, *words)
    assert "ValueError: no data at postgresql://anna:***@127.0.0.1:1/studies" in said


@pytest.mark.parametrize("way", [way for way in URLS if way not in ("with a slash too few", "without a scheme")])
def test_a_password_is_in_no_error_that_a_driver_causes(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Neither in what is raised, nor in what a traceback shows of where it came from."""
    monkeypatch.setattr(storages, "_open_database", driver_error)
    monkeypatch.setattr(storages, "_open_proxy", driver_error)
    with pytest.raises(hi.SearchError, match=r"cannot be used: could not connect with \"\*\*\*\"") as caught:
        open_storage(URLS[way])
    assert_not_told("".join(traceback.format_exception(caught.value)))


def test_what_a_harmless_error_came_of_is_still_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(storages, "_knock", refuse)
    with pytest.raises(hi.SearchError, match="nobody answers") as caught:
        open_storage(URLS["in front of the host"])
    assert isinstance(caught.value.__cause__, ConnectionError)


@hi.knob("lr", FloatDistribution(0.1, 0.5))
def problem(*, lr: float) -> hi.BilevelProblem:
    return ridge(optimizer=lambda params: torch.optim.SGD(params, lr=lr))


def remote(folder: Path) -> RDBStorage:
    """A storage that could be on a server, for all that the search knows."""
    kept = open_storage(f"sqlite:///{folder}/studies.db")
    assert isinstance(kept, RDBStorage)
    kept.url = URLS["in front of the host"]
    return kept


def search(folder: Path, builder: Any = problem, **options: Any) -> hi.SearchResult:
    settings = {
        "n_trials": 2, "study_name": "secret", "seed": 0, "tracking": False, "outer_steps": 2,
        "artifacts": folder / "kept", **options,
    }  # fmt: skip
    return hi.search(builder, "cg", storage=remote(folder), **settings)


def told_in(study: optuna.Study) -> str:
    return " ".join([str(study.user_attrs), *(f"{each.user_attrs}{each.system_attrs}" for each in study.trials)])


def test_a_password_is_in_no_study_and_no_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = search(tmp_path)
        search(tmp_path, n_trials=3, seed=1)
        search(tmp_path, n_trials=3)
    assert_not_told(told_in(found.study), repr(found.study), *(str(each.message) for each in caught))
    assert len(caught) >= 2


@pytest.mark.parametrize("where", ["tell", "set_user_attr", "get_trials"])
def test_a_storage_that_goes_away_during_a_search_tells_no_password(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = search(tmp_path, n_trials=1)
    monkeypatch.setattr(optuna.Study, where, driver_error)
    with pytest.raises(hi.HyperoptError) as caught:
        search(tmp_path, n_trials=2, study_name="secret" if where != "set_user_attr" else "another")
    assert "***" in str(caught.value)
    monkeypatch.undo()
    assert_not_told("".join(traceback.format_exception(caught.value)), told_in(first.study))


def test_a_study_that_cannot_be_made_tells_no_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optuna, "create_study", driver_error)
    with pytest.raises(hi.SearchError, match="the study cannot be kept in") as caught:
        search(tmp_path)
    assert_not_told("".join(traceback.format_exception(caught.value)))
    assert_not_told(str(unusable(URLS["in front of the host"], ValueError(SECRET))))


def test_why_a_trial_has_failed_is_kept_without_the_password(tmp_path: Path) -> None:
    @hi.knob("lr", FloatDistribution(0.1, 0.5))
    def failing(*, lr: float) -> hi.BilevelProblem:
        raise hi.LossError(f"the loss is read from {URLS['in front of the host']}, which is down ({SECRET})")

    with pytest.raises(hi.SearchError, match="none was") as caught:
        search(tmp_path, failing)
    assert_not_told(str(caught.value))
    (kept,) = {
        each.user_attrs["failure"] for each in optuna.load_study(storage=remote(tmp_path), study_name="secret").trials
    }
    assert kept == "the loss is read from postgresql://anna:***@127.0.0.1:1/studies, which is down (***)"


def test_a_password_is_not_in_mlflow(workplace: Path) -> None:
    search(workplace, tracking=True)
    for path in [workplace / "mlflow.db", *(workplace / "mlruns").rglob("*"), *(workplace / "mlartifacts").rglob("*")]:
        if path.is_file():
            content = path.read_bytes()
            assert SECRET.encode() not in content and ENCODED.encode() not in content, path


@pytest.mark.parametrize("key", ["password", "PWD", "passwd", "sslpassword", "access_token", "client_secret", "apikey"])
def test_a_key_whose_value_is_secret(key: str) -> None:
    assert is_secret(key)
    assert without_password(f"postgresql://db/x?a=1&{key}=s3cret&b=2") == f"postgresql://db/x?a=1&{key}=***&b=2"


@pytest.mark.parametrize("key", ["user", "connect_timeout", "sslmode", "host", "options"])
def test_a_key_whose_value_is_none(key: str) -> None:
    assert not is_secret(key)


@pytest.mark.parametrize("way", URLS)
def test_a_url_is_shown_without_its_password(way: str) -> None:
    assert_not_told(shown(URLS[way]))
    assert "***" in shown(URLS[way])


# -------------------------------------------------------------------------------------------------------------- paths

NAMES = ["../../outside", "/outside", "..", "a/../../outside", "C:\\outside", "a\x00b", "~/outside", "$HOME"]


def everything(folder: Path) -> set[str]:
    return {str(each.relative_to(folder)) for each in folder.rglob("*")}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_leads_nowhere(name: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of studies, runs and experiments are words in a database; no file is called after them."""
    inside = workplace / "a" / "b"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workplace}/mlflow.db")
    tracking = hi.Tracking(run_name=name, system_metrics=False, figures=False)
    try:
        found = hi.search(
            problem, "cg", n_trials=1, storage="sqlite:///studies.db", study_name=name, seed=0, outer_steps=1,
            tracking=tracking,
        )  # fmt: skip
    except hi.SearchError:
        assert "\x00" in name
        return
    assert found.study.study_name == name
    outside = {each for each in everything(workplace) if not each.startswith("a/b") and each not in ("a", "mlflow.db")}
    assert {each for each in outside if "outside" in each} == set()
    assert {each.parts[0] for each in map(Path, outside)} <= {
        "mlflow.db-wal",
        "mlflow.db-shm",
        "mlflow.db-journal",
        "mlruns",
        "mlartifacts",
    }
    assert {each.name for each in inside.iterdir()} <= {
        "studies.db",
        "studies.db-wal",
        "studies.db-shm",
        "studies.artifacts",
        "mlruns",
        "mlartifacts",
    }
    hi.load_best(problem, name, storage="sqlite:///studies.db")


@pytest.mark.parametrize("path", ["../precious", "/precious", "a/../../precious"])
def test_a_study_cannot_have_files_read_or_removed_elsewhere(path: str, tmp_path: Path) -> None:
    """The name of a kept model is in the storage, where others can write."""
    precious = tmp_path / "precious"
    torch.save({"model": {}, "hyperparameters": {}, "seed": 7}, precious)
    search(tmp_path, n_trials=1)
    name = str(precious) if path.startswith("/") else path
    with sqlite3.connect(tmp_path / "studies.db") as database:  # as somebody else would
        changed = database.execute(
            "UPDATE trial_user_attributes SET value_json = ? WHERE key = 'state'", [json.dumps(name)]
        )
        assert changed.rowcount == 1
    assert optuna.load_study(storage=remote(tmp_path), study_name="secret").trials[0].user_attrs["state"] == name
    with pytest.raises(hi.SearchError, match="cannot be read"):
        hi.load_best(problem, "secret", storage=remote(tmp_path), artifacts=tmp_path / "kept")
    later = search(tmp_path, n_trials=4)  # a better one makes room for itself
    assert later.best_trial > 0
    assert precious.exists()
