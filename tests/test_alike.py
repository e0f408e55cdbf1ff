"""What two problems must have in common to be computed as one, and the words for what they have not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints

import hyperopt_implicit as hi
from hyperopt_implicit.alike import describe, difference, explained
from hyperopt_implicit.hyperparameters import hyperparameter

from .populations import member, perceptron, training_loss


def reason(first: hi.BilevelProblem, second: hi.BilevelProblem) -> str | None:
    return difference(describe(first), describe(second))


def closing_over(value: Any) -> hi.BilevelProblem:
    """A problem whose loss uses a value from outside."""

    @hyperparameter("decay", init=0.1)
    def loss(model: nn.Module, batch: Any, *, decay: Tensor) -> Tensor:
        return model(batch[0]).square().mean() * decay, value  # type: ignore[return-value]

    return member(0, training_loss=loss)


class Settings:
    """An object of somebody's own."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def loss(self, model: nn.Module, batch: Any, *, decay: Tensor) -> Tensor:
        return self.rate * model(batch[0]).square().mean() * decay


def test_members_that_differ_in_values_only_are_alike() -> None:
    """Weights, hyperparameters, learning rates, and batches of the same kind."""
    first, second = member(0), member(1, training_data=[(x + 1, y) for x, y in member(0).training_data or []])
    second.hyperparameters.load_values({"decay": torch.tensor([0.5, 0.6])})
    assert reason(first, second) is None


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        ((lambda: perceptron(5), lambda: perceptron(6)), "shape of '0.weight': (5, 6) and (6, 6)"),
        (
            (lambda: perceptron(5, nn.Dropout(0.1)), lambda: perceptron(5, nn.Dropout(0.2))),
            "'p' of module '1': 0.1 and 0.2",
        ),
        (
            (lambda: perceptron(5, nn.LayerNorm(5)), lambda: perceptron(5, nn.LayerNorm(5, eps=1e-3))),
            "'eps' of module '1': 1e-05 and 0.001",
        ),
        ((lambda: perceptron(5, nn.ReLU()), lambda: perceptron(5, nn.GELU())), "type of module '1': ReLU and GELU"),
        ((lambda: perceptron(5), lambda: perceptron(5).float()), "dtype of '0.weight'"),
        ((lambda: perceptron(5), lambda: perceptron(5).eval()), "mode of the model: 'train' and 'eval'"),
    ],
    ids=["shape", "dropout", "eps", "type", "dtype", "mode"],
)
def test_models(models: tuple[Callable[[], nn.Module], Callable[[], nn.Module]], expected: str) -> None:
    found = reason(*(member(0, model=each) for each in models))
    assert found is not None and found.startswith(expected), found


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (0.1, 0.2),
        ([1, 2], [1, 3]),
        ({"a": 1}, {"a": 2}),
        (torch.tensor([1.0]), torch.tensor([2.0])),
        (Settings(0.1), Settings(0.2)),
        (functools.partial(max, 1), functools.partial(max, 2)),
        (nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2).requires_grad_(False)),
        (closing_over.__get__(0.1), closing_over.__get__(0.2)),
        (torch.Generator(), torch.Generator()),
        (1, 1.0),
        (True, 1),
    ],
    ids=lambda each: type(each).__name__,
)
def test_what_losses_close_over_makes_a_difference(first: Any, second: Any) -> None:
    found = reason(closing_over(first), closing_over(second))
    assert found is not None and found.startswith("variable 'value' of training_loss")
    assert reason(closing_over(first), closing_over(first)) is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: 0.1,
        lambda: float("nan"),
        lambda: [1, {"a": (2, None)}],
        lambda: torch.ones(3),
        lambda: Settings(0.1),
        lambda: functools.partial(max, 1),
        lambda: {3, 1, 2},
        lambda: nn.Dropout(0.2),
        lambda: torch.relu,
    ],
)
def test_equal_values_make_none(make: Callable[[], Any]) -> None:
    assert reason(closing_over(make()), closing_over(make())) is None


def test_bound_methods_defaults_and_code() -> None:
    def problem(loss: Any) -> hi.BilevelProblem:
        return member(0, training_loss=hyperparameter("decay", init=0.1)(loss))

    assert reason(problem(Settings(0.1).loss), problem(Settings(0.1).loss)) is None
    assert reason(problem(Settings(0.1).loss), problem(Settings(0.2).loss)) is not None

    def default(rate: float) -> Any:
        def loss(model: nn.Module, batch: Any, *, decay: Tensor, rate: float = rate) -> Tensor:
            return rate * model(batch[0]).square().mean() * decay

        return loss

    assert reason(problem(default(0.1)), problem(default(0.1))) is None
    assert "defaults of training_loss" in (reason(problem(default(0.1)), problem(default(0.2))) or "")
    assert "code of training_loss" in (
        reason(
            problem(lambda model, batch, *, decay: decay * model(batch[0]).sum()),
            problem(lambda model, batch, *, decay: decay * model(batch[0]).mean()),
        )
        or ""
    )


def test_a_closure_that_holds_the_model_is_the_same_for_all() -> None:
    """With other tensors in its modules, the first member's model stands for that of any other."""

    def problem(i: int) -> hi.BilevelProblem:
        torch.manual_seed(i)
        model = perceptron()

        @hyperparameter("decay", init=0.1)
        def loss(_: nn.Module, batch: Any, *, decay: Tensor) -> Tensor:
            return model(batch[0]).square().mean() * decay + model[0].weight.sum()

        return member(i, model=lambda: model, training_loss=loss)

    assert reason(problem(0), problem(1)) is None


def test_declarations() -> None:
    def problem(constraint: Any) -> hi.BilevelProblem:
        @hyperparameter("decay", init=0.1, constraint=constraint)
        def loss(model: nn.Module, batch: Any, *, decay: Tensor) -> Tensor:
            return model(batch[0]).square().mean() * decay

        return member(0, training_loss=loss)

    assert reason(problem(constraints.interval(0.0, 1.0)), problem(constraints.interval(0.0, 1.0))) is None
    found = reason(problem(constraints.interval(0.0, 1.0)), problem(constraints.interval(0.0, 2.0)))
    assert found is not None and found.startswith("constraint of hyperparameter 'decay'")


def test_parametrizations_and_hooks_of_the_same_kind() -> None:
    def problem(i: int, parametrized: bool) -> hi.BilevelProblem:
        model = perceptron()
        if parametrized:
            nn.utils.parametrizations.orthogonal(model[0])
        model[1].register_forward_hook(_hook)
        return member(i, model=lambda: model)

    assert reason(problem(0, False), problem(1, False)) is None
    assert reason(problem(0, True), problem(1, True)) is None


def _hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
    pass


def test_the_knob_that_explains_a_difference() -> None:
    knobs = [{"lr": 0.1, "width": 5}, {"lr": 0.2, "width": 7}, {"lr": 0.3, "width": 5}]
    groups = [[0, 2], [1]]
    assert explained("shape of '0.weight': (5, 6) and (7, 6)", groups, knobs) == (
        "knob 'width' changes the shape of '0.weight': trials are grouped by it"
    )
    assert explained("mode of the model: 'train' and 'eval'", groups, []).endswith("'train' and 'eval'")
    same = [{"lr": 0.1}, {"lr": 0.1}, {"lr": 0.1}]
    assert "knob" not in explained("mode of the model: 'train' and 'eval'", groups, same)
    assert training_loss is not None
