"""Loss combiners: from the losses of several tasks, sample by sample or pixel by pixel, to one training loss.

A combiner is an ``nn.Module`` and so a hyperparameter like any other: declared with ``@hyperparameter``, it is trained
by the hypergradient of the main task's held-out loss. Here are what all of them have, and the weighted sum; those that
are networks are in ``network_combiners.py``, and what makes one monotone in ``monotone.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperopt_implicit.auxiliary.context import Context
from hyperopt_implicit.auxiliary.monotone import Monotone, check_monotone, clamp_, inverse_softplus, normalise_
from hyperopt_implicit.errors import AuxiliaryError
from hyperopt_implicit.problem import evaluating


class LossCombiner(nn.Module, ABC):
    """A function from the losses of all tasks to one training loss, with parameters that are hyperparameters.

    A subclass combines the losses of each sample in :meth:`per_sample`; the combined loss is the mean over the batch.

    Args:
        tasks: how many tasks, the main one included.
        main_task: the place of the main task among them.
        context: what a sample's losses are combined by, beside the losses themselves.

    Raises:
        AuxiliaryError: an argument cannot hold; when called, losses do not have the shape that is asked for.
    """

    dimensions = 2
    """Of the losses: 2 for ``[batch, tasks]``, 4 for ``[batch, tasks, height, width]``."""

    def __init__(self, tasks: int, *, main_task: int = 0, context: Context | None = None) -> None:
        super().__init__()
        if isinstance(tasks, bool) or not isinstance(tasks, int) or tasks < 2:
            raise AuxiliaryError(
                f"a combiner needs the main task and at least one auxiliary task; got tasks={tasks!r}."
            )
        if isinstance(main_task, bool) or not isinstance(main_task, int) or not 0 <= main_task < tasks:
            raise AuxiliaryError(
                f"main_task must be the place of the main task among {tasks}, from 0 to {tasks - 1}; got {main_task!r}."
            )
        self.tasks = tasks
        self.main_task = main_task
        self.context = context

    @abstractmethod
    def per_sample(self, losses: Tensor, context: Tensor | None) -> Tensor:
        """The combined loss of each sample, ``[batch]``."""

    def forward(self, losses: Tensor, *, inputs: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """The combined loss, a scalar: the mean of :meth:`per_sample` over the batch.

        Args:
            losses: not reduced over the batch: ``[batch, tasks]``, or ``[batch, tasks, height, width]``. Tasks that
                have samples of their own are given as one row of means, ``[1, tasks]``.
            inputs: of the model, where the combiner is conditioned on them.
            labels: the main task's, where it is conditioned on them.
        """
        self._check(losses)
        context = None if self.context is None else self.context(inputs, labels).to(losses.dtype)
        if context is not None and len(context) != len(losses):
            raise AuxiliaryError(
                f"losses and context must have one row for each sample; got {len(losses)} rows of losses and "
                f"{len(context)} of inputs and labels."
            )
        return self.per_sample(losses, context).mean()

    def effective_weights(
        self, losses: Tensor, *, inputs: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """∂(combined loss)/∂(mean loss of each task), ``[tasks]``: the weights themselves, where the loss is a sum.

        It is how the combined loss reacts when a task's loss rises by the same amount in all samples (and pixels).
        Computed in eval mode; arguments are those of :meth:`forward`, without their graph.
        """
        with torch.enable_grad(), evaluating(self):
            leaf = losses.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self(leaf, inputs=inputs, labels=labels), leaf)
        return gradient.transpose(0, 1).flatten(1).sum(dim=1)

    def _check(self, losses: Tensor) -> None:
        wanted = "[batch, tasks]" if self.dimensions == 2 else "[batch, tasks, height, width]"
        name = type(self).__name__.removeprefix("Parametrized")  # torch renames a module that is parametrised
        rule = f"{name} takes losses of shape {wanted} with {self.tasks} tasks"
        if not isinstance(losses, Tensor):
            raise AuxiliaryError(f"{rule}; got {type(losses).__name__}. Stack them: torch.stack(losses, dim=1).")
        found = tuple(losses.shape)
        if losses.dim() == self.dimensions and found[1] == self.tasks:
            if found[0] == 0:
                raise AuxiliaryError(f"{rule}; got {found}, a batch without samples, which has no mean.")
            return
        if losses.dim() < self.dimensions:
            remedy = (
                "They are already reduced: compute them with reduction='none' and stack them along dimension 1, or "
                "give one row of means, losses[None]."
            )
        elif losses.dim() > self.dimensions:
            remedy = "Reduce each task's loss to that shape first, for instance by its mean over what is too much."
        else:
            remedy = "Give it one column for each task"
            remedy += f", or make it with tasks={found[1]}." if found[1] > 1 else "."
        raise AuxiliaryError(f"{rule}; got {found}. {remedy}")

    def project_(self) -> None:
        """Put the parameters back where they are allowed, which only ``monotone="clamp"`` needs.

        ``optimize`` and ``HyperOptimizer`` call it after each outer step; with ``MetaOptimizer``, call it yourself.
        """

    def extra_repr(self) -> str:
        return f"tasks={self.tasks}, main_task={self.main_task}"


class LinearCombiner(LossCombiner):
    """A weighted sum: ℓ_main + Σᵢ wᵢ ℓᵢ over the auxiliary tasks, or Σᵢ wᵢ ℓᵢ over all with ``learn_main``.

    With a context c, each sample has weights of its own: what is trained is shifted by a linear function of c, zero at
    the start.

    Args:
        tasks: how many tasks, the main one included.
        main_task: the place of the main task among them.
        monotone: True for positive weights, the softplus of what is trained; ``"clamp"`` for weights that outer steps
            clamp at zero; False for weights of any sign.
        softmax: weights of all tasks that sum to their number (the main one's is learned as well); monotone by itself.
        weight_norm: train length and direction of the weights apart (Salimans & Kingma, NeurIPS 2016).
        init: the weights at the start: a number, or one for each task that has a learned weight, in their order.
        learn_main: whether the main task's weight is learned too; otherwise it is 1, which costs nothing where the
            common scale of all weights does not matter.
        context: see :class:`Context`.

    References:
        Navon et al., "Auxiliary Learning by Implicit Differentiation", ICLR 2021, section 4.1.

    Example:
        >>> import torch
        >>> from hyperopt_implicit.auxiliary import LinearCombiner
        >>> combiner = LinearCombiner(3, init=0.5)
        >>> combiner(torch.tensor([[1.0, 2.0, 4.0]])).item()
        4.0
        >>> combiner.task_weights()
        tensor([1.0000, 0.5000, 0.5000], grad_fn=<...>)
    """

    def __init__(
        self,
        tasks: int,
        *,
        main_task: int = 0,
        monotone: Monotone = True,
        softmax: bool = False,
        weight_norm: bool = False,
        init: float | Sequence[float] | Tensor = 1.0,
        learn_main: bool = False,
        context: Context | None = None,
    ) -> None:
        super().__init__(tasks, main_task=main_task, context=context)
        check_monotone(monotone)
        if softmax and (monotone is not True or weight_norm):
            raise AuxiliaryError(
                "softmax weights are positive and normalised by themselves; leave monotone=True and weight_norm=False."
            )
        if context is not None and monotone == "clamp":
            raise AuxiliaryError(
                "weights that depend on a context cannot be clamped, since they are not parameters; use monotone=True."
            )
        self.monotone = monotone
        self.softmax = softmax
        self.learn_main = learn_main or softmax
        self.weight = nn.Parameter(self._raw(self._start(init)))
        if weight_norm:
            normalise_(self, dim=None)  # one length for all of them
        self.shift = None if context is None else nn.Linear(context.size, len(self.weight), bias=False)
        if self.shift is not None:
            nn.init.zeros_(self.shift.weight)

    def _start(self, init: float | Sequence[float] | Tensor) -> Tensor:
        learned = self.tasks if self.learn_main else self.tasks - 1
        start = torch.as_tensor(init, dtype=torch.get_default_dtype()).detach().clone()
        start = start.expand(learned).clone() if start.dim() == 0 else start
        if start.shape != (learned,):
            raise AuxiliaryError(
                f"init must be one number, or {learned}, one for each learned weight; got shape {tuple(start.shape)}."
            )
        allowed = start > 0 if self.monotone is True else start >= 0 if self.monotone else torch.isfinite(start)
        if not bool(allowed.all()) or not bool(torch.isfinite(start).all()):
            rule = {True: "positive", "clamp": "at least 0", False: "finite"}[self.monotone]
            raise AuxiliaryError(f"the weights must be {rule} at the start; got init={start.tolist()}.")
        return start

    def _raw(self, start: Tensor) -> Tensor:
        if self.softmax:
            return torch.log(start)
        return inverse_softplus(start) if self.monotone is True else start

    def task_weights(self, context: Tensor | None = None) -> Tensor:
        """The weight of each task, ``[tasks]``; with a context ``[batch, size]``, ``[batch, tasks]``."""
        raw = self.weight
        if self.shift is not None and context is not None:
            raw = raw + self.shift(context)
        if self.softmax:
            return self.tasks * torch.softmax(raw, dim=-1)
        weights = F.softplus(raw) if self.monotone is True else raw
        if self.learn_main:
            return weights
        before, after = weights.tensor_split([self.main_task], dim=-1)
        return torch.cat([before, torch.ones_like(weights[..., :1]), after], dim=-1)

    def per_sample(self, losses: Tensor, context: Tensor | None) -> Tensor:
        return (losses * self.task_weights(context)).sum(dim=1)

    @torch.no_grad()
    def project_(self) -> None:
        if self.monotone == "clamp":
            clamp_(self)
