"""``optimize``: the whole run, from checking the options to the result.

How a run is checked, made ready and closed is in ``prepared_run.py``; what one outer step does, in ``outer_loop.py``;
what a hypergradient is, and when it may move the hyperparameters, in ``hyper_optimizer.py``; what becomes of the
records, in ``tracking.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from hyperopt_implicit.argument_checks import check_switch
from hyperopt_implicit.backend import Spec
from hyperopt_implicit.checkpoint import Checkpoints
from hyperopt_implicit.distributed import is_first
from hyperopt_implicit.errors import HyperoptError
from hyperopt_implicit.guarded_step import OnFailure
from hyperopt_implicit.history import Callback, Result
from hyperopt_implicit.interrupts import Interrupt, listening
from hyperopt_implicit.prepared_run import PreparedRun, RunOptions, Scheduler
from hyperopt_implicit.problem import BilevelProblem
from hyperopt_implicit.progress import ProgressBar
from hyperopt_implicit.run_state import RunKeeper
from hyperopt_implicit.tracking import Tracking


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
    accumulate: int = 1,
    inner_precision: str | None = None,
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
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
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
        accumulate: so many consecutive batches of the training data are the micro-batches of one, for an inner step and
            for a hypergradient: the mean of their losses, and one step of the optimizer (:class:`MicroBatches`).
        inner_precision: ``"bfloat16"`` or ``"float16"``: the training loss of inner steps runs under torch's autocast,
            for float16 scaled by torch's GradScaler; weights stay in float32. A backend that differentiates through
            training does so through these steps; all else of a hypergradient is in the model's own precision.
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
        checkpoint: folder for the checkpoints of this run, the last three of which are kept. With it, SIGINT and
            SIGTERM let the present outer step end and save before KeyboardInterrupt is raised.
        checkpoint_every: save after so many outer steps; None saves as often as costs less than a hundredth of the
            time, and every ten seconds at most.
        resume: go on with the run that has left checkpoints in the folder, as if it had never stopped; where there are
            none, begin. Without, a folder with checkpoints is refused.

    Returns:
        Final and best hyperparameters, the history and why it stopped.

    Raises:
        HyperoptError: the problem, the backend or an option cannot hold; found before any training.
        CheckpointError: the folder has the checkpoints of another run, none that is whole, or cannot be written to.
        HypergradientError: a failure during the run, with ``on_failure="raise"``.
        KeyboardInterrupt: a signal has ended the run, and it was saved.

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
    options = RunOptions(
        outer_steps=outer_steps,
        inner_steps=inner_steps,
        warmup_steps=warmup_steps,
        outer_optimizer=outer_optimizer,
        outer_lr=outer_lr,
        clip=clip,
        hessian_batches=hessian_batches,
        accumulate=accumulate,
        inner_precision=inner_precision,
        restart=restart,
        inner_scheduler=inner_scheduler,
        outer_scheduler=outer_scheduler,
        patience=patience,
        min_delta=min_delta,
        keep_best_model=keep_best_model,
        on_failure=on_failure,
        max_failures=max_failures,
    )
    keeper = _keeper(checkpoint, checkpoint_every, resume)
    if keeper is None:
        return run_alone(
            problem, backend, options, seed=seed, callbacks=callbacks, progress=progress, tracking=tracking
        )
    message = "saving after this outer step; interrupt again to leave at once"
    with listening(message if is_first() else None) as interrupt:
        prepared = PreparedRun(problem, backend, options, seed)
        result = _run(prepared, callbacks, progress, tracking, keeper, interrupt)
    if result.stop_reason == "interrupted":
        raise KeyboardInterrupt(_how_to_go_on(len(result.history), keeper.place, saved=prepared.saved))
    return result


def run_alone(
    problem: BilevelProblem,
    backend: Spec,
    options: RunOptions,
    *,
    seed: int | None,
    callbacks: Iterable[Callback],
    progress: bool | None,
    tracking: Tracking | bool,
    keeper: RunKeeper | None = None,
    interrupt: Interrupt | None = None,
) -> Result:
    """One run, as :func:`optimize` has it; where a signal has ended it, its result says so.

    Args:
        problem: see :func:`optimize`, as for all up to ``tracking``.
        backend: the same.
        options: the same.
        seed: the same.
        callbacks: the same.
        progress: the same.
        tracking: the same.
        keeper: who saves the run, or has saved it.
        interrupt: what a signal has asked for.
    """
    return _run(PreparedRun(problem, backend, options, seed), callbacks, progress, tracking, keeper, interrupt)


def _run(
    prepared: PreparedRun,
    callbacks: Iterable[Callback],
    progress: bool | None,
    tracking: Tracking | bool,
    keeper: RunKeeper | None,
    interrupt: Interrupt | None,
) -> Result:
    with prepared.seeded():
        prepared.begin(callbacks, tracking, keeper)
        done = len(prepared.run.history)
        with ProgressBar(prepared.options.outer_steps, progress if is_first() else False, done=done) as bar:
            return prepared.go(bar.update, interrupt)


def _keeper(checkpoint: str | Path | None, every: int | None, resume: bool) -> RunKeeper | None:
    check_switch("resume", resume)
    if checkpoint is not None:
        return RunKeeper(Checkpoints(checkpoint, every=every), resume=resume)
    for name, given in (("checkpoint_every", every is not None), ("resume", resume)):
        if given:
            raise HyperoptError(f"{name} needs the folder of the checkpoints; pass checkpoint= as well.")
    return None


def _how_to_go_on(steps: int, place: str, *, saved: bool) -> str:
    if saved:
        return f"the run was interrupted after {steps} outer steps and saved in {place}; go on with resume=True"
    return (
        f"the run was interrupted after {steps} outer steps and could not be saved; its last checkpoint is in {place}, "
        "go on from there with resume=True"
    )
