"""The Hessian as an operator: against dense ones, against differences of gradients, and over the layers in use."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hyperopt_implicit as hi
from hyperopt_implicit.inner_loop import train_step
from hyperopt_implicit.operators import Hessian, validation_gradients
from hyperopt_implicit.testing.assertions import assert_close, assert_unchanged
from hyperopt_implicit.testing.oracles import (
    dense_derivatives,
    finite_differences,
    flatten,
    implicit_hypergradient,
    unflatten,
)
from hyperopt_implicit.testing.specimens import (
    Linear,
    gradient_descent,
    half_mean_square,
    network_problem,
    regression_data,
    ridge_problem,
    seeded,
)
from hyperopt_implicit.vectors import Params, clone


def small_network() -> hi.BilevelProblem:
    return network_problem(seeded(lambda: nn.Sequential(nn.Linear(2, 3), nn.Softplus(), nn.Linear(3, 1))))


def random_like(x: Params, seed: int = 0) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) for name, tensor in x.items()}


def basis_of(x: Params) -> list[Params]:
    """All unit vectors that are shaped like x."""
    size = sum(tensor.numel() for tensor in x.values())
    return [unflatten(row, x) for row in torch.eye(size, dtype=torch.float64)]


def columns(product: Callable[[Params], Params], vectors: list[Params]) -> Tensor:
    """The matrix of a linear map."""
    return torch.stack([flatten(product(vector)) for vector in vectors], dim=1)


def inner_gradient(problem: hi.BilevelProblem, batches: list[Any], shift: Params, scale: float) -> Params:
    """∂L/∂w at w + scale·shift, by one ordinary backward."""
    params = {name: (p.detach() + scale * shift[name]).requires_grad_() for name, p in problem.params.items()}
    losses = [problem.functional_training_loss(params, problem.hparams, batch) for batch in batches]
    grads = torch.autograd.grad(
        torch.stack(losses).mean(), list(params.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(params, grads, strict=True))


def assert_product_is_a_difference_of_gradients(problem: hi.BilevelProblem, batches: list[Any]) -> None:
    """H·v = (∇L(w + hv) − ∇L(w − hv))/2h, and again when asked again."""
    hessian, vector, h = Hessian(problem, batches), random_like(problem.params), 1e-5
    ahead = inner_gradient(problem, batches, vector, h)
    behind = inner_gradient(problem, batches, vector, -h)
    expected = {name: (ahead[name] - behind[name]) / (2 * h) for name in ahead}
    for _ in range(2):
        assert_close(hessian @ vector, expected, 1e-6, "the product")
    assert_close(hessian.gradient, inner_gradient(problem, batches, vector, 0.0), 1e-9, "the gradient")
    assert hessian.products == 2


# ----------------------------------------------------------------------------------------------------- dense Hessians


def test_products_are_those_of_the_dense_hessian():
    """torch.func.hessian works forward over reverse, this one reverse over reverse."""
    problem, batch = small_network(), regression_data(0, features=2)

    def loss(w: Tensor) -> Tensor:
        return problem.functional_training_loss(unflatten(w, problem.params), problem.hparams, batch)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.script", DeprecationWarning)  # torch's own, in its jvp
        expected = torch.func.hessian(loss)(flatten(problem.params))
    operator = Hessian(problem, [batch])
    for _ in range(2):
        found = columns(operator.__matmul__, basis_of(problem.params))
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    assert operator.products == 2 * len(expected)
    assert operator.loss == pytest.approx(loss(flatten(problem.params)).item())


def test_mixed_term_is_that_of_the_dense_jacobian():
    problem, batch = small_network(), regression_data(0, features=2)

    def gradient(λ: Tensor) -> Tensor:
        hparams = unflatten(λ, problem.hparams)
        return torch.func.grad(
            lambda w: problem.functional_training_loss(unflatten(w, problem.params), hparams, batch)
        )(flatten(problem.params))

    expected = torch.func.jacrev(gradient)(flatten(problem.hparams)).detach()
    operator = Hessian(problem, [batch])
    operator @ random_like(problem.params)
    found = columns(operator.mixed, basis_of(problem.params)).T
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    assert operator.products == 1


def test_batches_are_averaged():
    problem = small_network()
    batches = [regression_data(seed, features=2, rows=rows) for seed, rows in ((0, 5), (1, 10))]
    vector = random_like(problem.params)
    products = [Hessian(problem, [batch]) @ vector for batch in batches]
    expected = {name: (products[0][name] + products[1][name]) / 2 for name in vector}
    operator = Hessian(problem, batches)
    assert_close(operator @ vector, expected, 1e-12, "the product")
    assert operator.loss == pytest.approx(sum(Hessian(problem, [batch]).loss for batch in batches) / 2)


def test_weight_decay_of_the_inner_optimizer_is_part_of_the_hessian():
    """It moves the minimum as the same decay in the loss does, group by group; AdamW's does not."""
    bias = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    batch = regression_data(0)

    def product(make, **options):
        model = Linear(4, bias=bias)
        groups = [{"params": [model.weight], **options}, {"params": [model.bias]}]
        problem = ridge_problem(model, optimizer=lambda _: make(groups, lr=0.1))
        return Hessian(problem, [batch]) @ random_like(problem.params)

    vector = random_like(dict(Linear(4, bias=bias).named_parameters()))
    plain = product(torch.optim.SGD)
    for make in (torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop):
        decayed = product(make, weight_decay=0.7)
        assert_close(decayed, {**plain, "weight": plain["weight"] + 0.7 * vector["weight"]}, 1e-12, "the product")
    assert_close(product(torch.optim.AdamW, weight_decay=0.7), plain, 1e-12, "the product")


@pytest.mark.parametrize("backend", ["cg", "exact", "neumann"])
def test_weight_decay_of_the_inner_optimizer_counts(backend):
    """The hypergradient of training that converged, by differences: half the decay in the loss, half in SGD."""
    training, validation = regression_data(0), regression_data(1)
    problem = ridge_problem(optimizer=lambda params: torch.optim.SGD(params, lr=0.3, weight_decay=0.3))

    def minimum() -> float:
        problem.load_inner_state(start)
        for _ in range(200):
            train_step(problem, training, problem.hyperparameters.values())
        return float(problem.validation_loss(validation))

    start = problem.inner_state()
    expected = finite_differences(minimum, problem.hparams)
    minimum()
    thorough = {"cg": {"tolerance": 1e-12}, "neumann": {"terms": 300}}.get(backend, {})
    result = hi.hypergradient(
        problem, {"name": backend, **thorough}, training_batches=[training], validation_batch=validation
    )
    assert_close(result.gradients, expected, 1e-8)


def test_linear_and_unused_parameters_have_rows_of_zeros():
    slope, unused = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    problem = ridge_problem(Linear(4, slope=slope, unused=unused), extra=lambda model: 3.0 * model.slope.sum())
    operator = Hessian(problem, [regression_data(0)])
    product = operator @ random_like(problem.params)
    assert product["slope"].abs().max() == product["unused"].abs().max() == 0
    assert operator.gradient["slope"].tolist() == [3, 3]
    assert product["weight"].abs().min() > 0


def test_a_loss_that_is_linear_has_a_hessian_of_zeros():
    @hi.hyperparameter("shift", init=1.0)
    def training_loss(model, batch, *, shift):
        return model.weight.sum() + 0.0 * shift

    problem = hi.BilevelProblem(
        Linear(3), training_loss, lambda model, batch: model.weight.sum(), optimizer=gradient_descent
    )
    operator, vector = Hessian(problem, [None]), random_like(problem.params)
    assert (operator @ vector)["weight"].tolist() == [0, 0, 0]
    assert operator.mixed(vector)["shift"].item() == 0


def test_building_and_multiplying_change_nothing():
    problem = small_network()
    vector = random_like(problem.params)
    given = clone(vector)
    with assert_unchanged(problem), torch.no_grad():
        operator = Hessian(problem, [regression_data(0, features=2)])
        operator.mixed(operator @ vector)
    assert_close(vector, given, 0.0, "the vector")
    assert not any(x.requires_grad for x in (operator @ vector).values())


# --------------------------------------------------------------------------------------- memory that autograd shares


def test_parameters_that_enter_as_a_sum():
    """Their entries of a product are one tensor: adding damping in place would add it twice."""
    bias = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    problem = ridge_problem(Linear(4, bias=bias))

    @hi.hyperparameter("decay", init=0.3)
    def training_loss(model, batch, *, decay):
        x, y = batch
        total = model.weight + model.bias
        return 0.5 * (x @ total - y).square().mean() + 0.5 * decay * total.square().sum()

    def validation_loss(model, batch):
        x, y = batch
        return 0.5 * (x @ (model.weight + 2 * model.bias) - y).square().mean()

    problem = hi.BilevelProblem(problem.model, training_loss, validation_loss, optimizer=gradient_descent)
    nn.init.ones_(problem.model.weight)
    training, validation = regression_data(0), regression_data(1)
    here = dense_derivatives(problem, [training])
    _, v, _ = validation_gradients(problem, validation)
    u = torch.linalg.solve(here.hessian + 0.5 * torch.eye(8), flatten(v))
    expected = {"decay": -(here.mixed.T @ u).reshape(())}
    for name, options in (("cg", {"max_iterations": 100, "tolerance": 1e-12}), ("exact", {})):
        result = hi.hypergradient(
            problem,
            {"name": name, "damping": 0.5, **options},
            training_batches=[training],
            validation_batch=validation,
        )
        assert_close(result.gradients, expected, 1e-9, f"the hypergradient of {name!r}")


def test_a_mixed_term_without_memory_of_its_own():
    """λ enters as a sum over its entries, so all entries of the product are one number in memory."""

    @hi.hyperparameter("parts", init=torch.tensor([0.1, 0.2, 0.3]))
    def training_loss(model, batch, *, parts):
        return half_mean_square(model, batch) + 0.5 * parts.sum() * model.weight.square().sum()

    problem = hi.BilevelProblem(Linear(4), training_loss, half_mean_square, optimizer=gradient_descent)
    nn.init.ones_(problem.model.weight)
    training, validation = regression_data(0), regression_data(1)
    result = hi.hypergradient(problem, "exact", training_batches=[training], validation_batch=validation)
    assert_close(result.gradients, implicit_hypergradient(problem, [training], validation), 1e-10)


# ------------------------------------------------------------------------------------------------------------- layers


class Attention(nn.Module):
    """Fused scaled dot-product attention, which has no second derivative unless it is run unfused."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unsqueeze(1).chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class LastOutput(nn.Module):
    """A recurrent layer's outputs alone."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


SEQUENCE, IMAGE = (3, 5, 4), (4, 2, 6, 6)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "attention": (Attention, SEQUENCE),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, activation="gelu", batch_first=True),
        SEQUENCE,
    ),
    "lstm": (lambda: LastOutput(nn.LSTM(4, 3, num_layers=2, bidirectional=True, batch_first=True)), SEQUENCE),
    "gru": (lambda: LastOutput(nn.GRU(4, 3, batch_first=True)), SEQUENCE),
    "layer norm": (lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh()), SEQUENCE),
    "group norm": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.SiLU()), IMAGE),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.GELU(), nn.MaxPool2d(2), nn.ConvTranspose2d(3, 2, 2)),
        IMAGE,
    ),
    "batch norm": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Softplus()), IMAGE),
    "batch norm evaluating": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3).eval(), nn.Softplus()),
        IMAGE,
    ),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh()),
        SEQUENCE,
    ),
}


def layer_problem(build: Callable[[], nn.Module]) -> hi.BilevelProblem:
    @hi.hyperparameter("decay", init=0.1)
    def training_loss(model, batch, *, decay):
        x, target = batch
        penalty = torch.stack([p.square().sum() for p in model.parameters()]).sum()
        return F.mse_loss(model(x), target) + decay * penalty

    def validation_loss(model, batch):
        x, target = batch
        return F.mse_loss(model(x), target)

    return hi.BilevelProblem(seeded(build), training_loss, validation_loss, optimizer=gradient_descent)


@pytest.mark.parametrize(("build", "shape"), LAYERS.values(), ids=LAYERS.keys())
def test_layers(build, shape):
    """Each has second derivatives, is accepted by the preflight checks, and is left as it was."""
    problem = layer_problem(build)
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        batch = x, torch.randn_like(problem.model(x))
    with assert_unchanged(problem):
        assert_product_is_a_difference_of_gradients(problem, [batch])
        hi.hypergradient(problem, {"name": "cg", "damping": 10.0}, training_batches=[batch], validation_batch=batch)


def test_dropout_draws_once():
    """All products are of one matrix, that of the masks drawn first, and so is the gradient."""
    problem = layer_problem(lambda: nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Tanh()))
    batch = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 6, dtype=torch.float64)
    torch.manual_seed(3)
    operator = Hessian(problem, [batch])
    torch.manual_seed(3)
    expected = dense_derivatives(problem, [batch])
    torch.testing.assert_close(columns(operator.__matmul__, basis_of(problem.params)), expected.hessian)
    torch.testing.assert_close(columns(operator.mixed, basis_of(problem.params)).T, expected.mixed)
    torch.testing.assert_close(flatten(operator.gradient), expected.gradient)


def test_validation_runs_in_eval_mode_and_at_the_weights_given():
    problem = layer_problem(lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.9)))
    batch = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    at = random_like(problem.params)
    buffers = {name: b.clone() for name, b in problem.model.named_buffers()}
    buffers["1.running_mean"] += 1.0
    with assert_unchanged(problem), torch.no_grad():
        loss, vector, direct = validation_gradients(problem, batch, at, buffers)
    twin = layer_problem(lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.9))).model.eval()
    twin.load_state_dict({**at, **buffers})
    expected = F.mse_loss(twin(batch[0]), batch[1])
    expected.backward()
    assert_close(vector, {name: p.grad for name, p in twin.named_parameters()}, 1e-12, "∂F/∂w")
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    assert direct["decay"].item() == 0
