"""What must never be shown: the passwords and tokens of a store, taken out of texts that others have written.

A URI that is shown on purpose is written by ``servers.without_password``.
"""

from __future__ import annotations

import logging
import os
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from hyperopt_implicit.servers import is_secret, without_password

_ENVIRONMENT = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "DATABRICKS_TOKEN")
_HIDDEN = "***"
_SHORT = 4  # a shorter secret is taken out where it stands in a URI only: elsewhere it would be half of the alphabet


def without_credentials(uri: str) -> str:
    """A URI that can be shown, without its password, and without a token that stands alone in its place.

    Example:
        >>> from hyperopt_implicit.credentials import without_credentials
        >>> without_credentials("https://anna:s3cret@mlflow.example.org"), without_credentials("https://t0ken@mlflow.example.org")
        ('https://anna:***@mlflow.example.org', 'https://***@mlflow.example.org')
    """
    scheme, mark, rest = uri.partition("://")
    user, at, host = rest.rpartition("@")
    if scheme in ("http", "https") and at and ":" not in user:
        return without_password(f"{scheme}{mark}{_HIDDEN}@{host}")
    return without_password(uri)


def secrets_of(uri: str) -> set[str]:
    """The passwords and tokens with which a URI, or the environment, opens a store."""
    scheme, mark, rest = uri.partition("://")
    scheme, rest = (scheme, rest) if mark else ("", uri)  # with a slash too few
    found = {os.environ[name] for name in _ENVIRONMENT if os.environ.get(name)}
    user, at, _ = rest.rpartition("@")  # the last one: a password may hold what should have been escaped in it
    is_path = rest.startswith("/") and scheme.startswith(("sqlite", "journal", "file"))
    if at and not is_path:
        name, colon, password = user.partition(":")
        found.add(password if colon else name if scheme in ("http", "https") else "")
    found.update(value for name, value in parse_qsl(urlsplit(uri).query) if is_secret(name))
    return {each for secret in found for each in (secret, unquote(secret), quote(secret, safe="")) if each}


def censored(text: str, uri: str) -> str:
    """A text from somewhere else, such as an error's message, without the secrets of a URI.

    Example:
        >>> from hyperopt_implicit.credentials import censored
        >>> censored("no answer from http://me:s3cret@host/api", "http://me:s3cret@host")
        'no answer from http://me:***@host/api'
    """
    text = text.replace(uri, without_credentials(uri))
    for secret in sorted(secrets_of(uri), key=len, reverse=True):
        if len(secret) < _SHORT:
            for before in (":", "//", "="):
                text = text.replace(f"{before}{secret}@", f"{before}{_HIDDEN}@")
        else:
            text = text.replace(secret, _HIDDEN)
    return text


class Censor(logging.Filter):
    """Takes the secrets of a URI out of everything that passes a logger or a handler."""

    def __init__(self, uri: str) -> None:
        super().__init__()
        self.uri = uri

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Censor) and other.uri == self.uri

    def __hash__(self) -> int:
        return hash(self.uri)

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = censored(record.getMessage(), self.uri), ()
        if record.exc_info:
            record.exc_text = censored(logging.Formatter().formatException(record.exc_info), self.uri)
        return True
