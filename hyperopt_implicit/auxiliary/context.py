"""What a loss combiner may look at beside the losses: a sample's input, and its label."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperopt_implicit.errors import AuxiliaryError


class Context(nn.Module):
    """What a combiner may know of a sample beside its losses: features of its input, its label, or both.

    Args:
        features: how many features of the input; 0 leaves it out.
        encoder: a module from the inputs to ``[batch, features]``; by default the inputs themselves, flattened. It is
            part of the combiner and trained with it; freeze its parameters to use it as it is.
        classes: how many classes the labels have, given one-hot; 0 leaves them out.

    Raises:
        AuxiliaryError: neither is asked for; later, inputs or labels are missing or do not fit.

    Example:
        >>> import torch
        >>> from hyperopt_implicit.auxiliary import Context
        >>> Context(features=2, classes=3)(torch.zeros(1, 2), torch.tensor([1]))
        tensor([[0., 0., 0., 1., 0.]])
    """

    def __init__(self, features: int = 0, *, encoder: nn.Module | None = None, classes: int = 0) -> None:
        super().__init__()
        if features < 0 or classes < 0 or features + classes == 0:
            raise AuxiliaryError(
                f"a Context needs features of the input, classes of the label, or both; got features={features}, "
                f"classes={classes}."
            )
        self.features = features
        self.classes = classes
        self.encoder = nn.Flatten() if encoder is None else encoder

    @property
    def size(self) -> int:
        """Features and classes together."""
        return self.features + self.classes

    def forward(self, inputs: Tensor | None, labels: Tensor | None) -> Tensor:
        """[batch, size]."""
        parts = []
        if self.features:
            if inputs is None:
                raise AuxiliaryError("this combiner is conditioned on the inputs: call it with inputs=.")
            encoded = self.encoder(inputs)
            if encoded.dim() != 2 or encoded.shape[1] != self.features:
                raise AuxiliaryError(
                    f"the encoded inputs must have shape [batch, {self.features}]; got {tuple(encoded.shape)}. Set "
                    "features= to what the encoder gives."
                )
            parts.append(encoded)
        if self.classes:
            if labels is None:
                raise AuxiliaryError("this combiner is conditioned on the labels: call it with labels=.")
            self._check_labels(labels)
            one_hot = F.one_hot(labels.long(), self.classes)
            parts.append(one_hot.to(parts[0].dtype if parts else torch.get_default_dtype()))
        return torch.cat(parts, dim=1)

    def _check_labels(self, labels: Tensor) -> None:
        rule = f"labels must be whole numbers from 0 to {self.classes - 1}, one for each sample"
        if labels.is_floating_point() or labels.dtype == torch.bool or labels.dim() != 1:
            raise AuxiliaryError(f"{rule}; got {labels.dtype} of shape {tuple(labels.shape)}.")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
            raise AuxiliaryError(f"{rule}; got {int(labels.min())} to {int(labels.max())}.")
