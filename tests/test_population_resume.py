"""A population that was stopped goes on member by member, and comes to what each would have come to alone."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hyperopt_implicit as hi
from hyperopt_implicit import checkpoint
from hyperopt_implicit.checkpoint import Checkpoints
from hyperopt_implicit.interrupts import Interrupt
from hyperopt_implicit.population import run_together
from hyperopt_implicit.prepared_run import RunOptions
from hyperopt_implicit.run_state import RunKeeper

from .populations import TRAINING, assert_same, member

pytestmark = pytest.mark.filterwarnings("ignore:hypergradient:hyperopt_implicit.HyperoptWarning")

COUNT, STEPS = 3, 6


class StoppedError(Exception):
    """What ends a population in these tests."""


def stop(step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
    if step.step == 3:
        raise StoppedError


def together(
    make: Callable[[int], hi.BilevelProblem],
    folder: Path,
    *,
    every: int = 1,
    ends: bool = False,
    interrupt: Interrupt | None = None,
    **options: Any,
) -> hi.Population:
    """Members that are saved, and resumed where they were."""
    keepers = [RunKeeper(Checkpoints(folder / str(i), every=every), resume=True, lenient=True) for i in range(COUNT)]
    return run_together(
        [make(i) for i in range(COUNT)],
        "neumann",
        RunOptions(outer_steps=STEPS, inner_steps=4, outer_lr=0.05, keep_best_model=True, **options),
        seeds=list(range(COUNT)),
        callbacks=[[stop] if ends and not i else [] for i in range(COUNT)],
        tracking=[False] * COUNT,
        knobs=(),
        vectorise="always",
        compile=False,
        keepers=keepers,
        interrupt=interrupt,
    )


def alone(make: Callable[[int], hi.BilevelProblem], **options: Any) -> list[hi.Result]:
    return [
        hi.optimize(
            make(i), "neumann", outer_steps=STEPS, inner_steps=4, outer_lr=0.05, keep_best_model=True, seed=i,
            tracking=False, progress=False, **options,
        )
        for i in range(COUNT)
    ]  # fmt: skip


def loaders(i: int) -> hi.BilevelProblem:
    x, y = (torch.cat(each) for each in zip(*TRAINING, strict=True))
    return member(i, training_data=DataLoader(TensorDataset(x, y), batch_size=7, shuffle=True))


def by_adam(i: int) -> hi.BilevelProblem:
    return member(i, optimizer=lambda params, i: torch.optim.Adam(params, lr=0.01 * (i + 1)))


def frozen(i: int) -> hi.BilevelProblem:
    """Its first layer gets no gradient, so that the optimizer comes to keep nothing of it."""

    class Second(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.second(self.first(x).detach())
            return found

    @hi.hyperparameter("decay", init=0.1)
    def loss(model: Second, batch: Any, *, decay: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1]) + decay * model.second.weight.square().sum()

    return member(
        i,
        training_loss=loss,
        model=lambda: Second().double(),
        optimizer=lambda params, i: torch.optim.SGD(params, lr=0.1 * (i + 1), momentum=0.9, dampening=0.5),
    )


@pytest.mark.parametrize("options", [{}, {"warmup_steps": 5}, {"restart": True}], ids=["plain", "warm-up", "restart"])
@pytest.mark.parametrize("make", [member, loaders, by_adam, frozen])
def test_killed_population_goes_on(make: Any, options: dict[str, Any], tmp_path: Path) -> None:
    wanted = alone(make, **options)
    with pytest.raises(StoppedError):
        together(make, tmp_path, ends=True, **options)
    resumed = together(make, tmp_path, **options)
    assert resumed.groups == [[i] for i in range(COUNT)]
    assert_same(resumed, wanted)


def test_interrupted_population_is_saved_and_goes_on(tmp_path: Path) -> None:
    wanted = alone(member)
    interrupted = together(member, tmp_path, every=100, interrupt=Interrupt(signal.SIGINT))
    assert interrupted.groups == [[0, 1, 2]]
    assert [(each.stop_reason, len(each.history)) for each in interrupted.outcomes] == [("interrupted", 1)] * COUNT
    assert_same(together(member, tmp_path), wanted)


def test_members_are_saved_no_earlier_than_they_are_due(tmp_path: Path) -> None:
    """There are many, and most end before: those of a search are not even saved before their first step."""
    together(member, tmp_path, every=100)
    assert list(tmp_path.rglob("step-*")) == []


def test_new_members_are_trained_at_once_beside_those_that_go_on(tmp_path: Path) -> None:
    wanted = alone(member)
    with pytest.raises(StoppedError):
        together(member, tmp_path, ends=True)
    for path in (tmp_path / "2").glob("step-*"):
        path.unlink()
    for path in (tmp_path / "0").glob("step-*"):
        path.unlink()
    resumed = together(member, tmp_path)
    assert resumed.groups == [[0, 2], [1]]
    assert_same(resumed, wanted)


def test_folder_in_which_another_process_trains_the_member_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial that was taken for lost is repeated while its process still runs."""
    monkeypatch.setattr(checkpoint, "_LOCK_SECONDS", 0.1)
    wanted = alone(member, warmup_steps=5)
    other = Checkpoints(tmp_path / "1")
    other.claim()
    with pytest.warns(hi.HyperoptWarning, match="goes on without checkpoints: .*belongs to one process at a time"):
        found = together(member, tmp_path, warmup_steps=5)
    assert_same(found, wanted)
    assert [len(list((tmp_path / str(i)).glob("step-*"))) for i in range(COUNT)] == [3, 0, 3]
