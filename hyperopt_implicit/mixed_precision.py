"""Training steps in mixed precision: under torch's autocast, and with float16 on a loss that is scaled.

Weights stay in float32. A scaled loss keeps small derivatives from vanishing in float16, and its gradient is scaled
back before the optimizer sees it; where it is too large for float16 the step is left out and the scale lowered, and
after a row of good steps it is raised. On the real model torch's ``GradScaler`` does that. In a differentiated training
step the scale is a part of the iterate and follows the same rule, and nothing that comes out of it is scaled.

Products of a solver in low precision are another matter, in ``low_precision.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hyperopt_implicit.errors import HyperoptError, ProblemError
from hyperopt_implicit.messages import first_line

if TYPE_CHECKING:
    from hyperopt_implicit.problem import BilevelProblem

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""By the name under which they are asked for."""

_HALF = frozenset(DTYPES.values())
_STEPS_BACK = (0, 8, 16, 24)  # powers of two by which a product that overflows is tried smaller


class InnerPrecision:
    """How the training loss of inner steps is computed, and what is carried from step to step for it.

    Args:
        dtype: to which autocast lowers it; None for the model's own, in which case nothing here does anything.
        device: the type of the device.
    """

    def __init__(self, dtype: torch.dtype | None = None, device: str = "cpu") -> None:
        self._dtype, self._device = dtype, device
        self.scaler = torch.amp.GradScaler(device) if dtype is torch.float16 else None

    def loss(self, evaluate: Callable[[], Tensor]) -> Tensor:
        """The loss under autocast; in float32 where it would be in half precision."""
        if self._dtype is None:
            return evaluate()
        with self.autocast():
            loss = evaluate()
        return loss.float() if loss.dtype in _HALF else loss

    def autocast(self) -> AbstractContextManager[Any]:
        """In which the forward pass runs."""
        return nullcontext() if self._dtype is None else torch.autocast(self._device, self._dtype)

    # -------------------------------------------------------------------------------------------- on the real model

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss that is to be differentiated."""
        return loss if self.scaler is None else self.scaler.scale(loss)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's step from gradients of the scaled loss; left out where they are not finite."""
        if self.scaler is None or all(p.grad is None for group in optimizer.param_groups for p in group["params"]):
            optimizer.step()
            return
        self.scaler.step(optimizer)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """The scale, and how many good steps there were at it; empty where nothing is scaled."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave; that of another precision is left aside."""
        if self.scaler is not None and state:
            self.scaler.load_state_dict(dict(state))

    # ----------------------------------------------------------------------------------- in a step that is a function

    def scaling(self) -> Tensor | None:
        """The scale and the count of good steps, as an iterate carries them; None where nothing is scaled."""
        if self.scaler is None:
            return None
        state = self.scaler.state_dict()
        return torch.tensor([state["scale"], state["_growth_tracker"]], dtype=torch.float64)

    def after(self, scaling: Tensor, *, good: bool) -> Tensor:
        """What ``GradScaler.update`` makes of it, after a step whose gradients were finite or were not."""
        assert self.scaler is not None
        scale, count = scaling.tolist()
        if not good:
            return torch.tensor([scale * self.scaler.get_backoff_factor(), 0.0], dtype=torch.float64)
        count += 1.0
        if count == self.scaler.get_growth_interval():
            grown = scale * self.scaler.get_growth_factor()
            scale, count = (grown if grown <= torch.finfo(torch.float32).max else scale), 0.0
        return torch.tensor([scale, count], dtype=torch.float64)

    def keep(self, scaling: Tensor | None) -> None:
        """Go on from where an iterate has arrived."""
        if self.scaler is not None and scaling is not None:
            scale, count = scaling.tolist()
            self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": scale, "_growth_tracker": int(count)})


FULL = InnerPrecision()
"""The model's own precision."""


def inner_precision(name: str | None, problem: BilevelProblem) -> InnerPrecision:
    """What an option asks for, on a problem.

    Raises:
        HyperoptError: there is no such precision, or it is of no use to the model or on its device.
    """
    if name is None:
        return FULL
    if not isinstance(name, str) or name not in DTYPES:
        raise HyperoptError(
            f"inner_precision must be 'bfloat16', 'float16', or None for the model's own; got {name!r}."
        )
    dtypes = {p.dtype for p in problem.params.values()}
    if torch.float32 not in dtypes:
        found = ", ".join(sorted(str(each) for each in dtypes))
        raise HyperoptError(
            f"inner_precision={name!r} lowers the inner steps of a float32 model by autocast, which leaves other types "
            f"as they are; the trained parameters are in {found}. Train in float32, or leave the option out."
        )
    if name == "float16" and dtypes & _HALF:
        raise HyperoptError(
            "inner_precision='float16' scales gradients of float32 parameters; some of the trained parameters are in "
            f"{', '.join(sorted(str(each) for each in dtypes & _HALF))}. Convert the model with .float(): autocast "
            "lowers what it computes."
        )
    device = problem.device.type
    if not torch.amp.is_autocast_available(device) or (
        device == "cuda" and name == "bfloat16" and not torch.cuda.is_bf16_supported()
    ):
        raise HyperoptError(
            f"inner_precision={name!r} needs a device on which torch has autocast for it; the model is on "
            f"{str(problem.device)!r}. Move it to another, or leave the option out."
        )
    return InnerPrecision(DTYPES[name], device)


@contextmanager
def training_in(problem: BilevelProblem, precision: InnerPrecision) -> Iterator[None]:
    """Inside, inner steps of the problem are in this precision."""
    before = problem.inner_precision
    problem.inner_precision = precision
    try:
        yield
    finally:
        problem.inner_precision = before


def check_autocast(problem: BilevelProblem, precision: InnerPrecision, batch: Any) -> None:
    """Try the training loss under autocast, with its gradient; nothing is changed.

    Raises:
        ProblemError: it runs in the model's own precision, but not there.
    """
    if precision is FULL:
        return
    devices = [problem.device] if problem.device.type == "cuda" else []
    params = {name: p.detach().requires_grad_() for name, p in problem.params.items()}
    hparams = {name: p.detach() for name, p in problem.hparams.items()}
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            loss = precision.loss(lambda: problem.functional_training_loss(params, hparams, batch))
            torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    except RuntimeError as error:
        raise ProblemError(
            "inner_precision runs the training loss under torch.autocast, and the loss must allow for results in half "
            f"precision; this one does not (torch says: {first_line(error)}). Convert with .float() or "
            ".to(other.dtype) where that happens, or leave the option out."
        ) from error


def scaled(x: Sequence[Tensor], factor: float) -> list[Tensor]:
    """Tensors times a number."""
    return list(x) if factor == 1.0 else [each * factor for each in x]


def linear(
    product: Callable[[float], Sequence[Tensor | None]], along: Sequence[Tensor], scaling: Tensor | None
) -> Sequence[Tensor | None]:
    """A product that is linear in the tensors ``along``, by way of a graph that was built in float16.

    The scale of the loss is in the graph and would come out again, from numbers too small for float16 in between.
    So the product is taken along tensors of size one, smaller where that is too large, and what comes out is scaled.

    Args:
        product: is given the factor by which ``along`` is to be multiplied; can be called again.
        along: gives the size.
        scaling: of the graph; None where nothing is scaled.
    """
    if scaling is None:
        return product(1.0)
    size = max((float(x.abs().max()) for x in along if x.numel()), default=0.0)
    if size == 0.0 or not math.isfinite(size):
        return product(1.0)
    found: Sequence[Tensor | None] = []
    for back in _STEPS_BACK:
        factor = 2.0 ** (round(math.log2(float(scaling[0]) / size)) - back)
        found = [None if x is None else x / factor for x in product(factor)]
        if all(bool(x.isfinite().all()) for x in found if x is not None):
            break
    return found
