"""Problems on which ``auto`` is watched over many calls, and what it says that it took."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

import hyperopt_implicit as hi
from hyperopt_implicit.backend import Hypergradient, State
from hyperopt_implicit.survey import Costs
from hyperopt_implicit.testing.specimens import (
    Linear,
    quadratic_problem,
    ridge_problem,
)
from hyperopt_implicit_backends import Auto

from .matrices import spread, with_spectrum

SIZE = 12
DEFINITE = with_spectrum(spread(0.5, 5.0, SIZE))
INDEFINITE = with_spectrum([-0.4, *spread(0.5, 5.0, SIZE - 1)])
IDENTITY = torch.eye(SIZE, dtype=torch.float64)
COSTS = Costs(seconds=1.0, validation=1.0, graph=1.0, product=1.0, mixed=1.0)


def method(result: Hypergradient) -> str:
    """What the note says was taken."""
    assert result.note is not None
    return result.note.removeprefix("auto takes ").split()[0].rstrip(":")


class Moving:
    """L = ½ wᵀHw − shiftᵀw and F = ½‖w − 1‖², so that dF/dshift = u = H⁻¹(w − 1); w goes around an ellipse."""

    def __init__(self, matrix: Tensor, backend: Auto, *, turn: float = 0.0, reach: float = 1.0) -> None:
        self.matrix = matrix.clone()
        self.problem = quadratic_problem(self.matrix)
        self.backend, self.turn, self.reach = backend, turn, reach
        self.angle, self.state = 0.0, {}
        self.one, self.other = (torch.cos(k * torch.arange(1, len(matrix) + 1, dtype=torch.float64)) for k in (1, 2))

    def step(self) -> Hypergradient:
        v = self.reach * (math.cos(self.angle) * self.one + math.sin(self.angle) * self.other)
        self.problem.model.weight.data.copy_(1.0 + v)
        result = self.backend.hypergradient(self.problem, [None], None, self.state)
        self.angle += self.turn
        self.state = result.state
        self.truth = torch.linalg.solve(self.matrix, v)
        self.error = float((result.gradients["shift"] - self.truth).norm() / self.truth.norm())
        return result

    def steps(self, count: int) -> list[Hypergradient]:
        return [self.step() for _ in range(count)]


def with_costs(state: State, **costs: float) -> State:
    """A state of which the plan says that the parts cost this, and otherwise 1 g each."""
    plan = {**state["plan"], "costs": dataclasses.replace(COSTS, **costs).state()}
    return {**state, "plan": plan}


def dropout_problem() -> hi.BilevelProblem:
    return ridge_problem(nn.Sequential(Linear(4), nn.Dropout(0.2)), validation_loss=offset)


def offset(model: nn.Module, batch: Any) -> Tensor:
    """F that has a gradient at w = 0 too."""
    x, y = batch
    return 0.5 * (model(x) - y).square().mean()


def budgeted(budget: float | None, turn: float = 0.4, steps: int = 60, **costs: float) -> tuple[Moving, list]:
    """A system that moves too fast for heavy_ball, on which the parts cost 1 g each."""
    run = Moving(with_spectrum(spread(0.02, 5.0, SIZE)), Auto(budget=budget), turn=turn)
    results = run.steps(1)
    run.state = with_costs(run.state, **costs)
    return run, results + run.steps(steps - 1)
