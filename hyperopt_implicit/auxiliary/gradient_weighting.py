"""Weighting methods that look at the tasks' gradients, through the inner products between them.

The contract is in ``weighting.py``, and the methods that look at the losses alone are in ``loss_weighting.py``.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from hyperopt_implicit.auxiliary.weighting import Weighting, torchjd_module
from hyperopt_implicit.errors import AuxiliaryError


class GradientCosine(Weighting):
    """An auxiliary task counts as far as its gradient points where the main task's does.

    With cᵢ = cos(g_main, gᵢ), the weight is max(0, cᵢ), or, unweighted, 1 where cᵢ ≥ 0 and 0 elsewhere; the main
    task's is 1. A gradient of zero has cosine 0 with all others. Du et al., "Adapting Auxiliary Losses Using Gradient
    Similarity", arXiv:1812.02224, 2018.

    Args:
        tasks: the number of losses.
        weighted: whether the cosine is the weight, or only its sign decides.
        main_task: which loss is the main task's.

    Example:
        >>> import torch
        >>> x = torch.zeros(2, requires_grad=True)
        >>> losses = torch.stack([x[0], x[0] + x[1], -x[0]])     # gradients (1, 0), (1, 1) and (−1, 0)
        >>> GradientCosine(3).backward(losses, [x])
        tensor([1.0000, 0.7071, 0.0000])
    """

    needs_gradients: ClassVar[bool] = True

    def __init__(self, tasks: int, *, weighted: bool = True, main_task: int = 0) -> None:
        super().__init__(tasks, main_task=main_task)
        self.weighted = bool(weighted)

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        gramian = _given(gramian)
        products = gramian[self.main_task]
        if self.weighted:
            norms = _norms(gramian)
            scale = norms[self.main_task] * norms
            weights = torch.where(scale > 0, products / scale, 0.0).clamp(0.0, 1.0)
        else:
            weights = (products >= 0).to(gramian)
        weights[self.main_task] = 1.0
        return weights

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weighted={self.weighted}"


class GradNorm(Weighting):
    """Learned weights under which all tasks train at a similar rate.

    The weights w minimise Σᵢ | wᵢ‖gᵢ‖ − Ḡ rᵢ^α |, in which the target is held constant: Ḡ is the mean of wᵢ‖gᵢ‖, and rᵢ
    is Lᵢ/Lᵢ(0) divided by its mean over tasks, where L(0) are the first losses seen. Before each step w is scaled so
    that the weights sum to the number of tasks; one that a step has made negative is put back to 0. Chen et al.,
    "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks", ICML 2018.

    Give ``parameters()`` to an optimizer: w is learned by its steps. The paper takes gradients on the last layer that
    all tasks share; pass it as ``shared``.

    Args:
        tasks: the number of losses, all positive at the first step and never negative.
        alpha: α ≥ 0, how strongly tasks that lag behind are pulled.
        main_task: which loss is the main task's.

    Raises:
        AuxiliaryError: alpha is negative.

    Example:
        >>> import torch
        >>> weighting = GradNorm(2)
        >>> x = torch.ones(1, requires_grad=True)
        >>> weighting.backward(torch.cat([x, 3.0 * x]), [x])     # norms 1 and 3, so Ḡ = 2
        tensor([1., 1.])
        >>> weighting.task_weights.grad
        tensor([-1.,  3.])
    """

    needs_gradients: ClassVar[bool] = True

    def __init__(self, tasks: int, *, alpha: float = 1.5, main_task: int = 0) -> None:
        super().__init__(tasks, main_task=main_task)
        if not (alpha >= 0 and math.isfinite(alpha)):
            raise AuxiliaryError(f"alpha must be a number of at least 0; got {alpha}. The paper's value is 1.5.")
        self.alpha = float(alpha)
        self.task_weights = nn.Parameter(torch.ones(tasks))
        self._first: list[Tensor] = []

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        losses = losses.detach()
        if not self._first:
            if not bool(((losses > 0) & torch.isfinite(losses)).all()):
                raise AuxiliaryError(
                    "gradnorm measures progress relative to the first losses, which must be positive and finite; got "
                    f"{losses.tolist()}. Leave out a task that is solved at the start, or use another weighting."
                )
            self._first = [losses.clone()]
        elif bool((losses < 0).any()):
            raise AuxiliaryError(
                f"gradnorm measures progress by ratios of losses, which must not be negative; got {losses.tolist()}. "
                "Use losses that are bounded below by 0, or another weighting."
            )
        with torch.no_grad():
            kept = self.task_weights.clamp(min=0.0)
            kept = kept if bool(kept.sum() > 0) else torch.ones_like(kept)
            self.task_weights.copy_(kept * (self.tasks / kept.sum()))
        return self.task_weights.detach().clone()

    def objective(self, losses: Tensor, gramian: Tensor | None) -> Tensor | None:
        norms = _norms(_given(gramian))
        ratios = losses.to(norms) / self._first[0].to(norms)
        mean = ratios.mean()
        rates = torch.where(mean > 0, ratios / torch.where(mean > 0, mean, 1.0), 1.0)
        weighted = self.task_weights * norms
        target = weighted.detach().mean() * rates**self.alpha
        return (weighted - target).abs().sum()

    def get_extra_state(self) -> dict[str, Any]:
        return {"first": list(self._first)}

    def set_extra_state(self, state: Any) -> None:
        self._first = list(state["first"])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.alpha}"


class PCGrad(Weighting):
    """Each task's gradient, freed of what conflicts with another's, and all of them added up.

    For each task i and every other task j in random order, gᵢ ← gᵢ − (⟨gᵢ, gⱼ⟩/‖gⱼ‖²) gⱼ where the product is negative.
    All that is needed are the inner products, and the result is a weighted sum of the gradients as they were. Yu et
    al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020; the projections are ``torchjd.aggregation``'s.

    Args:
        tasks: the number of losses.
        seed: of the random order. The order is the method's own: no global random state is moved.
        main_task: which loss is the main task's.

    Raises:
        AuxiliaryError: torchjd is not installed.

    Example:
        >>> import torch
        >>> x = torch.zeros(2, requires_grad=True)
        >>> losses = torch.stack([x[0], x[1] - x[0]])            # gradients (1, 0) and (−1, 1), product −1
        >>> PCGrad(2).backward(losses, [x])
        tensor([2.0000, 1.5000])
        >>> x.grad                                               # (½, ½) and (0, 1)
        tensor([0.5000, 1.5000])
    """

    needs_gradients: ClassVar[bool] = True

    def __init__(self, tasks: int, *, seed: int = 0, main_task: int = 0) -> None:
        super().__init__(tasks, main_task=main_task)
        self._projections: nn.Module = torchjd_module("aggregation", "pcgrad").PCGradWeighting()
        self._random_state = torch.Generator().manual_seed(seed).get_state()

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        gramian = _given(gramian)
        # a square that underflows while a product does not would be divided by
        present = gramian.diagonal() >= torch.finfo(gramian.dtype).tiny
        gramian = torch.where(present & present[:, None], gramian, 0.0)
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._random_state)
            weights = cast(Tensor, self._projections(gramian))
            self._random_state = torch.get_rng_state()
        return weights

    def get_extra_state(self) -> dict[str, Any]:
        return {"random_state": self._random_state}

    def set_extra_state(self, state: Any) -> None:
        self._random_state = state["random_state"].cpu()


def _given(gramian: Tensor | None) -> Tensor:
    if gramian is None:
        raise AuxiliaryError(
            "this weighting needs the inner products of the tasks' gradients; got None. Call backward() or "
            "gradients(), which compute them."
        )
    return gramian


def _norms(gramian: Tensor) -> Tensor:
    return gramian.diagonal().clamp(min=0.0).sqrt()
