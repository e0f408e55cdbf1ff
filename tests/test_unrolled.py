"""Reverse mode in bounded memory: what is kept changes nothing but cost; against one long graph, and against plans."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.optim import SGD, Adam

import hyperopt_implicit as hi
from hyperopt_implicit import trajectory as trajectories
from hyperopt_implicit.diagnostics.measuring import peak_bytes
from hyperopt_implicit.inner_loop import InnerSteps
from hyperopt_implicit.testing.assertions import assert_unchanged, same
from hyperopt_implicit.testing.oracles import unrolled_hypergradient
from hyperopt_implicit.testing.specimens import network_problem, seeded
from hyperopt_implicit.trajectory import Trajectory
from hyperopt_implicit_backends import Unrolled

from .test_optimizers import OPTIMIZERS, assert_each_close, assert_same_state, train

STEPS = 9


def mean_square(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (model(x).reshape(y.shape) - y).square().mean()


def problem_with(
    model: nn.Module, optimizer: Any = lambda params: SGD(params, lr=0.02, momentum=0.9), **tuned: float
) -> hi.BilevelProblem:
    def training_loss(model, batch, *, decay):
        return mean_square(model, batch) + (decay * next(model.parameters()).square()).sum()

    loss = hi.hyperparameter("decay", init=0.1, constraint=constraints.positive)(training_loss)
    for name, init in tuned.items():
        loss = hi.hyperparameter(name, init=init, constraint=constraints.positive, target="optimizer")(loss)
    return hi.BilevelProblem(model, loss, mean_square, optimizer=optimizer)


def built(build: Any) -> nn.Module:
    torch.manual_seed(0)
    return build()


def drawing_layers() -> nn.Module:
    """Random masks and running statistics."""
    return built(
        lambda: nn.Sequential(
            nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8), nn.Dropout(0.4), nn.Tanh(), nn.Linear(8, 1)
        )
    )


def convolutions() -> nn.Module:
    """With weights in channels_last, whose order in memory is not that of their indices."""
    net = built(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.Softplus(), nn.AvgPool2d(2), nn.Conv2d(6, 4, 3), nn.Flatten(),
            nn.Linear(16, 1),
        )
    )  # fmt: skip
    return net.to(memory_format=torch.channels_last)


def batches(*shape: int, steps: int = STEPS, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(12, *shape, generator=generator, dtype=torch.float64).to(dtype),
            torch.randn(12, generator=generator, dtype=torch.float64).to(dtype),
        )
        for _ in range(steps + 1)
    ]


def hypergradient(problem: hi.BilevelProblem, data: Any, **options: Any) -> hi.Hypergradient:
    """On all batches but the last, which validates; always with the same random numbers."""
    torch.manual_seed(5)
    return hi.hypergradient(problem, Unrolled(**options), training_batches=data[:-1], validation_batch=data[-1])


def iterates(problem: hi.BilevelProblem, count: int) -> int:
    """A budget of so many."""
    return count * InnerSteps(problem).iterate_bytes()


# --------------------------------------------------------------------------------------- what is kept changes nothing

MODELS = {"drawing": (drawing_layers, (3,)), "convolutions": (convolutions, (3, 8, 8))}
KINDS = {
    "sgd": lambda params: SGD(params, lr=0.02, momentum=0.9),
    "adam": lambda params: Adam(params, lr=0.05),
    "adamw amsgrad": lambda params: torch.optim.AdamW(params, lr=0.05, amsgrad=True),
    "nadam": lambda params: torch.optim.NAdam(params, lr=0.05),
    "asgd": lambda params: torch.optim.ASGD(params, lr=0.05, lambd=0.1, t0=3),
}
every_model = pytest.mark.parametrize(("model", "shape"), MODELS.values(), ids=MODELS)
every_kind = pytest.mark.parametrize("optimizer", KINDS.values(), ids=KINDS)


@every_model
@every_kind
def test_keeping_less_gives_the_same_to_the_bit(model, shape, optimizer, tmp_path):
    tuned = {"lr": 0.05} if len(shape) == 1 else {}
    problem, data = problem_with(model(), optimizer, **tuned), batches(*shape)
    whole = hypergradient(problem, data)
    random = torch.get_rng_state()
    assert whole.status is hi.Status.CONVERGED
    choices = [{"memory": iterates(problem, n)} for n in (2, 4)]
    for options in [*choices, {"memory": "auto"}, {"folder": str(tmp_path)}]:
        with assert_unchanged(problem, random_state=False):
            found = hypergradient(problem, data, **options)
        assert same(found.gradients, whole.gradients), options
        assert_same_state(found.endpoint, whole.endpoint, 0.0)
        assert torch.equal(torch.get_rng_state(), random), options
        assert (found.iterations, found.hvps, found.validation_loss) == (STEPS, STEPS, whole.validation_loss)


@pytest.mark.parametrize("options", [{"memory": 0}, {"memory": "auto"}, {"folder": ""}], ids=["two", "auto", "disk"])
def test_the_last_steps_in_little_memory(options, tmp_path):
    problem, data = problem_with(drawing_layers()), batches(3)
    options = {"memory": lambda m: m or iterates(problem, 2), "folder": lambda _: str(tmp_path)}[next(iter(options))](
        next(iter(options.values()))
    )
    name = "folder" if options == str(tmp_path) else "memory"
    expected = hypergradient(problem, data, last=7)
    found = hypergradient(problem, data, last=7, **{name: options})
    assert same(found.gradients, expected.gradients)
    assert (found.status, found.iterations) == (hi.Status.TRUNCATED, 7)
    assert not same(found.gradients, hypergradient(problem, data).gradients)


@every_model
def test_from_an_existing_state(model, shape):
    """Momenta and counters that training left behind."""
    problem, data = problem_with(model(), KINDS["adam"]), batches(*shape)
    train(problem, data[:4])
    found = hypergradient(problem, data, memory="auto")
    assert same(found.gradients, hypergradient(problem, data).gradients)
    assert same(found.gradients, hypergradient(problem, data).gradients)  # and the model is where it was


def test_a_step_taken_again_is_the_same_to_the_bit():
    """The iterates themselves, where create_graph=True would change the gradients of convolutions."""
    problem, data = problem_with(convolutions()), batches(3, 8, 8)
    reached: dict[int, list[Tensor]] = {}
    advance = InnerSteps.advance

    def watched(self: InnerSteps, t: int, current: Any, *arguments: Any) -> float:
        loss = advance(self, t, current, *arguments)
        reached.setdefault(t, []).append(next(iter(current.params.values())).clone())
        return loss

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(InnerSteps, "advance", watched)
        hypergradient(problem, data, memory=iterates(problem, 2))
    assert sum(len(each) for each in reached.values()) > 2 * STEPS
    assert all(torch.equal(each[0], again) for each in reached.values() for again in each)


@every_model
def test_the_steps_are_those_of_plain_training_to_the_bit(model, shape):
    problem, data = problem_with(model(), KINDS["adam"]), batches(*shape)
    found = hypergradient(problem, data, memory="auto").endpoint
    torch.manual_seed(5)
    train(problem, data[:-1])
    assert_same_state(found, problem.inner_state(), 0.0)


def test_in_the_outer_loop():
    data = batches(3)

    def run(backend: Any) -> Any:
        problem = problem_with(drawing_layers())
        problem.training_data, problem.validation_data = data[:-1], data[-1:]
        return hi.optimize(
            problem, backend, outer_steps=3, inner_steps=6, outer_lr=0.1, tracking=False, progress=False, seed=0
        )

    found, expected = run({"name": "unrolled", "memory": "auto"}), run("unrolled")
    assert same(found.hyperparameters, expected.hyperparameters)


# ------------------------------------------------------------------------------------------------ against one graph


def one_graph(problem: hi.BilevelProblem, data: Any, optimizer: str) -> dict[str, Tensor]:
    """dF/dλ by autograd through all steps at once, with the update written out by hand."""
    hparams, state = problem.hparams, problem.inner_state()
    w, buffers = {name: p.requires_grad_() for name, p in state.params.items()}, state.buffers
    first, second = ({name: torch.zeros_like(p) for name, p in w.items()} for _ in range(2))
    torch.manual_seed(5)
    for t, batch in enumerate(data[:-1], start=1):
        buffers = {name: b.clone() for name, b in buffers.items()}
        loss = problem.functional_training_loss(w, hparams, batch, buffers)
        g = dict(zip(w, torch.autograd.grad(loss, list(w.values()), create_graph=True), strict=True))
        if optimizer == "sgd":
            first = {name: 0.9 * first[name] + g[name] for name in w}
            w = {name: w[name] - 0.02 * first[name] for name in w}
        else:
            first = {name: 0.9 * first[name] + 0.1 * g[name] for name in w}
            second = {name: 0.999 * second[name] + 0.001 * g[name] ** 2 for name in w}
            w = {
                name: w[name] - 0.05 * first[name] / (1 - 0.9**t) / ((second[name] / (1 - 0.999**t)).sqrt() + 1e-8)
                for name in w
            }
    loss = problem.functional_validation_loss(w, hparams, data[-1], buffers)
    return dict(zip(hparams, torch.autograd.grad(loss, list(hparams.values())), strict=True))


@every_model
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_against_one_long_graph(model, shape, optimizer, dtype):
    """In float32 the gradients of convolutions with a graph are rounded otherwise than those without.

    Adam magnifies rounding where a second moment is small; there both sides are off from float64 by as much or more.
    """
    problem, data = problem_with(model().to(dtype), KINDS[optimizer]), batches(*shape, dtype=dtype)
    expected = one_graph(problem, data, optimizer)
    found = hypergradient(problem, data, memory="auto").gradients
    accuracy = {"sgd": 1e-6 if len(shape) == 1 else 5e-6, "adam": 3e-5}[optimizer]
    assert_each_close(found, expected, accuracy if dtype is torch.float32 else 1e-10)


@pytest.mark.usefixtures("float64")
def test_gradient_descent_equals_the_oracle_of_the_conformance_suite():
    problem = network_problem(seeded(drawing_layers))
    data = batches(3, dtype=torch.float64)
    torch.manual_seed(5)
    expected = unrolled_hypergradient(problem, data[:-1], data[-1])
    assert_each_close(hypergradient(problem, data, memory="auto").gradients, expected, 1e-11)


# ----------------------------------------------------------------------------------------------- plans, and their cost


@pytest.mark.parametrize("count", [2, 3, 4, 7, STEPS, 40])
def test_steps_taken_again_and_iterates_held_are_those_of_the_plan(count, monkeypatch):
    problem, data = problem_with(drawing_layers()), batches(3)
    backend = Unrolled(memory=iterates(problem, count))
    plan = backend.plan(problem, STEPS)
    assert plan.slots == min(count, STEPS)
    seen: Counter[str] = Counter()
    advance, put = InnerSteps.advance, trajectories._InMemory.put

    def counted(*arguments: Any) -> float:
        seen["steps"] += 1
        return advance(*arguments)

    def held(self: Any, *arguments: Any) -> None:
        put(self, *arguments)
        seen["held"] = max(seen["held"], len(self._held))

    monkeypatch.setattr(InnerSteps, "advance", counted)
    monkeypatch.setattr(trajectories._InMemory, "put", held)
    hypergradient(problem, data, memory=backend.memory)
    assert seen["steps"] == STEPS + plan.replayed
    assert seen["held"] == plan.slots - 1  # the first is the model itself
    assert seen["held"] + 1 <= count  # with the one that walks


def test_what_auto_and_all_plan():
    problem = problem_with(drawing_layers())
    plans = [Unrolled(memory=memory).plan(problem, 1000) for memory in (None, "auto", iterates(problem, 5000))]
    assert [(plan.slots, plan.replayed) for plan in plans] == [(1000, 0), (44, 956), (1000, 0)]
    assert Unrolled(memory=iterates(problem, 5), last=100).plan(problem, 1000).slots == 4  # none of them the model
    assert Unrolled(memory=iterates(problem, 5), last=100).plan(problem, 100).slots == 5


@pytest.mark.parametrize("row", OPTIMIZERS, ids=str)
@pytest.mark.usefixtures("float64")
def test_the_size_of_an_iterate_is_known_before_training(row):
    """Of a model that every batch updates, from no state at all, against the tensors that training leaves."""
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))
    problem = problem_with(model, row)
    expected = InnerSteps(problem).iterate_bytes()
    train(problem, batches(3, dtype=torch.float64)[:1])
    state = problem.inner_state()
    tensors = [*state.params.values(), *state.buffers.values(), torch.get_rng_state()]
    tensors += [x for each in state.optimizer.values() for x in each.values() if isinstance(x, Tensor)]
    assert expected == sum(x.numel() * x.element_size() for x in tensors)


def test_memory_is_that_of_the_budget():
    """Iterates of 1.1 MB, of which 30 are reached: all, five, or none beside the graph of one step."""
    problem = problem_with(built(lambda: nn.Sequential(nn.Linear(64, 1024), nn.Tanh(), nn.Linear(1024, 64))))
    size = InnerSteps(problem).iterate_bytes()
    x = torch.randn(2, 64)
    data = [(x, torch.zeros(2, 64))] * 31

    def peak(**options: Any) -> float:
        return peak_bytes(lambda: hypergradient(problem, data, **options)) / size

    everything, five = peak(), peak(memory=5 * size)
    assert everything - five == pytest.approx(30 - 5, abs=2.5)
    assert five < 12  # five, the endpoint, the adjoint before and after, the gradient and its graph


def test_generators_that_nobody_uses_are_kept_once():
    """Their state takes 5 kB, more than many a model."""
    problem = problem_with(built(lambda: nn.Linear(3, 1)))
    held = Trajectory(problem, batches(3, steps=20))
    states = {id(random[0]) for _, random in held._iterates._held.values()}
    assert len(states) == 1
    adjoint = {name: torch.ones_like(p) for name, p in problem.params.items()}
    held.pull_back(adjoint)
    with pytest.raises(RuntimeError, match="can be pulled back through once"):
        held.pull_back(adjoint)


# --------------------------------------------------------------------------------------------------------------- disk


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_the_folder_is_used_and_left_empty(tmp_path):
    problem, data = problem_with(drawing_layers()), batches(3)
    seen = []
    loss = problem.loss_source("validation_loss")

    def validation_loss(model, batch):
        seen.extend(path for path in files(tmp_path) if path.is_file())
        return loss(model, batch)

    hypergradient(problem.copy(losses={"validation_loss": validation_loss}), data, folder=str(tmp_path))
    assert len(seen) == STEPS - 1  # the first is the model itself
    assert all(path.parent.name.startswith("hyperopt-implicit-") for path in seen)
    assert files(tmp_path) == []


@pytest.mark.parametrize("role", ["training_loss", "validation_loss"])
@pytest.mark.parametrize("when", [1, 5, STEPS + 3])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_folder_is_left_empty_by_what_goes_wrong(role, when, error, tmp_path):
    """In the first sweep, between the sweeps, and in the backward one."""
    problem, data = problem_with(drawing_layers()), batches(3)
    loss, calls, used = problem.loss_source(role), [0], []

    def failing(model, batch, **hyperparameters):
        calls[0] += 1
        if calls[0] == (when if role == "training_loss" else 1):
            used.extend(files(tmp_path))
            raise error("stop")
        return loss(model, batch, **hyperparameters)

    failing.__signature__ = __import__("inspect").signature(loss)
    broken = problem.copy(losses={role: failing})
    torch.manual_seed(5)
    with pytest.raises(error, match="stop"):
        Unrolled(folder=str(tmp_path)).hypergradient(broken, data[:-1], data[-1], {})
    assert used
    assert files(tmp_path) == []


def test_tensors_of_every_kind_come_back_from_disk(tmp_path):
    """Their type, the order of their elements in memory, and whether they have any."""
    kept = trajectories._OnDisk(str(tmp_path))
    tensors = {
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "transposed": torch.randn(3, 4).t(),
        "part": torch.randn(6)[2:4],
        "expanded": torch.ones(1, 3).expand(2, 3),
        "bfloat16": torch.randn(3).bfloat16(),
        "integer": torch.tensor(7),
        "bool": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "complex": torch.randn(2, dtype=torch.complex64),
    }
    kept.put(3, trajectories.Iterate(tensors, {"w": {"step": torch.tensor(2.0)}, "b": {}}, {}), [torch.get_rng_state()])
    for take in (kept.get, kept.pop):
        found, random = take(3)
        assert same(found.params, tensors)
        assert {name: x.dtype for name, x in found.params.items()} == {name: x.dtype for name, x in tensors.items()}
        assert found.slots == {"w": {"step": torch.tensor(2.0)}, "b": {}}
        assert torch.equal(random[0], torch.get_rng_state())
    strides = {name: found.params[name].stride() for name in ("channels_last", "transposed")}
    assert strides == {name: tensors[name].stride() for name in strides}
    assert [path.name for path in files(tmp_path)][1:] == []  # its own directory
    kept.close()
    assert files(tmp_path) == []
