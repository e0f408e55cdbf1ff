"""Worker processes on this machine: the same command, started several times, and heard to its end."""

from __future__ import annotations

import os
import signal
import subprocess  # nosec B404 # for this package's own commands, without a shell
import sys
import threading
from collections.abc import Sequence
from typing import IO

from hyperopt_implicit.errors import CommandError
from hyperopt_implicit.interrupts import listening
from hyperopt_implicit.messages import warn

_POLL_SECONDS = 0.1


class _Worker:
    """One process, and the threads that read what it writes."""

    def __init__(self, index: int, command: Sequence[str], threads: int, said: set[str]) -> None:
        self.index = index
        self.lines: list[str] = []
        self._said = said
        self.process = subprocess.Popen(  # nosec B603 # the words are those of the command that the user has typed
            [sys.executable, "-m", "hyperopt_implicit", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C comes from here, once
        )
        assert self.process.stdout is not None and self.process.stderr is not None
        self._threads = [
            threading.Thread(target=self._keep, args=(self.process.stdout,), daemon=True),
            threading.Thread(target=self._pass_on, args=(self.process.stderr,), daemon=True),
        ]
        for each in self._threads:
            each.start()

    def end(self) -> int:
        for each in self._threads:
            each.join()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        return self.process.wait()

    def _keep(self, stream: IO[str]) -> None:
        for line in stream:
            self.lines.append(line.rstrip())

    def _pass_on(self, stream: IO[str]) -> None:
        for line in stream:
            if line.strip() and line not in self._said:  # what all of them say is said once
                self._said.add(line)
                sys.stderr.write(f"[worker {self.index}] {line}")


def run_workers(command: Sequence[str], count: int) -> str | None:
    """Run a command of this package in so many processes until all have ended; gives the link to their run.

    They share the cores: each has its part of them as threads, unless ``OMP_NUM_THREADS`` says otherwise. A signal is
    passed on to all of them, and they are waited for; a second one kills them.

    Raises:
        CommandError: all ended with an error.
        KeyboardInterrupt: a signal came.
    """
    said: set[str] = set()
    threads = max(len(os.sched_getaffinity(0)) // count, 1) if hasattr(os, "sched_getaffinity") else 1
    with listening("the workers end after their present outer step; interrupt again to kill them") as interrupt:
        workers = [_Worker(index, command, threads, said) for index in range(1, count + 1)]
        passed_on = False
        try:
            while any(each.process.poll() is None for each in workers):
                if interrupt.requested and not passed_on:
                    passed_on = True
                    for each in workers:
                        each.process.send_signal(signal.SIGINT)
                threading.Event().wait(_POLL_SECONDS)
        except BaseException:
            for each in workers:
                each.process.kill()
                each.end()
            raise
        codes = [each.end() for each in workers]
    if interrupt.requested:
        raise KeyboardInterrupt
    failed = {each.index: code for each, code in zip(workers, codes, strict=True) if code != 0}
    if len(failed) == count:
        raise CommandError(
            f"all {count} workers ended with an error (see above). What they have done is in the study; the same "
            "command goes on with it."
        )
    for index, code in failed.items():  # an end without error says that nothing was left to do
        warn(f"worker {index} ended with code {code}; the others have done its share.")
    links = [line for each in workers for line in each.lines if line.startswith("MLflow: ")]
    return links[-1] if links else None
