"""The buffer before a receiver that dies, comes back, refuses or hangs: the caller never waits, and nothing is lost."""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from hyperopt_implicit import sender
from hyperopt_implicit.errors import HyperoptWarning
from hyperopt_implicit.local_copy import LocalCopy
from hyperopt_implicit.sender import MetricRecord, Sender


class FakeReceiver:
    """Remembers what reaches it; tests break it as they like."""

    name = "the server"
    metrics_a_call = 1000

    def __init__(self) -> None:
        self.goes_on = False
        self.connected = 0
        self.there: list[tuple[str, int, int]] = []
        self.sent: list[tuple[int, dict[str, float]]] = []
        self.unanswered = False
        self.fails: Exception | None = None
        self.metrics: dict[int, dict[str, float]] = {}
        self.params: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.files: dict[str, str] = {}
        self.ended: list[str] = []
        self.calls = 0
        self.dead = False
        self.refused: Callable[[Mapping[str, float]], bool] = lambda metrics: False
        self.hangs = threading.Event()
        self.hangs.set()

    def check(self, *, last: bool) -> None:
        if self.dead:
            raise ConnectionRefusedError("connection refused")

    def connect(self) -> None:
        self.connected += 1

    def logged(self, name: str) -> list[tuple[int, int]]:
        return [(step, timestamp) for each, step, timestamp in self.there if each == name]

    def refuses(self, error: Exception) -> bool:
        return not isinstance(error, OSError)

    def explain(self, error: Exception) -> str:
        return str(error).splitlines()[0]

    def send_metrics(self, records: list[MetricRecord]) -> int:
        self.hangs.wait()
        self.calls += 1
        if self.fails is not None:
            raise self.fails
        if any(self.refused(metrics) for metrics, _, _ in records):
            raise ValueError("bad metric\nwith a long explanation")
        for metrics, timestamp, step in records:
            assert step not in self.metrics  # each arrives once
            assert abs(timestamp / 1000 - time.time()) < 60
            self.metrics[step] = metrics
            self.sent.append((timestamp, metrics))
            self.there += [(name, step, timestamp) for name in metrics]
        if self.unanswered:
            raise ConnectionResetError("connection reset")
        return len(records)

    def send_params(self, params: Mapping[str, str]) -> None:
        self.params.update(params)

    def send_tags(self, tags: Mapping[str, str]) -> None:
        self.tags.update(tags)

    def send_file(self, path: Path, place: str | None) -> None:
        self.files[f"{place}/{path.name}"] = path.read_text()

    def end(self, status: str, timestamp: int) -> None:
        self.ended.append(status)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "_INTERVAL_SECONDS", 0.01)
    monkeypatch.setattr(sender, "_RETRY_SECONDS", 0.01)
    monkeypatch.setattr(sender, "_CLOSE_SECONDS", 5.0)
    monkeypatch.setattr(sender, "_LONGEST_PAUSE", 0.02)


@pytest.fixture
def receiver() -> FakeReceiver:
    return FakeReceiver()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return tmp_path / "unsent" / "run.jsonl"


def make(receiver: FakeReceiver, copy: Path) -> Sender:
    return Sender(receiver, lambda: {"run_id": "run"}, LocalCopy(copy.parent), patience=5.0)


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
    assert lines(copy)[0] == {"run_id": "run"}
    assert steps(copy) == [1, 2, 3]
    assert lines(copy)[1]["metrics"] == {"loss": 1.0, "bad": None}  # JSON has no infinity
    assert lines(copy)[-2:] == [{"tags": {"stop": "early"}}, {"end": "FINISHED"}]
    assert (copy.parent / "run" / "figures" / "figure.txt").read_text() == "drawn"
    assert receiver.ended == []


def test_receiver_that_comes_back_gets_everything(receiver: FakeReceiver, copy: Path) -> None:
    sending = make(receiver, copy)
    receiver.dead = True
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
    sending = make(receiver, copy)
    receiver.dead = True
    sending.put_metrics({"loss": 0.0}, 0)
    until(lambda: sending._failure is not None)
    receiver.dead = False
    until(lambda: 0 in receiver.metrics)
    sending.close("FINISHED")  # pytest turns a warning into an error
    assert receiver.ended == ["FINISHED"]


def test_one_refused_entry_does_not_hold_up_the_others(receiver: FakeReceiver, copy: Path) -> None:
    receiver.refused = lambda metrics: metrics["loss"] == 3.0
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


def test_without_a_receiver_everything_is_kept(receiver: FakeReceiver, copy: Path) -> None:
    receiver.dead = True
    sending = make(receiver, copy)
    sending.put_params({"a": "1"})
    start = r"MLflow tracking: the server could not be used \(connection refused\)"
    with pytest.warns(HyperoptWarning, match=rf"{start}\. The run"):
        sending.put_metrics({"loss": 1.0}, 0)
    sending.put_metrics({"loss": 2.0}, 1)  # warned of already
    with pytest.warns(HyperoptWarning, match=f"{start}; what was not sent is in"):
        sending.close("FAILED")
    assert lines(copy)[1] == {"params": {"a": "1"}}
    assert steps(copy) == [0, 1]


def test_receiver_that_comes_later_gets_everything_in_order(receiver: FakeReceiver, copy: Path) -> None:
    receiver.dead = True
    sending = make(receiver, copy)
    sending.put_params({"a": "1"})
    with pytest.warns(HyperoptWarning, match="could not be used"):
        sending.put_metrics({"loss": 0.0}, 0)
    assert receiver.connected == 0
    receiver.dead = False
    sending.put_metrics({"loss": 1.0}, 1)
    sending.close("FINISHED")
    assert receiver.connected == 1
    assert list(receiver.metrics) == [0, 1]
    assert receiver.params == {"a": "1"}
    assert receiver.ended == ["FINISHED"]
    assert not copy.parent.exists()


def test_tries_become_rarer(receiver: FakeReceiver, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "_LONGEST_PAUSE", 0.04)
    pauses: list[float] = []
    receiver.dead = True
    sending = make(receiver, copy)
    wait = sending._wake.wait
    monkeypatch.setattr(sending._wake, "wait", lambda pause: pauses.append(pause) or wait(pause))
    until(lambda: len(pauses) > 5)
    assert sorted(pauses) == pauses
    assert pauses[-1] == 0.04
    with pytest.warns(HyperoptWarning):
        sending.close("FINISHED")


def test_call_whose_answer_was_lost_is_not_made_again(receiver: FakeReceiver, copy: Path) -> None:
    receiver.hangs.clear()
    receiver.unanswered = True
    sending = make(receiver, copy)
    for step in range(5):
        sending.put_metrics({"loss": 1.0}, step)
    receiver.hangs.set()
    until(lambda: len(receiver.metrics) == 5)
    receiver.unanswered = False
    until(lambda: not sending._queue)
    for step in range(5, 8):
        sending.put_metrics({"loss": 1.0}, step)
    sending.close("FINISHED")  # the receiver itself refuses a step that it has
    assert list(receiver.metrics) == list(range(8))
    assert not copy.parent.exists()


def test_receiver_that_is_there_and_fails_is_waited_for(receiver: FakeReceiver, copy: Path) -> None:
    """A database that is full or locked is not a reason to leave out the entry that happened to be in front."""
    receiver.fails = OSError("database is locked")
    sending = make(receiver, copy)
    sending.put_metrics({"loss": 0.0}, 0)
    until(lambda: sending._failures >= 4)
    assert not sending._refused
    receiver.fails = None
    until(lambda: 0 in receiver.metrics)
    sending.put_metrics({"loss": 1.0}, 1)
    sending.close("FINISHED")
    assert list(receiver.metrics) == [0, 1]


def test_record_that_always_fails_lets_the_others_pass_in_the_end(receiver: FakeReceiver, copy: Path) -> None:
    def refused(metrics: Mapping[str, float]) -> bool:
        if metrics["loss"] == 1.0:
            raise OSError("internal error")
        return False

    receiver.refused = refused
    receiver.hangs.clear()
    sending = make(receiver, copy)
    for step in range(4):
        sending.put_metrics({"loss": float(step)}, step)
    receiver.hangs.set()
    until(lambda: 3 in receiver.metrics)
    with pytest.warns(HyperoptWarning, match=r"internal error\); what was not sent"):
        sending.close("FINISHED")
    assert list(receiver.metrics) == [0, 2, 3]
    assert steps(copy) == [1]


def test_what_an_earlier_life_has_sent_is_not_sent_again(receiver: FakeReceiver, copy: Path) -> None:
    receiver.goes_on = True
    for step in (0, 1, 2, 4, 5):  # 3 is missing, 4 and 5 came after the checkpoint
        receiver.there += [("loss", step, 5_000_000_000_000), ("mark", step, 5_000_000_000_000)]
    receiver.there.append(("loss", 3, 5_000_000_000_000))  # a record counts when its last metric is there
    sending = make(receiver, copy)
    sending.put_past(lambda: (({"loss": float(step), "mark": 0.0}, step) for step in range(4)))
    for step in range(4, 8):
        sending.put_metrics({"loss": float(step), "mark": 0.0}, step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeReceiver, "send_metrics", _take)
        sending.close("FINISHED")
    assert [metrics["loss"] for _, metrics in receiver.sent] == [3.0, 6.0, 7.0]
    assert {timestamp for timestamp, _ in receiver.sent} == {5_000_000_000_000}  # the clock has been set back since


def _take(receiver: FakeReceiver, records: list[MetricRecord]) -> int:
    receiver.sent += [(timestamp, metrics) for metrics, timestamp, _ in records]
    return len(records)


def test_past_of_a_new_run_is_sent_whole_and_first(receiver: FakeReceiver, copy: Path) -> None:
    receiver.hangs.clear()
    sending = make(receiver, copy)
    sending.put_past(lambda: (({"loss": float(step)}, step) for step in range(3)))
    sending.put_metrics({"loss": 3.0}, 3)
    receiver.hangs.set()
    sending.close("FINISHED")
    assert list(receiver.metrics) == [0, 1, 2, 3]


def test_past_is_in_the_local_copy(receiver: FakeReceiver, copy: Path) -> None:
    receiver.dead = True
    sending = make(receiver, copy)
    sending.put_past(lambda: (({"loss": float(step)}, step) for step in range(3)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HyperoptWarning)
        sending.put_metrics({"loss": 3.0}, 3)
        sending.close("FINISHED")
    assert steps(copy) == [0, 1, 2, 3]


def test_large_records_go_in_parts_of_one_call(receiver: FakeReceiver, copy: Path) -> None:
    receiver.metrics_a_call = 3
    sizes: list[int] = []
    sending = make(receiver, copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(receiver, "send_metrics", lambda records: sizes.append(len(records[0][0])) or 1)
        sending.put_metrics({f"m{i}": 0.0 for i in range(8)}, 0)
        sending.close("FINISHED")
    assert sizes == [3, 3, 2]


def test_clock_that_is_set_back_stands_still(
    receiver: FakeReceiver, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [time.time() + offset for offset in (0.0, 1.0, -3600.0, -3599.0, 2.0)]
    monkeypatch.setattr(sender.time, "time", lambda: now[0])
    sending = make(receiver, copy)
    receiver.hangs.clear()
    monkeypatch.setattr(FakeReceiver, "send_metrics", _take)
    for step in range(5):
        sending.put_metrics({"loss": float(step)}, step)
        now.pop(0) if len(now) > 1 else None
    receiver.hangs.set()
    sending.close("FINISHED")
    times = [timestamp for timestamp, _ in receiver.sent]
    assert sorted(times) == times
    assert [each - times[0] for each in times] == [0, 1000, 1000, 1000, 2000]


def test_receiver_that_takes_its_time_to_come_is_warned_of(
    receiver: FakeReceiver, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "_SILENT_SECONDS", 0.05)
    monkeypatch.setattr(receiver, "connect", receiver.hangs.wait)
    receiver.hangs.clear()
    sending = Sender(receiver, lambda: {"run_id": "run"}, LocalCopy(copy.parent))  # does not wait for it
    time.sleep(0.1)
    with pytest.warns(HyperoptWarning, match="could not be used \\(no answer within"):
        sending.put_metrics({"loss": 0.0}, 0)
    receiver.hangs.set()
    sending.close("FINISHED")
    assert list(receiver.metrics) == [0]


def test_nothing_is_sent_that_is_in_the_copy(
    receiver: FakeReceiver, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "_CLOSE_SECONDS", 0.1)
    receiver.hangs.clear()
    sending = make(receiver, copy)
    sending.put_metrics({"loss": 0.0}, 0)
    time.sleep(0.05)
    for step in (1, 2):
        sending.put_metrics({"loss": 1.0}, step)
    with pytest.warns(HyperoptWarning, match="did not answer within"):
        sending.close("FINISHED")
    receiver.hangs.set()
    sending._thread.join(5.0)
    assert list(receiver.metrics) == [0]  # the call that was under way
    assert receiver.ended == []
    assert steps(copy) == [0, 1, 2]


# --------------------------------------------------------------------------------------------------- the local copy


def keep(folder: Path, name: str = "run", **options: Any) -> str:
    return LocalCopy(folder).keep(name, [{"step": 0}], **{"files": [write], **options})


def test_copy_that_is_there_is_left_as_it_is(copy: Path) -> None:
    for _ in range(3):
        keep(copy.parent)
    names = sorted(each.name for each in copy.parent.iterdir())
    assert names == ["run", "run-2", "run-2.jsonl", "run-3", "run-3.jsonl", "run.jsonl"]
    keep(copy.parent, "bare", files=[])
    (copy.parent / "bare.jsonl").write_text("of an earlier life")
    assert keep(copy.parent, "bare", files=[]).endswith("bare-2.jsonl")
    assert (copy.parent / "bare.jsonl").read_text() == "of an earlier life"


@pytest.mark.parametrize("name", ["../evil", "/evil", "..", "a/../../evil"])
def test_copy_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    def outside(folder: Path) -> Iterator[tuple[Path, str | None]]:
        yield next(write(folder))[0], "../../evil"

    folder = tmp_path / "a" / "b" / "unsent"
    said = keep(folder, name, files=[outside])
    assert said.startswith(f"what was not sent is in {folder}")
    assert [each for each in tmp_path.rglob("*") if each.is_file() and folder not in each.parents] == []
    assert len([each for each in folder.rglob("*") if each.is_file()]) == 2


def test_copy_that_cannot_be_written_there_goes_to_a_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "unsent").write_text("a file in the place of the folder")
    said = keep(tmp_path / "unsent")
    (path,) = tmp_path.glob("unsent-*/run.jsonl")
    assert said == f"what was not sent is in {path}"


def test_copy_that_cannot_be_written_is_only_warned_of(
    receiver: FakeReceiver, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    receiver.dead = True
    sending = make(receiver, copy)
    with pytest.warns(HyperoptWarning, match=r"what was not sent could not be written .*No space left") as caught:
        sending.close("FINISHED")
    assert len(caught) == 1


def test_files_that_find_no_space_do_not_cost_the_numbers(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copy", full)
    said = keep(copy.parent)
    assert said == f"what was not sent is in {copy}, without some of its files ([Errno 28] No space left on device)"
    assert steps(copy) == [0]


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
