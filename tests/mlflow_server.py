"""MLflow servers for tests: one in this process, which starts and stops in no time, and one in a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest


def free_port() -> int:
    """A port of this machine on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class ThreadServer:
    """MLflow's own application on a database, served by a thread; it can lose its answers.

    Attributes:
        uri: where it is, whether it runs or not.
        loses: given the path of a request, whether its answer is lost after it was applied.
        asked: the paths of all requests.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        patch.setenv("_MLFLOW_SERVER_FILE_STORE", f"sqlite:///{folder}/mlflow.db")
        patch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", str(folder / "artifacts"))
        import mlflow.server.handlers as handlers

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the server imports when it is first asked
            import starlette.middleware.wsgi  # noqa: F401

        patch.setattr(handlers, "_tracking_store", None)
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.loses: Callable[[str], bool] = lambda path: False
        self.asked: list[str] = []
        self._server: Any = None

    def start(self) -> None:
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Silent(WSGIRequestHandler):
            def log(self, *args: Any) -> None:
                pass

        self._server = make_server("127.0.0.1", self.port, self._answer, threaded=True, request_handler=Silent)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        from mlflow.server import app

        self.asked.append(environ["PATH_INFO"])
        answer: Iterable[bytes] = app(environ, start_response)
        if self.loses(environ["PATH_INFO"]):
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        return answer


class ProcessServer:
    """``mlflow server`` on a database, which can be killed and started again on the same port."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        """Start it, without waiting for it to answer."""
        store = f"sqlite:///{self._folder}/mlflow.db"
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--port", str(self.port)]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--workers", "1", "--artifacts-destination", str(self._folder / "artifacts")],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def start(self) -> None:
        self.begin()
        self.wait()

    def wait(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1).close()
                return
            except OSError:
                said = (self._folder / "server.log").read_text()
                assert self._process.poll() is None and time.monotonic() < deadline, said
                time.sleep(0.5)

    def kill(self) -> None:
        """End it with its workers."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
