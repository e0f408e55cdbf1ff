"""The outer step in a loop of one's own: the same numbers as ``optimize``, and state that can be saved."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints

import hyperopt_implicit as hi
from hyperopt_implicit.vectors import Params

from .ridge import TRAINING, VALIDATION, Batch, ridge, training_loss, validation_loss

BACKENDS: list[Any] = ["cg", "exact", {"name": "neumann", "terms": 3}]
HALVES = [(TRAINING[0][:8], TRAINING[1][:8]), (TRAINING[0][8:], TRAINING[1][8:])]


def momentum_ridge() -> hi.BilevelProblem:
    return ridge(
        training_data=HALVES, optimizer=lambda params: torch.optim.SGD(params, lr=0.2, momentum=0.9, weight_decay=0.01)
    )


def own_loop(problem: hi.BilevelProblem, outer: hi.HyperOptimizer, steps: int) -> None:
    """Three inner steps and an outer one, over the two halves in turn, as ``optimize`` goes through them."""
    for _ in range(steps):
        for inner in range(3):
            problem.training_loss(HALVES[inner % 2]).backward()
            problem.optimizer.step()
            problem.optimizer.zero_grad()
        outer.step(HALVES[1], VALIDATION)


@pytest.mark.filterwarnings("ignore:training_data is a list")
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_own_loop_equals_optimize(backend: Any) -> None:
    problem = momentum_ridge()
    own_loop(problem, hi.HyperOptimizer(problem, torch.optim.Adam, lr=0.05, backend=backend, clip=0.1), steps=6)
    result = hi.optimize(
        momentum_ridge(), backend, outer_steps=6, inner_steps=3, outer_lr=0.05, clip=0.1, tracking=False
    )
    torch.testing.assert_close(problem.hyperparameters()["decay"], result.hyperparameters["decay"], rtol=1e-13, atol=0)
    torch.testing.assert_close(problem.model.weight, result.problem.model.weight, rtol=1e-13, atol=0)


def test_own_loop_through_training_equals_optimize() -> None:
    problem = momentum_ridge()
    outer = hi.HyperOptimizer(problem, torch.optim.Adam, lr=0.05, backend="unrolled")
    for first in (0, 1, 0, 1):
        batches = [HALVES[first], HALVES[1 - first], HALVES[first]]
        looked_ahead_with = problem.hyperparameters.values()
        outer.step_through(batches, VALIDATION)
        for batch in batches:
            problem.training_loss(batch, looked_ahead_with).backward()
            problem.optimizer.step()
            problem.optimizer.zero_grad()
    result = hi.optimize(momentum_ridge(), "unrolled", outer_steps=4, inner_steps=3, outer_lr=0.05, tracking=False)
    torch.testing.assert_close(problem.hyperparameters()["decay"], result.hyperparameters["decay"], rtol=1e-12, atol=0)
    torch.testing.assert_close(problem.model.weight, result.problem.model.weight, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", [*BACKENDS, "unrolled"], ids=str)
def test_outer_step_leaves_the_model_and_its_optimizer_alone(backend: Any) -> None:
    problem = momentum_ridge()
    outer = hi.HyperOptimizer(problem, backend=backend)
    own_loop(problem, outer, steps=1)
    before, grads = problem.inner_state(), problem.model.weight.grad
    report = outer.step(TRAINING, VALIDATION)
    after = problem.inner_state()
    assert torch.equal(after.params["weight"], before.params["weight"])
    assert torch.equal(after.optimizer["weight"]["momentum_buffer"], before.optimizer["weight"]["momentum_buffer"])
    assert problem.model.weight.grad is grads
    assert all(p.grad is None for p in problem.hparams.values())
    assert report.validation_loss > 0


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_state_dict_continues_to_the_bit(backend: Any) -> None:
    def make() -> tuple[hi.BilevelProblem, hi.HyperOptimizer]:
        problem = momentum_ridge()
        return problem, hi.HyperOptimizer(problem, torch.optim.Adam, lr=0.05, backend=backend)

    straight, outer = make()
    own_loop(straight, outer, steps=6)

    first, outer = make()
    own_loop(first, outer, steps=3)
    file = io.BytesIO()
    torch.save(
        {"outer": outer.state_dict(), "model": first.model.state_dict(), "inner": first.optimizer.state_dict()}, file
    )
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    second, outer = make()
    second.model.load_state_dict(saved["model"])
    second.optimizer.load_state_dict(saved["inner"])
    outer.load_state_dict(saved["outer"])
    own_loop(second, outer, steps=3)
    assert torch.equal(second.hparams["decay"], straight.hparams["decay"])
    assert torch.equal(second.model.weight, straight.model.weight)


def test_loading_writes_the_inner_optimizers_options() -> None:
    tuned = hi.hyperparameter("lr", init=0.1, constraint=constraints.positive, target="optimizer")(training_loss)
    source, target = ridge(training_loss=tuned), ridge(training_loss=tuned)
    outer = hi.HyperOptimizer(source, torch.optim.SGD, lr=1.0, backend="unrolled")
    outer.step_through([TRAINING] * 3, VALIDATION)
    hi.HyperOptimizer(target, torch.optim.SGD, lr=1.0, backend="unrolled").load_state_dict(outer.state_dict())
    lr = source.hyperparameters()["lr"].item()
    assert lr != pytest.approx(0.1)
    assert target.optimizer.param_groups[0]["lr"] == pytest.approx(lr)


# ---------------------------------------------------------------------------------------------------------- batches


def nested(batch: Batch) -> Any:
    x, y = batch
    return {"inputs": (x, [x[:, :1]]), "targets": {"y": y, "name": "ridge"}}


@pytest.mark.parametrize("backend", ["cg", "unrolled"])
def test_batches_may_be_nested(backend: str) -> None:
    @hi.hyperparameter("decay", init=1.0, constraint=constraints.positive)
    def nested_training(model: nn.Module, batch: Any, *, decay: Tensor) -> Tensor:
        return training_loss(model, (batch["inputs"][0], batch["targets"]["y"]), decay=decay)

    def nested_validation(model: nn.Module, batch: Any) -> Tensor:
        assert batch["targets"]["name"] == "ridge"
        return validation_loss(model, (batch["inputs"][0], batch["targets"]["y"]))

    problem = ridge(
        training_loss=nested_training,
        validation_loss=nested_validation,
        training_data=[nested(TRAINING)],
        validation_data=[nested(VALIDATION)],
    )
    options: dict[str, Any] = {"outer_steps": 3, "inner_steps": 3, "tracking": False}
    flat = hi.optimize(ridge(), backend, **options)
    assert hi.optimize(problem, backend, **options).hyperparameters == flat.hyperparameters


def test_one_gradient_alone_changes_nothing() -> None:
    problem = momentum_ridge()
    before: Params = {name: p.clone() for name, p in problem.hparams.items()}
    found = hi.hypergradient(problem, "cg", training_batches=HALVES, validation_batch=VALIDATION)
    again = hi.hypergradient(problem, "cg", training_batches=iter(HALVES), validation_batch=VALIDATION)
    assert torch.equal(found.gradients["decay"], again.gradients["decay"])
    assert torch.equal(problem.hparams["decay"], before["decay"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_hypergradient_that_is_not_finite_is_not_applied_whatever_its_status(bad: float) -> None:
    problem = momentum_ridge()
    outer, before = hi.HyperOptimizer(problem, torch.optim.SGD, lr=0.1), problem.hparams["decay"].detach().clone()
    gradient = {"decay": torch.full_like(before, bad)}
    with pytest.warns(hi.HyperoptWarning, match="It was not applied"):
        moved = outer.apply(hi.Hypergradient(gradient, hi.Status.TRUNCATED, 1, None, 1, 1.0, 1.0))
    assert not moved
    assert torch.equal(problem.hparams["decay"], before)
