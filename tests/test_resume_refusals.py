"""What goes on after other settings, and what only looks like the same run and is refused."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import hyperopt_implicit as hi
from hyperopt_implicit.plain_training import PlainTraining
from hyperopt_implicit.trial_checkpoints import TrialCheckpoints

from .resumable import difference, outcome
from .stopped_runs import assert_resumes, network, problem, run

pytestmark = pytest.mark.filterwarnings("ignore:hypergradient:hyperopt_implicit.HyperoptWarning")


# ----------------------------------------------------------------------------------------------- what says when to stop


class Falling(nn.Linear):
    """Without a finite loss in some of the steps."""

    def __init__(self) -> None:
        super().__init__(3, 1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.calls += 1
        return super().forward(x) * (math.nan if 9 <= int(self.calls) % 17 <= 11 else 1.0)


@pytest.mark.parametrize("options", [{}, {"warmup_steps": 70}, {"on_failure": "skip", "restart": True}], ids=str)
def test_steps_without_a_finite_loss(options: dict[str, Any], tmp_path: Path) -> None:
    assert_resumes(lambda: problem(Falling), tmp_path, backend="cg", **options)


def test_warm_up_that_is_interrupted_with_its_weights_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What to go back to is where the warm-up began, in the process that goes on as well."""
    take, interrupts = PlainTraining.take, False

    def take_and_lose(self: PlainTraining, steps: int, *rest: Any) -> list[float]:
        losses = take(self, steps, *rest)
        if steps == 7:  # those of the warm-up
            self._problem.params["0.weight"].detach().fill_(math.nan)
            if interrupts:
                os.kill(os.getpid(), signal.SIGINT)
        return losses

    monkeypatch.setattr(PlainTraining, "take", take_and_lose)
    whole = run(problem, None, warmup_steps=7)
    interrupts = True
    with pytest.raises(KeyboardInterrupt):
        run(problem, tmp_path, warmup_steps=7)
    resumed = run(problem, tmp_path, warmup_steps=7)
    assert torch.isfinite(whole.problem.params["0.weight"]).all()
    assert difference(outcome(whole), outcome(resumed)) is None


def test_more_patience_goes_on(tmp_path: Path) -> None:
    options: dict[str, Any] = {"min_delta": 10.0, "outer_steps": 30}
    whole = outcome(run(problem, None, patience=6, **options))
    first = run(problem, tmp_path, patience=2, **options)
    assert first.stop_reason == "no improvement"
    resumed = run(problem, tmp_path, patience=6, **options)
    assert len(first.history) < len(resumed.history) < 30
    assert difference(whole, outcome(resumed)) is None


@pytest.mark.filterwarnings("ignore:stopped at outer step:hyperopt_implicit.HyperoptWarning")
def test_more_failures_go_on(tmp_path: Path) -> None:
    first, then = (run(lambda: problem(FailsLater), tmp_path, max_failures=most) for most in (2, 4))
    assert (first.stop_reason, then.stop_reason) == ("too many failed steps",) * 2
    assert len(then.history) == len(first.history) + 2


class FailsLater(nn.Linear):
    """Gives no finite loss from some call on."""

    def __init__(self) -> None:
        super().__init__(3, 1)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        return super().forward(x) * (math.nan if self.calls > 4 or self.weight.isnan().any() else 1.0)


# ------------------------------------------------------------------------------------------------------------- refusals


def refused(folder: Path, message: str, make: Callable[[], hi.BilevelProblem] = problem, **options: Any) -> None:
    with pytest.raises(hi.CheckpointError, match=message):
        run(make, folder, **options)


def test_other_schedulers_are_refused(tmp_path: Path) -> None:
    """They would go on with the options of those before, or with attributes that are not theirs."""

    def steps(optimizer: Any) -> Any:
        return lr_scheduler.StepLR(optimizer, 2)

    run(problem, tmp_path, outer_steps=2, inner_scheduler=steps)
    cosine, others = (lambda each: lr_scheduler.CosineAnnealingLR(each, 5)), (lambda each: lr_scheduler.StepLR(each, 3))
    refused(tmp_path, r"scheduler 0 was StepLR\(.*\), now CosineAnnealingLR\(", inner_scheduler=cosine)
    refused(tmp_path, r"scheduler 0 was StepLR\(step_size=2, .*\), now StepLR\(step_size=3", inner_scheduler=others)
    refused(tmp_path, r"scheduler 0 was StepLR\(.*\), now not there")
    assert len(run(problem, tmp_path, inner_scheduler=steps).history) == 6


def test_other_default_dtype_is_refused(tmp_path: Path) -> None:
    def make() -> hi.BilevelProblem:
        return problem(lambda: network().float())

    run(make, tmp_path, outer_steps=2)
    torch.set_default_dtype(torch.float64)
    try:
        refused(tmp_path, "default dtype was float32, now float64", make)
    finally:
        torch.set_default_dtype(torch.float32)


def test_buffers_of_another_shape_are_refused(tmp_path: Path) -> None:
    def make(size: int) -> hi.BilevelProblem:
        model = nn.Linear(3, 1)
        model.register_buffer("table", torch.zeros(size))
        return problem(lambda: model)

    run(lambda: make(2), tmp_path, outer_steps=2)
    refused(tmp_path, r"buffer table was float32 \[2\], now float32 \[3\]", lambda: make(3))


def test_other_number_of_threads_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(problem, tmp_path, outer_steps=2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    with pytest.warns(
        hi.HyperoptWarning, match=r"get_num_threads\(\) = 1, and that is 7 now: .*last digits may differ"
    ):
        run(problem, tmp_path)


@pytest.mark.parametrize("part", ["torch", "threads", "tracked", "run", "callbacks", "processes"])
def test_checkpoint_without_a_part_is_refused(part: str, tmp_path: Path) -> None:
    state = changed(tmp_path, lambda state: state.pop(part))
    assert part not in state
    refused(
        tmp_path, rf"must hold all of a run; .*step-000000002\.pt is without {part}\. Remove it, and the one before"
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["run"].pop("loop"),
        lambda state: state["run"]["loop"].pop("model"),
        lambda state: state["processes"][0].pop("streams"),
        lambda state: state["processes"][0].pop("generators"),
        lambda state: state["processes"][0]["generators"].pop("torch"),
        lambda state: state["run"]["history"].clear(),
    ],
)
def test_checkpoint_without_a_smaller_part_is_refused(change: Any, tmp_path: Path) -> None:
    changed(tmp_path, change)
    refused(
        tmp_path, r"data and callbacks that it was begun with; .*step-000000002\.pt does not fit these: .* Put them"
    )


def changed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    run(problem, folder, outer_steps=2)
    state: dict[str, Any] = torch.load(folder / "step-000000002.pt", weights_only=True)
    change(state)
    torch.save(state, folder / "step-000000002.pt")
    return state


class Sum:
    """A callback with a state."""

    def __init__(self) -> None:
        self.total = 0.0

    def __call__(self, step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        self.total += step.validation_loss

    def state_dict(self) -> dict[str, float]:
        return {"total": self.total}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.total = state["total"]


def test_callbacks_are_known_by_their_kind_and_missed(tmp_path: Path) -> None:
    whole, before, after = Sum(), Sum(), Sum()
    run(problem, None, callbacks=[whole])
    run(problem, tmp_path, callbacks=[before], outer_steps=3)
    run(problem, tmp_path, callbacks=[lambda step, problem: None, after], outer_steps=6)
    assert after.total == whole.total != before.total
    with pytest.warns(
        hi.HyperoptWarning, match="holds the state of a callback Sum, and none of the callbacks takes it"
    ):
        run(problem, tmp_path, outer_steps=7)


def test_callback_that_does_not_take_its_state(tmp_path: Path) -> None:
    changed(tmp_path, lambda state: state["callbacks"].append(("Sum", {})))
    refused(tmp_path, "does not fit these: 'total'. Put them back", callbacks=[Sum()])


def test_folder_is_the_same_wherever_the_process_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    run(problem, Path("my run"), callbacks=[lambda step, problem: monkeypatch.chdir(tmp_path / "elsewhere")])
    assert (tmp_path / "my run" / "step-000000006.pt").exists()
    assert list((tmp_path / "elsewhere").iterdir()) == []


# ------------------------------------------------------------------------------------------------------------- a search


def keeper_of(trial: Any, study: Any, folder: Path) -> Any:
    return TrialCheckpoints(study, folder, 1).keeper(trial, trial.params)


def trial_of(x: float) -> Any:
    study = optuna.create_study(study_name="a/b")
    trial = study.ask()
    trial.suggest_float("x", x, x)
    return trial, study


def test_trial_of_other_knobs_is_begun_anew(tmp_path: Path) -> None:
    """A study of the same name that is gone, or was in memory, has left it."""
    trained(trial_of(1.0), tmp_path, 3)
    assert trained(trial_of(1.0), tmp_path, 5) == [3, 4]
    with pytest.warns(hi.HyperoptWarning, match=r"begins anew: .*knob x was 1\.0, now 2\.0"):
        assert trained(trial_of(2.0), tmp_path, 2) == [0, 1]
    assert trained(trial_of(2.0), tmp_path, 3) == [2]


def test_trial_whose_model_has_changed_is_begun_anew(tmp_path: Path) -> None:
    trained(trial_of(1.0), tmp_path, 3)

    def other() -> hi.BilevelProblem:
        model = network()
        model.requires_grad_()
        model.add_module("new", nn.Linear(1, 1).requires_grad_(False))  # which is not trained
        model.forward = lambda x: nn.Sequential.forward(model[:4], x)
        return problem(lambda: model)

    with pytest.warns(hi.HyperoptWarning, match="begins anew: .*does not fit these"):
        assert trained(trial_of(1.0), tmp_path, 2, other) == [0, 1]
    whole = run(other, None, outer_steps=2, seed=3)
    assert difference(outcome(whole), RESULTS[-1]) is None


RESULTS: list[Any] = []


def trained(found: Any, folder: Path, outer_steps: int, make: Callable[[], hi.BilevelProblem] = problem) -> list[int]:
    """The outer steps that a trial takes in this process."""
    from hyperopt_implicit.optimize import run_alone
    from hyperopt_implicit.prepared_run import RunOptions

    trial, study = found
    steps: list[int] = []
    torch.manual_seed(11)
    result = run_alone(
        make(),
        "identity",
        RunOptions(outer_steps=outer_steps, inner_steps=4),
        seed=3,
        callbacks=[lambda step, problem: steps.append(step.step)],
        progress=False,
        tracking=False,
        keeper=keeper_of(trial, study, folder),
    )
    RESULTS.append(outcome(result))
    return steps
