"""Micro-batches: one batch in several parts, so that no more of it need be in memory at a time than a part.

What is said here is which parts a batch has, and how parts are taken from data. That a loss is averaged over them is in
``problem.py``, and that a training step holds the graph of one of them at a time, in ``inner_loop.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils import _pytree as pytree

from hyperopt_implicit.errors import DataError

if TYPE_CHECKING:
    from hyperopt_implicit.data import BatchStream


class MicroBatches(tuple[Any, ...]):
    """Several batches that stand for one: a loss of it is the mean of the losses of its parts, each counting alike.

    The losses are called with the parts, one after another, and never see the whole. For a loss that is a mean over
    rows, and parts of the same number of rows, that is the loss of one batch with all the rows. What is not a mean over
    rows sees a part only: batch normalisation in training mode takes the statistics of each part.

    It can be handed over wherever a batch can, a validation batch included. One step of training on it is one step of
    the optimizer and needs memory for the graph of one part; so do the backends that take first derivatives only.
    Whatever differentiates twice holds the graphs of all parts at once.

    Args:
        batches: the parts, at least one; of micro-batches among them, their own parts.

    Raises:
        DataError: there is none, or a single tensor was given.

    Example:
        >>> import torch, hyperopt_implicit as hi
        >>> @hi.hyperparameter("decay", init=1.0)
        ... def training_loss(model, batch, *, decay):
        ...     return (model(batch) - 1).square().mean() + decay * model.weight.square().sum()
        >>> model = torch.nn.Linear(1, 1)
        >>> problem = hi.BilevelProblem(model, training_loss, lambda model, batch: model(batch).square().mean(),
        ...                             optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
        >>> x = torch.randn(8, 1)
        >>> whole, parts = problem.training_loss(x), problem.training_loss(hi.MicroBatches(x.split(2)))
        >>> torch.testing.assert_close(parts, whole)
    """

    def __new__(cls, batches: Iterable[Any]) -> MicroBatches:
        if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
            raise DataError(
                f"MicroBatches takes a list of batches; got a single {type(batches).__name__}. Pass the parts, such as "
                "MicroBatches(x.split(32)) or MicroBatches([first, second])."
            )
        parts = [part for batch in batches for part in (batch if isinstance(batch, MicroBatches) else (batch,))]
        if not parts:
            raise DataError("MicroBatches must hold at least one batch; it is empty.")
        return super().__new__(cls, parts)

    def __repr__(self) -> str:
        return f"MicroBatches({list(self)!r})"


pytree.register_pytree_node(  # so that a batch of any nesting is moved, compared and traced with its parts
    MicroBatches, lambda batch: (list(batch), None), lambda parts, _: MicroBatches(parts)
)


def parts_of(batch: Any) -> Sequence[Any]:
    """The parts of a batch, of which one that is whole is the only one."""
    return batch if isinstance(batch, MicroBatches) else (batch,)


def all_parts(batches: Sequence[Any]) -> list[Any]:
    """The parts of several batches, in a row."""
    return [part for batch in batches for part in parts_of(batch)]


def take(stream: BatchStream, count: int, accumulate: int) -> list[Any]:
    """So many batches of a stream, each of ``accumulate`` consecutive ones."""
    if accumulate == 1:
        return stream.take(count)
    return [MicroBatches(stream.take(accumulate)) for _ in range(count)]
