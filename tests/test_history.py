"""What a run leaves behind: its records, as a table too, and the numbers that stand for a hyperparameter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import hyperopt_implicit as hi
from hyperopt_implicit import figures
from hyperopt_implicit.history import summarise

from .ridge import Weights, ridge


def test_history_becomes_a_table() -> None:
    result = hi.optimize(ridge(), "cg", outer_steps=4, inner_steps=2, tracking=False)
    frame = result.history.to_dataframe()
    assert list(frame.columns) == [
        "step",
        "training_loss",
        "validation_loss",
        "validation_loss_sweep",
        "hypergradient_norm",
        "status",
        "iterations",
        "residual",
        "hvps",
        "applied",
        "failed_inner_steps",
        "inner_seconds",
        "outer_seconds",
        "hyperparameter/decay",
    ]
    assert frame["step"].tolist() == [0, 1, 2, 3]
    assert frame["status"].tolist() == [each.status.value for each in result.history]
    assert {type(each) for each in frame["status"]} == {str}
    assert frame["hyperparameter/decay"].tolist() == [each.hyperparameters["decay"] for each in result.history]
    assert frame["hyperparameter/decay"][0] == 1.0
    assert (frame["hvps"] > 0).all()
    assert (frame[["inner_seconds", "outer_seconds"]] > 0).all(axis=None)
    assert hi.History().to_dataframe().empty


def test_history_is_a_sequence() -> None:
    history = hi.optimize(ridge(), outer_steps=3, tracking=False).history
    assert len(history) == 3
    assert history[-1].step == 2
    assert [each.step for each in history[1:]] == [1, 2]
    assert [each.step for each in history] == [0, 1, 2]


def test_history_that_comes_back_is_the_same_and_grows() -> None:
    (first,) = hi.optimize(ridge(), outer_steps=1, tracking=False).history
    other = replace(first, step=1, hyperparameters={"a": 1.0, "b": 2.0}, note="look", residual=None)
    steps = [first, other, replace(first, step=2, note="again")]
    history, again = hi.History(), hi.History()
    for each in steps:
        history.append(each)
    state = history.state_dict()
    history._numbers[2] = 7.0  # the state is a copy
    again.load_state_dict(state)
    history.append(replace(first, step=3))
    assert list(again) == steps
    again.append(replace(other, step=3))
    assert again.notes == {1: "look", 2: "again", 3: "look"}
    assert [len(each) for each in again.state_dict()["names"]] == [1, 2]  # kept once, and not for each step


def test_result_says_where_it_ended() -> None:
    problem = ridge()
    result = hi.optimize(problem, outer_steps=3, tracking=False)
    assert result.problem is problem
    assert torch.equal(result.hyperparameters["decay"], problem.hyperparameters()["decay"].detach())
    assert result.validation_loss == result.history[-1].validation_loss_sweep
    assert result.best_validation_loss == min(each.validation_loss_sweep for each in result.history)
    assert result.history[result.best_step or 0].hyperparameters["decay"] == pytest.approx(
        result.best_hyperparameters["decay"].item()
    )
    assert result.seconds == pytest.approx(sum(s.inner_seconds + s.outer_seconds for s in result.history))
    assert (result.run_id, result.run_link, result.failed_steps) == (None, None, 0)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor(2.5), {"h": 2.5}),
        (torch.tensor([2.5]), {"h": 2.5}),
        (torch.tensor([[1.0, 2.0], [3.0, 4.0]]), {"h/0": 1.0, "h/1": 2.0, "h/2": 3.0, "h/3": 4.0}),
        (torch.arange(20.0), {f"h/{i}": float(i) for i in range(20)}),
        (torch.arange(21.0), {"h/min": 0.0, "h/mean": 10.0, "h/max": 20.0}),
    ],
    ids=["number", "one element", "matrix", "20 elements", "21 elements"],
)
def test_numbers_that_stand_for_a_tensor(value: Tensor, expected: dict[str, float]) -> None:
    assert summarise({"h": value}) == expected


def test_numbers_that_stand_for_a_module() -> None:
    module = nn.Linear(2, 1)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[-1.0, 3.0]]))
        module.bias.fill_(4.0)
    assert summarise({"net": module}) == {"net/min": -1.0, "net/mean": 2.0, "net/max": 4.0}


def test_figures_show_every_hyperparameter() -> None:
    @hi.hyperparameter("decay", init=lambda model: torch.full_like(model.weight, 0.1))
    @hi.hyperparameter("large", init=torch.linspace(0.0, 1.0, 30))
    def training_loss(model: Weights, batch: object, *, decay: Tensor, large: Tensor) -> Tensor:
        return (decay * model.weight.square()).sum() + ((model.weight - 1.0).square() * large.sum()).sum()

    result = hi.optimize(
        ridge(training_loss=training_loss, optimizer=lambda params: torch.optim.SGD(params, lr=0.01)),
        outer_steps=3,
        tracking=False,
    )
    axes = [ax for ax in figures.trajectories(result.history).axes if ax.get_visible()]
    assert [ax.get_title() for ax in axes] == ["loss", "hypergradient", "decay", "large"]
    assert [line.get_label() for line in axes[2].lines] == ["0", "1", "2"]
    assert [line.get_label() for line in axes[3].lines] == ["min", "mean", "max"]
    assert all(line.get_xdata().tolist() == [0, 1, 2] for ax in axes for line in ax.lines)
    (histogram,) = figures.histograms(result.hyperparameters).axes
    assert histogram.get_title() == "large (30 elements)"
    assert figures.histograms({"decay": result.hyperparameters["decay"]}) is None


def test_elements_are_shown_by_their_names() -> None:
    values = {"weights": torch.tensor([1.0, 2.0]), "other": torch.tensor([3.0, 4.0])}
    expected = {"weights/rotation": 1.0, "weights/parity": 2.0, "other/0": 3.0, "other/1": 4.0}
    assert summarise(values, {"weights": ("rotation", "parity")}) == expected


def test_records_of_a_run_have_the_names_of_the_declaration() -> None:
    @hi.hyperparameter("shifts", init=torch.zeros(2), elements=["up", "down"])
    def training_loss(model: torch.nn.Module, batch: int, *, shifts: torch.Tensor) -> torch.Tensor:
        return (model.weight - shifts).square().sum()

    problem = hi.BilevelProblem(
        torch.nn.Linear(2, 1, bias=False),
        training_loss,
        lambda model, batch: model.weight.square().sum(),
        training_data=[0],
        validation_data=[0],
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    )
    history = hi.optimize(problem, "cg", outer_steps=1, tracking=False).history
    assert history[0].hyperparameters == {"shifts/up": 0.0, "shifts/down": 0.0}
