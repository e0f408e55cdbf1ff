"""What backends carry fits the problem that it came from, survives a file, and is dropped elsewhere, with a warning."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints

import hyperopt_implicit as hi
from hyperopt_implicit.backend import Hypergradient, State
from hyperopt_implicit.carried import fitting
from hyperopt_implicit.errors import HyperoptWarning
from hyperopt_implicit.hyper_optimizer import hypergradient
from hyperopt_implicit.testing.assertions import assert_close, same, saved_and_loaded
from hyperopt_implicit.testing.specimens import Linear, gradient_descent, regression_data, ridge_problem
from hyperopt_implicit.vectors import same_shapes

from .cases import CASES

every_backend = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def message(name: str, mismatch: str) -> str:
    return (
        "the state carried from earlier outer steps must fit the model: each vector in it has the names, shapes, "
        f"dtypes and device of the trained parameters or of the hyperparameters; {name!r} has {mismatch}. It was "
        "dropped, and the next hypergradient starts cold: nothing is wrong with that, it only costs more. Load the "
        "checkpoint into the model it was saved from to keep it."
    )


def vector(**entries: Tensor) -> dict[str, Tensor]:
    return entries


def ones(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def two_parameters() -> hi.BilevelProblem:
    """w has ``weight`` (4) and ``slope`` (2, 3), λ has ``decay`` (4)."""
    return ridge_problem(Linear(4, slope=nn.Parameter(ones(2, 3))), decay=torch.full((4,), 0.3))


# ------------------------------------------------------------------------------------------------------- what is said

MISFITS = {
    "a name is missing": (vector(weight=ones(4)), "no entry 'slope', which the model has"),
    "a foreign name": (
        vector(weight=ones(4), slope=ones(2, 3), bias=ones(1)),
        "an entry 'bias', which the model does not have",
    ),
    "all names are foreign": (vector(a=ones(4)), "an entry 'a', which the model does not have"),
    "another shape": (
        vector(weight=ones(4), slope=ones(3, 2)),
        "'slope' of shape (3, 2), which is (2, 3) in the model",
    ),
    "one number for four": (
        vector(weight=ones(), slope=ones(2, 3)),
        "'weight' of shape (), which is (4,) in the model",
    ),
    "another dtype": (
        vector(weight=ones(4, dtype=torch.float32), slope=ones(2, 3)),
        "'weight' as torch.float32 on cpu, which is torch.float64 on cpu in the model",
    ),
    "another device": (
        vector(weight=ones(4).to("meta"), slope=ones(2, 3)),
        "'weight' as torch.float64 on meta, which is torch.float64 on cpu in the model",
    ),
    "hyperparameters of another shape": (
        vector(decay=ones(3)),
        "'decay' of shape (3,), which is (4,) in the set of hyperparameters",
    ),
    "a hyperparameter too many": (
        vector(decay=ones(4), other=ones(1)),
        "an entry 'other', which the set of hyperparameters does not have",
    ),
}


@pytest.mark.parametrize(("misfit", "mismatch"), MISFITS.values(), ids=MISFITS.keys())
def test_what_does_not_fit_is_named(misfit, mismatch):
    """The whole state goes, with what would fit; at the line of the caller."""
    fits = vector(weight=ones(4), slope=ones(2, 3))
    for state in ({"solution": misfit}, {"fits": fits, "solution": misfit}, {"deep": {"er": {"solution": misfit}}}):
        with pytest.warns(HyperoptWarning) as caught:
            assert fitting(state, two_parameters()) == {}
        assert [str(each.message) for each in caught] == [message("solution", mismatch)]
        assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"calls": 3, "largest": 2.5, "name": "x", "flag": True, "nothing": None},
        {"tensor": ones(7), "list": [ones(3)], "empty": {}, "plan": {"largest": ones(), "rung": 1}},
        {"solution": vector(weight=ones(4), slope=ones(2, 3))},
        {"solution": vector(decay=ones(4)), "smallest": 0.1},
        {"each": {"0": vector(weight=ones(4), slope=ones(2, 3)), "1": vector(decay=ones(4))}},
        {"solution": vector(weight=ones(4) * float("nan"), slope=ones(2, 3))},
    ],
    ids=["empty", "numbers", "tensors", "w", "λ", "nested", "NaN"],
)
def test_what_fits_is_left_alone(state):
    """The very state; whether its numbers are sound is the backend's to judge."""
    assert fitting(state, two_parameters()) is state


def test_another_order_is_put_right():
    """Arithmetic pairs tensors by position; all else in the state stays the object that it was."""
    kept = {"1": vector(decay=ones(4))}
    state = {"solution": vector(slope=2.0 * ones(2, 3), weight=3.0 * ones(4)), "calls": 3, "each": kept}
    found = fitting(state, two_parameters())
    assert list(found) == list(state) and list(found["solution"]) == ["weight", "slope"]
    assert all(found["solution"][name] is x for name, x in state["solution"].items())
    assert found["each"] is kept and list(state["solution"]) == ["slope", "weight"]


@pytest.mark.parametrize("name", ["cg", "heavy_ball", "soba", "nystrom"])
def test_a_state_in_another_order_gives_the_same(name):
    """Parameters of one shape, which no operation on tensors would notice to be exchanged."""
    problem = ridge_problem(Linear(4, other=nn.Parameter(ones(4))), extra=lambda model: model.other.square().sum())
    validation = {"training_batches": TRAINING, "validation_batch": VALIDATION}
    state = hi.hypergradient(problem, name, **validation).state
    turned = {
        key: dict(reversed(x.items())) if isinstance(x, dict) and "weight" in x else x for key, x in state.items()
    }
    expected = hi.hypergradient(problem, name, state=state, **validation)
    assert same(hi.hypergradient(problem, name, state=turned, **validation).gradients, expected.gradients)
    assert not same_shapes({"a": ones(4), "b": ones(4)}, {"b": ones(4), "a": ones(4)})


# --------------------------------------------------------------------------------------------------- every backend's


TRAINING = [regression_data(0), regression_data(2)]
VALIDATION = regression_data(1)


def prepared(case: Any, features: int = 4) -> tuple[hi.BilevelProblem, Sequence[Any], Any]:
    training = [regression_data(seed, features=features) for seed in (0, 2)]
    validation = regression_data(1, features=features)
    problem = ridge_problem(Linear(features))
    with torch.no_grad():
        problem.params["weight"].fill_(0.5)
    case.prepare(problem, training, validation)
    return problem, training, validation


def call(case: Any, state: State | None, features: int = 4) -> Hypergradient:
    problem, training, validation = prepared(case, features)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return hi.hypergradient(problem, case.name, training_batches=training, validation_batch=validation, state=state)


@every_backend
def test_every_state_fits_and_survives_a_file(case):
    """After two calls; the third is the same to the bit with it as with what came back from the file."""
    state = call(case, call(case, None).state).state
    problem, _, _ = prepared(case)
    assert fitting(state, problem) is state
    loaded = saved_and_loaded(state)
    assert fitting(loaded, problem) is loaded
    third, again = call(case, state), call(case, loaded)
    assert same(third.gradients, again.gradients)
    assert (third.status, third.iterations, third.residual, third.hvps) == (
        again.status,
        again.iterations,
        again.residual,
        again.hvps,
    )
    assert same(third.state, again.state)


@every_backend
def test_a_state_of_a_wider_model_is_dropped(case):
    """By both entry points, where there is anything in it that has a shape; the number is then the cold one."""
    wide = call(case, call(case, None, features=6).state, features=6).state
    cold = call(case, None)
    problem, training, validation = prepared(case)
    shaped = has_vectors(wide)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = call(case, wide)
    assert len(caught) == shaped
    if not shaped:
        return
    assert "of shape (6,), which is (4,) in the model. It was dropped" in str(caught[0].message)
    assert same(found.gradients, cold.gradients)
    assert (found.status, found.iterations, found.residual) == (cold.status, cold.iterations, cold.residual)
    outer = hi.HyperOptimizer(problem, torch.optim.SGD, lr=0.1, backend=case.name)
    with pytest.warns(HyperoptWarning, match=r"of shape \(6,\), which is \(4,\) in the model"):
        outer.load_state_dict({**outer.state_dict(), "backend_state": wide})
    assert outer.state == {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        assert same(outer.compute(training, validation).gradients, cold.gradients)


def has_vectors(state: Any) -> bool:
    return isinstance(state, dict) and any(
        (isinstance(x, Tensor) and x.dim() > 0) or has_vectors(x) for x in state.values()
    )


@every_backend
def test_a_run_that_is_resumed_from_a_file_goes_on_to_the_bit(case):
    """Four outer steps, and the last two of them again, from what state_dict was at the second."""

    def outer() -> tuple[hi.HyperOptimizer, Sequence[Any], Any]:
        problem, training, validation = prepared(case)
        return hi.HyperOptimizer(problem, torch.optim.Adam, lr=0.05, backend=case.name), training, validation

    straight, training, validation = outer()
    for _ in range(2):
        straight.step_through(training, validation)
    saved, state = saved_and_loaded(straight.state_dict()), torch.get_rng_state()
    for _ in range(2):
        expected = straight.step_through(training, validation)
    torch.set_rng_state(state)
    second, training, validation = outer()
    second.load_state_dict(saved)
    for _ in range(2):
        found = second.step_through(training, validation)
    assert same(found.gradients, expected.gradients)
    assert same(second.state, straight.state)
    assert same(second.problem.hparams, straight.problem.hparams)


# ------------------------------------------------------------------------------------------------- between two models


def test_a_state_of_another_dtype_is_dropped():
    """A model that was trained in float64 goes on in float32."""
    problem = ridge_problem()
    state = hi.hypergradient(problem, "cg", training_batches=TRAINING, validation_batch=VALIDATION).state
    narrow = problem.copy(torch.float32)
    training = [tuple(x.float() for x in batch) for batch in TRAINING]
    validation = tuple(x.float() for x in VALIDATION)
    cold = hi.hypergradient(narrow, "cg", training_batches=training, validation_batch=validation)
    with pytest.warns(HyperoptWarning) as caught:
        found = hi.hypergradient(narrow, "cg", training_batches=training, validation_batch=validation, state=state)
    mismatch = "'weight' as torch.float64 on cpu, which is torch.float32 on cpu in the model"
    assert [str(each.message) for each in caught] == [message("solution", mismatch)]
    assert same(found.gradients, cold.gradients)


def test_a_state_of_a_model_with_more_layers_is_dropped():
    def build(layers: int) -> hi.BilevelProblem:
        @hi.hyperparameter("decay", init=0.3, constraint=constraints.positive)
        def training_loss(model, batch, *, decay):
            x, y = batch
            penalty = sum(p.square().sum() for p in model.parameters())
            return (model(x).squeeze(-1) - y).square().mean() + decay * penalty

        def validation_loss(model, batch):
            x, y = batch
            return (model(x).squeeze(-1) - y).square().mean()

        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)), nn.Linear(4, 1)).double()
        return hi.BilevelProblem(model, training_loss, validation_loss, optimizer=gradient_descent)

    options = {"training_batches": TRAINING, "validation_batch": VALIDATION}
    backend = hi.get_backend("cg", damping=10.0)
    deep, flat = (hi.hypergradient(build(layers), backend, **options).state for layers in (2, 1))
    with pytest.warns(HyperoptWarning) as caught:
        hi.hypergradient(build(1), backend, state=deep, **options)
    assert str(caught[0].message) == message("solution", "'1.weight' of shape (4, 4), which is (1, 4) in the model")
    with pytest.warns(HyperoptWarning) as caught:
        hi.hypergradient(build(2), backend, state=flat, **options)
    assert str(caught[0].message) == message("solution", "'1.weight' of shape (1, 4), which is (4, 4) in the model")


def test_a_state_of_another_backend_does_no_harm():
    """It fits, and each backend takes what it knows: the accuracy is as without."""
    options = {"training_batches": TRAINING, "validation_batch": VALIDATION}
    states = {
        name: hi.hypergradient(ridge_problem(), name, **options).state
        for name in ("cg", "neumann", "heavy_ball", "soba", "minres", "nystrom", "fixed_point")
    }
    for name, accuracy in (("cg", {"tolerance": 1e-10}), ("heavy_ball", {"tolerance": 1e-10})):
        backend = hi.get_backend(name, **accuracy)
        cold = hi.hypergradient(ridge_problem(), backend, **options)
        for state in states.values():
            found = hi.hypergradient(ridge_problem(), backend, state=state, **options)
            assert_close(found.gradients, cold.gradients, 1e-8)


def test_the_public_function_points_at_the_caller():
    with pytest.warns(HyperoptWarning) as caught:
        hypergradient(
            ridge_problem(),
            "cg",
            training_batches=TRAINING,
            validation_batch=VALIDATION,
            state={"solution": vector(weight=ones(3))},
        )
    assert caught[0].filename == __file__
