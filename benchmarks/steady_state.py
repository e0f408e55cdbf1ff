"""What a hypergradient costs in the course of training, and how wrong it is: state carried from step to step.

Every method is run at the same weights and hyperparameters, along one run of training: 10 inner steps, then a
hypergradient by each method in turn, then a step of Adam (learning rate 0.01) along the exact one. One g is a warm
forward and backward of the training loss. The page is assembled by ``steady_state_page.py``.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from problems import Case

import hyperopt_implicit as hi
from hyperopt_implicit.errors import HyperoptWarning
from hyperopt_implicit.operators import Hessian, validation_gradients
from hyperopt_implicit.spectrum import largest_eigenvalue
from hyperopt_implicit.vectors import Params, add, norm

INNER_STEPS, WARM_UP = 10, 200
TOLERANCE = 0.01  # the error that is aimed at


@dataclass
class Run:
    """What one method did along a run.

    Attributes:
        costs: of each call, in g.
        errors: relative, of each hypergradient.
        products: of each call.
        note: what the method said of itself last.
    """

    costs: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    products: list[int] = field(default_factory=list)
    note: str | None = None

    @property
    def cost(self) -> float:
        """The median over the second half."""
        return statistics.median(self.costs[len(self.costs) // 2 :])

    @property
    def mean_cost(self) -> float:
        """The mean over the whole run, first calls and checks included."""
        return statistics.fmean(self.costs)

    @property
    def error(self) -> float:
        """The median over the second half."""
        return statistics.median(self.errors[len(self.errors) // 2 :])


def seconds_of(call: Callable[[], object]) -> float:
    started = time.thread_time()
    call()
    return time.thread_time() - started


def along_training(
    case: Case, methods: dict[str, dict[str, Any]], outer_steps: int, damping: float, batch_size: int | None = None
) -> dict[str, Run]:
    """Each method's calls along one run of training.

    Args:
        case: the problem.
        methods: by the label to be shown, each as a backend's name and options.
        outer_steps: how many.
        damping: of the system that the exact answer solves; methods get it as well, unless they have their own.
        batch_size: draw mini-batches of so many rows for everything but the exact answer; all the data where None.
    """
    problem = case.make()
    x, y = case.training_batch
    generator = torch.Generator().manual_seed(3)
    if batch_size is not None:
        problem.training_data = [case.training_batch] * 2  # more than one batch, as a loader would have

    def draw() -> Any:
        if batch_size is None:
            return case.training_batch
        chosen = torch.randperm(len(x), generator=generator)[:batch_size]
        return x[chosen], y[chosen]

    def train(steps: int) -> None:
        values = problem.hyperparameters.values()
        for _ in range(steps):
            hi.inner_loop.train_step(problem, draw(), values)

    backends = {label: hi.get_backend({"damping": damping, **spec}) for label, spec in methods.items()}
    exact = hi.get_backend("cg", tolerance=1e-7, max_iterations=500, damping=damping)
    states: dict[str, Any] = {label: {} for label in methods} | {"exact": {}}
    runs = {label: Run() for label in methods}
    train(WARM_UP * (2 if batch_size is not None else 1))
    outer = torch.optim.Adam(list(problem.hparams.values()), lr=1e-2)
    params = list(problem.params.values())
    gradient_seconds = []
    for _ in range(outer_steps):
        train(INNER_STEPS)
        values = problem.hyperparameters.values()
        truth = exact.hypergradient(problem, [case.training_batch], case.validation_batch, states["exact"])
        states["exact"] = truth.state
        batch = draw()

        def gradient(batch: Any = batch, values: dict[str, Any] = values) -> None:
            loss = case.training_loss(problem.model, batch, **values)
            torch.autograd.grad(loss, params, allow_unused=True)

        gradient()
        gradient_seconds.append(seconds_of(gradient))
        for label, backend in backends.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", HyperoptWarning)  # of an indefinite problem, which is meant to be
                started = time.thread_time()
                result = backend.hypergradient(problem, [batch], case.validation_batch, states[label])
                elapsed = time.thread_time() - started
            states[label] = result.state
            runs[label].costs.append(elapsed)
            runs[label].errors.append(_error(result.gradients, truth.gradients))
            runs[label].products.append(result.hvps)
            runs[label].note = result.note
        for name, p in problem.hparams.items():
            p.grad = truth.gradients[name].clone()
        outer.step()
    g = statistics.median(gradient_seconds)
    for run in runs.values():
        run.costs = [seconds / g for seconds in run.costs]
    return runs


def cold(case: Case, most: int = 80) -> dict[str, tuple[int, float] | None]:
    """The terms or iterations with which ``neumann`` and ``cg`` come within the tolerance from nothing, and their cost.

    The cost is that of the whole hypergradient, in g; None where ``most`` are too few.
    """
    problem = case.make()
    values = problem.hyperparameters.values()
    for _ in range(WARM_UP):
        hi.inner_loop.train_step(problem, case.training_batch, values)
    batches, held_out = [case.training_batch], case.validation_batch
    truth = hi.get_backend("cg", tolerance=1e-7, max_iterations=500, damping=case.damping)
    exact = truth.hypergradient(problem, batches, held_out, {}).gradients
    hessian = Hessian(problem, batches)
    _, vector, _ = validation_gradients(problem, held_out)
    step_size = 1.0 / (largest_eigenvalue(hessian, vector, {})[0] + case.damping)
    params = list(problem.params.values())
    g = statistics.median(
        seconds_of(
            lambda: torch.autograd.grad(
                case.training_loss(problem.model, case.training_batch, **values), params, allow_unused=True
            )
        )
        for _ in range(15)
    )

    def make(name: str, count: int) -> hi.Backend:
        if name == "cg":
            return hi.get_backend("cg", max_iterations=count, tolerance=0.0, warm_start=False, damping=case.damping)
        return hi.get_backend("neumann", terms=count, step_size=step_size, measure_residual=False, damping=case.damping)

    found: dict[str, tuple[int, float] | None] = {}
    for name in ("neumann", "cg"):
        found[name] = None
        for count in range(1, most + 1):
            backend = make(name, count)
            result = backend.hypergradient(problem, batches, held_out, {})
            if _error(result.gradients, exact) <= TOLERANCE:
                call = lambda b=backend: b.hypergradient(problem, batches, held_out, {})  # noqa: E731
                found[name] = count, statistics.median(seconds_of(call) for _ in range(9)) / g
                break
    return found


def chosen_damping(case: Case) -> float:
    """The δ that ``auto`` takes on a problem whose Hessian is indefinite."""
    problem = case.make()
    values = problem.hyperparameters.values()
    for _ in range(WARM_UP + INNER_STEPS):
        hi.inner_loop.train_step(problem, case.training_batch, values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HyperoptWarning)
        state = hi.get_backend("auto").hypergradient(problem, [case.training_batch], case.validation_batch, {}).state
    return float(state["plan"]["damping"])


def _error(x: Params, y: Params) -> float:
    return norm(add(x, y, -1.0)) / norm(y)
