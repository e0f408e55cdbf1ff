"""What is in a file or a database that is to hold studies: looked at before anything is written to it.

A place that holds something else than studies, or studies that cannot be read, is refused and left as it is. How a
storage is opened after that is in ``storages.py``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperopt_implicit.credentials import censored
from hyperopt_implicit.errors import SearchError
from hyperopt_implicit.messages import first_line
from hyperopt_implicit.servers import within

if TYPE_CHECKING:
    from sqlalchemy import URL

_SQLITE_HEADER = b"SQLite format 3\x00"
_WRITE_AHEAD = b"\x02\x02"  # bytes 18 and 19
_CHECKED_BYTES = 2**26  # of a database that is read from end to end; a second or so
_BUSY_SECONDS = 10.0
_OPTUNAS = {"studies", "trials", "version_info"}  # tables that every version of Optuna has made
_REVISIONS = "alembic_version"  # that other programs use as well
_LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "overlay", "tmpfs"}
_TORN_SECONDS = 1.0  # for another process to end the line that it is writing

# -------------------------------------------------------------------------------------------------------------- files


def check_place(file: Path, what: str) -> None:
    """Refuse a path at which no file can be kept.

    Raises:
        SearchError: it is a folder, its folder is missing, or one of the two cannot be written to.
    """
    if file.is_dir():
        raise SearchError(f"{what} is kept in a file; {str(file)!r} is a folder. Name a file in it.")
    if not file.parent.is_dir():
        raise SearchError(f"{what} is kept in a folder that exists; {str(file.parent)!r} does not. Make it first.")
    if file.exists() and not file.is_file():
        raise SearchError(f"{what} is kept in an ordinary file; {str(file)!r} is none. Name another.")
    for place in (file, file.parent):
        if place.exists() and not os.access(place, os.R_OK | os.W_OK):
            kind = "folder" if place.is_dir() else "file"
            raise SearchError(
                f"{what} needs a {kind} that can be read and written to; {str(place)!r} cannot. Change its "
                "permissions, or choose another."
            )


def is_local(file: Path) -> bool:
    """Whether a file is known to be on a file system of this host alone."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return False
    folders = {str(each) for each in file.resolve().parents}
    around = [(place, kind) for place, kind in mounts if place.replace("\\040", " ") in folders]
    return bool(around) and max(around, key=lambda each: len(each[0]))[1] in _LOCAL


def check_sqlite(file: Path) -> bool:
    """Whether an SQLite file has studies; nothing is written, neither to it nor beside it.

    Raises:
        SearchError: it is no database, or one of somebody else's.
        Exception: what the driver raises where it is damaged.
    """
    from sqlalchemy.exc import OperationalError

    with file.open("rb") as opened:
        start = opened.read(20)
    if start and not start.startswith(_SQLITE_HEADER):
        raise SearchError(
            f"a sqlite storage is an SQLite database; {str(file)!r} is none, it begins with {start[:16]!r}. Name "
            "another file; nothing was changed."
        )
    # a write-ahead log that is not there would be made by whoever looks; where there is none, nobody writes
    untouched = start[18:] == _WRITE_AHEAD and not Path(f"{file}-wal").exists()
    try:
        return _sqlite_has_studies(file, file, "mode=ro&immutable=1" if untouched else "mode=ro")
    except OperationalError:
        left = Path(f"{file}-journal")
        if not left.exists():
            raise
        # a process was killed in the middle of a change, which only a writer can undo
        with tempfile.TemporaryDirectory() as folder:
            for each in (file, left):
                shutil.copyfile(each, Path(folder, each.name))
            return _sqlite_has_studies(file, Path(folder, file.name), "mode=rw")


def _sqlite_has_studies(file: Path, looked_at: Path, mode: str) -> bool:
    escaped = str(looked_at).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    check = "PRAGMA quick_check(1)" if file.stat().st_size < _CHECKED_BYTES else None
    url = f"sqlite:///file:{escaped}?{mode}&uri=true"
    return studies_in(url, str(file), {"timeout": _BUSY_SECONDS}, 2 * _BUSY_SECONDS, check)


def check_journal(file: Path) -> None:
    """Refuse a file that is no journal of Optuna's, or one that is damaged.

    Raises:
        SearchError: what is not as it should be, and in which line.
    """
    until = time.monotonic() + _TORN_SECONDS
    while (problem := _fault_of_journal(file)) is not None:
        text, whole = problem
        if whole or time.monotonic() >= until:
            raise SearchError(f"{text} Nothing was changed.")
        time.sleep(0.05)


def _fault_of_journal(file: Path) -> tuple[str, bool] | None:
    """What is wrong with a journal, and whether that is more than a last line which is still being written."""
    with file.open("rb") as opened:
        for number, line in enumerate(opened, 1):
            whole = line.endswith(b"\n")
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict) and {"op_code", "worker_id"} <= record.keys() and whole:
                continue
            if number == 1:
                return (
                    f"a journal storage is a journal of Optuna's; {str(file)!r} is none, it begins with "
                    f"{line[:40]!r}. Name another file.",
                    whole,
                )
            if not whole:
                return (
                    f"the journal {str(file)!r} ends in the middle of line {number}: a process or the disk was "
                    "stopped while it was written. Remove that line to go on without it.",
                    False,
                )
            return f"the journal {str(file)!r} is damaged: line {number} is {line[:40]!r}. Restore a copy.", True
    return None


# ---------------------------------------------------------------------------------------------------------- databases


def studies_in(
    url: str | URL, name: str, connect_args: dict[str, Any], seconds: float, check: str | None = None
) -> bool:
    """Whether a database has Optuna's tables, of whatever version; False where it has none, or not yet all.

    Args:
        url: of the database.
        name: what messages call it.
        connect_args: for its driver.
        seconds: in which it has to answer.
        check: a statement that answers ``ok``.

    Raises:
        SearchError: it has tables that are not Optuna's, or of a version that wrote down less than what is needed to
            bring them up to date.
        Exception: what the driver raises where the database cannot be reached or read.
    """
    tables, made_by, revision = within(seconds, lambda: _look(url, connect_args, check))
    text = url if isinstance(url, str) else url.render_as_string(hide_password=False)
    if _OPTUNAS - tables:
        if tables <= _all_of_optunas():
            return False  # none, or another process is making them
        raise SearchError(
            f"a storage is a database of Optuna's, or an empty one; {name!r} has {_some(tables)}, and no studies. "
            "Give the search a database of its own; nothing was changed."
        )
    if revision is not None and made_by is not None:
        try:
            within(seconds, lambda: _check_version(text, connect_args))
        except RuntimeError as error:
            raise SearchError(f"{name!r} cannot be used: {error} Nothing was changed.") from error
        return True
    if made_by in (None, _version()):
        return False  # another process is making them
    raise SearchError(
        f"the studies in {name!r} were made by Optuna {made_by}, and {_version()} cannot read them. Make a copy, then "
        "bring them up to date with `optuna storage upgrade --storage URL`; nothing was changed."
    )


def _look(url: str | URL, connect_args: dict[str, Any], check: str | None) -> tuple[set[str], str | None, str | None]:
    """The tables of a database, the version of Optuna that has made it, and the revision of its tables."""
    from sqlalchemy import create_engine, inspect, text
    from sqlalchemy.exc import DatabaseError
    from sqlalchemy.pool import NullPool

    engine = create_engine(url, poolclass=NullPool, connect_args=connect_args)
    with engine.connect() as connection:
        fault = "ok" if check is None else connection.execute(text(check)).scalar()
        if fault != "ok":
            raise DatabaseError(check, None, ValueError(f"the database is damaged: {fault}"))
        tables = set(inspect(connection).get_table_names())
        made_by = revision = None
        if tables >= _OPTUNAS:
            made_by = connection.execute(text("SELECT library_version FROM version_info")).scalar()
            if _REVISIONS in tables:
                revision = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return tables, made_by, revision


def _check_version(url: str, connect_args: dict[str, Any]) -> None:
    from optuna.storages import RDBStorage
    from sqlalchemy.pool import NullPool

    # nothing is made, and no connection stays open
    engine = {"poolclass": NullPool, "connect_args": connect_args}
    RDBStorage(as_template(url), engine_kwargs=engine, skip_table_creation=True)


def as_template(url: str) -> str:
    """A URL for Optuna, which takes braces for fields that it fills in."""
    return re.sub(r"[{}]", r"\g<0>\g<0>", url)


def _all_of_optunas() -> set[str]:
    from optuna.storages._rdb.models import BaseModel

    return {*BaseModel.metadata.tables, _REVISIONS}


def _version() -> str:
    import optuna

    return str(optuna.__version__)


def _some(tables: Iterable[str]) -> str:
    names = sorted(tables)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"the table{'s' if len(names) > 1 else ''} {', '.join(names[:5])}{more}"


def reason(error: BaseException, uri: str = "") -> str:
    """An error in a line, without the class and the link that SQLAlchemy puts around it, and the secrets of a URI."""
    inner = getattr(error, "orig", None) or error
    text = censored(str(inner), uri) if uri else str(inner)
    return first_line(Exception(text)) if text.strip() else type(inner).__name__  # shortened last: a half is told, too
