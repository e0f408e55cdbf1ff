"""``optimize_population``: many runs at once, as one vectorised computation where their problems allow it.

Which of them can be put together is decided in ``alike.py`` and ``population_check.py``, whether it pays in
``population_choice.py``; what they then do is in ``population_run.py``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from hyperopt_implicit.alike import describe, difference, explained
from hyperopt_implicit.argument_checks import check_list
from hyperopt_implicit.backend import Backend, Spec, get_backend
from hyperopt_implicit.distributed import several, world_size
from hyperopt_implicit.errors import DistributedError, HypergradientError, HyperoptError, LossError
from hyperopt_implicit.history import Callback, Result
from hyperopt_implicit.implicit import ImplicitBackend
from hyperopt_implicit.interrupts import Interrupt
from hyperopt_implicit.members import UnvectorisableError
from hyperopt_implicit.members_batches import Generators, structure
from hyperopt_implicit.population_check import check_members
from hyperopt_implicit.population_choice import measured_speedup
from hyperopt_implicit.population_run import PopulationRun
from hyperopt_implicit.prepared_run import PreparedRun, RunOptions
from hyperopt_implicit.problem import BilevelProblem, check_problem
from hyperopt_implicit.randomness import random_states, replaying
from hyperopt_implicit.run_state import RunKeeper
from hyperopt_implicit.tracking import Tracking

Outcome = Result | Exception

_LEAST_SPEEDUP = 1.05  # below that, a computation for all of them is not worth its memory


@dataclass
class Population:
    """What :func:`optimize_population` returns.

    Attributes:
        outcomes: of each member, in order: its result, or the error with which it failed.
        groups: which members were trained together, by position; those that ran by themselves are groups of one.
        notes: why members ran one by one, or apart from others, a sentence each.
        speedup: how many times faster one computation was measured to be, where that was asked for.
    """

    outcomes: list[Outcome]
    groups: list[list[int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    speedup: float | None = None


def optimize_population(
    problems: Sequence[BilevelProblem],
    backend: Spec = "neumann",
    *,
    seeds: Sequence[int | None] | None = None,
    callbacks: Sequence[Iterable[Callback]] = (),
    tracking: Sequence[Tracking | bool] | Tracking | bool = False,
    knobs: Sequence[Mapping[str, Any]] = (),
    vectorise: Literal["auto", "always"] = "always",
    compile: bool = False,
    **options: Any,
) -> Population:
    """Train many problems of one kind, each with its own hyperparameters, as one vectorised computation.

    Every member has its own weights, hyperparameters, optimizers, seed, hypergradients and callbacks, and comes to the
    same result as with :func:`optimize` alone, up to rounding. What differs between members may be the values of
    tensors and numbers of the inner optimizer (learning rate, momentum, decay); members that differ otherwise, in the
    width of a layer or in a number that a loss uses, are put into groups. A member that is stopped by a callback or by
    ``patience`` leaves, and the others go on. What cannot be vectorised runs one by one, and a note says why.

    Args:
        problems: the members, each with a model of its own.
        backend: as for :func:`optimize`; ``neumann``, ``cg``, ``heavy_ball`` and ``identity`` can be vectorised.
        seeds: one a member.
        callbacks: a row of them for each member.
        tracking: for all members, or one for each.
        knobs: what each problem was built with, by name, so that notes can tell which of them makes a difference.
        vectorise: ``"always"`` where it can be done, or ``"auto"``: only where a short measurement says that it pays.
        compile: compile the vectorised computation.
        **options: those of :func:`optimize`, the same for all members.

    Raises:
        HyperoptError: what :func:`optimize` raises before training, for any member; a loss that is not finite at the
            start only fails its own member.

    Example:
        >>> import torch, hyperopt_implicit as hi
        >>> @hi.hyperparameter("shift", init=0.0)
        ... def training_loss(model, batch, *, shift):
        ...     return ((model.weight - shift) ** 2).sum()
        >>> def problem(lr):
        ...     return hi.BilevelProblem(
        ...         torch.nn.Linear(1, 1, bias=False), training_loss,
        ...         lambda model, batch: ((model.weight - 2.0) ** 2).sum(),
        ...         training_data=[0], validation_data=[0], optimizer=lambda params: torch.optim.SGD(params, lr=lr))
        >>> found = hi.optimize_population([problem(0.3), problem(0.5)], "cg", outer_steps=200, outer_lr=0.1)
        >>> [round(each.hyperparameters["shift"].item(), 2) for each in found.outcomes], found.groups
        ([2.0, 2.0], [[0, 1]])
    """
    if several():
        raise DistributedError(
            "optimize_population trains its members within one process; this one is among the "
            f"{world_size()} of a torch.distributed group. Call it without a group, or train the problems one by one "
            "with optimize, which shares each batch among the processes."
        )
    if vectorise not in ("auto", "always"):
        raise HyperoptError(f"vectorise must be 'auto' or 'always'; got {vectorise!r}.")
    check_list("problems", problems, "BilevelProblems")
    for each in problems:
        check_problem(each)
    count = len(problems)
    own_seeds = _one_each("seeds", seeds, count, None)
    own_callbacks = _one_each("callbacks", _given(callbacks), count, ())
    each_tracking = tracking if isinstance(tracking, Sequence) else [tracking] * count
    own_tracking = _one_each("tracking", each_tracking, count, False)
    _one_each("knobs", _given(knobs), count, {})
    _check_models(problems)
    return run_together(
        problems,
        backend,
        RunOptions(**options),
        seeds=own_seeds,
        callbacks=own_callbacks,
        tracking=own_tracking,
        knobs=knobs,
        vectorise=vectorise,
        compile=compile,
    )


def run_together(
    problems: Sequence[BilevelProblem],
    backend: Spec,
    options: RunOptions,
    *,
    seeds: Sequence[int | None],
    callbacks: Sequence[Iterable[Callback]],
    tracking: Sequence[Tracking | bool],
    knobs: Sequence[Mapping[str, Any]],
    vectorise: str,
    compile: bool,
    keepers: Sequence[RunKeeper | None] = (),
    interrupt: Interrupt | None = None,
) -> Population:
    """Many runs, as :func:`optimize_population` has them. One that was saved is gone on with by itself.

    Args:
        problems: see :func:`optimize_population`, as for all up to ``compile``.
        backend: the same.
        options: the same.
        seeds: one a member.
        callbacks: the same.
        tracking: the same.
        knobs: the same, or none.
        vectorise: the same.
        compile: the same.
        keepers: who saves each member, or has saved it.
        interrupt: what a signal has asked for.
    """
    chosen = get_backend(backend)  # once: looking for what is installed takes longer than all the rest
    runs = [PreparedRun(problem, chosen, options, seed) for problem, seed in zip(problems, seeds, strict=True)]
    own_keepers = keepers or [None] * len(runs)
    found = Population([])
    outcomes: dict[int, Outcome] = {}
    states: dict[int, list[Tensor] | None] = {}
    with _generators(seeds, problems), _unhurried():
        begun: list[int] = []
        try:
            for i, run in enumerate(runs):
                with run.seeded():
                    try:
                        run.begin(callbacks[i], tracking[i], own_keepers[i])
                        begun.append(i)
                    except (LossError, HypergradientError) as error:
                        outcomes[i] = error
                        found.groups.append([i])
                    states[i] = None if seeds[i] is None else random_states(run.problem.device)
            fresh = [i for i in begun if not runs[i].is_under_way]
            resumed = [[i] for i in begun if runs[i].is_under_way]
            for group in (*_grouped(fresh, runs, found, knobs), *resumed):
                _train(group, runs, states, outcomes, found, vectorise, compile, interrupt)
        except BaseException as error:
            for i in begun:
                if i not in outcomes and not runs[i].closed:
                    runs[i].close(error)
            raise
    found.outcomes = [outcomes[i] for i in range(len(runs))]
    found.groups.sort()
    return found


def _train(
    group: list[int],
    runs: Sequence[PreparedRun],
    states: Mapping[int, list[Tensor] | None],
    outcomes: dict[int, Outcome],
    found: Population,
    vectorise: str,
    compile: bool,
    interrupt: Interrupt | None,
) -> None:
    """Train members that are alike: together where that can be done, one by one elsewhere."""
    chosen = [runs[i] for i in group]
    device = chosen[0].problem.device
    if len(group) > 1:
        try:
            _check_steps(chosen[0].options)
            backend = _backend_of_many([each.outer.backend for each in chosen], [each.problem for each in chosen])
            generators = Generators([states[i] for i in group], device)
            together = PopulationRun(chosen, backend, generators, compile=compile)
            try:
                training, validation = together.peek()
                draws = check_members(together.members, training, validation)
                if vectorise == "auto":
                    found.speedup = measured_speedup(
                        together.members, training, together.inner_steps, together.outer_steps
                    )
                    if found.speedup < _LEAST_SPEEDUP:
                        raise UnvectorisableError(
                            f"one computation for all {len(group)} of them would be {found.speedup:.2g} times as fast"
                        )
            except UnvectorisableError:
                together.dissolve()
                raise
            if draws:
                found.notes.append(
                    "a loss draws random numbers (dropout): each member draws its own, which are others than alone"
                )
        except UnvectorisableError as error:
            found.notes.append(f"members ran one by one: {error}")
        else:
            together.go(interrupt)
            outcomes.update((group[place], outcome) for place, outcome in together.outcomes.items())
            found.groups.append(list(group))
            return
    for i in group:
        with Generators([states[i]], device).of(0):
            try:
                outcomes[i] = runs[i].go(interrupt=interrupt)
            except (LossError, HypergradientError) as error:
                outcomes[i] = error
        found.groups.append([i])


def _grouped(
    begun: Sequence[int], runs: Sequence[PreparedRun], found: Population, knobs: Sequence[Mapping[str, Any]]
) -> list[list[int]]:
    """Members that can share a computation, together; in the notes, what keeps the others apart."""
    groups: list[list[int]] = []
    described: list[Any] = []
    apart: list[str] = []
    for i in begun:
        own = describe(runs[i].problem)
        own |= {f"{key} of the batches": x for key, x in _batches(runs[i]).items()}
        reasons = [difference(other, own) for other in described]
        place = next((k for k, reason in enumerate(reasons) if reason is None), None)
        if place is None:
            apart += [reason for reason in reasons[:1] if reason is not None]
            groups.append([i])
            described.append(own)
        else:
            groups[place].append(i)
    if apart:
        found.notes.append(explained(apart[0], groups, knobs))
    return groups


def _batches(run: PreparedRun) -> dict[str, Any]:
    loop = run.run.loop
    return {"training": structure(loop.training.peek()), "validation": structure(loop.validation.peek())}


def _check_steps(options: RunOptions) -> None:
    """Whether inner steps can be taken for many members.

    Raises:
        UnvectorisableError: they cannot, and why.
    """
    for name, usual in (("accumulate", 1), ("inner_precision", None)):
        if (value := getattr(options, name)) != usual:
            raise UnvectorisableError(f"{name}={value!r} has no form for many members")


def _backend_of_many(backends: Sequence[Backend], problems: Sequence[BilevelProblem]) -> ImplicitBackend:
    """The backend of all members, as one that can solve for many.

    Raises:
        UnvectorisableError: it cannot, and why.
    """
    backend = backends[0]
    name = type(backend).__name__
    if any(each != backend for each in backends):
        raise UnvectorisableError(f"backend {name} is another one for some of the problems")
    if backend.differentiates == "trajectory":
        raise UnvectorisableError(f"backend {name} differentiates through training, step by step")
    if not isinstance(backend, ImplicitBackend):
        raise UnvectorisableError(f"backend {name} has no solver for many members")
    if backend.precision != "full":
        raise UnvectorisableError(f"precision={backend.precision!r} has no form for many members")
    if backend.curvature != "hessian":
        raise UnvectorisableError(f"curvature={backend.curvature!r} has no form for many members")
    if backend.members_solver(problems) is None or not _is_current(type(backend)):
        raise UnvectorisableError(f"backend {backend!r} has no solver for many members")
    return backend


def _is_current(kind: type[Backend]) -> bool:
    """Whether the solver for many members belongs to the class that says how one is solved for."""
    places = {name: i for i, each in reversed(list(enumerate(kind.__mro__))) for name in vars(each)}
    ours = ("hypergradient", "solve", "solve_scaled", "solver", "linearise", "damped", "differentiate")
    return all(places["members_solver"] <= places[name] for name in ours if name in places)


def _check_models(problems: Sequence[BilevelProblem]) -> None:
    """Refuse problems that train the same tensors.

    Raises:
        HyperoptError: with the positions.
    """
    owners: dict[int, int] = {}
    for i, problem in enumerate(problems):
        for p in (*problem.params.values(), *problem.hparams.values()):
            other = owners.setdefault(id(p), i)
            if other != i:
                raise HyperoptError(
                    f"each problem of a population must have a model of its own; problems {other} and {i} train the "
                    "same tensors. Build the model in the function that builds the problem."
                )


def _given(value: Any) -> Any:
    """None where nothing was given."""
    return None if isinstance(value, list | tuple) and not value else value


def _one_each(name: str, given: Sequence[Any] | None, count: int, default: Any) -> list[Any]:
    if given is None:
        return [default] * count
    check_list(name, given, "entries, one for each problem")
    if len(given) != count:
        raise HyperoptError(f"{name} must have one entry for each of the {count} problems; it has {len(given)}.")
    return list(given)


@contextmanager
def _generators(seeds: Sequence[int | None], problems: Sequence[BilevelProblem]) -> Iterator[None]:
    """Inside, what members draw together follows from the first seed there is; as they stand where there is none."""
    first = next((seed for seed in seeds if seed is not None), None)
    if first is None or not problems:
        yield
        return
    device = problems[0].device
    with replaying(random_states(device), device):
        torch.manual_seed(first)
        yield


@contextmanager
def _unhurried() -> Iterator[None]:
    """Inside, torch does not warn of operators that it takes for one member after another; results are the same."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        yield
