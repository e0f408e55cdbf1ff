"""The buffer before a receiver that dies, comes back, refuses or hangs: the caller never waits, and nothing is lost."""

from __future__ import annotations

import json
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from hyperopt_implicit import sender
from hyperopt_implicit.errors import HyperoptWarning
from hyperopt_implicit.sender import MetricRecord, Sender


class FakeReceiver:
    """Remembers what reaches it; tests break it as they like."""

    name = "the server"

    def __init__(self) -> None:
        self.metrics: dict[int, dict[str, float]] = {}
        self.params: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.files: dict[str, str] = {}
        self.ended: list[str] = []
        self.calls = 0
        self.dead = False
        self.refuses: Callable[[Mapping[str, float]], bool] = lambda metrics: False
        self.hangs = threading.Event()
        self.hangs.set()

    def check(self) -> None:
        if self.dead:
            raise ConnectionRefusedError("connection refused")

    def send_metrics(self, records: list[MetricRecord]) -> int:
        self.hangs.wait()
        self.calls += 1
        if any(self.refuses(metrics) for metrics, _, _ in records):
            raise ValueError("bad metric\nwith a long explanation")
        for metrics, timestamp, step in records:
            assert step not in self.metrics  # each arrives once
            assert abs(timestamp / 1000 - time.time()) < 60
            self.metrics[step] = metrics
        return len(records)

    def send_params(self, params: Mapping[str, str]) -> None:
        self.params.update(params)

    def send_tags(self, tags: Mapping[str, str]) -> None:
        self.tags.update(tags)

    def send_file(self, path: Path, place: str | None) -> None:
        self.files[f"{place}/{path.name}"] = path.read_text()

    def end(self, status: str) -> None:
        self.ended.append(status)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "_INTERVAL_SECONDS", 0.01)
    monkeypatch.setattr(sender, "_RETRY_SECONDS", 0.01)
    monkeypatch.setattr(sender, "_CLOSE_SECONDS", 5.0)


@pytest.fixture
def receiver() -> FakeReceiver:
    return FakeReceiver()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return tmp_path / "unsent" / "run.jsonl"


def make(receiver: FakeReceiver | None, copy: Path, failure: str | None = None) -> Sender:
    return Sender(receiver, failure, {"run_id": "abc"}, copy)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def write(folder: Path) -> Iterator[tuple[Path, str | None]]:
    (folder / "figure.txt").write_text("drawn")
    yield folder / "figure.txt", "figures"


def lines(copy: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in copy.read_text().splitlines()]


def steps(copy: Path) -> list[int]:
    return [line["step"] for line in lines(copy) if "step" in line]


def test_everything_arrives_once_and_no_copy_is_left(receiver: FakeReceiver, copy: Path) -> None:
    sending = make(receiver, copy)
    sending.put_params({"a": "1"})
    for step in range(50):
        sending.put_metrics({"loss": float(step)}, step)
        if step % 10 == 0:
            time.sleep(0.02)
    sending.put_tags({"stop": "early"})
    sending.put_files(write)
    sending.close("FINISHED")
    assert receiver.params == {"a": "1"}
    assert receiver.metrics == {step: {"loss": float(step)} for step in range(50)}
    assert receiver.tags == {"stop": "early"}
    assert receiver.files == {"figures/figure.txt": "drawn"}
    assert receiver.ended == ["FINISHED"]
    assert not copy.parent.exists()


def test_metrics_are_sent_many_at_a_time(receiver: FakeReceiver, copy: Path) -> None:
    receiver.hangs.clear()
    sending = make(receiver, copy)
    for step in range(500):
        sending.put_metrics({"loss": 0.0}, step)
    receiver.hangs.set()
    sending.close("FINISHED")
    assert len(receiver.metrics) == 500
    assert receiver.calls <= 3


def test_caller_does_not_wait_for_a_receiver_that_hangs(
    receiver: FakeReceiver, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "_CLOSE_SECONDS", 0.1)
    receiver.hangs.clear()
    sending = make(receiver, copy)
    for step in range(3):
        sending.put_metrics({"loss": 1.0}, step)
        time.sleep(0.03)
    with pytest.warns(HyperoptWarning, match=r"the server did not answer within 0 seconds; what was not sent is in"):
        sending.close("FINISHED")
    assert steps(copy) == [0, 1, 2]
    assert lines(copy)[-1] == {"end": "FINISHED"}
    receiver.hangs.set()  # lets the thread end


def test_receiver_that_dies_leaves_a_complete_copy(receiver: FakeReceiver, copy: Path) -> None:
    sending = make(receiver, copy)
    sending.put_metrics({"loss": 0.0}, 0)
    until(lambda: 0 in receiver.metrics)
    receiver.dead = True
    sending.put_metrics({"loss": 1.0, "bad": float("inf")}, 1)
    until(lambda: sending._failure is not None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in (2, 3):
            sending.put_metrics({"loss": float(step)}, step)
        sending.put_tags({"stop": "early"})
        sending.put_files(write)
        sending.close("FINISHED")
    assert [str(each.message) for each in caught] == [
        "MLflow tracking: the server does not answer (connection refused). The run itself is not affected.",
        f"MLflow tracking: the server does not answer (connection refused); what was not sent is in {copy}. The run "
        "itself is not affected.",
    ]
    assert not sending._thread.is_alive()  # it did not use up the time limit
    assert lines(copy)[0] == {"run_id": "abc"}
    assert steps(copy) == [1, 2, 3]
    assert lines(copy)[1]["metrics"] == {"loss": 1.0, "bad": None}  # JSON has no infinity
    assert lines(copy)[-2:] == [{"tags": {"stop": "early"}}, {"end": "FINISHED"}]
    assert (copy.parent / "run" / "figures" / "figure.txt").read_text() == "drawn"
    assert receiver.ended == []


def test_receiver_that_comes_back_gets_everything(receiver: FakeReceiver, copy: Path) -> None:
    receiver.dead = True
    sending = make(receiver, copy)
    sending.put_metrics({"loss": 0.0}, 0)
    until(lambda: sending._failure is not None)
    with pytest.warns(HyperoptWarning, match="does not answer"):
        sending.put_metrics({"loss": 1.0}, 1)
    receiver.dead = False
    sending.put_metrics({"loss": 2.0}, 2)
    sending.close("FINISHED")  # without a further warning
    assert sorted(receiver.metrics) == [0, 1, 2]
    assert receiver.ended == ["FINISHED"]
    assert not copy.parent.exists()


def test_nothing_is_said_of_a_receiver_that_was_away_unnoticed(receiver: FakeReceiver, copy: Path) -> None:
    receiver.dead = True
    sending = make(receiver, copy)
    sending.put_metrics({"loss": 0.0}, 0)
    until(lambda: sending._failure is not None)
    receiver.dead = False
    until(lambda: 0 in receiver.metrics)
    sending.close("FINISHED")  # pytest turns a warning into an error
    assert receiver.ended == ["FINISHED"]


def test_one_refused_entry_does_not_hold_up_the_others(receiver: FakeReceiver, copy: Path) -> None:
    receiver.refuses = lambda metrics: metrics["loss"] == 3.0
    receiver.hangs.clear()
    sending = make(receiver, copy)
    for step in range(8):
        sending.put_metrics({"loss": float(step)}, step)
    receiver.hangs.set()
    with pytest.warns(HyperoptWarning, match=r"the server does not take data \(bad metric\); what was not sent is in"):
        sending.close("FINISHED")
    assert sorted(receiver.metrics) == [0, 1, 2, 4, 5, 6, 7]
    assert steps(copy) == [3]
    assert receiver.ended == ["FINISHED"]


def test_without_a_receiver_everything_is_kept(copy: Path) -> None:
    sending = make(None, copy, failure="nobody there")
    sending.put_params({"a": "1"})
    with pytest.warns(HyperoptWarning, match=r"MLflow tracking: nobody there\. The run"):
        sending.put_metrics({"loss": 1.0}, 0)
    sending.put_metrics({"loss": 2.0}, 1)  # warned of already
    with pytest.warns(HyperoptWarning, match="nobody there; what was not sent is in"):
        sending.close("FAILED")
    assert lines(copy)[1] == {"params": {"a": "1"}}
    assert steps(copy) == [0, 1]


def test_copy_that_cannot_be_written_is_only_warned_of(tmp_path: Path) -> None:
    (tmp_path / "unsent").write_text("a file in the place of the folder")
    sending = make(None, tmp_path / "unsent" / "run.jsonl", failure="nobody there")
    with pytest.warns(HyperoptWarning, match="what was not sent could not be written to"):
        sending.close("FINISHED")


def test_files_that_cannot_be_made_do_not_cost_the_rest(receiver: FakeReceiver, copy: Path) -> None:
    def broken(folder: Path) -> Iterator[tuple[Path, str | None]]:
        raise RuntimeError("cannot draw")
        yield

    sending = make(receiver, copy)
    sending.put_files(broken)
    sending.put_metrics({"loss": 1.0}, 0)
    with pytest.warns(HyperoptWarning, match="cannot draw"):
        sending.close("FINISHED")
    assert receiver.metrics == {0: {"loss": 1.0}}
    assert receiver.ended == ["FINISHED"]


@pytest.mark.parametrize("dead", [False, True])
def test_jobs_run_once_whether_the_receiver_is_there_or_not(receiver: FakeReceiver, copy: Path, dead: bool) -> None:
    receiver.dead = dead
    done: list[bool] = []
    sending = make(receiver, copy)
    sending.put_job(lambda: done.append(True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HyperoptWarning)
        sending.close("FINISHED")
    until(lambda: bool(done))
    assert done == [True]


def test_thread_ends_with_the_run(receiver: FakeReceiver, copy: Path) -> None:
    sending = make(receiver, copy)
    sending.close("FINISHED")
    until(lambda: not sending._thread.is_alive())
