"""What a population cannot train together: it says why, runs one by one, and comes to the same; and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import constraints

import hyperopt_implicit as hi
from hyperopt_implicit import population as population_module
from hyperopt_implicit.backends import Neumann
from hyperopt_implicit.implicit import Solution
from hyperopt_implicit.members import Members, UnvectorisableError
from hyperopt_implicit.operators import LinearOperator
from hyperopt_implicit.population_check import check_members
from hyperopt_implicit.population_choice import measured_speedup

from .populations import TRAINING, Batch, assert_same, member, perceptron, together_and_alone

pytestmark = pytest.mark.filterwarnings("ignore::hyperopt_implicit.HyperoptWarning")


class Terse(Neumann):
    """A stranger's method, which inherits a solver for many that is not its own."""

    def solve(self, operator: LinearOperator, vector: hi.Params, state: hi.State, /) -> Solution:
        found = super().solve(operator, vector, state)
        return Solution({name: 0.5 * x for name, x in found.value.items()}, *list(vars(found).values())[1:])


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        ({"name": "unrolled"}, "differentiates through training"),
        ({"name": "minres"}, "no solver for many"),
        ({"name": "neumann", "curvature": "gauss_newton"}, "curvature='gauss_newton'"),
        (Terse(), "no solver for many"),
    ],
    ids=lambda x: str(x),
)
def test_backends_without_a_solver_for_many(backend: Any, reason: str) -> None:
    population, alone = together_and_alone(member, backend, 2, outer_steps=3, inner_steps=2)
    assert population.groups == [[0], [1]]
    assert len(population.notes) == 1 and reason in population.notes[0]
    assert_same(population, alone, rtol=0)


def test_bfloat16_runs_one_by_one() -> None:
    def make(i: int) -> hi.BilevelProblem:
        problem = member(i)
        problem.model.float()
        problem.hyperparameters.float()
        data = [(x.float(), y) for x, y in TRAINING]
        return hi.BilevelProblem(
            problem.model,
            _plain,
            _plain_validation,
            training_data=data,
            validation_data=data[:1],
            optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        )

    found = hi.optimize_population(
        [make(i) for i in range(2)], {"name": "neumann", "precision": "bfloat16"}, outer_steps=2, inner_steps=4
    )
    assert found.groups == [[0], [1]]
    assert "precision='bfloat16'" in found.notes[0]


@hi.hyperparameter("decay", init=1e-2, constraint=constraints.positive)
def _plain(model: nn.Module, batch: Batch, *, decay: Tensor) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y) + decay * model[0].weight.square().sum()


def _plain_validation(model: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


class Branching(nn.Module):
    """Goes by the values of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else 0.5 * x


class Recurrent(nn.Module):
    """A recurrent layer over the features."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(1, 4, batch_first=True)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x.unsqueeze(2))[0][:, -1])


class Replacing(nn.Module):
    """Puts a new tensor in the place of its buffer at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
        return x - self.mean


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: perceptron(5, Branching()), "module '1' (Branching)"),
        (lambda: Recurrent().double(), "LSTM"),
        (lambda: perceptron(5, Replacing()), "in the place of a buffer"),
    ],
    ids=["data-dependent", "recurrent", "replaced buffer"],
)
def test_models_that_torch_does_not_vectorise(model: Callable[[], nn.Module], reason: str) -> None:
    population, alone = together_and_alone(
        lambda i: member(i, model=model, training_loss=_first_decay), "cg", 2, outer_steps=3
    )
    assert population.groups == [[0], [1]]
    assert len(population.notes) == 1 and reason in population.notes[0], population.notes
    assert_same(population, alone, rtol=0)
    for outcome in population.outcomes:
        assert isinstance(outcome, hi.Result)
        for p in outcome.problem.params.values():
            assert p.untyped_storage().nbytes() == p.numel() * 8  # no slices of stacks any more


@hi.hyperparameter("decay", init=1e-2, constraint=constraints.positive)
def _first_decay(model: nn.Module, batch: Batch, *, decay: Tensor) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y) + decay * next(model.parameters()).square().sum()


def test_widths_make_groups_and_the_note_names_the_knob() -> None:
    widths = [5, 7, 5, 7]
    found = hi.optimize_population(
        [member(i, model=lambda w=w: perceptron(w)) for i, w in enumerate(widths)],
        knobs=[{"inner_lr": 0.1 + 0.02 * i, "width": w} for i, w in enumerate(widths)],
        outer_steps=2,
    )
    assert found.groups == [[0, 2], [1, 3]]
    assert found.notes == ["knob 'width' changes the shape of '0.weight': trials are grouped by it"]


def test_a_difference_without_knobs_is_told_by_itself() -> None:
    found = hi.optimize_population(
        [member(i, model=lambda i=i: perceptron(5, nn.Dropout(0.1 * i))) for i in range(2)], outer_steps=2
    )
    assert found.groups == [[0], [1]]
    assert len(found.notes) == 1 and "'p' of module '1': 0.0 and 0.1" in found.notes[0]


def test_a_loss_that_closes_over_a_number_of_its_own() -> None:
    """To evaluate the first member's loss for all of them would be silently wrong."""

    def make(i: int) -> hi.BilevelProblem:
        smoothing = [0.0, 0.3, 0.0][i]

        @hi.hyperparameter("decay", init=1e-2, constraint=constraints.positive)
        def loss(model: nn.Module, batch: Batch, *, decay: Tensor) -> Tensor:
            x, y = batch
            return F.cross_entropy(model(x), y, label_smoothing=smoothing) + decay * model[0].weight.square().sum()

        return member(i, training_loss=loss)

    population, alone = together_and_alone(make)
    assert population.groups == [[0, 2], [1]]
    assert "variable 'smoothing' of training_loss: 0.0 and 0.3" in population.notes[0]
    assert_same(population, alone)


def test_a_loss_that_uses_a_parameter_past_the_model() -> None:
    def make(i: int) -> hi.BilevelProblem:
        torch.manual_seed(0)
        model = perceptron()
        weight = model[0].weight

        @hi.hyperparameter("decay", init=1e-2, constraint=constraints.positive)
        def loss(model: nn.Module, batch: Batch, *, decay: Tensor) -> Tensor:
            x, y = batch
            return F.cross_entropy(model(x), y) + decay * weight.square().sum()

        return member(i, model=lambda: model, training_loss=loss)

    found = hi.optimize_population([make(i) for i in range(2)], outer_steps=2)
    assert found.groups == [[0], [1]]
    assert "variable 'weight' of training_loss" in found.notes[0]


def test_what_comes_out_otherwise_among_others_is_found() -> None:
    """A loss that torch vectorises, but not to the same values."""

    @hi.hyperparameter("decay", init=1e-2, constraint=constraints.positive)
    def loss(model: nn.Module, batch: Batch, *, decay: Tensor) -> Tensor:
        x, y = batch
        factor = 1.5 if torch._C._functorch.is_batchedtensor(model[0].weight) else 1.0
        return factor * F.cross_entropy(model(x), y) + decay * model[0].weight.square().sum()

    population, alone = together_and_alone(lambda i: member(i, training_loss=loss), "cg", 2)
    assert population.groups == [[0], [1]]
    assert "the training loss of one member comes out as" in population.notes[0]
    assert_same(population, alone, rtol=0)


def test_dropout_is_drawn_by_each_member() -> None:
    """Members that are the same but for their masks come to different weights; with a seed, to the same each time."""

    def make(_: int) -> hi.BilevelProblem:
        return member(0, model=lambda: perceptron(5, nn.Dropout(0.5)))

    def weights() -> list[Tensor]:
        problems = [make(i) for i in range(3)]
        before = torch.get_rng_state()
        found = hi.optimize_population(problems, seeds=[0, 1, 2], outer_steps=2)
        assert torch.equal(torch.get_rng_state(), before)
        assert found.groups == [[0, 1, 2]]
        assert len(found.notes) == 1 and "draws random numbers" in found.notes[0]
        results = [each for each in found.outcomes if isinstance(each, hi.Result)]
        return [each.problem.params["0.weight"].detach() for each in results]

    first, second = weights(), weights()
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)


def test_trying_and_measuring_change_nothing() -> None:
    """Neither the generators, though the losses draw, nor weights and running statistics."""
    members = Members(
        [
            member(i, model=lambda: perceptron(5, nn.BatchNorm1d(5), nn.Dropout(0.5)), training_loss=_first_decay)
            for i in range(2)
        ]
    )
    refused = Members(
        [
            member(i, model=lambda: perceptron(5, nn.Dropout(0.5), Branching()), training_loss=_first_decay)
            for i in range(2)
        ]
    )
    before = [{name: x.clone() for name, x in each.model.state_dict().items()} for each in members.problems]
    state = torch.get_rng_state()
    assert check_members(members, [TRAINING[0]] * 2, [TRAINING[1]] * 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert measured_speedup(members, [TRAINING[0]] * 2, 4) > 0
    assert torch.equal(torch.get_rng_state(), state)
    for each, was in zip(members.problems, before, strict=True):
        for name, x in each.model.state_dict().items():
            assert torch.equal(x, was[name]), name
    with pytest.raises(UnvectorisableError, match="Branching"):
        check_members(refused, [TRAINING[0]] * 2, [TRAINING[1]] * 2)
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------------------------------------------------- auto


@pytest.mark.parametrize("speedup", [0.8, 3.0])
def test_auto_goes_by_what_it_measures(speedup: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(population_module, "measured_speedup", lambda *arguments: speedup)
    population, alone = together_and_alone(member, vectorise="auto")
    assert population.speedup == speedup
    assert population.groups == ([[0], [1], [2]] if speedup < 1 else [[0, 1, 2]])
    assert len(population.notes) == (speedup < 1)
    assert_same(population, alone, rtol=0 if speedup < 1 else 1e-9)


def test_members_that_run_one_by_one_after_all_go_back_from_steps_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copies to go back to are their own again."""
    monkeypatch.setattr(population_module, "measured_speedup", lambda *arguments: 0.8)

    def make(i: int) -> hi.BilevelProblem:
        data = [(x.clone(), y) for x, y in TRAINING]
        data[2][0][0, 0] = float("nan")
        return member(i, training_data=data)

    population, alone = together_and_alone(make, vectorise="auto")
    assert all(sum(step.failed_inner_steps for step in each.history) > 0 for each in alone)
    assert population.groups == [[0], [1], [2]]
    assert_same(population, alone, rtol=0)


def test_auto_leaves_members_and_generators_as_they_were() -> None:
    """Measured for real: what the members come to is what they come to alone, running statistics included."""
    population, alone = together_and_alone(
        lambda i: member(i, model=lambda: perceptron(5, nn.BatchNorm1d(5)), training_loss=_first_decay),
        vectorise="auto",
        seeds=[None, None, None],
    )
    assert population.speedup is not None and population.speedup > 0
    assert_same(population, alone)


def test_auto_gains_on_many_small_members() -> None:
    found = hi.optimize_population([member(i) for i in range(16)], outer_steps=1, vectorise="auto")
    assert found.speedup is not None and found.speedup > 1.5
    assert len(found.groups) == 1


# ------------------------------------------------------------------------------------------------- refusals, trackers


def test_problems_that_share_a_model_are_refused() -> None:
    model = perceptron()
    with pytest.raises(hi.HyperoptError, match="a model of its own; problems 0 and 1 train the same tensors"):
        hi.optimize_population([member(i, model=lambda: model) for i in range(2)])


def test_one_entry_for_each_member() -> None:
    with pytest.raises(hi.HyperoptError, match="seeds must have one entry for each of the 2 problems; it has 3"):
        hi.optimize_population([member(i) for i in range(2)], seeds=[1, 2, 3])
    with pytest.raises(hi.HyperoptError, match="vectorise must be 'auto' or 'always'"):
        hi.optimize_population([member(0)], vectorise="never")  # type: ignore[arg-type]


def test_what_no_member_can_do_is_raised() -> None:
    @hi.hyperparameter("lr", init=0.1, target="optimizer")
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(x), y)

    with pytest.raises(hi.BackendError, match="'lr' is a hyperparameter of the inner optimizer"):
        hi.optimize_population([member(i, training_loss=loss) for i in range(2)], "cg")


def test_an_error_of_a_callback_ends_all_members() -> None:
    def broken(step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        raise ZeroDivisionError("in a callback")

    with pytest.raises(ZeroDivisionError, match="in a callback"):
        hi.optimize_population([member(i) for i in range(2)], callbacks=[[], [broken]], outer_steps=2)


def test_no_members() -> None:
    assert hi.optimize_population([]) == hi.Population([])


def test_every_member_has_a_run_of_its_own(workplace: Path) -> None:
    from mlflow import MlflowClient

    def callbacks(i: int) -> list[Any]:
        return [lambda step, problem: i == 1 and step.step == 1]

    found = hi.optimize_population(
        [member(i) for i in range(3)],
        tracking=True,
        callbacks=[callbacks(i) for i in range(3)],
        outer_steps=3,
        seeds=[4, 5, 6],
    )
    assert found.groups == [[0, 1, 2]]
    client = MlflowClient(tracking_uri=f"sqlite:///{workplace / 'mlflow.db'}")
    for i, outcome in enumerate(found.outcomes):
        assert isinstance(outcome, hi.Result) and outcome.run_id is not None
        run = client.get_run(outcome.run_id)
        assert run.info.status == "FINISHED"
        assert run.data.params["seed"] == str(4 + i)
        metrics = client.get_metric_history(outcome.run_id, "loss/validation")
        assert [each.value for each in metrics] == pytest.approx([each.validation_loss for each in outcome.history])
        assert len(metrics) == (2 if i == 1 else 3)
