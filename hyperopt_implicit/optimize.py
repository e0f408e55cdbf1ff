"""``optimize``: the whole run, from checking the options to the result.

What one outer step does is in ``outer_loop.py``; what a hypergradient is, and when it may move the hyperparameters, in
``hyper_optimizer.py``; what becomes of the records, in ``tracking.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from hyperopt_implicit.backend import Spec
from hyperopt_implicit.errors import HyperoptError
from hyperopt_implicit.guarded_step import OnFailure
from hyperopt_implicit.history import Callback, Result
from hyperopt_implicit.hyper_optimizer import HyperOptimizer
from hyperopt_implicit.messages import warn
from hyperopt_implicit.outer_loop import OuterLoop, Run
from hyperopt_implicit.problem import BilevelProblem
from hyperopt_implicit.progress import ProgressBar
from hyperopt_implicit.randomness import random_states, replaying
from hyperopt_implicit.report import Report
from hyperopt_implicit.tracking import RunTracker, Tracking

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

    Inner steps do not wait for the device: their losses are read together, once in up to 64 steps (fewer where batches
    are large), and the numbers of a record once an outer step; those of backends that differentiate through training
    do, once a step. An inner step whose loss is not finite is left out all the same: the steps that were read together
    with it are then taken again, one by one, with the same random numbers of torch, so that a training loss may be
    called twice on a batch.

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
        outer_lr: learning rate of the outer optimizer, where that is given as a class.
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
        seed: seed of torch's generators during the run, on all devices; they are put back afterwards. None leaves them
            alone.
        callbacks: called with each :class:`OuterStep` and the problem; returning True ends the run. What a
            :class:`Report` among them has to show goes into the MLflow run.
        progress: draw a progress bar; None draws on a terminal only, and elsewhere writes what the backend decided for
            itself to stderr, a line each; False keeps silent about that as well.
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
    through_training = outer.backend.differentiates == "trajectory"
    outer.backend.check_steps(inner_steps if through_training else hessian_batches)
    if not through_training:
        _warn_of_batches_left_out(problem.training_data, warmup_steps, inner_steps, hessian_batches)
    described = {**options, "outer_optimizer": type(outer.optimizer).__name__}
    described["outer_lr"] = outer.optimizer.param_groups[0].get("lr")  # a callable has its own
    with _seeded(seed, problem.device):
        loop = OuterLoop(
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
        callbacks = list(callbacks)
        reports = [each for each in callbacks if isinstance(each, Report)]
        tracker = RunTracker(tracking, problem, outer.backend, described, reports)
        run = Run(
            loop,
            patience=patience,
            min_delta=min_delta,
            keep_best_model=keep_best_model,
            max_failures=max_failures,
            callbacks=callbacks,
        )
        try:
            with ProgressBar(outer_steps, progress) as bar:
                run.warm_up(warmup_steps)
                for step in range(outer_steps):
                    record = run.advance(step)
                    tracker.log_step(record)
                    bar.update(record)
                    if run.stop_reason is not None:
                        break
        except BaseException as error:
            tracker.close(run.result(), error)
            raise
        result = run.result()
        result.run_id, result.run_link = tracker.run_id, tracker.run_link
        tracker.close(result)
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


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    with replaying(random_states(device), device):
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
