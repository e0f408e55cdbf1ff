"""Knobs on a builder: their order, and that the builder stays the function it was."""

from __future__ import annotations

from typing import Any

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

import hyperopt_implicit as hi

LR, WIDTH = FloatDistribution(1e-3, 1.0, log=True), IntDistribution(1, 8)


@hi.knob("lr", LR)
@hi.knob("width", WIDTH)
def builder(depth: int = 2, *, lr: float, width: int) -> Any:
    """Builds."""
    return depth, lr, width


def test_builder_stays_an_ordinary_function() -> None:
    assert builder(lr=0.1, width=3) == (2, 0.1, 3)
    assert builder.__name__ == "builder"
    assert builder.__doc__ == "Builds."


def test_knobs_from_the_top_decorator_down() -> None:
    assert [(each.name, each.distribution) for each in hi.knobs_of(builder)] == [("lr", LR), ("width", WIDTH)]
    assert hi.knobs_of(lambda: None) == ()


def test_builder_that_takes_any_keyword_takes_any_knob() -> None:
    @hi.knob("activation", CategoricalDistribution(["relu", "tanh"]))
    def flexible(**knobs: Any) -> Any:
        return knobs

    assert [each.name for each in hi.knobs_of(flexible)] == ["activation"]


def test_positional_keyword_can_be_a_knob() -> None:
    tuned = hi.knob("depth", IntDistribution(1, 3))(lambda depth: depth)
    assert [each.name for each in hi.knobs_of(tuned)] == ["depth"]
