"""All that determines how a run goes on, taken down between two steps and put back in another process.

How that is written to a folder is in ``checkpoint.py``; when it is done, in ``prepared_run.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from hyperopt_implicit.checkpoint import Checkpoints, Saved
from hyperopt_implicit.data import number_of_batches
from hyperopt_implicit.distributed import (
    broadcast_object,
    first_decides,
    gathered,
    is_first,
    rank,
    several,
    world_size,
)
from hyperopt_implicit.errors import CheckpointError, HyperoptError
from hyperopt_implicit.messages import warn
from hyperopt_implicit.randomness import AllGenerators

if TYPE_CHECKING:
    from hyperopt_implicit.history import Callback
    from hyperopt_implicit.hyper_optimizer import HyperOptimizer
    from hyperopt_implicit.outer_loop import Run

Result = TypeVar("Result")

_FORMAT = 1
_MAY_CHANGE = ("outer_steps", "patience", "min_delta", "max_failures", "on_failure")
_PARTS = {"torch": str, "threads": int, "tracked": list | tuple, "run": dict, "processes": list}
_SHOWN = 5  # differences at most in a message


class RunKeeper:
    """Saves a run as it goes, and brings back one that was saved.

    Args:
        checkpoints: where.
        resume: whether to go on with a run that has left checkpoints there; a new one begins where there are none.
        lenient: whether a run that cannot be brought back or saved begins anew, with a warning; else it is refused. It
            is tracked anew in either case, and not saved before its first step.
        goes_on: is told from which outer step on a run is gone on with.
        apart: what must be the same beside what :func:`identity_of` knows, as text by name.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        *,
        resume: bool,
        lenient: bool = False,
        goes_on: Callable[[int], None] = lambda steps: None,
        apart: Mapping[str, str] | None = None,
    ) -> None:
        self._apart = dict(apart or {})
        self._goes_on = goes_on
        self._checkpoints = checkpoints
        self._resume = resume
        self.lenient = lenient
        self._identity: dict[str, str] = {}
        self._writes = True

    @property
    def place(self) -> str:
        """The folder, in words."""
        return str(self._checkpoints.folder)

    def found(self, identity: Mapping[str, str]) -> Saved | None:
        """The run to go on with; None where a new one is to begin.

        Args:
            identity: what :func:`identity_of` gives for the run that asks.

        Raises:
            CheckpointError: there is one, and it must not be gone on with, or cannot.
        """
        self._identity = {**identity, **self._apart}
        return _from_first(self._found)

    def _found(self) -> Saved | None:
        if not self._resume:
            self._checkpoints.refuse_others()
            self._checkpoints.claim()
            return None
        if self.lenient and not self._checkpoints.folder.exists():
            return None  # most trials are over before they are saved, or are saved once
        try:
            self._checkpoints.claim()
        except CheckpointError as error:
            if not self.lenient:
                raise
            self._writes = False
            warn(f"begins anew and goes on without checkpoints: {error}")
            return None
        try:
            saved = self._checkpoints.newest()
            if saved is not None:
                _refuse_differences(saved, self._identity)
                if saved.state["threads"] != torch.get_num_threads() and not self.lenient:
                    warn(
                        f"{saved.path} was written with torch.get_num_threads() = {saved.state['threads']}, and that "
                        f"is {torch.get_num_threads()} now: the run goes on, but its last digits may differ from those "
                        "it would have had."
                    )
        except CheckpointError as error:
            if not self.lenient:
                raise
            self._begin_anew(error)
            return None
        return saved

    def _begin_anew(self, error: Exception) -> None:
        self._checkpoints.clear()
        warn(f"begins anew: {error}")

    def attach(
        self, run: Run, callbacks: Sequence[Callback], tracked: Callable[[], tuple[str | None, str | None]]
    ) -> None:
        """Name what is saved from now on.

        Args:
            run: before its first step.
            callbacks: those with ``state_dict`` and ``load_state_dict`` are saved with it.
            tracked: gives the id and the token of the tracked run, as far as they are known.
        """
        self._run, self._callbacks, self._tracked = run, list(callbacks), tracked
        problem = run.loop.problem
        holders: list[Any] = [problem.training_data, problem.validation_data]
        holders += [problem.loss_source(role) for role in ("training_loss", "validation_loss")]
        holders += [*problem.model.modules(), *problem.hyperparameters.modules()]
        self._generators = AllGenerators(problem.device, holders)
        run.loop.training.remember(self._generators)
        run.loop.validation.remember(self._generators)

    def bring_back(self, saved: Saved) -> bool:
        """Put the run into the state that was saved, all but the generators; says whether that was possible.

        Raises:
            CheckpointError: it does not fit, and the run is not to begin anew for that.
        """
        generators = self._generators.states()
        before = copy.deepcopy(self._run.state_dict()) if self.lenient else None
        try:
            try:
                self._bring_back(saved)
            except (KeyError, RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
                raise CheckpointError(
                    f"a run is resumed with the model, optimizers, schedulers, data and callbacks that it was begun "
                    f"with; {saved.path} does not fit these: {' '.join(str(error).split())[:300]}. Put them back, or "
                    "begin a new run in another folder."
                ) from error
        except HyperoptError as error:
            if before is None:
                raise
            self._run.load_state_dict(before)
            self._generators.put_back(generators)
            self._begin_anew(error)
            return False
        return True

    def _bring_back(self, saved: Saved) -> None:
        own = saved.state["processes"][rank() % len(saved.state["processes"])]
        run = {**saved.state["run"], "loop": {**saved.state["run"]["loop"], **own["streams"]}}
        self._run.load_state_dict(run)
        self._generators.put_back(own["generators"])  # which is done again; here it can still be refused
        waiting = list(self._callbacks)
        for kind, state in saved.state["callbacks"]:
            same = (each for each in waiting if type(each).__qualname__ == kind)
            callback = next(same, None)
            if callback is not None:
                waiting.remove(callback)
            if state is None:
                continue
            load = getattr(callback, "load_state_dict", None)
            if callable(load):
                load(state)
            else:
                warn(
                    f"{saved.path} holds the state of a callback {kind}, and none of the callbacks takes it: the run "
                    "goes on without. Pass the callbacks with which it was begun."
                )
        self._goes_on(len(self._run.history))

    def bring_back_generators(self, saved: Saved) -> None:
        """Put all generators to where they stood; the last thing before the run goes on."""
        own = saved.state["processes"][rank() % len(saved.state["processes"])]
        self._generators.put_back(own["generators"])

    def begin(self) -> None:
        """Save the run before its first step.

        Raises:
            CheckpointError: it cannot be saved.
        """
        if not self.lenient:
            state = self.state()
            _from_first(lambda: self._checkpoints.begin(state))

    def release(self) -> None:
        """Let other processes go on with the run."""
        self._checkpoints.release()

    def after_step(self) -> None:
        """Save the run where it is time to."""
        if self.is_due():
            self.save()

    def after_warm_up_steps(self) -> None:
        """Save the run in the course of its warm-up, where it is time to and its weights are sound."""
        if self._writes and self._run.is_good and first_decides(self._checkpoints.is_due_by_time()):
            self.save()

    def save(self) -> bool:
        """Save the run as it is now; whether that was possible. Among several processes the first one writes."""
        if not self._writes:
            return False
        state = self.state()
        return first_decides(is_first() and self._checkpoints.save(state, len(self._run.history)))

    def is_due(self) -> bool:
        """Whether it is time to save, after an outer step."""
        return self._writes and first_decides(self._checkpoints.is_due(len(self._run.history)))

    def state(self) -> dict[str, Any]:
        """What is saved; for the first of several processes, with what each of them has by itself."""
        run = self._run.state_dict()
        own = {
            "streams": {name: run["loop"].pop(name) for name in ("training", "validation")},
            "generators": self._generators.states(),
        }
        states = [getattr(each, "state_dict", None) for each in self._callbacks]
        return {
            "format": _FORMAT,
            "torch": str(torch.__version__),
            "threads": torch.get_num_threads(),
            "identity": self._identity,
            "tracked": self._tracked(),
            "run": run,
            "callbacks": [
                (type(each).__qualname__, state() if callable(state) else None)
                for each, state in zip(self._callbacks, states, strict=True)
            ],
            "processes": gathered(own) or [own],
        }


def _from_first(call: Callable[[], Result]) -> Result:
    """What a call gives in the first of several processes, or the error that it raises there; the others do not call.

    Raises:
        CheckpointError: what the first one has raised.
    """
    outcome: Result | CheckpointError | None = None
    if is_first():
        try:
            outcome = call()
        except CheckpointError as error:
            if not several():
                raise
            outcome = error
    told: Any = broadcast_object(outcome)
    if isinstance(told, CheckpointError):
        raise told
    return cast(Result, told)


def identity_of(
    outer: HyperOptimizer, options: Mapping[str, Any], schedulers: Sequence[LRScheduler] = ()
) -> dict[str, str]:
    """What must be the same for a run to be gone on with, as text by name; taken before the first step."""
    problem = outer.problem
    found = {name: repr(value) for name, value in options.items() if name not in _MAY_CHANGE}
    found["backend"] = repr(outer.backend)
    for name, p in problem.params.items():
        found[f"parameter {name}"] = _kind(p)
    for name, p in problem.hparams.items():
        found[f"hyperparameter {name}"] = _kind(p)
    for name, buffer in problem.model.named_buffers():
        found[f"buffer {name}"] = _kind(buffer)
    found["default dtype"] = str(torch.get_default_dtype()).removeprefix("torch.")
    for i, each in enumerate(schedulers):
        found[f"scheduler {i}"] = f"{type(each).__name__}({', '.join(_settings(each))})"
    tuned = problem.hyperparameters.names("optimizer")
    for role, optimizer in (("inner", problem.optimizer), ("outer", outer.optimizer)):
        found[f"{role} optimizer"] = type(optimizer).__name__
        for i, group in enumerate(optimizer.param_groups):
            for key, value in group.items():
                if key not in tuned and isinstance(value, int | float | str | tuple | None):
                    found[f"{key} of the {role} optimizer" + (f", group {i}" if i else "")] = repr(value)
    for role in ("training_data", "validation_data"):
        data = getattr(problem, role)
        found[f"batches of {role}"] = str(None if data is None else number_of_batches(data))
    return found


def _settings(scheduler: LRScheduler) -> Iterator[str]:
    """The options of a scheduler; rates are those of its optimizer, and places in the schedule are no options."""
    for name, value in vars(scheduler).items():
        values = value if isinstance(value, list | tuple) else [value]
        plain = all(isinstance(x, int | float | str | None) for x in values)
        if plain and not name.startswith("_") and name not in ("base_lrs", "last_epoch", "optimizer"):
            yield f"{name}={value!r}"


def _kind(p: Tensor) -> str:
    return f"{str(p.dtype).removeprefix('torch.')} {list(p.shape)}"


def _refuse_differences(saved: Saved, now: Mapping[str, str]) -> None:
    """Refuse a checkpoint of something else.

    Raises:
        CheckpointError: with the differences.

    Warns:
        HyperoptWarning: it was saved with another version of torch.
    """
    state = saved.state
    if state.get("format") != _FORMAT or not isinstance(state.get("identity"), dict):
        raise CheckpointError(
            f"a checkpoint must be one of hyperopt_implicit.optimize, in format {_FORMAT}; {saved.path} has format "
            f"{state.get('format')!r}. Resume it with the version that wrote it, or name another folder."
        )
    missing = [name for name, kind in _PARTS.items() if not isinstance(state.get(name), kind) or not state[name]]
    missing += [] if "callbacks" in state else ["callbacks"]
    if missing:
        raise CheckpointError(
            f"a checkpoint must hold all of a run; {saved.path} is without {', '.join(missing)}. Remove it, and the "
            "one before is used, or name another folder."
        )
    before: dict[str, str] = dict(state["identity"])
    processes = len(state["processes"])
    if processes != world_size():
        shares = [name for name in before if name.startswith("batches of ")]
        now = {name: value for name, value in now.items() if name not in shares}
        before = {name: value for name, value in before.items() if name not in shares}
        warn(
            f"{saved.path} was saved by {processes} processes, and there are {world_size()}: the run goes on from the "
            "same place in each pass, but with batches that are shared out otherwise."
        )
    names = [*before, *(name for name in now if name not in before)]
    differences = [
        f"{name} was {before.get(name, 'not there')}, now {now.get(name, 'not there')}"
        for name in names
        if before.get(name) != now.get(name)
    ]
    if differences:
        more = f" and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise CheckpointError(
            f"a run is resumed with the settings that it was begun with; that in {saved.path.parent} differs: "
            f"{'; '.join(differences[:_SHOWN])}{more}. Put them back, or begin a new run in another folder."
        )
    if state["torch"] != torch.__version__:
        warn(
            f"{saved.path} was written with torch {state['torch']}, and this is {torch.__version__}: the run goes on, "
            "but its last digits may differ from those it would have had."
        )
