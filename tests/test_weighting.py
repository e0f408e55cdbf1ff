"""Weighting methods: numbers worked out by hand on three quadratics, the contract that all share, and what is refused.

The three tasks, on x ∈ R², are L₀ = ½‖x‖², L₁ = ½(x₀ − 3)² and L₂ = ½x₁². At x = (1, 2) they are (2.5, 2, 2), with
gradients (1, 2), (−2, 0) and (0, 2), and inner products [[5, −2, 4], [−2, 4, 0], [4, 0, 4]].
"""

from __future__ import annotations

import copy
import io
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import hyperopt_implicit as hi
from hyperopt_implicit.auxiliary.gradient_weighting import GradientCosine, GradNorm, PCGrad
from hyperopt_implicit.auxiliary.loss_weighting import DynamicWeightAverage, EqualWeights, UncertaintyWeighting
from hyperopt_implicit.auxiliary.weighting import Weighting, get_weighting, list_weightings
from hyperopt_implicit.errors import AuxiliaryError

pytestmark = pytest.mark.usefixtures("float64")

OPTIONS: dict[str, dict[str, Any]] = {"fixed": {"weights": [1.0, 0.5, 2.0]}}
METHODS = list_weightings()
LOOKS_AT_GRADIENTS = {"cosine", "cosine-unweighted", "gradnorm", "pcgrad"}


def make(name: str, tasks: int = 3, **options: Any) -> Weighting:
    return get_weighting(name, tasks, **{**OPTIONS.get(name, {}), **options}).to(torch.get_default_dtype())


def quadratics(x: Tensor) -> Tensor:
    return torch.stack([0.5 * x.square().sum(), 0.5 * (x[0] - 3.0) ** 2, 0.5 * x[1] ** 2])


def at(*values: float) -> Tensor:
    return torch.tensor(values).requires_grad_()


def assert_close(actual: Tensor, *expected: float) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.reshape(-1), wanted, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------------------------------------------- numbers by hand

COSINE = 2 / math.sqrt(5)  # of (1, 2) and (0, 2)


@pytest.mark.parametrize(
    ("weighting", "weights", "gradient"),
    [
        (lambda: make("equal"), (1, 1, 1), (-1, 4)),
        (lambda: make("single"), (1, 0, 0), (1, 2)),
        (lambda: make("single", main_task=2), (0, 0, 1), (0, 2)),
        (lambda: make("fixed"), (1, 0.5, 2), (0, 6)),
        (lambda: make("uncertainty"), (0.5, 0.5, 0.5), (-0.5, 2)),
        (lambda: make("dwa"), (1, 1, 1), (-1, 4)),
        (lambda: make("cosine"), (1, 0, COSINE), (1, 2 + 2 * COSINE)),
        (lambda: make("cosine", main_task=2), (COSINE, 0, 1), (COSINE, 2 * COSINE + 2)),
        (lambda: make("cosine-unweighted"), (1, 0, 1), (1, 4)),
        (lambda: make("cosine-unweighted", main_task=1), (0, 1, 1), (-2, 2)),
        (lambda: make("gradnorm"), (1, 1, 1), (-1, 4)),
        # g₀ − (−2/4) g₁ = (0, 2); g₁ − (−2/5) g₀ = (−1.6, 0.8); g₂ conflicts with neither
        (lambda: make("pcgrad"), (1.4, 1.5, 1), (-1.6, 4.8)),
    ],
)
def test_first_step_by_hand(
    weighting: Callable[[], Weighting], weights: tuple[float, ...], gradient: tuple[float, ...]
) -> None:
    x = at(1.0, 2.0)
    (found,), used = weighting().gradients(quadratics(x), [x])
    assert_close(used, *weights)
    assert_close(found, *gradient)
    assert_close(weighting().backward(quadratics(x), [x]), *weights)
    assert_close(x.grad, *gradient)


def test_uncertainty_by_hand() -> None:
    """w = ½ exp(−s) and ∂/∂s = ½ − wL, at exp(s) = (1, 2, 4)."""
    weighting = make("uncertainty")
    (s,) = weighting.parameters()
    s.data = torch.tensor([1.0, 2.0, 4.0]).log()
    x = at(1.0, 2.0)
    assert_close(weighting.backward(quadratics(x), [x]), 0.5, 0.25, 0.125)
    assert_close(x.grad, 0.0, 1.25)
    assert_close(s.grad, 0.5 - 1.25, 0.5 - 0.5, 0.5 - 0.25)


def test_uncertainty_ends_at_the_losses() -> None:
    """For losses that stay, s → log L."""
    weighting, losses = make("uncertainty"), torch.tensor([0.5, 2.0, 8.0])
    optimizer = torch.optim.SGD(weighting.parameters(), lr=0.5)
    for _ in range(300):
        x = at(0.0)
        weighting.backward(losses + 0.0 * x, [x])
        optimizer.step()
        optimizer.zero_grad()
    assert_close(next(weighting.parameters()).detach(), *losses.log().tolist())


def test_dwa_by_hand() -> None:
    """Averages (4, 2, 1), then (2, 2, 1): rates (½, 1, 1), of which the softmax at temperature 2 is taken."""
    weighting, x = make("dwa"), at(1.0)
    epochs = [[(3.0, 1.0, 1.0), (5.0, 3.0, 1.0)], [(1.0, 3.0, 0.5), (3.0, 1.0, 1.5), (2.0, 2.0, 1.0)]]
    for epoch in epochs:
        for losses in epoch:
            assert_close(weighting.backward(torch.tensor(losses) * x, [x]), 1.0, 1.0, 1.0)
        weighting.end_epoch()
    total = math.exp(0.25) + 2 * math.exp(0.5)
    expected = [3 * math.exp(0.25) / total, 3 * math.exp(0.5) / total, 3 * math.exp(0.5) / total]
    losses = torch.tensor([9.0, 1.0, 1.0])
    for _ in range(2):  # the losses of this epoch change nothing yet
        assert_close(weighting.backward(losses * x, [x]), *expected)
    weighting.end_epoch()
    # now (9/2, ½, 1), whatever there was before
    rates = [math.exp(rate / 2) for rate in (4.5, 0.5, 1.0)]
    assert_close(weighting.backward(losses * x, [x]), *(3 * rate / sum(rates) for rate in rates))


def test_dwa_temperature() -> None:
    weighting, x = make("dwa", temperature=0.5), at(1.0)
    for losses in ([4.0, 2.0, 1.0], [2.0, 2.0, 1.0]):
        weighting.backward(torch.tensor(losses) * x, [x])
        weighting.end_epoch()
    rates = [math.exp(rate / 0.5) for rate in (0.5, 1.0, 1.0)]
    expected = [3 * rate / sum(rates) for rate in rates]
    assert_close(weighting.backward(torch.tensor([1.0, 1.0, 1.0]) * x, [x]), *expected)


def test_dwa_epoch_without_steps_is_none() -> None:
    weighting, x = make("dwa"), at(1.0)
    weighting.end_epoch()
    for losses in ([4.0, 2.0, 1.0], [2.0, 2.0, 1.0]):
        weighting.backward(torch.tensor(losses) * x, [x])
        weighting.end_epoch()
        weighting.end_epoch()
    rates = [math.exp(rate / 2) for rate in (0.5, 1.0, 1.0)]
    expected = [3 * rate / sum(rates) for rate in rates]
    assert_close(weighting.backward(torch.tensor([1.0, 1.0, 1.0]) * x, [x]), *expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dwa_of_a_solved_task(dtype: torch.dtype) -> None:
    """0/0 is a rate of 1, and 1/0 is large."""
    weighting, x = make("dwa"), torch.ones(1, dtype=dtype, requires_grad=True)
    for losses in ([0.0, 0.0, 1.0], [0.0, 1.0, 1.0]):
        weighting.backward(torch.tensor(losses, dtype=dtype) * x, [x])
        weighting.end_epoch()
    weights = weighting.backward(torch.ones(3, dtype=dtype) * x, [x])
    torch.testing.assert_close(weights, torch.tensor([0.0, 3.0, 0.0], dtype=dtype))
    first = make("dwa", tasks=2)
    for _ in range(2):
        first.backward(torch.tensor([0.0, 1.0], dtype=dtype) * x, [x])
        first.end_epoch()
    torch.testing.assert_close(
        first.backward(torch.ones(2, dtype=dtype) * x, [x]), torch.ones(2, dtype=dtype), rtol=1e-6, atol=0
    )


def test_gradnorm_first_step_by_hand() -> None:
    """Norms (√5, 2, 2) with mean (√5 + 4)/3 between √5 and 2; all tasks are where they began."""
    weighting, x = make("gradnorm"), at(1.0, 2.0)
    weighting.backward(quadratics(x), [x])
    assert_close(weighting.task_weights.grad, math.sqrt(5), -2.0, -2.0)


@pytest.mark.parametrize(
    ("alpha", "gradient"),
    [
        # targets 1.4714 (1, 1, 1), then times (0.7273, 1.8182, 0.4545), then times its power
        (0.0, (-math.sqrt(2), 2.0, -1.0)),
        (1.0, (math.sqrt(2), -2.0, 1.0)),
        (0.1, (-math.sqrt(2), 2.0, -1.0)),
        (0.6, (math.sqrt(2), -2.0, 1.0)),
    ],
)
def test_gradnorm_second_step_by_hand(alpha: float, gradient: tuple[float, ...]) -> None:
    """At (1, 1): losses (1, 2, ½) after (2.5, 2, 2), so rates (0.4, 1, 0.25)/0.55; norms (√2, 2, 1)."""
    weighting, x = make("gradnorm", alpha=alpha), at(1.0, 2.0)
    weighting.backward(quadratics(x), [x])
    weighting.zero_grad()
    x = at(1.0, 1.0)
    weighting.backward(quadratics(x), [x])
    assert_close(weighting.task_weights.grad, *gradient)


def test_gradnorm_objective_by_hand() -> None:
    weighting, x = make("gradnorm"), at(1.0, 2.0)
    weighting.backward(quadratics(x), [x])
    objective = weighting.objective(torch.tensor([1.0, 2.0, 0.5]), torch.diag(torch.tensor([2.0, 4.0, 1.0])))
    mean = (math.sqrt(2) + 3) / 3
    targets = [mean * (rate / 0.55) ** 1.5 for rate in (0.4, 1.0, 0.25)]
    expected = sum(abs(norm - target) for norm, target in zip((math.sqrt(2), 2, 1), targets, strict=True))
    assert objective.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("before", "after"),
    [((2.0, 1.0, 1.0), (1.5, 0.75, 0.75)), ((-1.0, 1.0, 3.0), (0.0, 0.75, 2.25)), ((-1.0, -2.0, 0.0), (1.0, 1.0, 1.0))],
)
def test_gradnorm_weights_sum_to_the_number_of_tasks(before: tuple[float, ...], after: tuple[float, ...]) -> None:
    weighting, x = make("gradnorm"), at(1.0, 2.0)
    weighting.task_weights.data = torch.tensor(before)
    assert_close(weighting.backward(quadratics(x), [x]), *after)
    assert_close(weighting.task_weights.detach(), *after)


def test_gradnorm_evens_out_the_norms() -> None:
    """With α = 0 and gradients of norms 1, 2 and 4 that stay, wᵢ is inverse to the norm: 3·(4, 2, 1)/7."""
    weighting = make("gradnorm", alpha=0.0)
    optimizer = torch.optim.SGD(weighting.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    for _ in range(600):
        x = at(1.0)
        weighting.backward(torch.tensor([1.0, 2.0, 4.0]) * x, [x])
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    x = at(1.0)
    weights = weighting.backward(torch.tensor([1.0, 2.0, 4.0]) * x, [x])
    torch.testing.assert_close(weights, torch.tensor([12.0, 6.0, 3.0]) / 7, rtol=1e-2, atol=0)


def test_gradnorm_of_solved_tasks() -> None:
    """All losses at zero are no progress to compare, and no NaN."""
    weighting, x = make("gradnorm"), at(1.0, 2.0)
    weighting.backward(quadratics(x), [x])
    weighting.zero_grad()
    weighting.backward(quadratics(x) * 0.0, [x])
    assert_close(weighting.task_weights.grad, 0.0, 0.0, 0.0)
    objective = weighting.objective(torch.zeros(3), torch.diag(torch.tensor([1.0, 4.0, 9.0])))
    assert objective.item() == 2.0  # |1 − 2| + |2 − 2| + |3 − 2|


def test_a_task_without_gradient() -> None:
    """Cosine 0 with all others; nothing for pcgrad to project on."""
    g = torch.tensor([[1.0, 2.0], [0.0, 0.0], [-1.0, 0.0]])
    for name, expected in {
        "cosine": (1.0, 0.0, 0.0),
        "cosine-unweighted": (1.0, 1.0, 0.0),
        "pcgrad": (1 + 1 / 5, 1.0, 1.0 + 1.0),
    }.items():
        x = at(0.0, 0.0)
        assert_close(make(name).backward(g @ x, [x]), *expected)
    for name, expected in {"cosine": (0.0, 1.0, 0.0), "cosine-unweighted": (1.0, 1.0, 1.0)}.items():
        x = at(0.0, 0.0)
        assert_close(make(name, main_task=1).backward(g @ x, [x]), *expected)


@pytest.mark.parametrize("scale", [1e-23, 1e-21])
@pytest.mark.parametrize("name", sorted(LOOKS_AT_GRADIENTS - {"gradnorm"}))
def test_a_gradient_whose_square_underflows(name: str, scale: float) -> None:
    """1e-46 is zero in float32, and 1e-42 is not quite, while the product with a long gradient is neither."""
    x = torch.zeros(2, requires_grad=True, dtype=torch.float32)
    g = torch.tensor([[1e5, 1e5], [-scale, 0.0], [scale, 0.0]], dtype=torch.float32)
    weights = make(name).float().backward(g @ x, [x])
    assert torch.isfinite(weights).all()
    torch.testing.assert_close(x.grad, torch.tensor([1e5, 1e5]).float(), rtol=1e-2, atol=0)


# -------------------------------------------------------------------------------------------------------- properties


def vectors(tasks: int, size: int) -> st.SearchStrategy[Tensor]:
    entry = st.integers(-20, 20).map(lambda n: n / 4)
    return st.lists(st.lists(entry, min_size=size, max_size=size), min_size=tasks, max_size=tasks).map(
        lambda rows: torch.tensor(rows, dtype=torch.float64)
    )


def linear(weighting: Weighting, g: Tensor) -> tuple[Tensor, Tensor]:
    """The combined gradient and the weights for tasks whose gradients are the rows of g."""
    x = torch.zeros(g.shape[1], dtype=torch.float64, requires_grad=True)
    (combined,), weights = weighting.gradients(g @ x + 1.0, [x])
    return combined, weights


@settings(deadline=None, derandomize=True, max_examples=60)
@given(vectors(2, 3))
def test_pcgrad_of_two_tasks_conflicts_with_neither(g: Tensor) -> None:
    combined, _ = linear(PCGrad(2), g)
    product = g[0] @ g[1]
    if product < 0:
        g = torch.stack([g[0] - product / g[1].square().sum() * g[1], g[1] - product / g[0].square().sum() * g[0]])
    torch.testing.assert_close(combined, g.sum(dim=0), rtol=1e-10, atol=1e-10)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(vectors(4, 3), st.integers(0, 5))
def test_pcgrad_projects_the_gradients_themselves(g: Tensor, seed: int) -> None:
    """The Gramian stands in for vectors: the same projections on the vectors, in the same random order."""
    combined, _ = linear(PCGrad(4, seed=seed), g)
    generator, expected = torch.Generator().manual_seed(seed), torch.zeros(3, dtype=torch.float64)
    for i in range(4):
        projected = g[i].clone()
        for j in torch.randperm(4, generator=generator).tolist():
            product = projected @ g[j]
            if j != i and product < -1e-12:
                projected = projected - product / g[j].square().sum() * g[j]
        expected += projected
    torch.testing.assert_close(combined, expected, rtol=1e-8, atol=1e-8)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(vectors(3, 2), st.integers(0, 2), st.booleans())
def test_cosine_never_opposes_the_main_task(g: Tensor, main_task: int, weighted: bool) -> None:
    combined, weights = linear(GradientCosine(3, weighted=weighted, main_task=main_task), g)
    main = g[main_task]
    assert combined @ main >= main @ main - 1e-9
    for i in range(3):
        cosine = torch.nn.functional.cosine_similarity(main, g[i], dim=0, eps=1e-30)
        expected = 1.0 if i == main_task else (cosine.clamp(min=0.0) if weighted else (cosine >= 0).double())
        assert weights[i] == pytest.approx(float(expected), abs=1e-12)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(vectors(3, 2), st.lists(st.integers(1, 12), min_size=3, max_size=3), st.integers(0, 3))
def test_gradnorm_gradient_is_that_of_its_objective(g: Tensor, present: list[int], twice_alpha: int) -> None:
    """∂/∂wᵢ = ‖gᵢ‖ sign(wᵢ‖gᵢ‖ − Ḡ rᵢ^α): nothing comes through the target."""
    weighting, alpha = GradNorm(3, alpha=twice_alpha / 2).double(), twice_alpha / 2
    weighting.weights(torch.ones(3, dtype=torch.float64), None)
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    losses = torch.tensor(present, dtype=torch.float64)
    weighting.backward(losses + g @ x, [x])
    norms = g.norm(dim=1)
    gaps = norms - norms.mean() * (losses / losses.mean()) ** alpha
    clear = gaps.abs() > 1e-9
    torch.testing.assert_close(weighting.task_weights.grad[clear], (norms * gaps.sign())[clear], rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------- contract


class CountingIdentity(torch.autograd.Function):
    """Counts how often a gradient comes back through it."""

    passes = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        CountingIdentity.passes += 1
        return grad


class Network(nn.Module):
    """A trunk, a head for each of three tasks, a frozen scale and a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 3)
        self.heads = nn.ModuleList(nn.Linear(3, 1) for _ in range(3))
        self.scale = nn.Parameter(torch.tensor(2.0), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2))

    def losses(self, seed: int = 0) -> Tensor:
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)).to(self.scale)
        hidden = CountingIdentity.apply(self.trunk(x).tanh() * self.scale)
        return torch.stack([(head(hidden) - i).square().mean() for i, head in enumerate(self.heads)])


def reference(network: Network, weights: Tensor) -> dict[str, Tensor | None]:
    """∂(Σ wᵢLᵢ)/∂p by one ordinary backward of a copy."""
    network = copy.deepcopy(network)
    network.zero_grad()
    (weights * network.losses()).sum().backward()
    return {name: p.grad for name, p in network.named_parameters()}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_the_weighted_sum(name: str, dtype: torch.dtype) -> None:
    network = Network().to(dtype)
    grads, weights = make(name).gradients(network.losses(), network.parameters())
    expected = reference(network, weights)
    assert weights.dtype == dtype and not weights.requires_grad and weights.shape == (3,)
    for (parameter, p), grad in zip(network.named_parameters(), grads, strict=True):
        zero = torch.zeros_like(p)
        torch.testing.assert_close(grad, zero if expected[parameter] is None else expected[parameter])
        assert p.grad is None


@pytest.mark.parametrize("name", METHODS)
def test_backward_accumulates_as_that_of_torch(name: str) -> None:
    network = Network()
    weights = make(name).backward(network.losses(), network.parameters())
    once = {parameter: p.grad for parameter, p in network.named_parameters()}
    for parameter, grad in reference(network, weights).items():
        if grad is None:
            assert once[parameter] is None  # frozen, or used by no loss
        else:
            torch.testing.assert_close(once[parameter], grad)
    before = {parameter: grad.clone() for parameter, grad in once.items() if grad is not None}
    again = make(name).backward(network.losses(), network.parameters())
    torch.testing.assert_close(again, weights)
    for parameter, p in network.named_parameters():
        assert p.grad is once[parameter]
        if p.grad is not None:
            torch.testing.assert_close(p.grad, 2 * before[parameter])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("call", ["gradients", "backward"])
def test_number_of_backward_passes(name: str, call: str) -> None:
    network, weighting = Network(), make(name)
    losses, CountingIdentity.passes = network.losses(), 0
    getattr(weighting, call)(losses, network.parameters())
    assert CountingIdentity.passes == (3 if name in LOOKS_AT_GRADIENTS else 1)
    assert weighting.needs_gradients == (name in LOOKS_AT_GRADIENTS)
    with pytest.raises(RuntimeError, match="second time"):  # and the graph is freed
        losses.sum().backward()


@pytest.mark.parametrize("name", METHODS)
def test_only_the_parameters_given_are_touched(name: str) -> None:
    network = Network()
    weighting = make(name)
    weights = weighting.backward(network.losses(), iter([network.trunk.weight, network.trunk.weight]))
    touched = [parameter for parameter, p in network.named_parameters() if p.grad is not None]
    assert touched == ["trunk.weight"]
    torch.testing.assert_close(network.trunk.weight.grad, reference(network, weights)["trunk.weight"])
    grads, _ = make(name).gradients(network.losses(), [network.trunk.weight, network.trunk.weight])
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("name", METHODS)
def test_gradients_writes_no_grad(name: str) -> None:
    network, weighting = Network(), make(name)
    weighting.gradients(network.losses(), network.parameters(), network.trunk.parameters())
    assert all(p.grad is None for p in [*network.parameters(), *weighting.parameters()])


@pytest.mark.parametrize("call", ["gradients", "backward"])
def test_shared_parameters_are_where_gradients_are_compared(call: str) -> None:
    """On x₁ alone the gradients are 2, 0 and 2; x₁ need not be trained, and a generator is read once."""

    def losses(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([0.5 * (a**2 + b**2), 0.5 * (a - 3) ** 2, 0.5 * b**2])

    for trained in ("a", "ab"):
        p = {"a": torch.tensor(1.0, requires_grad=True), "b": torch.tensor(2.0, requires_grad=True)}
        result = getattr(make("cosine"), call)(losses(**p), (p[n] for n in trained), (p[n] for n in "b"))
        assert_close(result if call == "backward" else result[1], 1.0, 0.0, 1.0)
        if call == "backward":
            assert_close(p["a"].grad, 1.0)
            assert (p["b"].grad is None) == (trained == "a")
        else:
            assert [grad.item() for grad in result[0]] == [1.0, 4.0][: len(trained)]


def test_gradnorm_compares_on_the_shared_parameters() -> None:
    network, weighting = Network(), make("gradnorm")
    weighting.backward(network.losses(), network.parameters(), [network.trunk.weight])
    norms = torch.stack(
        [torch.autograd.grad(loss, network.trunk.weight, retain_graph=True)[0].norm() for loss in network.losses()]
    )
    torch.testing.assert_close(weighting.task_weights.grad.abs(), norms)


def test_several_shared_parameters_of_any_shape() -> None:
    """The Gramian adds up over parameters: a matrix, a number, one without elements, one that a task does not use."""
    p = [torch.ones(2, 2), torch.tensor(1.0), torch.ones(0), torch.ones(3)]
    p = [x.requires_grad_() for x in p]
    losses = torch.stack([p[0].sum() + 2 * p[1] + p[2].sum(), p[0].sum() - p[3].sum()])
    seen = []

    class Spy(EqualWeights):
        needs_gradients = True

        def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
            seen.append(gramian)
            return super().weights(losses, gramian)

    grads, _ = Spy(2).gradients(losses, p)
    torch.testing.assert_close(seen[0], torch.tensor([[8.0, 4.0], [4.0, 7.0]]))
    assert [grad.shape for grad in grads] == [x.shape for x in p]


@pytest.mark.parametrize("name", METHODS)
def test_sparse_and_half_precision_gradients(name: str) -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    rows = torch.tensor([0, 3])
    weighting = make(name)
    weighting.backward(torch.stack([embedding(rows).square().mean() * k for k in (1.0, 2.0, 3.0)]), [embedding.weight])
    assert embedding.weight.grad.is_sparse
    network = Network().to(torch.bfloat16)
    grads, weights = make(name).gradients(network.losses(), network.parameters())
    assert {grad.dtype for grad in grads} == {torch.bfloat16} == {weights.dtype}
    assert all(torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("name", METHODS)
def test_gradients_have_the_type_of_their_parameters(name: str) -> None:
    """Numbers among them: those take part in type promotion."""
    p = [torch.tensor(1.0, dtype=torch.float32), torch.ones(2, dtype=torch.bfloat16)]
    p = [x.requires_grad_() for x in p]
    losses = (p[0].double() + p[1].double().sum()) * torch.tensor([1.0, 2.0, 3.0])
    grads, weights = make(name).gradients(losses, p)
    assert [grad.dtype for grad in grads] == [torch.float32, torch.bfloat16]
    assert weights.dtype == torch.float64


@pytest.mark.parametrize("name", METHODS)
def test_a_single_task(name: str) -> None:
    weighting = make(name, tasks=1, **({"weights": [1.0]} if name == "fixed" else {}))
    x = at(1.0, 2.0)
    weights = weighting.backward(quadratics(x)[:1], [x])
    assert_close(weights, 0.5 if name == "uncertainty" else 1.0)


@pytest.mark.parametrize("name", METHODS)
def test_moves_no_global_random_state(name: str) -> None:
    weighting, x = make(name), at(1.0, 2.0)
    before = torch.get_rng_state()
    weighting.backward(quadratics(x), [x])
    assert torch.equal(torch.get_rng_state(), before)


def test_pcgrad_orders_vary_with_step_and_seed() -> None:
    g = torch.tensor([[1.0, 0.2], [-1.0, 0.5], [-0.3, -1.0], [0.6, -0.5]])

    def steps(seed: int) -> list[tuple[float, ...]]:
        weighting = make("pcgrad", tasks=4, seed=seed)
        return [tuple(linear(weighting, g)[1].tolist()) for _ in range(10)]

    assert steps(0) == steps(0) != steps(1)
    assert len(set(steps(0))) > 1


# ------------------------------------------------------------------------------------------------------------- state


class Run:
    """Training of a network and of the weighting's own parameters, one epoch after another."""

    def __init__(self, name: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.network, self.weighting = Network(), make(name)
        own = [*self.network.parameters(), *self.weighting.parameters()]
        self.optimizer = torch.optim.SGD([p for p in own if p.requires_grad], lr=0.05)

    def steps(self, seeds: range) -> list[Tensor]:
        weights = []
        for seed in seeds:
            self.optimizer.zero_grad()
            weights.append(self.weighting.backward(self.network.losses(seed), self.network.parameters()))
            self.optimizer.step()
            if seed % 3 == 2:
                self.weighting.end_epoch()
        return weights


@pytest.mark.parametrize("after", [0, 4, 10])
@pytest.mark.parametrize("name", METHODS)
def test_training_goes_on_from_a_state_dict(name: str, after: int) -> None:
    """Bit by bit, through a file that is loaded with ``weights_only``, in the middle of an epoch."""
    whole = Run(name, seed=1)
    whole.steps(range(after))
    file = io.BytesIO()
    torch.save({"network": whole.network.state_dict(), "weighting": whole.weighting.state_dict()}, file)
    expected = whole.steps(range(after, 16))
    resumed = Run(name, seed=2)
    resumed.steps(range(5))  # which must leave no trace
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed.network.load_state_dict(state["network"])
    resumed.weighting.load_state_dict(state["weighting"])
    for found, wanted in zip(resumed.steps(range(after, 16)), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", METHODS)
def test_a_state_dict_is_a_snapshot(name: str) -> None:
    run = Run(name, seed=1)
    run.steps(range(4))
    state = copy.deepcopy(run.weighting.state_dict())
    kept, own = run.weighting.state_dict(), {key for key, _ in run.weighting.named_parameters()}
    run.steps(range(4, 9))
    for key, value in kept.items():
        if key not in own:  # parameters are live in any state_dict
            assert str(value) == str(state[key])


@pytest.mark.parametrize("name", METHODS)
def test_returned_weights_stay_what_they_were(name: str) -> None:
    run = Run(name, seed=1)
    weights = run.weighting.backward(run.network.losses(), run.network.parameters())
    kept = weights.clone()
    run.optimizer.step()
    run.steps(range(3))
    assert torch.equal(weights, kept)


@pytest.mark.parametrize("name", METHODS)
def test_copies_do_not_share_state(name: str) -> None:
    run = Run(name, seed=1)
    run.steps(range(7))
    copied = copy.deepcopy(run)
    first = copied.steps(range(7, 14))
    for found, wanted in zip(run.steps(range(7, 14)), first, strict=True):
        assert torch.equal(found, wanted)


def test_the_weightings_that_learn() -> None:
    """Their parameters move in training, under the optimizer that they are given to, and nobody else has any."""
    for name in METHODS:
        run = Run(name, seed=1)
        before = [p.detach().clone() for p in run.weighting.parameters()]
        assert bool(before) == (name in {"uncertainty", "gradnorm"})
        run.steps(range(3))
        for p, old in zip(run.weighting.parameters(), before, strict=True):
            assert not torch.equal(p, old)


def test_own_parameters_can_be_frozen() -> None:
    weighting, x = make("uncertainty").requires_grad_(False), at(1.0, 2.0)
    assert_close(weighting.backward(quadratics(x), [x]), 0.5, 0.5, 0.5)


# ------------------------------------------------------------------------------------------------------------ by name


def test_names() -> None:
    assert list_weightings() == [
        "cosine",
        "cosine-unweighted",
        "dwa",
        "equal",
        "fixed",
        "gradnorm",
        "pcgrad",
        "single",
        "uncertainty",
    ]
    for name in METHODS:
        weighting = make(name, main_task=2)
        assert (weighting.tasks, weighting.main_task) == (3, 2)
    assert isinstance(make("uncertainty"), UncertaintyWeighting)
    assert isinstance(make("dwa"), DynamicWeightAverage)


X = torch.ones(2, requires_grad=True)
FROZEN = torch.ones(2)

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a reduced loss": (
        lambda: make("equal").backward(quadratics(X).sum(), [X]),
        "losses must be a tensor of shape (3,), one loss per task; got shape (). Put them together with torch.stack, "
        "and do not add them up: that is the weighting's part.",
    ),
    "another number of losses": (
        lambda: make("cosine").gradients(quadratics(X)[:2], [X]),
        "losses must be a tensor of shape (3,), one loss per task; got shape (2,). Put them together with torch.stack, "
        "and do not add them up: that is the weighting's part.",
    ),
    "a list of losses": (
        lambda: make("equal").backward(list(quadratics(X)), [X]),
        "losses must be a tensor of shape (3,), one loss per task; got list. Put them together with torch.stack, and "
        "do not add them up: that is the weighting's part.",
    ),
    "no graph": (
        lambda: make("equal").backward(quadratics(X).detach(), [X]),
        "losses must have a graph that leads to the parameters; these require no grad. Compute them outside "
        "torch.no_grad(), and stack the losses themselves, not their .item() or .detach().",
    ),
    "no parameters": (
        lambda: make("equal").backward(quadratics(X), iter([])),
        "parameters must be an iterable of tensors of which at least one requires grad; got none. Pass "
        "model.parameters(), not yet read.",
    ),
    "frozen parameters": (
        lambda: make("equal").backward(quadratics(X), [FROZEN, FROZEN]),
        "parameters must be an iterable of tensors of which at least one requires grad; got 2, all frozen. Unfreeze "
        "one.",
    ),
    "no shared parameters": (
        lambda: make("cosine").backward(quadratics(X), [X], []),
        "shared must be an iterable of tensors of which at least one requires grad; got none. Pass "
        "model.parameters(), not yet read.",
    ),
    "one tensor": (
        lambda: make("equal").backward(quadratics(X), X),
        "parameters must be an iterable of tensors of which at least one requires grad; got a single tensor. Put it "
        "in a list.",
    ),
    "named parameters": (
        lambda: make("equal").backward(quadratics(X), nn.Linear(1, 1).named_parameters()),
        "parameters must be an iterable of tensors of which at least one requires grad; got a tuple among them. Pass "
        "model.parameters().",
    ),
    "main task too large": (
        lambda: make("single", main_task=3),
        "main_task must be the index of one of the 3 losses, from 0 to 2; got 3.",
    ),
    "main task negative": (
        lambda: make("cosine", main_task=-1),
        "main_task must be the index of one of the 3 losses, from 0 to 2; got -1.",
    ),
    "no tasks": (lambda: make("equal", tasks=0), "tasks must be the number of losses, at least 1; got 0."),
    "unknown name": (
        lambda: get_weighting("gradnrom", 3),
        "there is no weighting 'gradnrom'; known are cosine, cosine-unweighted, dwa, equal, fixed, gradnorm, pcgrad, "
        "single, uncertainty. Did you mean 'gradnorm'?",
    ),
    "unknown option": (
        lambda: get_weighting("dwa", 3, temprature=1.0),
        "weighting 'dwa' has no option 'temprature'; its options are temperature. Did you mean 'temperature'?",
    ),
    "option of a method without any": (
        lambda: get_weighting("cosine-unweighted", 3, weighted=True),
        "weighting 'cosine-unweighted' has no option 'weighted'; it has none.",
    ),
    "missing option": (
        lambda: get_weighting("fixed", 3),
        "weighting 'fixed' needs the option 'weights'; got none. Pass weights=….",
    ),
    "wrong number of weights": (
        lambda: get_weighting("fixed", 3, weights=[1.0, 2.0]),
        "weights must be 3 finite numbers, one per task; got [1.0, 2.0]. Give 0 to leave one out.",
    ),
    "infinite weights": (
        lambda: get_weighting("fixed", 2, weights=[1.0, math.inf]),
        "weights must be 2 finite numbers, one per task; got [1.0, inf]. Give 0 to leave one out.",
    ),
    "temperature": (
        lambda: make("dwa", temperature=0.0),
        "temperature must be a positive number; got 0.0. The paper uses 2.0.",
    ),
    "alpha": (
        lambda: make("gradnorm", alpha=-1.0),
        "alpha must be a number of at least 0; got -1.0. The paper's value is 1.5.",
    ),
    "no Gramian": (
        lambda: make("pcgrad").weights(torch.ones(3), None),
        "this weighting needs the inner products of the tasks' gradients; got None. Call backward() or gradients(), "
        "which compute them.",
    ),
    "a loss that starts at zero": (
        lambda: make("gradnorm").backward(torch.stack([X.sum(), X.sum(), 0 * X.sum()]).double(), [X]),
        "gradnorm measures progress relative to the first losses, which must be positive and finite; got "
        "[2.0, 2.0, 0.0]. Leave out a task that is solved at the start, or use another weighting.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_rule_what_was_found_and_what_to_do(case: str) -> None:
    attempt, message = REFUSED[case]
    with pytest.raises(AuxiliaryError) as raised:
        attempt()
    assert str(raised.value) == message
    assert isinstance(raised.value, hi.HyperoptError)
    assert X.grad is None


def test_gradnorm_refuses_negative_losses() -> None:
    weighting, x = make("gradnorm"), at(1.0, 2.0)
    weighting.backward(quadratics(x), [x])
    with pytest.raises(AuxiliaryError, match=r"must not be negative; got \[2.5, 2.0, -2.0\]"):
        weighting.backward(quadratics(x) * torch.tensor([1.0, 1.0, -1.0]), [x])


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("uncertainty", "torchjd.scalarization"),
        ("dwa", "torchjd.scalarization"),
        ("pcgrad", "torchjd.aggregation"),
    ],
)
def test_says_how_to_install_torchjd(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(AuxiliaryError, match=r"pip install 'hyperopt-implicit\[auxiliary\]'") as raised:
        make(name)
    assert f"the weighting {name!r} needs torchjd" in str(raised.value)
    for other in set(METHODS) - {"uncertainty", "dwa", "pcgrad"}:
        make(other)
