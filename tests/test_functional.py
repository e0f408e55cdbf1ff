"""Tensors swapped at places found once, against ``torch.func.functional_call``; afterwards all is as it was before."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

import hyperopt_implicit as hi
from hyperopt_implicit.functional import Places
from hyperopt_implicit.testing.assertions import assert_close, assert_unchanged
from hyperopt_implicit.testing.specimens import (
    TRAINING,
    VALIDATION,
    Linear,
    Twice,
    gradient_descent,
    half_mean_square,
    ridge_problem,
    seeded,
)
from hyperopt_implicit.vectors import Params


class Counter(nn.Module):
    """Replaces one buffer at each call, and changes another in place."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), 0.5))
        self.register_buffer("n", torch.zeros(()))
        self.register_buffer("total", torch.zeros(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.n = self.n + 1
        self.total += x.detach().sum(0)
        return (x * self.weight + self.total).sum(-1, keepdim=True) * self.n


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.each = nn.ParameterList(nn.Parameter(torch.randn(4)) for _ in range(3))
        self.named = nn.ParameterDict({"a": nn.Parameter(torch.randn(4)), "b": nn.Parameter(torch.randn(()))})

    def forward(self, x: Tensor) -> Tensor:
        return x @ (torch.stack(list(self.each)).prod(0) + self.named["a"]) + self.named["b"]


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer = kind(4, 3, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.unsqueeze(1).expand(-1, 5, -1).cumsum(1))[0]


class UsedTwice(nn.Module):
    """One module under two names, and called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class SharedBuffer(nn.Module):
    """Two normalisations that move the same running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(4), nn.BatchNorm1d(4)  # shared in ``built``: converting parts them

    def forward(self, x: Tensor) -> Tensor:
        return self.second(2.0 * self.first(x) + 1.0)


class TiedAcross(nn.Module):
    """A weight that stands in two modules, under the first of its names."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.outer = nn.Linear(4, 4, bias=False)
        self.outer.weight = self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tied weights": TiedAcross,
    "two modules share": lambda: Twice(4),
    "a module used twice": UsedTwice,
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 3)),
    "rnn": lambda: Recurrent(nn.RNN),
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "batch norm": lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.BatchNorm1d(4)),
    "shared buffers": SharedBuffer,
    "a buffer replaced": Counter,
    "lists and dicts": Lists,
    "without parameters of its own": lambda: nn.Sequential(nn.Tanh(), nn.Sequential(nn.Linear(4, 2))),
}
every_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())


def built(build: Callable[[], nn.Module]) -> nn.Module:
    """Seeded and in float64, with buffers that are shared still shared."""
    module = seeded(build)
    if isinstance(module, SharedBuffer):
        module.second.running_mean = module.first.running_mean
    return module


def moved(module: nn.Module) -> tuple[Params, Params]:
    """Parameters and buffers a little away from the module's own."""
    near = {name: p.detach() + 0.1 * torch.randn_like(p) for name, p in module.named_parameters()}
    parameters = {name: p.requires_grad_() for name, p in near.items()}
    buffers = {name: b + 1 if b.is_floating_point() else b.clone() for name, b in module.named_buffers()}
    return parameters, buffers


def tensors_of(module: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Each tensor by all its names, as the object that it is and as a copy of its values."""
    found = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    return {name: (x, x.detach().clone()) for name, x in found}


def assert_same_tensors(module: nn.Module, before: dict[str, tuple[Tensor, Tensor]]) -> None:
    after = tensors_of(module)
    assert after.keys() == before.keys()
    for name, (tensor, values) in before.items():
        assert after[name][0] is tensor, name
        assert torch.equal(after[name][1], values), name
        assert tensor.grad is None


def derivatives(output: Tensor, parameters: Params) -> list[Tensor]:
    scalar = (output * torch.linspace(-1.0, 2.0, output.numel(), dtype=output.dtype).view_as(output)).sum()
    return list(torch.autograd.grad(scalar, list(parameters.values()), materialize_grads=True))


# ------------------------------------------------------------------------------------------ as functional_call does it


@every_model
def test_is_functional_call(build):
    """Output, derivatives and what became of the buffers, to the bit; the module keeps its own."""
    module = built(build)
    x = torch.randn(6, 4, dtype=torch.float64)
    parameters, buffers = moved(module)
    theirs = {name: b.clone() for name, b in buffers.items()}
    twin, given = copy.deepcopy(module), {**parameters, **theirs}
    expected = functional_call(twin, given, (x,))
    wanted = derivatives(expected, parameters)
    before = tensors_of(module)
    with Places(module).swapped(parameters, buffers) as held:
        found = module(x)
        assert all(p is parameters[name] for name, p in module.named_parameters())
    assert torch.equal(found, expected)
    for each, other in zip(derivatives(found, parameters), wanted, strict=True):
        assert torch.equal(each, other)
    assert held.keys() == buffers.keys()
    for name, buffer in held.items():
        assert torch.equal(buffer, given[name]), name
        if not isinstance(module, Counter):
            assert buffer is buffers[name], "buffers that were given are changed in place"
    assert_same_tensors(module, before)


@every_model
def test_without_buffers_copies_are_used(build):
    """As with the module's own buffers, which stay as they were."""
    module = built(build)
    x = torch.randn(6, 4, dtype=torch.float64)
    parameters, _ = moved(module)
    own = {name: b.clone() for name, b in module.named_buffers()}
    expected = functional_call(copy.deepcopy(module), {**parameters, **own}, (x,))
    before, places = tensors_of(module), Places(module)
    for _ in range(2):
        with places.swapped(parameters, {}):
            assert torch.equal(module(x), expected)
        assert_same_tensors(module, before)


def test_some_parameters_alone():
    module = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)))
    x, (parameters, _) = torch.randn(6, 4, dtype=torch.float64), moved(module)
    some = {"1.weight": parameters["1.weight"]}
    with Places(module).swapped(some, {}):
        found = module(x)
    assert torch.equal(found, functional_call(copy.deepcopy(module), some, (x,)))


def test_a_buffer_that_is_replaced_is_yielded():
    module = Counter().double()
    given = {"n": torch.tensor(4.0, dtype=torch.float64), "total": torch.ones(4, dtype=torch.float64)}
    n, total = given["n"], given["total"]
    with Places(module).swapped({}, given) as held:
        module(torch.ones(3, 4, dtype=torch.float64))
        module(torch.ones(3, 4, dtype=torch.float64))
    assert held["n"].item() == 6 and n.item() == 4, "another tensor came in its place"
    assert held["total"] is total and total.tolist() == [7.0] * 4
    assert module.n.item() == 0 and module.total.tolist() == [0.0] * 4


def test_places_hold_after_parameters_and_buffers_were_replaced_or_moved():
    """A tensor is looked for where it stands, not kept: loading, moving and new buffers are seen."""
    module = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))).float()
    places = Places(module)
    with places.swapped({}, {}):
        pass
    module.double()
    module[0].weight = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
    module[1].running_mean = torch.ones(4, dtype=torch.float64)
    module[1].register_buffer("later", torch.zeros(1))
    module.load_state_dict({name: x + 0.5 if x.is_floating_point() else x for name, x in module.state_dict().items()})
    before, (parameters, buffers) = tensors_of(module), moved(module)
    assert places.buffers().keys() == buffers.keys()
    x = torch.randn(6, 4, dtype=torch.float64)
    given = {**parameters, **{name: b.clone() for name, b in buffers.items()}}
    expected = functional_call(copy.deepcopy(module), given, (x,))
    with places.swapped(parameters, buffers) as held:
        assert torch.equal(module(x), expected)
    assert held.keys() == buffers.keys()
    assert_same_tensors(module, before)


def test_a_buffer_that_goes_away_inside_comes_back():
    """Set to None, deleted, or none to begin with: nothing breaks, and the module has its own again."""

    class Forgets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("cache", torch.ones(2))
            self.register_buffer("scratch", torch.ones(3))
            self.register_buffer("none", None)

        def forward(self, x: Tensor) -> Tensor:
            y = x * self.cache
            self.cache = None
            del self.scratch
            return y

    module = Forgets()
    before, given = tensors_of(module), {"cache": torch.full((2,), 3.0)}
    with Places(module).swapped({}, given) as held:
        assert module(torch.ones(2)).tolist() == [3.0, 3.0]
    assert held["cache"] is given["cache"]
    assert_same_tensors(module, before)
    assert module.none is None


def test_a_buffer_that_is_filled_inside_is_none_again():
    """And one that is registered there is gone: neither would fit the next call, and both hold its graph."""

    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.register_buffer("cache", None)

        def forward(self, x: Tensor) -> Tensor:
            self.cache = x * self.weight
            self.register_buffer("other", x)
            return self.cache

    module = Remembers()
    with Places(module).swapped({"weight": torch.ones(2, requires_grad=True)}, {}):
        module(torch.ones(2))
        assert module.cache.requires_grad
    assert module.cache is None and "other" not in module._buffers


def test_modules_that_are_exchanged_are_swapped_too():
    module = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)))
    places, x = Places(module), torch.randn(6, 4, dtype=torch.float64)
    module[1] = nn.Linear(4, 1).double()
    module.append(nn.Linear(1, 2).double())
    parameters, _ = moved(module)
    before = tensors_of(module)
    with places.swapped(parameters, {}):
        found = module(x)
    assert torch.equal(found, functional_call(copy.deepcopy(module), parameters, (x,)))
    assert all(g.abs().max() > 0 for g in derivatives(found, parameters))
    assert_same_tensors(module, before)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: parametrizations.weight_norm(model[0]),
        lambda model: model.__setitem__(0, nn.Linear(4, 1, bias=False).double()),
        lambda model: delattr(model[0], "weight"),
    ],
    ids=["parametrized", "without a bias", "deleted"],
)
def test_a_parameter_that_went_away_is_named(change):
    module = seeded(lambda: nn.Sequential(nn.Linear(4, 1)))
    problem = hi.BilevelProblem(
        module,
        hi.hyperparameter("decay", init=0.1)(lambda model, batch, *, decay: decay * model(batch).square().mean()),
        lambda model, batch: model(batch).mean(),
        optimizer=gradient_descent,
    )
    change(module)
    before = tensors_of(module)
    with pytest.raises(hi.ProblemError) as caught:
        problem.functional_training_loss(problem.params, problem.hparams, torch.ones(6, 4, dtype=torch.float64))
    assert re.fullmatch(
        r"the model must keep the parameters that it had when the problem was built; 'model\.0\.(weight|bias)' is not "
        r"among them any more\. Change the model first \(parametrizations, new layers\), and then build the inner "
        r"optimizer and the problem\.",
        str(caught.value),
    )
    assert_same_tensors(module, before)


# ---------------------------------------------------------------------------------------------- what is left afterwards


@every_model
def test_an_exception_leaves_all_as_it_was(build):
    module = built(build)
    parameters, buffers = moved(module)
    before, x = tensors_of(module), torch.randn(6, 4, dtype=torch.float64)
    with pytest.raises(ZeroDivisionError), Places(module).swapped(parameters, buffers):  # noqa: PT012
        module(x)
        raise ZeroDivisionError
    assert_same_tensors(module, before)


def test_an_unknown_name_changes_nothing():
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = tensors_of(module)
    with (
        pytest.raises(hi.ProblemError),
        Places(module).swapped({"0.weight": torch.ones(4, 4), "0.wieght": torch.ones(1)}, {}),
    ):
        pass
    assert_same_tensors(module, before)


def test_one_inside_the_other():
    """Each level sees its own tensors, and finds the outer ones again."""
    module = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    before, places, x = tensors_of(module), Places(module), torch.randn(6, 4, dtype=torch.float64)
    (outer, outer_buffers), (inner, inner_buffers) = moved(module), moved(module)
    expected = functional_call(
        copy.deepcopy(module), {**inner, **{name: b.clone() for name, b in inner_buffers.items()}}, (x,)
    )
    with places.swapped(outer, outer_buffers):
        with places.swapped(inner, inner_buffers):
            assert torch.equal(module(x), expected)
            assert torch.equal(functional_call(module, dict(inner), (x,)), expected)
        assert all(p is outer[name] for name, p in module.named_parameters())
        assert all(b is outer_buffers[name] for name, b in module.named_buffers())
    assert outer_buffers["1.num_batches_tracked"] == 0
    assert_same_tensors(module, before)


# --------------------------------------------------------------------------------------------------- within a problem


@every_model
def test_losses_of_a_problem(build):
    """L(w, λ) as functional_call has it, with the parameters as objects untouched."""
    module = built(build)

    @hi.hyperparameter("net", init=seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))))
    @hi.hyperparameter("scale", init=2.0)
    def training_loss(model: nn.Module, batch: Tensor, *, scale: Tensor, net: nn.Module) -> Tensor:
        return scale * model(torch.tanh(net(batch))).square().mean()

    def validation_loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).mean()

    problem = hi.BilevelProblem(module, training_loss, validation_loss, optimizer=gradient_descent)
    x, (parameters, buffers) = torch.randn(6, 4, dtype=torch.float64), moved(module)
    hparams, _ = moved(problem.hyperparameters)
    own = {name: b.clone() for name, b in buffers.items()}
    twin = copy.deepcopy(problem.hyperparameters.net)
    fed = functional_call(twin, {k.removeprefix("net."): v for k, v in hparams.items() if k != "scale"}, (x,))
    given = {**parameters, **own}
    output = functional_call(copy.deepcopy(module), given, (torch.tanh(fed),))
    expected = hparams["scale"] * output.square().mean()
    inputs = {**parameters, **hparams}
    wanted = torch.autograd.grad(expected, list(inputs.values()))
    before, theirs = tensors_of(module), tensors_of(problem.hyperparameters)
    with assert_unchanged(problem):
        found = problem.functional_training_loss(parameters, hparams, x, buffers)
    assert torch.equal(found, expected)
    for each, other in zip(torch.autograd.grad(found, list(inputs.values())), wanted, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-13, atol=1e-15)
    for name, buffer in buffers.items():
        assert torch.equal(buffer, given[name]), name
        assert not buffer.requires_grad
    assert_same_tensors(module, before)
    assert_same_tensors(problem.hyperparameters, theirs)


def test_an_error_in_a_loss():
    def training_loss(model: nn.Module, batch: Any, *, decay: Tensor) -> Tensor:
        return model(batch) * (1 / len(()))

    module = seeded(MODELS["batch norm"])
    declared = hi.hyperparameter("decay", init=0.1)(training_loss)
    problem = hi.BilevelProblem(module, declared, lambda model, batch: model(batch).sum(), optimizer=gradient_descent)
    parameters, buffers = moved(module)
    before, theirs = tensors_of(module), tensors_of(problem.hyperparameters)
    with assert_unchanged(problem), pytest.raises(ZeroDivisionError):
        problem.functional_training_loss(parameters, problem.hparams, torch.ones(6, 4, dtype=torch.float64), buffers)
    assert_same_tensors(module, before)
    assert_same_tensors(problem.hyperparameters, theirs)


def test_a_copy_swaps_in_the_copy():
    """Each problem's loss is called on its own model, which holds what that problem was given."""
    problem = ridge_problem(nn.Sequential(Linear(4), nn.BatchNorm1d(20)))
    other = problem.copy()
    seen: dict[int, Any] = {}

    def looks(model: nn.Module, batch: Any, *, decay: Tensor) -> Tensor:
        first, second = (next(each.model.parameters()) for each in (problem, other))
        seen[id(model)] = first, second
        return next(model.parameters()).sum() * decay

    for each, index in ((problem, 0), (other, 1)):
        each._losses = {**each._losses, "training_loss": looks}
        given = {name: torch.ones_like(p) for name, p in each.params.items()}
        each.functional_training_loss(given, each.hparams, None)
        both = seen[id(each.model)]
        assert both[index] is given["0.weight"]
        assert both[1 - index] is [problem, other][1 - index].params["0.weight"]
    assert problem.model is not other.model


def test_a_deep_copy_swaps_in_itself():
    problem = ridge_problem(nn.Sequential(Linear(4)))
    other = copy.deepcopy(problem)
    given = {name: torch.ones_like(p) for name, p in other.params.items()}
    expected = problem.functional_training_loss(given, problem.hparams, TRAINING)
    with torch.no_grad():
        problem.params["0.weight"].fill_(7.0)
    assert torch.equal(other.functional_training_loss(given, other.hparams, TRAINING), expected)
    assert other.params["0.weight"].abs().max() == 0


def test_a_loss_that_asks_for_a_hypergradient_of_its_own_problem():
    """Nested: the inner call sees the problem as it stands, and the outer one its swapped tensors afterwards."""
    found = []

    def validation_loss(model: nn.Module, batch: Any) -> Tensor:
        held = [*model.parameters()]
        if not found:
            found.append(None)
            found[0] = hi.hypergradient(problem, "cg", training_batches=[TRAINING], validation_batch=VALIDATION)
        assert all(p is q for p, q in zip(model.parameters(), held, strict=True))
        return half_mean_square(model, batch)

    problem = ridge_problem(validation_loss=validation_loss)
    nn.init.ones_(problem.model.weight)
    plain = ridge_problem()
    nn.init.ones_(plain.model.weight)
    with assert_unchanged(problem):
        outer = hi.hypergradient(problem, "cg", training_batches=[TRAINING], validation_batch=VALIDATION)
    expected = hi.hypergradient(plain, "cg", training_batches=[TRAINING], validation_batch=VALIDATION)
    assert_close(outer.gradients, expected.gradients, 0.0)
    assert_close(found[0].gradients, expected.gradients, 0.0)


def test_a_loss_that_calls_the_model_with_tensors_of_its_own():
    """A step ahead inside the loss (as in meta-learning), by functional_call on the model that is swapped already."""

    @hi.hyperparameter("rate", init=0.1)
    def training_loss(model: nn.Module, batch: Any, *, rate: Tensor) -> Tensor:
        here = dict(model.named_parameters())
        loss = half_mean_square(model, batch)
        slopes = torch.autograd.grad(loss, list(here.values()), create_graph=True)
        ahead = {name: p - rate * g for (name, p), g in zip(here.items(), slopes, strict=True)}
        return (functional_call(model, ahead, (batch[0],)) - batch[1]).square().mean()

    problem = hi.BilevelProblem(Linear(4), training_loss, half_mean_square, optimizer=gradient_descent)
    x, y = TRAINING
    w = torch.randn(4, dtype=torch.float64, requires_grad=True)
    rate = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    with assert_unchanged(problem):
        found = problem.functional_training_loss({"weight": w}, {"rate": rate}, TRAINING)
    expected = (x @ (w - rate * x.T @ (x @ w - y) / len(y)) - y).square().mean()
    for each, other in zip(
        torch.autograd.grad(found, [w, rate]), torch.autograd.grad(expected, [w, rate]), strict=True
    ):
        torch.testing.assert_close(each, other, rtol=1e-12, atol=1e-14)
