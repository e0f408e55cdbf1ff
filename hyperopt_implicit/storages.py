"""Where studies are kept: a file, a database server, or Optuna's proxy in front of one, each named by a URL.

The storages are Optuna's own. Opened here, they fail within seconds and say why, and never touch what belongs to
someone else; what is looked at for that is in ``storage_contents.py``.
"""

from __future__ import annotations

import re
import socket
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import finalize

from hyperopt_implicit.argument_checks import shown as given
from hyperopt_implicit.credentials import censored
from hyperopt_implicit.errors import SearchError
from hyperopt_implicit.messages import nearest
from hyperopt_implicit.optuna_warnings import accepting_experimental
from hyperopt_implicit.servers import alone, within, without_password
from hyperopt_implicit.storage_contents import (
    as_template,
    check_journal,
    check_place,
    check_sqlite,
    is_local,
    reason,
    studies_in,
)

if TYPE_CHECKING:
    from optuna.storages import BaseStorage, RDBStorage
    from sqlalchemy import URL

HEARTBEAT_SECONDS = 30
"""How often a worker says that a trial of its is alive, where the storage is a database."""

GRACE_SECONDS = 120
"""How long after its last sign of life the trial of a worker on another host is given up."""

SCHEMES = {
    "sqlite": "sqlite:///FILE",
    "journal": "journal:///FILE",
    "postgresql": "postgresql://USER@HOST/DATABASE",
    "mysql": "mysql://USER@HOST/DATABASE",
    "grpc": "grpc://HOST:PORT",
}
"""What a storage can be, and how its URL is written."""

_GRPC_PORT = 13000  # Optuna's
_LOCK_SECONDS = 60.0  # for which a database file may be busy
_CONNECT_SECONDS = 4  # so that three steps on the way take no ten seconds
_PORTS = {"postgresql": 5432, "mysql": 3306, "mariadb": 3306}
_DRIVERS = {"postgresql": ("psycopg", "psycopg2"), "mysql": ("MySQLdb", "pymysql"), "mariadb": ("MySQLdb", "pymysql")}
_ATTEMPTS = 10  # to make the tables of a database in which others are making them


def open_storage(storage: str | BaseStorage | None, *, must_exist: bool = False) -> BaseStorage:
    """The storage that a URL names, ready to be used.

    Args:
        storage: a URL, see :data:`SCHEMES`: ``sqlite:///`` and ``journal:///`` are followed by the path of a file,
            which begins with a further slash where it is absolute. None is memory; a storage of Optuna's is used as
            it is.
        must_exist: refuse a place without studies, rather than make one.

    Returns:
        Optuna's storage. Databases have heartbeats.

    Raises:
        SearchError: the URL says nothing that is known, the place cannot be reached or used, or it holds something
            else than studies; then nothing in it is changed.

    Example:
        >>> from hyperopt_implicit.storages import open_storage
        >>> type(open_storage(None)).__name__
        'InMemoryStorage'
        >>> open_storage("postgres://localhost/studies")
        Traceback (most recent call last):
        ...
        hyperopt_implicit.errors.SearchError: a storage must be one of sqlite:///FILE, journal:///FILE, \
postgresql://USER@HOST/DATABASE, mysql://USER@HOST/DATABASE, grpc://HOST:PORT; got 'postgres://localhost/studies'. \
Did you mean 'postgresql'?
    """
    from optuna.storages import BaseStorage, InMemoryStorage

    if storage is None:
        return InMemoryStorage()
    if not isinstance(storage, str):
        if not isinstance(storage, BaseStorage):
            raise SearchError(f"a storage must be a URL, an object of optuna.storages, or None; got {given(storage)}.")
        return storage
    scheme = storage.partition("://")[0]
    try:
        if scheme == "journal":
            return _open_journal(storage, must_exist)
        if scheme == "grpc":
            return _open_proxy(storage)
        return _open_database(storage, must_exist)
    except SearchError:
        raise
    except Exception as error:  # whatever a driver or a damaged file answers
        raise SearchError(
            f"the storage {shown(storage)!r} cannot be used: {reason(error, storage)}. Nothing was changed."
        ) from cause(error, storage)


def shown(storage: str | BaseStorage | None) -> str:
    """A storage as it can be printed: never with a password.

    Args:
        storage: as in :func:`open_storage`.

    Returns:
        The URL, or the kind of the storage where it has none.

    Example:
        >>> from hyperopt_implicit.storages import shown
        >>> shown("postgresql://anna:s3cret@db.example.org/studies")
        'postgresql://anna:***@db.example.org/studies'
        >>> shown(None)
        'memory'
    """
    if storage is None:
        return "memory"
    if not isinstance(storage, str):
        return shown(_url_of(storage)) if _url_of(storage) else type(storage).__name__
    return without_password(storage)


def without_secrets(error: BaseException, storage: str | BaseStorage | None) -> str:
    """An error of a storage in a line, as it can be printed and kept: without what opens the storage."""
    return reason(error, _url_of(storage))


def without_secrets_of(storage: str | BaseStorage | None, text: str) -> str:
    """A text that others have written, without what opens a storage."""
    url = _url_of(storage)
    return censored(text, url) if url else text


def cause(error: BaseException, storage: str | BaseStorage | None) -> BaseException | None:
    """An error of a storage, to be named as the cause of another; None where a traceback would show a secret."""
    url, each = _url_of(storage), error
    while url and each is not None:
        if censored(str(each), url) != str(each):
            return None
        each = each.__cause__ or each.__context__  # type: ignore[assignment]
    return error


def _url_of(storage: str | BaseStorage | None) -> str:
    if isinstance(storage, str):
        return storage
    url = getattr(getattr(storage, "_backend", storage), "url", None)  # Optuna caches what a database holds
    return url if isinstance(url, str) else ""


def is_storages(error: BaseException) -> bool:
    """Whether an error came from a storage that is locked, unreachable, or has lost a study."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import OperationalError

    lost = isinstance(error, KeyError) and "Record does not exist" in str(error)
    return lost or isinstance(error, StorageInternalError | OperationalError)


def _missing(storage: str) -> SearchError:
    return SearchError(f"studies are looked up where there are some; {shown(storage)!r} holds none. Name another.")


def _file_of(storage: str) -> Path:
    _, _, name = storage.partition(":///")
    if not name:
        scheme = storage.partition(":")[0]
        raise SearchError(
            f"a {scheme} storage is written {SCHEMES[scheme]}, with a fourth slash where the path is absolute; got "
            f"{shown(storage)!r}."
        )
    return Path(name).absolute()


# ------------------------------------------------------------------------------------------------------------- journal


def _open_journal(storage: str, must_exist: bool) -> BaseStorage:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    file = _file_of(storage)
    check_place(file, "a journal")
    if file.exists():
        check_journal(file)
    elif must_exist:
        raise _missing(storage)
    # this lock needs no symbolic links, which some network file systems lack
    return JournalStorage(JournalFileBackend(str(file), lock_obj=JournalFileOpenLock(str(file))))


# ----------------------------------------------------------------------------------------------------------- databases


def _open_database(storage: str, must_exist: bool) -> BaseStorage:
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    try:
        url = make_url(storage)
        kind = url.get_backend_name()
        url.get_dialect()
    except (ArgumentError, NoSuchModuleError, ValueError):
        scheme = storage.partition(":")[0].partition("+")[0]
        raise SearchError(
            f"a storage must be one of {', '.join(SCHEMES.values())}; got {shown(storage)!r}."
            f"{nearest(scheme, SCHEMES) if scheme not in SCHEMES else ''}"
        ) from None
    except ImportError:
        pass  # its driver, which is asked for below
    if "@" in (url.host or ""):  # half of the password, which is not to be told as a host that cannot be reached
        raise SearchError(
            f"a user name and a password in a URL are escaped where they hold any of @ : / ? # [ ] or a space; in "
            f"{shown(storage)!r} they are not. Write them as urllib.parse.quote(password, safe='') gives them."
        )
    if kind == "sqlite":
        return _open_sqlite(storage, url, must_exist)
    url = _with_driver(url)
    _knock(url, kind)
    connect_args = {} if "connect_timeout" in url.query else {"connect_timeout": _CONNECT_SECONDS}
    if kind not in _DRIVERS:
        connect_args = {}
    complete = studies_in(url, shown(storage), connect_args, _CONNECT_SECONDS + 1.0)
    if must_exist and not complete:
        raise _missing(storage)
    engine = {"pool_pre_ping": True, "connect_args": connect_args}
    for attempt in range(_ATTEMPTS):
        try:
            return _opened(url, engine, complete)
        except Exception:
            if complete or attempt == _ATTEMPTS - 1:
                raise
            time.sleep(0.2)  # others are making the same tables
    raise AssertionError("unreachable")


def _opened(url: URL, engine: dict[str, Any], complete: bool) -> RDBStorage:
    """Optuna's storage. It makes what is missing in a database that is not complete; one that is was checked."""
    from optuna.storages import RDBStorage

    text = url.render_as_string(hide_password=False)
    with accepting_experimental():  # heartbeats
        kept = RDBStorage(
            as_template(text),
            engine_kwargs=engine,
            heartbeat_interval=HEARTBEAT_SECONDS,
            grace_period=GRACE_SECONDS,
            skip_table_creation=complete,
            skip_compatibility_check=complete,
        )
    finalize(kept, kept.engine.dispose)
    return kept


def _with_driver(url: URL) -> URL:
    """A URL that names a driver which is installed.

    Raises:
        SearchError: none is; it says what to install.
    """
    kind = url.get_backend_name()
    if "+" not in url.drivername and kind in _DRIVERS:
        driver = next((each for each in _DRIVERS[kind] if find_spec(each)), _DRIVERS[kind][-1])
        url = url.set(drivername=f"{kind}+{driver.lower()}")
    try:
        url.get_dialect().import_dbapi()
    except ImportError as error:
        todo = "hyperopt-implicit[postgres]" if kind == "postgresql" else "pymysql" if kind in _DRIVERS else "one"
        raise SearchError(
            f"a {kind} storage needs a driver, and there is no {url.get_driver_name()} ({reason(error)}). Install "
            f"{todo if todo == 'one' else f'it with `pip install {todo!r}`'}."
        ) from error
    return url


def _knock(url: URL, kind: str) -> None:
    """Find out within seconds that nobody listens."""
    if url.host and not url.host.startswith("/") and "," not in url.host:
        port = url.port or _PORTS.get(kind)
        if port is not None:
            _connect(url.host, port)


def _connect(host: str, port: int) -> None:
    def attempt() -> None:
        socket.create_connection((host, port), _CONNECT_SECONDS).close()

    try:
        within(_CONNECT_SECONDS + 0.5, attempt)  # looking up a name has no time limit of its own
    except OSError as error:
        raise ConnectionError(f"nobody answers on {host}:{port} ({reason(error)})") from error


def _open_sqlite(storage: str, url: URL, must_exist: bool) -> BaseStorage:
    from sqlalchemy import event

    if url.database in (None, "", ":memory:") or url.database.startswith("file:"):
        return _opened(url, {}, complete=False)
    file = Path(url.database).absolute()
    check_place(file, "an sqlite storage")
    engine = {"connect_args": {"timeout": _LOCK_SECONDS}}
    if not (file.exists() and check_sqlite(file)):
        if must_exist:
            raise _missing(storage)
        with alone(str(file), _LOCK_SECONDS):  # two that make the tables at once are in each other's way
            _opened(url, engine, file.exists() and check_sqlite(file)).engine.dispose()
    kept = _opened(url, engine, complete=True)
    local = is_local(file)

    def set_up(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # transactions begin below
        if local:  # elsewhere two hosts would not see each other's log
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")

    event.listen(kept.engine, "connect", set_up)
    # SQLite locks at the first write, so that two workers could read that a trial is free and both take it
    event.listen(kept.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    kept.engine.dispose()  # connections that were opened before
    return kept


# --------------------------------------------------------------------------------------------------------------- proxy


def _open_proxy(storage: str) -> BaseStorage:
    if not (find_spec("grpc") and find_spec("google.protobuf")):
        raise SearchError("a grpc storage needs grpcio: `pip install 'hyperopt-implicit[grpc]'`.")
    from optuna.storages import GrpcStorageProxy

    found = re.fullmatch(r"grpc://(\[[^]]+\]|[^:/@]+)(?::(\d+))?/?", storage)
    if found is None:
        raise SearchError(f"a grpc storage is written {SCHEMES['grpc']}; got {shown(storage)!r}.")
    host, port = found[1], int(found[2] or _GRPC_PORT)
    _connect(host.strip("[]"), port)
    with accepting_experimental():
        proxy = GrpcStorageProxy(host=host, port=port)
    proxy.wait_server_ready(timeout=_CONNECT_SECONDS)
    with suppress(KeyError):  # which is what a server of Optuna's answers
        within(_CONNECT_SECONDS, lambda: proxy.get_study_id_from_name("hyperopt_implicit: are you there?"))
    return proxy
