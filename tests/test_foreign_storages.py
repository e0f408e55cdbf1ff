"""What is no storage, or a damaged one: it is refused with what was found, and left as it is."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.trial import create_trial

from hyperopt_implicit import storage_contents
from hyperopt_implicit.storages import open_storage

from .storage_checks import a_study, refused, unchanged


def text(file: Path) -> None:
    file.write_text("lr,width\n0.1,64\n" * 100)


def nothing_but_text(file: Path) -> None:
    file.write_text("x")


def program(file: Path) -> None:
    connection = sqlite3.connect(file)
    connection.execute("CREATE TABLE invoices (number INTEGER)")
    connection.execute("INSERT INTO invoices VALUES (1)")
    connection.commit()
    connection.close()


def program_with_a_log(file: Path) -> None:
    connection = sqlite3.connect(file)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.close()
    program(file)


def studies_of(version: str) -> Callable[[Path], None]:
    def make(file: Path) -> None:
        a_study(f"sqlite:///{file}")
        connection = sqlite3.connect(file)
        connection.execute("UPDATE alembic_version SET version_num = ?", (version,))
        connection.execute("DROP TABLE trial_heartbeats")  # as in a version that had none
        connection.commit()
        connection.close()

    return make


def studies_of_long_ago(file: Path) -> None:
    a_study(f"sqlite:///{file}")
    connection = sqlite3.connect(file)
    connection.execute("DROP TABLE alembic_version")
    connection.execute("UPDATE version_info SET library_version = '0.8.0'")
    connection.commit()
    connection.close()


def cut_off(file: Path) -> None:
    a_study(f"sqlite:///{file}")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])


def overwritten(file: Path) -> None:
    """Where only trials are, which nobody reads before they are asked for."""
    study = optuna.create_study(storage=open_storage(f"sqlite:///{file}"))
    for _ in range(12):
        study.add_trial(create_trial(value=1.0, user_attrs={"note": "x" * 1500}))
    del study
    whole = bytearray(file.read_bytes())
    whole[-2 * 4096 :] = b"\xa5" * (2 * 4096)
    file.write_bytes(whole)


def header_only(file: Path) -> None:
    file.write_bytes(b"SQLite format 3\x00" + b"\x00" * 84)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (text, r"is an SQLite database; '.*/file' is none, it begins with b'lr,width"),
        (nothing_but_text, r"is none, it begins with b'x'"),
        (program, "/file' has the table invoices, and no studies. Give the search a database of its own"),
        (program_with_a_log, "/file' has the table invoices"),
        (studies_of("v2.6.0.a"), r"no longer compatible.*optuna storage upgrade"),
        (studies_of("v99.0.0.a"), "no longer compatible.*updating optuna to the latest version"),
        (studies_of_long_ago, r"made by Optuna 0\.8\.0, and .* cannot read them.*optuna storage upgrade"),
        (cut_off, "cannot be used: .*malformed"),
        (overwritten, "cannot be used: .*(malformed|damaged)"),
        (header_only, "cannot be used: "),
    ],
)
def test_a_file_that_holds_something_else_is_left_as_it_is(
    make: Callable[[Path], None], match: str, tmp_path: Path
) -> None:
    make(tmp_path / "file")
    with unchanged(tmp_path):
        message = refused(f"sqlite:///{tmp_path}/file", match)
        refused(f"sqlite:///{tmp_path}/file", match, must_exist=True)
    assert "othing was changed" in message or "database of its own" in message
    assert str(tmp_path / "file") in message


def test_mlflow_s_database_is_left_as_it_is(empty_store: Path, tmp_path: Path) -> None:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    with unchanged(tmp_path):
        refused(f"sqlite:///{tmp_path}/mlflow.db", r"/mlflow.db' has the tables .* more, and no studies")


def test_what_a_program_has_only_written_to_its_log_counts(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "file")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("CREATE TABLE invoices (number INTEGER)")
    connection.commit()
    assert (tmp_path / "file-wal").stat().st_size > 0
    before = (tmp_path / "file").read_bytes(), (tmp_path / "file-wal").read_bytes()
    refused(f"sqlite:///{tmp_path}/file", "/file' has the table invoices")
    assert ((tmp_path / "file").read_bytes(), (tmp_path / "file-wal").read_bytes()) == before
    connection.close()


def test_what_a_killed_process_has_left_half_done_is_undone(tmp_path: Path) -> None:
    """A rollback journal beside the file: a killed writer of ours is undone, of a stranger's nothing is touched."""
    for name, table in (("ours", "studies"), ("theirs", "invoices")):
        folder = tmp_path / name
        folder.mkdir()
        if name == "ours":
            a_study(f"sqlite:///{folder}/made")
            connection = sqlite3.connect(folder / "made")
            connection.execute("PRAGMA journal_mode=DELETE")
        else:
            program(folder / "made")
            connection = sqlite3.connect(folder / "made")
        connection.execute("PRAGMA cache_size=1")
        connection.execute("PRAGMA cache_spill=1")
        connection.execute(f"DELETE FROM {table}")
        connection.execute("CREATE TABLE more (x)")
        connection.execute(
            "INSERT INTO more SELECT randomblob(4000) FROM (WITH RECURSIVE n(i) AS "
            "(SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 50) SELECT i FROM n)"
        )
        shutil.copy(folder / "made", folder / "file")
        shutil.copy(folder / "made-journal", folder / "file-journal")
        connection.close()
        assert (folder / "file-journal").stat().st_size > 0
    assert [each.study_name for each in open_storage(f"sqlite:///{tmp_path}/ours/file").get_all_studies()] == ["before"]
    with unchanged(tmp_path / "theirs"):
        refused(f"sqlite:///{tmp_path}/theirs/file", "/theirs/file' has the table invoices, and no studies")


@pytest.mark.parametrize("scheme", ["sqlite", "journal"])
def test_a_folder_is_no_file(scheme: str, tmp_path: Path) -> None:
    with unchanged(tmp_path):
        refused(f"{scheme}:///{tmp_path}", "is kept in a file; .* is a folder")
        refused(f"{scheme}:///{tmp_path}/missing/file", f"'{tmp_path}/missing' does not. Make it first")
    os.mkfifo(tmp_path / "pipe")
    refused(f"{scheme}:///{tmp_path}/pipe", "is kept in an ordinary file; .* is none")


@pytest.mark.parametrize("scheme", ["sqlite", "journal"])
def test_studies_are_looked_up_where_there_are_some(scheme: str, tmp_path: Path) -> None:
    with unchanged(tmp_path):
        message = refused(f"{scheme}:///{tmp_path}/missing", "holds none", must_exist=True)
    assert f"{scheme}:///{tmp_path}/missing" in message


def test_an_empty_file_has_no_studies(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with unchanged(tmp_path):
        refused(f"sqlite:///{tmp_path}/file", "holds none", must_exist=True)
    optuna.create_study(storage=open_storage(f"sqlite:///{tmp_path}/file"))


_AS_ANOTHER = """
import os, sys
import filelock, optuna.storages.journal, sqlalchemy.sql.default_comparator
from hyperopt_implicit.storages import open_storage
from hyperopt_implicit.errors import SearchError
open_storage("sqlite://")  # all that is needed is imported before this user can read it no more
if os.getuid() == 0:
    os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[1]))
for url in sys.argv[3:]:
    try:
        open_storage(url)
    except SearchError as error:
        print(error)
"""


def test_what_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    """As a user who is not root, who can write everywhere."""
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError:
        pytest.skip("there is no user nobody")
    urls = []
    for scheme in ("sqlite", "journal"):
        a_study(f"{scheme}:///{tmp_path}/{scheme}")
        urls += [f"{scheme}:///{tmp_path}/{scheme}", f"{scheme}:///{tmp_path}/new"]
    for each in (tmp_path, *tmp_path.parents):
        if each.stat().st_uid == os.getuid() and str(each).startswith("/tmp/"):
            each.chmod(0o555 if each == tmp_path else 0o755)
    for each in tmp_path.iterdir():
        each.chmod(0o444)
    try:
        with unchanged(tmp_path):
            command = [sys.executable, "-c", _AS_ANOTHER, str(nobody.pw_uid), str(nobody.pw_gid), *urls]
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    finally:
        tmp_path.chmod(0o755)
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    for kind, line in zip(["file", "folder"] * 2, lines, strict=True):
        assert f"needs a {kind} that can be read and written to; '{tmp_path}" in line


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"lr,width\n0.1,64\n", r"is a journal of Optuna's; '.*' is none, it begins with b'lr,width"),
        (b"hello", "is none, it begins with b'hello'"),
        (b'{"name": "config"}\n', "is none, it begins with"),
        (b"[1, 2]\n", "is none, it begins with"),
        (b"\x00\x01\x02\xff" * 100, "is none, it begins with"),
        (b"SQLite format 3\x00" * 10, "is none, it begins with"),
    ],
)
def test_a_file_that_is_no_journal_is_left_as_it_is(
    content: bytes, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_contents, "_TORN_SECONDS", 0.1)
    (tmp_path / "file").write_bytes(content)
    with unchanged(tmp_path):
        assert "Nothing was changed" in refused(f"journal:///{tmp_path}/file", match)


def test_a_damaged_journal_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_contents, "_TORN_SECONDS", 0.1)
    file = tmp_path / "file"
    a_study(f"journal:///{file}")
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    for damaged, match in [
        (b"".join([*lines[:2], b"\x00" * 50 + b"\n", *lines[2:]]), r"damaged: line 3 is b'\\x00"),
        (b"".join([*lines[:2], lines[2][:9], *lines[3:]]), "damaged: line 3"),
        (whole[:-1], f"ends in the middle of line {len(lines)}"),  # what comes next would stand in the same line
        (whole[:-5], f"ends in the middle of line {len(lines)}: .*Remove that line"),
    ]:
        file.write_bytes(damaged)
        with unchanged(tmp_path):
            refused(f"journal:///{file}", match)
    file.write_bytes(whole)
    assert open_storage(f"journal:///{file}").get_all_studies()


def test_a_line_that_is_being_written_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    a_study(f"journal:///{file}")
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    sleep = time.sleep

    def write_the_rest(seconds: float) -> None:
        file.write_bytes(whole)
        sleep(seconds)

    monkeypatch.setattr(storage_contents.time, "sleep", write_the_rest)
    assert open_storage(f"journal:///{file}").get_all_studies()


def test_a_journal_can_be_read_by_optuna_alone(tmp_path: Path) -> None:
    a_study(f"journal:///{tmp_path}/file", trials=2)
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "file"))
    assert len(optuna.load_study(study_name="before", storage=JournalStorage(backend)).trials) == 2
    lines = (tmp_path / "file").read_text().splitlines()
    assert all({"op_code", "worker_id"} <= json.loads(line).keys() for line in lines)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
