"""Storages: each kind is opened by its URL, and what is not one is refused within seconds and left as it was."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import optuna
import pytest
from optuna.storages import GrpcStorageProxy, InMemoryStorage, JournalStorage, RDBStorage
from optuna.trial import create_trial

from hyperopt_implicit import storage_contents, storages
from hyperopt_implicit.errors import SearchError
from hyperopt_implicit.optuna_warnings import accepting_experimental
from hyperopt_implicit.storage_contents import is_local
from hyperopt_implicit.storages import open_storage, shown

from .study_workers import assert_shared, at_once, start


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Every file of a folder has the same content afterwards, and there are no others."""

    def content() -> dict[str, bytes | None]:
        return {
            str(each.relative_to(folder)): each.read_bytes() if each.is_file() else None
            for each in sorted(folder.rglob("*"))
        }

    before = content()
    yield
    assert content() == before


def a_study(url: str, trials: int = 3) -> None:
    """Make a storage, with a study."""
    study = optuna.create_study(storage=open_storage(url), study_name="before")
    for number in range(trials):
        study.add_trial(create_trial(value=float(number)))


# ------------------------------------------------------------------------------------------------------------ opening


def test_none_is_memory() -> None:
    assert isinstance(open_storage(None), InMemoryStorage)


def test_a_storage_of_optuna_s_is_used_as_it_is() -> None:
    storage = InMemoryStorage()
    assert open_storage(storage) is storage


@pytest.mark.parametrize(("scheme", "kind"), [("sqlite", RDBStorage), ("journal", JournalStorage)])
def test_a_file_keeps_studies(scheme: str, kind: type, tmp_path: Path) -> None:
    url = f"{scheme}:///{tmp_path / 'a {b} %20?'.partition('?')[0]}"
    for number in range(2):
        storage = open_storage(url)
        assert isinstance(storage, kind)
        optuna.create_study(storage=storage, study_name=f"study {number}")
    names = {each.study_name for each in open_storage(url, must_exist=True).get_all_studies()}
    assert names == {"study 0", "study 1"}


@pytest.mark.parametrize("scheme", ["sqlite", "journal"])
def test_a_file_is_found_again_from_another_folder(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    storage = open_storage(f"{scheme}:///studies")
    monkeypatch.chdir("/")
    optuna.create_study(storage=storage, study_name="one")
    assert open_storage(f"{scheme}:///{tmp_path}/studies").get_all_studies()[0].study_name == "one"
    assert not Path("/studies").exists()


def test_sqlite_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for url in ("sqlite://", "sqlite:///:memory:"):
        optuna.create_study(storage=open_storage(url), study_name="one")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scheme", ["sqlite", "journal"])
def test_two_processes_that_make_a_file_at_once(scheme: str, tmp_path: Path) -> None:
    url = f"{scheme}:///{tmp_path / 'studies'}"
    ran = at_once(url, 6, tmp_path, workers=3)
    assert_shared(open_storage(url), ran, 6)


def test_a_database_that_another_process_has_not_finished_is_finished(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    open_storage(url)
    for unfinished in ("DELETE FROM alembic_version", "DELETE FROM version_info", "DROP TABLE trial_heartbeats"):
        with sqlite3.connect(tmp_path / "studies.db") as connection:
            connection.execute("DELETE FROM version_info")
            connection.execute("DELETE FROM alembic_version")
            connection.execute(unfinished)
        connection.close()
        optuna.create_study(storage=open_storage(url))


def test_readers_and_a_writer_work_at_once_on_a_local_disk(tmp_path: Path) -> None:
    assert is_local(tmp_path / "studies.db")
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    optuna.create_study(storage=open_storage(url))
    with sqlite3.connect(tmp_path / "studies.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


def test_a_network_file_system_has_no_write_ahead_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storages, "is_local", lambda file: False)
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    optuna.create_study(storage=open_storage(url))
    with sqlite3.connect(tmp_path / "studies.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    connection.close()


def test_which_file_system_a_file_is_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "a / ext4 rw 0 0\nb /data nfs4 rw 0 0\nc /data/my\\040disk xfs rw 0 0\nd /scratch lustre rw 0 0\n"
    )
    real = Path
    monkeypatch.setattr(storage_contents, "Path", lambda path: mounts if path == "/proc/self/mounts" else real(path))
    for name, local in [
        ("/home/x.db", True),
        ("/database/x.db", True),
        ("/data/x.db", False),
        ("/data/my disk/x.db", True),
        ("/scratch/deep/x.db", False),
    ]:
        assert is_local(real(name)) is local, name
    mounts.unlink()
    assert not is_local(real("/home/x.db"))


def test_a_transaction_holds_from_its_first_read_on(tmp_path: Path) -> None:
    """What SQLite does not do by itself: another writer would get in between reading and writing."""
    storage = open_storage(f"sqlite:///{tmp_path / 'studies.db'}")
    assert isinstance(storage, RDBStorage)
    with storage.engine.connect() as connection:
        connection.exec_driver_sql("SELECT * FROM studies").fetchall()
        other = sqlite3.connect(tmp_path / "studies.db", timeout=0)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("DELETE FROM studies")
        other.close()


# ---------------------------------------------------------------------------------------------------- what is refused


def refused(url: str, match: str, *, must_exist: bool = False) -> str:
    with pytest.raises(SearchError, match=match) as caught:
        open_storage(url, must_exist=must_exist)
    return str(caught.value)


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("redis://localhost", r"must be one of sqlite:///FILE, journal:///FILE, .*; got 'redis://localhost'"),
        ("studies.db", "must be one of sqlite:///FILE"),
        ("", "must be one of sqlite:///FILE"),
        ("postgre://a:b@localhost/x", r"got 'postgre://a:\*\*\*@localhost/x'\. Did you mean 'postgresql'\?"),
        ("sqllite:///x.db", "Did you mean 'sqlite'"),
        ("postgresql://localhost:port/x", "must be one of"),
        ("journal:x", "must be one of"),
        ("journal://x", "a journal storage is written journal:///FILE"),
        ("journal:///", "a journal storage is written journal:///FILE"),
        ("grpc://", "a grpc storage is written grpc://HOST:PORT"),
        ("grpc://localhost:port", "a grpc storage is written grpc://HOST:PORT"),
        ("grpc://localhost:1/path", "a grpc storage is written grpc://HOST:PORT"),
    ],
)
def test_urls_that_say_nothing(url: str, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(url, match)
    assert list(tmp_path.iterdir()) == []


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
    a_study(f"sqlite:///{file}")
    whole = bytearray(file.read_bytes())
    assert len(whole) > 40 * 1024
    whole[-20 * 1024 :] = b"\xa5" * (20 * 1024)
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


# ------------------------------------------------------------------------------------------------------------ journals


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


# ------------------------------------------------------------------------------------------------- who does not answer


@contextmanager
def black_hole(full: bool) -> Iterator[int]:
    """A port that takes a connection and stays silent; or, when it is full, does not even do that."""
    with socket.socket() as server, ExitStack() as opened:
        server.bind(("127.0.0.1", 0))
        server.listen(0 if full else 20)
        port: int = server.getsockname()[1]
        while full:
            client = opened.enter_context(socket.socket())
            client.settimeout(0.2)
            try:
                client.connect(("127.0.0.1", port))
            except TimeoutError:
                break
        yield port


SERVERS = ["postgresql://anna:s3cret@{}/studies", "grpc://{}"]


def within_ten_seconds(url: str, match: str) -> None:
    begun = time.monotonic()
    message = refused(url, match)
    assert time.monotonic() - begun < 10
    assert "s3cret" not in message
    assert shown(url) in message


@pytest.mark.parametrize("url", SERVERS)
def test_nobody_listens(url: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        within_ten_seconds(url.format(f"127.0.0.1:{unused.getsockname()[1]}"), "nobody answers on 127.0.0.1")


@pytest.mark.parametrize("url", SERVERS)
def test_there_is_no_such_host(url: str) -> None:
    within_ten_seconds(url.format("nowhere.invalid:1234"), "nobody answers on nowhere.invalid:1234")


@pytest.mark.parametrize("full", [False, True], ids=["silent", "full"])
@pytest.mark.parametrize("url", SERVERS)
def test_a_black_hole(url: str, full: bool) -> None:
    with black_hole(full) as port:
        within_ten_seconds(url.format(f"127.0.0.1:{port}"), "cannot be used")


def test_a_name_that_takes_for_ever_to_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storages, "_CONNECT_SECONDS", 0.2)
    monkeypatch.setattr(socket, "create_connection", lambda *args: time.sleep(20))
    within_ten_seconds("postgresql://anna:s3cret@db/studies", "nobody answers on db:5432 .*no answer within")


@pytest.mark.parametrize(
    ("url", "missing", "todo"),
    [
        ("postgresql://localhost/x", ("psycopg", "psycopg2"), "hyperopt-implicit\\[postgres\\]"),
        ("postgresql+asyncpg://localhost/x", (), "hyperopt-implicit\\[postgres\\]"),
        ("mysql://localhost/x", ("MySQLdb", "pymysql"), "pymysql"),
        ("oracle://localhost/x", (), "Install one"),
        ("grpc://localhost:1", ("grpc",), "hyperopt-implicit\\[grpc\\]"),
    ],
)
def test_a_driver_that_is_not_installed(
    url: str, missing: tuple[str, ...], todo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(storages, "find_spec", lambda name: None if name in missing else object())
    refused(url, todo)


# ------------------------------------------------------------------------------------------------------ what is shown


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://anna:s3cret@db:5432/x", "postgresql://anna:***@db:5432/x"),
        (
            "postgresql+psycopg2://anna:s3cret@db/x?sslmode=require",
            "postgresql+psycopg2://anna:***@db/x?sslmode=require",
        ),
        ("postgresql://anna:s3:cr@et/@db/x", "postgresql://anna:***@db/x"),
        ("postgresql://:s3cret@db/x", "postgresql://:***@db/x"),
        ("postgresql://db/x?user=anna&password=s3cret&a=b", "postgresql://db/x?user=anna&password=***&a=b"),
        ("postgresql://anna@db/x", "postgresql://anna@db/x"),
        ("mysql://anna:s3cret@db", "mysql://anna:***@db"),
        ("postgre://anna:s3cret@db", "postgre://anna:***@db"),
        ("grpc://db:13000", "grpc://db:13000"),
        ("sqlite:///a:b@c.db", "sqlite:///a:b@c.db"),
        ("journal:////tmp/x.log", "journal:////tmp/x.log"),
        (None, "memory"),
    ],
)
def test_a_password_is_never_shown(url: str | None, expected: str) -> None:
    assert shown(url) == expected
    assert "s3cret" not in shown(url)


def test_storages_of_optuna_s_are_shown(tmp_path: Path) -> None:
    database = open_storage(f"sqlite:///{tmp_path}/x.db")
    assert shown(database) == f"sqlite:///{tmp_path}/x.db"
    assert shown(optuna.create_study(storage=database)._storage) == f"sqlite:///{tmp_path}/x.db"
    assert shown(InMemoryStorage()) == "InMemoryStorage"
    assert shown(open_storage(f"journal:///{tmp_path}/x")) == "JournalStorage"


# --------------------------------------------------------------------------------------------------------------- proxy

_PROXY = """
import sys
from hyperopt_implicit.storages import open_storage
from optuna.storages import get_storage, run_grpc_proxy_server
run_grpc_proxy_server(get_storage(open_storage(sys.argv[1])), host="127.0.0.1", port=int(sys.argv[2]))
"""


@contextmanager
def proxy(url: str) -> Iterator[str]:
    """A gRPC proxy in front of a storage, as a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-c", _PROXY, url, str(port)], stderr=subprocess.DEVNULL)
    try:
        with accepting_experimental():
            client = GrpcStorageProxy(host="127.0.0.1", port=port)
        client.wait_server_ready(timeout=60)
        client.close()
        yield f"grpc://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def test_two_workers_share_a_study_through_a_proxy(tmp_path: Path) -> None:
    with proxy(f"sqlite:///{tmp_path}/studies.db") as url:
        storage = open_storage(url)
        ran = at_once(url, 20, tmp_path)
        assert_shared(storage, ran, 20)
        storage.close()  # type: ignore[attr-defined]
    assert_shared(open_storage(f"sqlite:///{tmp_path}/studies.db"), ran, 20)
    assert min(map(len, ran)) > 0


def test_a_killed_worker_s_trial_is_repeated_through_a_proxy(tmp_path: Path) -> None:
    go = tmp_path / "go"
    go.touch()
    with proxy(f"sqlite:///{tmp_path}/studies.db") as url:
        first = start("hang", url, 5, go)
        assert first.stdout is not None
        assert int(first.stdout.readline()) == 0
        first.kill()
        first.communicate()
        (ran,) = at_once(url, 5, tmp_path, workers=1)
    assert ran == [1, 2, 3, 4, 5]
    study = optuna.load_study(storage=open_storage(f"sqlite:///{tmp_path}/studies.db"), study_name="shared")
    assert study.trials[0].user_attrs["failure"] == "its worker was killed"
    assert study.trials[1].params == study.trials[0].params


def test_a_server_of_somebody_else_s_is_no_proxy() -> None:
    from concurrent.futures import ThreadPoolExecutor

    import grpc

    server = grpc.server(ThreadPoolExecutor(max_workers=1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        within_ten_seconds(f"grpc://127.0.0.1:{port}", "cannot be used")
    finally:
        server.stop(None)
