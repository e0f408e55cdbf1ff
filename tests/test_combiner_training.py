"""Combiners as hyperparameters: their hypergradient, staying monotone while they are trained, and being saved."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import hyperopt_implicit as hi
from hyperopt_implicit.auxiliary import Context, ConvolutionalCombiner, LinearCombiner, LossCombiner, NonlinearCombiner
from hyperopt_implicit.testing.oracles import finite_differences, train_to_minimum
from hyperopt_implicit.vectors import Params

pytestmark = pytest.mark.usefixtures("float64")

Batch = tuple[Tensor, Tensor, Tensor]
TASKS = 3


def sample(rows: int, seed: int) -> Batch:
    """Four pixels a row with three features each, a target for each task and pixel, and a class for each row."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(rows, TASKS, 4, generator=generator, dtype=torch.float64)
    directions = torch.tensor([[1.0, -2.0, 0.5], [0.8, -1.5, 0.0], [-1.0, 0.5, 2.0]], dtype=torch.float64)
    return x, (x @ directions.T).transpose(1, 2) + 0.3 * noise, torch.arange(rows) % 2


TRAINING, VALIDATION = sample(6, 0), sample(8, 1)


class Shared(nn.Module):
    """w, by which all tasks predict."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -0.5, 0.2], dtype=torch.float64))


def task_losses(model: nn.Module, batch: Batch, combiner: LossCombiner) -> Tensor:
    """½(xw − y)² of each task, as images of 2 by 2 or as their means."""
    x, targets, _ = batch
    losses = 0.5 * ((x @ model.weight)[:, None] - targets).square()
    return losses.mean(dim=2) if combiner.dimensions == 2 else losses.view(-1, TASKS, 2, 2)


def combined_loss(model: nn.Module, batch: Batch, combiner: LossCombiner) -> Tensor:
    return combiner(task_losses(model, batch, combiner), inputs=batch[0][:, 0], labels=batch[2])


def main_loss(model: nn.Module, batch: Batch) -> Tensor:
    return 0.5 * (batch[0] @ model.weight - batch[1][:, 0]).square().mean()


def problem_of(
    combiner: LossCombiner, validation: Callable[..., Tensor] = main_loss, lr: float = 0.1
) -> hi.BilevelProblem:
    @hi.hyperparameter("combiner", init=combiner)
    def training_loss(model: nn.Module, batch: Batch, *, combiner: LossCombiner) -> Tensor:
        return combined_loss(model, batch, combiner) + 0.05 * model.weight.square().sum()

    return hi.BilevelProblem(
        Shared(),
        training_loss,
        validation,
        training_data=[TRAINING],
        validation_data=[VALIDATION],
        optimizer=lambda params: torch.optim.SGD(params, lr=lr),
    )


KINDS: dict[str, Callable[[], LossCombiner]] = {
    "linear": lambda: LinearCombiner(3),
    "linear, all learned": lambda: LinearCombiner(3, learn_main=True, init=[0.5, 1.0, 0.2], main_task=1),
    "softmax": lambda: LinearCombiner(3, softmax=True),
    "clamp": lambda: LinearCombiner(3, monotone="clamp"),
    "linear, normalised": lambda: LinearCombiner(3, weight_norm=True, init=[0.5, 2.0]),
    "linear, context": lambda: LinearCombiner(3, context=Context(features=3, classes=2)),
    "nonlinear": lambda: NonlinearCombiner(3, hidden_sizes=(2,)),
    "nonlinear, normalised": lambda: NonlinearCombiner(3, hidden_sizes=(2,), weight_norm=True),
    "nonlinear, context": lambda: NonlinearCombiner(3, hidden_sizes=(1, 2), context=Context(classes=2)),
    "convolutional": lambda: ConvolutionalCombiner(3, channels=(1,)),
    "convolutional, normalised": lambda: ConvolutionalCombiner(3, channels=(2,), kernel_size=1, weight_norm=True),
}


def flat(x: Params) -> Tensor:
    return torch.cat([each.detach().reshape(-1) for each in x.values()])


# ---------------------------------------------------------------------------------------------------- hypergradients


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_hypergradient_is_that_of_finite_differences(make: Callable[[], LossCombiner]) -> None:
    """Through training to the minimum, anew for each moved parameter."""
    problem = problem_of(make())
    assert train_to_minimum(problem, [TRAINING]) < 1e-12

    def outer_loss() -> float:
        train_to_minimum(problem, [TRAINING], tolerance=1e-11)
        return float(problem.validation_loss(VALIDATION))

    expected = flat(finite_differences(outer_loss, problem.hparams))
    train_to_minimum(problem, [TRAINING])
    assert expected.norm() > 1e-3
    for backend in ("exact", {"name": "cg", "tolerance": 1e-12}):
        found = hi.hypergradient(problem, backend, training_batches=[TRAINING], validation_batch=VALIDATION)
        torch.testing.assert_close(flat(found.gradients), expected, rtol=1e-6, atol=1e-8)


def test_losses_without_a_graph_are_refused() -> None:
    @hi.hyperparameter("combiner", init=LinearCombiner(3))
    def training_loss(model: nn.Module, batch: Batch, *, combiner: LossCombiner) -> Tensor:
        return combiner(task_losses(model, batch, combiner).detach())

    problem = hi.BilevelProblem(Shared(), training_loss, main_loss, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    with pytest.raises(hi.LossError) as caught:
        hi.hypergradient(problem, "cg", training_batches=[TRAINING], validation_batch=VALIDATION)
    assert str(caught.value) == (
        "training_loss must depend on the parameters that the inner optimizer holds; its result has no graph to any of "
        "them. Look for .detach(), .item() or torch.no_grad() in it, and use the model that the loss is given, not "
        "another."
    )


def test_reduced_losses_are_refused_before_training() -> None:
    @hi.hyperparameter("combiner", init=LinearCombiner(3))
    def training_loss(model: nn.Module, batch: Batch, *, combiner: LossCombiner) -> Tensor:
        return combiner(task_losses(model, batch, combiner).mean(dim=0))

    problem = hi.BilevelProblem(Shared(), training_loss, main_loss, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    with pytest.raises(hi.AuxiliaryError, match=r"^LinearCombiner takes losses of shape \[batch, tasks\] .*losses\[N"):
        hi.hypergradient(problem, "cg", training_batches=[TRAINING], validation_batch=VALIDATION)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("context", [False, True])
def test_combiner_follows_the_model_to_its_dtype(dtype: torch.dtype, context: bool) -> None:
    combiner = NonlinearCombiner(3, hidden_sizes=(2,), context=Context(classes=2) if context else None)

    @hi.hyperparameter("combiner", init=combiner)
    def training_loss(model: nn.Module, batch: Batch, *, combiner: LossCombiner) -> Tensor:
        return combined_loss(model, batch, combiner) + 0.05 * model.weight.square().sum()

    problem = hi.BilevelProblem(
        Shared().to(dtype), training_loss, main_loss, optimizer=lambda p: torch.optim.SGD(p, lr=0.1)
    )
    batch = (TRAINING[0].to(dtype), TRAINING[1].to(dtype), TRAINING[2])
    found = hi.hypergradient(problem, "cg", training_batches=[batch], validation_batch=batch)
    assert {g.dtype for g in found.gradients.values()} == {dtype}


# ------------------------------------------------------------------------------------------ monotone by construction

RISING = ["softplus", "tanh", "sigmoid", "relu", "leaky_relu", "elu", "identity"]


@st.composite
def monotone_combiners(draw: st.DrawFn) -> LossCombiner:
    """Of any kind and size, with parameters anywhere that training or clamping could have put them."""
    tasks, monotone = draw(st.integers(2, 6)), draw(st.sampled_from([True, "clamp"]))
    kind = draw(st.sampled_from([LinearCombiner, NonlinearCombiner, ConvolutionalCombiner]))
    options: dict[str, Any] = {"main_task": draw(st.integers(0, tasks - 1)), "monotone": monotone}
    options["weight_norm"] = draw(st.booleans())
    if kind is not LinearCombiner or monotone is True:
        options["context"] = Context(features=2, classes=3) if draw(st.booleans()) else None
    if kind is LinearCombiner:
        options["learn_main"] = draw(st.booleans())
        if monotone is True and not options["weight_norm"]:
            options["softmax"] = draw(st.booleans())
    else:
        sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
        options["hidden_sizes" if kind is NonlinearCombiner else "channels"] = sizes
        options["activation"] = draw(st.sampled_from(RISING))
        options["dropout"] = draw(st.sampled_from([0.0, 0.5]))
        options["skip_connection"] = draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 10_000)))
    combiner: LossCombiner = kind(tasks, **options)
    spread = draw(st.sampled_from([0.0, 0.1, 1.0, 5.0]))
    for p in combiner.parameters():
        p.data += spread * torch.randn(p.shape)
    combiner.project_()
    return combiner


@settings(max_examples=100, deadline=None)
@given(monotone_combiners(), st.sampled_from([0.0, 1e-3, 1.0, 1e6]), st.sampled_from([1e-2, 1.0, 1e4]))
def test_raising_a_loss_never_lowers_the_combined_one(combiner: LossCombiner, size: float, rise: float) -> None:
    """One loss of one sample, at one pixel; the gradient says the same. Dropout draws the same units each time."""
    shape = (3, combiner.tasks) if combiner.dimensions == 2 else (3, combiner.tasks, 2, 3)
    losses = (size * torch.rand(shape)).requires_grad_()
    given = {"inputs": torch.randn(3, 2), "labels": torch.tensor([0, 2, 1])}

    def combined(losses: Tensor) -> Tensor:
        torch.manual_seed(0)
        return combiner(losses, **given)

    before = combined(losses)
    (gradient,) = torch.autograd.grad(before, losses)
    assert bool((gradient >= 0.0).all())
    for task in range(combiner.tasks):
        raised = losses.detach().clone()
        raised[1, task].view(-1)[-1:] += rise
        assert combined(raised) >= before - 1e-12 * before.abs()


@pytest.mark.parametrize("make", [NonlinearCombiner, ConvolutionalCombiner])
def test_free_networks_can_fall(make: type[LossCombiner]) -> None:
    """What the property above would find."""
    lowest = []
    for seed in range(5):
        torch.manual_seed(seed)
        combiner = make(3, monotone=False)
        losses = torch.rand((2, 3, 2, 2)[: combiner.dimensions], requires_grad=True)
        lowest.append(float(torch.autograd.grad(combiner(losses), losses)[0].min()))
    assert min(lowest) < 0.0


@pytest.mark.parametrize("make", [LinearCombiner, NonlinearCombiner], ids=["linear", "nonlinear"])
def test_clamping_all_of_a_normalised_weight_gives_numbers(make: type[LossCombiner]) -> None:
    combiner = make(3, monotone="clamp", weight_norm=True)
    for p in combiner.parameters():
        p.data.fill_(-1.0)
    combiner.project_()
    assert bool(torch.isfinite(combiner(torch.ones(2, 3))))


@pytest.mark.parametrize("activation", [nn.LeakyReLU(-0.5), nn.ELU(-1.0)], ids=repr)
def test_rising_activations_that_were_made_to_fall_are_refused(activation: nn.Module) -> None:
    with pytest.raises(hi.AuxiliaryError, match="an activation that never falls"):
        NonlinearCombiner(2, activation=activation)


# ------------------------------------------------------------------------------------------- monotone after training

TRAINED: dict[str, Callable[..., LossCombiner]] = {
    "linear": lambda **o: LinearCombiner(3, **o),
    "linear, normalised": lambda **o: LinearCombiner(3, weight_norm=True, **o),
    "nonlinear": lambda **o: NonlinearCombiner(3, hidden_sizes=(3, 3), **o),
    "nonlinear, normalised": lambda **o: NonlinearCombiner(3, hidden_sizes=(4,), weight_norm=True, **o),
    "convolutional": lambda **o: ConvolutionalCombiner(3, channels=(3,), **o),
}


@pytest.mark.parametrize("monotone", [True, "clamp", False])
@pytest.mark.parametrize("make", TRAINED.values(), ids=TRAINED)
def test_training_that_pushes_weights_down(make: Callable[..., LossCombiner], monotone: bool | str) -> None:
    """F holds a combined loss itself, so that every weight would rather be negative; those of a free one become so."""

    def pushing_down(model: nn.Module, batch: Batch, *, combiner: LossCombiner) -> Tensor:
        losses = torch.ones((1, 3, 2, 2)[: combiner.dimensions])
        return 10.0 * combiner(losses) + main_loss(model, batch)

    problem = problem_of(make(monotone=monotone), pushing_down, lr=0.0)
    before = float(problem.validation_loss(VALIDATION))
    cheapest = {"name": "neumann", "terms": 1, "step_size": 0.1, "measure_residual": False}
    hi.optimize(problem, cheapest, outer_steps=100, inner_steps=1, outer_lr=0.3, tracking=False, progress=False)
    assert float(problem.validation_loss(VALIDATION)) < before - 5.0
    combiner = problem.hyperparameters()["combiner"]
    losses = task_losses(problem.model, TRAINING, combiner).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(combiner(losses), losses)
    if monotone is False:
        assert gradient.min() < 0.0
    else:
        assert gradient.min() >= 0.0
        assert gradient[:, 0].min() > 0.0  # the main loss itself, added as it is
    if monotone == "clamp":
        assert any(bool((p == 0.0).any()) for p in problem.hparams.values())


# ------------------------------------------------------------------------------------------------------------ saving


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_saved_and_restored_to_the_bit(make: Callable[[], LossCombiner]) -> None:
    def fresh() -> tuple[hi.BilevelProblem, hi.HyperOptimizer]:
        problem = problem_of(make())
        return problem, hi.HyperOptimizer(problem, torch.optim.Adam, lr=0.1, backend="cg")

    problem, outer = fresh()
    start = flat(problem.hparams)
    for _ in range(3):
        outer.step(TRAINING, VALIDATION)
    file = io.BytesIO()
    torch.save(outer.state_dict(), file)
    file.seek(0)
    torch.manual_seed(1)
    other, restored = fresh()
    restored.load_state_dict(torch.load(file, weights_only=True))

    def equal() -> bool:
        return torch.equal(flat(problem.hparams), flat(other.hparams))

    assert equal()
    assert not torch.equal(flat(problem.hparams), start)
    assert torch.equal(problem.training_loss(TRAINING), other.training_loss(TRAINING))
    assert outer.step(TRAINING, VALIDATION).hvps == restored.step(TRAINING, VALIDATION).hvps
    assert equal()
    copied = copy.deepcopy(problem.hyperparameters()["combiner"])
    assert torch.equal(
        combined_loss(problem.model, TRAINING, copied),
        combined_loss(problem.model, TRAINING, problem.hyperparameters()["combiner"]),
    )
