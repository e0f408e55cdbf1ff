"""Errors on the command line are one paragraph and exit code 1, and nothing is left behind."""

from __future__ import annotations

import pytest

import hyperopt_implicit as hi

from .cases import INSTALLED
from .commands import FILE, FINISHED, Command

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
        "bad.py must define a BilevelProblem, or a function that builds one, called 'problem': it defines first, "
        "second; choose one with --problem NAME.",
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
        ("run", "bad.py", "-k", "nestrov=1"),
        "problem has no knob 'nestrov'; it takes lr, nesterov. Did you mean 'nesterov'?",
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
        ("run", "bad.py", "-b", "unrol"),
        f"there is no backend 'unrol'; installed are {INSTALLED}. Did you mean 'unrolled'?",
    ),
    "option of the wrong type": (
        FILE,
        ("run", "bad.py", "-o", "terms=many"),
        "Neumann option 'terms': input should be a valid integer, unable to parse string as an integer; got 'many'.",
    ),
    "unknown device": (FILE, ("run", "bad.py", "--device", "abacus"), "--device abacus cannot be used here: "),
    "no threads": (
        FILE,
        ("run", "bad.py", "--threads", "0"),
        "--threads must be a whole number of at least 1; got 0.",
    ),
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
