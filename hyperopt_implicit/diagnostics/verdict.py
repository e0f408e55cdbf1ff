"""From measurements to one sentence: is the hypergradient right, what is wrong with it, and what to change.

The causes are looked at in the order in which they hide each other: a backend that is not a function of the problem, a
number that is not finite, losses whose derivatives are not what they seem, a backend that computes something else than
it says, and only then the errors that every method has: damping, truncation, an inner problem that is not solved, one
batch in place of all.
"""

from __future__ import annotations

import math

from hyperopt_implicit.backend import Status
from hyperopt_implicit.diagnostics.measurements import Measurements
from hyperopt_implicit.diagnostics.truth import along, difference
from hyperopt_implicit.vectors import Params, add, dot, norm

_ALIKE = 1e-3  # relative difference below which two gradients are taken for the same
_PROPORTIONAL = 1e-6  # and below which one is taken for a multiple of the other


def verdict(found: Measurements, tolerance: float) -> tuple[bool, str, str]:
    """Whether the hypergradient is right, the verdict, and what to change."""
    fault = (
        _not_a_function(found)
        or _not_finite(found)
        or _nothing_to_compare_with(found)
        or _losses(found, tolerance)
        or _state(found, tolerance)
        or _another_number(found, tolerance)
        or _reported_residual(found)
        or _boast(found, tolerance)
    )
    if fault is not None:
        return False, *fault
    if found.relative_error <= tolerance:
        return True, _right(found), _failed_advice(found) or _spread_advice(found, tolerance)
    return False, *_largest_part(found)


Finding = tuple[str, str]


def _name(found: Measurements) -> str:
    return type(found.backend).__name__


def _right(found: Measurements) -> str:
    against = "finite differences of the whole inner problem" if found.slopes else "the theorem, solved densely"
    if found.minimum is None and found.slopes:
        against = "finite differences through all training steps"
    return f"the hypergradient is within {found.relative_error:.2g} (relative) of {against}."


def _failed_advice(found: Measurements) -> str:
    status = found.result.status
    if not status.failed:
        return ""
    return f"It is so although the solver ended with {status.value!r}, which need not go on. {status.remedy}"


def _spread_advice(found: Measurements, tolerance: float) -> str:
    spread = found.parts.get("one batch for all", 0.0)
    if spread <= max(tolerance, 0.3):
        return ""
    return (
        f"Single batches scatter by {spread:.2g} around it: an outer step that sees one of them is that noisy. Give it "
        "more (hessian_batches, larger batches), or a lower outer learning rate."
    )


def _not_a_function(found: Measurements) -> Finding | None:
    if found.changed:
        return (
            f"{_name(found)} changes the problem that it is given ({', '.join(found.changed[:3])}).",
            "A backend must leave model, buffers, hyperparameters and optimizer as they are; work on copies.",
        )
    if not found.reproducible:
        return (
            f"{_name(found)} gives another number when it is asked again under the same seed.",
            "Look for randomness that torch's generators do not control, in the losses (numpy, random, a counter that "
            "they keep) or in the backend.",
        )
    return None


def _not_finite(found: Measurements) -> Finding | None:
    if found.result.status is not Status.NON_FINITE and math.isfinite(norm(found.result.gradients)):
        return None
    return "the hypergradient is not finite.", Status.NON_FINITE.remedy


def _nothing_to_compare_with(found: Measurements) -> Finding | None:
    if found.truth is not None or found.slopes:
        return None
    return (
        "there is nothing to compare the hypergradient with: neither a minimum of L nor the theorem could be computed.",
        "Train longer before the check (warmup_steps), give it more seconds, or check a smaller version of it.",
    )


def _losses(found: Measurements, tolerance: float) -> Finding | None:
    """Differentiation, solved exactly, contradicts finite differences, which cannot be fooled."""
    if found.truth is None or not found.slopes:
        return None
    worst, gap = "", 0.0
    for each in found.slopes:
        off = abs(along(found.truth, each) - each.value)
        if off > max(3.0 * each.uncertainty, 0.1 * tolerance * found.size) and off > gap:
            worst, gap = each.name, off
    if not worst:
        return None
    slope = next(each for each in found.slopes if each.name == worst)
    if not slope.uncertainty < 0.05 * max(abs(slope.value), 0.1 * found.size):
        return (
            f"F jumps or bends where {worst!r} moves: difference quotients at the steps "
            f"{', '.join(f'{h:.0e}' for h in slope.steps)} are {', '.join(f'{q:.3g}' for q in slope.quotients)}.",
            "A validation metric with jumps (accuracy) needs backend 'evolution', or a smooth loss in its place.",
        )
    where = "a hyperparameter" if worst == "all" else repr(worst)
    return (
        f"the losses hide a dependence on {where} from autograd: along it, F changes by {slope.value:.3g} by finite "
        f"differences, and by {along(found.truth, slope):.3g} by differentiation.",
        "Look between it and the losses for .detach(), .data, .item(), float(), numpy, torch.no_grad(), rounding, or a "
        "value that was computed once and kept.",
    )


def _state(found: Measurements, tolerance: float) -> Finding | None:
    if found.calls == 1 or found.target is None:
        return None
    cold, settled = difference(found.first, found.target), difference(found.in_float64, found.target)
    if cold <= tolerance * found.size < 0.3 * settled:
        return (
            f"{_name(found)} is right at its first call, and off by {settled / found.size:.2g} once it carries state.",
            "What it carries from call to call is stale or misused; compare state={} with the state of the last call.",
        )
    return None


def _another_number(found: Measurements, tolerance: float) -> Finding | None:
    """The number is no worse approximation of its target, but another one: a sign, a factor, a term."""
    if found.target is None or found.result.status.failed:  # a failure is told by the backend itself
        return None
    mine, target, direct = found.in_float64, found.target, found.direct
    if difference(mine, target) <= tolerance * found.size:
        return None
    if norm(direct) > _ALIKE * found.size and difference(mine, add(target, direct, -1.0)) <= _ALIKE * found.size:
        return (
            f"{_name(found)} leaves out the direct term ∂F/∂λ.",
            "F depends on a hyperparameter itself, not only through the weights; the backend must add ∂F/∂λ.",
        )
    through, wanted = add(mine, direct, -1.0), add(target, direct, -1.0)
    if norm(through) <= _ALIKE * norm(wanted) and not _explained_by_truncation(found, 1.0):
        return (
            f"{_name(found)} gives ∂F/∂λ alone: what F gains by way of the weights is missing.",
            "Is the gradient of L with respect to the weights connected to the hyperparameters?",
        )
    factor = dot(_double(through), _double(wanted)) / (norm(wanted) ** 2 or 1.0)
    proportional = norm(add(through, wanted, -factor)) <= _PROPORTIONAL * norm(wanted)
    if proportional and factor < 0.0 and not _explained_by_truncation(found, 2.0):
        return (
            f"{_name(found)} has the wrong sign.",
            "dF/dλ = ∂F/∂λ − (∂²L/∂λ∂w) u: the second term is subtracted.",
        )
    several = found.hyperparameters > 1  # with one, every error is a factor
    if proportional and several and not _explained_by_truncation(found, abs(1.0 - factor)):
        return (
            f"{_name(found)} is off by a factor of {factor:.3g}.",
            "Look for a step size that the sum of a series lost or gained, or a mean in place of a sum.",
        )
    return None


def _explained_by_truncation(found: Measurements, gap: float) -> bool:
    """Whether the backend itself says that it did not finish, by about as much."""
    result = found.result
    if result.status in (Status.CONVERGED, Status.NON_FINITE):
        return False
    return result.residual is None or result.residual >= 0.3 * min(gap, 1.0)


def _reported_residual(found: Measurements) -> Finding | None:
    if found.true_residual is None:
        return None
    true, reported = found.true_residual
    if reported is None or reported >= 0.5 * true or true < 1e-6:
        return None
    return (
        f"{_name(found)} reports a residual of {reported:.2g}, and it is {true:.2g}.",
        "The residual must be that of the solution returned, not of an earlier iterate or a recurrence gone astray.",
    )


def _boast(found: Measurements, tolerance: float) -> Finding | None:
    if found.target is None or found.result.status is not Status.CONVERGED:
        return None
    error = difference(found.in_float64, found.target) / found.size
    if error <= tolerance:
        return None
    return (
        f"{_name(found)} says that it converged, and is off by {error:.2g} from what it should have converged to.",
        "Look for a stale residual, a detached part of the optimizer's state, or batches that are left out.",
    )


def _largest_part(found: Measurements) -> Finding:
    parts = {name: value for name, value in found.parts.items() if name != "one batch for all"}
    status = found.result.status
    off = f"the hypergradient is off by {found.relative_error:.2g} (cosine {found.cosine:.2f})"
    if not parts:
        return f"{off}.", "Compare it with others: hyperopt_implicit.compare."
    if status.failed and parts.get("solver", 0.0) > 0.3 * found.relative_error:
        return f"{off}: the solver ended with {status.value!r}.", status.remedy
    cause = max(parts, key=lambda name: parts[name])
    if parts[cause] > 2.0 * found.relative_error and "inner problem not solved" in parts:
        cause = "inner problem not solved"  # errors that cancel; the others are beside a point that is none
    share = f"mostly because of {parts[cause]:.2g} that"
    if cause == "inner problem not solved":
        return (
            f"{off}, {share} is due to the inner problem not being solved: ‖∂L/∂w‖ is "
            f"{found.training_gradient_norm:.2g} at the present weights.",
            "Train longer before and between outer steps (warmup_steps, inner_steps), or differentiate the training "
            "itself ('unrolled').",
        )
    if cause == "damping and curvature":
        return (
            f"{off}, {share} comes from solving with another matrix than the Hessian.",
            "Lower the damping, or use curvature='hessian', where the training loss has enough curvature to allow it.",
        )
    if cause == "precision":
        return f"{off}, {share} is rounding.", "Compute in float64, or look for differences of large numbers in a loss."
    if found.minimum is None:
        return (
            f"{off}, {share} is left out of the training steps.",
            "Differentiate all of them: 'unrolled' without last, or more directions.",
        )
    if found.result.residual is None:
        return (
            f"{off}, {share} is the approximation that {_name(found)} makes.",
            "It gives a direction of descent at best; take one that solves the system ('cg', 'minres', 'neumann'), or "
            "differentiates all steps ('unrolled').",
        )
    return (
        f"{off}, {share} the solver left: its residual is {found.result.residual:.2g}.",
        "Allow it more terms or iterations, or another solver: 'cg', or 'minres' where the Hessian is indefinite.",
    )


def _double(x: Params) -> Params:
    return {name: tensor.double() for name, tensor in x.items()}
