"""One step of an outer optimizer by a hypergradient, guarded: clipped, reported where it failed, undone where it harms.

How the hypergradient was computed is not known here; ``hyper_optimizer.py`` and the drop-in for AuxiLearn's users both
move hyperparameters through this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, get_args

import torch

from hyperopt_implicit.argument_checks import is_number, shown
from hyperopt_implicit.backend import Hypergradient, Status
from hyperopt_implicit.errors import HypergradientError, HyperoptError
from hyperopt_implicit.messages import warn
from hyperopt_implicit.vectors import Params, norm

OnFailure = Literal["warn", "raise", "skip"]


class GuardedStep:
    """Moves hyperparameters by hypergradients, as a policy for failed ones allows.

    Args:
        optimizer: the outer optimizer, over the hyperparameters' tensors.
        clip: the largest norm of the hypergradient over all hyperparameters; longer ones are scaled down to it.
        on_failure: what to do with a hypergradient whose status is a failure; see ``HyperOptimizer``.
        is_inside: whether the hyperparameters are where they may be; a step after which they are not is undone.

    Raises:
        HyperoptError: an option has no such value.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        clip: float | None,
        on_failure: OnFailure,
        is_inside: Callable[[], bool],
    ) -> None:
        check_policy(clip, on_failure)
        self.optimizer = optimizer
        self.clip = clip
        self.on_failure = on_failure
        self._is_inside = is_inside
        self._warned: set[str] = set()

    def apply(self, result: Hypergradient, hparams: Params, size: float | None = None) -> bool:
        """One step; says whether the hyperparameters moved.

        Args:
            result: the hypergradient.
            hparams: the hyperparameters' tensors, named as the gradients are.
            size: the norm of the hypergradient, from a caller who has computed it.

        Raises:
            HypergradientError: it failed, and ``on_failure="raise"``.
        """
        scale = self.scale_of(result, norm(result.gradients) if size is None else size)
        if scale is None:
            return False
        before = [p.detach().clone() for p in hparams.values()]
        for name, p in hparams.items():
            p.grad = result.gradients[name].detach() * scale
        self.optimizer.step()
        for p in hparams.values():
            p.grad = None
        if self._is_inside():
            return True
        with torch.no_grad():
            for p, old in zip(hparams.values(), before, strict=True):
                p.copy_(old)
        self.complain_of_step()
        return False

    def scale_of(self, result: Hypergradient, size: float) -> float | None:
        """By what to multiply a hypergradient before it is applied; None where it is not to be, as was then reported.

        Raises:
            HypergradientError: it failed, and ``on_failure="raise"``.
        """
        usable = result.status.usable and math.isfinite(size)
        if result.status.usable and not usable:
            result = replace(result, status=Status.NON_FINITE)  # whatever the backend says of it
        if result.status.failed:
            self._report(result)
        if not usable or (result.status.failed and self.on_failure == "skip"):
            return None
        return 1.0 if self.clip is None else min(1.0, self.clip / max(size, torch.finfo(torch.float64).tiny))

    def complain_of_step(self) -> None:
        """Report a step after which the hyperparameters were put back.

        Raises:
            HypergradientError: ``on_failure="raise"``.
        """
        self._complain(
            "outer step",
            "the outer step moved a hyperparameter out of the numbers, or onto the edge of its constraint. Lower "
            "the outer learning rate, or set clip.",
            "It was put back",
        )

    def _report(self, result: Hypergradient) -> None:
        residual = (
            ""
            if result.residual is None or math.isnan(result.residual)
            else f" (relative residual {result.residual:.2g})"
        )
        used = self.on_failure == "warn" and result.status.usable
        self._complain(
            result.status,
            f"hypergradient: {result.status.value} after {result.iterations} iterations{residual}. "
            f"{result.status.remedy}",
            "It was used" if used else "It was not applied",
        )

    def _complain(self, kind: str, text: str, done: str) -> None:
        """Raise, or warn once for each kind."""
        if self.on_failure == "raise":
            raise HypergradientError(text)
        if kind not in self._warned:
            self._warned.add(kind)
            warn(f"{text} {done}; the next ones of this kind are only counted.")


def honest(result: Hypergradient) -> Hypergradient:
    """The same, as a failure where a loss is not finite: the derivative of a constant NaN is a finite zero."""
    if not result.status.usable or (math.isfinite(result.validation_loss) and math.isfinite(result.training_loss)):
        return result
    return replace(result, status=Status.NON_FINITE)


def check_policy(clip: float | None, on_failure: OnFailure) -> None:
    """Refuse a policy that does not exist and a norm that is none."""
    if not isinstance(on_failure, str) or on_failure not in get_args(OnFailure):
        raise HyperoptError(f"on_failure must be 'warn', 'raise' or 'skip'; got {on_failure!r}.")
    if clip is not None and not (is_number(clip) and clip > 0):
        raise HyperoptError(f"clip must be a positive norm, or None for no clipping; got {shown(clip)}.")
