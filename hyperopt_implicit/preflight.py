"""Checks that run once, before any training: a trial of both losses, and of their second derivative where it is needed.

They find what cannot be seen from signatures: losses that raise or are no finite scalars, hyperparameters without
influence, and operators that cannot be differentiated twice. Nothing is changed: buffers are copies and the generators
are put back.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from hyperopt_implicit.backend import (
    Backend,
    backends_without_second_derivative,
    backends_without_validation_gradient,
)
from hyperopt_implicit.errors import HyperoptError, LossError, ProblemError, SecondDerivativeError
from hyperopt_implicit.messages import first_line, warn
from hyperopt_implicit.operators import twice_differentiable, undifferentiable_operator
from hyperopt_implicit.out_of_memory import is_out_of_memory
from hyperopt_implicit.vectors import Params

if TYPE_CHECKING:
    from hyperopt_implicit.problem import BilevelProblem


def preflight(problem: BilevelProblem, backend: Backend, training_batch: Any, validation_batch: Any) -> None:
    """Try both losses on one batch each, and what the backend will ask of them.

    Raises:
        ProblemError: a loss raises.
        LossError: a loss is not a scalar, is not finite, or does not depend on the parameters.
        SecondDerivativeError: an operator of the training loss cannot be differentiated twice.
        BackendError: the backend cannot handle the problem.

    Warns:
        HyperoptWarning: a hyperparameter has no influence on either loss; its gradient will be zero.
    """
    backend.check(problem)
    devices = [problem.device] if problem.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        params = {name: p.detach().requires_grad_() for name, p in problem.params.items()}
        hparams = {name: p.detach().requires_grad_() for name, p in problem.hparams.items()}
        with twice_differentiable(problem), _running(problem, "training_loss", training_batch):
            training = problem.functional_training_loss(params, hparams, training_batch)
        with _running(problem, "validation_loss", validation_batch):
            validation = problem.functional_validation_loss(params, hparams, validation_batch)
        _check_number(training, "training_loss")
        # a metric that nothing differentiates may be a count
        _check_number(validation if backend.needs_validation_gradient else validation.double(), "validation_loss")
        gradient = _check_graph(training, params)
        direct = _grads([validation], hparams) if validation.requires_grad else [None] * len(hparams)
        if backend.needs_validation_gradient:
            _check_validation_graph(validation, params, direct)
        mixed: Sequence[Tensor | None] = [None] * len(hparams)
        if backend.needs_second_derivative:
            mixed = _try_second_derivative(problem, params, hparams, gradient, training_batch)
        used_by_loss = problem.hyperparameters.names("loss")
        unused = {
            name.split(".")[0] for name, d, m in zip(hparams, direct, mixed, strict=True) if d is None and m is None
        } - {
            name.split(".")[0]
            for name, d, m in zip(hparams, direct, mixed, strict=True)
            if not (d is None and m is None)
        }
    for name in used_by_loss:
        if name in unused and backend.needs_second_derivative:
            warn(
                f"hyperparameter {name!r} influences neither the training gradient nor the validation loss: its "
                "gradient is zero and it will stay at its initial value. Use it in a loss, or remove its declaration."
            )


@contextmanager
def _running(problem: BilevelProblem, role: str, batch: Any) -> Iterator[None]:
    """Whatever a loss raises at its first call, with the line where it happened and the shapes that met there."""
    try:
        yield
    except HyperoptError:
        raise
    except Exception as error:
        file = getattr(getattr(problem.loss_source(role), "__code__", None), "co_filename", "")
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        where = f" (line {lines[-1]} of {Path(file).name})" if lines else ""
        shapes = [f"{name} of shape {_shapes(value)}" for name, value in problem.hyperparameters("loss").items()]
        raise ProblemError(
            f"{role} must run on the first batch; it raised {type(error).__name__}: {first_line(error)}{where}. It "
            f"was given {', '.join([f'a batch of shape {_shapes(batch)}', *shapes])}."
        ) from error


def _shapes(value: Any) -> Any:
    """The value with each tensor in it replaced by its shape, and anything else by its type's name."""
    return pytree.tree_map(lambda x: tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__, value)


def _check_number(loss: Tensor, role: str) -> None:
    if not loss.is_floating_point():
        raise LossError(f"{role} must return a floating-point scalar; got dtype {loss.dtype}.")
    if not bool(torch.isfinite(loss)):
        raise LossError(
            f"{role} must be finite at the start; it is {float(loss.detach())} on the first batch. Look for "
            "logarithms or divisions by zero, and for values outside the range that the loss expects."
        )


def _check_graph(loss: Tensor, params: Params) -> list[Tensor]:
    missing = LossError(
        "training_loss must depend on the parameters that the inner optimizer holds; its result has no graph to any "
        "of them. Look for .detach(), .item() or torch.no_grad() in it, and use the model that the loss is given, "
        "not another."
    )
    if not loss.requires_grad:
        raise missing
    gradient = _grads([loss], params, create_graph=True)
    if all(g is None for g in gradient):
        raise missing
    return [g for g in gradient if g is not None]


def _check_validation_graph(loss: Tensor, params: Params, direct: Sequence[Tensor | None]) -> None:
    connected = loss.requires_grad and any(g is not None for g in [*_grads([loss], params), *direct])
    if not connected:
        raise LossError(
            "validation_loss must depend on the model's parameters, or on a hyperparameter; its result has no graph to "
            "any of them, and every hypergradient would be zero. Look for .detach(), .item() or torch.no_grad() in it. "
            f"A metric without a gradient needs a backend that does without ({backends_without_validation_gradient()})."
        )


def _grads(outputs: list[Tensor], inputs: Params, *, create_graph: bool = False) -> Sequence[Tensor | None]:
    if not inputs:
        return []
    return torch.autograd.grad(
        outputs,
        list(inputs.values()),
        [torch.ones_like(output) for output in outputs],
        create_graph=create_graph,
        retain_graph=True,
        allow_unused=True,
    )


def _try_second_derivative(
    problem: BilevelProblem, params: Params, hparams: Params, gradient: list[Tensor], batch: Any
) -> Sequence[Tensor | None]:
    curved = [g for g in gradient if g.requires_grad]
    if not curved:
        return [None] * len(hparams)
    try:
        _grads(curved, params)
        return _grads(curved, hparams)
    except (RuntimeError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise ProblemError(
                "the second derivative of the training loss must fit into memory on the first batch; it does not "
                f"(torch says: {first_line(error)}). Use smaller batches, or a backend that does without "
                f"({backends_without_second_derivative()})."
            ) from error
        name, where = _culprit(problem, batch, error)
        raise SecondDerivativeError(
            f"this backend differentiates the training loss twice, and {name} in {where} has no second derivative. "
            "Replace it by an equivalent that has one, or use a backend that does without "
            f"({backends_without_second_derivative()}). (torch says: {str(error).splitlines()[0]})"
        ) from error


def _culprit(problem: BilevelProblem, batch: Any, error: BaseException) -> tuple[str, str]:
    """The operator that torch names in its message, and the innermost module in which the training loss calls it."""
    backward = undifferentiable_operator(error)
    if backward is None:
        return "an operator", "the training loss"
    forward = re.sub(r"^_|_backward\w*$|_dense", "", backward).strip("_")
    with _Recorder(problem.model) as recorder, torch.no_grad():
        problem.functional_training_loss(problem.params, problem.hparams, batch)
    for name, where in recorder.calls:
        if forward in name.strip("_"):
            return f"operator {forward!r}", where
    return f"operator {backward!r}", "the training loss"


def _users_line() -> str:
    """``, line N of FILE,``: the innermost line of the present call that is neither torch's nor this library's."""
    frame: Any = sys._getframe()
    while frame is not None:
        package = frame.f_globals.get("__name__", "").split(".")[0]
        if package not in ("torch", "hyperopt_implicit", "contextlib"):
            return f", line {frame.f_lineno} of {Path(frame.f_code.co_filename).name},"
        frame = frame.f_back
    return ""


class _Recorder(TorchDispatchMode):
    """Notes each operator that runs, with the module that it runs in and the line that called it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: list[tuple[str, str]] = []
        self._stack: list[str] = []
        self._handles: list[Any] = []
        self._modules = dict(model.named_modules())

    def __enter__(self) -> _Recorder:
        for name, module in self._modules.items():
            label = (
                f"module {name!r} ({type(module).__name__})" if name else f"the model itself ({type(module).__name__})"
            )
            self._handles.append(module.register_forward_pre_hook(lambda *_, label=label: self._stack.append(label)))
            self._handles.append(module.register_forward_hook(lambda *_: self._stack.pop() and None, always_call=True))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for handle in self._handles:
            handle.remove()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        where = self._stack[-1] if self._stack else "the training loss itself, outside any module of the model"
        self.calls.append((function.name().removeprefix("aten::").split(".")[0], f"{where}{_users_line()}"))
        return function(*args, **(kwargs or {}))
