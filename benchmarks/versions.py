"""What the numbers on a docs page were measured with."""

from __future__ import annotations

import datetime
import platform
from importlib.metadata import version


def versions_line() -> str:
    """Date, versions and kind of processor, in one line."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("hyperopt-implicit", "torch", "mlflow"))
    return (
        f"{datetime.datetime.now(tz=datetime.UTC).date()}; {packages}, Python {platform.python_version()}, "
        f"{platform.machine()}, one thread, shared cores."
    )
