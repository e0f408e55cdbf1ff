"""``MetaOptimizer``: AuxiLearn's formula, the functional interface's numbers, and what training loops hand it."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hyperopt_implicit as hi
from hyperopt_implicit.auxiliary import LinearCombiner, MetaOptimizer
from hyperopt_implicit.backend import Status
from hyperopt_implicit.testing.oracles import dense_derivatives

from .two_tasks import TRAINING, VALIDATION, Setting

pytestmark = pytest.mark.usefixtures("float64")


def gradients_of(setting: Setting, **options: Any) -> list[Tensor]:
    found = setting.meta(**options).step(**setting.given(), return_grads=True)
    assert found is not None
    return found


def functional(setting: Setting, backend: Any) -> hi.Hypergradient:
    return hi.hypergradient(setting.problem, backend, training_batches=[TRAINING], validation_batch=VALIDATION)


def assert_equal(found: Iterable[Tensor], expected: Iterable[Tensor], relative: float) -> None:
    """Relative to the length of all of them together."""
    found, expected = (torch.cat([x.detach().flatten() for x in each]) for each in (found, expected))
    assert float((found - expected).norm() / expected.norm()) <= relative


# ---------------------------------------------------------------------------------------------------- the equations


def auxilearn(setting: Setting, alpha: float, iterations: int) -> tuple[list[Tensor], list[Tensor], float]:
    """Its series as it stands there, the direct term that it leaves out, and how much the last term of it has grown."""
    parameters, aux_params = list(setting.model.parameters()), list(setting.combiner.parameters())
    given = setting.given()
    direct = torch.autograd.grad(given["val_loss"], aux_params, retain_graph=True)
    p = v = torch.autograd.grad(given["val_loss"], parameters)
    dw = torch.autograd.grad(given["train_loss"], parameters, create_graph=True)
    before = sum(float(x.square().sum()) for x in v)
    for _ in range(iterations):
        product = torch.autograd.grad(dw, parameters, v, retain_graph=True)
        v = tuple(x - alpha * y for x, y in zip(v, product, strict=True))
        p = tuple(x + y for x, y in zip(p, v, strict=True))
    mixed = torch.autograd.grad(dw, aux_params, p)
    growth = math.sqrt(sum(float(x.square().sum()) for x in v) / before)
    return [-x for x in mixed], list(direct), growth


@pytest.mark.parametrize("iterations", [0, 1, 3, 10])
@pytest.mark.parametrize(("decay", "alpha"), [(1.0, 0.1), (1.0, 0.02), (0.0, 2.0)], ids=str)
def test_auxilearn_scaling_is_its_formula(decay: float, alpha: float, iterations: int) -> None:
    """Where the series grows on an indefinite Hessian, too."""
    setting = Setting(decay)
    expected, _, growth = auxilearn(setting, alpha, iterations)
    if decay == 0.0:
        hessian = dense_derivatives(setting.problem, [TRAINING]).hessian
        assert torch.linalg.eigvalsh(hessian)[0] < -1e-2
        assert iterations == 0 or growth > 1.5
    found = gradients_of(setting, auxilearn_scaling=True, hpo_lr=alpha, truncate_iter=iterations)
    assert_equal(found, expected, 1e-12)


@pytest.mark.parametrize("iterations", [0, 1, 3, 10])
@pytest.mark.parametrize("alpha", [0.1, 0.02])
def test_a_step_is_alpha_times_that_and_the_direct_term(alpha: float, iterations: int) -> None:
    setting = Setting()
    series, direct, growth = auxilearn(setting, alpha, iterations)
    assert growth <= 1.0
    found = gradients_of(setting, hpo_lr=alpha, truncate_iter=iterations)
    assert_equal(found, [alpha * x + y for x, y in zip(series, direct, strict=True)], 1e-12)


@pytest.mark.parametrize(
    ("options", "backend"),
    [
        ({"hpo_lr": 0.05, "truncate_iter": 4}, {"name": "neumann", "terms": 5, "step_size": 0.05}),
        ({"hpo_lr": 0.05, "truncate_iter": 0}, {"name": "neumann", "terms": 1, "step_size": 0.05}),
        *(({"backend": spec}, spec) for spec in ("neumann", "cg", "exact", {"name": "cg", "damping": 0.1})),
        ({"backend": hi.get_backend("exact", damping=0.2)}, {"name": "exact", "damping": 0.2}),
    ],
    ids=lambda spec: str(spec).removeprefix("{"),
)
def test_equals_the_functional_interface(options: dict[str, Any], backend: Any) -> None:
    setting = Setting()
    expected = functional(setting, backend)
    assert [tuple(g.shape) for g in expected.gradients.values()] == [p.shape for p in setting.combiner.parameters()]
    meta = setting.meta(**options)
    found = meta.step(**setting.given(), return_grads=True)
    assert_equal(found, expected.gradients.values(), 1e-10)
    assert meta.last.validation_loss == pytest.approx(expected.validation_loss, rel=1e-14)
    assert meta.last.training_loss == pytest.approx(expected.training_loss, rel=1e-14)
    if "backend" in options:
        assert (meta.last.status, meta.last.hvps) == (expected.status, expected.hvps)


def test_a_normalised_combiner_is_taken() -> None:
    """Only in the model is torch's weight_norm wrong: there it is differentiated twice."""
    setting = Setting(weight_norm=True)
    expected = functional(setting, "exact").gradients.values()
    assert_equal(gradients_of(setting, backend="exact"), expected, 1e-10)


@pytest.mark.parametrize("scaling", [False, True])
@pytest.mark.parametrize("iterations", [0, 1, 5])
def test_products_are_as_many_as_iterations(iterations: int, scaling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside one backward for F, one for ∂L/∂w, and one for the mixed derivative."""
    setting, calls, grad = Setting(), [], torch.autograd.grad
    meta = setting.meta(hpo_lr=0.05, truncate_iter=iterations, auxilearn_scaling=scaling)
    given = setting.given()
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or grad(*a, **k))
    meta.step(**given)
    assert len(calls) == iterations + 3
    assert meta.last.hvps == iterations
    assert (meta.last.status, meta.last.iterations) == (Status.TRUNCATED, iterations if scaling else iterations + 1)


# -------------------------------------------------------------------------------------------------- what a step does


def test_a_step_moves_by_the_gradient_and_touches_nothing_else() -> None:
    setting = Setting()
    setting.given()["train_loss"].backward()
    grads = {p: (p.grad, p.grad.clone()) for p in setting.model.parameters()}
    before = [p.detach().clone() for p in (*setting.model.parameters(), *setting.combiner.parameters())]
    found = gradients_of(setting, max_grad_norm=None)
    after = [*setting.model.parameters(), *setting.combiner.parameters()]
    for p, old, moved in zip(after, before, [*[0.0] * 4, *found], strict=True):
        assert torch.equal(p, old - moved)
    assert all(p.grad is grad and torch.equal(grad, copy) for p, (grad, copy) in grads.items())
    assert all(p.grad is None for p in setting.combiner.parameters())
    assert all(float(g.norm()) > 0.0 for g in found)
    assert setting.meta().step(**setting.given()) is None


@pytest.mark.parametrize("share", [0.1, 0.999, 1.001, None])
def test_clipping_is_torchs(share: float | None) -> None:
    setting = Setting()
    length = float(torch.cat([g.flatten() for g in gradients_of(setting, max_grad_norm=None)]).norm())
    setting = Setting()
    before = [p.detach().clone() for p in setting.combiner.parameters()]
    largest = None if share is None else share * length
    found = gradients_of(setting, max_grad_norm=largest)
    clipped = [nn.Parameter(torch.zeros_like(g)) for g in found]
    for p, g in zip(clipped, found, strict=True):
        p.grad = g.clone()
    assert float(torch.nn.utils.clip_grad_norm_(clipped, largest or math.inf)) == pytest.approx(length, rel=1e-12)
    moved = [old - p.detach() for old, p in zip(before, setting.combiner.parameters(), strict=True)]
    assert_equal(moved, [p.grad for p in clipped], 2e-6 / length)


def test_a_long_gradient_is_clipped_to_ten_by_default() -> None:
    setting = Setting()
    given = setting.given() | {"val_loss": 1e4 * setting.given()["val_loss"]}
    before = torch.cat([p.detach().flatten() for p in setting.combiner.parameters()])
    setting.meta().step(**given)
    after = torch.cat([p.detach().flatten() for p in setting.combiner.parameters()])
    assert float((after - before).norm()) == pytest.approx(10.0, rel=1e-9)


def test_unused_frozen_and_repeated_tensors() -> None:
    """On both sides; what is returned stands in the order of what was given."""
    setting, plain = Setting(), Setting()
    expected = gradients_of(plain)
    unused, frozen = nn.Parameter(torch.ones(3)), torch.ones(2)
    a, *rest = setting.combiner.parameters()
    aux_params = [unused, a, frozen, *rest, a]
    held = torch.optim.SGD([unused, *setting.combiner.parameters()], lr=1.0)
    given = setting.given()
    weights = [frozen, *given["parameters"]]
    parameters = iter([*weights, nn.Parameter(torch.ones(4)), *weights])
    found = MetaOptimizer(held).step(
        **given | {"parameters": parameters, "aux_params": iter(aux_params)}, return_grads=True
    )
    zero, first, of_frozen, *others, last = found
    assert (zero.tolist(), of_frozen.tolist()) == ([0.0] * 3, [0.0] * 2)
    assert_equal([first, *others], expected, 1e-14)
    assert torch.equal(first, last)
    assert unused.tolist() == [1.0] * 3
    assert_equal(setting.combiner.parameters(), plain.combiner.parameters(), 1e-14)


def test_loop_of_auxilearn_learns_which_task_harms() -> None:
    """The main task has little data; one auxiliary task has its weights, the other their negative."""
    generator = torch.Generator().manual_seed(0)
    x, x_val = (torch.randn(20, 8, generator=generator) for _ in range(2))
    truth = torch.randn(8, generator=generator)
    targets = (x @ truth)[:, None] * torch.tensor([1.0, 1.0, -1.0]) + torch.tensor([2.0, 0.1, 0.1]) * torch.randn(
        20, 3, generator=generator
    )
    model, auxiliary = nn.Linear(8, 1, bias=False), LinearCombiner(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    meta = MetaOptimizer(
        meta_optimizer=torch.optim.Adam(auxiliary.parameters(), lr=0.1), hpo_lr=0.1, truncate_iter=3, max_grad_norm=10
    )
    for step in range(200):
        optimizer.zero_grad()
        loss = auxiliary((model(x) - targets).square())
        loss.backward()
        optimizer.step()
        if step % 5 == 4:
            train_loss = auxiliary((model(x) - targets).square())
            val_loss = (model(x_val)[:, 0] - x_val @ truth).square().mean()
            meta.step(
                val_loss=val_loss,
                train_loss=train_loss,
                aux_params=auxiliary.parameters(),
                parameters=model.parameters(),
            )
            meta.zero_grad()
    _, helpful, harmful = auxiliary.task_weights().tolist()
    assert harmful < 0.5 < 1.0 < helpful


def test_zero_grad_clears_what_the_training_loss_left() -> None:
    setting = Setting()
    setting.given()["train_loss"].backward()
    assert all(p.grad is not None for p in setting.combiner.parameters())
    setting.meta().zero_grad()
    assert all(p.grad is None for p in setting.combiner.parameters())
    assert all(p.grad is not None for p in setting.model.parameters())


def test_warm_start_is_carried_and_saved() -> None:
    """At rest, the last solution is the answer and costs one product to see."""
    setting = Setting()
    options: dict[str, Any] = {"backend": {"name": "cg", "tolerance": 1e-6, "max_iterations": 100}}

    def adam(lr: float) -> MetaOptimizer:
        return MetaOptimizer(torch.optim.Adam(setting.combiner.parameters(), lr=lr), **options)

    meta = adam(0.0)
    meta.step(**setting.given())
    cold = meta.last.hvps
    meta.step(**setting.given())
    assert meta.last.hvps == 1 < cold
    file = io.BytesIO()
    torch.save(meta.state_dict(), file)
    file.seek(0)
    restored = adam(0.5)
    restored.load_state_dict(torch.load(file, weights_only=True))
    restored.step(**setting.given())
    assert restored.last.hvps == 1
    assert restored.base_optimizer.state_dict()["state"][0]["step"] == 3
    assert restored.base_optimizer.param_groups[0]["lr"] == 0.0


# ---------------------------------------------------------------------------------------------------------- failures


def shown(setting: Setting) -> list[list[float]]:
    return [p.detach().flatten().tolist() for p in (*setting.model.parameters(), *setting.combiner.parameters())]


@pytest.mark.parametrize("which", ["train_loss", "val_loss"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nothing_moves_by_what_is_not_finite(which: str, bad: float) -> None:
    setting = Setting()
    meta = setting.meta(backend="cg")
    before = shown(setting)
    with pytest.warns(hi.HyperoptWarning, match=r"^hypergradient: non-finite .*It was not applied; the next ones of"):
        meta.step(**(given := setting.given()) | {which: bad * given[which]})
    assert meta.last.status is Status.NON_FINITE
    meta.step(**(given := setting.given()) | {which: bad * given[which]})  # of this kind, one warning is enough
    assert shown(setting) == before
    assert all(p.grad is None for p in setting.combiner.parameters())
    meta.step(**setting.given())
    assert meta.last.status is Status.CONVERGED
    assert shown(setting) != before


@pytest.mark.parametrize("which", ["train_loss", "val_loss"])
def test_nothing_moves_by_a_loss_that_is_not_finite_itself(which: str) -> None:
    setting = Setting()
    before, given = shown(setting), setting.given()
    with pytest.raises(hi.HypergradientError):
        setting.meta(on_failure="raise").step(**given | {which: given[which] + math.nan})
    assert shown(setting) == before


@pytest.mark.parametrize(
    ("on_failure", "done"), [("warn", "It was used"), ("skip", "It was not applied"), ("raise", None)]
)
def test_policy_for_a_series_that_grows(on_failure: Any, done: str | None) -> None:
    setting = Setting()
    meta = setting.meta(hpo_lr=10.0, on_failure=on_failure)
    before = shown(setting)
    text = (
        "hypergradient: diverged after 0 iterations (relative residual 1). The iteration grew instead of shrinking, "
        "and the last sound iterate was returned. Use a smaller step size, or step_size='auto'."
    )
    if done is None:
        with pytest.raises(hi.HypergradientError) as caught:
            meta.step(**setting.given())
        assert str(caught.value) == text
    else:
        with pytest.warns(hi.HyperoptWarning) as warned:
            meta.step(**setting.given())
        (warning,) = warned
        assert str(warning.message) == f"{text} {done}; the next ones of this kind are only counted."
        assert warning.filename == __file__
    assert meta.last.status is Status.DIVERGED
    assert (shown(setting) != before) is (on_failure == "warn")
