"""Servers that hold studies: those that do not answer, and Optuna's proxy."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import optuna
import pytest
from optuna.storages import GrpcStorageProxy

from hyperopt_implicit import storages
from hyperopt_implicit.optuna_warnings import accepting_experimental
from hyperopt_implicit.storages import open_storage, shown

from .storage_checks import refused
from .study_workers import assert_shared, at_once, start


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
