"""Auxiliary labels that are learned: a network that splits each class into sub-classes, and the losses that go with it.

The model predicts the sub-classes as an auxiliary task; the network that makes them is a hyperparameter, and is trained
through the validation loss like any other. All of it is differentiable twice, as that needs. Auxiliary losses that are
combined rather than made are in ``combiners.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hyperopt_implicit.errors import AuxiliaryError


class LabelGenerator(nn.Module):
    """Soft auxiliary labels for samples whose class is known: a distribution over the sub-classes of that class.

    y = softmax over the sub-classes k of the sample's class of (W e(x) + b)ₖ, and exactly 0 for the sub-classes of all
    other classes. Navon et al., "Auxiliary Learning by Implicit Differentiation", ICLR 2021, learn it by
    hypergradients; the split into sub-classes is from Liu, Davison and Johns, "Self-Supervised Generalisation with
    Meta Auxiliary Learning", NeurIPS 2019.

    Args:
        encoder: maps inputs to [batch, features].
        features: what the encoder returns for each sample.
        subclasses: the number of sub-classes of each class: one number for all, or one for each.
        classes: the number of classes; needed where ``subclasses`` is one number.

    Attributes:
        classes: the number of classes.
        subclasses: the number of sub-classes of each.
        total_subclasses: their sum, which is the width of the model's auxiliary output.

    Raises:
        AuxiliaryError: a class has no sub-class, or ``classes`` is missing or contradicts ``subclasses``.

    Example:
        As a hyperparameter. The labels depend on nothing that the model learns, so all of the hypergradient comes
        through the auxiliary loss:

        >>> import torch, hyperopt_implicit as hi
        >>> from torch.nn.functional import cross_entropy
        >>> from hyperopt_implicit.auxiliary.labels import LabelGenerator, focal_loss
        >>> generator = LabelGenerator(torch.nn.Identity(), features=4, subclasses=2, classes=3)
        >>> generator(torch.zeros(2, 4), torch.tensor([0, 2])).shape
        torch.Size([2, 6])
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.body, self.main, self.auxiliary = (torch.nn.Linear(4, n) for n in (4, 3, 6))
        ...     def forward(self, x):
        ...         hidden = self.body(x).tanh()
        ...         return self.main(hidden), self.auxiliary(hidden)
        >>> @hi.hyperparameter("generator", init=generator)
        ... def training_loss(model, batch, *, generator):
        ...     x, labels = batch
        ...     main, auxiliary = model(x)
        ...     return cross_entropy(main, labels) + focal_loss(auxiliary, generator(x, labels)).mean()
        >>> def validation_loss(model, batch):
        ...     return cross_entropy(model(batch[0])[0], batch[1])
        >>> problem = hi.BilevelProblem(Model(), training_loss, validation_loss,
        ...                             optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
        >>> batch = torch.randn(6, 4), torch.arange(6) % 3
        >>> result = hi.hypergradient(problem, "cg", training_batches=[batch], validation_batch=batch)
        >>> list(result.gradients)
        ['generator.head.weight', 'generator.head.bias']
    """

    mask: Tensor

    def __init__(
        self, encoder: nn.Module, features: int, subclasses: int | Sequence[int], *, classes: int | None = None
    ) -> None:
        super().__init__()
        if features < 1:
            raise AuxiliaryError(f"features must be the width of the encoder's output, at least 1; got {features}.")
        self.subclasses = _subclasses(subclasses, classes)
        self.classes = len(self.subclasses)
        self.total_subclasses = sum(self.subclasses)
        self.features = features
        self.encoder = encoder
        self.head = nn.Linear(features, self.total_subclasses)
        owner = torch.repeat_interleave(torch.arange(self.classes), torch.tensor(self.subclasses))
        self.register_buffer("mask", owner == torch.arange(self.classes)[:, None], persistent=False)

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """The labels of a batch.

        Args:
            inputs: what the encoder takes.
            labels: [batch], the class of each sample as an integer.

        Returns:
            [batch, total_subclasses], rows that sum to 1. The sub-classes of class 0 come first.

        Raises:
            AuxiliaryError: the labels are not one class per sample, or the encoder returns another shape.
        """
        self._check_labels(labels)
        encoded = self.encoder(inputs)
        if encoded.shape != (len(labels), self.features):
            raise AuxiliaryError(
                f"the encoder must return a tensor of shape ({len(labels)}, {self.features}), one row for each of the "
                f"{len(labels)} labels and one column for each of its features; got {tuple(encoded.shape)}. Give as "
                "many labels as inputs, and flatten what the encoder returns."
            )
        return masked_softmax(self.head(encoded), self.mask[labels.long()])

    def _check_labels(self, labels: Tensor) -> None:
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool or labels.dim() != 1:
            raise AuxiliaryError(
                "labels must be integers of shape [batch], the class of each sample; got "
                f"{labels.dtype} of shape {tuple(labels.shape)}. Convert with .long(), or one-hot labels with "
                ".argmax(dim=1)."
            )
        if len(labels):
            least, most = int(labels.min()), int(labels.max())
            if least < 0 or most >= self.classes:
                raise AuxiliaryError(
                    f"labels must be classes from 0 to {self.classes - 1}, since sub-classes are given for "
                    f"{self.classes} classes; got {least if least < 0 else most}. Leave out samples without a class, "
                    "or give sub-classes for more classes."
                )

    def extra_repr(self) -> str:
        return f"subclasses={list(self.subclasses)}"


def _subclasses(subclasses: int | Sequence[int], classes: int | None) -> tuple[int, ...]:
    if isinstance(subclasses, int):
        if classes is None or classes < 1:
            raise AuxiliaryError(
                f"classes must be the number of classes, at least 1, where subclasses is one number; got {classes}. "
                "Pass classes, or one number of sub-classes for each class."
            )
        subclasses = [subclasses] * classes
    counts = tuple(int(count) for count in subclasses)
    if not counts or min(counts) < 1:
        raise AuxiliaryError(
            f"subclasses must be at least 1 for every class; got {list(counts)}. A class with a single sub-class is "
            "not split."
        )
    if classes is not None and classes != len(counts):
        raise AuxiliaryError(
            f"subclasses must hold one number for each of the {classes} classes; got {len(counts)} numbers. Leave out "
            "classes, or give a number for each."
        )
    return counts


def masked_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the entries of the last dimension that are in the mask; exactly 0, with gradient 0, off it.

    Args:
        logits: [..., n], finite.
        mask: bool, shaped like them, with at least one entry in each row.

    Raises:
        AuxiliaryError: the mask is not bool or its shape differs.

    Example:
        >>> import torch
        >>> masked_softmax(torch.tensor([0.0, 0.0, 9.0]), torch.tensor([True, True, False]))
        tensor([0.5000, 0.5000, 0.0000])
    """
    if mask.dtype != torch.bool or mask.shape != logits.shape:
        raise AuxiliaryError(
            f"mask must be bool and of the logits' shape {tuple(logits.shape)}; got {mask.dtype} of shape "
            f"{tuple(mask.shape)}. Expand it, or convert it with .bool()."
        )
    return logits.masked_fill(~mask, float("-inf")).softmax(dim=-1)


def focal_loss(logits: Tensor, soft_labels: Tensor, *, gamma: float = 2.0) -> Tensor:
    """Cross-entropy in which classes that are already predicted with confidence count less.

    ℓ = −Σₖ yₖ (1 − pₖ)^γ log pₖ for each sample, with p = softmax(logits). At γ = 0 it is cross-entropy. Lin et al.,
    "Focal Loss for Dense Object Detection", ICCV 2017. Liu, Davison and Johns (NeurIPS 2019) use it, with γ = 2, for
    labels that are learned.

    Args:
        logits: [batch, classes], finite.
        soft_labels: [batch, classes], y.
        gamma: γ ≥ 0.

    Returns:
        [batch], twice differentiable with respect to both, whatever γ.

    Raises:
        AuxiliaryError: the shapes differ, or gamma is negative.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.0, 0.0]])
        >>> focal_loss(logits, torch.tensor([[0.5, 0.5]]))               # ¼ log 2
        tensor([0.1733])
        >>> focal_loss(logits, torch.tensor([[0.5, 0.5]]), gamma=0.0)    # log 2
        tensor([0.6931])
    """
    if logits.dim() != 2 or logits.shape != soft_labels.shape:
        raise AuxiliaryError(
            "logits and soft_labels must both have shape [batch, classes]; got "
            f"{tuple(logits.shape)} and {tuple(soft_labels.shape)}. The model's auxiliary output is as wide as the "
            "generator's total_subclasses."
        )
    if not gamma >= 0:
        raise AuxiliaryError(f"gamma must be at least 0; got {gamma}. At 0 the loss is cross-entropy.")
    log_p = logits.log_softmax(dim=-1)
    rest = 1.0 - log_p.exp()
    # where p rounds to 1 the term and all its derivatives vanish, but those of a power at 0 may be infinite
    uncertain = rest > 0
    factor = torch.where(uncertain, torch.where(uncertain, rest, 1.0) ** gamma, 0.0)
    return -(soft_labels * factor * log_p).sum(dim=-1)


def entropy_penalty(soft_labels: Tensor) -> Tensor:
    """Σₖ mₖ log mₖ of the mean label m of a batch: its *negative* entropy, to be added to the generator's loss.

    Lower is more varied. It is 0 where the generator uses a single sub-class for all samples and −log n where it uses n
    of them alike, so that minimising it keeps sub-classes from collapsing into one. Liu, Davison and Johns,
    "Self-Supervised Generalisation with Meta Auxiliary Learning", NeurIPS 2019, add 0.2 times this to the loss that
    trains the generator, which here is the validation loss.

    A sub-class that no sample of the batch has adds 0 to the value and to all derivatives.

    Args:
        soft_labels: [batch, classes], rows that sum to 1.

    Returns:
        A scalar, from −log classes to 0.

    Raises:
        AuxiliaryError: the labels are not of that shape, or the batch is empty.

    Example:
        >>> import torch
        >>> entropy_penalty(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))      # −log 2
        tensor(-0.6931)
    """
    if soft_labels.dim() != 2 or len(soft_labels) == 0:
        raise AuxiliaryError(
            f"soft_labels must have shape [batch, classes] with at least one sample; got {tuple(soft_labels.shape)}. "
            "Pass a batch of the generator's labels as it returns them."
        )
    mean = soft_labels.mean(dim=0)
    # m log m has an infinite slope at 0, and 1/m overflows for the smallest numbers
    present = torch.where(mean >= torch.finfo(mean.dtype).tiny, mean, 1.0)
    return (present * present.log()).sum()
