"""One small file for each library that is compared: the same problem, put to it as its documentation says.

An adapter has ``implicit(setting)`` and ``unrolled(setting)``, which return :class:`Method` objects; either may be
missing. All of them look at the same live model and the same live hyperparameters, so that a loop may train them on.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import torch
from torch import Tensor, nn

import hyperopt_implicit as hi

LIBRARIES = {
    "higher": "higher",
    "hypergrad": "hypergrad",
    "boat": "boat-torch",
    "torchopt": "torchopt",
    "betty": "betty-ml",
}
"""The adapter's file, and the name under which the library is installed."""


@dataclass
class Setting:
    """A bilevel problem, in the form from which every adapter makes its own.

    Attributes:
        problem: the same as our backends take it.
        batches: the training and the validation batch.
        raw: λ, live and unconstrained, by name.
        losses: L and F on the live model.
        damping: δ; what is solved with is H + δI, for everybody.
        step_size: α of every Neumann series and fixed-point iteration.
        regulariser: ρ of every Nyström approximation, where δ is zero.
        learning_rate: of the plain SGD that unrolled methods differentiate through.
        steps: how many of its steps.
        counts: how many products the implicit methods may take.
    """

    problem: hi.BilevelProblem
    batches: tuple[object, object]
    raw: dict[str, Tensor]
    losses: Losses
    damping: float
    step_size: float
    learning_rate: float
    steps: int = 10
    regulariser: float = 1e-2
    counts: tuple[int, ...] = (5, 10)

    @property
    def params(self) -> list[Tensor]:
        """w, live."""
        return list(self.losses.parameters())

    def proximal(self, params: list[Tensor], at: list[Tensor]) -> Tensor | float:
        """½δ‖w − w₀‖², whose gradient at w₀ is zero and whose Hessian is δI: damping, for libraries without it."""
        if not self.damping:
            return 0.0
        return 0.5 * self.damping * sum((p - a).square().sum() for p, a in zip(params, at, strict=True))


class Losses(nn.Module):
    """L(w, λ) where λ is given, else F(w): a module, since most libraries take one."""

    def __init__(
        self,
        model: nn.Module,
        training: Callable[[nn.Module, dict[str, Tensor]], Tensor],
        validation: Callable[..., Tensor],
    ) -> None:
        super().__init__()
        self.model = model
        self.training_loss = training
        self.validation_loss = validation

    def forward(self, raw: dict[str, Tensor] | None = None) -> Tensor:
        return self.validation_loss(self.model) if raw is None else self.training_loss(self.model, raw)

    def at(self, params: dict[str, Tensor], raw: dict[str, Tensor] | None = None) -> Tensor:
        """The same at other weights, by functional call."""
        return torch.func.functional_call(self, params, (raw,))


@dataclass
class Method:
    """One way to a hypergradient.

    Attributes:
        library: whose.
        family: the kind of method, by which those of different libraries are paired.
        name: what it is called there, with its options.
        work: what it spends, in words.
        call: dF/dλ at the present weights, in the order of λ.
        carries: whether it carries something from call to call.
        spent: the products of each call so far, where they are not fixed.
    """

    library: str
    family: str
    name: str
    work: str
    call: Callable[[], list[Tensor]]
    carries: bool = False
    spent: list[int] = field(default_factory=list)


def installed() -> tuple[dict[str, ModuleType], dict[str, str]]:
    """The adapters of the libraries that can be imported, and for all others why not."""
    found, missing = {}, {}
    for name, distribution in LIBRARIES.items():
        try:
            found[name] = importlib.import_module(f"adapters.{name}")
        except ImportError as error:
            missing[distribution] = f"{type(error).__name__}: {error}"
    return found, missing


def versions() -> str:
    """The versions of those installed, in one line."""
    known = []
    for distribution in LIBRARIES.values():
        try:
            known.append(f"{distribution} {version(distribution)}")
        except PackageNotFoundError:
            continue
    return ", ".join(known)
