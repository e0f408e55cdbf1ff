"""A run that was stopped and resumed is the run that was never stopped: bit by bit, for every backend."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import hyperopt_implicit as hi
from hyperopt_implicit.checkpoint import Checkpoints
from hyperopt_implicit.plain_training import PlainTraining

from .resumable import OUTER_STEPS, difference, outcome, train

pytestmark = pytest.mark.filterwarnings("ignore:hypergradient:hyperopt_implicit.HyperoptWarning")


class StoppedError(Exception):
    """What ends a run in these tests."""


class StopAfter:
    """A callback that ends the process, as far as the run can tell."""

    def __init__(self, step: int) -> None:
        self._step = step

    def __call__(self, step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        if step.step == self._step:
            raise StoppedError


def stop(backend: str, folder: Path, after: int, **options: Any) -> None:
    """A run that ends in the course of an outer step; what was saved before it remains."""
    with pytest.raises(StoppedError):
        train(backend, folder, callbacks=[StopAfter(after)], **options)


@pytest.mark.parametrize("backend", [each for each in hi.list_backends() if each != "auto"])
def test_resumed_twice_is_the_same_as_never_stopped(backend: str, tmp_path: Path) -> None:
    whole = outcome(train(backend, None))
    stop(backend, tmp_path, 1)
    stop(backend, tmp_path, 3)
    resumed = outcome(train(backend, tmp_path))
    assert len(resumed["history"]) == OUTER_STEPS
    assert difference(whole, resumed) is None


@pytest.mark.parametrize(("workers", "steps"), [(0, range(1, OUTER_STEPS)), (2, [3])], ids=["alone", "workers"])
def test_any_step_will_do(workers: int, steps: Sequence[int], tmp_path: Path) -> None:
    """Passes end at different steps in training and validation data; each of them may have just ended."""
    whole = outcome(train("identity", None, workers=workers))
    for step in steps:
        stop("identity", tmp_path / str(step), step, workers=workers)
        assert difference(whole, outcome(train("identity", tmp_path / str(step), workers=workers))) is None, step


def test_loaders_workers_end_with_the_run(tmp_path: Path) -> None:
    """Left to the garbage collector, each of them would be waited for, for five seconds."""
    before = set(multiprocessing.active_children())
    stop("identity", tmp_path, 3, workers=2)
    assert set(multiprocessing.active_children()) <= before


@pytest.mark.filterwarnings("ignore:auto met an indefinite Hessian:hyperopt_implicit.HyperoptWarning")
def test_resumed_from_what_auto_has_measured(tmp_path: Path) -> None:
    """Another run would measure anew, and the clock has a say in that; so one run is gone on with from its middle."""

    def copy(step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        if step.step == 3:
            shutil.copytree(tmp_path / "run", tmp_path / "copy")

    whole = outcome(train("auto", tmp_path / "run", callbacks=[copy]))
    assert [path.name for path in sorted((tmp_path / "copy").glob("step-*"))][-1] == "step-000000003.pt"
    assert difference(whole, outcome(train("auto", tmp_path / "copy"))) is None


SCHEDULERS = {
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 6),
    "plateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=7),
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step),
    "steps": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [2, 4]),
    "in turn": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.LinearLR(optimizer), lr_scheduler.StepLR(optimizer, 1)], [3]
    ),
}


@pytest.mark.parametrize(
    "options",
    [
        {"warmup_steps": 7},
        {"restart": True},
        {"hessian_batches": 3},
        {"clip": 0.01},
        {"outer_optimizer": torch.optim.RMSprop},
        {"outer_optimizer": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9)},
        *({"inner_scheduler": each, "outer_scheduler": each} for each in SCHEDULERS.values()),
    ],
    ids=["warm-up", "restart", "hessian_batches", "clip", "rmsprop", "momentum", *SCHEDULERS],
)
def test_options_resume(options: dict[str, Any], tmp_path: Path) -> None:
    whole = outcome(train("cg", None, **options))
    stop("cg", tmp_path, 2, **options)
    assert difference(whole, outcome(train("cg", tmp_path, **options))) is None


def test_numbers_are_those_of_the_run_although_it_is_not_seeded(tmp_path: Path) -> None:
    """The generators are put back, those of numpy and Python as well, which no seed of a run concerns."""

    class Draws:
        def __init__(self, end: int = 99) -> None:
            self.end, self.seen = end, list[float]()

        def __call__(self, step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
            self.seen += [numpy.random.rand(), random.random()]
            if step.step == self.end:
                raise StoppedError

    whole, before, after = Draws(), Draws(3), Draws()
    for each in (whole, before, after):
        numpy.random.seed(len(whole.seen))
        random.seed(len(whole.seen))
        if each is before:
            numpy.random.seed(0)
            random.seed(0)
            with pytest.raises(StoppedError):
                train("identity", tmp_path, seed=None, callbacks=[each])
        else:
            found = train("identity", None if each is whole else tmp_path, seed=None, callbacks=[each])
            assert len(found.history) == OUTER_STEPS
    assert after.seen[-6:] == whole.seen[-6:]


def test_warm_up_resumes_in_its_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = outcome(train("cg", None, warmup_steps=200))
    monkeypatch.setattr(Checkpoints, "is_due_by_time", lambda self: True)
    calls = 0
    take = PlainTraining.take

    def take_or_stop(self: PlainTraining, *args: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise StoppedError
        return take(self, *args)

    monkeypatch.setattr(PlainTraining, "take", take_or_stop)
    with pytest.raises(StoppedError):
        train("cg", tmp_path, warmup_steps=200)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-000000000.pt"]
    assert difference(whole, outcome(train("cg", tmp_path, warmup_steps=200))) is None
    assert calls == 3 + 2 + OUTER_STEPS  # two of the four parts of the warm-up were left


class Fading(nn.Module):
    """Adds less with each step of the training; how much, no ``state_dict`` of the model says."""

    left: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.register_buffer("left", torch.ones(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.left *= 0.9
        return self.layer(x) + self.left


def test_buffers_that_a_model_does_not_save_resume(tmp_path: Path) -> None:
    @hi.hyperparameter("decay", init=0.1)
    def loss(model: Fading, batch: Tensor, *, decay: Tensor) -> Tensor:
        return model(batch).square().mean() + decay * model.layer.weight.square().sum()

    def trained(folder: Path | None, outer_steps: int) -> hi.Result:
        torch.manual_seed(2)
        data = [torch.randn(6, 1)]
        problem = hi.BilevelProblem(
            Fading(), loss, lambda model, batch: model(batch).square().mean(), training_data=data,
            validation_data=data, optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        )  # fmt: skip
        return hi.optimize(
            problem, "identity", outer_steps=outer_steps, inner_steps=2, checkpoint=folder, resume=folder is not None,
            tracking=False,
        )  # fmt: skip

    whole = trained(None, 4)
    trained(tmp_path, 2)
    resumed = trained(tmp_path, 4)
    assert difference(outcome(whole), outcome(resumed)) is None
    assert torch.equal(whole.problem.model.get_buffer("left"), resumed.problem.model.get_buffer("left"))


def test_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    seen: list[int] = []
    first = train("cg", tmp_path, patience=2, min_delta=10.0)
    again = train("cg", tmp_path, patience=2, min_delta=10.0, callbacks=[lambda step, problem: seen.append(step.step)])
    assert seen == []
    assert first.stop_reason == "no improvement"
    assert difference(outcome(first), outcome(again)) is None
    assert first.seconds == again.seconds


def test_more_steps_are_added_to_a_finished_run(tmp_path: Path) -> None:
    whole = outcome(train("cg", None))
    train("cg", tmp_path, outer_steps=4)
    assert difference(whole, outcome(train("cg", tmp_path))) is None


class Counting:
    """A callback that counts, and ends the run."""

    def __init__(self, ends_at: int) -> None:
        self.count, self._ends_at = 0, ends_at

    def __call__(self, step: hi.OuterStep, problem: hi.BilevelProblem) -> bool:
        self.count += 1
        if step.step == 2 and self._ends_at == 0:
            raise StoppedError
        return self.count == self._ends_at

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def test_callbacks_resume(tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        train("identity", tmp_path, callbacks=[Counting(0)])
    resumed = train("identity", tmp_path, callbacks=[Counting(5)])
    assert (resumed.stop_reason, len(resumed.history)) == ("stopped by a callback", 5)


def test_resuming_where_there_is_nothing_begins(tmp_path: Path) -> None:
    found = train("identity", tmp_path / "new" / "folder", checkpoint_every=None)
    names = [path.name for path in (tmp_path / "new" / "folder").glob("step-*")]
    assert sorted(names) == ["step-000000000.pt", f"step-{OUTER_STEPS:09d}.pt"]
    assert len(found.history) == OUTER_STEPS


def test_model_that_does_not_fit(tmp_path: Path) -> None:
    train("identity", tmp_path, outer_steps=2)

    @hi.hyperparameter("decay", init=0.1)
    def loss(model: nn.Module, batch: Any, *, decay: Tensor) -> Tensor:
        return (model(batch) ** 2).mean() + decay * model.weight.square().sum()

    def other(data: int) -> hi.BilevelProblem:
        return hi.BilevelProblem(
            nn.Linear(2, 2),
            loss,
            lambda model, batch: (model(batch) ** 2).mean(),
            training_data=[torch.ones(1, 2)] * data,
            validation_data=[torch.ones(1, 2)],
            optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        )

    with pytest.raises(hi.CheckpointError) as refused:
        hi.optimize(other(1), "identity", checkpoint=tmp_path, resume=True, tracking=False)
    assert "parameter 0.weight was float32 [4, 3], now not there" in str(refused.value)
    hi.optimize(other(1), "identity", outer_steps=1, checkpoint=tmp_path / "other", tracking=False)
    with pytest.raises(hi.CheckpointError, match="batches of training_data was 1, now 3"):
        hi.optimize(other(3), "identity", outer_steps=2, checkpoint=tmp_path / "other", resume=True, tracking=False)


# ------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_signal_ends_the_step_and_saves(number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = outcome(train("cg", None))

    def send(step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        if step.step == 2:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(
        KeyboardInterrupt, match=r"interrupted after 3 outer steps and saved in .*; go on with resume=True"
    ):
        train("cg", tmp_path, checkpoint_every=100, callbacks=[send])
    assert signal.getsignal(number) == before
    assert "saving after this outer step; interrupt again to leave at once" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.glob("step-*"))[-1] == "step-000000003.pt"
    assert difference(whole, outcome(train("cg", tmp_path))) is None


def test_signal_in_the_warm_up_ends_it_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = outcome(train("identity", None, warmup_steps=200))
    calls = 0
    take = PlainTraining.take

    def take_and_send(self: PlainTraining, *args: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return take(self, *args)

    monkeypatch.setattr(PlainTraining, "take", take_and_send)
    with pytest.raises(KeyboardInterrupt, match="interrupted after"):
        train("identity", tmp_path, warmup_steps=200)
    assert calls == 2
    assert difference(whole, outcome(train("identity", tmp_path, warmup_steps=200))) is None
    assert calls == 2 + 2 + OUTER_STEPS


def test_second_signal_leaves_at_once(tmp_path: Path) -> None:
    def send(step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it has not left")

    with pytest.raises(KeyboardInterrupt) as left:
        train("cg", tmp_path, callbacks=[send])
    assert str(left.value) == ""
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-000000000.pt"]


def test_signal_in_the_last_step_lets_the_run_end(tmp_path: Path) -> None:
    def send(step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        if step.step == OUTER_STEPS - 1:
            os.kill(os.getpid(), signal.SIGINT)

    assert train("cg", tmp_path, callbacks=[send]).stop_reason == "all outer steps done"


def test_signal_in_the_step_that_ends_the_run_changes_nothing(tmp_path: Path) -> None:
    def send_and_end(step: hi.OuterStep, problem: hi.BilevelProblem) -> bool:
        os.kill(os.getpid(), signal.SIGINT)
        return True

    assert train("cg", tmp_path, callbacks=[send_and_end]).stop_reason == "stopped by a callback"


def test_signal_on_a_full_disk_says_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def send(step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        if step.step == 2:
            monkeypatch.setattr(Checkpoints, "_write", no_room)
            os.kill(os.getpid(), signal.SIGINT)

    def no_room(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with (
        pytest.warns(hi.HyperoptWarning, match="could not be written to after outer step 2"),
        pytest.raises(
            KeyboardInterrupt, match=r"after 3 outer steps and could not be saved; its last checkpoint is in"
        ),
    ):
        train("cg", tmp_path, callbacks=[send])
