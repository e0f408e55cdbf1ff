"""Optimizers and modules that torch's own ``state_dict`` does not bring back to the bit are resumed all the same."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hyperopt_implicit as hi
from hyperopt_implicit.carried import brought_back

from .resumable import difference, outcome
from .stopped_runs import StoppedError, assert_resumes, network, problem, run, stop

pytestmark = pytest.mark.filterwarnings("ignore:hypergradient:hyperopt_implicit.HyperoptWarning")


class Master(torch.optim.Optimizer):
    """Keeps weights in twice the precision of those of the model."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                master = self.state[p].setdefault("master", p.double().clone())
                p.copy_(master.sub_(0.05 * p.grad.double()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "optimizer",
    [
        functools.partial(torch.optim.NAdam, lr=0.01),
        functools.partial(torch.optim.ASGD, lr=0.05, t0=1, lambd=0.1, alpha=0.6),
        Master,
    ],
    ids=["NAdam", "ASGD", "master weights"],
)
def test_what_an_optimizer_keeps_in_another_precision(optimizer: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    """Torch converts it to the type of the parameter as it loads it."""
    assert_resumes(lambda: problem(lambda: network().to(dtype), optimizer), tmp_path)


def test_outer_optimizer_that_keeps_another_precision(tmp_path: Path) -> None:
    assert_resumes(problem, tmp_path, outer_optimizer=lambda tensors: Master(tensors))


class Averaging(nn.Module):
    """Adds a running mean of what it sees, which is not there before it has seen anything."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(3, 1), kind
        if kind == "none":
            self.register_buffer("seen", None)
        elif kind != "late":
            self.register_buffer("seen", torch.zeros(1), persistent=kind == "grows")

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "seen"):
            self.register_buffer("seen", torch.zeros(1))
        if self.training and torch.is_grad_enabled():
            new = x.detach().mean().reshape(1)
            grown = self.kind.startswith("grows") and len(self.seen) < 50
            self.seen = new if self.seen is None else torch.cat([self.seen, new]) if grown else self.seen + 0.1 * new
        return self.layer(x) + (0.0 if self.seen is None else self.seen.mean())


@pytest.mark.parametrize("kind", ["none", "late", "grows", "grows, not saved"])
def test_buffers_that_come_and_grow_as_the_model_runs(kind: str, tmp_path: Path) -> None:
    assert_resumes(lambda: problem(lambda: Averaging(kind)), tmp_path)


class Versioned(nn.Linear):
    """Converts states of its first version, which had the other sign."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        if metadata.get("version", 1) < 2:
            state[f"{prefix}weight"] = -state[f"{prefix}weight"]
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_modules_are_told_their_version(tmp_path: Path) -> None:
    assert_resumes(lambda: problem(lambda: Versioned(3, 1)), tmp_path)


class Small(nn.Sequential):
    """Leaves a layer out of its state, as those do that save adapters only."""

    def state_dict(self, *args: Any, **options: Any) -> Any:
        state = super().state_dict(*args, **options)
        del state["0.weight"]
        return state

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict(state, strict=False)


def test_parameters_that_a_model_does_not_save(tmp_path: Path) -> None:
    assert_resumes(lambda: problem(lambda: Small(nn.Linear(3, 4), nn.Linear(4, 1))), tmp_path)
    weights = [run(lambda: problem(lambda: Small(nn.Linear(3, 4), nn.Linear(4, 1))), each) for each in (None, tmp_path)]
    assert torch.equal(*(each.problem.params["0.weight"] for each in weights))


class Counting(nn.Module):
    """A hyperparameter that counts its calls, and does not save how many there were."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.calls += 1
        return self.layer(x) * (1 + 0.01 * self.calls)


def test_buffers_that_a_hyperparameter_does_not_save(tmp_path: Path) -> None:
    @hi.hyperparameter("net", init=lambda model: Counting())
    def loss(model: nn.Module, batch: Any, *, net: nn.Module) -> Tensor:
        x, y = batch
        errors = (model(x) - y).square()
        return net(errors).mean().square() + 0.1 * errors.mean()

    def plain(result: hi.Result) -> dict[str, Any]:
        found = outcome(result)
        return found | {each: dict(found[each]["net"].named_parameters()) for each in ("hyperparameters", "best")}

    def make() -> hi.BilevelProblem:
        return problem(loss=loss)

    whole = plain(run(make, None, backend="cg"))
    with pytest.raises(StoppedError):
        run(make, tmp_path, backend="cg", callbacks=[stop])
    assert difference(whole, plain(run(make, tmp_path, backend="cg"))) is None


def test_what_a_backend_carries_goes_to_the_device_of_the_model() -> None:
    """A file is read into the processor's memory, and what is on another device than the model is dropped."""
    params = {name: p.to("meta") for name, p in network().named_parameters()}
    made: Any = SimpleNamespace(params=params, hparams={"decay": torch.zeros((), device="meta")})
    state = {"warm": {name: torch.ones(p.shape) for name, p in params.items()}, "of": {"decay": torch.ones(())}}
    found = brought_back({**state, "calls": 3, "memory": {"alpha": torch.zeros(2)}}, made)
    assert {x.device.type for each in ("warm", "of") for x in found[each].values()} == {"meta"}
    assert found["memory"]["alpha"].device.type == "cpu"
    assert found["calls"] == 3
