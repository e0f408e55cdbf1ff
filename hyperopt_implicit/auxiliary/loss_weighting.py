"""Weighting methods that look at the tasks' losses alone.

The contract is in ``weighting.py``, and the methods that look at the tasks' gradients are in ``gradient_weighting.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from hyperopt_implicit.auxiliary.weighting import Weighting, torchjd_module
from hyperopt_implicit.errors import AuxiliaryError


class EqualWeights(Weighting):
    """Weight 1 for every task: the sum of the losses.

    Example:
        >>> import torch
        >>> EqualWeights(3).weights(torch.tensor([0.5, 2.0, 1.0]), None)
        tensor([1., 1., 1.])
    """

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        return torch.ones_like(losses)


class SingleTask(Weighting):
    """Weight 1 for the main task and 0 for all others: training without auxiliary tasks.

    Example:
        >>> import torch
        >>> SingleTask(3, main_task=1).weights(torch.tensor([0.5, 2.0, 1.0]), None)
        tensor([0., 1., 0.])
    """

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        weights = torch.zeros_like(losses)
        weights[self.main_task] = 1.0
        return weights


class FixedWeights(Weighting):
    """The weights given, at every step.

    Args:
        tasks: the number of losses.
        weights: one number for each.
        main_task: which loss is the main task's.

    Raises:
        AuxiliaryError: the weights are not one finite number per task.

    Example:
        >>> import torch
        >>> FixedWeights(2, weights=[1.0, 0.1]).weights(torch.tensor([0.5, 2.0]), None)
        tensor([1.0000, 0.1000])
    """

    def __init__(self, tasks: int, *, weights: Sequence[float] | Tensor, main_task: int = 0) -> None:
        super().__init__(tasks, main_task=main_task)
        fixed = torch.as_tensor(weights, dtype=torch.float64)
        if fixed.shape != (tasks,) or not bool(torch.isfinite(fixed).all()):
            raise AuxiliaryError(
                f"weights must be {tasks} finite numbers, one per task; got {fixed.tolist()}. Give 0 to leave one out."
            )
        self.fixed: list[float] = fixed.tolist()

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        return losses.new_tensor(self.fixed)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weights={self.fixed}"


class UncertaintyWeighting(Weighting):
    """Weights from a learned noise level per task: wᵢ = ½ exp(−sᵢ).

    The model and s minimise Σᵢ ½ exp(−sᵢ) Lᵢ + ½ sᵢ together, where sᵢ = log σᵢ² starts at 0; for losses that do not
    change, s ends at log Lᵢ and the weights at 1/(2Lᵢ). Kendall, Gal and Cipolla, "Multi-Task Learning Using
    Uncertainty to Weigh Losses for Scene Geometry and Semantics", CVPR 2018; the sum itself is
    ``torchjd.scalarization.UW``.

    Give ``parameters()`` to an optimizer: s is learned by its steps.

    Raises:
        AuxiliaryError: torchjd is not installed.

    Example:
        >>> import torch
        >>> weighting = UncertaintyWeighting(2)
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> weighting.backward(x.square(), [x])
        tensor([0.5000, 0.5000])
        >>> [p.grad for p in weighting.parameters()]            # ½ − ½ exp(−s) L, with L = (1, 4)
        [tensor([ 0.0000, -1.5000])]
    """

    def __init__(self, tasks: int, *, main_task: int = 0) -> None:
        super().__init__(tasks, main_task=main_task)
        self.scalarizer: nn.Module = torchjd_module("scalarization", "uncertainty").UW(tasks)

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        return _slopes(self.scalarizer, losses)

    def objective(self, losses: Tensor, gramian: Tensor | None) -> Tensor | None:
        return cast(Tensor, self.scalarizer(losses))


class DynamicWeightAverage(Weighting):
    """More weight for the tasks whose losses have fallen least over the last two epochs.

    w = tasks · softmax(r / T), where rᵢ is the loss averaged over the last epoch divided by that of the epoch before.
    The weights are 1 until two epochs are over. Liu, Johns and Davison, "End-to-End Multi-Task Learning with
    Attention", CVPR 2019; the weights themselves are ``torchjd.scalarization.DWA``'s.

    Call :meth:`end_epoch` after each epoch; without it the weights stay at 1.

    Args:
        tasks: the number of losses.
        temperature: T > 0; the higher, the more equal the weights.
        main_task: which loss is the main task's.

    Raises:
        AuxiliaryError: the temperature is not positive, or torchjd is not installed.

    Example:
        >>> import torch
        >>> weighting = DynamicWeightAverage(2, temperature=1.0)
        >>> for losses in (torch.tensor([4.0, 4.0]), torch.tensor([1.0, 4.0])):
        ...     _ = weighting.weights(losses, None)
        ...     weighting.end_epoch()
        >>> weighting.weights(losses, None)                     # 2 · softmax(¼, 1)
        tensor([0.6416, 1.3584])
    """

    def __init__(self, tasks: int, *, temperature: float = 2.0, main_task: int = 0) -> None:
        super().__init__(tasks, main_task=main_task)
        if not (temperature > 0 and math.isfinite(temperature)):
            raise AuxiliaryError(f"temperature must be a positive number; got {temperature}. The paper uses 2.0.")
        self.temperature = float(temperature)
        self._scalarizer: type[nn.Module] = torchjd_module("scalarization", "dwa").DWA
        self._averages: list[Tensor] = []
        self._epoch: list[Tensor] = []
        self._steps = 0

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        losses = losses.detach()
        self._epoch = [self._epoch[0].to(losses) + losses] if self._epoch else [losses.clone()]
        self._steps += 1
        # made afresh: its history is private to it, and ours can be saved
        scalarizer: Any = self._scalarizer(temperature=self.temperature)
        for average in self._averages:
            scalarizer(average.to(losses))
            scalarizer.step()
        return _slopes(scalarizer, losses)

    def end_epoch(self) -> None:
        """Take the average over the epoch; an epoch without a step is none."""
        if self._steps:
            average = self._epoch[0] / self._steps
            floor = math.sqrt(torch.finfo(average.dtype).tiny)  # a loss of zero must not make a ratio of 0/0
            average = torch.where(average.abs() < floor, floor, average)
            self._averages = [*self._averages, average][-2:]
            self._epoch, self._steps = [], 0

    def get_extra_state(self) -> dict[str, Any]:
        return {"averages": list(self._averages), "epoch": list(self._epoch), "steps": self._steps}

    def set_extra_state(self, state: Any) -> None:
        self._averages, self._epoch = list(state["averages"]), list(state["epoch"])
        self._steps = int(state["steps"])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, temperature={self.temperature}"


def _slopes(scalarizer: nn.Module, losses: Tensor) -> Tensor:
    """∂S/∂Lᵢ of a scalar S of the losses: the weights that it gives them."""
    with torch.enable_grad():
        leaf = losses.detach().requires_grad_()
        (slopes,) = torch.autograd.grad(scalarizer(leaf), leaf)
    return slopes
