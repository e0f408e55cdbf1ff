"""What a callback can add to a run's record: metrics at each outer step, figures and a few lines of text at its end.

The loop asks for them and the tracker sends them; what is reported is the business of those who derive from
:class:`Report`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hyperopt_implicit.history import OuterStep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hyperopt_implicit.problem import BilevelProblem


class Report(ABC):
    """A callback of :func:`hyperopt_implicit.optimize` that has something to show in the run's record.

    Example:
        >>> import torch, hyperopt_implicit as hi
        >>> class WeightNorm(hi.Report):
        ...     norm = 0.0
        ...     def __call__(self, step, problem):
        ...         self.norm = float(problem.model.weight.detach().norm())
        ...     def metrics(self):
        ...         return {"weight_norm": self.norm}
        >>> report = WeightNorm()                        # hi.optimize(problem, callbacks=[report])
        >>> report.metrics()
        {'weight_norm': 0.0}
    """

    @abstractmethod
    def __call__(self, step: OuterStep, problem: BilevelProblem) -> bool | None:
        """Look at the problem after an outer step; True ends the run."""

    def metrics(self) -> Mapping[str, float]:
        """What to log for the outer step that was just seen, by name."""
        return {}

    def summary(self) -> Mapping[str, float]:
        """Numbers of the whole run by name, asked for once, at its end."""
        return {}

    def figures(self) -> Mapping[str, Figure]:
        """Figures of the whole run by name, asked for once, at its end."""
        return {}

    def lines(self) -> Sequence[str]:
        """What the run came to, a sentence a line; asked for once, at its end."""
        return ()
