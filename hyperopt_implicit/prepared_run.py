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

from hyperopt_implicit.argument_checks import check_seed, check_switch, checked_callbacks, is_number, scheduler_of
from hyperopt_implicit.backend import Spec
from hyperopt_implicit.distributed import agree, is_first
from hyperopt_implicit.errors import HyperoptError
from hyperopt_implicit.guarded_step import OnFailure
from hyperopt_implicit.history import Callback, OuterStep, Result
from hyperopt_implicit.hyper_optimizer import HyperOptimizer
from hyperopt_implicit.interrupts import Interrupt
from hyperopt_implicit.messages import warn
from hyperopt_implicit.outer_loop import OuterLoop, Run
from hyperopt_implicit.problem import BilevelProblem
from hyperopt_implicit.randomness import random_states, replaying
from hyperopt_implicit.replicas import check_alike
from hyperopt_implicit.report import Report
from hyperopt_implicit.run_state import RunKeeper, identity_of
from hyperopt_implicit.tracking import RunTracker, Tracking

_WARM_UP_STEPS = 64  # between two moments at which a warm-up may be saved; training holds as many batches at most

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
    accumulate: int = 1
    inner_precision: str | None = None
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
        saved: whether its last step was saved.
        keeper: who saves it; None where nobody does.

    Raises:
        HyperoptError: the problem, the backend or an option cannot hold.
    """

    run: Run
    closed: bool = False
    saved: bool = False
    keeper: RunKeeper | None = None

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
            inner_precision=options.inner_precision,
            **lr,
        )
        if isinstance(problem.optimizer, torch.optim.LBFGS):
            raise HyperoptError(
                "the inner optimizer of a run must step by one gradient; LBFGS evaluates the loss again, by a closure. "
                "Take another, or train in a loop of your own with HyperOptimizer."
            )
        through_training = self.outer.backend.differentiates == "trajectory"
        self.outer.backend.check_steps(options.inner_steps if through_training else options.hessian_batches)
        if not through_training:
            taken = (options.warmup_steps, options.inner_steps, options.hessian_batches)
            _warn_of_batches_left_out(problem.training_data, *taken, options.accumulate)
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

    def begin(self, callbacks: Iterable[Callback], tracking: Tracking | bool, keeper: RunKeeper | None = None) -> None:
        """Look at the first batches, try both losses on them, and open the run that is tracked.

        A run that was saved is brought back instead, to where it stood.

        Args:
            callbacks: of the run.
            tracking: where it is tracked.
            keeper: who saves it, or has saved it.

        Raises:
            HyperoptError: what :func:`hyperopt_implicit.preflight.preflight` refuses, or there is a saved run that
                cannot be gone on with.
        """
        self.keeper = keeper
        try:
            self._begin(checked_callbacks(callbacks), tracking, keeper)
        except BaseException as error:
            self._let_go()
            if hasattr(self, "_tracker"):
                self._tracker.end(error)
            raise

    def _begin(self, callbacks: list[Callback], tracking: Tracking | bool, keeper: RunKeeper | None) -> None:
        options, problem, outer = self.options, self.problem, self.outer
        # a seed of its own gives each process random layers of its own
        check_alike(problem, outer.backend, {name: x for name, x in self._described.items() if name != "seed"})
        loop = OuterLoop(
            outer=outer,
            inner_steps=options.inner_steps,
            hessian_batches=options.hessian_batches,
            accumulate=options.accumulate,
            restart=options.restart,
            schedulers=[
                scheduler_of(name, make, optimizer)
                for name, make, optimizer in (
                    ("inner_scheduler", options.inner_scheduler, problem.optimizer),
                    ("outer_scheduler", options.outer_scheduler, outer.optimizer),
                )
                if make is not None
            ],
        )
        saved = None if keeper is None else keeper.found(identity_of(outer, self._described, loop.schedulers))
        self.run = Run(
            loop,
            patience=options.patience,
            min_delta=options.min_delta,
            keep_best_model=options.keep_best_model,
            max_failures=options.max_failures,
            callbacks=callbacks,
        )
        if keeper is not None:
            keeper.attach(self.run, callbacks, lambda: (self._tracker.run_id, self._tracker.token))
        if saved is not None and keeper is not None and keeper.bring_back(saved):
            outer.checked = True
        else:
            saved = None
            # the only point before training at which the data and both losses are touched
            outer.check(loop.training.peek(), loop.validation.peek())
        run_id, token = (None, None) if saved is None or keeper is None or keeper.lenient else saved.state["tracked"]
        reports = [each for each in callbacks if isinstance(each, Report)]
        self._tracker = RunTracker(
            tracking if is_first() else False,
            problem,
            outer.backend,
            self._described,
            reports,
            resume=run_id,
            history=self.run.history,
            token=token,
        )
        if keeper is not None:
            if saved is None:
                keeper.begin()
            else:
                keeper.bring_back_generators(saved)

    def go(
        self, shown: Callable[[OuterStep], None] = lambda record: None, interrupt: Interrupt | None = None
    ) -> Result:
        """All steps that are left, to the end.

        Args:
            shown: called with the record of each.
            interrupt: ends the run after a step where a signal asks for it.
        """
        try:
            self._warm_up(interrupt)
            for step in range(len(self.run.history), self.options.outer_steps):
                if self.run.stop_reason is not None:
                    break
                record = self.run.advance(step)
                self.log(record)
                shown(record)
                self.heed(interrupt)
                if self.keeper is not None and self.run.stop_reason is None:
                    self.keeper.after_step()
            if self.keeper is not None and (not self.keeper.lenient or self.run.stop_reason == "interrupted"):
                self.saved = self.keeper.save()  # what a search is told of at once need not be kept
        except BaseException as error:
            self.close(error)
            raise
        return self.close()

    def _warm_up(self, interrupt: Interrupt | None) -> None:
        """What is left of the warm-up: all at once, or in parts between which the run may be saved or ended."""
        steps = self.options.warmup_steps
        while self.run.warmed < steps and self.run.stop_reason is None:
            left = steps - self.run.warmed
            self.run.warm_up(left if self.keeper is None else min(left, _WARM_UP_STEPS))
            if self.keeper is not None:
                self.keeper.after_warm_up_steps()
            self.heed(interrupt)

    def heed(self, interrupt: Interrupt | None) -> None:
        """End the run after the present step where a signal asks for it and the run is not through."""
        if interrupt is None:
            return
        left = self.options.outer_steps - len(self.run.history)
        (requested,) = agree(any_=[interrupt.requested])  # a signal may reach one process before another
        if requested and left:
            self.run.stop_reason = self.run.stop_reason or "interrupted"

    @property
    def is_under_way(self) -> bool:
        """Whether steps were taken, in this process or in one before."""
        return bool(len(self.run.history) or self.run.warmed)

    def log(self, record: OuterStep) -> None:
        """Hand the record of a step to the tracker; returns at once."""
        self._tracker.log_step(record)

    def close(self, error: BaseException | None = None) -> Result:
        """What the run has come to; the tracked run is ended, as failed where there is an error.

        One that a signal has ended is marked as killed, without the figures and numbers of a whole run.
        """
        self.closed = True
        self._let_go()
        result = self.run.result()
        if error is None and result.stop_reason == "interrupted":
            self._tracker.interrupt()
            result.run_id, result.run_link = self._tracker.run_id, self._tracker.run_link
            return result
        self._tracker.close(result, error)
        result.run_id, result.run_link = self._tracker.run_id, self._tracker.run_link  # as known by now
        return result

    def _let_go(self) -> None:
        """Of the folder, for other processes, and of the data."""
        if self.keeper is not None:
            self.keeper.release()
        if hasattr(self, "run"):
            self.run.loop.training.close()
            self.run.loop.validation.close()


def _warn_of_batches_left_out(
    data: object, warmup_steps: int, inner_steps: int, hessian_batches: int, accumulate: int = 1
) -> None:
    """Inner steps and hypergradients take turns on one stream: on a list, each may meet some of the batches only."""
    if not isinstance(data, list | tuple) or type(data) not in (list, tuple):  # a subclass may iterate otherwise
        return
    warmup, inner, hessian = (steps * accumulate for steps in (warmup_steps, inner_steps, hessian_batches))
    period = inner + hessian
    common = math.gcd(len(data), period)  # a place is only ever met again at places that differ by a multiple of it
    trained = {(warmup + i) % common for i in range(inner)}
    differentiated = {(warmup + inner + i) % common for i in range(hessian)}
    counts = [len({id(x) for i, x in enumerate(data) if i % common in met}) for met in (trained, differentiated)]
    every = len({id(x) for x in data})
    if min(counts) < every:
        times = ", times accumulate" if accumulate > 1 else ""
        warn(
            f"training_data is a list of {len(data)} batches that is read in turn, and an outer step takes {period} of "
            f"them (inner_steps + hessian_batches{times}): of {every} different batches, training only ever sees "
            f"{counts[0]} and the hypergradient {counts[1]}. Choose inner_steps so that the sum has no factor in "
            f"common with {len(data) // math.gcd(len(data), accumulate)}, or pass a DataLoader with shuffle=True."
        )


_LEAST = {
    "outer_steps": 1, "inner_steps": 1, "warmup_steps": 0, "hessian_batches": 1, "accumulate": 1, "max_failures": 1,
    "patience": 1,
}  # fmt: skip


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse counts and rates with which a run cannot go; looks only at those that are given.

    Raises:
        HyperoptError: with the option, what it must be and what it is.
    """
    for name, value in options.items():
        if name in _LEAST and not (name == "patience" and value is None):
            if isinstance(value, bool) or not isinstance(value, int) or value < _LEAST[name]:
                raise HyperoptError(f"{name} must be a whole number of at least {_LEAST[name]}; got {value!r}.")
        elif name == "min_delta" and not (is_number(value) and value >= 0):
            raise HyperoptError(f"min_delta must be a number of at least 0; got {value!r}.")
        elif name == "outer_lr" and not (is_number(value) and value > 0):
            raise HyperoptError(f"outer_lr must be a positive number; got {value!r}.")
        elif name == "seed":
            check_seed(value, or_none=True)
        elif name in ("restart", "keep_best_model"):
            check_switch(name, value)
