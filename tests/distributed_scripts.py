"""What the processes of a group do in the tests, one function a test; each returns what it has found.

Where ``share`` is all of a batch, the same function is what one process does.
"""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints

import hyperopt_implicit as hi
from hyperopt_implicit import distributed, stopwatch
from hyperopt_implicit.auxiliary import LinearCombiner, MetaOptimizer
from hyperopt_implicit.minimizer import minimizer
from hyperopt_implicit.operators import gradients
from hyperopt_implicit.plain_training import PlainTraining
from hyperopt_implicit.replicas import sync_buffers
from hyperopt_implicit.testing.specimens import (
    half_mean_square,
    logistic_problem,
    regression_data,
    ridge_problem,
    seeded,
)

from .distributed_tasks import (
    TRAINING,
    VALIDATION,
    Found,
    Network,
    Recurrent,
    Share,
    gated,
    network_problem,
    share_of,
    signs,
)

RUN: dict[str, Any] = {"outer_steps": 4, "inner_steps": 4, "warmup_steps": 2, "tracking": False, "progress": False}


def data_of(share: Share) -> dict[str, Any]:
    return {"training_data": [share(TRAINING), share(signs(2))], "validation_data": [share(VALIDATION)]}


# ------------------------------------------------------------------------------------------------- derivatives


def several_orders(share: Share) -> Found:
    """Derivatives of L up to the third, in w and λ, by reverse mode over and over."""
    problem = network_problem()
    params = {name: p.detach().requires_grad_() for name, p in problem.params.items()}
    hparams = {name: p.detach().requires_grad_() for name, p in problem.hparams.items()}
    inputs = {**params, **hparams}
    scalar: Tensor = problem.functional_training_loss(params, hparams, share(TRAINING)).square()
    found: Found = {"loss": float(scalar.detach())}
    for order in range(1, 4):
        slopes = torch.autograd.grad(
            scalar, list(inputs.values()), create_graph=True, allow_unused=True, materialize_grads=True
        )
        found |= {f"{order}: {name}": g.detach() for name, g in zip(inputs, slopes, strict=True)}
        scalar = torch.stack([(torch.sin(g + i) * (i + 1.0)).sum() for i, g in enumerate(slopes)]).sum()
    return found


def along_a_vector(share: Share) -> Found:
    """d/dv of ‖Hv‖², for which a product itself is differentiated with respect to v and λ."""
    problem = network_problem()
    params = {name: p.detach().requires_grad_() for name, p in problem.params.items()}
    hparams = {name: p.detach().requires_grad_() for name, p in problem.hparams.items()}
    slopes = gradients(problem.functional_training_loss(params, hparams, share(TRAINING)), params, create_graph=True)
    vector = {name: torch.ones_like(p, requires_grad=True) for name, p in params.items()}
    products = torch.autograd.grad(
        list(slopes.values()), list(params.values()), list(vector.values()), create_graph=True, materialize_grads=True
    )
    total = torch.stack([x.square().sum() for x in products]).sum()
    wanted = {**vector, **hparams}
    grads = torch.autograd.grad(total, list(wanted.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(wanted, grads, strict=True))


def three_levels(share: Share) -> Found:
    """A minimiser as a function of λ, differentiated twice."""
    problem = logistic_problem(0.5)
    decay = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    found = minimizer(problem, {"decay": decay}, [share(TRAINING)])["weight"]
    (slope,) = torch.autograd.grad(found.square().sum(), decay, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, decay)
    return {"w": found.detach(), "slope": slope.detach(), "curvature": curvature}


def other_parts(share: Share) -> Found:
    """Hypergradients where λ, and a layer's bias, are used by one share only."""
    x, y = TRAINING
    order = x[:, 0].argsort(stable=True)
    sorted_ = (x[order], y[order])
    kinds = sorted_ if share(sorted_)[0].shape == x.shape else _halves(sorted_)
    found: Found = {}
    for backend in ("cg", "unrolled", "forward", "sama"):
        spec = {"name": backend, "damping": 2.0} if backend == "cg" else backend
        problem = gated()
        result = hi.hypergradient(problem, spec, training_batches=[kinds, kinds], validation_batch=share(VALIDATION))
        found |= {f"{backend}: {name}": g for name, g in result.gradients.items()}
    return found


def _halves(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    size = len(batch[1]) // distributed.world_size()
    return tuple(x[distributed.rank() * size :][:size] for x in batch)


# --------------------------------------------------------------------------------------------------- whole runs


def whole_runs(share: Share) -> Found:
    """Runs with momentum, decay and an unused parameter: what they end with, and every number on the way."""
    found: Found = {}
    for backend in ("cg", "unrolled", "heavy_ball"):
        problem = network_problem(**data_of(share))
        spec = backend if backend == "unrolled" else {"name": backend, "damping": 2.0}
        result = hi.optimize(problem, spec, **RUN)
        found |= {f"{backend}: {name}": p.detach().clone() for name, p in problem.params.items()}
        found |= {f"{backend}: {name}": p.detach().clone() for name, p in problem.hparams.items()}
        for name in ("training_loss", "validation_loss", "hypergradient_norm"):
            values = [getattr(step, name) for step in result.history]
            found[f"{backend}: {name}"] = torch.tensor(values, dtype=torch.float64)
    return found


def in_a_loop(share: Share) -> Found:
    """A loop of one's own, with a layer that holds its weights in a list of its own."""
    model = seeded(Recurrent)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    problem = network_problem(model, optimizer=optimizer)
    outer = hi.HyperOptimizer(problem, torch.optim.Adam, lr=0.1, backend={"name": "cg", "damping": 2.0})
    losses = []
    for _ in range(3):
        loss = problem.training_loss(share(TRAINING))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        report = outer.step(share(TRAINING), share(VALIDATION))
    numbers = {"losses": torch.tensor(losses, dtype=torch.float64), "outer": report.validation_loss}
    now = {"now": float(problem.validation_loss(share(VALIDATION)))}
    return {**numbers, **now, **{name: p.detach().clone() for name, p in {**problem.params, **problem.hparams}.items()}}


def not_finite(share: Share) -> Found:
    """The third step's loss is no number in one share only: it is left out everywhere."""
    x, y = share(TRAINING)
    bad = y.clone()
    if distributed.rank() == distributed.world_size() - 1:
        bad[-1] = float("nan")
    problem = network_problem(training_data=[(x, y), share(signs(2)), (x, bad)])
    training = PlainTraining(problem, problem.stream("training_data"))
    # the first row ends with the step, whose gradient no later loss shows
    losses = [loss for steps in (3, 4) for loss in training.take(steps, problem.hyperparameters.values())]
    finite = torch.tensor([loss for loss in losses if loss == loss], dtype=torch.float64)
    places = [i for i, loss in enumerate(losses) if loss != loss]
    return {"losses": finite, "left out": places, **{n: p.detach().clone() for n, p in problem.params.items()}}


def large_batches(share: Share) -> Found:
    """Batches of a stream that are of other sizes in each process, and too large to be held for long."""
    from hyperopt_implicit import plain_training

    most, plain_training.MOST_BYTES = plain_training.MOST_BYTES, 21_000  # five batches of 4400 bytes, or of 4000
    try:
        rows = 100 + 10 * distributed.rank()
        batches = [regression_data(i, rows) for i in range(3)]
        problem = ridge_problem()
        problem.training_data = _Loader(batches)
        losses = PlainTraining(problem, problem.stream("training_data")).take(20, problem.hyperparameters.values())
    finally:
        plain_training.MOST_BYTES = most
    return {"losses": torch.tensor(losses), "w": problem.params["weight"].detach().clone()}


class _Loader:
    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


# ------------------------------------------------------------------------------------------- what is agreed upon


def agreed(share: Share) -> Found:
    """Every kind of thing that processes tell each other."""
    me = distributed.rank()
    row = [torch.full((2,), float(me)), None if me else torch.ones(1), None, torch.tensor([1 + 1j * me])]
    kinds = [distributed.kind_of(x) for x in (torch.ones(2), torch.ones(1), torch.ones(3), torch.ones(1) * 1j)]
    narrow = distributed.mean(torch.tensor([1.0, 2.0 + me], dtype=torch.bfloat16))
    return {
        "agree": distributed.agree(any_=[me == 1, False], first=[me == 0, me == 1]),
        "first decides": distributed.first_decides(me == 1),
        "numbers": distributed.first_numbers([float(me), 2.0]),
        "summed": distributed.summed([float(me), 2.0]),
        "largest": distributed.largest_number(float(me)),
        "seed": distributed.agreed_seed(7 + me),
        "object": distributed.broadcast_object({"from": me}),
        "everybody": distributed.exchanged(me),
        "mean of whole numbers": float(distributed.mean(torch.tensor(me))),
        "narrow": narrow.tolist(),
        "row": [None if x is None else x.tolist() for x in distributed.mean_row(row, kinds)],
    }


def gathered(share: Share) -> Any:
    return distributed.gathered(f"from {distributed.rank()}")


def buffers(share: Share) -> Found:
    """Running statistics of each process's own, and what is the same in all of them."""
    model = nn.BatchNorm1d(2).double()
    model.register_buffer("constant", torch.tensor([0.1, 0.7], dtype=torch.float64))
    model.register_buffer("empty", torch.empty(0))
    me = float(distributed.rank())
    model.running_mean.fill_(me)
    model.num_batches_tracked.fill_(int(me) + 5)
    sync_buffers(model)
    return {name: b.clone() for name, b in model.named_buffers()}


def handed_out(share: Share) -> Found:
    """Models, hyperparameters and optimizer state that began differently."""
    model = Network().double()  # each process has seeds of its own
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    problem = network_problem(model, optimizer=optimizer)
    optimizer.zero_grad()
    problem.share_of_training_loss(share_of(distributed.rank(), 2)(TRAINING)).backward()
    optimizer.step()
    with torch.no_grad():
        for p in problem.hparams.values():
            p.add_(distributed.rank())
    hi.HyperOptimizer(problem, backend="cg")
    state = {f"{name} {key}": x for name, p in problem.params.items() for key, x in optimizer.state[p].items()}
    return {**{n: p.detach().clone() for n, p in {**problem.params, **problem.hparams}.items()}, **state}


def times(share: Share) -> Found:
    """Decisions that rest on times, where each process has a clock of its own."""
    fast = iter(range(10**9))
    stopwatch.time.process_time = lambda: next(fast) * (1.0 + 5.0 * distributed.rank())  # type: ignore[assignment]
    problem = network_problem(training_data=[share(TRAINING)])
    result = hi.hypergradient(
        problem,
        {"name": "auto", "damping": 2.0, "budget": 12.0},
        training_batches=[share(TRAINING)],
        validation_batch=share(VALIDATION),
    )
    return {**result.gradients, "note": result.note, "costs": str(result.state["plan"]["costs"])}


def other_batches(share: Share) -> Found:
    """``auto`` without data: a batch that only one process sees change is another batch for all."""
    problem = network_problem()
    auto = hi.get_backend("auto", damping=2.0)
    state: dict[str, Any] = {}
    notes = []
    for change in (0.0, 0.0, 1.0, 2.0):
        x, y = share(TRAINING)
        batch = (x + change * distributed.rank(), y)
        result = auto.hypergradient(problem, [batch], share(VALIDATION), state)
        state = result.state
        notes.append((result.note or "").partition(" (")[0])
    return {"notes": notes}


def agreements(share: Share) -> Found:
    """All of these, by name."""
    each = (agreed, gathered, buffers, handed_out, times, other_batches, compiled, large_batches)
    return {run.__name__: run(share) for run in each}


# -------------------------------------------------------------------------------------------------- refusals


def refusals(share: Share) -> Found:
    """What each of these is refused with, by name; the group goes on."""
    found: Found = {}
    for refused in (
        other_names,
        other_backends,
        other_counts,
        other_threads,
        other_values,
        other_options,
        a_population,
        a_search,
        a_meta_optimizer,
    ):
        try:
            refused(share)
        except hi.HyperoptError as error:
            found[refused.__name__] = f"{type(error).__name__}: {error}"
    return found


def other_names(share: Share) -> None:
    model = nn.Sequential(nn.Linear(4, 1 + distributed.rank()))
    hi.HyperOptimizer(_sum_problem(model), backend="cg")


def other_backends(share: Share) -> None:
    hi.HyperOptimizer(_sum_problem(nn.Linear(4, 1)), backend=["cg", "neumann"][distributed.rank()])


def other_counts(share: Share) -> None:
    problem = network_problem(training_data=[share(TRAINING)] * (2 + distributed.rank()))
    hi.HyperOptimizer(problem, backend="cg")


def other_values(share: Share) -> None:
    problem = logistic_problem()
    with torch.no_grad():
        problem.params["weight"].fill_(distributed.rank())
    hi.hypergradient(problem, "cg", training_batches=[share(TRAINING)], validation_batch=share(VALIDATION))


def other_threads(share: Share) -> None:
    torch.set_num_threads(1 + distributed.rank())
    try:
        hi.HyperOptimizer(_sum_problem(nn.Linear(4, 1)), backend="cg")
    finally:
        torch.set_num_threads(1)


def other_options(share: Share) -> None:
    problem = network_problem(**data_of(share))
    hi.optimize(problem, "cg", inner_steps=10 + distributed.rank(), tracking=False, progress=False)


def _sum_problem(model: nn.Module) -> hi.BilevelProblem:
    @hi.hyperparameter("decay", init=0.2, constraint=constraints.positive)
    def training_loss(model: nn.Module, batch: Any, *, decay: Tensor) -> Tensor:
        return decay * torch.stack([p.square().sum() for p in model.parameters()]).sum()

    return hi.BilevelProblem(model, training_loss, half_mean_square, optimizer=lambda w: torch.optim.SGD(w, lr=0.1))


def a_population(share: Share) -> None:
    hi.optimize_population([logistic_problem()], "cg")


def a_search(share: Share) -> None:
    hi.search(lambda: logistic_problem(), "cg", n_trials=1, storage=None, tracking=False)


def a_meta_optimizer(share: Share) -> None:
    MetaOptimizer(torch.optim.SGD(LinearCombiner(2).parameters(), lr=0.1))


def compiled(share: Share) -> Found:
    """``compile=True``: one warning, from the first process, and the products of autograd."""
    problem = network_problem()
    spec = {"name": "cg", "damping": 2.0, "compile": True}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            result = hi.hypergradient(
                problem, spec, training_batches=[share(TRAINING)], validation_batch=share(VALIDATION)
            )
    return {"gradients": result.gradients, "warnings": [str(each.message) for each in caught]}


# ---------------------------------------------------------------------------------------------- processes that end


def killed(share: Share) -> None:
    """One of the processes is killed in the middle of a run."""

    def callback(record: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        if record.step == 2 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    hi.optimize(network_problem(**data_of(share)), "unrolled", **{**RUN, "outer_steps": 10**6}, callbacks=[callback])


def raising(share: Share) -> None:
    """The data of one process raises after a while."""

    class Data(_Loader):
        def __iter__(self) -> Iterator[Any]:
            yield from self.batches
            if distributed.rank() == 1:
                raise OSError("disk on fire")

    data = {**data_of(share), "training_data": Data([share(TRAINING)] * 40)}
    hi.optimize(network_problem(**data), "identity", **{**RUN, "outer_steps": 10**6})


def hanging(share: Share) -> None:
    """One process stays away for longer than the group waits."""
    if distributed.rank() == 1:
        time.sleep(3600)
    hi.HyperOptimizer(network_problem(), backend="cg")


# ------------------------------------------------------------------------------------------------- runs that stop


def stopped(share: Share) -> Found:
    """A callback of one process only ends the run."""
    steps: dict[str, Any] = {}
    for number in range(2):

        def callback(record: hi.OuterStep, problem: hi.BilevelProblem, number: int = number) -> bool:
            return record.step == 2 and distributed.rank() == number

        result = hi.optimize(
            network_problem(**data_of(share)), "unrolled", **{**RUN, "outer_steps": 6}, callbacks=[callback]
        )
        steps[f"by {number}"] = f"{len(result.history)}: {result.stop_reason}"
    return steps


def saved_and_resumed(share: Share) -> Found:
    """A run with dropout that a signal to the second process ends, and that goes on from its checkpoint."""

    def problem() -> hi.BilevelProblem:
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Dropout(0.2), nn.Linear(3, 1), nn.Flatten(0)).double()
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(0.3)
        return network_problem(model, **data_of(share))

    def callback(record: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        if record.step == 2 and distributed.rank() == distributed.world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    options: dict[str, Any] = {**RUN, "outer_steps": 6}
    torch.manual_seed(5 + distributed.rank())
    through = problem()
    result = hi.optimize(through, "unrolled", **options)
    torch.manual_seed(5 + distributed.rank())
    halves = problem()
    try:
        hi.optimize(halves, "unrolled", **options, checkpoint="saved", callbacks=[callback])
        said = "not interrupted"
    except KeyboardInterrupt as error:
        said = str(error)
    torch.manual_seed(99)
    again = problem()
    resumed = hi.optimize(again, "unrolled", **options, checkpoint="saved", resume=True)
    return {
        "said": said,
        "files": sorted(each.name for each in Path("saved").iterdir() if each.suffix == ".pt"),
        "steps": len(resumed.history),
        "through": {name: p.detach().clone() for name, p in through.params.items()},
        "resumed": {name: p.detach().clone() for name, p in again.params.items()},
        "losses": [result.validation_loss, resumed.validation_loss],
    }
