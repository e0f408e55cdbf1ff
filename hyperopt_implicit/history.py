"""What a run leaves behind: one record an outer step, the history of them, and the result.

Nothing here computes; ``outer_loop.py`` fills it, ``tracking.py`` and ``figures.py`` show it.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from hyperopt_implicit.backend import Status
from hyperopt_implicit.hyperparameters import Value

if TYPE_CHECKING:
    import pandas as pd

    from hyperopt_implicit.problem import BilevelProblem

MAX_ELEMENTS = 20
"""Hyperparameters of up to so many elements are recorded element by element, larger ones by min, mean and max."""

StopReason = Literal[
    "all outer steps done", "no improvement", "stopped by a callback", "too many failed steps", "interrupted"
]


@dataclass(frozen=True, slots=True)
class OuterStep:
    """One outer step: where it stood before the hyperparameters moved, and what the move cost.

    Attributes:
        step: its number, from 0.
        training_loss: mean of L over the inner steps (non-finite ones left out).
        validation_loss: F on this step's validation batch.
        validation_loss_sweep: mean of F over the last pass through the validation data; early stopping and the best
            step go by it. Equal to ``validation_loss`` where there is one batch.
        hypergradient_norm: over all hyperparameters, before clipping.
        status: how the hypergradient ended.
        iterations: the backend's terms, iterations or steps.
        residual: ‖Hu − v‖/‖v‖, or None.
        hvps: Hessian-vector products spent.
        applied: whether the hyperparameters moved.
        failed_inner_steps: inner steps left out because L was not finite.
        inner_seconds: time of the inner steps; for an unrolled backend they are part of ``outer_seconds``.
        outer_seconds: time of the hypergradient and the outer optimizer.
        hyperparameters: constrained values before the move, as :func:`summarise` gives them.
        note: what the backend has decided for itself, where it has and this is the first step with it.
    """

    step: int
    training_loss: float
    validation_loss: float
    validation_loss_sweep: float
    hypergradient_norm: float
    status: Status
    iterations: int
    residual: float | None
    hvps: int
    applied: bool
    failed_inner_steps: int
    inner_seconds: float
    outer_seconds: float
    hyperparameters: dict[str, float]
    note: str | None = None


Callback = Callable[[OuterStep, "BilevelProblem"], bool | None]


def summarise(
    values: Mapping[str, Value], element_names: Mapping[str, tuple[str, ...]] | None = None
) -> dict[str, float]:
    """Hyperparameters as numbers: ``name`` for one element, ``name/0`` … up to 20, else min, mean and max.

    Elements with names of their own are given by these, ``name/element``, however many they are. All numbers are read
    from the device at once.
    """
    names: list[str] = []
    parts: list[Tensor] = []
    for name, value in values.items():
        flat = flattened(value)
        if element_names is not None and name in element_names:
            names += [f"{name}/{each}" for each in element_names[name]]
        elif flat.numel() == 1:
            names.append(name)
        elif flat.numel() <= MAX_ELEMENTS and isinstance(value, Tensor):
            names += [f"{name}/{i}" for i in range(flat.numel())]
        else:
            low, high = torch.aminmax(flat)
            flat = torch.stack((low, flat.mean(), high))
            names += [f"{name}/min", f"{name}/mean", f"{name}/max"]
        parts.append(flat)
    if not parts:
        return {}
    numbers = (parts[0] if len(parts) == 1 else torch.cat(parts)).tolist()
    return dict(zip(names, numbers, strict=True))


def flattened(value: Value) -> Tensor:
    """All elements of a hyperparameter, of a module's parameters as of a tensor, in one row."""
    if isinstance(value, nn.Module):
        return torch.cat([p.detach().reshape(-1) for p in value.parameters()])
    return value.detach().reshape(-1)


class History(Sequence[OuterStep]):
    """The outer steps of a run, in order.

    They are kept as bare numbers, 128 bytes a step and 8 for each number that is recorded of a hyperparameter; an
    :class:`OuterStep` is made when it is asked for.

    Example:
        >>> import hyperopt_implicit as hi
        >>> len(hi.History())
        0
    """

    def __init__(self) -> None:
        self._numbers = array("d")  # row after row: the fields of a step, then its hyperparameters
        self._starts = array("q")
        self._names: list[tuple[str, ...]] = []  # of the hyperparameters, one object for all steps that have the same
        self._known: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._notes: dict[int, str] = {}

    def append(self, step: OuterStep) -> None:
        names = tuple(step.hyperparameters)
        if step.note is not None:
            self._notes[len(self._starts)] = step.note
        self._starts.append(len(self._numbers))
        self._names.append(self._known.setdefault(names, names))
        self._numbers.extend(
            (
                step.step,
                step.training_loss,
                step.validation_loss,
                step.validation_loss_sweep,
                step.hypergradient_norm,
                _STATUSES.index(step.status),
                step.iterations,
                step.residual is not None,
                math.nan if step.residual is None else step.residual,
                step.hvps,
                step.applied,
                step.failed_inner_steps,
                step.inner_seconds,
                step.outer_seconds,
                *step.hyperparameters.values(),
            )
        )

    def _step(self, index: int) -> OuterStep:
        names = self._names[index]
        start, end = self._starts[index], self._starts[index] + _WIDTH + len(names)
        (
            step, training, validation, sweep, norm, status, iterations, measured, residual, hvps, applied, failed,
            inner, outer, *values,
        ) = self._numbers[start:end]  # fmt: skip
        return OuterStep(
            step=int(step),
            training_loss=training,
            validation_loss=validation,
            validation_loss_sweep=sweep,
            hypergradient_norm=norm,
            status=_STATUSES[int(status)],
            iterations=int(iterations),
            residual=residual if measured else None,
            hvps=int(hvps),
            applied=bool(applied),
            failed_inner_steps=int(failed),
            inner_seconds=inner,
            outer_seconds=outer,
            hyperparameters=dict(zip(names, values, strict=True)),
            note=self._notes.get(index),
        )

    @property
    def notes(self) -> dict[int, str]:
        """What the backend decided for itself, by the number of the outer step."""
        return {self[index].step: note for index, note in self._notes.items()}

    @overload
    def __getitem__(self, index: int) -> OuterStep: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[OuterStep]: ...
    def __getitem__(self, index: int | slice) -> OuterStep | Sequence[OuterStep]:
        if isinstance(index, slice):
            return [self._step(i) for i in range(*index.indices(len(self)))]
        return self._step(range(len(self))[index])

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[OuterStep]:
        return map(self._step, range(len(self)))

    def state_dict(self) -> dict[str, Any]:
        """The history as tensors of numbers and lists of names."""
        kinds = {id(names): i for i, names in enumerate(self._known)}
        return {
            "numbers": _tensor(self._numbers, torch.float64),
            "starts": _tensor(self._starts, torch.int64),
            "names": [list(names) for names in self._known],
            "kinds": torch.tensor([kinds[id(names)] for names in self._names], dtype=torch.int64),
            "notes": dict(self._notes),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Hold what :meth:`state_dict` gave, in the place of what was held."""
        self._numbers = array("d", state["numbers"].tolist())
        self._starts = array("q", state["starts"].tolist())
        known = [tuple(names) for names in state["names"]]
        self._known = {names: names for names in known}
        self._names = [known[i] for i in state["kinds"].tolist()]
        self._notes = dict(state["notes"])

    def to_dataframe(self) -> pd.DataFrame:
        """A row an outer step; hyperparameters as columns ``hyperparameter/name``; :attr:`notes` are left out."""
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for each in self:
            row = {field.name: getattr(each, field.name) for field in fields(each) if field.name not in _APART}
            row["status"] = each.status.value
            row.update((f"hyperparameter/{name}", x) for name, x in each.hyperparameters.items())
            rows.append(row)
        return pd.DataFrame(rows)


def _tensor(numbers: array[Any], dtype: torch.dtype) -> Tensor:
    """A copy: an array whose memory is shared cannot grow."""
    return torch.frombuffer(numbers, dtype=dtype).clone() if numbers else torch.empty(0, dtype=dtype)


_APART = ("hyperparameters", "note")
_STATUSES = tuple(Status)
_WIDTH = 14  # the numbers of a step before its hyperparameters


@dataclass
class Result:
    """What :func:`hyperopt_implicit.optimize` returns.

    Attributes:
        problem: the problem, its model trained and its hyperparameters at their last values.
        hyperparameters: the last constrained values.
        best_hyperparameters: those with which the validation loss was lowest (by ``validation_loss_sweep``, over whole
            passes; the last ones in a run that is shorter than a pass).
        validation_loss: the last step's, by ``validation_loss_sweep``.
        best_validation_loss: the lowest.
        best_step: the outer step at which it was reached; None where no step gave a finite one.
        best_model_state: the model's ``state_dict`` there, where ``keep_best_model`` asked for it.
        history: a record an outer step.
        stop_reason: why it ended.
        seconds: wall-clock time of training and outer steps, without tracking's start and end.
        run_id: of the MLflow run, where tracking was on and its server reachable.
        run_link: where to look at it.
        failed_steps: outer steps in which the hyperparameters did not move.
    """

    problem: BilevelProblem
    hyperparameters: dict[str, Value]
    best_hyperparameters: dict[str, Value]
    validation_loss: float
    best_validation_loss: float
    best_step: int | None
    best_model_state: dict[str, Tensor] | None
    history: History
    stop_reason: StopReason
    seconds: float
    run_id: str | None = None
    run_link: str | None = None
    failed_steps: int = 0
