"""w*(λ) as a differentiable function: the result of one bilevel problem's training as a part of another one's losses.

A problem of three levels is two problems, the lower one inside the training loss of the upper one. Here is the link
between them; how a minimum is found is told in ``newton.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from hyperopt_implicit.argument_checks import check_list, is_number, shown
from hyperopt_implicit.backend import Status
from hyperopt_implicit.errors import HypergradientError, ProblemError
from hyperopt_implicit.messages import nearest
from hyperopt_implicit.newton import conjugate_gradients, inner_hessian, inner_objective, newton
from hyperopt_implicit.operators import LossHessian, gradients, twice_differentiable
from hyperopt_implicit.problem import BilevelProblem, check_problem
from hyperopt_implicit.randomness import random_states, replaying
from hyperopt_implicit.vectors import Params, norm, precision

_DENSE = 1000  # parameters up to which a Hessian is formed

Flat = Callable[[Tensor], Tensor]


def minimizer(
    problem: BilevelProblem,
    values: Mapping[str, Tensor],
    training_batches: Sequence[Any],
    *,
    order: int = 2,
    tolerance: float = 1e-10,
    max_steps: int = 100,
    start: Mapping[str, Tensor] | None = None,
) -> Params:
    """w*(λ), the weights that minimise a problem's training loss, as a function that can be differentiated.

    What is minimised is L averaged over the batches, with the coupled decay of the inner optimizer. Newton's method
    finds w* without a graph; ``order`` chord steps follow, which carry the graph to λ:

        w ← w − A ∂L/∂w(w, λ),    A = H(w*, λ₀)⁻¹ held constant, λ₀ the values given

    Write e = w − w*(λ) for the error of such a step as a function of λ: since ∂L/∂w(w*(λ), λ) = 0, the step
    multiplies e by I − A·H̄, with H̄ the mean of H(·, λ) between w*(λ) and w. That factor is of order λ − λ₀, as is e
    before the first step (w is constant there), so that k steps leave an error of order (λ − λ₀)ᵏ⁺¹, and the first k
    derivatives of w at λ₀ are those of w*.

    With ``order=1`` the result may stand in a validation loss, which is differentiated once. With ``order=2`` it may
    stand in a training loss, of which implicit and unrolled backends take second derivatives. Derivatives above
    ``order`` are wrong, not missing.

    Parameters on which L does not depend stay as they are. Nothing of the problem changes, and torch's random state
    does not move; random layers draw the same at every look at the loss, and a layer in training mode takes its
    statistics from the batch, as in training.

    Cost: Newton's steps, each one gradient and its solver's Hessian-vector products; A, which for up to 1000
    parameters is formed by one product each and factorised, and beyond is applied by conjugate gradients; and
    ``order`` gradients. Every differentiation applies A again, ``order`` times for a first derivative. The graph of L
    is held ``order`` + 1 times.

    Args:
        problem: whose training loss is minimised.
        values: constrained values by name, which may carry a graph; the problem's own stand for those not given. The
            parameters of a hyperparameter that is a module go by their full names (``net.0.weight``). A value must lie
            strictly inside its constraint. Where a constraint ties elements to one another (a simplex), derivatives
            are right along it, which is where values that keep it move.
        training_batches: over which L is averaged, each with equal weight.
        order: how many derivatives with respect to ``values`` are right.
        tolerance: ‖∂L/∂w‖ at which a minimum counts as reached, or ten units of rounding of 1 + ‖w‖ where those are
            more. What is left of the error, the chord steps remove.
        max_steps: Newton steps at most.
        start: weights to begin with, by name, such as the last call's result, which make a difference to the time it
            takes and, where there are several minima, to which of them is found; the problem's present ones otherwise.

    Returns:
        The weights by name, shaped like the model's.

    Raises:
        HypergradientError: no minimum was reached, or H is singular there, so that it is not the only one nearby.
        ProblemError: a value has no place in the training loss, or ``start`` does not fit the model.

    References:
        Ortega, Rheinboldt, "Iterative Solution of Nonlinear Equations in Several Variables", 1970 (chord method).
        Christianson, "Reverse accumulation and attractive fixed points", Optimization Methods and Software 3, 1994
        (derivatives by steps from a point that has converged).

    Example:
        >>> import torch, hyperopt_implicit as hi
        >>> @hi.hyperparameter("decay", init=1.0)
        ... def training_loss(model, batch, *, decay):
        ...     return 0.5 * (model.weight - batch).square().sum() + 0.5 * decay * model.weight.square().sum()
        >>> problem = hi.BilevelProblem(
        ...     torch.nn.Linear(1, 1, bias=False).double(), training_loss, lambda model, batch: model.weight.sum(),
        ...     optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
        >>> decay = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
        >>> w = hi.minimizer(problem, {"decay": decay}, [torch.tensor(8.0)])["weight"]     # 8/(1 + decay)
        >>> slope, = torch.autograd.grad(w.sum(), decay, create_graph=True)                # −8/(1 + decay)²
        >>> bend, = torch.autograd.grad(slope, decay)                                      # 16/(1 + decay)³
        >>> round(w.item(), 6), round(slope.item(), 6), round(bend.item(), 6)
        (2.0, -0.5, 0.25)
    """
    _check_numbers(order=order, max_steps=max_steps)
    if not (is_number(tolerance) and tolerance > 0.0):
        raise ProblemError(f"tolerance must be a gradient norm above zero; got {shown(tolerance)}.")
    check_problem(problem)
    for name, given in (("values", values), ("start", start)):
        if not (isinstance(given, Mapping) or (given is None and name == "start")):
            raise ProblemError(f"{name} must be a dict of tensors by name; got {shown(given)}.")
    check_list("training_batches", training_batches, "batches", ProblemError, sized=False)
    batches = list(training_batches)
    if not batches:
        raise ProblemError("training_batches must hold a batch at least; it is empty.")
    hparams = _unconstrained(problem, values)
    first = _first(problem, start)
    device = problem.device
    drawn = random_states(device)  # every look at the loss begins from here, so that random layers are held still

    def hessian_at(params: Params) -> LossHessian:
        with replaying(drawn, device):
            return inner_hessian(problem, params, hparams, batches)

    found = newton(hessian_at, first, target=_target(tolerance, first), max_steps=max_steps)
    target = _target(tolerance, found.params)
    if not found.gradient_norm <= target:
        raise HypergradientError(
            "w*(λ) can be differentiated where the training loss has its minimum; after "
            f"{found.steps} of at most {max_steps} Newton steps ‖∂L/∂w‖ is {found.gradient_norm:.3g}, with "
            f"{target:.3g} asked for. Add weight decay to the training loss, start nearer with start=, or allow more "
            "with max_steps= or tolerance=."
        )
    inverse: Flat | None = None
    wants_graph = torch.is_grad_enabled()
    with torch.enable_grad(), twice_differentiable(problem):
        w = {name: p.detach().requires_grad_() for name, p in found.params.items()}
        for _ in range(order):
            with replaying(drawn, device):
                objective = inner_objective(problem, w, hparams, batches)
            gradient = gradients(objective, w, create_graph=True)
            if inverse is None:
                unused = {name for name, g in gradient.items() if g.grad_fn is None}
                inverse = _inverse(found.hessian, found.params, unused)
            step = _unflatten(cast(Tensor, _Apply.apply(_flatten(gradient), inverse)), w)
            w = {name: p - step[name] for name, p in w.items()}
    return w if wants_graph else {name: p.detach() for name, p in w.items()}


class _Apply(torch.autograd.Function):
    """A·x for a constant symmetric A; its derivative is A again, as often as it is taken."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, apply: Flat) -> Tensor:
        ctx.A = apply  # a node of the graph has a method named apply already
        return apply(x.detach())

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Tensor, None]:
        return cast(Tensor, _Apply.apply(cotangents[0], ctx.A)), None


def _inverse(hessian: LossHessian, params: Params, unused: set[str]) -> Flat:
    """x ↦ H⁻¹x, for vectors in one piece; parameters on which L does not depend stay out of it."""
    size = sum(p.numel() for p in params.values())
    return _dense_inverse(hessian, params, unused) if size <= _DENSE else _iterative_inverse(hessian, params)


def _dense_inverse(hessian: LossHessian, params: Params, unused: set[str]) -> Flat:
    fill = _flatten({name: torch.full_like(p, float(name in unused)) for name, p in params.items()})
    rows = torch.eye(len(fill), dtype=fill.dtype, device=fill.device)
    H = torch.stack([_flatten(hessian @ _unflatten(row, params)) for row in rows])
    factor, failed = torch.linalg.cholesky_ex((H + H.T) / 2 + torch.diag(fill))
    pivots = factor.diagonal().square()
    if int(failed) or not float(pivots.min()) > len(fill) * precision(params) * float(pivots.max()):
        raise HypergradientError(_flat_message("its Cholesky factorisation breaks down"))
    return lambda x: torch.cholesky_solve(x[:, None], factor)[:, 0]


def _iterative_inverse(hessian: LossHessian, params: Params) -> Flat:
    accuracy = 100.0 * precision(params)
    solver = conjugate_gradients(accuracy, 2000)

    @torch.no_grad()
    def apply(x: Tensor) -> Tensor:
        vector = _unflatten(x, params)
        if norm(vector) == 0.0:
            return torch.zeros_like(x)
        solution = solver.solve(hessian, vector, {})
        if solution.status is not Status.CONVERGED and not (solution.residual or math.inf) <= math.sqrt(accuracy):
            raise HypergradientError(
                _flat_message(
                    f"conjugate gradients end with status {solution.status.value!r} and a relative residual of "
                    f"{solution.residual:.3g} after {solution.iterations} products"
                )
            )
        return _flatten(solution.value)

    return apply


def _flat_message(found: str) -> str:
    return (
        "w*(λ) can be differentiated where the Hessian of the training loss is positive definite, so that the minimum "
        f"is the only one nearby; {found}. Add weight decay to the training loss, or start elsewhere with start=."
    )


def _target(tolerance: float, params: Params) -> float:
    return max(tolerance, 10.0 * precision(params) * (1.0 + norm(params)))


def _check_numbers(**numbers: int) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ProblemError(f"{name} must be an integer of at least 1; got {number!r}.")


def _first(problem: BilevelProblem, start: Mapping[str, Tensor] | None) -> Params:
    present = {name: p.detach() for name, p in problem.params.items()}
    if start is None:
        return present
    shapes, wanted = ({name: tuple(getattr(p, "shape", ())) for name, p in each.items()} for each in (start, present))
    if shapes != wanted:
        raise ProblemError(
            f"start must hold the weights that the inner optimizer trains, {wanted}; it holds {shapes}. The result of "
            "a call before fits, and so does problem.params."
        )
    return {name: start[name].detach().to(p) for name, p in present.items()}


def _unconstrained(problem: BilevelProblem, values: Mapping[str, Tensor]) -> Params:
    """λ with the graph of the values given, as the functional losses take it."""
    hparams = {name: p.detach() for name, p in problem.hparams.items()}
    declarations, tuned = problem.hyperparameters.declarations, problem.hyperparameters.names("optimizer")
    known = [name for name in hparams if name not in tuned]
    for name, value in values.items():
        if name in tuned:
            raise ProblemError(
                f"a minimum does not depend on how it was reached; {name!r} is a hyperparameter of the inner "
                "optimizer. Leave it out of values."
            )
        if name not in known:
            raise ProblemError(
                f"values must name hyperparameters of the losses, which are {', '.join(known)}; {name!r} is none of "
                f"them.{nearest(name, known)}"
            )
        if not isinstance(value, Tensor):
            raise ProblemError(
                f"values must be tensors; {name!r} is a {type(value).__name__}. Wrap it in torch.tensor."
            )
        raw = value.to(hparams[name])
        if name in declarations:
            declaration = declarations[name]
            try:
                raw = declaration.transform.inv(raw)
                inside = bool(declaration.constraint.check(value.detach()).all()) and bool(torch.isfinite(raw).all())
            except (RuntimeError, ValueError, IndexError) as error:
                raise ProblemError(
                    f"the value of {name!r} must fit {declaration.constraint}; shape {tuple(value.shape)} does not "
                    f"({error})."
                ) from error
            if not inside:
                raise ProblemError(
                    f"the value of {name!r} must lie strictly inside {declaration.constraint}; got "
                    f"{value.detach().flatten()[:5].tolist()}. Compute it as the constraint's own transform does."
                )
        if raw.shape != hparams[name].shape:
            raise ProblemError(
                f"the value of {name!r} must be shaped like the one declared; it has shape {tuple(value.shape)}. "
                f"Unconstrained, the declared one has {tuple(hparams[name].shape)}, this one {tuple(raw.shape)}."
            )
        hparams[name] = raw
    return hparams


def _flatten(x: Params) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in x.values()])


def _unflatten(flat: Tensor, like: Params) -> Params:
    pieces = flat.split([tensor.numel() for tensor in like.values()])
    return {name: piece.view(like[name].shape) for name, piece in zip(like, pieces, strict=True)}
