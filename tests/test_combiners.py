"""Loss combiners: their values, worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hyperopt_implicit.auxiliary import Context, ConvolutionalCombiner, LinearCombiner, LossCombiner, NonlinearCombiner

pytestmark = pytest.mark.usefixtures("float64")

LOSSES = [[1.0, 2.0, 4.0], [0.5, 3.0, 0.0]]
INPUTS = [[0.5, -1.0], [2.0, 0.25]]
LABELS = [2, 0]
CONTEXTS = [[0.5, -1.0, 0.0, 0.0, 1.0], [2.0, 0.25, 1.0, 0.0, 0.0]]  # the inputs, and the labels one-hot


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def with_parameters(combiner: LossCombiner, values: dict[str, Any]) -> LossCombiner:
    state = combiner.state_dict()
    for name, value in values.items():
        state[name].copy_(torch.tensor(value))
    return combiner


def with_simple_numbers(combiner: LossCombiner, seed: int = 0) -> LossCombiner:
    """Every parameter a multiple of a tenth between −1 and 1, the ones that start at zero too."""
    generator = torch.Generator().manual_seed(seed)
    state = combiner.state_dict()
    return with_parameters(
        combiner,
        {name: torch.randint(-10, 11, p.shape, generator=generator).div(10).tolist() for name, p in state.items()},
    )


# ----------------------------------------------------------------------------------------------------------- linear

WEIGHT_NORM = ("parametrizations.weight.original0", "parametrizations.weight.original1")
LINEAR: dict[str, tuple[dict[str, Any], dict[str, Any], list[float]]] = {
    "free": ({"monotone": False}, {"weight": [-0.5, 2.0]}, [1.0, -0.5, 2.0]),
    "positive": ({}, {"weight": [0.3, -1.0]}, [1.0, softplus(0.3), softplus(-1.0)]),
    "clamp": ({"monotone": "clamp"}, {"weight": [0.25, 0.0]}, [1.0, 0.25, 0.0]),
    "softmax": ({"softmax": True}, {"weight": [0.0, math.log(2.0), math.log(5.0)]}, [3 / 8, 6 / 8, 15 / 8]),
    "main task learned": ({"learn_main": True, "monotone": False}, {"weight": [3.0, -1.0, 2.0]}, [3.0, -1.0, 2.0]),
    "main task in the middle": ({"main_task": 1}, {"weight": [0.3, -1.0]}, [softplus(0.3), 1.0, softplus(-1.0)]),
    "main task last": ({"main_task": 2}, {"weight": [0.3, -1.0]}, [softplus(0.3), softplus(-1.0), 1.0]),
    "normalised": (
        {"weight_norm": True, "monotone": False},
        dict(zip(WEIGHT_NORM, [10.0, [-3.0, 4.0]], strict=True)),
        [1.0, -6.0, 8.0],
    ),
    "normalised and positive": (
        {"weight_norm": True},
        dict(zip(WEIGHT_NORM, [10.0, [-0.3, 0.4]], strict=True)),
        [1.0, softplus(-6.0), softplus(8.0)],
    ),
    "starts at one": ({}, {}, [1.0, 1.0, 1.0]),
    "one start for all": ({"init": 0.3, "monotone": False}, {}, [1.0, 0.3, 0.3]),
    "a start for each": ({"init": [1e-9, 800.0]}, {}, [1.0, 1e-9, 800.0]),
    "a start for the main task": ({"init": torch.tensor([2, 3, 4]), "learn_main": True}, {}, [2.0, 3.0, 4.0]),
    "a start on the edge": ({"init": (0.0, 0.5), "monotone": "clamp"}, {}, [1.0, 0.0, 0.5]),
    "softmax from a start": ({"init": [1.0, 2.0, 5.0], "softmax": True}, {}, [3 / 8, 6 / 8, 15 / 8]),
    "normalised from a start": ({"init": [0.5, 2.0], "weight_norm": True}, {}, [1.0, 0.5, 2.0]),
}


@pytest.mark.parametrize(("options", "parameters", "weights"), LINEAR.values(), ids=LINEAR)
def test_linear_by_hand(options: dict[str, Any], parameters: dict[str, Any], weights: list[float]) -> None:
    combiner = with_parameters(LinearCombiner(3, **options), parameters)
    assert combiner.task_weights().tolist() == pytest.approx(weights, rel=1e-12, abs=0.0)
    expected = [sum(w * loss for w, loss in zip(weights, row, strict=True)) for row in LOSSES]
    assert combiner.per_sample(torch.tensor(LOSSES), None).tolist() == pytest.approx(expected, rel=1e-12)
    combined = combiner(torch.tensor(LOSSES))
    assert combined.shape == ()
    assert combined.item() == pytest.approx((expected[0] + expected[1]) / 2, rel=1e-12)
    assert combiner(torch.tensor(LOSSES[:1])).item() == pytest.approx(expected[0], rel=1e-12)


@pytest.mark.parametrize("start", [math.log(2.0), 0.0], ids=["at the zero of the inverse softplus", "zero"])
def test_normalised_weights_may_start_anywhere(start: float) -> None:
    combiner = LinearCombiner(3, weight_norm=True, init=start, monotone=start > 0)
    assert combiner.task_weights().tolist() == pytest.approx([1.0, start, start])


def context(**options: Any) -> Context:
    return Context(features=2, classes=3, **options)


def shifted(row: list[list[float]], sample: int) -> list[float]:
    """A linear function of a sample's context, one number for each row of its matrix."""
    return [sum(a * c for a, c in zip(each, CONTEXTS[sample], strict=True)) for each in row]


@pytest.mark.parametrize("kind", ["free", "positive", "softmax"])
def test_linear_with_a_context_by_hand(kind: str) -> None:
    options: dict[str, Any] = {"free": {"monotone": False}, "positive": {}, "softmax": {"softmax": True}}[kind]
    combiner = LinearCombiner(3, main_task=1, context=context(), **options)
    at_start = combiner(torch.tensor(LOSSES), inputs=torch.tensor(INPUTS), labels=torch.tensor(LABELS))
    assert at_start.item() == pytest.approx((7.0 + 3.5) / 2)
    with_simple_numbers(combiner)
    raw, matrix = combiner.weight.tolist(), combiner.state_dict()["shift.weight"].tolist()
    expected = []
    for sample, losses in enumerate(LOSSES):
        own = [w + s for w, s in zip(raw, shifted(matrix, sample), strict=True)]
        if kind == "softmax":
            weights = [3 * math.exp(x) / sum(math.exp(y) for y in own) for x in own]
        else:
            weights = [x if kind == "free" else softplus(x) for x in own]
            weights.insert(1, 1.0)
        expected.append(sum(w * loss for w, loss in zip(weights, losses, strict=True)))
    combined = combiner(torch.tensor(LOSSES), inputs=torch.tensor(INPUTS), labels=torch.tensor(LABELS))
    assert combined.item() == pytest.approx(sum(expected) / 2, rel=1e-13)


# --------------------------------------------------------------------------------------------------------- contexts


def test_context_by_hand() -> None:
    inputs, labels = torch.tensor(INPUTS), torch.tensor(LABELS)
    assert context()(inputs, labels).tolist() == CONTEXTS
    assert Context(classes=3)(None, labels).tolist() == [row[2:] for row in CONTEXTS]
    assert Context(features=2)(inputs[:, :, None], None).tolist() == INPUTS
    doubled = nn.Linear(2, 2, bias=False)
    doubled.weight.data.copy_(2.0 * torch.eye(2))
    assert Context(features=2, encoder=doubled)(inputs, None).tolist() == [[1.0, -2.0], [4.0, 0.5]]
    assert (context().size, Context(classes=3).size, Context(features=2).size) == (5, 3, 2)


def test_encoder_is_part_of_the_combiner() -> None:
    combiner = LinearCombiner(2, context=Context(features=2, encoder=nn.Linear(4, 2)))
    with_simple_numbers(combiner)
    combiner(torch.ones(3, 2), inputs=torch.ones(3, 4)).backward()
    assert sorted(name for name, p in combiner.named_parameters() if p.grad is not None and p.grad.norm() > 0) == [
        "context.encoder.bias",
        "context.encoder.weight",
        "shift.weight",
        "weight",
    ]


def test_labels_alone_follow_the_combiner_to_another_dtype() -> None:
    combiner = LinearCombiner(3, context=Context(classes=3)).to(torch.float32)
    losses = torch.tensor(LOSSES, dtype=torch.float32)
    assert combiner(losses, labels=torch.tensor(LABELS)).dtype == torch.float32


# --------------------------------------------------------------------------------------------------------- networks

ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "softplus": softplus,
    "tanh": math.tanh,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "relu": lambda x: max(x, 0.0),
    "leaky_relu": lambda x: x if x > 0 else 0.01 * x,
    "elu": lambda x: x if x > 0 else math.exp(x) - 1,
    "identity": lambda x: x,
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "silu": lambda x: x / (1 + math.exp(-x)),
    "mish": lambda x: x * math.tanh(softplus(x)),
}
NONLINEAR: dict[str, dict[str, Any]] = {
    **{name: {"activation": name, "monotone": False} for name in ACTIVATIONS},
    "monotone": {},
    "clamp": {"monotone": "clamp"},
    "two hidden layers": {"sizes": (2, 3)},
    "without the skip connection": {"skip_connection": False},
    "main task last": {"main_task": 2},
    "normalised": {"weight_norm": True, "sizes": (2, 2)},
    "normalised and free": {"weight_norm": True, "monotone": False},
    "context": {"context": True, "sizes": (3, 2)},
    "free with a context": {"context": True, "monotone": False, "main_task": 1, "activation": "tanh"},
}
CONVOLUTIONAL: dict[str, dict[str, Any]] = {
    "kernel of one pixel": {"kernel_size": 1},
    "kernel of nine pixels": {"kernel_size": 3},
    "several layers": {"kernel_size": 3, "sizes": (2, 3)},
    "free": {"kernel_size": 3, "monotone": False, "activation": "gelu"},
    "clamp, no skip connection": {"kernel_size": 3, "monotone": "clamp", "skip_connection": False},
    "normalised, main task last": {"kernel_size": 3, "weight_norm": True, "main_task": 2},
    "context of each channel": {"kernel_size": 3, "context": True, "sizes": (3,)},
}
CASES = [("nonlinear", options) for options in NONLINEAR.values()]
CASES += [("convolutional", options) for options in CONVOLUTIONAL.values()]


def network(kind: str, *, sizes: Sequence[int] = (2,), context: bool = False, **options: Any) -> LossCombiner:
    given = Context(features=2, classes=3) if context else None
    if kind == "nonlinear":
        return NonlinearCombiner(3, hidden_sizes=sizes, context=given, **options)
    return ConvolutionalCombiner(3, channels=sizes, context=given, **options)


def losses_for(kind: str) -> Tensor:
    """Those of each sample; as images, 2 by 3 of them, all different."""
    losses = torch.tensor(LOSSES)
    return (
        losses if kind == "nonlinear" else losses[:, :, None, None] * torch.tensor([[0.5, 1.0, 3.0], [0.0, 2.0, 1.5]])
    )


def rows_of(layer: str, state: dict[str, Tensor], positive: bool) -> list[list[float]]:
    """The weights of each output of a layer, over its inputs and their pixels, from what is trained."""
    inside = f"{layer}.parametrizations.weight.original"
    rows = state.get(f"{inside}1", state.get(inside, state.get(f"{layer}.weight"))).flatten(1).tolist()
    if f"{inside}1" in state:
        for row, length in zip(rows, state[f"{inside}0"].flatten().tolist(), strict=True):
            row[:] = [length * x / math.sqrt(sum(y * y for y in row)) for x in row]
    return [[softplus(x) for x in row] if positive else row for row in rows]


def by_hand(
    combiner: LossCombiner, losses: Tensor, options: dict[str, Any], masks: Sequence[list[list[float]]] = ()
) -> list[float]:
    """Pixel by pixel; a network of numbers is one of images of one pixel. A mask: a factor a sample and channel."""
    images = losses if losses.dim() == 4 else losses[:, :, None, None]
    state, k = combiner.state_dict(), options.get("kernel_size", 1)
    height, width = images.shape[2:]
    activation = ACTIVATIONS[options.get("activation", "softplus")]
    pixels = [(y, x) for y in range(height) for x in range(width)]
    depth = len(options.get("sizes", (2,)))
    results = []
    for sample, image in enumerate(images.tolist()):
        hidden = image
        for layer in [*(f"layers.{i}" for i in range(depth)), "last"]:
            rows = rows_of(layer, state, options.get("monotone", True) is True)
            biases = state[f"{layer}.bias"].tolist() if layer != "last" else [0.0]
            if layer == "layers.0" and options.get("context"):
                shifts = shifted(state["shift.weight"].tolist(), sample)
                biases = [bias + shift for bias, shift in zip(biases, shifts, strict=True)]
            out = [[[bias] * width for _ in range(height)] for bias in biases]
            for o, row in enumerate(rows):
                for y, x in pixels:
                    for i in range(len(hidden)):
                        for r in range(k):
                            for c in range(k):
                                near, far = y + r - k // 2, x + c - k // 2
                                if 0 <= near < height and 0 <= far < width:
                                    out[o][y][x] += row[(i * k + r) * k + c] * hidden[i][near][far]
                    if layer != "last":
                        out[o][y][x] = activation(out[o][y][x])
                        out[o][y][x] *= masks[int(layer[-1])][sample][o] if masks else 1.0
            hidden = out
        skipped = options.get("main_task", 0) if options.get("skip_connection", True) else None
        values = [hidden[0][y][x] + (0.0 if skipped is None else image[skipped][y][x]) for y, x in pixels]
        results.append(sum(values) / len(values))
    return results


@pytest.mark.parametrize(("kind", "options"), CASES, ids=[*NONLINEAR, *CONVOLUTIONAL])
def test_network_by_hand(kind: str, options: dict[str, Any]) -> None:
    combiner, losses = with_simple_numbers(network(kind, **options)), losses_for(kind)
    expected = by_hand(combiner, losses, options)
    given = {"inputs": torch.tensor(INPUTS), "labels": torch.tensor(LABELS)} if options.get("context") else {}
    combined = combiner(losses, **given)
    assert combined.shape == ()
    assert combined.item() == pytest.approx(sum(expected) / 2, rel=1e-9)  # torch's softplus is the identity above 20
    if not given:
        assert combiner.per_sample(losses, None).tolist() == pytest.approx(expected, rel=1e-9)


def test_networks_on_paper() -> None:
    """1 + ½·(2·1 + 3·2 + 1); and ones in each place of two kernels, which see all of an image of 2 by 2."""
    nonlinear = NonlinearCombiner(2, hidden_sizes=(1,), activation=nn.Identity(), monotone=False)
    with_parameters(nonlinear, {"layers.0.weight": [[2.0, 3.0]], "layers.0.bias": [1.0], "last.weight": [[0.5]]})
    assert nonlinear(torch.tensor([[1.0, 2.0]])).item() == 5.5
    convolutional = ConvolutionalCombiner(2, channels=(1,), activation="identity", monotone=False)
    for p in convolutional.parameters():
        p.data.fill_(1.0 if p.dim() > 1 else 0.0)
    image = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[1.0, 1.0], [1.0, 1.0]]]])
    assert convolutional(image).item() == 4 * (10.0 + 4.0) + 2.5


@pytest.mark.parametrize("kind", ["nonlinear", "convolutional"])
def test_dropout_by_hand(kind: str) -> None:
    """In training mode hidden units, or whole channels, are zero or doubled; in eval mode they are as without."""
    options = {"sizes": (6, 4), "kernel_size": 3} if kind == "convolutional" else {"sizes": (6, 4)}
    combiner, losses = with_simple_numbers(network(kind, dropout=0.5, **options)), losses_for(kind)
    drawn: list[Tensor] = []
    hook = combiner.dropout.register_forward_hook(lambda module, given, result: drawn.append(result / given[0]))
    combined = combiner(losses).item()
    hook.remove()
    masks = [mask.flatten(2) if mask.dim() == 4 else mask[:, :, None] for mask in drawn]
    assert [mask.unique().tolist() for mask in masks] == [[0.0, 2.0], [0.0, 2.0]]
    assert all(bool((mask == mask[:, :, :1]).all()) for mask in masks)
    expected = by_hand(combiner, losses, options, [mask[:, :, 0].tolist() for mask in masks])
    assert combined == pytest.approx(sum(expected) / 2, rel=1e-9)
    assert combiner.eval()(losses).item() == pytest.approx(sum(by_hand(combiner, losses, options)) / 2, rel=1e-9)
