"""The computation of many members, traced and compiled: the inner step, the gradients of F, and the Hessian's products.

What is compiled holds for one number of members and one kind of batch. How a trace is cut and compiled is in
``tracing.py``; what a trace cannot see (a number that a loss computes outside of tensors) is constant in it, so that
the first results of each part are compared with those of autograd.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from hyperopt_implicit.members import Members
from hyperopt_implicit.members_batches import Part
from hyperopt_implicit.members_curvature import MembersHessian, matrix, rows_as
from hyperopt_implicit.messages import warn
from hyperopt_implicit.operators import gradients, twice_differentiable
from hyperopt_implicit.randomness import random_states, set_random_states
from hyperopt_implicit.tracing import Call, Half, Program, UntraceableError, cause_of, compile_half
from hyperopt_implicit.vectors import Params

MOST_KINDS = 3
"""Kinds of batch that are compiled for; with more, the others are computed as without compiling."""


class CompiledMembers:
    """The compiled parts of a group's computation, made when they are first needed.

    Args:
        members: whose number must stay.
    """

    def __init__(self, members: Members) -> None:
        self._members = members
        self._steps: dict[Any, _Step | None] = {}
        self._outer: dict[Any, _Outer | None] = {}
        self._products: dict[Any, Program | None] = {}
        self._given_up = False

    def step(self, parts: Sequence[Part], values: Params) -> tuple[Tensor, list[Tensor | None]] | None:
        """L of each member and ∂L/∂w; buffers are moved. None where that is not compiled."""
        found = self._part(self._steps, parts, lambda: _Step(self._members, parts[0], values))
        return None if found is None else found(parts[0], values)

    def validation(self, parts: Sequence[Part]) -> tuple[Tensor, Tensor, Params] | None:
        """F of each member, ∂F/∂w as rows, and ∂F/∂λ. None where that is not compiled."""
        found = self._part(self._outer, parts, lambda: _Outer(self._members, parts[0]))
        return None if found is None else found(parts[0])

    def hessian(self, batches: Sequence[Sequence[Part]]) -> CompiledMembersHessian | None:
        """The Hessians of all members. None where they are not compiled."""
        if len(batches) != 1:
            return None
        parts = batches[0]
        program = self._part(self._products, parts, lambda: _product(self._members, parts[0]))
        return None if program is None else CompiledMembersHessian(self._members, program, parts[0])

    def _part(self, known: dict[Any, Any], parts: Sequence[Part], make: Callable[[], Any]) -> Any:
        """What is compiled for a kind of batch, made at its first call; None, with a warning, where that fails."""
        if self._given_up or len(parts) != 1 or parts[0].members is not None:
            return None
        key = tuple((tuple(x.shape), x.dtype, dim) for x, dim in zip(parts[0].tensors, parts[0].dims, strict=True))
        if key not in known:
            if len(known) >= MOST_KINDS:
                return None
            states = random_states(self._members.device)
            try:
                known[key] = make()
            except UntraceableError as error:
                known[key] = None
                self._given_up = True
                warn(
                    "compile=True needs losses that can be traced for all members at once, with nothing decided by the "
                    f"values of tensors; {error} Nothing is compiled. Write the losses without that, or leave the "
                    "option out."
                )
            finally:
                set_random_states(states, self._members.device)
        return known[key]


class _Step:
    """L, ∂L/∂w and the buffers after it."""

    def __init__(self, members: Members, part: Part, values: Params) -> None:
        self._members = members
        self._networks = [name for name in members.hparams if name not in values]
        self._used: list[bool] = []
        counts = [len(members.params), len(self._networks), len(members.buffers), len(values)]

        def function(inputs: list[Tensor]) -> list[Tensor]:
            w, networks, buffers, constrained, given = _split(inputs, counts)
            params = {name: x.detach().requires_grad_() for name, x in zip(members.params, w, strict=True)}
            hparams = {name: x.detach() for name, x in members.hparams.items()}
            hparams.update(zip(self._networks, networks, strict=True))
            held = {name: x.clone() for name, x in zip(members.buffers, buffers, strict=True)}
            known = dict(zip(values, constrained, strict=True))
            with torch.enable_grad():
                losses = members.training_losses(params, hparams, [part.with_tensors(given)], held, values=known)
                found = torch.autograd.grad(losses.sum(), list(params.values()), allow_unused=True)
            self._used = [g is not None for g in found]
            return [x.detach() for x in (losses, *(g for g in found if g is not None), *held.values())]

        inputs = self._inputs(part, values)
        self._function = _compiled(function, inputs)
        _compare(function, self._function, inputs, members.device)

    def __call__(self, part: Part, values: Params) -> tuple[Tensor, list[Tensor | None]]:
        found = list(self._function(*self._inputs(part, values)))
        slopes = iter(found[1:])
        gradient = [next(slopes) if used else None for used in self._used]
        if self._members.buffers:
            torch._foreach_copy_(list(self._members.buffers.values()), list(slopes))
        return found[0], gradient

    def _inputs(self, part: Part, values: Params) -> list[Tensor]:
        members = self._members
        own = [*members.params.values(), *(members.hparams[name] for name in self._networks)]
        return [x.detach() for x in (*own, *members.buffers.values(), *values.values(), *part.tensors)]


class _Outer:
    """F, ∂F/∂w and ∂F/∂λ."""

    def __init__(self, members: Members, part: Part) -> None:
        self._members = members
        counts = [len(members.params), len(members.hparams)]

        def function(inputs: list[Tensor]) -> list[Tensor]:
            w, tuned, given = _split(inputs, counts)
            params = {name: x.detach().requires_grad_() for name, x in zip(members.params, w, strict=True)}
            hparams = {name: x.detach().requires_grad_() for name, x in zip(members.hparams, tuned, strict=True)}
            joint = {**params, **{f"λ {name}": x for name, x in hparams.items()}}
            with torch.enable_grad():
                losses = members.validation_losses(params, hparams, [part.with_tensors(given)])
                found = gradients(losses.sum(), joint, create_graph=False)
            slopes = matrix({name: found[name] for name in params})
            return [x.detach() for x in (losses, slopes, *(found[f"λ {name}"] for name in hparams))]

        inputs = self._inputs(part)
        self._function = _compiled(function, inputs)
        _compare(function, self._function, inputs, members.device)

    def __call__(self, part: Part) -> tuple[Tensor, Tensor, Params]:
        losses, slopes, *direct = self._function(*self._inputs(part))
        return losses, slopes, dict(zip(self._members.hparams, direct, strict=True))

    def _inputs(self, part: Part) -> list[Tensor]:
        members = self._members
        return [x.detach() for x in (*members.params.values(), *members.hparams.values(), *part.tensors)]


class CompiledMembersHessian(MembersHessian):
    """The Hessians of all members, whose product was traced and compiled; vectors are rows.

    Args:
        members: whose.
        program: the compiled halves.
        part: the batches.
    """

    def __init__(self, members: Members, program: Program, part: Part) -> None:
        self._program = program
        self._hparams = members.hparams
        self._hold_decays(members)
        with torch.no_grad():
            self.losses, _, self._saved = program.begin(_inputs(members, part))

    def multiply_rows(self, vectors: Tensor) -> Tensor:
        (product,) = self._program.multiply(self._saved, [vectors])
        return self._decayed_rows(product, vectors)

    def multiply_and_mix_rows(self, vectors: Tensor) -> tuple[Tensor, Params]:
        (product,), mixed = self._program.multiply_and_mix(self._saved, [vectors])
        return self._decayed_rows(product, vectors), dict(zip(self._hparams, mixed, strict=True))

    def mixed_rows(self, vectors: Tensor) -> Params:
        return self.multiply_and_mix_rows(vectors)[1]


def _product(members: Members, part: Part) -> Program:
    """The two halves of a product, tried on one."""
    counts = [1, len(members.hparams), len(members.buffers)]

    def function(inputs: list[Tensor], vector: list[Tensor]) -> list[Tensor]:
        (w,), tuned, buffers, given = _split(inputs, counts)
        w = w.detach().requires_grad_()
        hparams = {name: x.detach().requires_grad_() for name, x in zip(members.hparams, tuned, strict=True)}
        held = {name: x.clone() for name, x in zip(members.buffers, buffers, strict=True)}
        with torch.enable_grad(), twice_differentiable(members.problems[0]):
            losses = members.training_losses(rows_as(w, members.params), hparams, [part.with_tensors(given)], held)
            joint = {"w": w, **{f"λ {name}": x for name, x in hparams.items()}}
            slopes = gradients(losses.sum(), {"w": w}, create_graph=True)["w"]
            pulled = [torch.zeros_like(x) for x in joint.values()]
            if slopes.requires_grad:
                pulled = list(
                    torch.autograd.grad(
                        slopes, list(joint.values()), vector[0], allow_unused=True, materialize_grads=True
                    )
                )
        return [x.detach() for x in (losses, slopes, *pulled)]

    inputs = _inputs(members, part)
    vector = torch.ones_like(inputs[0])
    call = Call(inputs, (1, *map(len, _split(inputs, counts)[1:])), None, None, False, None)
    made = Program(_traced(function, (inputs, [vector])), call)
    with torch.no_grad():
        found = made.multiply_and_mix(made.begin(inputs)[2], [vector])
    _agree([*found[0], *found[1]], function(inputs, [vector])[2:])
    return made


def _inputs(members: Members, part: Part) -> list[Tensor]:
    own = (matrix(members.params), *members.hparams.values(), *members.buffers.values())
    return [x.detach() for x in (*own, *part.tensors)]


def _split(x: Sequence[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
    found, start = [], 0
    for count in counts:
        found.append(list(x[start : start + count]))
        start += count
    return [*found, list(x[start:])]


def _compiled(function: Callable[[list[Tensor]], list[Tensor]], inputs: list[Tensor]) -> Half:
    return compile_half(_traced(function, (inputs,)), inputs)


def _traced(function: Callable[..., list[Tensor]], inputs: tuple[list[Tensor], ...]) -> fx.GraphModule:
    """The graph of a function of lists of tensors.

    Raises:
        UntraceableError: it has none, with the cause and the place where it is known.
    """
    # not at the top: they are large, and seldom needed
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    # tensors without values, so that whatever asks for one raises, and nothing is drawn
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    shapes = [[fake.from_tensor(x) for x in each] for each in inputs]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's, of its own parts
            first = make_fx(function)(*shapes)
            # in-place operations, as of running statistics, would tie the halves of a product together
            found: fx.GraphModule = make_fx(torch.func.functionalize(first, remove="mutations"))(*shapes)
    except Exception as error:  # whatever the losses do
        raise UntraceableError(cause_of(error)) from error
    return found


def _compare(
    function: Callable[[list[Tensor]], list[Tensor]], compiled: Half, inputs: list[Tensor], device: torch.device
) -> None:
    """Refuse a compiled function that does not give what the function itself does."""
    states = random_states(device)
    found = list(compiled(*inputs))
    set_random_states(states, device)
    _agree(found, function(inputs))


def _agree(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for x, y in zip(found, expected, strict=True):
        allowed = torch.finfo(y.dtype).eps ** 0.5 if y.is_floating_point() else 0.0
        off, size = float((x.double() - y.double()).norm()), float(y.double().norm())
        if not off <= allowed * (size + allowed) and bool(y.isfinite().all()):
            raise UntraceableError(f"compiled, a result differs by {off:.2g} from the {size:.2g} of autograd.")
