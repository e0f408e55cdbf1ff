"""Learned auxiliary labels: numbers by hand, second derivatives, extreme logits, and a hypergradient through training.

Derivatives are compared in float64 with finite differences of the values and of the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hyperopt_implicit as hi
from hyperopt_implicit.auxiliary.labels import LabelGenerator, entropy_penalty, focal_loss, masked_softmax
from hyperopt_implicit.errors import AuxiliaryError
from hyperopt_implicit.testing import oracles


def generator(subclasses: Any = (2, 1, 3), features: int = 4, **options: Any) -> LabelGenerator:
    return LabelGenerator(nn.Identity(), features, subclasses, **options)


# ---------------------------------------------------------------------------------------------------- masked softmax


def test_masked_softmax_by_hand() -> None:
    """exp(0), exp(log 3) and exp(log 2) of which one is off the mask."""
    logits = torch.tensor([0.0, 3.0, 2.0], dtype=torch.float64).clamp(min=1.0).log()
    found = masked_softmax(logits.expand(3, 3), torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 0]]).bool())
    expected = torch.tensor([[1 / 4, 3 / 4, 0], [1 / 3, 0, 2 / 3], [0, 1, 0]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


def softmax_inputs() -> st.SearchStrategy[tuple[list[int], list[float], int, int]]:
    """Sub-classes of each class, logits of one sample, its class, and bits of precision."""
    counts = st.lists(st.integers(1, 5), min_size=1, max_size=5)
    logit = st.floats(-1e30, 1e30) | st.floats(-5, 5) | st.sampled_from([0.0, 1e30, -1e30])
    return counts.flatmap(
        lambda n: st.tuples(
            st.just(n),
            st.lists(logit, min_size=sum(n), max_size=sum(n)),
            st.integers(0, len(n) - 1),
            st.sampled_from([32, 64]),
        )
    )


@settings(deadline=None, derandomize=True, max_examples=200)
@given(softmax_inputs())
def test_labels_are_a_distribution_over_the_subclasses_of_the_class(
    case: tuple[list[int], list[float], int, int],
) -> None:
    subclasses, logits, label, bits = case
    dtype = {32: torch.float32, 64: torch.float64}[bits]
    made = generator(subclasses, features=1).to(dtype)
    nn.init.zeros_(made.head.weight)
    made.head.bias.data = torch.tensor(logits, dtype=dtype)
    labels = made(torch.zeros(1, 1, dtype=dtype), torch.tensor([label]))
    first = sum(subclasses[:label])
    own = range(first, first + subclasses[label])
    assert labels.shape == (1, sum(subclasses)) and labels.dtype == dtype
    assert all(labels[0, k] == 0.0 for k in range(sum(subclasses)) if k not in own)
    assert (labels >= 0.0).all()
    assert labels.sum().item() == pytest.approx(1.0, abs=8 * torch.finfo(dtype).eps)
    expected = torch.tensor([logits[k] for k in own], dtype=dtype).softmax(dim=0)
    torch.testing.assert_close(labels[0, list(own)], expected)
    losses = focal_loss(torch.zeros_like(labels), labels).sum() + entropy_penalty(labels)
    (gradient,) = torch.autograd.grad(losses, made.head.bias, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), made.head.bias)
    assert torch.isfinite(gradient).all() and torch.isfinite(second).all()
    assert all(gradient[k] == 0.0 for k in range(sum(subclasses)) if k not in own)


def test_masked_softmax_has_two_derivatives() -> None:
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 0, 1, 0], [1, 1, 1, 1, 1]]).bool()
    assert torch.autograd.gradcheck(lambda x: masked_softmax(x, mask), logits)
    assert torch.autograd.gradgradcheck(lambda x: masked_softmax(x, mask), logits)


# --------------------------------------------------------------------------------------------------------- generator


def test_generator_by_hand() -> None:
    """With e(x) = x, the logits are Wx + b; class 0 owns sub-classes 0 and 1, class 2 owns 3 to 5."""
    made = generator(features=1).double()
    made.head.weight.data = torch.tensor([[1.0], [0.0], [9.0], [0.0], [1.0], [1.0]], dtype=torch.float64)
    made.head.bias.data = torch.tensor([0.0, 0.0, -9.0, 0.0, 0.0, math.log(2.0)], dtype=torch.float64)
    x = torch.tensor([[math.log(3.0)], [0.0], [math.log(4.0)]], dtype=torch.float64)
    expected = [[3 / 4, 1 / 4, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 1 / 13, 4 / 13, 8 / 13]]
    found = made(x, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("subclasses", "options", "expected"),
    [((2, 1, 3), {}, (2, 1, 3)), ([4], {"classes": 1}, (4,)), (5, {"classes": 3}, (5, 5, 5))],
)
def test_generator_sizes(subclasses: Any, options: dict[str, int], expected: tuple[int, ...]) -> None:
    made = generator(subclasses, **options)
    assert (made.subclasses, made.classes, made.total_subclasses) == (expected, len(expected), sum(expected))
    assert made.head.out_features == made.total_subclasses


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_generator_takes_labels_of_any_integer_type(dtype: torch.dtype) -> None:
    """uint8 would be taken for a mask where it indexes a tensor."""
    made, x = generator(), torch.randn(3, 4)
    labels = torch.tensor([2, 0, 1])
    torch.testing.assert_close(made(x, labels.to(dtype)), made(x, labels))


def test_generator_moves_and_is_saved_like_any_module() -> None:
    made = generator()
    assert list(made.state_dict()) == ["head.weight", "head.bias"]
    other = generator()
    other.load_state_dict(made.state_dict())
    x, labels = torch.randn(3, 4), torch.tensor([2, 0, 1])
    assert torch.equal(other(x, labels), made(x, labels))
    assert made.double()(x.double(), labels).dtype == torch.float64
    assert made.to("meta").mask.device.type == "meta"


def test_generator_of_an_empty_batch() -> None:
    assert generator()(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)).shape == (0, 6)


def test_generator_trains_its_encoder() -> None:
    made = LabelGenerator(nn.Sequential(nn.Linear(5, 4), nn.Tanh()), 4, 2, classes=2)
    made(torch.randn(3, 5), torch.tensor([0, 1, 1])).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in made.parameters())


# -------------------------------------------------------------------------------------------------------- focal loss


@pytest.mark.parametrize(
    ("gamma", "expected"),
    [
        # p = (¼, ¾) and y = (0.6, 0.4): −0.6 (3/4)^γ log ¼ − 0.4 (1/4)^γ log ¾
        (0.0, 0.6 * math.log(4) + 0.4 * math.log(4 / 3)),
        (1.0, 0.45 * math.log(4) + 0.1 * math.log(4 / 3)),
        (2.0, 0.3375 * math.log(4) + 0.025 * math.log(4 / 3)),
        (0.5, 0.6 * math.sqrt(0.75) * math.log(4) + 0.2 * math.log(4 / 3)),
    ],
)
def test_focal_loss_by_hand(gamma: float, expected: float) -> None:
    logits = torch.tensor([[7.0, 7.0 + math.log(3)], [0.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([[0.6, 0.4], [1.0, 0.0]], dtype=torch.float64)
    loss = focal_loss(logits, labels, gamma=gamma)
    assert loss.tolist() == pytest.approx([expected, 0.5**gamma * math.log(2)], rel=1e-12)


def test_focal_loss_squares_by_default() -> None:
    logits, labels = torch.randn(3, 4), torch.randn(3, 4).softmax(dim=1)
    assert torch.equal(focal_loss(logits, labels), focal_loss(logits, labels, gamma=2.0))


def test_focal_loss_without_focus_is_cross_entropy() -> None:
    logits = torch.randn(6, 4, dtype=torch.float64) * 20
    labels = torch.randn(6, 4, dtype=torch.float64).softmax(dim=1)
    found, expected = focal_loss(logits, labels, gamma=0.0), cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0])
def test_focal_loss_has_two_derivatives_in_both(gamma: float) -> None:
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, y: focal_loss(x, y, gamma=gamma), (logits, labels))
    assert torch.autograd.gradgradcheck(lambda x, y: focal_loss(x, y, gamma=gamma), (logits, labels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("gap", [8.0, 16.0, 17.0, 30.0, 36.5, 100.0, 1e4, 1e30])
def test_focal_loss_of_a_confident_prediction(gap: float, gamma: float, dtype: torch.dtype) -> None:
    """p rounds to 1: right, and it costs nothing; wrong, and it costs the gap. No derivative is NaN or large."""
    logits = torch.tensor([[gap, 0.0], [gap, 0.0], [gap, 0.0]], dtype=dtype, requires_grad=True)
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], dtype=dtype, requires_grad=True)
    losses = focal_loss(logits, labels, gamma=gamma)
    right = math.exp(-gap * (1 + gamma)) if gap < 700 else 0.0
    # log p rounds to a multiple of the smallest step near 1
    close = {"rel": 1e-3, "abs": 2 * torch.finfo(dtype).eps ** min(1.0, 1 + gamma)}
    assert losses[0].item() == pytest.approx(right, **close)
    assert losses[1].item() == pytest.approx(gap, rel=1e-3)
    assert losses[2].item() == pytest.approx((gap + right) / 2, rel=1e-3)
    gradient, by_label = torch.autograd.grad(losses.sum(), [logits, labels], create_graph=True)
    torch.testing.assert_close(gradient[:2], torch.tensor([[0.0, 0.0], [1.0, -1.0]], dtype=dtype), rtol=0.01, atol=0.02)
    torch.testing.assert_close(by_label[:, 1], torch.full((3,), gap, dtype=dtype), rtol=1e-3, atol=0)
    second = torch.autograd.grad(gradient.square().sum() + by_label.square().sum() / gap, [logits, labels])
    assert all(torch.isfinite(x).all() for x in second)
    assert second[0].abs().max() < 10.0


# ----------------------------------------------------------------------------------------------------------- entropy


def test_entropy_penalty_by_hand() -> None:
    """The mean is (½, ¼, ¼, 0), with entropy 1.5 log 2; each label's own entropy is less."""
    labels = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.5, 0.5, 0.0]], dtype=torch.float64)
    assert entropy_penalty(labels).item() == pytest.approx(-1.5 * math.log(2), rel=1e-14)


@pytest.mark.parametrize("classes", [1, 2, 7])
def test_entropy_penalty_is_least_where_labels_vary_most(classes: int) -> None:
    varied, collapsed = torch.eye(classes, dtype=torch.float64), torch.zeros(classes, classes, dtype=torch.float64)
    collapsed[:, 0] = 1.0
    assert entropy_penalty(varied).item() == pytest.approx(-math.log(classes), abs=1e-14)
    assert entropy_penalty(collapsed).item() == 0.0
    between = entropy_penalty(0.5 * (varied + collapsed)).item()
    assert -math.log(classes) <= between <= 0.0


def test_adding_entropy_penalty_spreads_the_labels() -> None:
    """Descent on it alone takes labels from nearly one sub-class to all of them alike."""
    made = generator(3, features=1, classes=1)
    nn.init.zeros_(made.head.weight)
    made.head.bias.data = torch.tensor([4.0, 0.0, 0.0])
    x, labels = torch.zeros(2, 1), torch.zeros(2, dtype=torch.long)
    optimizer = torch.optim.SGD(made.parameters(), lr=1.0)
    for _ in range(200):
        optimizer.zero_grad()
        entropy_penalty(made(x, labels)).backward()
        optimizer.step()
    torch.testing.assert_close(made(x, labels)[0].detach(), torch.full((3,), 1 / 3), rtol=1e-3, atol=0)


def test_entropy_penalty_has_two_derivatives() -> None:
    labels = torch.rand(3, 4, dtype=torch.float64).add(0.1).requires_grad_()
    assert torch.autograd.gradcheck(entropy_penalty, labels)
    assert torch.autograd.gradgradcheck(entropy_penalty, labels)


def test_entropy_penalty_has_two_derivatives_where_a_class_is_missing() -> None:
    """Through the generator, no sample of whose second class is in the batch: its sub-classes have mean 0."""
    mask = generator().mask[torch.tensor([0, 2, 2])]
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: entropy_penalty(masked_softmax(x, mask)), logits)
    assert torch.autograd.gradgradcheck(lambda x: entropy_penalty(masked_softmax(x, mask)), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [50.0, 86.0, 88.0, 95.0, 103.0, 104.0, 700.0, 708.0, 720.0, 745.0, 800.0, 1e10])
def test_entropy_penalty_of_labels_that_underflow(gap: float, dtype: torch.dtype) -> None:
    """Normal numbers, the smallest ones, and zero: exp(−gap) is each in turn."""
    logits = torch.tensor([[gap, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    entropy = entropy_penalty(masked_softmax(logits, torch.ones(1, 3, dtype=torch.bool)))
    (gradient,) = torch.autograd.grad(entropy, logits, create_graph=True)
    (second,) = torch.autograd.grad(gradient[0, 1], logits)
    for x in (entropy, gradient, second):
        assert torch.isfinite(x).all() and x.abs().max() < 1e-15


# ----------------------------------------------------------------------------------------- a hyperparameter like any


class TwoHeads(nn.Module):
    """A hidden layer that both tasks share, so that the auxiliary labels move the main prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.main, self.auxiliary = nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(x).tanh()
        return self.main(hidden), self.auxiliary(hidden)


def learned_labels() -> tuple[hi.BilevelProblem, list[Any], Any]:
    init = LabelGenerator(nn.Sequential(nn.Linear(3, 2), nn.Tanh()), 2, [2, 3])

    @hi.hyperparameter("generator", init=init)
    def training_loss(model: nn.Module, batch: tuple[Tensor, Tensor], *, generator: LabelGenerator) -> Tensor:
        x, labels = batch
        main, auxiliary = model(x)
        decay = sum(p.square().sum() for p in model.parameters())
        return cross_entropy(main, labels) + focal_loss(auxiliary, generator(x, labels)).mean() + 0.05 * decay

    def validation_loss(model: nn.Module, batch: tuple[Tensor, Tensor], *, generator: LabelGenerator) -> Tensor:
        x, labels = batch
        return cross_entropy(model(x)[0], labels) + 0.2 * entropy_penalty(generator(x, labels))

    problem = hi.BilevelProblem(
        TwoHeads(), training_loss, validation_loss, optimizer=lambda params: torch.optim.SGD(params, lr=0.1)
    )
    batches = [(torch.randn(8, 3), torch.arange(8) % 2) for _ in range(2)]
    return problem, batches, (torch.randn(12, 3), torch.arange(12) % 2)


@pytest.mark.usefixtures("float64")
def test_hypergradient_is_that_of_training_to_the_end() -> None:
    """Against finite differences of F(w*(λ), λ), each through training to a minimum, along a line for each tensor."""
    problem, batches, validation = learned_labels()
    assert oracles.train_to_minimum(problem, batches) < 1e-12
    assert torch.linalg.eigvalsh(oracles.dense_derivatives(problem, batches).hessian)[0] > 1e-3
    backends: list[Any] = ["exact", {"name": "cg", "tolerance": 1e-12, "max_iterations": 200}]
    found = [
        hi.hypergradient(problem, backend, training_batches=batches, validation_batch=validation).gradients
        for backend in backends
    ]
    parts = ("encoder.0.weight", "encoder.0.bias", "head.weight", "head.bias")
    assert list(problem.hparams) == [f"generator.{part}" for part in parts]
    trained = {name: p.detach().clone() for name, p in problem.params.items()}
    for name, hparam in problem.hparams.items():
        start, direction, along = hparam.detach().clone(), torch.randn_like(hparam), torch.zeros(1)

        def outer_loss(
            hparam: Tensor = hparam, start: Tensor = start, direction: Tensor = direction, along: Tensor = along
        ) -> float:
            hparam.data.copy_(start + along * direction)
            for parameter, p in problem.params.items():
                p.data.copy_(trained[parameter])
            assert oracles.train_to_minimum(problem, batches) < 1e-11
            return float(problem.validation_loss(validation))

        expected = oracles.finite_differences(outer_loss, {"along": along}, step=1e-2)["along"]
        hparam.data.copy_(start)
        assert expected.abs() > 1e-4
        for gradients in found:
            slope = (gradients[name] * direction).sum().reshape(1)
            torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-8)


# ----------------------------------------------------------------------------------------------------------- refused

X, CLASSES = torch.zeros(3, 4), torch.tensor([0, 1, 2])
FORM = "labels must be integers of shape [batch], the class of each sample; got "
CONVERT = "Convert with .long(), or one-hot labels with .argmax(dim=1)."
RANGE = "labels must be classes from 0 to 2, since sub-classes are given for 3 classes; got "
LEAVE_OUT = "Leave out samples without a class, or give sub-classes for more classes."
SHAPE = "the encoder must return a tensor of shape (3, 4), one row for each of the 3 labels and one column for each of "
FLATTEN = "Give as many labels as inputs, and flatten what the encoder returns."
WIDTH = "The model's auxiliary output is as wide as the generator's total_subclasses."
NOT_SPLIT = "A class with a single sub-class is not split."

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "labels too large": (lambda: generator()(X, CLASSES + 1), f"{RANGE}3. {LEAVE_OUT}"),
    "labels negative": (lambda: generator()(X, CLASSES - 1), f"{RANGE}-1. {LEAVE_OUT}"),
    "labels not integer": (
        lambda: generator()(X, CLASSES.float()),
        f"{FORM}torch.float32 of shape (3,). {CONVERT}",
    ),
    "labels bool": (lambda: generator()(X, CLASSES > 1), f"{FORM}torch.bool of shape (3,). {CONVERT}"),
    "labels one-hot": (lambda: generator()(X, torch.eye(3).long()), f"{FORM}torch.int64 of shape (3, 3). {CONVERT}"),
    "labels of another length": (lambda: generator()(X[:2], CLASSES), f"{SHAPE}its features; got (2, 4). {FLATTEN}"),
    "encoder not flat": (
        lambda: generator()(torch.zeros(3, 4, 1, 1), CLASSES),
        f"{SHAPE}its features; got (3, 4, 1, 1). {FLATTEN}",
    ),
    "no sub-classes": (lambda: generator(()), f"subclasses must be at least 1 for every class; got []. {NOT_SPLIT}"),
    "a class without": (
        lambda: generator((2, 0, 3)),
        f"subclasses must be at least 1 for every class; got [2, 0, 3]. {NOT_SPLIT}",
    ),
    "none for all": (
        lambda: generator(0, classes=2),
        f"subclasses must be at least 1 for every class; got [0, 0]. {NOT_SPLIT}",
    ),
    "classes missing": (
        lambda: generator(2),
        "classes must be the number of classes, at least 1, where subclasses is one number; got None. Pass classes, or "
        "one number of sub-classes for each class.",
    ),
    "classes contradicted": (
        lambda: generator((2, 1, 3), classes=2),
        "subclasses must hold one number for each of the 2 classes; got 3 numbers. Leave out classes, or give a number "
        "for each.",
    ),
    "no features": (
        lambda: generator(features=0),
        "features must be the width of the encoder's output, at least 1; got 0.",
    ),
    "logits of another width": (
        lambda: focal_loss(torch.zeros(3, 5), torch.zeros(3, 6)),
        f"logits and soft_labels must both have shape [batch, classes]; got (3, 5) and (3, 6). {WIDTH}",
    ),
    "labels that broadcast": (
        lambda: focal_loss(torch.zeros(3, 6), torch.zeros(1, 6)),
        f"logits and soft_labels must both have shape [batch, classes]; got (3, 6) and (1, 6). {WIDTH}",
    ),
    "logits of one sample": (
        lambda: focal_loss(torch.zeros(6), torch.zeros(6)),
        f"logits and soft_labels must both have shape [batch, classes]; got (6,) and (6,). {WIDTH}",
    ),
    "gamma": (
        lambda: focal_loss(torch.zeros(1, 2), torch.zeros(1, 2), gamma=-1.0),
        "gamma must be at least 0; got -1.0. At 0 the loss is cross-entropy.",
    ),
    "entropy of one label": (
        lambda: entropy_penalty(torch.ones(3)),
        "soft_labels must have shape [batch, classes] with at least one sample; got (3,). Pass a batch of the "
        "generator's labels as it returns them.",
    ),
    "entropy of nothing": (
        lambda: entropy_penalty(torch.ones(0, 3)),
        "soft_labels must have shape [batch, classes] with at least one sample; got (0, 3). Pass a batch of the "
        "generator's labels as it returns them.",
    ),
    "mask of numbers": (
        lambda: masked_softmax(torch.zeros(2), torch.ones(2)),
        "mask must be bool and of the logits' shape (2,); got torch.float32 of shape (2,). Expand it, or convert it "
        "with .bool().",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_rule_what_was_found_and_what_to_do(case: str) -> None:
    attempt, message = REFUSED[case]
    with pytest.raises(AuxiliaryError) as raised:
        attempt()
    assert str(raised.value) == message
