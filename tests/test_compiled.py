"""Compiled products: the trace, its cut and its fall-backs, against autograd in float64.

The fast tests run both halves of the trace by torch's own interpreter, which is exact; torch's compiler takes seconds
for each half, and is tried on one small model here and on more of them in the long version.
"""

from __future__ import annotations

import gc
import logging
import re
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.distributions import constraints

import hyperopt_implicit as hi
from hyperopt_implicit import compiled, low_precision, tracing
from hyperopt_implicit.compiled import CompiledHessian
from hyperopt_implicit.gauss_newton import GaussNewton
from hyperopt_implicit.low_precision import has_bfloat16
from hyperopt_implicit.operators import Hessian, LossHessian
from hyperopt_implicit.testing.assertions import assert_close, assert_unchanged
from hyperopt_implicit.testing.oracles import unflatten
from hyperopt_implicit.testing.specimens import (
    TRAINING,
    VALIDATION,
    Linear,
    logistic_problem,
    network_problem,
    quadratic_problem,
    regression_data,
    ridge_problem,
    seeded,
)
from hyperopt_implicit.vectors import Params, add, norm

from . import kinds_of_layers

COMPILE_HALF = tracing.compile_half


@pytest.fixture(autouse=True)
def halves(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """The halves that were asked to be compiled; they are interpreted, and taken to be twice as fast."""
    found: list[fx.GraphModule] = []
    monkeypatch.setattr(tracing, "compile_half", lambda graph, examples: found.append(graph) or graph)
    monkeypatch.setattr(compiled, "quickest", lambda calls, device: [2e-3, 1e-3])
    return found


@pytest.fixture
def by_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The halves as torch's compiler makes them."""
    monkeypatch.setattr(tracing, "compile_half", COMPILE_HALF)


def random_like(like: Params, seed: int = 3) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(x.shape, generator=generator, dtype=x.dtype) for name, x in like.items()}


def curvature(problem: hi.BilevelProblem, batches: list[Any], **options: Any) -> LossHessian:
    return hi.get_backend("cg", compile=True, **options).linearise(problem, batches)  # type: ignore[attr-defined]


def relative(x: Params, y: Params) -> float:
    return norm(add(x, y, -1.0)) / norm(y)


def assert_the_same(
    problem: hi.BilevelProblem, batches: list[Any], accuracy: float, kind: type[Hessian] = Hessian
) -> None:
    """Loss, gradient, product, mixed derivative and both at once, the same as by autograd and with the same draws."""
    torch.manual_seed(1)
    chosen = "gauss_newton" if kind is GaussNewton else "hessian"
    with assert_unchanged(problem, random_state=False):
        ours = curvature(problem, batches, curvature=chosen)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    theirs = kind(problem, batches)
    assert torch.equal(after, torch.get_rng_state())
    assert isinstance(ours, CompiledHessian)
    vector, other = random_like(problem.params), random_like(problem.params, 4)
    assert ours.loss == pytest.approx(theirs.loss, rel=accuracy)
    assert_close(ours.gradient, theirs.gradient, accuracy, "the gradient")
    assert_close(ours @ vector, theirs @ vector, accuracy, "the product")
    assert_close(ours.mixed(vector), theirs.mixed(dict(vector)), accuracy, "the mixed derivative")
    assert_close(ours.multiply_and_mix(other), theirs @ other, accuracy, "the product with the mixed derivative")
    assert_close(ours.mixed(other), theirs.mixed(dict(other)), accuracy, "the mixed derivative with the product")
    assert_close(ours @ vector, theirs @ vector, accuracy, "the product when asked again")
    assert ours.products == 3


# ---------------------------------------------------------------------------------------------------- equal to autograd


@dataclass
class Net:
    """A hyperparameter that is a network, and a batch in a dict with a number beside the tensors."""

    def problem(self) -> hi.BilevelProblem:
        @hi.hyperparameter("weigher", init=lambda _: seeded(lambda: nn.Linear(1, 1), 5))
        @hi.hyperparameter("shift", init=0.1)
        def training_loss(model, batch, *, weigher, shift):
            losses = (model(batch["x"]) + shift - batch["y"]).square() + batch["floor"]
            return (weigher(losses[:, None]).sigmoid()[:, 0] * losses).mean() + model.weight.square().sum()

        return hi.BilevelProblem(
            Linear(4),
            training_loss,
            lambda m, b: m(b["x"]).square().mean(),
            optimizer=lambda p: torch.optim.SGD(p, 0.1),
        )

    def batch(self) -> dict[str, Any]:
        return {"x": TRAINING[0], "y": TRAINING[1], "floor": 0.25}


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))


def _with_decay() -> hi.BilevelProblem:
    return ridge_problem(optimizer=lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.3))


def _unused() -> hi.BilevelProblem:
    bias = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    linear = nn.Parameter(torch.ones(2, dtype=torch.float64))
    return ridge_problem(
        Linear(4, bias=bias, linear=linear),
        extra=lambda model: model.linear.sum(),
        also=hi.hyperparameter("unused", init=1.0),
    )


def _trained(problem: hi.BilevelProblem, batch: Any) -> hi.BilevelProblem:
    for _ in range(3):
        hi.inner_loop.train_step(problem, batch, problem.hyperparameters.values())
    return problem


PROBLEMS: dict[str, Callable[[], tuple[hi.BilevelProblem, list[Any]]]] = {
    "ridge": lambda: (_trained(ridge_problem(decay=torch.tensor([0.1, 0.3, 1.0, 2.0])), TRAINING), [TRAINING]),
    "logistic": lambda: (_trained(logistic_problem(), TRAINING), [TRAINING]),
    "several batches": lambda: (_trained(logistic_problem(), TRAINING), [TRAINING, regression_data(2, rows=7)]),
    "decay of the optimizer": lambda: (_with_decay(), [TRAINING]),
    "unused and linear": lambda: (_unused(), [TRAINING]),
    "saddle": lambda: (quadratic_problem(torch.diag(torch.tensor([1.0, -2.0]).double())), [None]),
    "network as hyperparameter": lambda: (Net().problem(), [Net().batch()]),
    "network": lambda: (network_problem(seeded(_network)), [TRAINING]),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_halves_equal_autograd(name):
    problem, batches = PROBLEMS[name]()
    assert_the_same(problem, batches, 1e-10)


FEW = ["BatchNorm1d, training", "Dropout, training", "weight_norm"]
REST = [name for name in kinds_of_layers.NETWORKS if name not in FEW]


@pytest.mark.parametrize("kind", [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in REST)])
def test_layers(kind):
    assert_the_same(kinds_of_layers.problem(kind, "cross entropy"), [kinds_of_layers.batch(1)], 1e-10)


@pytest.mark.parametrize(
    "kind",
    ["Linear", *(pytest.param(x, marks=pytest.mark.slow) for x in [*FEW, *REST] if x not in ("Linear", FEW[1]))],
)
def test_gauss_newton(kind):
    assert_the_same(kinds_of_layers.problem(kind, "cross entropy"), [kinds_of_layers.batch(1)], 1e-10, GaussNewton)


def test_hypergradients_equal_autograd():
    """Through whole backends: solvers, and one loop on several batches in turn."""
    problem = _trained(logistic_problem(), TRAINING)
    batches = [TRAINING, regression_data(2)]
    for spec in ({"name": "cg", "tolerance": 1e-12}, {"name": "heavy_ball"}, {"name": "amigo"}, {"name": "stocbio"}):
        found = []
        for choice in (False, True):
            backend, state, results = hi.get_backend(spec, compile=choice), {}, []
            for _ in range(3):
                result = backend.hypergradient(problem, batches, VALIDATION, state)
                state = result.state
                results.append(result)
            found.append(results)
        for ours, theirs in zip(*found, strict=True):
            assert_close(ours.gradients, theirs.gradients, 1e-10)
            assert (ours.status, ours.iterations, ours.hvps) == (theirs.status, theirs.iterations, theirs.hvps)


# ---------------------------------------------------------------------------------------------------------- what is cut


def test_the_first_half_runs_once_and_the_second_for_each_product(halves):
    problem, batches = PROBLEMS["logistic"]()
    curvature(problem, batches)
    runs = {id(each): 0 for each in halves}

    def counting(half: fx.GraphModule) -> Callable[..., Any]:
        forward = half.forward

        def run(*x: Any) -> Any:
            runs[id(half)] += 1
            return forward(*x)

        return run

    for each in halves:
        each.forward = counting(each)
    ours = curvature(problem, batches)
    assert list(runs.values()) == [1, 0]
    for _ in range(4):
        ours @ random_like(problem.params)
    assert list(runs.values()) == [1, 4]
    curvature(problem, batches)
    assert list(runs.values()) == [2, 4] and len(halves) == 2


def test_products_take_nothing_that_could_have_been_computed_before(halves):
    """The second half is linear in the vector, and every operator in it depends on the vector."""
    problem, batches = PROBLEMS["network"]()
    ours = curvature(problem, batches)
    ours.multiply_and_mix(random_like(problem.params))
    first, *seconds = halves
    assert len(seconds) == 2
    for second in seconds:
        nodes = list(second.graph.nodes)
        vector = {n for n in nodes if n.op == "placeholder"} & set(
            [n for n in nodes if n.op == "placeholder"][-len(problem.params) :]
        )
        reached = set(vector)
        for n in nodes:
            if any(x in reached for x in n.all_input_nodes):
                reached.add(n)
        assert [n for n in nodes if n.op == "call_function" and n not in reached] == []
        assert torch.ops.aten.tanh.default not in {n.target for n in nodes}
    assert torch.ops.aten.tanh.default in {n.target for n in first.graph.nodes}


def test_masks_are_drawn_anew_for_each_hypergradient_and_are_the_same_in_it():
    problem, batch = ridge_problem(nn.Sequential(Linear(4), nn.Dropout(0.5))), TRAINING
    vector = random_like(problem.params)
    first, second = curvature(problem, [batch]), curvature(problem, [batch])
    product = first @ vector
    assert_close(first @ vector, product, 0.0)
    assert relative(second @ vector, product) > 1e-3


def test_what_is_held_follows_the_model():
    """Running statistics, frozen parameters, modes: none of them is baked into the trace."""
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)))
    model[2].requires_grad_(False)
    problem = network_problem(model)
    model.eval()
    vector = random_like(problem.params)
    curvature(problem, [TRAINING])
    model[1].running_var = 3.0 * model[1].running_var  # other tensors in their place
    model[2].weight = nn.Parameter(2.0 * model[2].weight.detach(), requires_grad=False)
    assert_close(curvature(problem, [TRAINING]) @ vector, Hessian(problem, [TRAINING]) @ vector, 1e-12)
    model.train()
    assert_close(curvature(problem, [TRAINING]) @ vector, Hessian(problem, [TRAINING]) @ vector, 1e-12)


def test_frozen_parameters_are_not_baked_into_the_gauss_newton_matrix():
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)))
    model[2].requires_grad_(False)
    problem = network_problem(model)
    vector = random_like(problem.params)
    curvature(problem, [TRAINING], curvature="gauss_newton")
    model[2].weight = nn.Parameter(2.0 * model[2].weight.detach(), requires_grad=False)
    ours = curvature(problem, [TRAINING], curvature="gauss_newton")
    assert isinstance(ours, CompiledHessian)
    assert_close(ours @ vector, GaussNewton(problem, [TRAINING]) @ vector, 1e-12)


def test_a_call_holds_no_tensors_beside_its_inputs():
    batch = {"x": TRAINING[0], "floor": 0.25}
    call = tracing.Call.of(ridge_problem(), [batch, (TRAINING[1], None)], None, False)
    assert call.rest[1] == [Tensor, 0.25, Tensor, None]
    again = call.batches([torch.ones(1), torch.zeros(1)])
    assert again == [{"x": torch.ones(1), "floor": 0.25}, (torch.zeros(1), None)]


def test_numbers_in_a_batch_are_part_of_what_was_traced(halves):
    problem, batch = Net().problem(), Net().batch()
    for floor in (0.25, 3.0, 0.25):
        given = {**batch, "floor": floor}
        ours, theirs = curvature(problem, [given]), Hessian(problem, [given])
        assert isinstance(ours, CompiledHessian)
        vector = random_like(problem.params)
        assert_close(ours @ vector, theirs @ vector, 1e-12)
    assert len(halves) == 4


def test_vectors_may_be_laid_out_in_any_way():
    problem = network_problem(seeded(lambda: nn.Linear(4, 4)))
    ours, theirs = curvature(problem, [TRAINING_4]), Hessian(problem, [TRAINING_4])
    vector = {name: x.t().contiguous().t() for name, x in random_like(problem.params).items()}
    assert_close(ours @ vector, theirs @ vector, 1e-12)


TRAINING_4 = (TRAINING[0], TRAINING[0].flip(0))


def test_what_is_compiled_goes_with_its_problem():
    problem, batches = PROBLEMS["ridge"]()
    curvature(problem, batches)
    gone = weakref.ref(problem)
    assert problem in compiled._kept
    del problem
    gc.collect()
    assert gone() is None


# ------------------------------------------------------------------------------------------------------- falling back


def falls_back(problem: hi.BilevelProblem, batches: list[Any], **options: Any) -> str:
    """The warning, once; the products are those of autograd, then and later."""
    with pytest.warns(hi.HyperoptWarning) as caught:
        first, second = curvature(problem, batches, **options), curvature(problem, batches, **options)
    assert type(first) is type(second) is (GaussNewton if options else Hessian)
    assert [Path(each.filename).name for each in caught] == [Path(__file__).name]
    return str(caught[0].message)


def decided(model: nn.Module, batch: tuple[Tensor, Tensor], decay: Tensor, how: str) -> Tensor:
    x, y = batch
    squares = (model(x) - y).square()
    if how == "item":
        factor = squares.mean().item()
    elif how == "branch":
        factor = 1.0 if squares.mean() > 0.0 else 2.0
    elif how == "numpy":
        factor = float(squares.detach().numpy().mean())
    else:
        squares, factor = squares[squares.detach() > 0.0], 1.0
    return factor * squares.mean() + decay * model.weight.square().sum()


def deciding(how: str) -> hi.BilevelProblem:
    @hi.hyperparameter("decay", init=0.3, constraint=constraints.positive)
    def training_loss(model, batch, *, decay):
        return decided(model, batch, decay, how)

    return hi.BilevelProblem(
        Linear(4), training_loss, lambda m, b: m(b[0]).square().mean(), optimizer=lambda p: torch.optim.SGD(p, 0.1)
    )


def _line(text: str) -> int:
    return next(i for i, line in enumerate(Path(__file__).read_text().splitlines(), 1) if text in line)


RULE = "compile=True needs a training loss that can be traced, with nothing decided by the values of tensors; "
END = "Products are not compiled. Write the loss without that, or leave the option out."


@pytest.mark.parametrize(
    ("how", "line", "found"),
    [
        (
            "item",
            "squares.mean().item()",
            "the value of a tensor is asked for at {} (aten._local_scalar_dense.default).",
        ),
        ("branch", "factor = 1.0 if", "the value of a tensor is asked for at {} (aten._local_scalar_dense.default)."),
        (
            "mask",
            "squares[squares.detach()",
            "the shape of a result depends on the values of a tensor at {} (aten.nonzero",
        ),
        ("numpy", "detach().numpy()", "the trace stopped at {} ("),
    ],
)
def test_a_model_that_breaks_the_graph_falls_back_and_says_where(how, line, found):
    message = falls_back(deciding(how), [TRAINING])
    place = f"{__file__}:{_line(line)}"
    assert message.startswith(RULE + found.format(place)), message
    assert message.endswith(END)


def test_a_batch_that_is_not_made_of_tensors():
    @dataclass
    class Graph:
        x: Tensor
        y: Tensor

        def __iter__(self):
            return iter((self.x, self.y))

    message = falls_back(ridge_problem(), [Graph(*TRAINING)])
    assert (
        message == f"{RULE}a batch may hold tensors and numbers in lists and dicts, and this one holds a Graph. {END}"
    )


def test_random_layers_with_gauss_newton():
    """Which looks at the loss twice; the masks of both looks could not be kept the same."""
    problem = kinds_of_layers.problem("Dropout, training", "cross entropy")
    message = falls_back(problem, [kinds_of_layers.batch(1)], curvature="gauss_newton")
    assert message == f"{RULE}its random numbers cannot be separated from the products. {END}"


def test_a_compiler_that_fails(monkeypatch):
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no C++ compiler\nsecond line")

    monkeypatch.setattr(tracing, "compile_half", COMPILE_HALF)
    monkeypatch.setattr(torch._inductor, "compile", fails)
    message = falls_back(ridge_problem(), [TRAINING])
    assert message == f"{RULE}torch's compiler failed on it (RuntimeError: no C++ compiler). {END}"


def test_a_compiled_product_that_is_not_faster(monkeypatch):
    monkeypatch.setattr(compiled, "quickest", lambda calls, device: [2e-3, 3e-3])
    assert falls_back(ridge_problem(), [TRAINING]) == (
        "compile=True does not pay on this problem: a compiled product takes 3 ms, and one by autograd 2 ms. Products "
        "are not compiled. Leave the option out."
    )


def test_a_compiled_product_that_is_wrong(monkeypatch):
    def wrong(graph: fx.GraphModule, examples: Any) -> Any:
        return lambda *x: [1.01 * y for y in graph(*x)]

    monkeypatch.setattr(tracing, "compile_half", wrong)
    message = falls_back(_trained(ridge_problem(), TRAINING), [TRAINING])
    assert re.fullmatch(
        r"compile=True must give the products of autograd, and on this training loss they differ by 0\.0\d+ of their "
        r"size. Products are not compiled. Leave the option out.",
        message,
    )


@pytest.mark.parametrize("changed_before", [2, 4, 8, 16, 20, 40])
def test_a_number_that_changes_after_the_trace_is_noticed(changed_before):
    """A schedule as a Python number; in one of the calls in which it is looked for, not in those between."""
    factor = [1.0]

    def scheduled(model: nn.Module) -> Tensor:
        return factor[0] * model.weight.square().sum()

    problem = _trained(ridge_problem(extra=scheduled), TRAINING)
    for call in range(1, changed_before):
        assert isinstance(curvature(problem, [TRAINING]), CompiledHessian), call
    factor[0] = 1.001
    with pytest.warns(hi.HyperoptWarning) as caught:
        found = curvature(problem, [TRAINING])
    message = str(caught[0].message)
    assert message.startswith(
        "compile=True needs a training loss whose numbers are computed from tensors; the compiled loss is "
    )
    assert message.endswith(
        "so something has changed since it was traced: a Python number such as a step count or a schedule, or a tensor "
        "that was replaced. Products are not compiled from here on. Make such a number part of the batch, or a buffer "
        "of the model, as a tensor."
    )
    vector = random_like(problem.params)
    assert_close(found @ vector, Hessian(problem, [TRAINING]) @ vector, 0.0)
    assert type(curvature(problem, [TRAINING])) is Hessian


def test_calls_are_counted_for_each_kind_of_batch():
    """The second call with a kind is looked at, whatever came between."""
    factor = [1.0]
    problem = _trained(ridge_problem(extra=lambda model: factor[0] * model.weight.square().sum()), TRAINING)
    others = [regression_data(0, rows=7)]
    for batches in ([TRAINING], [TRAINING], [TRAINING], others):
        curvature(problem, batches)
    factor[0] = 1.5
    with pytest.warns(hi.HyperoptWarning, match="something has changed"):
        curvature(problem, others)


def test_weights_and_gradient_of_zero():
    """A product is tried on another vector."""
    problem, batch = ridge_problem(), (TRAINING[0], torch.zeros_like(TRAINING[1]))
    with torch.no_grad():
        problem.params["weight"].zero_()
    ours, vector = curvature(problem, [batch]), random_like(problem.params)
    assert isinstance(ours, CompiledHessian) and norm(ours.gradient) == 0.0
    assert_close(ours @ vector, Hessian(problem, [batch]) @ vector, 1e-12)


@pytest.mark.parametrize("calls_before", [0, 1])
def test_a_loss_that_is_not_finite_ends_nothing(calls_before):
    """No warning of a mismatch; what is sound again is compiled."""
    problem, broken = _trained(ridge_problem(), TRAINING), (TRAINING[0], TRAINING[1] * float("nan"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(calls_before):
            curvature(problem, [TRAINING])
        for _ in range(2):
            found = curvature(problem, [broken])
            assert not torch.tensor(found.loss).isfinite()
        assert isinstance(curvature(problem, [TRAINING]), CompiledHessian)


def test_giving_up_draws_once():
    factor = [1.0]
    problem = ridge_problem(
        nn.Sequential(Linear(4), nn.Dropout(0.5)), extra=lambda model: factor[0] * model[0].weight.square().sum()
    )
    _trained(problem, TRAINING)
    curvature(problem, [TRAINING])
    factor[0] = 2.0
    torch.manual_seed(0)
    with pytest.warns(hi.HyperoptWarning, match="something has changed"):
        found = curvature(problem, [TRAINING])
    after = torch.get_rng_state()
    torch.manual_seed(0)
    expected, vector = Hessian(problem, [TRAINING]), random_like(problem.params)
    assert torch.equal(after, torch.get_rng_state())
    assert_close(found @ vector, expected @ vector, 0.0)


def test_looking_draws_nothing():
    """The comparison with autograd sees the masks that were drawn, and draws none of its own."""
    problem = ridge_problem(nn.Sequential(Linear(4), nn.Dropout(0.5)))
    _trained(problem, TRAINING)
    torch.manual_seed(0)
    for _ in range(3):
        assert isinstance(curvature(problem, [TRAINING]), CompiledHessian)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    for _ in range(3):
        Hessian(problem, [TRAINING])
    assert torch.equal(after, torch.get_rng_state())


def test_a_gradient_of_nearly_zero_is_no_mismatch():
    """At a minimum in float32 the gradient is made of rounding, in which two kernels need not agree."""
    problem = ridge_problem().copy(torch.float32)
    batch = tuple(x.float() for x in TRAINING)
    for _ in range(300):
        hi.inner_loop.train_step(problem, batch, problem.hyperparameters.values())
    kept = [curvature(problem, [batch]), curvature(problem, [batch])]
    ours, noise = kept[1], {name: 1e-6 * torch.ones_like(p) for name, p in problem.params.items()}
    assert isinstance(ours, CompiledHessian) and norm(ours.gradient) < 1e-5
    assert compiled._agree(ours, ours.loss, add(ours.gradient, noise), compiled._kept[problem].stiffness, None)
    assert not compiled._agree(ours, ours.loss * 1.001, ours.gradient, compiled._kept[problem].stiffness, None)


def test_batches_of_many_shapes(halves):
    problem = ridge_problem()
    for rows in (3, 4, 5, 3, 4):
        assert isinstance(curvature(problem, [regression_data(0, rows=rows)]), CompiledHessian)
    assert len(halves) == 6
    assert falls_back(problem, [regression_data(0, rows=6)]) == (
        "compile=True compiles for 3 kinds of batches at most (shapes, dtypes, numbers in the batch, modes of the "
        "model), and this is another; products are not compiled for it, nor for any other. Give batches of one shape, "
        "as a DataLoader does with drop_last=True, and numbers that vary as tensors."
    )
    assert isinstance(curvature(problem, [regression_data(0, rows=5)]), CompiledHessian)


def test_a_number_that_is_another_in_each_batch_warns_once(halves):
    problem = Net().problem()
    with pytest.warns(hi.HyperoptWarning) as caught:  # noqa: PT031  (nine calls, one warning)
        for floor in range(9):
            curvature(problem, [{**Net().batch(), "floor": float(floor)}])
    assert len(caught) == 1 and "numbers that vary as tensors" in str(caught[0].message)
    assert len(compiled._kept[problem].programs) == compiled.MOST_KINDS


def test_errors_of_the_loss_are_those_of_autograd():
    @hi.hyperparameter("decay", init=0.3, constraint=constraints.positive)
    def training_loss(model, batch, *, decay):
        raise KeyError("mine")

    problem = hi.BilevelProblem(
        Linear(4), training_loss, lambda m, b: m(b[0]).square().mean(), optimizer=lambda p: torch.optim.SGD(p, 0.1)
    )
    with pytest.raises(KeyError, match="mine"):
        curvature(problem, [TRAINING])


def test_the_log_says_when_it_pays(caplog):
    with caplog.at_level(logging.INFO, logger="hyperopt_implicit.compiled"):
        curvature(ridge_problem(), [TRAINING])
    assert "a product takes 1 ms instead of 2 ms, which pays after" in caplog.text


# ---------------------------------------------------------------------------------------------------- torch's compiler


def single(problem: hi.BilevelProblem, batch: Any) -> tuple[hi.BilevelProblem, Any]:
    """In float32."""
    return problem.copy(torch.float32), tuple(x.float() if x.is_floating_point() else x for x in batch)


@pytest.mark.usefixtures("by_compiler")
def test_one_model_compiled():
    """The smallest there is; others are in the long version."""
    problem, batch = single(ridge_problem(), TRAINING)
    ours, vector = curvature(problem, [batch]), random_like(problem.params)
    assert isinstance(ours, CompiledHessian)
    assert_close(ours @ vector, Hessian(problem, [batch]) @ vector, 1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("by_compiler")
def test_a_network_compiled():
    problem, batch = single(network_problem(seeded(_network)), TRAINING)
    assert_the_same(problem, [batch], 1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("by_compiler")
@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "BatchNorm2d, training", "Dropout, training", "LayerNorm", "GRU"])
def test_layers_compiled(kind):
    """To rounding, in float64 and float32, with eager torch's own masks."""
    problem, batch = kinds_of_layers.problem(kind, "cross entropy"), kinds_of_layers.batch(1)
    assert_the_same(problem, [batch], 1e-10)
    problem, batch = single(problem, batch)
    assert_the_same(problem, [batch], 1e-5 if "Norm" in kind or kind == "GRU" else 2e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("by_compiler")
@pytest.mark.skipif(not has_bfloat16(torch.device("cpu")), reason="this processor has no bfloat16")
def test_compiled_in_bfloat16(monkeypatch):
    monkeypatch.setattr(low_precision, "product_seconds", lambda problem, batch, kind: (2e-3, 1e-3))
    problem, batch = single(kinds_of_layers.problem("Linear", "cross entropy"), kinds_of_layers.batch(1))
    results = {}
    for name, options in {
        "full": {},
        "low": {"precision": "bfloat16", "compile": True, "refinements": 0},
        "refined": {"precision": "bfloat16", "compile": True, "refinements": 3},
    }.items():
        backend = hi.get_backend("cg", damping=10.0, tolerance=1e-5, max_iterations=100, **options)
        results[name] = backend.hypergradient(problem, [batch], batch, {}).gradients
    assert relative(results["low"], results["full"]) < 5e-2
    assert relative(results["refined"], results["full"]) < 1e-4


@pytest.mark.skipif(not has_bfloat16(torch.device("cpu")), reason="this processor has no bfloat16")
def test_traced_in_bfloat16(monkeypatch):
    """The same numbers as autograd under autocast, and corrected by autograd in float32."""
    monkeypatch.setattr(low_precision, "product_seconds", lambda problem, batch, kind: (2e-3, 1e-3))
    problem, batch = single(kinds_of_layers.problem("Linear", "cross entropy"), kinds_of_layers.batch(1))
    low = curvature(problem, [batch], precision="bfloat16")
    vector = random_like(problem.params)
    assert_close(low @ vector, Hessian(problem, [batch], torch.bfloat16) @ vector, 1e-6)
    assert isinstance(low._low, CompiledHessian) and type(low._make(None)) is Hessian


def test_unflattened_vectors_are_as_the_model_has_them():
    """A guard of the tests' own: vectors must come in the order of the parameters."""
    problem, batches = PROBLEMS["network"]()
    flat = torch.arange(sum(p.numel() for p in problem.params.values()), dtype=torch.float64)
    vector = unflatten(flat, problem.params)
    assert_close(curvature(problem, batches) @ vector, Hessian(problem, batches) @ vector, 1e-10)


def test_no_warning_where_nothing_is_wrong():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curvature(*PROBLEMS["network as hyperparameter"]())
