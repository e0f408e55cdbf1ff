"""``auto``: looks at the problem, takes a method and its options, watches it, and changes its mind."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field

from hyperopt_implicit.backend import Backend, Card, Hypergradient, State, Status
from hyperopt_implicit.implicit import ImplicitBackend, Solution
from hyperopt_implicit.messages import warn
from hyperopt_implicit.operators import LinearOperator, validation_gradients
from hyperopt_implicit.plan import LASTING, NEXT_AUDIT, RECENT, Plan
from hyperopt_implicit.preconditioner import second_moments
from hyperopt_implicit.randomness import random_states, replaying
from hyperopt_implicit.stopwatch import Clock
from hyperopt_implicit.survey import (
    Costs,
    Spectrum,
    contents,
    fingerprint,
    has_more_batches,
    sampled_spectrum,
    spectrum,
    time_gradient,
)
from hyperopt_implicit.vectors import Params, add, norm, precision
from hyperopt_implicit_backends.cg import ConjugateGradient
from hyperopt_implicit_backends.heavy_ball import HeavyBall, begin
from hyperopt_implicit_backends.soba import Soba
from hyperopt_implicit_backends.unrolled import Unrolled

if TYPE_CHECKING:
    from hyperopt_implicit.problem import BilevelProblem

_LOOSE, _LOST = 5.0, 0.1  # times the tolerance, but no more than this: where heavy_ball solves anew
_FEW = 4  # iterations of conjugate gradients: with less, one product a call with momentum is better
_SURVEY_ITERATIONS, _ANEW = 60, 40  # iterations at most, of conjugate gradients and where heavy_ball solves anew
_SOON = 5  # calls after which it is measured again where it was not what it was thought to be
_SURVEY_DEPTH, _AUDIT_DEPTH = 0.1, 0.2  # of the tolerance, and of the residual, to which they solve
_ROUNDING = 1e3  # residual, in units of rounding, below which it says nothing of the error


@dataclass(frozen=True)
class Auto(ImplicitBackend):
    """Measures what the problem is like, takes the method that an expert would, and says which and why.

    The first call measures, in the course of a hypergradient: what a gradient, a product and the mixed derivative cost;
    whether the batches are all the training data or a part of it, and whether the loss draws random numbers; the
    extreme eigenvalues of A that v sees; and, where the inner optimizer is of Adam's kind, whether its second moment is
    a good preconditioner. From that follows:

    - all the training data, A positive definite: ``heavy_ball`` with one product where that keeps the error below
      ``tolerance``, else ``cg`` with a warm start and as many products as that takes (so it is where only the
      validation batch changes: for each of them the answer is exact).
    - A indefinite or singular: the same with the damping δ = max(1.5·|λ_min|, 0.1·λ_max). It is reported, and what it
      costs in accuracy with respect to A itself is a line of ``check``.
    - mini-batches, or a random loss: ``soba`` with a step size that falls from 1/λ_max to a quarter of it, so that
      the solution averages over the last batches, from a rough one on the first. Further products on one mini-batch
      make it worse, not better.
    - hyperparameters of the inner optimizer: ``unrolled``, through the inner steps.

    It keeps watching. The residual is measured at every call, and goes into an estimate of the hypergradient's error by
    a factor that is measured at the 10th call with a method, the 40th, the 160th and so on, by solving five times
    more accurately there. (With ``cg``, whose residual follows that factor, it comes down by no more than half at once,
    and is measured again five calls later.) Where the median estimate of 40 calls is above ``tolerance``, or that of
    ten above twice as much, ``heavy_ball`` gives way to ``cg``, and is tried again after a while. Where A loses its
    definiteness, or mini-batches turn up, all begins anew, and so it does for a damped A after 50 calls, 200 more, 800
    more: the model may have arrived at a minimum.

    ``budget`` is the largest cost of one hypergradient in g, the forward and backward of the training loss on the same
    batches (measured at the first call; the calls that measure cost more). It wins over ``tolerance``.

    Cost: that of the method; at the first call, and at each check of the error, as many products as a cold solve takes,
    which is ten on problems that are well conditioned and up to 60 on others (and 20 more for an indefinite A). Memory
    for six vectors.

    References:
        The methods' own; the choice between them rests on measurements (see the benchmarks).

    Example:
        >>> import hyperopt_implicit as hi
        >>> hi.get_backend("auto", tolerance=0.05).budget is None
        True
    """

    tolerance: Annotated[float, Field(gt=0, lt=1, description="relative error of the hypergradient to aim at")] = 0.01
    budget: Annotated[
        Annotated[float, Field(gt=0)] | None,
        Field(description="largest cost of a hypergradient, in forward and backward passes of the training loss"),
    ] = None

    card: ClassVar[Card] = Card(
        family="one-loop",
        gives="what the method that it took gives; the error is measured now and then",
        cost="1 product where that is enough, conjugate gradients where not",
        memory="6",
        conditions="none: indefinite A is damped, and that is said",
        use="always, until you know better",
        paper="this library",
    )

    def for_problem(self, problem: BilevelProblem) -> Backend:
        hidden = problem.hyperparameters.names("optimizer")
        if not hidden:
            return self
        asked = [o.name for o in dataclasses.fields(self) if getattr(self, o.name) != o.default]
        if asked:
            warn(
                f"auto leaves {hidden[0]!r}, a hyperparameter of the inner optimizer, to the backend 'unrolled', which "
                f"has none of its options; {', '.join(asked)} will do nothing. Leave them out, or choose 'unrolled' "
                "yourself, with memory= for long training."
            )
        return Unrolled()

    def settled(self, state: State) -> Backend:
        plan = Plan.from_state(state.get("plan", {}))
        return self if plan is None else self._method(plan)

    def hypergradient(
        self,
        problem: BilevelProblem,
        training_batches: Sequence[Any],
        validation_batch: Any,
        state: State,
        /,
    ) -> Hypergradient:
        plan, carried, spent = Plan.from_state(state.get("plan", {})), state.get("method", {}), 0
        batches = list(training_batches) if problem.training_data is None else None
        if plan is None or plan.is_outdated(batches):
            changed = "sampled" in state if plan is None else batches is not None and plan.same == 0
            sampled = changed or has_more_batches(problem, training_batches)
            with replaying(random_states(problem.device), problem.device):
                plan, carried, spent = self._survey(problem, training_batches, validation_batch, carried, sampled, plan)
            if state.get("sampled", 0.0) > plan.largest:
                plan.largest = state["sampled"]
                self._say(plan)
            if batches is not None:
                plan.batches, plan.content = fingerprint(batches), contents(batches)
        backend = self._method(plan)
        result = backend.hypergradient(problem, training_batches, validation_batch, carried)
        plan.calls, plan.since, plan.products = plan.calls + 1, plan.since + 1, result.hvps
        status = result.status
        if status.failed and (plan.rung >= 0 or status is not Status.NEGATIVE_CURVATURE):
            carried = {"method": result.state}  # the problem is no longer what it was
            if plan.rung < 0:  # but that it comes in samples, one of which has larger eigenvalues
                carried["sampled"] = (2.0 if status is Status.DIVERGED else 1.0) * plan.largest
        else:
            if plan.rung >= 0:
                self._estimate(plan, backend, result)
                self._warn_of_a_miss(plan, result)
                if plan.since == plan.audit:
                    spent += self._audit(plan, problem, training_batches, validation_batch, result)
                self._reconsider(plan)
            carried = {"plan": plan.state(), "method": result.state}
        if status is Status.CONVERGED and plan.damping > self.damping:
            status = Status.TRUNCATED  # not the system that was asked for
        return dataclasses.replace(result, status=status, hvps=result.hvps + spent, state=carried, note=plan.note)

    def solve(self, operator: LinearOperator, vector: Params, state: State, /) -> Solution:
        """A system alone, of which nothing else is known, by conjugate gradients."""
        return ConjugateGradient(self.tolerance, _SURVEY_ITERATIONS).solve(operator, vector, state)

    # ---------------------------------------------------------------------------------------- what the problem is like

    def _survey(
        self,
        problem: BilevelProblem,
        training_batches: Sequence[Any],
        validation_batch: Any,
        carried: State,
        sampled: bool,
        last: Plan | None,
    ) -> tuple[Plan, State, int]:
        """A plan, what its method is to begin with, and the products that it took."""
        clock = Clock(problem.device)
        one, drew = time_gradient(problem, training_batches, clock)
        _, vector, _ = clock(lambda: validation_gradients(problem, validation_batch))
        validation = clock.seconds / one
        plain = dataclasses.replace(self, precision="full", compile=False)  # what compiling takes is no product's cost
        hessian = clock(lambda: plain.linearise(problem, training_batches))
        graph = clock.seconds / one
        operator = self.damped(hessian)
        with torch.no_grad():
            if not 0.0 < norm(vector) < math.inf:
                seen = Spectrum(math.nan, math.nan)
            elif sampled or drew:
                seen = clock(lambda: sampled_spectrum(operator, vector))
            else:
                seen = clock(
                    lambda: spectrum(
                        operator, vector, _SURVEY_DEPTH * self.tolerance, _SURVEY_ITERATIONS, second_moments(problem)
                    )
                )
            product = clock.seconds / one / max(hessian.products, 1)
            clock(lambda: hessian.mixed(vector))
        data = "mini-batches" if sampled else "a random loss" if drew else "all the training data at each call"
        if not (sampled or drew) and problem.training_data is None and last is None:
            data = "one batch so far"
        plan = Plan(
            rung=-1 if sampled or drew else 0,
            costs=Costs(one, validation, graph, product, clock.seconds / one),
            what=f"{data}, {seen.words}",
            random=drew,
            damping=self.damping + seen.damping,
            damped=seen.damping > 0.0,
            largest=0.0 if math.isnan(seen.largest) else seen.largest + seen.damping,
            preconditioner="adam" if seen.preconditioned else None,
        )
        if last is not None and max(last.rung, plan.rung) < 0:
            plan.since = last.since  # the solution has settled already
        self._say(plan)
        if plan.damped and last is not None and last.damped:
            plan.again = NEXT_AUDIT * last.again
        elif plan.damped:
            warn(
                f"auto met {seen.words}. The hypergradient is that of the damped system: its direction can be trusted "
                "more than its size. Train longer before the first outer step, put a weight decay into the training "
                "loss, or choose the damping yourself with damping=."
            )
        if plan.rung >= 0:
            carried = begin(seen.solved, {}) if seen.solved is not None else {}
        elif last is None or last.rung >= 0:  # what solved for one sample is far off in directions that it did not see
            carried = {"solution": seen.solved.solution} if seen.solved is not None else {}
        return plan, carried, hessian.products

    # ------------------------------------------------------------------------------------------- what follows from it

    def _method(self, plan: Plan) -> ImplicitBackend:
        """The method that a plan has arrived at."""
        target, iterations = self._target(plan), self._affordable_iterations(plan)
        if plan.rung < 0:
            return _made(Soba, self, damping=plan.damping, step_size=plan.step_size)
        shared = {"damping": plan.damping, "preconditioner": plan.preconditioner}
        if plan.rung == 0:
            anew = min(_LOOSE * target, _LOST) if iterations >= _FEW else 1.0
            return _made(HeavyBall, self, tolerance=anew, max_iterations=max(min(iterations, _ANEW), 1), **shared)
        return _made(ConjugateGradient, self, tolerance=target, max_iterations=max(iterations, 1), **shared)

    def _target(self, plan: Plan) -> float:
        """The residual at which the error is what it may be; no more than a u of zero is far from."""
        return min(self.tolerance / plan.ratio, _LOST)

    def _affordable_iterations(self, plan: Plan) -> int:
        if self.budget is None or math.isinf(self.budget):
            return _SURVEY_ITERATIONS
        left = self.budget - plan.costs.of(1, shared=False)  # a warm start takes a product
        return int(left / plan.costs.product)

    # ------------------------------------------------------------------------------------------------ how it is going

    def _estimate(self, plan: Plan, backend: ImplicitBackend, result: Hypergradient) -> None:
        """What the error of this call is thought to be; one that had to solve anew says that the method is too weak."""
        residual = result.residual or 0.0
        if isinstance(backend, HeavyBall) and result.iterations > backend.products:
            residual = math.inf
        plan.recent = [*plan.recent, plan.ratio * residual][-LASTING:]

    def _audit(
        self,
        plan: Plan,
        problem: BilevelProblem,
        training_batches: Sequence[Any],
        validation_batch: Any,
        result: Hypergradient,
    ) -> int:
        """Measure the error of a hypergradient by a more accurate one; returns the products spent."""
        plan.audit = NEXT_AUDIT * plan.since
        residual = result.residual or 0.0
        if not residual > _ROUNDING * precision(problem.params):
            return 0
        accurate = ConjugateGradient(
            tolerance=_AUDIT_DEPTH * residual,
            max_iterations=_SURVEY_ITERATIONS,
            preconditioner=plan.preconditioner,
            damping=plan.damping,
            curvature=self.curvature,
        )
        with replaying(random_states(problem.device), problem.device):
            better = accurate.hypergradient(
                problem, training_batches, validation_batch, {"solution": result.state["solution"]}
            )
        size = norm(better.gradients)
        if better.status is not Status.CONVERGED:
            plan.error = math.nan
            self._say(plan)
        elif size > 0.0:
            plan.error = norm(add(result.gradients, better.gradients, -1.0)) / size
            ratio = max(plan.error / residual, 1e-2)
            if plan.rung > 0:  # the residual follows the ratio, and what holds at one need not at another
                if not 0.5 <= ratio / plan.ratio <= 2.0:
                    plan.audit = plan.since + _SOON
                ratio = max(ratio, 0.5 * plan.ratio)
            else:  # one call is a sample of one
                ratio = math.sqrt(ratio * plan.ratio)
            plan.recent = [x / plan.ratio * ratio for x in plan.recent]
            plan.ratio = ratio
            self._say(plan)
        return better.hvps

    def _warn_of_a_miss(self, plan: Plan, result: Hypergradient) -> None:
        """Say once that the method of the last resort does not get there."""
        last_resort = plan.rung == 1 or self._affordable_iterations(plan) < _FEW
        if plan.warned or not last_resort or result.status is Status.CONVERGED or len(plan.recent) < RECENT:
            return
        if statistics.median(plan.recent[-RECENT:]) > 2.0 * self.tolerance:
            plan.warned = True
            products = "1 product" if result.hvps == 1 else f"{result.hvps} products"
            warn(
                f"auto was to keep the hypergradient's error below {self.tolerance:g}, and does not: after "
                f"{products} the residual is {result.residual:.2g}. Give it a larger budget where it has "
                "one, add damping= or weight decay, or let the hyperparameters move more slowly (outer_lr, "
                "inner_steps)."
            )

    def _reconsider(self, plan: Plan) -> None:
        """Take the next method where the present one is not accurate enough, and a cheaper one after a while."""
        if len(plan.recent) < RECENT:
            return
        allowed = self.tolerance if len(plan.recent) >= LASTING else math.inf
        if statistics.median(plan.recent) > allowed or statistics.median(plan.recent[-RECENT:]) > 2.0 * self.tolerance:
            if plan.rung == 0 and self._affordable_iterations(plan) >= _FEW:
                plan.rest *= 2 if plan.tried else 1
                plan.take(1)
                self._say(plan)
        elif plan.rung == 1 and plan.since >= plan.rest:
            plan.take(0)
            plan.tried = True
            self._say(plan)

    def _say(self, plan: Plan) -> None:
        """Put into words what was decided."""
        cost, method = plan.costs.of(1, shared=True), "heavy_ball"
        if plan.rung < 0:
            method = f"soba with a step size from {1.0 / (plan.largest or 1.0):.2g} down to a quarter of it"
        elif plan.rung > 0:
            cost, method = (
                plan.costs.of(max(plan.products, 2), shared=False),
                "cg from the last solution",
            )
        note = f"auto takes {method}: {plan.what}; a product costs {plan.costs.product:.1f} g and a hypergradient "
        note += f"about {cost:.1f} g"
        if self.budget is not None and cost > self.budget:
            note += f", which is the least there is and more than the budget of {self.budget:g} g"
        if plan.error is not None:
            measured = f"was {plan.error:.1%} when last measured"
            note += f"; its error {'could not be measured' if math.isnan(plan.error) else measured}"
        plan.note = note + "."


@functools.lru_cache(maxsize=64)
def _made(method: type[ImplicitBackend], asked: Auto, **options: Any) -> ImplicitBackend:
    """A method with its options, and those that all of them share as they were asked for; made and checked once."""
    shared = {option.name: getattr(asked, option.name) for option in dataclasses.fields(ImplicitBackend)}
    return method(**{**shared, **options})
