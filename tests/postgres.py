"""A PostgreSQL server of the tests' own: in a temporary folder, on the loopback device, gone with the process."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

USER = "searcher"
PASSWORD = "tea & p@ncakes/%?"  # what has to be escaped in a URL
_ATTEMPTS = 3  # somebody else may take the port in between
_SECONDS = 60.0

# The server ends when this script's standard input does: with the process that has started it, however that ends.
_WATCHED = """
folder=$1; shift
("$@" < /dev/null > "$folder/log" 2>&1; : > "$folder/ended") &
cat > /dev/null
kill -QUIT "$(head -n 1 "$folder/data/postmaster.pid")" 2> /dev/null
wait
rm -rf "$folder"
"""


@dataclass(frozen=True)
class Postgres:
    """A server that runs."""

    port: int
    folder: Path

    def url(self, database: str = "postgres", password: str = PASSWORD) -> str:
        """The URL of a database, with the password in it."""
        return f"postgresql://{USER}:{quote(password, safe='')}@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """The URL of a database without tables."""
        name = f"test_{uuid.uuid4().hex}"
        self.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def execute(self, statement: str, url: str | None = None) -> list[tuple[Any, ...]]:
        """Run a statement, and give its rows."""
        import psycopg

        with psycopg.connect(url or self.url(), autocommit=True, connect_timeout=5) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []


@contextmanager
def running() -> Iterator[Postgres]:
    """A server, inside; the test is skipped where PostgreSQL is not installed."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'hyperopt-implicit[postgres]'")
    programs = _programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed: there is no initdb beside a postgres; apt-get install postgresql")
    user = _user()
    if user is None:
        pytest.skip("PostgreSQL does not run as root, and there is neither a user postgres nor nobody")
    for attempt in range(_ATTEMPTS):
        # not in pytest's own folder, which other users cannot enter; and sockets need a short path
        folder = Path(tempfile.mkdtemp(prefix="pg-"))
        if user:
            shutil.chown(folder, user["user"], user["group"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        password = folder / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        start = ["-D", folder / "data", "-U", USER, "-E", "UTF8", "--locale=C", "--no-sync", "-A", "scram-sha-256"]
        subprocess.run(
            [programs / "initdb", *start, f"--pwfile={password}"], check=True, capture_output=True, cwd="/", **user
        )
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": port,
            "unix_socket_directories": folder,
            "fsync": "off",
            "shared_buffers": "16MB",
        }
        given = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        server = [programs / "postgres", "-D", folder / "data", *given]
        process = subprocess.Popen(
            ["sh", "-c", _WATCHED, "sh", folder, *server],
            stdin=subprocess.PIPE,
            cwd="/",
            start_new_session=True,
            **user,
        )
        try:
            found = Postgres(port, folder)
            if _answers(found):
                yield found
                return
            log = (folder / "log").read_text()
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(_SECONDS)
        assert attempt < _ATTEMPTS - 1, f"the server does not start:\n{log}"


def _answers(server: Postgres) -> bool:
    import psycopg

    until = time.monotonic() + _SECONDS
    while time.monotonic() < until and not (server.folder / "ended").exists():
        try:
            server.execute("SELECT 1")
        except psycopg.OperationalError:
            time.sleep(0.1)
        else:
            return True
    return False


def _programs() -> Path | None:
    """The folder with the server's programs; Debian has them outside of the PATH."""
    on_path = [Path(each) for each in os.environ.get("PATH", "").split(os.pathsep)]
    for folder in [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True), *on_path]:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    return None


def _user() -> dict[str, Any] | None:
    """As whom the server is run, in the words of :mod:`subprocess`; None where there is nobody."""
    if os.getuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            found = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": found.pw_uid, "group": found.pw_gid, "extra_groups": []}
    return None
