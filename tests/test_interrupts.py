"""Signals: the first leaves a note, the second is KeyboardInterrupt, and afterwards all is as it was."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from hyperopt_implicit.interrupts import listening


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_is_a_note_and_the_second_leaves(
    first: int, second: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with listening("ending soon") as interrupt:
        assert not interrupt.requested
        os.kill(os.getpid(), first)
        assert interrupt.requested
        assert interrupt.signal == first
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), second)
    assert capsys.readouterr().err == "\nending soon\n"


def test_without_a_message_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with listening(None) as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.requested
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [None, ValueError])
def test_handlers_are_put_back(error: type[Exception] | None) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with listening("ending soon"):
            assert all(signal.getsignal(number) != handler for number, handler in before.items())
            if error is not None:
                raise error
    except ValueError:
        pass
    assert {number: signal.getsignal(number) for number in before} == before


def test_other_threads_leave_signals_alone() -> None:
    seen: list[bool] = []
    before = signal.getsignal(signal.SIGINT)

    def work() -> None:
        with listening("ending soon") as interrupt:
            seen.append(signal.getsignal(signal.SIGINT) is before and not interrupt.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True]
