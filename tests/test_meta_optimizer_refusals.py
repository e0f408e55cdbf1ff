"""What ``MetaOptimizer`` refuses, in the words that a person sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import hyperopt_implicit as hi
from hyperopt_implicit.auxiliary import MetaOptimizer

from .cases import INSTALLED
from .two_tasks import TRAINING, Setting

pytestmark = pytest.mark.usefixtures("float64")


def stepped(**changes: Any) -> Callable[[], Any]:
    """A step that is sound but for what is changed; callables are given the setting."""

    def action() -> None:
        setting = Setting()
        made = {name: value(setting) if callable(value) else value for name, value in changes.items()}
        setting.meta().step(**setting.given() | made)

    return action


def step_of(model: nn.Module, training: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
    """A step of a model of one's own, with a training loss of what it gives."""

    def action() -> None:
        weights = nn.Parameter(torch.ones(1))
        given = {"parameters": model.parameters(), "aux_params": [weights]}
        result = model(torch.randn(3, 2))
        MetaOptimizer(torch.optim.SGD([weights], lr=1.0)).step(weights * training(result), result.sum(), **given)

    return action


def made(**options: Any) -> Callable[[], Any]:
    return lambda: Setting().meta(**options)


class HalfNormalised(nn.Module):
    """A weight norm whose length and direction are computed from parameters, and are none themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.length = nn.Parameter(torch.ones(2, 1, dtype=torch.float64))
        self.direction = nn.Parameter(torch.eye(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch._weight_norm(self.direction * 1.5, self.length * 1.0, 0)


A_LIST = "must hold at least one tensor that requires grad; got"
A_GENERATOR = "A generator is empty once it was read: call .parameters() anew for each step."
TWICE = "the training loss is differentiated twice, and"
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "training loss without a graph": (
        stepped(train_loss=torch.tensor(1.0)),
        hi.AuxiliaryError,
        "train_loss must come with its graph; it has none. Compute it without torch.no_grad(), .detach() and .item().",
    ),
    "validation loss as a number": (
        stepped(val_loss=0.5),
        hi.AuxiliaryError,
        "val_loss must be a scalar tensor; got float. Take its mean or its sum.",
    ),
    "losses of each sample": (
        stepped(val_loss=lambda s: (s.model(TRAINING[0]) - TRAINING[1]).square()),
        hi.AuxiliaryError,
        "val_loss must be a scalar tensor; got shape (12, 2). Take its mean or its sum.",
    ),
    "no parameters": (stepped(parameters=[]), hi.AuxiliaryError, f"parameters {A_LIST} nothing. {A_GENERATOR}"),
    "generator that was read": (
        stepped(aux_params=lambda s: [list(g := s.combiner.parameters()), g][1]),
        hi.AuxiliaryError,
        f"aux_params {A_LIST} nothing. {A_GENERATOR}",
    ),
    "frozen parameters": (
        stepped(parameters=[torch.ones(2), torch.ones(1)]),
        hi.AuxiliaryError,
        f"parameters {A_LIST} 2 tensors, none of which requires grad. {A_GENERATOR}",
    ),
    "one tensor on both sides": (
        stepped(parameters=lambda s: [*s.model.parameters(), s.combiner.last.parametrizations.weight.original]),
        hi.AuxiliaryError,
        "a tensor is either a parameter of the model or an auxiliary one; number 4 of parameters, of shape (1, 3), is "
        "number 2 of aux_params too. Leave it out of one of them.",
    ),
    "tensors of another optimizer": (
        stepped(aux_params=lambda s: [*s.combiner.parameters(), nn.Parameter(torch.ones(2))]),
        hi.AuxiliaryError,
        "aux_params must be among the tensors that the base optimizer holds; 1 of 4 (the first of shape (2,)) are not, "
        "and would never move. Make the base optimizer from the same parameters.",
    ),
    "no second derivative": (
        step_of(nn.Linear(2, 2, dtype=torch.float64), lambda y: torch.cdist(y, y + 1.0).mean()),
        hi.SecondDerivativeError,
        f"{TWICE} an operator behind it has no second derivative (torch says: the derivative for '_cdist_backward' is "
        "not implemented.). Replace it by an equivalent that has one; fused attention has one under "
        "torch.nn.attention.sdpa_kernel(SDPBackend.MATH).",
    ),
    "weight norm in the model": (
        step_of(weight_norm(nn.Linear(2, 2, dtype=torch.float64)), lambda y: y.square().mean()),
        hi.SecondDerivativeError,
        f"{TWICE} torch's second derivative of weight_norm is wrong. Write the normalised weight as g * v / v.norm() "
        "in the model, or use HyperOptimizer, which does so.",
    ),
    "unrolled": (
        made(backend="unrolled"),
        hi.BackendError,
        "MetaOptimizer is given losses that were computed already, and Unrolled must train the model itself: use an "
        "implicit backend, or HyperOptimizer.",
    ),
    "unknown backend": (
        made(backend="neuman"),
        hi.BackendError,
        f"there is no backend 'neuman'; installed are {INSTALLED}. Did you mean 'neumann'?",
    ),
    "scaling of another backend": (
        made(backend="cg", auxilearn_scaling=True),
        hi.AuxiliaryError,
        "auxilearn_scaling reproduces AuxiLearn's own series, and a backend replaces it; choose one of the two.",
    ),
    "negative iterations": (
        made(truncate_iter=-1),
        hi.AuxiliaryError,
        "truncate_iter must be a whole number of at least 0; got -1.",
    ),
    "no step size": (made(hpo_lr=0), hi.AuxiliaryError, "hpo_lr must be a positive number; got 0."),
    "step size in words": (made(hpo_lr="a"), hi.AuxiliaryError, "hpo_lr must be a positive number; got 'a'."),
    "clipping to nothing": (
        made(max_grad_norm=0),
        hi.AuxiliaryError,
        "max_grad_norm must be a positive norm, or None for no clipping; got 0.",
    ),
    "optimizer under two names": (
        lambda: Setting().meta(meta_optimizer=torch.optim.SGD([torch.ones(1)], lr=1.0)),
        hi.AuxiliaryError,
        "meta_optimizer is AuxiLearn's name for base_optimizer; give one of the two.",
    ),
    "graph that was used up": (
        stepped(train_loss=lambda s: [loss := s.given()["train_loss"], loss.backward()][0]),
        hi.AuxiliaryError,
        "both losses must come with graphs that were not used up; one was, by .backward() or torch.autograd.grad. "
        "Compute the losses anew for the outer step.",
    ),
    "weight norm of a part that was computed": (
        step_of(HalfNormalised(), lambda y: y.square().mean()),
        hi.SecondDerivativeError,
        f"{TWICE} torch's second derivative of weight_norm is wrong. Write the normalised weight as g * v / v.norm() "
        "in the model, or use HyperOptimizer, which does so.",
    ),
    "model that is too large for the dense solve": (
        lambda: (s := Setting()).meta(backend={"name": "exact", "max_parameters": 2}).step(**s.given()),
        hi.BackendError,
        "backend 'exact' forms a dense Hessian and takes models of up to max_parameters=2 parameters; this one has 22. "
        "Use 'cg', or raise max_parameters if 22² numbers fit in memory.",
    ),
    "no optimizer": (
        lambda: MetaOptimizer(),
        hi.AuxiliaryError,
        "MetaOptimizer needs the torch.optim optimizer of the auxiliary parameters; got NoneType.",
    ),
}


@pytest.mark.parametrize(("action", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(action: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        action()
    assert type(caught.value) is error
    assert str(caught.value) == message
