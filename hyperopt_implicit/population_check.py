"""Whether the losses of members give the same as one computation as they do one by one.

What torch cannot vectorise, it mostly refuses; what it would do otherwise than alone, comparing shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hyperopt_implicit.members import Members, UnvectorisableError
from hyperopt_implicit.members_batches import put_together
from hyperopt_implicit.members_curvature import matrix
from hyperopt_implicit.messages import first_line
from hyperopt_implicit.operators import gradients, twice_differentiable
from hyperopt_implicit.problem import BilevelProblem
from hyperopt_implicit.randomness import random_states, set_random_states
from hyperopt_implicit.vectors import Params

_PARTS = (
    "training loss",
    "gradient of the training loss",
    "product with its Hessian",
    "validation loss",
    "gradient of the validation loss",
)


def check_members(members: Members, training: Sequence[Any], validation: Sequence[Any]) -> bool:
    """Compare both losses and their gradients on one batch each, for every member, and for two of them a product.

    Nothing is changed: buffers are copies and the generators are put back.

    Args:
        members: whose losses.
        training: a batch of each.
        validation: another.

    Returns:
        Whether a loss draws random numbers.

    Raises:
        UnvectorisableError: they differ, or torch refuses.
    """
    states = random_states(members.device)
    drawn = False
    try:
        together = _of_all(members, training, validation, states)
        for i, problem in enumerate(members.problems):
            # products are the same operators for all members: those of two of them show what torch makes of them
            product = i in (0, len(members) - 1)
            alone, draws = _of_one(problem, training[i], validation[i], states, product=product)
            drawn = drawn or draws
            for part, x, y in zip(_PARTS, together, alone, strict=True):
                if y is not None and not _agree(x[i], y):
                    raise UnvectorisableError(
                        f"the {part} of one member comes out as {_shown(x[i])} among others, and as {_shown(y)} alone"
                    )
    finally:
        set_random_states(states, members.device)
    return drawn


def _of_all(members: Members, training: Sequence[Any], validation: Sequence[Any], states: list[Tensor]) -> list[Tensor]:
    """The parts that are compared, a row a member; random numbers are the same for all of them, as they are alone."""
    params, hparams = members.params, members.hparams
    reached: list[str] = []
    try:
        with torch.enable_grad(), _watching(members.problems[0].model, reached):
            with twice_differentiable(members.problems[0]):
                losses = members.training_losses(params, hparams, put_together(training), randomness="same")
                reached.clear()
                slopes, product = _derivatives(losses.sum(), params, hparams)
            set_random_states(states, members.device)
            outer = members.validation_losses(params, hparams, put_together(validation), randomness="same")
            reached.clear()
            found = gradients(outer.sum(), _inputs(params, hparams), create_graph=False)
    except UnvectorisableError:
        raise
    except Exception as error:  # whatever torch does not vectorise
        where = f", in module {reached[-1]}" if reached else ""
        raise UnvectorisableError(f"{type(error).__name__}: {first_line(error)}{where}") from error
    return [losses.detach(), matrix(slopes), matrix(product), outer.detach(), matrix(found)]


def _of_one(
    problem: BilevelProblem, training: Any, validation: Any, states: list[Tensor], *, product: bool
) -> tuple[list[Tensor | None], bool]:
    params = {name: p.detach().requires_grad_() for name, p in problem.params.items()}
    hparams = {name: p.detach().requires_grad_() for name, p in problem.hparams.items()}
    draws = False
    with torch.enable_grad():
        set_random_states(states, problem.device)
        with twice_differentiable(problem):
            loss = problem.functional_training_loss(params, hparams, training)
        draws = _moved(states, problem)
        pulled: Params | None = None
        if product:
            slopes, pulled = _derivatives(loss, params, hparams)
        else:
            slopes = gradients(loss, params, create_graph=False)
        set_random_states(states, problem.device)
        outer = problem.functional_validation_loss(params, hparams, validation)
        draws = draws or _moved(states, problem)
        found = gradients(outer, _inputs(params, hparams), create_graph=False)
    multiplied = None if pulled is None else _row(pulled)
    return [loss.detach(), _row(slopes), multiplied, outer.detach(), _row(found)], draws


def _row(x: Params) -> Tensor:
    return matrix({name: tensor.unsqueeze(0) for name, tensor in x.items()})[0]


def _moved(states: list[Tensor], problem: BilevelProblem) -> bool:
    return any(not torch.equal(x, y) for x, y in zip(states, random_states(problem.device), strict=False))


def _inputs(params: Params, hparams: Params) -> Params:
    return {**params, **{f"λ {name}": x for name, x in hparams.items()}}


def _derivatives(loss: Tensor, params: Params, hparams: Params) -> tuple[Params, Params]:
    """The gradient, and the product of the Hessian with it beside the mixed derivative."""
    slopes = gradients(loss, params, create_graph=True)
    onto = _inputs(params, hparams)
    curved = [g for g in slopes.values() if g.requires_grad]
    detached = {name: g.detach() for name, g in slopes.items()}
    if not curved:
        return detached, {name: torch.zeros_like(x) for name, x in onto.items()}
    pulled = torch.autograd.grad(
        curved, list(onto.values()), [g.detach() for g in curved], allow_unused=True, materialize_grads=True
    )
    return detached, dict(zip(onto, pulled, strict=True))


def _agree(x: Tensor, y: Tensor) -> bool:
    """Whether two results are the same up to rounding; what is not finite alone may be so among others."""
    if not bool(y.isfinite().all()):
        return not bool(x.isfinite().all())
    allowed = torch.finfo(y.dtype).eps ** 0.5
    x, y = x.double(), y.double()
    off, size = torch.stack(((x - y).norm(), y.norm())).tolist()
    return bool(off <= allowed * (size + allowed))


def _shown(x: Tensor) -> str:
    return f"{float(x):.6g}" if x.numel() == 1 else f"a vector of norm {float(x.norm()):.6g}"


@contextmanager
def _watching(model: nn.Module, reached: list[str]) -> Iterator[None]:
    """Inside, note the modules that are called, until they have returned."""
    handles = []
    for name, module in model.named_modules():
        label = f"{name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"
        handles.append(module.register_forward_pre_hook(lambda *_, label=label: reached.append(label)))
        handles.append(module.register_forward_hook(lambda *_: reached.pop() and None))
    try:
        yield
    finally:
        for each in handles:
            each.remove()
