"""Cost, error and memory of hypergradients, ours and others', at one point and along an outer loop."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import by_hand
import torch
from adapters import Losses, Method, Setting, ours
from problems import Case
from reference import Reference, flat, through_training
from torch import Tensor

import hyperopt_implicit as hi
from hyperopt_implicit.data import to_device
from hyperopt_implicit.diagnostics.measuring import peak_bytes

WARM_UP = 200
ROUNDS = 5  # at least


@dataclass
class Row:
    """A method on a problem: medians.

    Attributes:
        cost: in g, one forward and backward of the training loss.
        error: ‖difference from the exact answer‖/‖exact answer‖.
        cosine: with the exact answer.
        megabytes: peak memory beyond model and data.
        mean: of the cost, along a loop from its first step on.
        carries: whether it carries a state.
    """

    problem: str
    kind: str
    library: str
    family: str
    name: str
    work: str
    cost: float = 0.0
    error: float = 0.0
    cosine: float = 0.0
    megabytes: float = 0.0
    mean: float = 0.0
    carries: bool = False


@dataclass
class _Samples:
    method: Method
    seconds: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    cosines: list[float] = field(default_factory=list)
    before: list[float] = field(default_factory=list)
    megabytes: float = float("nan")

    def take(self, clock: Callable[[], float], exact: Tensor | None) -> None:
        started = clock()
        found = self.method.call()
        self.seconds.append(clock() - started)
        if exact is not None:
            g = flat(found).double()
            self.errors.append(float((g - exact).norm() / exact.norm()))
            self.cosines.append(float(g.dot(exact) / (g.norm() * exact.norm())))

    def begin_to_count(self) -> None:
        """Leave what was before to the mean of the cost alone."""
        self.before, self.seconds = self.seconds, []
        self.method.spent.clear()

    def row(self, problem: str, kind: str, unit: float) -> Row:
        m = self.method
        work = m.work
        if m.spent:
            products = round(statistics.median(m.spent))
            work = f"{products} product{'s' * (products != 1)}"
        return Row(
            problem, kind, m.library, m.family, m.name, work, statistics.median(self.seconds) / unit,
            statistics.median(self.errors), statistics.median(self.cosines), self.megabytes,
            statistics.mean(self.before + self.seconds) / unit, m.carries,
        )  # fmt: skip


class Race:
    """One problem at trained weights, and everybody who takes part.

    Args:
        case: the problem.
        device: where.
        seconds: about how long to measure at one point.
        adapters: of the other libraries.
    """

    def __init__(self, case: Case, device: torch.device, seconds: float, adapters: list[Any]) -> None:
        self.case, self.device, self.seconds, self.adapters = case, device, seconds, adapters
        self.training, self.validation = to_device((case.training_batch, case.validation_batch), device)
        self.problem = case.make().to(device)
        self._train(WARM_UP)
        self._megabytes: dict[tuple[str, str, str], float] = {}
        self.setting = self._setting()

    def at_one_point(self) -> list[Row]:
        """Everybody at the same weights: implicit methods, then those that differentiate training."""
        reference = self._reference()
        rows = self._compete("implicit", reference.hypergradient(reference.solve()))
        trained = through_training(*self._in_float64(), self.setting.learning_rate, self.setting.steps)
        return rows + self._compete("unrolled", trained)

    def along_a_loop(self, outer_steps: int, inner_steps: int = 10, points: int = 5) -> list[Row]:
        """Everybody at the same sequence of points; errors at so many of the second half.

        The loop itself follows six iterations of conjugate gradients by hand. Methods with a state are called at every
        outer step, and all calls of the second half count for their cost; the others at those points alone, with the
        step size looked up anew.
        """
        with _kept(self.problem):
            case = replace(self.case, training_batch=self.training, validation_batch=self.validation)
            raw = self.problem.hparams
            outer = torch.optim.Adam(list(raw.values()), lr=1e-2)
            carried = [_Samples(method) for method in self._methods("steady", self.setting)]
            others: dict[tuple[str, str], _Samples] = {}
            unit: list[float] = []
            half, solution = outer_steps // 2, None
            looked_at = {half + round(i * (outer_steps - half - 1) / max(points - 1, 1)) for i in range(points)}
            for step in range(outer_steps):
                self._train(inner_steps)
                exact = reference = None
                if step in looked_at:
                    reference = self._reference()
                    solution = reference.solve(solution)
                    exact = reference.hypergradient(solution)
                if step == half:
                    for each in carried:
                        each.begin_to_count()
                if step >= half:
                    unit.append(self._unit())
                for each in carried:
                    each.take(self._clock, exact)
                if reference is not None:
                    for method in self._methods("implicit", replace(self._setting(reference), counts=(10,))):
                        if method.family != "exact":
                            each = others.setdefault((method.library, method.name), _Samples(method))
                            each.method = method
                            if not each.seconds:
                                method.call()
                            each.take(self._clock, exact)
                solve = by_hand.conjugate_gradient(6, self.case.damping)
                driven = by_hand.hypergradient(case, self.problem.model, raw, solve)
                for value, grad in zip(raw.values(), driven, strict=True):
                    value.grad = grad
                outer.step()
                outer.zero_grad()
            everybody = [*carried, *others.values()]
            g = statistics.median(unit)
            for each in everybody:
                m = each.method  # what keeps no state needs what it needed at the single point
                each.megabytes = self._megabytes.get((m.library, m.name, m.work)) or self._peak(m)
            return [each.row(self.case.name, "steady", g) for each in everybody]

    def _compete(self, kind: str, exact: Tensor) -> list[Row]:
        listed = [_Samples(method) for method in self._methods(kind, self.setting)]
        everybody = list(listed)
        unit: list[float] = []
        self._unit()
        for each in everybody:  # which warms up as well
            each.megabytes = self._peak(each.method)
        until = time.perf_counter() + self.seconds
        while time.perf_counter() < until or len(unit) < ROUNDS:
            unit.append(self._unit())
            everybody.append(everybody.pop(0))  # so that nobody always follows the same
            for each in everybody:
                if each.method.family != "exact" or not each.seconds:  # it takes too long for more than once
                    each.take(self._clock, exact)
        self._megabytes |= {(e.method.library, e.method.name, e.method.work): e.megabytes for e in everybody}
        g = statistics.median(unit)
        return [each.row(self.case.name, kind, g) for each in listed]

    def _peak(self, method: Method) -> float:
        return peak_bytes(method.call, self.device) / 1e6

    def _methods(self, kind: str, setting: Setting) -> list[Method]:
        found: list[Method] = []
        for adapter in [ours, *self.adapters]:
            if hasattr(adapter, kind):
                found += getattr(adapter, kind)(setting)
        return found

    def _train(self, steps: int) -> None:
        values = self.problem.hyperparameters.values()
        for _ in range(steps):
            hi.inner_loop.train_step(self.problem, self.training, values)

    def _unit(self) -> float:
        """Seconds of g: the median of three, warm."""
        params, raw = self.setting.params, self.setting.raw
        times = []
        for _ in range(4):
            started = self._clock()
            torch.autograd.grad(self.setting.losses(raw), params)
            times.append(self._clock() - started)
        return statistics.median(times[1:])

    def _clock(self) -> float:
        """Processor time of this thread (on shared cores, wall-clock time measures the neighbours); on a card, time."""
        if self.device.type == "cpu":
            return time.thread_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _setting(self, reference: Reference | None = None) -> Setting:
        largest = (reference or self._reference()).largest_eigenvalue(15)
        return Setting(
            self.problem,
            (self.training, self.validation),
            self.problem.hparams,
            losses_of(self.case, self.problem.model, self.training, self.validation),
            damping=self.case.damping,
            step_size=1.0 / largest,
            learning_rate=float(self.problem.optimizer.param_groups[0]["lr"]),
        )

    def _in_float64(self) -> tuple[Losses, dict[str, Tensor]]:
        twin = self.problem.copy(dtype=torch.float64)
        batches = _double(self.training), _double(self.validation)
        return losses_of(self.case, twin.model, *batches), twin.hparams

    def _reference(self) -> Reference:
        return Reference(*self._in_float64(), self.case.damping)


def losses_of(case: Case, model: torch.nn.Module, training: Any, validation: Any) -> Losses:
    """Both losses of a case on given batches."""

    def training_loss(model: torch.nn.Module, raw: dict[str, Tensor]) -> Tensor:
        return case.training_loss(model, training, **{name: case.constrain[name](x) for name, x in raw.items()})

    return Losses(model, training_loss, lambda model: case.validation_loss(model, validation))


def _double(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.double() if x.is_floating_point() else x for x in batch)


@contextmanager
def _kept(problem: hi.BilevelProblem) -> Iterator[None]:
    """Afterwards, weights, optimizer and hyperparameters are as before."""
    state = problem.inner_state()
    hparams = {name: value.detach().clone() for name, value in problem.hparams.items()}
    try:
        yield
    finally:
        problem.load_inner_state(state)
        with torch.no_grad():
            for name, value in problem.hparams.items():
                value.copy_(hparams[name])
