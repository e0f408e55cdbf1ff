"""What is remembered of a run, put into one that has begun otherwise: from there on, it is the same run."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import hyperopt_implicit as hi
from hyperopt_implicit.backend import Hypergradient, Status
from hyperopt_implicit.checkpoint import Checkpoints
from hyperopt_implicit.outer_loop import Run, Taken
from hyperopt_implicit.prepared_run import PreparedRun, RunOptions
from hyperopt_implicit.run_state import RunKeeper

from . import resumable
from .resumable import difference, outcome, problem, train

NAN = math.nan


def begun(**options: Any) -> Run:
    """A run before its first step; the start of its model is drawn."""
    prepared = PreparedRun(problem(), "identity", RunOptions(**options), seed=0)
    prepared.begin([], False)
    return prepared.run


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def moved_on(before: Run, **options: Any) -> Run:
    """Another run, in the state of the one before."""
    run = begun(**options)
    run.load_state_dict(through_a_file(before.state_dict()))
    return run


def record(run: Run, losses: Sequence[float]) -> None:
    """Outer steps of which no more is known than their validation losses, until the run ends."""
    for step in range(len(run.history), len(losses)):
        if run.stop_reason is not None:
            return
        loss = losses[step]
        status = Status.NON_FINITE if math.isnan(loss) else Status.CONVERGED
        gradients = {name: torch.zeros_like(p) for name, p in run.loop.problem.hparams.items()}
        result = Hypergradient(gradients, status, 1, None, 0, loss, 1.0, note=f"since {step - step % 2}")
        with torch.no_grad():
            next(iter(run.loop.problem.hparams.values())).add_(0.01)
        taken = Taken([1.0], {}, result, 0.0, True)
        lost = run.judge(step, taken)
        run.settle(step)
        run.record(step, taken, lost=lost, applied=not lost, seconds=(0.0, 0.0))


CASES: dict[str, tuple[dict[str, Any], list[float]]] = {
    "first pass": ({}, [1.0, 3.0, 2.5, 2.6, 2.7]),
    "patience": ({"patience": 3, "min_delta": 0.5}, [5.0, 4.0, 2.0, 1.9, 1.8, 1.7, 1.6, 1.5, 1.4]),
    "failures": ({"max_failures": 3}, [2.0, NAN, NAN, 1.0, NAN, NAN, NAN, 0.5]),
}


@pytest.mark.filterwarnings("ignore:stopped at outer step:hyperopt_implicit.HyperoptWarning")
@pytest.mark.parametrize("cut", range(1, 9))
@pytest.mark.parametrize("case", CASES)
def test_bookkeeping_goes_on(case: str, cut: int) -> None:
    """The best step, patience, failures in a row and notes, wherever the run is cut."""
    options, losses = CASES[case]
    whole, before = begun(**options), begun(**options)
    record(whole, losses)
    record(before, losses[:cut])
    after = moved_on(before, **options)
    record(after, losses)
    x, y = (outcome(each.result()) for each in (whole, after))
    same = ("best", "best_step", "losses", "failed", "stop_reason", "history")
    assert difference({name: x[name] for name in same}, {name: y[name] for name in same}) is None


def test_place_to_go_back_to_comes_back() -> None:
    """Weights, running statistics and the optimizer's state, for a first outer step that is lost."""
    before = begun()
    before.warm_up(3)
    optimizer = before.loop.problem.optimizer
    optimizer.param_groups[0]["steps"] = 3  # as some optimizers count
    first = next(iter(before.loop.problem.params.values()))
    optimizer.state[first]["steps"] = 3
    before.good.take()
    wanted = through_a_file([before.loop.problem.model.state_dict(), optimizer.state_dict()])
    before.warm_up(2)
    optimizer.param_groups[0]["steps"] = optimizer.state[first]["steps"] = 5
    after = moved_on(before)
    assert difference(before.loop.problem.model.state_dict(), after.loop.problem.model.state_dict()) is None
    after.good.restore()
    problem = after.loop.problem
    assert difference(wanted, [problem.model.state_dict(), problem.optimizer.state_dict()]) is None


@pytest.mark.parametrize("options", [{}, {"restart": True}, {"warmup_steps": 5}], ids=["plain", "restart", "warm-up"])
def test_model_may_begin_otherwise_in_the_process_that_goes_on(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of its start that still matters was saved."""
    whole = outcome(train("identity", None, **options))
    train("identity", tmp_path, outer_steps=2, **options)

    def other(*args: Any, **kinds: Any) -> hi.BilevelProblem:
        made = problem(*args, **kinds)
        with torch.no_grad():
            for p in [*made.params.values(), *made.hparams.values()]:
                p.add_(0.5)
        return made

    monkeypatch.setattr(resumable, "problem", other)
    assert difference(whole, outcome(train("identity", tmp_path, **options))) is None


@pytest.mark.parametrize("role", ["training_data", "validation_data"])
def test_generators_that_loaders_hold_go_on(role: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(*args: Any, **kinds: Any) -> hi.BilevelProblem:
        made = problem(*args, **kinds)
        dataset = getattr(made, role).dataset
        own = torch.Generator().manual_seed(4)
        setattr(made, role, DataLoader(dataset, batch_size=8, shuffle=True, generator=own))
        return made

    monkeypatch.setattr(resumable, "problem", other)
    whole = outcome(train("identity", None))
    train("identity", tmp_path, outer_steps=4)
    assert difference(whole, outcome(train("identity", tmp_path))) is None


def test_warm_up_is_saved_while_its_weights_are_sound(tmp_path: Path) -> None:
    keeper = RunKeeper(Checkpoints(tmp_path, least_seconds=0.0, share=1e9), resume=False)
    run = begun()
    keeper.attach(run, [], lambda: (None, None))
    run.is_good = False
    keeper.after_warm_up_steps()
    assert list(tmp_path.iterdir()) == []
    run.is_good = True
    keeper.after_warm_up_steps()
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-000000000.pt"]


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9), "lr of the inner optimizer was 0.05, now 0.1"),
        (lambda params: torch.optim.RMSprop(params, lr=0.05), "inner optimizer was SGD, now RMSprop"),
    ],
    ids=["lr", "kind"],
)
def test_run_with_another_inner_optimizer(
    optimizer: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("identity", tmp_path, outer_steps=2)

    def other(*args: Any, **kinds: Any) -> hi.BilevelProblem:
        made = problem(*args, **kinds)
        made.optimizer = optimizer(list(made.params.values()))
        return made

    monkeypatch.setattr(resumable, "problem", other)
    with pytest.raises(hi.CheckpointError, match=f"the settings that it was begun with; that in .*{message}"):
        train("identity", tmp_path)


def test_run_with_another_outer_optimizer(tmp_path: Path) -> None:
    train("identity", tmp_path, outer_steps=2, outer_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.01))
    with pytest.raises(
        hi.CheckpointError, match=r"betas of the outer optimizer was \(0.9, 0.999\), now \(0.5, 0.999\)"
    ):
        train(
            "identity", tmp_path, outer_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.01, betas=(0.5, 0.999))
        )
