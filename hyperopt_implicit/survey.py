"""What a problem is like, as far as it decides on a method: measured in the course of one hypergradient.

Which method follows from it is decided by the backend ``auto``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hyperopt_implicit.backend import State
from hyperopt_implicit.data import number_of_batches
from hyperopt_implicit.operators import gradients, mean_training_loss
from hyperopt_implicit.randomness import random_states
from hyperopt_implicit.vectors import Params

if TYPE_CHECKING:
    from hyperopt_implicit.problem import BilevelProblem

Result = TypeVar("Result")

_SAMPLED = 64  # entries of a tensor by which batches are told apart


@dataclass(frozen=True)
class Costs:
    """What the parts of a hypergradient cost, in g: one forward and backward of the training loss.

    Attributes:
        seconds: of one g.
        validation: the gradient of F.
        graph: the training gradient with its graph.
        product: one Hessian-vector product.
        mixed: the mixed derivative, where it has a backward of its own.
    """

    seconds: float
    validation: float
    graph: float
    product: float
    mixed: float

    def of(self, products: int, *, shared: bool) -> float:
        """One hypergradient, the mixed derivative with the last product or after it."""
        return self.validation + self.graph + products * self.product + (0.0 if shared else self.mixed)

    def state(self) -> State:
        """As numbers to be carried."""
        return asdict(self)


class Clock:
    """Seconds that calls took, the work that they gave to a device included."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds = 0.0

    def __call__(self, call: Callable[[], Result]) -> Result:
        """Call, and keep the time it took."""
        started = self._now()
        result = call()
        self.seconds = max(self._now() - started, 1e-9)
        return result

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return time.perf_counter()
        return time.process_time()  # on shared cores, wall-clock time measures the neighbours


def time_gradient(
    problem: BilevelProblem, batches: Sequence[Any], clock: Clock, repeats: int = 2
) -> tuple[float, bool]:
    """The seconds of one g, the fastest of a few, and whether the training loss drew random numbers."""
    params = {name: p.detach().requires_grad_() for name, p in problem.params.items()}
    hparams = {name: p.detach() for name, p in problem.hparams.items()}

    def gradient() -> Params:
        with torch.enable_grad():
            return gradients(mean_training_loss(problem, params, hparams, batches), params, create_graph=False)

    before = random_states(problem.device)
    clock(gradient)
    drew = any(not torch.equal(x, y) for x, y in zip(before, random_states(problem.device), strict=True))
    times = [clock.seconds]
    for _ in range(repeats - 1):
        clock(gradient)
        times.append(clock.seconds)
    return min(times), drew


def has_more_batches(problem: BilevelProblem, training_batches: Sequence[Any]) -> bool:
    """Whether the problem's data holds more than the batches of one hypergradient; False where it has no data."""
    for data, given in ((problem.training_data, len(training_batches)), (problem.validation_data, 1)):
        if data is not None and (number_of_batches(data) or math.inf) > given:
            return True
    return False


def fingerprint(batches: Any) -> list[float]:
    """A few numbers that tell batches apart: of each tensor its size, and a weighted sum of some of its entries."""
    found: list[float] = []
    sums: list[Tensor] = []
    for leaf in pytree.tree_leaves(batches):
        if isinstance(leaf, Tensor):
            flat = leaf.detach().reshape(-1)
            flat = flat[:: max(len(flat) // _SAMPLED, 1)].double()
            weights = torch.arange(1, len(flat) + 1, dtype=torch.float64, device=flat.device).sqrt()
            sums.append(torch.dot(flat, weights))
            found.append(float(leaf.numel()))
        elif isinstance(leaf, int | float):
            found.append(float(leaf))
    return found + (torch.stack(sums).tolist() if sums else [])
