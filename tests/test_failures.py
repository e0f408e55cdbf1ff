"""NaN, infinity and failing solvers in a run never reach a hyperparameter, are counted, and undo no good training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Container, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints

import hyperopt_implicit as hi
from hyperopt_implicit.errors import HyperoptWarning

from .ridge import TRAINING, VALIDATION, Batch, ridge, training_loss, validation_loss

NAN = float("nan")
SLOW = {"outer_optimizer": torch.optim.SGD, "outer_lr": 1.0}


class Switch:
    """Turns something bad on in some outer steps."""

    def __init__(self, bad: Container[int]) -> None:
        self.bad, self.step = bad, 0

    @property
    def on(self) -> bool:
        return self.step in self.bad

    def callback(self, step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        self.step = step.step + 1


def ever_after(step: int) -> range:
    return range(step, 10**6)


def poisoned_training(switch: Switch, poison: Callable[[Tensor], Tensor]) -> hi.BilevelProblem:
    @hi.hyperparameter("decay", init=1.0, constraint=constraints.positive)
    def loss(model: nn.Module, batch: Batch, *, decay: Tensor) -> Tensor:
        value = training_loss(model, batch, decay=decay)
        return poison(value) if switch.on else value

    return ridge(training_loss=loss)


def poisoned_validation(switch: Switch, poison: Callable[[Tensor], Tensor]) -> hi.BilevelProblem:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        value = validation_loss(model, batch)
        return poison(value) if switch.on else value

    return ridge(validation_loss=loss)


POISONS: dict[str, Callable[[Tensor], Tensor]] = {
    "nan": lambda loss: loss * NAN,
    "infinity": lambda loss: loss / 0.0,
    "nan without gradient": lambda loss: loss * 0.0 + NAN,
    "finite gradient": lambda loss: loss + math.inf,
}


def run(problem: hi.BilevelProblem, backend: Any = "cg", **options: Any) -> hi.Result:
    return hi.optimize(problem, backend, tracking=False, **{"outer_steps": 8, "inner_steps": 3, **SLOW, **options})


def assert_all_finite(result: hi.Result) -> None:
    for each in result.history:
        assert all(math.isfinite(x) for x in each.hyperparameters.values())
    for values in (result.hyperparameters, result.best_hyperparameters):
        assert all(bool(value.isfinite().all()) for value in values.values())
    assert all(bool(p.isfinite().all()) for p in result.problem.params.values())


# ------------------------------------------------------------------------------------------------ a bad stretch


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("where", [poisoned_training, poisoned_validation])
@pytest.mark.parametrize("backend", ["cg", "neumann", "unrolled"])
def test_bad_outer_steps_are_skipped_counted_and_left_behind(
    where: Callable[..., hi.BilevelProblem], poison: str, backend: str
) -> None:
    switch = Switch({3, 4})
    problem = where(switch, POISONS[poison])
    weights: list[Tensor] = []
    callbacks = [switch.callback, lambda step, problem: weights.append(problem.model.weight.detach().clone())]
    with pytest.warns(HyperoptWarning, match="was not applied") as caught:
        result = run(problem, backend, callbacks=callbacks)
    assert len(caught) == 1
    assert_all_finite(result)
    assert [each.applied for each in result.history] == [True] * 3 + [False] * 2 + [True] * 3
    assert [each.status for each in result.history[3:5]] == [hi.Status.NON_FINITE] * 2
    assert result.failed_steps == 2
    decays = [each.hyperparameters["decay"] for each in result.history]
    assert decays[3] == decays[4] == decays[5] != decays[6]
    assert torch.equal(weights[3], weights[2])  # put back to where the last good step ended
    assert torch.equal(weights[4], weights[2])
    assert not torch.equal(weights[5], weights[2])


@pytest.mark.filterwarnings("ignore:training_data is a list")
def test_one_bad_training_batch_is_left_out() -> None:
    x, y = TRAINING
    problem = ridge(training_data=[TRAINING, (x * NAN, y), TRAINING, TRAINING])
    result = run(problem, outer_steps=20)  # three batches are trained on, the fourth gives the Hessian
    assert_all_finite(result)
    assert [each.failed_inner_steps for each in result.history] == [1] * 20
    assert all(each.applied and math.isfinite(each.training_loss) for each in result.history)
    clean = run(ridge(), outer_steps=20, inner_steps=2)
    assert result.hyperparameters["decay"] == clean.hyperparameters["decay"]


@pytest.mark.filterwarnings("ignore:training_data is a list")
def test_bad_batch_does_not_stay_in_running_statistics() -> None:
    x, y = TRAINING
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1), nn.Flatten(0)).double()
    problem = ridge(model=model, training_data=[TRAINING] * 7 + [(x * NAN, y)] + [TRAINING] * 92)
    with pytest.warns(HyperoptWarning, match="non-finite"):
        result = run(problem, {"name": "exact", "damping": 0.1})
    assert_all_finite(result)
    assert result.failed_steps == 1
    assert all(bool(buffer.isfinite().all()) for buffer in model.buffers())


# -------------------------------------------------------------------------------------------------- bad for good


@pytest.mark.parametrize("backend", ["cg", "unrolled"])
def test_run_stops_after_too_many_bad_steps_at_its_last_good_state(backend: str) -> None:
    switch = Switch(ever_after(2))
    problem = poisoned_training(switch, POISONS["nan"])
    good: list[Tensor] = []
    callbacks = [switch.callback, lambda step, problem: good.append(problem.model.weight.detach().clone())]
    with pytest.warns(HyperoptWarning) as caught:
        result = run(problem, backend, outer_steps=50, max_failures=4, callbacks=callbacks)
    assert result.stop_reason == "too many failed steps"
    assert len(result.history) == 6
    assert result.failed_steps == 4
    assert torch.equal(problem.model.weight, good[1])
    assert_all_finite(result)
    assert str(caught[-1].message) == (
        "stopped at outer step 5: 4 outer steps in a row gave a loss or a gradient that was not finite. Model and "
        "hyperparameters are at their last good state. A loss, a product or a gradient was NaN or infinite. Lower the "
        "inner learning rate, clip, or look for a division by zero in the losses."
    )


def test_failures_must_be_in_a_row_to_stop_a_run() -> None:
    switch = Switch({1, 2, 4, 5})
    with pytest.warns(HyperoptWarning, match="non-finite"):
        result = run(poisoned_training(switch, POISONS["nan"]), max_failures=3, callbacks=[switch.callback])
    assert result.stop_reason == "all outer steps done"


def test_exploding_weights_are_put_back() -> None:
    problem = ridge(optimizer=lambda params: torch.optim.SGD(params, lr=1e200))
    with pytest.warns(HyperoptWarning):
        result = run(problem, outer_steps=20, inner_steps=10, max_failures=3)
    assert result.stop_reason == "too many failed steps"
    assert_all_finite(result)
    assert torch.equal(problem.model.weight, torch.zeros(3, dtype=torch.float64))
    assert result.hyperparameters["decay"].item() == 1.0


def test_warmup_counts_as_good() -> None:
    switch = Switch(ever_after(1))
    problem = poisoned_validation(switch, POISONS["nan"])
    warm: list[Tensor] = []

    class Data:
        """Turns the poison on when the warm-up is over."""

        def __iter__(self) -> Iterator[Batch]:
            for count in itertools.count():
                if count == 21:
                    switch.step = 1
                    warm.append(problem.model.weight.detach().clone())
                yield TRAINING

    problem.training_data = Data()
    with pytest.warns(HyperoptWarning):
        run(problem, warmup_steps=21, max_failures=1)
    assert torch.equal(problem.model.weight, warm[0])
    assert not torch.equal(warm[0], torch.zeros_like(warm[0]))


# --------------------------------------------------------------------------------------------------- hypergradients


def bad_direct_term() -> hi.BilevelProblem:
    """F is finite and its derivative is not: √0."""

    def loss(model: nn.Module, batch: Batch, *, decay: Tensor) -> Tensor:
        return validation_loss(model, batch) + (decay - decay.detach()).sqrt() * 0.0

    return ridge(validation_loss=loss)


def test_hypergradient_that_is_not_finite_is_not_applied() -> None:
    with pytest.warns(HyperoptWarning):
        result = run(bad_direct_term(), max_failures=5)
    assert result.stop_reason == "too many failed steps"
    assert result.hyperparameters["decay"].item() == 1.0
    assert not any(each.applied for each in result.history)
    assert math.isfinite(result.best_validation_loss)


def test_raise_raises_and_leaves_the_last_good_state() -> None:
    switch = Switch(ever_after(2))
    problem = poisoned_validation(switch, POISONS["nan"])
    good: list[Tensor] = []
    callbacks = [switch.callback, lambda step, problem: good.append(problem.model.weight.detach().clone())]
    with pytest.raises(hi.HypergradientError, match=r"^hypergradient: non-finite after 0 iterations"):
        run(problem, on_failure="raise", callbacks=callbacks)
    assert len(good) == 2
    assert torch.equal(problem.model.weight, good[1])


DIVERGING = {"name": "neumann", "step_size": 100.0}


def test_failed_solution_is_used_and_warned_of_once() -> None:
    with pytest.warns(HyperoptWarning, match=r"^hypergradient: diverged .* It was used;") as caught:
        result = run(ridge(), DIVERGING)
    assert len(caught) == 1
    assert all(each.status is hi.Status.DIVERGED and each.applied for each in result.history)


def test_failed_solution_is_skipped() -> None:
    with pytest.warns(HyperoptWarning, match=r"^hypergradient: diverged .* It was not applied;"):
        result = run(ridge(), DIVERGING, on_failure="skip")
    assert result.hyperparameters["decay"].item() == 1.0
    assert result.failed_steps == 8
    assert result.stop_reason == "all outer steps done"  # the losses were sound: training went on


def test_failed_solution_raises() -> None:
    with pytest.raises(hi.HypergradientError, match=r"^hypergradient: diverged after .* Use a smaller step size"):
        run(ridge(), DIVERGING, on_failure="raise")


@pytest.mark.parametrize("outer_lr", [1e6, 1e300])
def test_outer_step_onto_an_edge_or_out_of_the_numbers_is_taken_back(outer_lr: float) -> None:
    said = "the outer step moved a hyperparameter out of the numbers, or onto the edge of its constraint."
    with pytest.warns(HyperoptWarning, match=said) as caught:
        result = run(ridge(), outer_lr=outer_lr)  # exp(−1e5) is zero
    assert len(caught) == 1
    assert [each.applied for each in result.history] == [False] * 8
    assert result.hyperparameters["decay"].item() == 1.0
    with pytest.raises(hi.HypergradientError, match=said):
        run(ridge(), outer_lr=outer_lr, on_failure="raise")


def test_own_loop_is_protected_too() -> None:
    problem = bad_direct_term()
    outer = hi.HyperOptimizer(problem, torch.optim.Adam, lr=0.1)
    with pytest.warns(HyperoptWarning, match="non-finite"):
        report = outer.step(TRAINING, VALIDATION)
    assert report.status is hi.Status.NON_FINITE
    assert problem.hparams["decay"].item() == 0.0
    assert outer.optimizer.state_dict()["state"] == {}
