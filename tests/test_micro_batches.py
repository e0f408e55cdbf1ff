"""Micro-batches: one batch in parts gives the numbers of the whole, and takes the memory of a part."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar
from weakref import WeakSet

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints

import hyperopt_implicit as hi
from hyperopt_implicit import plain_training
from hyperopt_implicit.data import bytes_of, to_device
from hyperopt_implicit.first_order import TrainingDerivatives, present_weights
from hyperopt_implicit.inner_loop import train_step
from hyperopt_implicit.plain_training import PlainTraining

from .cases import CASES, Case
from .ridge import TRAINING, VALIDATION, Batch, ridge


def halves(batch: Batch) -> list[Batch]:
    """Two batches, of the first and the last rows."""
    return list(zip(*(x.split(len(x) // 2) for x in batch), strict=True))


def quarters(batch: Batch) -> list[Batch]:
    return [each for half in halves(batch) for each in halves(half)]


def parts(batch: Batch) -> hi.MicroBatches:
    return hi.MicroBatches(quarters(batch))


def momentum(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def relative(x: dict[str, Tensor], y: dict[str, Tensor]) -> float:
    """The largest difference of an entry, relative to the largest entry."""
    return max(float((x[name] - y[name]).abs().max() / y[name].abs().max().clamp_min(1e-30)) for name in y)


def begun(data: list[Any], **changes: Any) -> hi.BilevelProblem:
    """The ridge problem after two steps, away from any special point."""
    problem = ridge(training_data=data, optimizer=momentum, **changes)
    for _ in range(2):
        train_step(problem, TRAINING, problem.hyperparameters.values())
    return problem


# ------------------------------------------------------------------------------------------ the numbers of the whole


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("count", [1, 2])
def test_hypergradients_are_those_of_the_whole_batch(case: Case, count: int) -> None:
    """``count`` batches, or as many steps; several calls for those that carry a solution."""
    training = halves(TRAINING)[:count]
    cut = [hi.MicroBatches(halves(each)) for each in training]
    found = []
    for batches, data in ((training, training), (cut, [part for batch in cut for part in batch])):
        problem = begun(data, validation_data=[VALIDATION])
        state: Any = {}
        for _ in range(3):
            result = hi.hypergradient(
                problem, case.backend, training_batches=batches, validation_batch=VALIDATION, state=state
            )
            state = result.state
        found.append(result)
    assert relative(found[1].gradients, found[0].gradients) < 1e-10
    assert found[1].status is found[0].status
    assert found[1].training_loss == pytest.approx(found[0].training_loss, rel=1e-12)


@pytest.mark.parametrize(("data", "said"), [(2, "all the training data at each call"), (4, "mini-batches")])
def test_auto_counts_the_parts(data: int, said: str) -> None:
    batches = quarters(TRAINING)[:2]
    problem = begun(batches if data == 2 else quarters(TRAINING))
    found = hi.hypergradient(problem, "auto", training_batches=[hi.MicroBatches(batches)], validation_batch=VALIDATION)
    assert found.note is not None
    assert said in found.note


@pytest.mark.parametrize("options", [{"curvature": "gauss_newton"}, {"damping": 0.1}], ids=str)
def test_other_curvatures(options: dict[str, Any]) -> None:
    found = [
        hi.hypergradient(
            begun([batch]), {"name": "cg", **options}, training_batches=[batch], validation_batch=VALIDATION
        )
        for batch in (TRAINING, parts(TRAINING))
    ]
    assert relative(found[1].gradients, found[0].gradients) < 1e-10


def test_validation_batches_may_be_in_parts() -> None:
    problem = begun([TRAINING])
    found = [
        hi.hypergradient(problem, "cg", training_batches=[TRAINING], validation_batch=batch)
        for batch in (VALIDATION, parts(VALIDATION))
    ]
    assert relative(found[1].gradients, found[0].gradients) < 1e-10
    assert found[1].validation_loss == pytest.approx(found[0].validation_loss, rel=1e-12)
    assert float(problem.validation_loss(parts(VALIDATION))) == pytest.approx(found[0].validation_loss, rel=1e-12)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore:hypergradient:hyperopt_implicit.HyperoptWarning")
def test_a_run_is_that_of_large_batches(case: Case) -> None:
    found = [
        hi.optimize(
            ridge(training_data=data, optimizer=momentum),
            case.backend,
            outer_steps=4,
            inner_steps=4,
            warmup_steps=5,
            accumulate=accumulate,
            outer_lr=0.1,
            tracking=False,
        )
        for data, accumulate in ((halves(TRAINING), 1), (quarters(TRAINING), 2))
    ]
    rows = [[(each.training_loss, each.validation_loss, each.hypergradient_norm) for each in x.history] for x in found]
    for large, small in zip(*rows, strict=True):
        assert small == pytest.approx(large, rel=1e-10)
    assert found[1].hyperparameters["decay"].item() != 1.0
    torch.testing.assert_close(found[1].hyperparameters, found[0].hyperparameters, rtol=1e-10, atol=0.0)


@pytest.mark.parametrize(
    "options",
    [{"restart": True}, {"hessian_batches": 3}, {"inner_steps": 70, "outer_steps": 2}, {"warmup_steps": 0}],
    ids=lambda options: ", ".join(options),
)
def test_options_of_a_run(options: dict[str, Any]) -> None:
    settings = {"outer_steps": 3, "inner_steps": 2, "outer_lr": 0.1, "tracking": False, **options}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "training_data is a list", hi.HyperoptWarning)
        found = [
            hi.optimize(
                ridge(training_data=data, optimizer=momentum), {"name": "cg"}, accumulate=accumulate, **settings
            )
            for data, accumulate in ((halves(TRAINING), 1), (quarters(TRAINING), 2))
        ]
    torch.testing.assert_close(found[1].hyperparameters, found[0].hyperparameters, rtol=1e-10, atol=0.0)
    assert found[1].history[-1].training_loss == pytest.approx(found[0].history[-1].training_loss, rel=1e-10)


def test_outer_steps_in_a_loop_of_ones_own() -> None:
    """The trajectory of two steps, each on the parts of one batch."""
    found = []
    for cut in (lambda batch: batch, lambda batch: hi.MicroBatches(halves(batch))):
        problem = begun([TRAINING])
        outer = hi.HyperOptimizer(problem, torch.optim.SGD, lr=0.1, backend="unrolled")
        for _ in range(2):
            outer.step_through([cut(each) for each in halves(TRAINING)], VALIDATION)
        found.append(outer.hyperparameters["decay"])
    assert found[0] != 1.0
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=0.0)


def test_a_loss_is_the_mean_over_the_parts_each_counting_alike() -> None:
    problem = ridge()
    first, second = (TRAINING[0][:2], TRAINING[1][:2]), (TRAINING[0][2:], TRAINING[1][2:])
    whole = problem.training_loss(hi.MicroBatches([first, second]))
    torch.testing.assert_close(whole, (problem.training_loss(first) + problem.training_loss(second)) / 2)


# -------------------------------------------------------------------------------------------------- one graph at a time


class _Token:
    pass


class _Counted(torch.autograd.Function):
    """The identity, whose graphs are counted while they live."""

    living: ClassVar[WeakSet[_Token]] = WeakSet()
    most: ClassVar[int] = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.token = _Token()
        _Counted.living.add(ctx.token)
        _Counted.most = max(_Counted.most, len(_Counted.living))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor) -> Any:
        return adjoint.clone()


@contextmanager
def graphs_counted() -> Iterator[None]:
    _Counted.living.clear()
    _Counted.most = 0
    yield


@hi.hyperparameter("decay", init=1.0, constraint=constraints.positive)
def counted_loss(model: nn.Module, batch: Batch, *, decay: Tensor) -> Tensor:
    x, y = batch
    return 0.5 * (_Counted.apply(model(x)) - y).square().mean() + 0.5 * decay * model.weight.square().sum()


@pytest.mark.parametrize("steps", [1, 6])
def test_plain_training_holds_the_graph_of_one_part(steps: int) -> None:
    """One step with a look at its loss, and a row of them."""
    problem = ridge(training_data=quarters(TRAINING), training_loss=counted_loss)
    training = PlainTraining(problem, problem.stream("training_data"), accumulate=4)
    with graphs_counted():
        training.take(steps, problem.hyperparameters.values())
        assert _Counted.most == 1
        problem.training_loss(parts(TRAINING)).detach()
        assert _Counted.most == 4  # that is how it would look


def test_first_derivatives_and_steps_without_a_graph_hold_that_of_one_part() -> None:
    problem = ridge(training_loss=counted_loss)
    with graphs_counted():
        TrainingDerivatives(problem, [parts(TRAINING)]).at(present_weights(problem))
        assert _Counted.most == 1
    backend = hi.get_backend("evolution")
    with graphs_counted():
        backend.hypergradient(problem, [parts(TRAINING)] * 2, VALIDATION, {})
        assert _Counted.most == 1


# ---------------------------------------------------------------------------------------------- what a step is made of


def test_batch_normalisation_takes_the_statistics_of_each_part() -> None:
    x = torch.randn(8, 3, dtype=torch.float64)

    @hi.hyperparameter("shift", init=0.5)
    def loss(model: nn.Module, batch: Tensor, *, shift: Tensor) -> Tensor:
        return (model(batch) - shift).square().mean()

    def problem() -> hi.BilevelProblem:
        torch.manual_seed(0)
        model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
        return hi.BilevelProblem(
            model,
            loss,
            lambda model, batch: model(batch).square().mean(),
            optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        )

    ours, theirs, copied = problem(), problem(), problem()
    train_step(ours, hi.MicroBatches(x.split(2)), ours.hyperparameters.values())
    theirs.optimizer.zero_grad()
    for part in x.split(2):
        (theirs.training_loss(part) / 4).backward(inputs=list(theirs.params.values()))
    theirs.optimizer.step()
    result = hi.hypergradient(copied, "unrolled", training_batches=[hi.MicroBatches(x.split(2))], validation_batch=x)
    assert result.endpoint is not None
    for name, tensor in theirs.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], tensor, rtol=0, atol=0)
        there = {**result.endpoint.params, **result.endpoint.buffers}[name]
        torch.testing.assert_close(there, tensor, rtol=1e-14, atol=1e-14)
    assert int(ours.model[0].num_batches_tracked) == 4


class Dropped(nn.Module):
    """Dropout before a linear layer, and a count of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -0.5, 1.0], dtype=torch.float64))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return nn.functional.dropout(x, 0.5, self.training) @ self.weight


@pytest.mark.parametrize("bad", [None, 0, 5, 6, 11])
def test_a_row_of_steps_is_that_of_careful_ones(bad: int | None) -> None:
    """To the bit, masks of dropout included, whichever micro-batch is not finite."""
    data = [(x + 0.1 * i, y) for i in range(3) for x, y in quarters(TRAINING)]
    if bad is not None:
        data[bad] = (data[bad][0] * math.nan, data[bad][1])

    def trained(most: int) -> tuple[list[float], dict[str, Any], Tensor]:
        torch.manual_seed(3)
        problem = ridge(model=Dropped(), training_data=data, optimizer=momentum)
        training = PlainTraining(problem, problem.stream("training_data"), accumulate=2)
        losses = []
        for _ in range(6 // most):
            losses += training.take(most, problem.hyperparameters.values())
        return losses, problem.model.state_dict(), torch.get_rng_state()

    (losses, state, generator), (careful, expected, theirs) = trained(6), trained(1)
    assert [math.isnan(x) for x in losses] == [bad is not None and i == bad // 2 for i in range(6)]
    torch.testing.assert_close(losses, careful, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(state, expected, rtol=0, atol=0)
    assert torch.equal(generator, theirs)
    assert int(state["calls"]) == 12 - (0 if bad is None else 2)


def test_rows_hold_no_more_batches_than_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of a step are those of its micro-batches."""
    monkeypatch.setattr(plain_training, "MOST_BYTES", 4 * bytes_of(parts(TRAINING)))
    monkeypatch.setattr(plain_training.BatchStream, "is_resident", False, raising=False)
    lengths: list[int] = []
    real = plain_training._Row.read

    def read(row: Any) -> list[float]:
        lengths.append(len(row.batches))
        return real(row)

    monkeypatch.setattr(plain_training._Row, "read", read)

    class Loader:
        def __iter__(self) -> Iterator[Batch]:
            return iter(quarters(TRAINING))

    problem = ridge(training_data=Loader())
    training = PlainTraining(problem, problem.stream("training_data"), accumulate=4)
    training.take(12, problem.hyperparameters.values())
    assert lengths == [5, 5, 2]
    monkeypatch.setattr(plain_training, "MOST_BYTES", 3 * bytes_of(parts(TRAINING)))
    lengths.clear()
    training.take(2, problem.hyperparameters.values())
    assert lengths == []  # so few that each loss is read at once


def test_the_warning_of_batches_left_out_counts_micro_batches() -> None:
    """Three inner steps and one for the hypergradient, of two each: eight batches at each place for ever."""
    eight = [batch for i in range(2) for batch in quarters((TRAINING[0] + i, TRAINING[1]))]
    options = {"outer_steps": 1, "inner_steps": 3, "tracking": False}
    with pytest.warns(hi.HyperoptWarning) as warned:
        hi.optimize(ridge(training_data=eight), "cg", accumulate=2, **options)
    (message,) = [str(each.message) for each in warned if "training_data is a list" in str(each.message)]
    assert message == (
        "training_data is a list of 8 batches that is read in turn, and an outer step takes 8 of them (inner_steps + "
        "hessian_batches, times accumulate): of 8 different batches, training only ever sees 6 and the hypergradient "
        "2. Choose inner_steps so that the sum has no factor in common with 4, or pass a DataLoader with shuffle=True."
    )
    hi.optimize(ridge(training_data=eight), "cg", accumulate=2, **{**options, "inner_steps": 4})


# ----------------------------------------------------------------------------------------------------------- the type


def test_a_list_of_batches_that_moves_copies_and_pickles() -> None:
    batches = hi.MicroBatches(x for x in quarters(TRAINING))
    assert len(batches) == 4
    assert bytes_of(batches) == bytes_of(TRAINING)
    for other in (
        to_device({"one": batches}, torch.device("cpu"))["one"],
        copy.deepcopy(batches),
        pickle.loads(pickle.dumps(batches)),
    ):
        assert type(other) is hi.MicroBatches
        torch.testing.assert_close(tuple(other), tuple(batches), rtol=0, atol=0)
    assert repr(hi.MicroBatches([1, 2])) == "MicroBatches([1, 2])"


def test_micro_batches_of_micro_batches_are_their_parts() -> None:
    nested = hi.MicroBatches([hi.MicroBatches([1, 2]), hi.MicroBatches([3, 4])])
    assert list(nested) == [1, 2, 3, 4]


def test_micro_batches_move_to_the_device_with_their_parts() -> None:
    moved = to_device(hi.MicroBatches([torch.ones(2), {"x": torch.ones(1)}]), torch.device("meta"))
    assert moved[0].device.type == moved[1]["x"].device.type == "meta"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            torch.ones(4, 2),
            "MicroBatches takes a list of batches; got a single Tensor. Pass the parts, such as "
            "MicroBatches(x.split(32)) or MicroBatches([first, second]).",
        ),
        (3, "MicroBatches takes a list of batches; got a single int."),
        ([], "MicroBatches must hold at least one batch; it is empty."),
    ],
    ids=["tensor", "number", "empty"],
)
def test_what_is_no_list_of_batches(given: Any, message: str) -> None:
    with pytest.raises(hi.DataError) as raised:
        hi.MicroBatches(given)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("accumulate", [0, -1, 1.5, True, "2", None])
def test_accumulate_is_a_whole_number_of_at_least_one(accumulate: Any) -> None:
    problem = ridge()
    with pytest.raises(hi.HyperoptError) as raised:
        hi.optimize(problem, "cg", accumulate=accumulate, tracking=False)
    assert str(raised.value) == f"accumulate must be a whole number of at least 1; got {accumulate!r}."
    assert not problem.model.weight.any()


def test_populations_with_micro_batches_run_one_by_one() -> None:
    def problems() -> list[hi.BilevelProblem]:
        return [ridge(training_data=quarters(TRAINING)) for _ in range(2)]

    options = {"outer_steps": 2, "inner_steps": 2, "accumulate": 2}
    found = hi.optimize_population(problems(), "cg", **options)
    assert found.notes == ["members ran one by one: accumulate=2 has no form for many members"]
    alone = hi.optimize(problems()[0], "cg", tracking=False, **options)
    for each in found.outcomes:
        assert isinstance(each, hi.Result)
        torch.testing.assert_close(each.hyperparameters, alone.hyperparameters, rtol=0, atol=0)
