"""Memory that runs out while a hypergradient is computed: told from other errors, and survived with fewer batches.

Only the hypergradient is tried again. An inner step that does not fit into memory is the user's own, and its error goes
through; what becomes of a hypergradient that does not fit at all is decided in ``guarded_step.py``.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hyperopt_implicit.backend import Backend, Hypergradient, State, Status
from hyperopt_implicit.distributed import several
from hyperopt_implicit.messages import warn

if TYPE_CHECKING:
    from hyperopt_implicit.problem import BilevelProblem

# only on CUDA has this a type of its own; elsewhere torch raises a plain RuntimeError
_SAID = ("DefaultCPUAllocator", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device.

    Example:
        >>> import torch
        >>> from hyperopt_implicit.out_of_memory import is_out_of_memory
        >>> try:
        ...     torch.empty(10**15)
        ... except RuntimeError as error:
        ...     is_out_of_memory(error)
        True
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(each in str(error) for each in _SAID)


class FittingBatches:
    """As many training batches for a hypergradient as fit into memory, found by running out of it.

    Attributes:
        most: how many are taken at most; None as long as there was room for all.
    """

    def __init__(self) -> None:
        self.most: int | None = None

    def hypergradient(
        self,
        backend: Backend,
        problem: BilevelProblem,
        training_batches: Sequence[Any],
        validation_batch: Any,
        state: State,
    ) -> Hypergradient:
        """What the backend gives for the first of the batches that fit: half of them, a quarter, at least one.

        Through training, fewer batches would be another computation: there it is all or nothing, as it is for one
        batch. Where nothing fits, the result has the status ``out of memory`` and NaN for a gradient. In one of several
        processes, what torch says goes through.

        Warns:
            HyperoptWarning: fewer batches are taken than before.
        """
        if several():  # the others are in the midst of theirs, and wait: only the end of this process sets them free
            return backend.hypergradient(problem, training_batches, validation_batch, state)
        averages = backend.differentiates == "solution"
        batches = training_batches[: self.most] if averages else training_batches
        asked = len(batches)
        while True:
            found = _attempt(lambda: backend.hypergradient(problem, batches, validation_batch, state))  # noqa: B023
            if found is not None:
                break
            _release(problem.device)
            if not averages or len(batches) == 1:
                return _nothing(problem)
            batches = batches[: len(batches) // 2]
        if len(batches) < asked:
            self.most = len(batches)
            warn(
                f"the training batches of a hypergradient must fit into memory at once; {asked} did not, and "
                f"{len(batches)} did. So many are taken from now on: the Hessian is averaged over fewer samples, and "
                f"is noisier. Pass hessian_batches={len(batches)}, or smaller batches, to have it so from the start."
            )
        return found


def _attempt(call: Callable[[], Hypergradient]) -> Hypergradient | None:
    """What a call gives; None where memory ran out. The error is gone by then, and with it what its frames held."""
    try:
        return call()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None


def _release(device: torch.device) -> None:
    gc.collect()  # graphs in cycles with the frames that have failed
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _nothing(problem: BilevelProblem) -> Hypergradient:
    return Hypergradient(
        gradients={name: torch.full_like(p.detach(), math.nan) for name, p in problem.hparams.items()},
        status=Status.OUT_OF_MEMORY,
        iterations=0,
        residual=None,
        hvps=0,
        validation_loss=math.nan,
        training_loss=math.nan,
    )
