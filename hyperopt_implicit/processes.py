"""Processes, as others can know them: who am I, and is that one still there."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def identity() -> dict[str, Any]:
    """This process, so that others can find out whether it lives on.

    Returns:
        ``host`` and ``pid``; ``started``, since a pid is used again; ``machine``, ``boot`` and ``namespace``, since
        machines can share a name and containers a machine. What the system does not tell is None.

    Example:
        >>> from hyperopt_implicit.processes import identity
        >>> sorted(identity())
        ['boot', 'host', 'machine', 'namespace', 'pid', 'started']
    """
    pid = os.getpid()
    return {**_surroundings(), "pid": pid, "started": _started(pid)}


def lives(process: dict[str, Any]) -> bool | None:
    """Whether a process is there, as far as can be seen from here.

    Args:
        process: an :func:`identity`.

    Returns:
        None where nothing can be seen: on another host, or in another container.

    Example:
        >>> from hyperopt_implicit.processes import identity, lives
        >>> lives(identity()), lives({**identity(), "host": "elsewhere"})
        (True, None)
    """
    here = _surroundings()
    if process.get("host") != here["host"] or process.get("machine") != here["machine"]:
        return None
    if process.get("boot") != here["boot"]:
        return None if here["machine"] is None else False  # started anew since then, unless it is a namesake
    pid = process.get("pid")
    if process.get("namespace") != here["namespace"] or not isinstance(pid, int):
        return None
    try:
        started = _started(pid)
    except ProcessLookupError:
        return False
    return process.get("started") is None or started is None or process["started"] == started


@cache
def _surroundings() -> dict[str, str | None]:
    try:
        namespace = Path("/proc/self/ns/pid").readlink().name
    except OSError:
        namespace = None
    return {
        "host": socket.gethostname(),
        "machine": _content("/etc/machine-id"),
        "boot": _content("/proc/sys/kernel/random/boot_id"),
        "namespace": namespace,
    }


def _content(file: str) -> str | None:
    try:
        return Path(file).read_text().strip() or None
    except OSError:
        return None


def _started(pid: int) -> float | None:
    """When a process was started, in whatever unit; None where the system does not tell.

    Raises:
        ProcessLookupError: there is none, or nobody has noted yet that it has ended.
    """
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            raise ProcessLookupError(pid) from None
        if fields[0] in "ZX":
            raise ProcessLookupError(pid)
        return float(fields[19])
    if find_spec("psutil"):
        import psutil

        try:
            found = psutil.Process(pid)
            if found.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                raise ProcessLookupError(pid)
            return float(found.create_time())
        except psutil.NoSuchProcess:
            raise ProcessLookupError(pid) from None
        except psutil.AccessDenied:
            return None
    if os.name == "posix":
        with suppress(PermissionError):  # somebody else's, but there
            os.kill(pid, 0)
    return None
