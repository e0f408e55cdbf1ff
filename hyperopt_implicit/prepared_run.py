"""One run before its first step and after its last: checked, seeded, tracked, closed; the same alone and among others.

What a step does is in ``outer_loop.py``; ``optimize.py`` drives one run, and ``population.py`` several at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch

from hyperopt_implicit.backend import Spec
from hyperopt_implicit.errors import HyperoptError
from hyperopt_implicit.guarded_step import OnFailure
from hyperopt_implicit.history import Callback, OuterStep, Result
from hyperopt_implicit.hyper_optimizer import HyperOptimizer
from hyperopt_implicit.messages import warn
from hyperopt_implicit.outer_loop import OuterLoop, Run
from hyperopt_implicit.problem import BilevelProblem
from hyperopt_implicit.randomness import random_states, replaying
from hyperopt_implicit.report import Report
from hyperopt_implicit.tracking import RunTracker, Tracking

Scheduler = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


@dataclass(frozen=True)
class RunOptions:
    """The options of :func:`hyperopt_implicit.optimize` that decide what is computed, all but the seed."""

    outer_steps: int = 100
    inner_steps: int = 10
    warmup_steps: int = 0
    outer_optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam
    outer_lr: float = 1e-2
    clip: float | None = None
    hessian_batches: int = 1
    restart: bool = False
    inner_scheduler: Scheduler | None = None
    outer_scheduler: Scheduler | None = None
    patience: int | None = None
    min_delta: float = 0.0
    keep_best_model: bool = False
    on_failure: OnFailure = "warn"
    max_failures: int = 10

    def described(self, seed: int | None) -> dict[str, Any]:
        """Those that are numbers or words, by name, with the seed."""
        apart = ("outer_optimizer", "inner_scheduler", "outer_scheduler")
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in apart} | {"seed": seed}


class PreparedRun:
    """A run whose options and backend are checked; :meth:`begin` makes it ready, and :meth:`close` ends it.

    Attributes:
        problem: what is trained.
        options: those of the run.
        outer: the outer step.
        run: the loop and its bookkeeping, from :meth:`begin` on.
        closed: whether it was closed.

    Raises:
        HyperoptError: the problem, the backend or an option cannot hold.
    """

    run: Run
    closed: bool = False

    def __init__(self, problem: BilevelProblem, backend: Spec, options: RunOptions, seed: int | None) -> None:
        self._described = options.described(seed)
        check_options(self._described)
        self.problem, self.options, self._seed = problem, options, seed
        lr = {"lr": options.outer_lr} if isinstance(options.outer_optimizer, type) else {}
        self.outer = HyperOptimizer(
            problem,
            options.outer_optimizer,
            backend=backend,
            clip=options.clip,
            on_failure=options.on_failure,
            **lr,
        )
        through_training = self.outer.backend.differentiates == "trajectory"
        self.outer.backend.check_steps(options.inner_steps if through_training else options.hessian_batches)
        if not through_training:
            _warn_of_batches_left_out(
                problem.training_data, options.warmup_steps, options.inner_steps, options.hessian_batches
            )
        self._described["outer_optimizer"] = type(self.outer.optimizer).__name__
        self._described["outer_lr"] = self.outer.optimizer.param_groups[0].get("lr")  # a callable has its own

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Inside, torch's generators are those of the run; afterwards they go on as before."""
        if self._seed is None:
            yield
            return
        with replaying(random_states(self.problem.device), self.problem.device):
            torch.manual_seed(self._seed)
            yield

    def begin(self, callbacks: Iterable[Callback], tracking: Tracking | bool) -> None:
        """Look at the first batches, try both losses on them, and open the run that is tracked.

        Raises:
            HyperoptError: what :func:`hyperopt_implicit.preflight.preflight` refuses.
        """
        options, problem, outer = self.options, self.problem, self.outer
        loop = OuterLoop(
            outer=outer,
            inner_steps=options.inner_steps,
            hessian_batches=options.hessian_batches,
            restart=options.restart,
            schedulers=[
                make(optimizer)
                for make, optimizer in (
                    (options.inner_scheduler, problem.optimizer),
                    (options.outer_scheduler, outer.optimizer),
                )
                if make is not None
            ],
        )
        # the only point before training at which the data and both losses are touched
        outer.check(loop.training.peek(), loop.validation.peek())
        callbacks = list(callbacks)
        reports = [each for each in callbacks if isinstance(each, Report)]
        self._tracker = RunTracker(tracking, problem, outer.backend, self._described, reports)
        self.run = Run(
            loop,
            patience=options.patience,
            min_delta=options.min_delta,
            keep_best_model=options.keep_best_model,
            max_failures=options.max_failures,
            callbacks=callbacks,
        )

    def go(self, shown: Callable[[OuterStep], None] = lambda record: None) -> Result:
        """All steps, to the end; ``shown`` is called with the record of each."""
        try:
            self.run.warm_up(self.options.warmup_steps)
            for step in range(self.options.outer_steps):
                record = self.run.advance(step)
                self.log(record)
                shown(record)
                if self.run.stop_reason is not None:
                    break
        except BaseException as error:
            self.close(error)
            raise
        return self.close()

    def log(self, record: OuterStep) -> None:
        """Hand the record of a step to the tracker; returns at once."""
        self._tracker.log_step(record)

    def close(self, error: BaseException | None = None) -> Result:
        """What the run has come to; the tracked run is ended, as failed where there is an error."""
        self.closed = True
        result = self.run.result()
        if error is None:
            result.run_id, result.run_link = self._tracker.run_id, self._tracker.run_link
        self._tracker.close(result, error)
        return result


def _warn_of_batches_left_out(data: object, warmup_steps: int, inner_steps: int, hessian_batches: int) -> None:
    """Inner steps and hypergradients take turns on one stream: on a list, each may meet some of the batches only."""
    if not isinstance(data, list | tuple) or type(data) not in (list, tuple):  # a subclass may iterate otherwise
        return
    period = inner_steps + hessian_batches
    common = math.gcd(len(data), period)  # a place is only ever met again at places that differ by a multiple of it
    trained = {(warmup_steps + i) % common for i in range(inner_steps)}
    differentiated = {(warmup_steps + inner_steps + i) % common for i in range(hessian_batches)}
    counts = [len({id(x) for i, x in enumerate(data) if i % common in met}) for met in (trained, differentiated)]
    every = len({id(x) for x in data})
    if min(counts) < every:
        warn(
            f"training_data is a list of {len(data)} batches that is read in turn, and an outer step takes {period} of "
            f"them (inner_steps + hessian_batches): of {every} different batches, training only ever sees {counts[0]} "
            f"and the hypergradient {counts[1]}. Choose inner_steps so that the sum has no factor in common with "
            f"{len(data)}, or pass a DataLoader with shuffle=True."
        )


_LEAST = {"outer_steps": 1, "inner_steps": 1, "warmup_steps": 0, "hessian_batches": 1, "max_failures": 1, "patience": 1}


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse counts and rates with which a run cannot go; looks only at those that are given.

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
