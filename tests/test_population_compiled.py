"""Populations whose computation is compiled: the same results, for members that stay and for those that leave."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import constraints

import hyperopt_implicit as hi
from hyperopt_implicit import members_compiled

from .populations import Batch, assert_same, member, perceptron, together_and_alone

pytestmark = pytest.mark.filterwarnings("ignore:hypergradient:hyperopt_implicit.HyperoptWarning")


@hi.hyperparameter("decay", init=1e-2, constraint=constraints.positive)
@hi.hyperparameter("network", init=lambda model: nn.Linear(3, 1))
def _loss(model: nn.Module, batch: Batch, *, decay: Tensor, network: nn.Module) -> Tensor:
    x, y = batch
    out = model(x)
    weights = torch.sigmoid(network(out.detach())).squeeze(1)
    return (weights * F.cross_entropy(out, y, reduction="none")).mean() + decay * model[0].weight.square().sum()


def _halves(i: int) -> hi.BilevelProblem:
    return member(
        i,
        model=lambda: perceptron(5, nn.BatchNorm1d(5)),
        training_loss=_loss,
        optimizer=lambda params, i: torch.optim.SGD(params, lr=0.1, momentum=0.5, weight_decay=0.01 * i),
    )


def test_members_come_to_the_same_and_may_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first member leaves after two steps, and its place is kept: nothing is compiled anew for those that stay."""
    made: list[str] = []
    compile_half = members_compiled.compile_half
    monkeypatch.setattr(members_compiled, "compile_half", lambda *a: made.append("part") or compile_half(*a))

    def callbacks(i: int) -> list[Any]:
        return [lambda step, problem: (i, step.step) == (0, 1)]

    options: dict[str, Any] = {"outer_steps": 4, "inner_steps": 4, "outer_lr": 0.05, "keep_best_model": True}
    backend = {"name": "heavy_ball", "damping": 0.5}
    _, alone = together_and_alone(_halves, backend, callbacks=callbacks, **options)
    compiled = hi.optimize_population(
        [_halves(i) for i in range(3)],
        backend,
        seeds=[0, 1, 2],
        callbacks=[callbacks(i) for i in range(3)],
        compile=True,
        **options,
    )
    assert compiled.groups == [[0, 1, 2]]
    assert [len(each.history) for each in alone] == [2, 4, 4]
    assert_same(compiled, alone)
    assert len(made) == 2  # the step and the gradients of F; the halves of the product are their own


def test_what_cannot_be_traced_is_computed_without_compiling() -> None:
    calls = 0

    @hi.hyperparameter("decay", init=1e-2, constraint=constraints.positive)
    def counting(model: nn.Module, batch: Batch, *, decay: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        x, y = batch
        rate = float(torch.ones(()).double() + decay.detach().numel())  # a value that a trace does not have
        return rate * F.cross_entropy(model(x), y) + decay * model[0].weight.square().sum()

    def make(i: int) -> hi.BilevelProblem:
        return member(i, training_loss=counting)

    options: dict[str, Any] = {"outer_steps": 2, "inner_steps": 4, "outer_lr": 0.05}
    _, alone = together_and_alone(make, {"name": "cg", "damping": 0.5}, 2, keep_best_model=False, **options)
    with pytest.warns(hi.HyperoptWarning, match=r"compile=True needs losses .* Nothing is compiled") as caught:
        found = hi.optimize_population(
            [make(i) for i in range(2)], {"name": "cg", "damping": 0.5}, seeds=[0, 1], compile=True, **options
        )
    assert "test_population_compiled.py:" in str(caught[0].message)
    assert found.groups == [[0, 1]]
    assert_same(found, alone)
