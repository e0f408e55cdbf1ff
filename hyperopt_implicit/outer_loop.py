"""What one outer step does, and the bookkeeping around it: records, the best so far, failures, and when to stop.

Which options there are, and what surrounds the steps (checks, seeds, tracking, a progress bar), is in ``optimize.py``.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hyperopt_implicit.backend import Hypergradient, Status
from hyperopt_implicit.data import number_of_batches
from hyperopt_implicit.distributed import agree
from hyperopt_implicit.history import Callback, History, OuterStep, Result, StopReason, summarise
from hyperopt_implicit.hyper_optimizer import HyperOptimizer
from hyperopt_implicit.hyperparameters import Value
from hyperopt_implicit.messages import warn
from hyperopt_implicit.micro_batches import take
from hyperopt_implicit.mixed_precision import training_in
from hyperopt_implicit.plain_training import PlainTraining
from hyperopt_implicit.saved_state import load_module_state, load_optimizer_state, module_state
from hyperopt_implicit.snapshot import Copies, Snapshot
from hyperopt_implicit.vectors import is_finite, norm


class OuterLoop:
    """One outer step after another: streams, inner steps and the hypergradient; no bookkeeping."""

    def __init__(
        self,
        outer: HyperOptimizer,
        inner_steps: int,
        hessian_batches: int,
        restart: bool,
        schedulers: list[torch.optim.lr_scheduler.LRScheduler],
        accumulate: int = 1,
    ) -> None:
        self.outer = outer
        self.problem = outer.problem
        self.training = self.problem.stream("training_data")
        self.validation = self.problem.stream("validation_data")
        self.inner_steps = inner_steps
        self.hessian_batches = hessian_batches
        self.schedulers = schedulers
        self.accumulate = accumulate
        self._plain = PlainTraining(self.problem, self.training, accumulate)
        self._initial: Snapshot | None = None
        if restart:
            self._initial = Snapshot(self.problem)
            self._initial.take()

    @torch.no_grad()
    def values(self) -> dict[str, Value]:
        """The constrained hyperparameters, as they are used in one outer step; they share memory with λ."""
        return {
            name: value if isinstance(value, nn.Module) else value.detach()
            for name, value in self.problem.hyperparameters().items()
        }

    def warm_up(self, steps: int, before: Snapshot | None) -> None:
        with training_in(self.problem, self.outer.inner_precision):
            self._plain.take(steps, self.values(), before)

    def train(self, values: dict[str, Value], before: Snapshot | None) -> list[float]:
        """The inner steps before the hypergradient; their losses. None for a backend that takes them itself.

        Args:
            values: what :meth:`values` gives.
            before: the present state, where there is a copy of it.
        """
        if self._initial is not None:
            before = self._initial
            before.restore()
        if self.outer.backend.differentiates == "trajectory":
            return []
        with training_in(self.problem, self.outer.inner_precision):
            return self._plain.take(self.inner_steps, values, before)

    def differentiate(self) -> Hypergradient:
        through = self.outer.backend.differentiates == "trajectory"
        batches = take(self.training, self.inner_steps if through else self.hessian_batches, self.accumulate)
        return self.outer.compute(batches, self.validation.next())

    def move(self, hypergradient: Hypergradient, size: float) -> bool:
        if hypergradient.endpoint is not None and hypergradient.status.usable:
            self.problem.load_inner_state(hypergradient.endpoint)
        return self.outer.apply(hypergradient, size)

    def state_dict(self) -> dict[str, Any]:
        """Model, optimizers, hyperparameters, schedules, and the places in both streams."""
        return {
            "model": module_state(self.problem.model),
            "inner_optimizer": self.problem.optimizer.state_dict(),
            "outer": self.outer.state_dict(),
            "schedulers": [each.state_dict() for each in self.schedulers],
            "training": self.training.state_dict(),
            "validation": self.validation.state_dict(),
            "wary": self._plain.wary,
            "initial": None if self._initial is None else self._initial.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave; the generators are left anywhere."""
        load_module_state(self.problem.model, state["model"])
        load_optimizer_state(self.problem.optimizer, state["inner_optimizer"])
        self.outer.load_state_dict(state["outer"])
        for scheduler, each in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(each)
        self.training.load_state_dict(state["training"])
        self.validation.load_state_dict(state["validation"])
        self._plain.wary = state["wary"]
        if self._initial is not None:
            self._initial.load_state_dict(state["initial"])

    def advance_schedules(self, validation_loss: float) -> None:
        if not self.schedulers:
            return
        with warnings.catch_warnings():
            # torch misses the optimizer.step() of an outer step that was skipped, and those that an unrolled backend
            # takes
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            for scheduler in self.schedulers:
                if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                    scheduler.step(validation_loss)
                else:
                    scheduler.step()
        self.problem.sync_optimizer()


@dataclass(frozen=True)
class Taken:
    """What the computation of an outer step has come to, before the hyperparameters move.

    Attributes:
        losses: of the inner steps.
        shown: the hyperparameters as numbers.
        result: the hypergradient.
        size: its norm.
        sound: whether the weights are finite.
    """

    losses: list[float]
    shown: dict[str, float]
    result: Hypergradient
    size: float
    sound: bool


@dataclass
class Run:
    """The bookkeeping around the loop: records, the best so far, failures, and when to stop.

    Beside what the backend reads to decide, numbers are read from the device at five places of an outer step, each time
    all of a kind at once: the losses of the inner steps, the hyperparameters that are recorded, the norms of the
    weights and of the hypergradient, and whether the hyperparameters are inside their constraints after the move.

    Attributes:
        good: where the last outer step began.
        is_good: whether that can be the present state, its weights being finite.
        warmed: how many steps of the warm-up were taken.
    """

    loop: OuterLoop
    patience: int | None
    min_delta: float
    keep_best_model: bool
    max_failures: int
    callbacks: Sequence[Callback]
    history: History = field(default_factory=History)
    stop_reason: StopReason | None = None
    seconds: float = 0.0
    warmed: int = 0

    def __post_init__(self) -> None:
        problem = self.loop.problem
        data = problem.validation_data
        self._sweep: deque[float] = deque(maxlen=(number_of_batches(data) if data is not None else None) or 1)
        self._best = math.inf
        self._best_step: int | None = None
        self._best_hyperparameters = Copies()
        self._best_hyperparameters.take(_state(problem.hyperparameters))
        self._best_model = Copies()
        self._partial = False
        self._mark, self._mark_step = math.inf, -1  # what patience counts from: the last loss lower by min_delta
        self._failures_in_a_row = 0
        self._failed = 0
        self._note: str | None = None
        self.good = Snapshot(problem)
        self.good.take()
        self.is_good = True

    def warm_up(self, steps: int) -> None:
        """So many steps of the inner optimizer, with the hyperparameters at rest."""
        self.loop.warm_up(steps, None if self.warmed else self.good)
        self.warmed += steps
        self.is_good = is_finite(self.loop.problem.params)

    def advance(self, step: int) -> OuterStep:
        """One outer step, recorded."""
        problem = self.loop.problem
        started = time.perf_counter()
        if self.is_good:
            self.good.take()
        values = self.loop.values()
        losses = self.loop.train(values, self.good if self.is_good else None)
        trained = time.perf_counter()
        shown = summarise(values, problem.hyperparameters.element_names)
        result = self.loop.differentiate()
        taken = Taken(losses, shown, result, norm(result.gradients), is_finite(problem.params))
        lost = self.judge(step, taken)
        applied = self.loop.move(result, taken.size)
        self.settle(step)
        ended = time.perf_counter()
        self.seconds += ended - started
        return self.record(step, taken, lost=lost, applied=applied, seconds=(trained - started, ended - trained))

    def judge(self, step: int, taken: Taken) -> bool:
        """Before the move: go back to the last good state where this one is lost, and says so; note the best so far."""
        lost = not taken.result.status.usable or not taken.sound
        if lost:
            self.good.restore()
        self.is_good = True
        self._judge(step, taken.result)
        return lost

    def settle(self, step: int) -> None:
        """After the move: the copy of the best model, and the schedules."""
        if self.keep_best_model and self._best_step == step:
            self._best_model.take(list(_tensors(self.loop.problem.model).values()))
        self.loop.advance_schedules(self._mean())

    def record(self, step: int, taken: Taken, *, lost: bool, applied: bool, seconds: tuple[float, float]) -> OuterStep:
        """The record of an outer step, kept and shown to the callbacks; decides whether the run goes on.

        Args:
            step: its number.
            taken: what came of it.
            lost: what :meth:`judge` said.
            applied: whether the hyperparameters moved.
            seconds: the time of the inner steps, and of the rest.
        """
        result = taken.result
        finite = [loss for loss in taken.losses if math.isfinite(loss)]
        record = OuterStep(
            step=step,
            training_loss=sum(finite) / len(finite) if finite else result.training_loss,
            validation_loss=result.validation_loss,
            validation_loss_sweep=self._mean(),
            hypergradient_norm=taken.size,
            status=result.status,
            iterations=result.iterations,
            residual=result.residual,
            hvps=result.hvps,
            applied=applied,
            failed_inner_steps=len(taken.losses) - len(finite),
            inner_seconds=seconds[0],
            outer_seconds=seconds[1],
            hyperparameters=taken.shown,
            note=result.note if result.note != self._note else None,
        )
        self._note = result.note
        self.history.append(record)
        self._count(lost, record)
        self._decide(step, record)
        return record

    def _mean(self) -> float:
        return sum(self._sweep) / len(self._sweep) if self._sweep else math.nan

    def _judge(self, step: int, result: Hypergradient) -> None:
        """Keep the hyperparameters, before they move, if they are the best so far over a whole pass of the data."""
        if not math.isfinite(result.validation_loss):
            return
        self._sweep.append(result.validation_loss)
        partial = len(self._sweep) < (self._sweep.maxlen or 1)
        if partial or self._partial or self._mean() < self._best:
            self._best, self._best_step = self._mean(), step
            self._best_hyperparameters.take(_state(self.loop.problem.hyperparameters))
        self._partial = partial  # before a whole pass, losses of different batches: the latest stands in for the best
        if not partial and self._mean() < self._mark - self.min_delta:
            self._mark, self._mark_step = self._mean(), step

    def _count(self, lost: bool, record: OuterStep) -> None:
        """Count steps in which nothing finite came out, and stop after too many of them in a row."""
        self._failed += not record.applied
        if not lost:
            self._failures_in_a_row = 0
            return
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= self.max_failures:
            self.stop_reason = "too many failed steps"
            full = record.status is Status.OUT_OF_MEMORY
            what = "ran out of memory" if full else "gave a loss or a gradient that was not finite"
            warn(
                f"stopped at outer step {record.step}: {self.max_failures} outer steps in a row {what}. Model and "
                "hyperparameters are at their last good state. "
                f"{(Status.OUT_OF_MEMORY if full else Status.NON_FINITE).remedy}"
            )

    def _decide(self, step: int, record: OuterStep) -> None:
        if self._waited(step):
            self.stop_reason = self.stop_reason or "no improvement"
        wanted = [bool(callback(record, self.loop.problem)) for callback in self.callbacks]
        if any(agree(any_=wanted)):
            self.stop_reason = self.stop_reason or "stopped by a callback"

    def _waited(self, step: int) -> bool:
        """Whether patience is at its end."""
        waited = step - self._mark_step - ((self._sweep.maxlen or 1) - 1)
        return self.patience is not None and waited >= self.patience

    def result(self) -> Result:
        problem = self.loop.problem
        return Result(
            problem=problem,
            hyperparameters=problem.hyperparameters.values(),
            best_hyperparameters=self._best_values(),
            validation_loss=self._mean(),
            best_validation_loss=self._best,
            best_step=self._best_step,
            best_model_state=dict(zip(_tensors(problem.model), self._best_model.tensors, strict=True))
            if self._best_model.tensors
            else None,
            history=self.history,
            stop_reason=self.stop_reason or "all outer steps done",
            seconds=self.seconds,
            failed_steps=self._failed,
        )

    def state_dict(self) -> dict[str, Any]:
        """The loop's state and all that is remembered of the run, as it is between two outer steps."""
        return {
            "loop": self.loop.state_dict(),
            "history": self.history.state_dict(),
            "best_hyperparameters": self._best_hyperparameters.tensors,
            "best_model": self._best_model.tensors,
            "sweep": list(self._sweep),
            "good": None if len(self.history) else self.good.state_dict(),  # each outer step begins with another
            **{name: getattr(self, name) for name in _REMEMBERED},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave; the generators are left anywhere."""
        self.loop.load_state_dict(state["loop"])
        self.history.load_state_dict(state["history"])
        device = self.loop.problem.device
        self._best_hyperparameters.take([each.to(device) for each in state["best_hyperparameters"]])
        if state["best_model"]:
            self._best_model.take([each.to(device) for each in state["best_model"]])
        self._sweep.extend(state["sweep"])
        if state["good"] is not None:
            self.good.load_state_dict(state["good"])
        for name in _REMEMBERED:
            setattr(self, name, state[name])
        self.is_good = is_finite(self.loop.problem.params)
        # what says when to stop may have changed since
        failed = self._failures_in_a_row >= self.max_failures
        if (
            self.stop_reason == "interrupted"
            or (self.stop_reason == "no improvement" and not self._waited(len(self.history) - 1))
            or (self.stop_reason == "too many failed steps" and not failed)
        ):
            self.stop_reason = None

    @torch.no_grad()
    def _best_values(self) -> dict[str, Value]:
        """The constrained values of the best λ, which takes the place of the present one for this."""
        hyperparameters = self.loop.problem.hyperparameters
        live, now = _state(hyperparameters), Copies()
        now.take(live)
        for tensor, best in zip(live, self._best_hyperparameters.tensors, strict=True):
            tensor.copy_(best)
        values = hyperparameters.values()
        for tensor, last in zip(live, now.tensors, strict=True):
            tensor.copy_(last)
        return values


_REMEMBERED = (
    "stop_reason", "seconds", "warmed", "_best", "_best_step", "_partial", "_mark", "_mark_step", "_failures_in_a_row",
    "_failed", "_note",
)  # fmt: skip


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's ``state_dict`` without what modules keep in it that is no tensor."""
    return {name: x for name, x in model.state_dict().items() if isinstance(x, Tensor)}


def _state(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
