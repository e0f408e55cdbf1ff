"""A study in PostgreSQL, on a server that runs: what only a real one can show."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from hyperopt_implicit.errors import SearchError
from hyperopt_implicit.heartbeats import Heartbeat
from hyperopt_implicit.places import counted
from hyperopt_implicit.storages import open_storage, shown
from hyperopt_implicit.workers import claim

from .postgres import PASSWORD, USER, Postgres
from .study_workers import assert_shared, at_once

KNOBS = {"lr": FloatDistribution(0.1, 1.0)}


@pytest.fixture
def url(postgres: Postgres) -> str:
    return postgres.new_database()


def content(postgres: Postgres, url: str) -> dict[str, list[tuple[Any, ...]]]:
    """Every table of a database, with its rows."""
    names = postgres.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1", url)
    return {name: postgres.execute(f'SELECT * FROM "{name}" ORDER BY 1', url) for (name,) in names}


def refused(url: str, match: str, *, must_exist: bool = False) -> None:
    begun = time.monotonic()
    with pytest.raises(SearchError, match=match) as caught:
        open_storage(url, must_exist=must_exist)
    assert time.monotonic() - begun < 10
    assert PASSWORD not in str(caught.value) and "tea%20" not in str(caught.value)


def test_studies_are_kept(url: str) -> None:
    storage = open_storage(url)
    assert isinstance(storage, RDBStorage)
    assert storage.get_heartbeat_interval() is not None
    optuna.create_study(storage=storage, study_name="one")
    assert [each.study_name for each in open_storage(url, must_exist=True).get_all_studies()] == ["one"]
    assert shown(storage) == shown(url).replace("postgresql:", "postgresql+psycopg:")
    assert "***" in shown(storage)


def test_workers_that_make_the_tables_at_once(url: str, tmp_path: Path) -> None:
    ran = at_once(url, 9, tmp_path, workers=3)
    assert_shared(open_storage(url), ran, 9)


def test_a_socket_file_is_a_host(postgres: Postgres, url: str) -> None:
    database = url.rpartition("/")[2]
    password = url.partition("@")[0].rpartition(":")[2]
    storage = open_storage(f"postgresql://{USER}:{password}@/{database}?host={postgres.folder}&port={postgres.port}")
    assert storage.get_all_studies() == []


def test_a_password_can_be_in_a_file(
    postgres: Postgres, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = url.rpartition("/")[2]
    bare = f"postgresql://{USER}@127.0.0.1:{postgres.port}/{database}"
    refused(bare, "cannot be used: .*password")
    file = tmp_path / "pgpass"
    file.write_text(f"127.0.0.1:{postgres.port}:*:{USER}:{PASSWORD}\n")
    file.chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(file))
    assert open_storage(bare).get_all_studies() == []


def test_a_wrong_password(postgres: Postgres) -> None:
    url = postgres.url(password="wr0ng@/")
    begun = time.monotonic()
    with pytest.raises(SearchError, match="password authentication failed") as caught:
        open_storage(url)
    assert time.monotonic() - begun < 10
    assert "wr0ng" not in str(caught.value)
    assert f"postgresql://{USER}:***@127.0.0.1:{postgres.port}/postgres" in str(caught.value)


def test_a_database_that_is_not_there(postgres: Postgres) -> None:
    refused(postgres.url("nothing"), 'database "nothing" does not exist')


def test_a_database_without_studies_is_looked_at_only(postgres: Postgres, url: str) -> None:
    refused(url, "holds none", must_exist=True)
    assert content(postgres, url) == {}


def test_a_database_of_somebody_else_s_is_left_as_it_is(postgres: Postgres, url: str) -> None:
    postgres.execute("CREATE TABLE invoices (number integer)", url)
    postgres.execute("INSERT INTO invoices VALUES (1)", url)
    refused(url, "has the table invoices, and no studies")
    refused(url, "has the table invoices, and no studies", must_exist=True)
    assert content(postgres, url) == {"invoices": [(1,)]}


def test_tables_of_others_beside_the_studies(postgres: Postgres, url: str) -> None:
    open_storage(url)
    postgres.execute("CREATE TABLE invoices (number integer)", url)
    assert open_storage(url).get_all_studies() == []


@pytest.mark.parametrize(
    ("version", "todo"), [("v2.6.0.a", "optuna storage upgrade"), ("v99.0.0.a", "updating optuna to the latest")]
)
def test_studies_of_another_version_are_left_as_they_are(postgres: Postgres, url: str, version: str, todo: str) -> None:
    open_storage(url)
    postgres.execute(f"UPDATE alembic_version SET version_num = '{version}'", url)
    postgres.execute("DROP TABLE trial_heartbeats", url)
    before = content(postgres, url)
    refused(url, todo)
    assert content(postgres, url) == before


def test_a_search_survives_that_the_server_drops_its_connections(postgres: Postgres, url: str) -> None:
    study = optuna.create_study(storage=open_storage(url), sampler=optuna.samplers.RandomSampler())
    database = url.rpartition("/")[2]
    for _ in range(3):
        trial = claim(study, KNOBS, 3)
        assert trial is not None
        with Heartbeat(study, trial):
            postgres.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}'")
            study.tell(trial, 1.0)
    assert counted(study) == 3
    assert [each.state for each in study.trials] == [TrialState.COMPLETE] * 3


def test_no_connection_stays_open(postgres: Postgres, url: str) -> None:
    study = optuna.create_study(storage=open_storage(url))
    del study
    database = url.rpartition("/")[2]
    count = f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{database}'"
    until = time.monotonic() + 30
    while postgres.execute(count) != [(0,)] and time.monotonic() < until:
        time.sleep(0.05)
    assert postgres.execute(count) == [(0,)]
