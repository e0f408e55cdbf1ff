"""Inner steps taken many at a time: the numbers are those of a loop that looks at each loss, and nothing is lost."""

from __future__ import annotations

import gc
import itertools
import math
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.utils._python_dispatch import TorchDispatchMode

import hyperopt_implicit as hi
from hyperopt_implicit import plain_training
from hyperopt_implicit.data import bytes_of
from hyperopt_implicit.errors import HyperoptWarning
from hyperopt_implicit.inner_loop import train_step
from hyperopt_implicit.plain_training import PlainTraining
from hyperopt_implicit.snapshot import Copies, Snapshot

from .ridge import TRAINING, VALIDATION, Batch, Weights, ridge, training_loss, validation_loss

NAN = float("nan")
OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adam": lambda params: torch.optim.Adam(params, lr=0.05),
}


class Data:
    """Batches that are made when they are taken, with random numbers drawn in between; some of them NaN."""

    def __init__(self, bad: tuple[int, ...] = (), raises: int = -1) -> None:
        self.bad, self.raises, self.taken = bad, raises, 0

    def __iter__(self) -> Iterator[Batch]:
        for i in range(1000):
            if i == self.raises:
                raise OSError("the disk is full")
            x, y = TRAINING
            noise = torch.rand(x.shape, dtype=x.dtype)
            self.taken += 1
            yield (x * NAN, y) if i in self.bad else (x + 0.01 * noise, y)


def noisy(optimizer: str = "momentum", **changes: Any) -> hi.BilevelProblem:
    """Dropout, running statistics and batches that all draw from the same generator."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.3), nn.Linear(3, 1), nn.Flatten(0)).double()
    return ridge(**{"model": model, "training_data": Data(), "optimizer": OPTIMIZERS[optimizer], **changes})


def looking(problem: hi.BilevelProblem, steps: int, values: dict[str, Any]) -> list[float]:
    """The loop that looks at each loss."""
    stream = problem.stream("training_data")
    return [train_step(problem, stream.next(), values) for _ in range(steps)]


def at_once(problem: hi.BilevelProblem, steps: int, values: dict[str, Any]) -> list[float]:
    return PlainTraining(problem, problem.stream("training_data")).take(steps, values)


def end(problem: hi.BilevelProblem) -> list[Tensor]:
    state = problem.inner_state()
    slots = [x for each in state.optimizer.values() for x in each.values() if isinstance(x, Tensor)]
    return [*state.params.values(), *state.buffers.values(), *slots, torch.get_rng_state()]


def same(xs: list[Any], ys: list[Any]) -> bool:
    """Equal to the bit, NaN being equal to NaN."""
    return len(xs) == len(ys) and all(
        torch.equal(torch.as_tensor(x).nan_to_num(nan=0.125), torch.as_tensor(y).nan_to_num(nan=0.125))
        for x, y in zip(xs, ys, strict=True)
    )


# -------------------------------------------------------------------------------------- the same as with a look at each


@pytest.mark.parametrize("bad", [(), (0,), (5,), (19,), (5, 6), (3, 11), tuple(range(20))], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_same_to_the_bit_as_with_a_look_at_each_loss(
    monkeypatch: pytest.MonkeyPatch, optimizer: str, bad: tuple[int, ...]
) -> None:
    monkeypatch.setattr(plain_training, "MOST_BATCHES", 8)
    results = []
    for train in (looking, at_once):
        problem = noisy(optimizer, training_data=Data(bad))
        losses = train(problem, 20, problem.hyperparameters.values())
        assert [i for i, loss in enumerate(losses) if not math.isfinite(loss)] == list(bad)
        results.append(([*losses], end(problem), problem.training_data.taken))  # type: ignore[union-attr]
    (losses, state, taken), (expected, expected_state, expected_taken) = results
    assert same(losses, expected)
    assert same(state, expected_state)
    assert taken == expected_taken == 20


def test_list_of_batches_draws_nothing_and_is_replayed_all_the_same() -> None:
    x, y = TRAINING
    batches = [TRAINING, TRAINING, (x * NAN, y), TRAINING]
    results = []
    for train in (looking, at_once):
        problem = noisy(training_data=batches)
        results.append((train(problem, 11, problem.hyperparameters.values()), end(problem)))
    assert same(results[0][0], results[1][0]) and same(results[0][1], results[1][1])


def test_row_that_went_wrong_is_looked_at_until_one_goes_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_training, "MOST_BATCHES", 4)
    looks: list[int] = []
    real = plain_training.train_step

    def counted(*arguments: Any) -> float:
        looks.append(1)
        return real(*arguments)

    monkeypatch.setattr(plain_training, "train_step", counted)
    problem = noisy(training_data=Data((1, 5)))
    training = PlainTraining(problem, problem.stream("training_data"))
    values = problem.hyperparameters.values()
    seen = []
    for _ in range(5):
        training.take(4, values)
        seen.append(len(looks))
        looks.clear()
    assert seen == [4, 4, 4, 0, 0]  # again; with a look, as the last went wrong; the same, and this one goes well


def touchy(model: nn.Module, batch: Batch, *, decay: Tensor) -> Tensor:
    if any(bool(p.isnan().any()) for p in model.parameters()):
        raise ValueError("these weights are not numbers")
    return training_loss(model, batch, decay=decay)


declared = hi.hyperparameter("decay", init=1.0, constraint=constraints.positive)


@pytest.mark.parametrize("bad", [0, 4, 5])
def test_loss_that_cannot_stand_the_weights_of_a_bad_step_never_meets_them(bad: int) -> None:
    results = []
    for train in (looking, at_once):
        problem = noisy(training_data=Data((bad,)), training_loss=declared(touchy))
        results.append((train(problem, 6, problem.hyperparameters.values()), end(problem)))
    assert same(results[0][0], results[1][0]) and same(results[0][1], results[1][1])


@pytest.mark.parametrize("bad", [(), (1,), (4,)], ids=str)
def test_error_of_the_data_is_raised_after_what_was_sound_before_it(bad: tuple[int, ...]) -> None:
    ends = []
    for train in (looking, at_once):
        problem = noisy(training_data=Data(bad, raises=5))
        with pytest.raises(OSError, match="the disk is full"):
            train(problem, 9, problem.hyperparameters.values())
        ends.append(end(problem)[:-1])
    assert same(*ends)
    assert all(bool(p.isfinite().all()) for p in problem.params.values())


def test_interruption_is_raised_and_leaves_sound_weights() -> None:
    count = 0

    def interrupted(model: nn.Module, batch: Batch, *, decay: Tensor) -> Tensor:
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt
        return training_loss(model, batch, decay=decay)

    problem = noisy(training_data=Data((2,)), training_loss=declared(interrupted))
    with pytest.raises(KeyboardInterrupt):
        at_once(problem, 9, problem.hyperparameters.values())
    assert all(bool(p.isfinite().all()) for p in problem.params.values())


class Counting(torch.optim.SGD):
    """Keeps a count in its groups, and a history in a list, as some optimizers do."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            for p in group["params"]:
                self.state[p].setdefault("seen", []).append(float(p.detach().sum()))


def test_what_an_optimizer_counts_goes_back_as_well() -> None:
    counting = Weights()
    optimizer = Counting([{"params": list(counting.parameters()), "count": 0}], lr=0.1)
    problem = ridge(model=counting, training_data=Data((4,)), optimizer=optimizer)
    at_once(problem, 7, problem.hyperparameters.values())
    assert problem.optimizer.param_groups[0]["count"] == 6
    state = next(iter(problem.optimizer.state.values()))
    assert len(state["seen"]) == 6 and all(map(math.isfinite, state["seen"]))


def test_running_statistics_of_a_network_that_is_tuned_go_back_as_well() -> None:
    def loss(model: nn.Module, batch: Batch, *, network: nn.Module) -> Tensor:
        x, _ = batch
        return validation_loss(model, batch) + network(x).square().mean() * model[2].weight.square().sum()

    results = []
    for train in (looking, at_once):
        torch.manual_seed(2)
        network = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
        x, y = TRAINING
        batches = [TRAINING] * 4 + [(x, y * NAN), TRAINING]  # its inputs are sound, and so are their statistics
        problem = noisy(training_data=batches, training_loss=hi.hyperparameter("network", init=network)(loss))
        values = problem.hyperparameters.values()
        train(problem, 7, values)
        results.append([*end(problem), *values["network"].buffers()])
        assert all(bool(each.isfinite().all()) for each in results[-1])
    assert same(*results)


def test_step_that_is_left_out_leaves_running_statistics_as_they_were() -> None:
    """Those of the model and of a network that is tuned, which have met the batch by the time that L is known."""

    def loss(model: nn.Module, batch: Batch, *, network: nn.Module) -> Tensor:
        return validation_loss(model, batch) + network(batch[0]).square().mean()

    network = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    problem = noisy(training_loss=hi.hyperparameter("network", init=network)(loss))
    values = problem.hyperparameters.values()
    x, y = TRAINING
    train_step(problem, TRAINING, values)
    before = [x.clone() for x in [*end(problem)[:-1], *values["network"].buffers()]]
    assert math.isnan(train_step(problem, (x * NAN, y), values))
    assert same([*end(problem)[:-1], *values["network"].buffers()], before)


def test_warmup_over_a_bad_batch_leaves_sound_running_statistics() -> None:
    problem = noisy(training_data=Data((2,)))
    hi.optimize(problem, "identity", warmup_steps=4, outer_steps=1, inner_steps=1, tracking=False)
    assert all(bool(each.isfinite().all()) for each in problem.model.buffers())


def test_restart_and_lost_steps_put_back_what_an_optimizer_counts() -> None:
    model = Weights()
    groups = [{"params": list(model.parameters()), "count": 5}]
    problem = ridge(model=model, optimizer=Counting(groups, lr=0.1))
    hi.optimize(problem, "identity", outer_steps=3, inner_steps=2, restart=True, tracking=False)
    assert problem.optimizer.param_groups[0]["count"] == 7


def test_snapshot_leaves_what_schedules_write_and_drops_counts_that_are_new() -> None:
    model = Weights()
    problem = ridge(model=model, optimizer=Counting(model.parameters(), lr=0.1))
    snapshot = Snapshot(problem)
    snapshot.take()
    at_once(problem, 2, problem.hyperparameters.values())
    (group,) = problem.optimizer.param_groups
    assert group["count"] == 2
    group["lr"], group["momentum"], group["nesterov"] = 0.01, 0.5, True
    snapshot.restore()
    assert "count" not in group
    assert (group["lr"], group["momentum"], group["nesterov"]) == (0.01, 0.5, False)


def test_snapshot_leaves_an_option_that_is_tuned_where_it_has_moved_to() -> None:
    tuned = hi.hyperparameter("eps", init=0.1, constraint=constraints.positive, target="optimizer")(training_loss)
    problem = ridge(training_loss=tuned, optimizer=OPTIMIZERS["adam"])
    snapshot = Snapshot(problem)
    snapshot.take()
    with torch.no_grad():
        problem.hparams["eps"] += math.log(2.0)
    problem.sync_optimizer()
    snapshot.restore()
    assert problem.optimizer.param_groups[0]["eps"] == pytest.approx(0.2)


class Remembering(nn.Module):
    """Keeps its last outputs in a buffer of their shape, from the first call on."""

    def __init__(self, from_the_start: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1).double()
        if from_the_start:
            self.register_buffer("last", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)[:, 0]
        self.register_buffer("last", out.detach())
        return out


@pytest.mark.parametrize("from_the_start", [False, True], ids=["new", "of another shape"])
def test_buffers_that_come_or_grow_do_not_stand_in_the_way_of_going_back(from_the_start: bool) -> None:
    x, y = TRAINING
    problem = ridge(model=Remembering(from_the_start), training_data=[TRAINING, (x * NAN, y), *[TRAINING] * 3])
    result = hi.optimize(problem, "identity", outer_steps=2, inner_steps=2, restart=True, tracking=False)
    assert [each.failed_inner_steps for each in result.history] == [1, 0]
    snapshot = Snapshot(problem)
    snapshot.take()
    kept = problem.model.last.clone()
    problem.training_loss((x[:2], y[:2]))
    snapshot.restore()
    assert torch.equal(problem.model.last, kept)


@pytest.mark.filterwarnings("ignore:hypergradient")
@pytest.mark.parametrize("bad", [(), (1, 9, 10), (8,)], ids=str)
@pytest.mark.parametrize("options", [{}, {"restart": True}, {"warmup_steps": 4}, {"outer_lr": 1.0}], ids=str)
def test_whole_run_is_the_same_as_with_a_look_at_each_loss(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], bad: tuple[int, ...]
) -> None:
    results = []
    for most in (0, plain_training.MOST_BYTES):
        monkeypatch.setattr(plain_training, "MOST_BYTES", most)
        problem = noisy(training_data=Data(bad))
        result = hi.optimize(
            problem, "identity", outer_steps=4, inner_steps=5, tracking=False, keep_best_model=True, **options
        )
        columns = [
            [each.training_loss, each.failed_inner_steps, each.hyperparameters["decay"], each.validation_loss]
            for each in result.history
        ]
        best = [*(result.best_model_state or {}).values(), *result.best_hyperparameters.values()]
        results.append([*itertools.chain(*columns), *best, *end(problem)])
    assert same(*results)


# -------------------------------------------------------------------------------------------- a loop written by hand


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_run_equals_a_loop_written_by_hand_to_the_bit(optimizer: str) -> None:
    """Plain torch beside ``hypergradient``: the same losses, weights and λ, over lengths on both sides of a row's."""
    for inner_steps in (1, 3, plain_training.MOST_BATCHES + 2):
        problem, ours = (noisy(optimizer, training_data=Data()) for _ in range(2))
        batches, validation = iter(Data()), VALIDATION
        torch.manual_seed(5)
        first = next(batches)  # ``optimize`` looks at the first batch before it begins
        hi.HyperOptimizer(problem, torch.optim.Adam, backend="identity").check(first, validation)
        (raw,) = problem.hparams.values()
        outer = torch.optim.Adam([raw], lr=0.05)
        losses, decays, ahead = [], [], [first]
        for _ in range(4):
            decay = raw.exp().detach()
            decays.append(decay.item())
            row = []
            for _ in range(inner_steps):
                problem.optimizer.zero_grad()
                loss = training_loss(problem.model, ahead.pop() if ahead else next(batches), decay=decay)
                loss.backward()
                problem.optimizer.step()
                row.append(loss.item())
            losses.append(sum(row) / len(row))
            found = hi.hypergradient(problem, "identity", training_batches=[next(batches)], validation_batch=validation)
            raw.grad = found.gradients["decay"]
            outer.step()
        torch.manual_seed(5)
        result = hi.optimize(ours, "identity", outer_steps=4, inner_steps=inner_steps, outer_lr=0.05, tracking=False)
        assert [each.training_loss for each in result.history] == losses
        assert [each.hyperparameters["decay"] for each in result.history] == decays
        assert torch.equal(ours.hparams["decay"], raw)
        assert same([*ours.params.values()], [*problem.params.values()])


# ---------------------------------------------------------------------------------------------------- reads, memory


class Reads(TorchDispatchMode):
    """Counts the numbers that are read back from tensors."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return function(*args, **(kwargs or {}))


def reads(monkeypatch: pytest.MonkeyPatch, backend: Any, **options: Any) -> list[int]:
    """Numbers read in each outer step, whether one by one or as lists."""
    mode, marks = Reads(), []
    real = Tensor.tolist

    def tolist(self: Tensor) -> Any:
        mode.count += 1  # which a dispatch mode does not see
        return real(self)

    monkeypatch.setattr(Tensor, "tolist", tolist)

    def note(step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        marks.append(mode.count)

    with mode:
        # the step of Adam reads its own counter
        outer = {"outer_optimizer": torch.optim.SGD, "outer_lr": 0.1}
        hi.optimize(ridge(), backend, callbacks=[note], outer_steps=4, tracking=False, **outer, **options)
    monkeypatch.setattr(Tensor, "tolist", real)
    return [after - before for before, after in itertools.pairwise(marks)]


@pytest.mark.parametrize("backend", ["identity", "cg"])
def test_reads_do_not_grow_with_the_number_of_inner_steps(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    few, many = (reads(monkeypatch, backend, inner_steps=steps) for steps in (2, plain_training.MOST_BATCHES))
    # cg decides after as many iterations as it takes, which differs with the weights
    assert few == many if backend == "identity" else max(many) <= max(few)


def test_reads_of_the_loop_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, hyperparameters, norm of the hypergradient, norm of the weights, whether λ is inside: one each."""
    monkeypatch.setattr(hi.HyperOptimizer, "compute", lambda self, training, validation: FIXED)
    assert reads(monkeypatch, "identity", inner_steps=5) == [5] * 3


FIXED = hi.Hypergradient({"decay": torch.ones((), dtype=torch.float64)}, hi.Status.CONVERGED, 0, None, 0, 1.0, 1.0)


def test_batches_are_held_up_to_a_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    size = bytes_of(TRAINING)
    held: list[int] = []
    real = plain_training._Row.read

    def read(self: Any) -> list[float]:
        held.append(len(self.batches))
        return real(self)

    monkeypatch.setattr(plain_training._Row, "read", read)
    monkeypatch.setattr(plain_training, "MOST_BYTES", 5 * size)
    values = noisy().hyperparameters.values()
    at_once(noisy(), 20, values)
    assert max(held) == 6 and sum(held) >= 19
    held.clear()
    monkeypatch.setattr(plain_training, "MOST_BYTES", 3 * size)  # too few to be worth a copy of the model
    assert len(at_once(noisy(), 20, values)) == 20
    assert held == []
    monkeypatch.setattr(plain_training, "MOST_BYTES", 5 * size)
    at_once(noisy(training_data=[TRAINING] * 2), 20, values)  # they are there anyway
    assert held == [20]


def test_no_copy_is_made_for_batches_that_are_too_large_to_be_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_training, "MOST_BYTES", 3 * bytes_of(TRAINING))
    monkeypatch.setattr(Snapshot, "take", lambda self: pytest.fail("a copy of the model was made"))
    problem = noisy()
    assert len(at_once(problem, 3, problem.hyperparameters.values())) == 3


def growth(outer_steps: int, forget: int) -> tuple[float, float]:
    """Bytes and objects that an outer step leaves behind, after the first ``forget`` of them."""
    marks: list[tuple[int, int]] = []

    def mark(step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        if step.step in (forget, outer_steps - 1):
            gc.collect()
            marks.append((tracemalloc.get_traced_memory()[0], len(gc.get_objects())))

    gc.collect()
    tracemalloc.start()
    try:
        hi.optimize(
            ridge(optimizer=OPTIMIZERS["adam"]),
            {"name": "neumann", "terms": 2},
            outer_steps=outer_steps,
            inner_steps=2,
            callbacks=[mark],
            tracking=False,
        )
    finally:
        tracemalloc.stop()
    (bytes_before, objects_before), (bytes_after, objects_after) = marks
    steps = outer_steps - 1 - forget
    return (bytes_after - bytes_before) / steps, (objects_after - objects_before) / steps


def test_outer_steps_leave_nothing_behind_but_their_record() -> None:
    leaked, objects = growth(200, 50)
    assert leaked < 250  # 136 bytes a record, in arrays that are enlarged by an eighth at a time
    assert abs(objects) < 0.1


@pytest.mark.slow
def test_ten_thousand_outer_steps_leave_nothing_behind_but_their_records() -> None:
    leaked, objects = growth(10_000, 200)
    assert leaked < 180
    assert abs(objects) < 0.01


# ------------------------------------------------------------------------------------------------------- the copies


def test_copies_use_the_same_memory_again_until_the_tensors_are_others() -> None:
    copies, live = Copies(), [torch.ones(3), torch.zeros(2, dtype=torch.float64), torch.arange(2)]
    copies.take(live)
    first = copies.tensors
    live[0].add_(1.0)
    copies.take(live)
    assert all(a is b for a, b in zip(copies.tensors, first, strict=True))
    assert same(copies.tensors, live)
    copies.take([torch.full((4,), 2.0)])
    assert same(copies.tensors, [torch.full((4,), 2.0)])


def test_snapshot_goes_back_to_before_the_optimizer_had_a_state() -> None:
    problem = noisy("adam")
    snapshot, before = Snapshot(problem), end(problem)[:-1]
    snapshot.take()
    at_once(problem, 3, problem.hyperparameters.values())
    assert not same(end(problem)[:-1], before)
    snapshot.restore()
    assert same(end(problem)[:-1], before)
    at_once(problem, 3, problem.hyperparameters.values())
    snapshot.take()
    later = end(problem)[:-1]
    at_once(problem, 3, problem.hyperparameters.values())
    snapshot.restore()
    assert same(end(problem)[:-1], later)


def test_warmup_that_ends_in_nothing_finite_is_undone_by_the_first_step() -> None:
    problem = ridge(optimizer=lambda params: torch.optim.SGD(params, lr=1e200))
    with pytest.warns(HyperoptWarning):
        hi.optimize(problem, "cg", warmup_steps=5, outer_steps=1, inner_steps=2, tracking=False)
    assert torch.equal(problem.model.weight, Weights().weight)
