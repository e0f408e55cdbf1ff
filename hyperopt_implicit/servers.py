"""What databases and servers have in common: they may not answer, are shared with others, and have passwords."""

from __future__ import annotations

import hashlib
import re
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# parts of the keys of a query that are not to be shown; the last holds a whole connection string
_SECRET = "pass|pwd|secret|token|credential|api_?key|odbc_connect"  # nosec B105 # none of these is one
_HIDDEN = re.compile(rf"([?&;][^=&?;]*(?:{_SECRET})[^=&?;]*=)[^&]*", re.IGNORECASE)


def within(seconds: float, call: Callable[[], T]) -> T:
    """What a call returns, or TimeoutError; the call itself cannot be stopped and is left to itself."""
    outcome: Future[T] = Future()

    def work() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, name="hyperopt-implicit-waiting", daemon=True).start()
    try:
        return outcome.result(timeout=seconds)
    except TimeoutError:
        if outcome.done():
            raise
        raise TimeoutError(f"no answer within {seconds:.0f} seconds") from None


def alone(name: str, seconds: float) -> AbstractContextManager[object]:
    """Let one process at a time into what a name stands for, such as a database file whose tables are being made.

    Raises:
        filelock.Timeout: others were in it for so many seconds.
    """
    from filelock import FileLock

    key = hashlib.sha256(name.encode()).hexdigest()[:16]
    return FileLock(Path(tempfile.gettempdir(), f"hyperopt_implicit-{key}.lock"), timeout=seconds)


def without_password(uri: str) -> str:
    """A URI that can be shown, well formed or not.

    Example:
        >>> from hyperopt_implicit.servers import without_password
        >>> without_password("postgresql://anna:s3cret@db.example.org/studies?password=s3cret")
        'postgresql://anna:***@db.example.org/studies?password=***'
    """
    text = _HIDDEN.sub(r"\1***", uri)
    scheme, mark, rest = text.partition("://")
    if not mark:  # with a slash too few, or no scheme at all
        scheme, rest = "", text
    if rest.startswith("/") and scheme.partition("+")[0] in ("sqlite", "journal", "file"):
        return text
    # up to the last @: a password may hold what should have been escaped in it
    user, at, place = rest.rpartition("@")
    name, colon, _ = user.partition(":")
    return f"{scheme}{mark}{name}:***@{place}" if at and colon else text


def is_secret(key: str) -> bool:
    """Whether what a URI's query has under a key is not to be shown.

    Example:
        >>> from hyperopt_implicit.servers import is_secret
        >>> is_secret("sslpassword"), is_secret("connect_timeout")
        (True, False)
    """
    return re.search(_SECRET, key, re.IGNORECASE) is not None
