"""Inner steps under autocast: the steps of a loop of one's own, hypergradients that the scale never enters."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints

import hyperopt_implicit as hi
from hyperopt_implicit.inner_loop import InnerSteps, train_step
from hyperopt_implicit.mixed_precision import DTYPES, InnerPrecision, inner_precision, training_in
from hyperopt_implicit.plain_training import PlainTraining
from hyperopt_implicit.trajectory import Trajectory

from .cases import CASES, Case

Batch = tuple[Tensor, Tensor]

SOLUTION = [case for case in CASES if case.differentiates == "solution"]
TRAJECTORY = [case for case in CASES if case.differentiates == "trajectory"]
PRECISIONS = list(DTYPES)

_generator = torch.Generator().manual_seed(1)
_x = torch.randn(64, 4, generator=_generator)
_y = (_x @ torch.tensor([1.0, -2.0, 0.5, 0.0])).tanh() + 0.3 * torch.randn(64, generator=_generator)
BATCHES = [(_x[:16], _y[:16]), (_x[16:32], _y[16:32])]
VALIDATION = (_x[32:], _y[32:])


@hi.hyperparameter("factor", init=1.0)
@hi.hyperparameter("decay", init=0.1, constraint=constraints.positive)
def training_loss(model: nn.Module, batch: Batch, *, decay: Tensor, factor: Tensor) -> Tensor:
    x, y = batch
    penalty = torch.stack([p.square().sum() for p in model.parameters()]).sum()
    return (factor * model(x).squeeze(1) - y).square().mean() + decay * penalty


def validation_loss(model: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    return (model(x).squeeze(1) - y).square().mean()


def momentum(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.5)


def network(**changes: Any) -> hi.BilevelProblem:
    """A perceptron in float32; keywords replace parts of it."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "model": nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)),
        "training_loss": training_loss,
        "validation_loss": validation_loss,
        "training_data": BATCHES,
        "validation_data": [VALIDATION],
        "optimizer": momentum,
        **changes,
    }
    return hi.BilevelProblem(**settings)


def scaled_by(problem: hi.BilevelProblem, scale: float, name: str = "float16") -> InnerPrecision:
    """The precision with a scale to begin at."""
    precision = inner_precision(name, problem)
    precision.load_state_dict({**precision.state_dict(), "scale": scale})
    return precision


def relative(x: dict[str, Tensor], y: dict[str, Tensor]) -> float:
    def flat(each: dict[str, Tensor]) -> Tensor:
        return torch.cat([each[name].detach().double().flatten() for name in sorted(each)])

    return float((flat(x) - flat(y)).norm() / flat(y).norm())


def by_hand(problem: hi.BilevelProblem, name: str, batches: list[Batch], parts: int = 1) -> torch.amp.GradScaler:
    """The loop that torch's documentation shows."""
    scaler = torch.amp.GradScaler("cpu", enabled=name == "float16")
    for batch in batches:
        problem.optimizer.zero_grad()
        for part in zip(*(x.chunk(parts) for x in batch), strict=True):
            with torch.autocast("cpu", DTYPES[name]):
                loss = problem.training_loss(part) / parts
            scaler.scale(loss).backward(inputs=list(problem.params.values()))
        scaler.step(problem.optimizer)
        scaler.update()
    return scaler


# -------------------------------------------------------------------------------------------------------- plain steps


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("large", [1.0, 1e4], ids=["", "large"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_plain_steps_are_those_of_a_loop_of_ones_own(name: str, large: float, accumulate: int) -> None:
    """To the bit; where gradients are too large for float16, the same steps are left out, and none of them fails."""
    data = [(x, large * y) for x, y in BATCHES]
    ours, theirs = (
        network(training_data=each)
        for each in ([part for batch in data for part in zip(*(x.chunk(accumulate) for x in batch), strict=True)], data)
    )
    ours.optimizer.param_groups[0]["lr"] = theirs.optimizer.param_groups[0]["lr"] = 0.1 / large
    result = hi.optimize(
        ours, "identity", outer_steps=1, inner_steps=10, inner_precision=name, accumulate=accumulate, tracking=False
    )
    scaler = by_hand(theirs, name, data * 5, accumulate)
    for key, tensor in theirs.model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[key], tensor), key
    assert result.history[0].failed_inner_steps == 0
    full = network(training_data=data)
    full.optimizer.param_groups[0]["lr"] = 0.1 / large
    for batch in data * 5:
        train_step(full, batch, full.hyperparameters.values())
    difference = relative(ours.params, full.params)
    assert difference > 1e-5  # autocast did lower something
    if name == "float16":
        assert (scaler.get_scale() < 2.0**16) == (large > 1.0)
    else:
        assert difference < 0.05


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("bad", [0, 3, 5])
def test_a_row_of_steps_is_that_of_careful_ones(name: str, bad: int) -> None:
    """A loss that is not finite is left out, weights and the scale being as if it had never been there."""
    data = [(x, 1e4 * y) for x, y in BATCHES * 3]
    data[bad] = (data[bad][0] * math.nan, data[bad][1])

    def trained(batches: list[Batch], most: int) -> tuple[list[float], Any, Any]:
        problem = network(training_data=batches)
        precision = inner_precision(name, problem)
        training = PlainTraining(problem, problem.stream("training_data"))
        losses = []
        with training_in(problem, precision):
            for _ in range(len(batches) // most):
                losses += training.take(most, problem.hyperparameters.values())
        return losses, problem.model.state_dict(), precision.state_dict()

    found = trained(data, 6)
    assert [math.isnan(x) for x in found[0]] == [i == bad for i in range(6)]
    expected = trained([batch for i, batch in enumerate(data) if i != bad], 1)
    torch.testing.assert_close(found[1:], expected[1:], rtol=0, atol=0)


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    """GradScaler itself refuses a step in which there is no gradient at all."""
    problem = network()
    precision = scaled_by(problem, 4.0)
    before = {key: tensor.clone() for key, tensor in problem.params.items()}
    problem.optimizer.zero_grad()
    precision.step(problem.optimizer)
    torch.testing.assert_close(problem.params, before, rtol=0, atol=0)


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_loss_with_autocast_of_its_own_works_as_it_is(name: str) -> None:
    """Inside, the user's autocast is the one that holds; alone, it is all there is."""

    @hi.hyperparameter("decay", init=0.1, constraint=constraints.positive)
    def lowered(model: nn.Module, batch: Batch, *, decay: Tensor) -> Tensor:
        x, y = batch
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x)
        assert output.dtype is torch.bfloat16
        return (output.float().squeeze(1) - y).square().mean() + decay * model[0].weight.square().sum()

    found = []
    for precision in (None, name):
        problem = network(training_loss=lowered)
        result = hi.optimize(
            problem, "identity", outer_steps=3, inner_steps=4, inner_precision=precision, tracking=False
        )
        found.append(result.history[-1].training_loss)
    assert found[0] == pytest.approx(found[1], rel=2.0**-6)


# ------------------------------------------------------------------------------------ hypergradients of the theorem


@pytest.mark.parametrize("case", SOLUTION, ids=lambda case: case.name)
@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.filterwarnings("ignore::hyperopt_implicit.HyperoptWarning")
def test_autocast_has_no_say_in_what_the_theorem_gives(case: Case, name: str) -> None:
    """At the same weights, bit for bit; several calls for those that carry a solution."""
    found = []
    for precision in (None, name):
        problem = network()
        for batch in BATCHES:
            train_step(problem, batch, problem.hyperparameters.values())
        outer = hi.HyperOptimizer(problem, torch.optim.SGD, lr=0.0, backend=case.name, inner_precision=precision)
        for _ in range(2):
            result = outer.compute(BATCHES, VALIDATION)
        found.append(result)
    for key, gradient in found[0].gradients.items():
        assert torch.equal(found[1].gradients[key], gradient), key
    assert (found[1].status, found[1].hvps) == (found[0].status, found[0].hvps)
    assert found[1].training_loss == found[0].training_loss


# --------------------------------------------------------------------------------------- hypergradients through steps

EVOLUTION = {"evolution": {"sigma": 0.1, "pairs": 2}}


def through(
    problem: hi.BilevelProblem,
    backend: str,
    precision: InnerPrecision | None,
    batches: list[Any],
    validation: Any = VALIDATION,
    **options: Any,
) -> hi.Hypergradient:
    chosen = hi.get_backend(backend, **EVOLUTION.get(backend, {}), **options)
    with training_in(problem, precision or InnerPrecision()):
        return chosen.hypergradient(problem, batches, validation, {})


@pytest.mark.parametrize("case", TRAJECTORY, ids=lambda case: case.name)
@pytest.mark.parametrize("name", PRECISIONS)
def test_through_steps_the_error_is_that_of_rounding(case: Case, name: str) -> None:
    """Products are rounded to a relative ε/2 at each of the six steps and of their derivatives.

    ε is 2⁻⁷ of what a mantissa of seven bits tells apart, and 2⁻¹⁰ for float16. Errors of one sign in a row would make
    6ε of the weights; the difference that evolution takes over 2σ is of weights, not of derivatives.
    """
    epsilon = torch.finfo(DTYPES[name]).eps
    steps = BATCHES * 3
    full = through(network(), case.name, None, steps)
    problem = network()
    low = through(problem, case.name, inner_precision(name, problem), steps)
    assert low.status is full.status is hi.Status.CONVERGED
    assert 0.0 < relative(low.gradients, full.gradients) < (3.0 if case.name == "evolution" else 1.0) * epsilon


@pytest.mark.parametrize("case", TRAJECTORY, ids=lambda case: case.name)
@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("scale", [2.0**16, 2.0**40])
def test_what_is_differentiated_are_the_steps_of_plain_training(case: Case, name: str, scale: float) -> None:
    """They end where plain steps do, with the scale; from a scale that is too large, all steps but the last are left
    out.
    """
    ours, theirs = network(), network()
    batches = BATCHES * 15
    for precision, problem in ((scaled_by(ours, scale, name), ours), (scaled_by(theirs, scale, name), theirs)):
        if problem is ours:
            result = through(ours, case.name, precision, batches)
        else:
            with training_in(theirs, precision):
                for batch in batches:
                    train_step(theirs, batch, theirs.hyperparameters.values())
    assert result.endpoint is not None
    for key, tensor in theirs.params.items():
        torch.testing.assert_close(result.endpoint.params[key], tensor, rtol=1e-5, atol=1e-6)
    if name == "bfloat16":
        assert result.endpoint.scaling is None
        return
    assert result.endpoint.scaling is not None
    state = precision.state_dict()
    assert result.endpoint.scaling.tolist() == [state["scale"], state["_growth_tracker"]]
    assert (state["scale"] < scale) == (scale > 2.0**30)


@pytest.mark.parametrize("case", TRAJECTORY, ids=lambda case: case.name)
def test_a_step_that_is_left_out_is_none(case: Case) -> None:
    """Its derivative is that of standing still: the trajectory is the one without it, at the lower scale."""
    large = (BATCHES[0][0], 1e7 * BATCHES[0][1])
    problem = network()
    found = through(problem, case.name, scaled_by(problem, 2.0**12), [BATCHES[0], large, *BATCHES])
    expected = through(problem, case.name, scaled_by(problem, 2.0**11), [BATCHES[0], *BATCHES])
    assert found.endpoint is not None
    assert found.endpoint.scaling is not None
    assert found.endpoint.scaling.tolist() == [2.0**11, 2.0]
    assert relative(found.gradients, expected.gradients) < 2.0**-10
    assert relative(found.endpoint.params, expected.endpoint.params) < 2.0**-10  # type: ignore[union-attr]


def test_where_no_step_is_taken_nothing_depends_on_the_hyperparameters() -> None:
    for backend in ("unrolled", "forward"):
        problem = network()
        result = through(problem, backend, scaled_by(problem, 2.0**60), BATCHES)
        assert result.status is hi.Status.CONVERGED
        assert not any(g.any() for g in result.gradients.values())


@pytest.mark.parametrize("backend", ["unrolled", "forward", "forward_gradient"])
@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_the_scale_and_the_size_of_the_validation_loss_stay_out(backend: str, size: float) -> None:
    """An adjoint or tangent far outside float16's range of 6e-8 to 65504 is carried as well as one inside."""

    def outer(model: nn.Module, batch: Batch) -> Tensor:
        return size * validation_loss(model, batch)

    truth = through(network(), backend, None, BATCHES * 2).gradients
    for scale in (2.0**4, 2.0**10, 2.0**15):
        problem = network(validation_loss=outer)
        found = through(problem, backend, scaled_by(problem, scale), BATCHES * 2)
        assert relative({key: g / size for key, g in found.gradients.items()}, truth) < 2.0**-9


def test_a_large_hyperparameter_direction_is_carried_too() -> None:
    """L = (w − 10⁵·shift)²: its mixed derivative is out of float16's range."""

    @hi.hyperparameter("shift", init=1e-5)
    def loss(model: nn.Module, batch: Tensor, *, shift: Tensor) -> Tensor:
        return (model(batch) - 1e5 * shift).square().mean()

    def problem() -> hi.BilevelProblem:
        found = network(
            model=nn.Linear(1, 1, bias=False),
            training_loss=loss,
            validation_loss=lambda model, batch: model(batch).mean(),
        )
        found.model.weight.data.fill_(0.5)
        return found

    x = torch.ones(4, 1)
    for backend in ("unrolled", "forward"):
        low, full = problem(), problem()
        found = through(low, backend, scaled_by(low, 2.0**10), [x, x], x).gradients
        assert relative(found, through(full, backend, None, [x, x], x).gradients) < 2.0**-9


@pytest.mark.parametrize("options", [{"memory": "auto"}, {"folder": "."}, {"last": 4}], ids=str)
def test_what_is_kept_makes_no_difference(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    large = (BATCHES[0][0], 1e7 * BATCHES[0][1])
    steps = [*BATCHES, large, *BATCHES, *BATCHES, large]
    found = []
    for each in ({key: x for key, x in options.items() if key == "last"}, options):
        problem = network()
        found.append(through(problem, "unrolled", scaled_by(problem, 2.0**12), steps, **each))
    for key, gradient in found[0].gradients.items():
        assert torch.equal(found[1].gradients[key], gradient)


def test_iterates_on_disk_have_their_scale(tmp_path: Path) -> None:
    problem = network()
    with (
        training_in(problem, scaled_by(problem, 2.0**12)),
        Trajectory(problem, BATCHES * 2, folder=str(tmp_path)) as trajectory,
    ):
        kept, _ = trajectory._iterates.get(2)
    assert kept.scaling is not None
    assert kept.scaling.tolist() == [2.0**12, 2.0]


def test_the_scale_follows_torchs_rule() -> None:
    """Growth and backoff as by GradScaler, on a row of steps at random."""
    precision = InnerPrecision(torch.float16)
    assert precision.scaler is not None
    start = {"growth_factor": 3.0, "backoff_factor": 0.25, "growth_interval": 3, "scale": 2.0**100}
    precision.load_state_dict({**start, "_growth_tracker": 1})
    scaling = precision.scaling()
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    goods = [True] * 60 + [bool(x) for x in torch.rand(60, generator=torch.Generator().manual_seed(0)) < 0.7]
    for good in goods:
        assert scaling is not None
        scaling = precision.after(scaling, good=good)
        precision.scaled(torch.zeros(()))
        weight.grad = torch.tensor(1.0 if good else math.inf)
        precision.step(optimizer)
        state = precision.state_dict()
        assert scaling[0] == pytest.approx(state["scale"], rel=1e-6)
        assert scaling[1] == state["_growth_tracker"]
    assert len(set(goods)) == 2
    precision.keep(torch.tensor([8.0, 2.0], dtype=torch.float64))
    assert (precision.state_dict()["scale"], precision.state_dict()["_growth_tracker"]) == (8.0, 2)


# --------------------------------------------------------------------------------------------------------- whole runs

RUN = {
    "bome": {"steps": 20, "step_size": 0.02},
    "f2sa": {"penalty": 3.0, "steps": 50},
    "evolution": {"sigma": 0.1, "pairs": 1},
    "nystrom": {"damping": 1e-3},
    "identity": {"step_size": 0.5},
}


class Weights(nn.Module):
    """x·w in a layer, so that autocast lowers it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1, bias=False)
        self.layer.weight.data.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@hi.hyperparameter("decay", init=1.0, constraint=constraints.positive)
def ridge_loss(model: nn.Module, batch: Batch, *, decay: Tensor) -> Tensor:
    x, y = batch
    return 0.5 * (model(x).squeeze(1) - y).square().mean() + 0.5 * decay * model.layer.weight.square().sum()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore::hyperopt_implicit.HyperoptWarning")
def test_a_run_arrives_at_the_same_hyperparameters(case: Case) -> None:
    """Within 1 % for bfloat16, whose ε is 0.8 %, and within 0.2 % for float16, whose ε is 0.1 %.

    f2sa multiplies what is wrong with the weights by its penalty, which is small here.
    """

    def decay(name: str | None) -> float:
        data = [(torch.cat([x for x, _ in BATCHES]), 2.0 * torch.cat([y for _, y in BATCHES]))]
        problem = network(
            model=Weights(),
            training_loss=ridge_loss,
            training_data=data,
            validation_data=[(VALIDATION[0], 1.5 * VALIDATION[1])],
            optimizer=lambda params: torch.optim.SGD(params, lr=0.4),
        )
        result = hi.optimize(
            problem,
            hi.get_backend(case.name, **RUN.get(case.name, {})),
            outer_steps=60,
            inner_steps=8,
            outer_lr=0.1,
            seed=0,
            inner_precision=name,
            tracking=False,
        )
        assert result.failed_steps == 0
        assert sum(each.failed_inner_steps for each in result.history) == 0
        return float(result.hyperparameters["decay"])

    full = decay(None)
    assert full != pytest.approx(1.0, rel=0.1)
    assert decay("bfloat16") == pytest.approx(full, rel=0.01)
    assert decay("float16") == pytest.approx(full, rel=0.002)


def test_populations_in_mixed_precision_run_one_by_one() -> None:
    options = {"outer_steps": 2, "inner_steps": 2, "inner_precision": "bfloat16"}
    found = hi.optimize_population([network(), network()], {"name": "cg", "damping": 1.0}, **options)
    assert found.notes == ["members ran one by one: inner_precision='bfloat16' has no form for many members"]
    alone = hi.optimize(network(), {"name": "cg", "damping": 1.0}, tracking=False, **options)
    for each in found.outcomes:
        assert isinstance(each, hi.Result)
        torch.testing.assert_close(each.hyperparameters, alone.hyperparameters, rtol=0, atol=0)


# ----------------------------------------------------------------------------------------------------------- its state


@pytest.mark.parametrize("backend", ["identity", "unrolled"])
def test_the_scale_is_part_of_what_a_run_carries(backend: str) -> None:
    problem = network(training_data=[(x, 1e4 * y) for x, y in BATCHES])
    problem.optimizer.param_groups[0]["lr"] = 1e-6
    own = hi.HyperOptimizer(problem, torch.optim.SGD, lr=0.1, backend=backend, inner_precision="float16")
    own.compute([problem.training_data[0]] * 4, VALIDATION)  # type: ignore[index]
    state = own.state_dict()
    assert (state["inner_precision"]["scale"] < 2.0**16) == (backend == "unrolled")
    other = hi.HyperOptimizer(problem, torch.optim.SGD, lr=0.1, backend=backend, inner_precision="float16")
    other.load_state_dict(state)
    assert other.state_dict()["inner_precision"] == state["inner_precision"]
    full = hi.HyperOptimizer(problem, torch.optim.SGD, lr=0.1, backend=backend)
    full.load_state_dict(state)  # of another precision: left aside
    other.load_state_dict(full.state_dict())
    assert other.state_dict()["inner_precision"] == state["inner_precision"]
    old = {key: x for key, x in state.items() if key != "inner_precision"}
    other.load_state_dict(old)


@pytest.mark.parametrize("backend", ["identity", "unrolled"])
def test_a_run_that_is_resumed_goes_on_at_its_scale(backend: str, tmp_path: Path) -> None:
    """Bit for bit, where the scale falls before the run is stopped."""
    settings = {"inner_steps": 3, "inner_precision": "float16", "accumulate": 2, "outer_lr": 1e-3, "tracking": False}

    def problem() -> hi.BilevelProblem:
        found = network(training_data=[(x, 1e4 * y) for x, y in BATCHES])
        found.optimizer.param_groups[0]["lr"] = 1e-6
        return found

    whole = hi.optimize(problem(), {"name": backend}, outer_steps=6, **settings)
    first = problem()
    with pytest.raises(RuntimeError, match="stopped here"):
        hi.optimize(
            first, {"name": backend}, outer_steps=6, checkpoint=tmp_path / "run", checkpoint_every=1,
            callbacks=[_stop_at(3)], **settings,
        )  # fmt: skip
    second = problem()
    resumed = hi.optimize(
        second, {"name": backend}, outer_steps=6, checkpoint=tmp_path / "run", resume=True, **settings
    )
    for key, tensor in whole.problem.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[key], tensor)
    assert [each.training_loss for each in resumed.history] == [each.training_loss for each in whole.history]


def _stop_at(step: int) -> Callable[[hi.OuterStep, hi.BilevelProblem], None]:
    def stop(record: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        if record.step == step:
            raise RuntimeError("stopped here")

    return stop


# ------------------------------------------------------------------------------------------------------------ refusals


def refusal(problem: hi.BilevelProblem, name: Any) -> str:
    before = {key: p.clone() for key, p in problem.params.items()}
    messages = []
    for attempt in (
        lambda: hi.optimize(problem, "cg", inner_precision=name, tracking=False),
        lambda: hi.HyperOptimizer(problem, backend="cg", inner_precision=name),
    ):
        with pytest.raises(hi.HyperoptError) as raised:
            attempt()
        messages.append(str(raised.value))
    assert len(set(messages)) == 1
    torch.testing.assert_close(problem.params, before, rtol=0, atol=0)
    return messages[0]


@pytest.mark.parametrize("name", ["bf16", torch.bfloat16, "float32", 16, ""], ids=str)
def test_unknown_precisions(name: Any) -> None:
    assert refusal(network(), name) == (
        f"inner_precision must be 'bfloat16', 'float16', or None for the model's own; got {name!r}."
    )


def test_a_float64_model_has_nothing_to_lower() -> None:
    assert refusal(network(model=nn.Linear(4, 1).double()), "float16") == (
        "inner_precision='float16' lowers the inner steps of a float32 model by autocast, which leaves other types as "
        "they are; the trained parameters are in torch.float64. Train in float32, or leave the option out."
    )


def test_a_model_that_is_in_half_precision_in_part() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1).half())
    assert refusal(network(model=model), "float16") == (
        "inner_precision='float16' scales gradients of float32 parameters; some of the trained parameters are in "
        "torch.float16. Convert the model with .float(): autocast lowers what it computes."
    )


def test_a_device_without_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda device: device != "cpu")
    assert refusal(network(), "bfloat16") == (
        "inner_precision='bfloat16' needs a device on which torch has autocast for it; the model is on 'cpu'. Move it "
        "to another, or leave the option out."
    )


def test_a_loss_that_does_not_allow_for_results_in_half_precision() -> None:
    """Found before any training."""

    @hi.hyperparameter("decay", init=0.1)
    def strict(model: nn.Module, batch: Batch, *, decay: Tensor) -> Tensor:
        x, y = batch
        target = torch.zeros_like(y).unsqueeze(1)
        target[:] = y.unsqueeze(1)
        weights = torch.eye(1).index_add(0, torch.tensor([0]), model(x)[:1])  # needs one dtype
        return (model(x) - target).square().mean() + decay * weights.square().sum()

    problem = network(training_loss=strict)
    before = {key: p.clone() for key, p in problem.params.items()}
    with pytest.raises(hi.ProblemError) as raised:
        hi.optimize(problem, "cg", inner_precision="bfloat16", tracking=False)
    assert str(raised.value).startswith(
        "inner_precision runs the training loss under torch.autocast, and the loss must allow for results in half "
        "precision; this one does not (torch says: "
    )
    assert str(raised.value).endswith(
        "). Convert with .float() or .to(other.dtype) where that happens, or leave the option out."
    )
    torch.testing.assert_close(problem.params, before, rtol=0, atol=0)


def test_no_precision_costs_nothing_and_changes_nothing() -> None:
    problem = network()
    assert problem.inner_precision.state_dict() == {}
    assert problem.inner_precision.scaling() is None
    assert InnerSteps(problem).start().scaling is None
