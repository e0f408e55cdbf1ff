"""Tracing a training loss to its gradient-vector product, and cutting the trace where it depends on the vector.

A trace is a graph of aten operators over everything that the product depends on: w, λ, frozen parameters, buffers, the
tensors of the batches, and the vector. What is not in it (Python numbers, tensors that a loss holds) is constant.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from hyperopt_implicit.errors import BackendError
from hyperopt_implicit.gauss_newton import Composite
from hyperopt_implicit.messages import first_line
from hyperopt_implicit.operators import gradients, mean_training_loss, twice_differentiable

if TYPE_CHECKING:
    from hyperopt_implicit.problem import BilevelProblem

Half = Callable[..., Sequence[Tensor]]

_PLAIN = (int, float, bool, str, bytes, type(None))  # what may be in a batch beside tensors, and is constant


class UntraceableError(BackendError):
    """Why a loss cannot be traced or compiled, in a sentence, and where; becomes a warning in ``compiled.py``."""


@dataclass(frozen=True)
class Call:
    """What one call of the training loss depends on.

    Attributes:
        inputs: parameters, hyperparameters, frozen parameters, buffers, and the tensors of the batches.
        counts: how many there are of each.
        rest: the batches with the type ``Tensor`` in the place of each tensor.
        lowered: the dtype of autocast.
        gauss_newton: whether the curvature is the Gauss-Newton matrix.
        key: equal for calls that one trace serves.
    """

    inputs: list[Tensor]
    counts: tuple[int, ...]
    rest: Any
    lowered: torch.dtype | None
    gauss_newton: bool
    key: Any

    @staticmethod
    def of(problem: BilevelProblem, batches: Sequence[Any], lowered: torch.dtype | None, gauss_newton: bool) -> Call:
        """That of the problem at its present values."""
        leaves, spec = pytree.tree_flatten(list(batches))
        rest = [Tensor if isinstance(x, Tensor) else x for x in leaves]
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        others = tuple(map(_constant, rest))
        groups = [
            list(problem.params.values()),
            list(problem.hparams.values()),
            list(_frozen(problem).values()),
            list(problem.model.buffers()),
            tensors,
        ]
        inputs = [x.detach() for group in groups for x in group]
        kinds = tuple((x.shape, x.stride(), x.dtype, x.device) for x in inputs)
        modes = tuple(m.training for root in (problem.model, problem.hyperparameters) for m in root.modules())
        counts = tuple(map(len, groups))
        key = (kinds, counts, str(spec), others, modes, lowered, gauss_newton)
        return Call(inputs, counts, (spec, rest), lowered, gauss_newton, key)

    def split(self, inputs: Sequence[Tensor]) -> list[list[Tensor]]:
        """The inputs by group."""
        found, start = [], 0
        for count in self.counts:
            found.append(list(inputs[start : start + count]))
            start += count
        return found

    def batches(self, tensors: Iterable[Tensor]) -> list[Any]:
        """The batches with these tensors in the place of their own."""
        spec, leaves = self.rest
        given = iter(tensors)
        made: list[Any] = pytree.tree_unflatten([next(given) if x is Tensor else x for x in leaves], spec)
        return made


def _constant(x: Any) -> Any:
    return x if isinstance(x, _PLAIN) else type(x)


def _frozen(problem: BilevelProblem) -> dict[str, Tensor]:
    """Parameters of the model that are not trained; they may be changed all the same."""
    return {name: p for name, p in problem.model.named_parameters() if name not in problem.params}


# ---------------------------------------------------------------------------------------------------------- the halves


@dataclass(frozen=True)
class _Second:
    """What comes after the cut, for one set of outputs.

    Attributes:
        graph: from inputs, what the first half leaves, and the vector to the outputs.
        held: which of what a product takes beside the vector this form needs, by position.
    """

    graph: fx.GraphModule
    held: list[int]


class Program:
    """The two halves of a product; the second one in two forms, each compiled when it is first used.

    Args:
        trace: of ``traced``, over the tensors of a call and a vector to L, ∂L/∂w, the product and the mixed derivative.
        call: the call that it was traced on.
    """

    def __init__(self, trace: fx.GraphModule, call: Call) -> None:
        nodes = list(trace.graph.nodes)
        placeholders = [n for n in nodes if n.op == "placeholder"]
        inputs, vector = placeholders[: len(call.inputs)], placeholders[len(call.inputs) :]
        outputs: list[fx.Node] = list(nodes[-1].args[0])
        self._count = call.counts[0]
        begun, product, mixed = _split(outputs, (1 + self._count, self._count))
        after = _dependent(nodes, set(vector))
        random = [n for n in nodes if _is_random(n)]
        if any(n in after for n in random) or (random and call.gauss_newton):
            raise UntraceableError("its random numbers cannot be separated from the products.")
        held = _taken([*product, *mixed], after)
        saved = [n for n in held if n not in inputs]
        self._inputs = [inputs.index(n) for n in held if n in inputs]
        order = [inputs[i] for i in self._inputs] + saved
        self._first = compile_half(_part(trace, inputs, [*begun, *saved], random), call.inputs)
        self._seconds = {}
        for with_mixed, wanted in ((False, product), (True, [*product, *mixed])):
            taken = set(_taken(wanted, after))
            places = [i for i, n in enumerate(order) if n in taken]
            graph = _part(trace, [*(order[i] for i in places), *vector], wanted)
            self._seconds[with_mixed] = _Second(graph, places)
        self._compiled: dict[bool, Half] = {}

    def begin(self, inputs: list[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """L, ∂L/∂w, and all that a product takes beside its vector."""
        found = list(self._first(*inputs))
        (loss, *slopes), saved = found[: 1 + self._count], found[1 + self._count :]
        return loss, slopes, [*(inputs[i] for i in self._inputs), *saved]

    def multiply(self, held: list[Tensor], vector: list[Tensor]) -> Sequence[Tensor]:
        """The product."""
        return self._run(False, held, vector)

    def multiply_and_mix(self, held: list[Tensor], vector: list[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The product and the mixed derivative."""
        found = self._run(True, held, vector)
        return found[: self._count], found[self._count :]

    def _run(self, with_mixed: bool, held: list[Tensor], vector: list[Tensor]) -> Sequence[Tensor]:
        second = self._seconds[with_mixed]
        # what was compiled relies on the strides that it was compiled for
        given = [*(held[i] for i in second.held), *(x.detach().contiguous() for x in vector)]
        if with_mixed not in self._compiled:
            self._compiled[with_mixed] = compile_half(second.graph, given)
        return self._compiled[with_mixed](*given)


def compile_half(graph: fx.GraphModule, examples: Sequence[Tensor]) -> Half:
    """A graph by torch's inductor; random numbers are drawn as eager torch draws them.

    Raises:
        UntraceableError: it cannot be compiled.
    """
    import torch._inductor  # not at the top: it is large, and seldom needed

    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's, of its own parts
            found: Half = torch._inductor.compile(graph, list(examples), options={"fallback_random": True})
    except Exception as error:  # anything may go wrong in a compiler
        raise UntraceableError(
            f"torch's compiler failed on it ({type(error).__name__}: {first_line(error)})."
        ) from error
    return found


def program(problem: BilevelProblem, call: Call) -> Program:
    """The compiled halves of a product.

    Raises:
        UntraceableError: with the cause, and the place where it is known.
    """
    for leaf in call.rest[1]:
        if leaf is not Tensor and not isinstance(leaf, _PLAIN):
            raise UntraceableError(
                f"a batch may hold tensors and numbers in lists and dicts, and this one holds a {type(leaf).__name__}."
            )
    try:
        trace = traced(problem, call)
    except Exception as error:  # whatever the loss does
        raise UntraceableError(cause_of(error)) from error
    return Program(trace, call)


# ----------------------------------------------------------------------------------------------------------- the trace


def traced(problem: BilevelProblem, call: Call) -> fx.GraphModule:
    """The graph from the tensors of a call and a vector to L, ∂L/∂w, the product and the mixed derivative."""
    # not at the top: they are large, and seldom needed
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    frozen, buffers = list(_frozen(problem)), [name for name, _ in problem.model.named_buffers()]

    def product(inputs: list[Tensor], vector: list[Tensor]) -> list[Tensor]:
        w, hyper, still, held, tensors = call.split(inputs)
        params = {name: x.detach().requires_grad_() for name, x in zip(problem.params, w, strict=True)}
        hparams = {name: x.detach().requires_grad_() for name, x in zip(problem.hparams, hyper, strict=True)}
        others = dict(zip(frozen, still, strict=True))
        state, batches = dict(zip(buffers, held, strict=True)), call.batches(tensors)
        with torch.enable_grad(), twice_differentiable(problem):
            loss = mean_training_loss(problem, {**params, **others}, hparams, batches, call.lowered, state)
            slopes = gradients(loss, params, create_graph=True)
            onto = [*params.values(), *hparams.values()]
            curved = [(g, x) for g, x in zip(slopes.values(), vector, strict=True) if g.requires_grad]
            if curved:
                pulled = torch.autograd.grad(
                    [g for g, _ in curved], onto, [x for _, x in curved], allow_unused=True, materialize_grads=True
                )
            else:
                pulled = tuple(torch.zeros_like(x) for x in onto)
            multiplied = list(pulled[: len(params)])
            if call.gauss_newton:
                composite = Composite(problem, params, hparams, batches, call.lowered, {**state}, others)
                multiplied = composite.multiply(vector)
        return [x.detach() for x in (loss, *slopes.values(), *multiplied, *pulled[len(params) :])]

    vector = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in call.split(call.inputs)[0]]
    # tensors without values, so that whatever asks for one raises, and nothing is drawn
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    shapes = ([fake.from_tensor(x) for x in call.inputs], [fake.from_tensor(x) for x in vector])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's, of its own parts
        first = make_fx(product)(*shapes)
        # in-place operations, as of running statistics, would tie the halves together
        found: fx.GraphModule = make_fx(torch.func.functionalize(first, remove="mutations"))(*shapes)
    return found


def cause_of(error: BaseException) -> str:
    """What stopped a trace, and in which line outside of torch and this library."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    lines = [each for each in traceback.extract_tb(error.__traceback__) if not each.filename.startswith((*ours, "<"))]
    where = f" at {lines[-1].filename}:{lines[-1].lineno}" if lines else ""
    kind = type(error).__name__
    if kind in ("DataDependentOutputException", "GuardOnDataDependentSymNode"):
        return f"the value of a tensor is asked for{where} ({first_line(error)})."
    if kind == "DynamicOutputShapeException":
        return f"the shape of a result depends on the values of a tensor{where} ({first_line(error)})."
    return f"the trace stopped{where} ({kind}: {first_line(error)})."


# ------------------------------------------------------------------------------------------------------------- the cut


def _split(x: list[fx.Node], counts: Sequence[int]) -> list[list[fx.Node]]:
    found, start = [], 0
    for count in counts:
        found.append(x[start : start + count])
        start += count
    return [*found, x[start:]]


def _dependent(nodes: Iterable[fx.Node], roots: set[fx.Node]) -> set[fx.Node]:
    found = set(roots)
    for n in nodes:
        if n.op != "output" and any(each in found for each in n.all_input_nodes):
            found.add(n)
    return found


def _needed(outputs: Iterable[fx.Node], known: set[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = list(outputs)
    while waiting:
        n = waiting.pop()
        if n not in found and n not in known:
            found.add(n)
            waiting += n.all_input_nodes
    return found


def _taken(outputs: list[fx.Node], after: set[fx.Node]) -> list[fx.Node]:
    """What the nodes after the cut that lead to some outputs take from before it, constants left out."""
    needed = _needed((n for n in outputs if n in after), set())
    edge = [each for n in needed if n in after for each in n.all_input_nodes if each not in after]
    edge += [n for n in outputs if n not in after]
    return sorted({n for n in edge if n.op != "get_attr"})


def _part(
    trace: fx.GraphModule, inputs: list[fx.Node], outputs: list[fx.Node], also: Iterable[fx.Node] = ()
) -> fx.GraphModule:
    graph = fx.Graph()
    copies = {n: graph.placeholder(n.name) for n in inputs}
    needed = _needed([*outputs, *also], set(inputs))
    for n in trace.graph.nodes:
        if n in needed:
            copies[n] = graph.node_copy(n, lambda each: copies[each])
    graph.output(tuple(copies[n] for n in outputs))
    return fx.GraphModule(trace, graph)


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
