"""A loss over the shares of a batch, each in a process of its own, that can be differentiated like one on the whole.

Two functions are enough. ``replicated`` is the identity on tensors that are the same in all processes, and
``mean_of_shares`` the mean over processes of what differs. Each is the other's derivative:

    L(w) = M(ℓ_r(P(w))),    P: forward the identity, backward the mean;    M: forward the mean, backward the identity

The derivative of M with respect to ℓ_r is 1/N, and that of P with respect to w the sum over processes; the factor and
the sum are both left to P, so that what comes back through M is the same everywhere and nothing has to be sent for it.
As each is defined by the other, derivatives of every order in reverse mode are those of the mean loss, and whoever
takes them need not know of it. A row of tensors (all of w, or all of λ) is one node and one message.

Processes must come to the same messages in the same order even where their shares use other parts of a model. A term
that is zero ties each loss to both rows, in every derivative; and each message says which of its tensors this process
has, so that one that no share depends on is missing in all of them, as it would be for the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from hyperopt_implicit.distributed import Kind, kind_of, mean, mean_row
from hyperopt_implicit.vectors import Params


def replicated(*rows: Params) -> tuple[list[Params], list[Tensor]]:
    """P of each row, and what :func:`mean_of_shares` needs to know of it.

    Tensors that do not require grad pass as they are.
    """
    found: list[Params] = []
    ties: list[Tensor] = []
    for row in rows:
        through = [name for name, x in row.items() if x.requires_grad]
        if not through or not torch.is_grad_enabled():
            found.append(row)
            continue
        *passed, tie = cast(Any, _Replicated).apply(True, *(row[name] for name in through))
        found.append({**row, **dict(zip(through, passed, strict=True))})
        ties.append(tie)
    return found, ties


def tied(loss: Tensor, ties: Sequence[Tensor]) -> Tensor:
    """A loss whose derivatives of every order lead to all rows, by a term that is zero with all its derivatives.

    It differs from :func:`mean_of_shares` in its value, which is that of the share.
    """
    if not ties or not loss.is_floating_point():
        return loss
    return loss + (torch.stack([tie.to(loss) for tie in ties]).sum().exp() * 0.0)


def mean_of_shares(loss: Tensor, ties: Sequence[Tensor]) -> Tensor:
    """M of a loss, the same in all processes."""
    return cast(Tensor, cast(Any, _MeanLoss).apply(tied(loss, ties)))


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, with_tie: bool, *row: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.kinds, ctx.with_tie = [kind_of(x) for x in row], with_tie
        passed = tuple(x.view_as(x) for x in row)
        return (*passed, torch.zeros((), device=row[0].device)) if with_tie else passed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        count = len(ctx.kinds)
        tie = gradients[count] if ctx.with_tie else None
        return (None, *cast(Any, _Averaged).apply(ctx.kinds, tie, *gradients[:count]))


class _Averaged(torch.autograd.Function):
    """M of a row of gradients; ``tie`` only makes it depend on what ties the loss."""

    @staticmethod
    def forward(ctx: Any, kinds: Sequence[Kind], tie: Tensor | None, *row: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.tie = None if tie is None else kind_of(tie)
        return tuple(mean_row(row, kinds))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        _, of_tie, *needed = ctx.needs_input_grad
        tie = None
        if of_tie:
            shape, dtype, device = ctx.tie
            tie = torch.zeros(shape, dtype=dtype, device=device)
        return (None, tie, *_pass([x if each else None for x, each in zip(cotangents, needed, strict=True)]))


class _MeanLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return mean(loss)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor | None:
        return _pass([cotangent])[0]


def _pass(cotangents: list[Tensor | None]) -> list[Tensor | None]:
    """P of cotangents, which are the same in all processes."""
    places = [i for i, x in enumerate(cotangents) if x is not None and x.requires_grad]
    if not places or not torch.is_grad_enabled():
        return cotangents
    found = list(cotangents)
    for i, x in zip(places, cast(Any, _Replicated).apply(False, *(cotangents[i] for i in places)), strict=True):
        found[i] = x
    return found
