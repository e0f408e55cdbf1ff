"""The loop: inner steps, hypergradient, outer step, until done.

What a hypergradient is, and when it may move the hyperparameters, is in ``hyper_optimizer.py``; what becomes of the
records is in ``tracking.py``.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from hyperopt_implicit.backend import Hypergradient, Spec, Status
from hyperopt_implicit.data import number_of_batches
from hyperopt_implicit.errors import HyperoptError
from hyperopt_implicit.history import Callback, History, OuterStep, Result, StopReason, summarise
from hyperopt_implicit.hyper_optimizer import HyperOptimizer, OnFailure
from hyperopt_implicit.hyperparameters import Value
from hyperopt_implicit.inner_loop import train_step
from hyperopt_implicit.messages import warn
from hyperopt_implicit.problem import BilevelProblem, InnerState
from hyperopt_implicit.progress import ProgressBar
from hyperopt_implicit.tracking import RunTracker, Tracking
from hyperopt_implicit.vectors import is_finite, norm

Scheduler = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


def optimize(
    problem: BilevelProblem,
    backend: Spec = "neumann",
    *,
    outer_steps: int = 100,
    inner_steps: int = 10,
    warmup_steps: int = 0,
    outer_optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    outer_lr: float = 1e-2,
    clip: float | None = None,
    hessian_batches: int = 1,
    restart: bool = False,
    inner_scheduler: Scheduler | None = None,
    outer_scheduler: Scheduler | None = None,
    patience: int | None = None,
    min_delta: float = 0.0,
    keep_best_model: bool = False,
    on_failure: OnFailure = "warn",
    max_failures: int = 10,
    seed: int | None = None,
    callbacks: Iterable[Callback] = (),
    progress: bool | None = None,
    tracking: Tracking | bool = True,
) -> Result:
    """Train a model and its hyperparameters together.

    Each outer step trains for ``inner_steps``, computes the hypergradient of the validation loss there, and moves the
    hyperparameters. The problem's model, optimizer and hyperparameters are changed in place, as in any training loop.

    Args:
        problem: the bilevel problem, with training and validation data.
        backend: how the hypergradient is computed: a name (see ``hyperopt-implicit backends``), a dict of a name and
            options, or an instance.
        outer_steps: how often the hyperparameters move.
        inner_steps: training steps before each move; a backend that differentiates through training does so through
            these.
        warmup_steps: training steps before the first outer step, with the hyperparameters at rest.
        outer_optimizer: a ``torch.optim`` class, which gets ``lr=outer_lr``, or a callable that makes an optimizer
            from a list of tensors. It moves unconstrained values.
        outer_lr: learning rate of the outer optimizer.
        clip: largest norm of the hypergradient; longer ones are scaled down.
        hessian_batches: training batches over which an implicit backend averages the Hessian.
        restart: start training anew, from the initial weights and optimizer state, before each outer step. A learning
            rate is best tuned this way.
        inner_scheduler: makes a learning-rate scheduler from the inner optimizer; it advances once an outer step. One
            that watches a loss (``ReduceLROnPlateau``) is given the validation loss.
        outer_scheduler: the same for the outer optimizer.
        patience: stop after so many outer steps without a lower validation loss, beyond the pass through the
            validation data over which that is averaged; None never stops early.
        min_delta: how much lower it must be for ``patience`` to count it; the best is the lowest, by however little.
        keep_best_model: keep a copy of the model's state at the lowest validation loss, in ``Result.best_model_state``.
        on_failure: what to do when the backend reports a failure: ``"warn"`` once a kind and use what was returned,
            ``"skip"`` the step, or ``"raise"``. What is not finite is never applied.
        max_failures: stop after so many outer steps in a row in which nothing could be applied because a loss or a
            gradient was not finite. After each of them the model is put back to where it was before.
        seed: seed of torch's generators during the run; they are put back afterwards. None leaves them alone.
        callbacks: called with each :class:`OuterStep` and the problem; returning True ends the run.
        progress: draw a progress bar; None draws on a terminal only.
        tracking: an MLflow run with the default settings (True), with others (a :class:`Tracking`), or none (False).

    Returns:
        Final and best hyperparameters, the history and why it stopped.

    Raises:
        HyperoptError: the problem, the backend or an option cannot hold; found before any training.
        HypergradientError: a failure during the run, with ``on_failure="raise"``.

    Example:
        >>> import torch, hyperopt_implicit as hi
        >>> @hi.hyperparameter("shift", init=0.0)
        ... def training_loss(model, batch, *, shift):
        ...     return ((model.weight - shift) ** 2).sum()
        >>> def validation_loss(model, batch):
        ...     return ((model.weight - 2.0) ** 2).sum()
        >>> problem = hi.BilevelProblem(
        ...     torch.nn.Linear(1, 1, bias=False), training_loss, validation_loss,
        ...     training_data=[0], validation_data=[0],
        ...     optimizer=lambda params: torch.optim.SGD(params, lr=0.5))
        >>> result = hi.optimize(problem, "cg", outer_steps=200, outer_lr=0.1, tracking=False)
        >>> round(result.hyperparameters["shift"].item(), 2)
        2.0
    """
    options = {
        "outer_steps": outer_steps,
        "inner_steps": inner_steps,
        "warmup_steps": warmup_steps,
        "outer_lr": outer_lr,
        "clip": clip,
        "hessian_batches": hessian_batches,
        "restart": restart,
        "patience": patience,
        "min_delta": min_delta,
        "keep_best_model": keep_best_model,
        "on_failure": on_failure,
        "max_failures": max_failures,
        "seed": seed,
    }
    check_options(options)
    lr = {"lr": outer_lr} if isinstance(outer_optimizer, type) else {}
    outer = HyperOptimizer(problem, outer_optimizer, backend=backend, clip=clip, on_failure=on_failure, **lr)
    described = {**options, "outer_optimizer": type(outer.optimizer).__name__}
    with _seeded(seed, problem.device):
        loop = _Loop(
            outer=outer,
            inner_steps=inner_steps,
            hessian_batches=hessian_batches,
            restart=restart,
            schedulers=[
                make(optimizer)
                for make, optimizer in (
                    (inner_scheduler, problem.optimizer),
                    (outer_scheduler, outer.optimizer),
                )
                if make is not None
            ],
        )
        # the only point before training at which the data and both losses are touched
        outer.check(loop.training.peek(), loop.validation.peek())
        tracker = RunTracker(tracking, problem, outer.backend, described)
        run = _Run(
            loop,
            patience=patience,
            min_delta=min_delta,
            keep_best_model=keep_best_model,
            max_failures=max_failures,
            callbacks=list(callbacks),
        )
        try:
            with ProgressBar(outer_steps, progress) as bar:
                run.warm_up(warmup_steps)
                for step in range(outer_steps):
                    run.advance(step)
                    tracker.log_step(run.history[-1])
                    bar.update(run.history[-1])
                    if run.stop_reason is not None:
                        break
        except BaseException as error:
            tracker.close(run.result(), error)
            raise
        result = run.result()
        result.run_id, result.run_link = tracker.run_id, tracker.run_link
        tracker.close(result)
    return result


class _Loop:
    """One outer step after another: streams, inner steps and the hypergradient; no bookkeeping."""

    def __init__(
        self,
        outer: HyperOptimizer,
        inner_steps: int,
        hessian_batches: int,
        restart: bool,
        schedulers: list[torch.optim.lr_scheduler.LRScheduler],
    ) -> None:
        self.outer = outer
        self.problem = outer.problem
        self.training = self.problem.stream("training_data")
        self.validation = self.problem.stream("validation_data")
        self.inner_steps = inner_steps
        self.hessian_batches = hessian_batches
        self.schedulers = schedulers
        self._initial = self.problem.inner_state() if restart else None

    def warm_up(self, steps: int) -> None:
        values = self._detached_values()
        for _ in range(steps):
            train_step(self.problem, self.training.next(), values)

    def train(self) -> list[float]:
        """The inner steps before the hypergradient; their losses. None for a backend that takes them itself."""
        if self._initial is not None:
            self.problem.load_inner_state(self._initial)
        if self.outer.backend.differentiates == "trajectory":
            return []
        values = self._detached_values()
        return [train_step(self.problem, self.training.next(), values) for _ in range(self.inner_steps)]

    def differentiate(self) -> Hypergradient:
        through = self.outer.backend.differentiates == "trajectory"
        batches = self.training.take(self.inner_steps if through else self.hessian_batches)
        return self.outer.compute(batches, self.validation.next())

    def move(self, hypergradient: Hypergradient) -> bool:
        if hypergradient.endpoint is not None and hypergradient.status is not Status.NON_FINITE:
            self.problem.load_inner_state(hypergradient.endpoint)
        return self.outer.apply(hypergradient)

    def advance_schedules(self, validation_loss: float) -> None:
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

    def _detached_values(self) -> dict[str, Value]:
        with torch.no_grad():
            return cast(dict[str, Value], self.problem.hyperparameters("loss"))


@dataclass
class _Run:
    """The bookkeeping around the loop: records, the best so far, failures, and when to stop."""

    loop: _Loop
    patience: int | None
    min_delta: float
    keep_best_model: bool
    max_failures: int
    callbacks: Sequence[Callback]
    history: History = field(default_factory=History)
    stop_reason: StopReason | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        problem = self.loop.problem
        data = problem.validation_data
        self._sweep: deque[float] = deque(maxlen=(number_of_batches(data) if data is not None else None) or 1)
        self._best = math.inf
        self._best_step: int | None = None
        self._best_values = problem.hyperparameters.values()
        self._best_model: dict[str, Tensor] | None = None
        self._partial = False
        self._mark, self._mark_step = math.inf, -1  # what patience counts from: the last loss lower by min_delta
        self._failures_in_a_row = 0
        self._failed = 0
        self._good: InnerState = problem.inner_state()

    def warm_up(self, steps: int) -> None:
        self.loop.warm_up(steps)
        if is_finite(self.loop.problem.params):
            self._good = self.loop.problem.inner_state()

    def advance(self, step: int) -> None:
        """One outer step, recorded."""
        problem = self.loop.problem
        started = time.perf_counter()
        losses = self.loop.train()
        trained = time.perf_counter()
        with torch.no_grad():
            values = problem.hyperparameters()
        shown = summarise(values)
        result = self.loop.differentiate()
        finite = [loss for loss in losses if math.isfinite(loss)]
        lost = result.status is Status.NON_FINITE or not is_finite(problem.params)
        if lost:
            problem.load_inner_state(self._good)
        self._judge(step, result)
        applied = self.loop.move(result)
        if self.keep_best_model and self._best_step == step:
            self._best_model = {name: value.clone() for name, value in problem.model.state_dict().items()}
        self.loop.advance_schedules(self._mean())
        ended = time.perf_counter()
        self.seconds += ended - started
        record = OuterStep(
            step=step,
            training_loss=sum(finite) / len(finite) if finite else result.training_loss,
            validation_loss=result.validation_loss,
            validation_loss_sweep=self._mean(),
            hypergradient_norm=norm(result.gradients),
            status=result.status,
            iterations=result.iterations,
            residual=result.residual,
            hvps=result.hvps,
            applied=applied,
            failed_inner_steps=len(losses) - len(finite),
            inner_seconds=trained - started,
            outer_seconds=ended - trained,
            hyperparameters=shown,
        )
        self.history.append(record)
        self._count(lost, record)
        self._decide(step, record)

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
            self._best_values = self.loop.problem.hyperparameters.values()
        self._partial = partial  # before a whole pass, losses of different batches: the latest stands in for the best
        if not partial and self._mean() < self._mark - self.min_delta:
            self._mark, self._mark_step = self._mean(), step

    def _count(self, lost: bool, record: OuterStep) -> None:
        """Count steps in which nothing finite came out, and stop after too many; else this is the last good state."""
        self._failed += not record.applied
        if not lost:
            self._failures_in_a_row = 0
            self._good = self.loop.problem.inner_state()
            return
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= self.max_failures:
            self.stop_reason = "too many failed steps"
            warn(
                f"stopped at outer step {record.step}: {self.max_failures} outer steps in a row gave a loss or a "
                "gradient that was not finite. Model and hyperparameters are at their last good state. "
                f"{Status.NON_FINITE.remedy}"
            )

    def _decide(self, step: int, record: OuterStep) -> None:
        waited = step - self._mark_step - ((self._sweep.maxlen or 1) - 1)
        if self.patience is not None and waited >= self.patience:
            self.stop_reason = self.stop_reason or "no improvement"
        for callback in self.callbacks:
            if callback(record, self.loop.problem):
                self.stop_reason = self.stop_reason or "stopped by a callback"

    def result(self) -> Result:
        problem = self.loop.problem
        return Result(
            problem=problem,
            hyperparameters=problem.hyperparameters.values(),
            best_hyperparameters=self._best_values,
            validation_loss=self._mean(),
            best_validation_loss=self._best,
            best_step=self._best_step,
            best_model_state=self._best_model,
            history=self.history,
            stop_reason=self.stop_reason or "all outer steps done",
            seconds=self.seconds,
            failed_steps=self._failed,
        )


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


_LEAST = {"outer_steps": 1, "inner_steps": 1, "warmup_steps": 0, "hessian_batches": 1, "max_failures": 1, "patience": 1}


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse counts and rates with which :func:`optimize` cannot run; looks only at those that are given.

    Raises:
        HyperoptError: with the option, what it must be and what it is.
    """
    for name, value in options.items():
        if name in _LEAST and not (name == "patience" and value is None):
            if isinstance(value, bool) or not isinstance(value, int) or value < _LEAST[name]:
                raise HyperoptError(f"{name} must be a whole number of at least {_LEAST[name]}; got {value!r}.")
        elif name == "min_delta" and not (isinstance(value, int | float) and 0 <= value < math.inf):
            raise HyperoptError(f"min_delta must be a number of at least 0; got {value!r}.")
        elif name == "outer_lr" and not (isinstance(value, int | float) and 0 < value < math.inf):
            raise HyperoptError(f"outer_lr must be a positive number; got {value!r}.")
        elif name == "seed" and not (value is None or isinstance(value, int)):
            raise HyperoptError(f"seed must be a whole number, or None; got {value!r}.")
