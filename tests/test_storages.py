"""Storages: each kind is opened by its URL, and shown without its password."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import optuna
import pytest
from optuna.storages import InMemoryStorage, JournalStorage, RDBStorage

from hyperopt_implicit import storage_contents, storages
from hyperopt_implicit.storage_contents import is_local
from hyperopt_implicit.storages import open_storage, shown

from .storage_checks import refused
from .study_workers import assert_shared, at_once


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
