"""Rules that turn the losses of several tasks into one step of training: their contract, and finding one by name.

They are what learned weights are compared with: none of them looks at a validation loss. The methods that look at the
losses alone are in ``loss_weighting.py``, those that look at the tasks' gradients in ``gradient_weighting.py``.
Weights that are learned through the validation loss are in ``combiners.py``.
"""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from hyperopt_implicit.errors import AuxiliaryError
from hyperopt_implicit.messages import nearest


class Weighting(nn.Module, ABC):
    """How the losses of several tasks become one step of training: d = Σᵢ wᵢ ∂Lᵢ/∂w.

    A method derives from this class and says what the weights are. What it remembers between steps is in its
    ``state_dict()``; what it learns are its ``parameters()``, to be given to an optimizer beside the model's.

    Args:
        tasks: the number of losses.
        main_task: which of them is the one that counts; the others are there to help it.

    Class attributes:
        needs_gradients: whether the weights depend on the tasks' gradients. A step then costs one backward pass per
            task and holds all their gradients at once; otherwise it costs one backward pass, whatever the number of
            tasks. The several passes go through ``torch.autograd.grad``, which
            ``torch.nn.parallel.DistributedDataParallel`` does not see: average the gradients over processes yourself.

    Raises:
        AuxiliaryError: there is no task, or no such main task.

    Example:
        >>> import torch
        >>> from hyperopt_implicit.auxiliary.weighting import Weighting
        >>> class LargestFirst(Weighting):
        ...     def weights(self, losses, gramian):
        ...         return torch.softmax(losses, dim=0)
        >>> x = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> LargestFirst(tasks=2).backward(x.square(), [x])
        tensor([0.5000, 0.5000])
        >>> x.grad
        tensor([1., 1.])
    """

    needs_gradients: ClassVar[bool] = False

    def __init__(self, tasks: int, *, main_task: int = 0) -> None:
        super().__init__()
        if tasks < 1:
            raise AuxiliaryError(f"tasks must be the number of losses, at least 1; got {tasks}.")
        if not 0 <= main_task < tasks:
            raise AuxiliaryError(
                f"main_task must be the index of one of the {tasks} losses, from 0 to {tasks - 1}; got {main_task}."
            )
        self.tasks = tasks
        self.main_task = main_task

    @abstractmethod
    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """The weight of each task at this step; called once a step, since a method with a memory records the losses.

        Args:
            losses: [tasks], without their graph.
            gramian: [tasks, tasks], the inner products G Gᵀ of the tasks' gradients on the shared parameters; None
                where ``needs_gradients`` is False.

        Returns:
            [tasks], without a graph.
        """

    def objective(self, losses: Tensor, gramian: Tensor | None) -> Tensor | None:
        """What the method's own parameters minimise, as a function of them alone; None where it has no parameters."""
        return None

    def end_epoch(self) -> None:
        """Say that an epoch is over. Does nothing but in methods that average the losses over epochs."""
        return

    def gradients(
        self, losses: Tensor, parameters: Iterable[Tensor], shared: Iterable[Tensor] | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """The combined gradient d = Σᵢ wᵢ ∂Lᵢ/∂p of each parameter; no ``.grad`` is written.

        Args:
            losses: [tasks], each with its graph, as from ``torch.stack``. The graph is freed.
            parameters: what to differentiate with respect to.
            shared: where the tasks' gradients are compared, such as the last layer that all tasks use; all of
                ``parameters`` by default. Unused where ``needs_gradients`` is False.

        Returns:
            One gradient for each parameter, in their order, and the weights [tasks]. A parameter that no loss uses, or
            that does not require grad, has gradient zero.

        Raises:
            AuxiliaryError: the losses are not one per task or have no graph, or no parameter requires grad.
        """
        wanted, compared = self._checked(losses, parameters, shared)
        active = _distinct(wanted)
        if self.needs_gradients:
            grads, weights, _ = self._combined(losses, active, compared)
        else:
            weights = self._weights(losses, None)
            found = torch.autograd.grad(losses, active, grad_outputs=weights, allow_unused=True)
            grads = dict(zip(map(id, active), found, strict=True))
        pairs = [(p, grads.get(id(p))) for p in wanted]
        return [torch.zeros_like(p) if grad is None else grad for p, grad in pairs], weights

    def backward(self, losses: Tensor, parameters: Iterable[Tensor], shared: Iterable[Tensor] | None = None) -> Tensor:
        """Add the combined gradient to the parameters' ``.grad``, and that of the method's own parameters to theirs.

        As with ``Tensor.backward``, the ``.grad`` of a parameter that no loss uses stays as it was.

        Args:
            losses: [tasks], each with its graph, as from ``torch.stack``. The graph is freed.
            parameters: what to train, all of them leaves.
            shared: where the tasks' gradients are compared, such as the last layer that all tasks use; all of
                ``parameters`` by default. Unused where ``needs_gradients`` is False.

        Returns:
            The weights [tasks].

        Raises:
            AuxiliaryError: the losses are not one per task or have no graph, or no parameter requires grad.

        Example:
            >>> import torch
            >>> from hyperopt_implicit.auxiliary.weighting import get_weighting
            >>> model, weighting = torch.nn.Linear(3, 2), get_weighting("equal", tasks=2)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> losses = model(torch.ones(4, 3)).square().mean(dim=0)          # a task for each output
            >>> weighting.backward(losses, model.parameters())
            tensor([1., 1.])
            >>> optimizer.step()
        """
        wanted, compared = self._checked(losses, parameters, shared)
        active = _distinct(wanted)
        gramian = None
        if self.needs_gradients:
            grads, weights, gramian = self._combined(losses, active, compared)
            for p in active:
                _accumulate(p, grads[id(p)])
        else:
            weights = self._weights(losses, None)
            torch.autograd.backward(losses, grad_tensors=weights, inputs=active)
        own = [p for p in self.parameters() if p.requires_grad]
        if own:
            with torch.enable_grad():
                objective = self.objective(losses.detach(), gramian)
            if objective is not None:
                torch.autograd.backward(objective, inputs=own)
        return weights

    def _weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        return self.weights(losses.detach(), gramian).detach().to(losses)

    def _combined(
        self, losses: Tensor, active: list[Tensor], compared: list[Tensor]
    ) -> tuple[dict[int, Tensor | None], Tensor, Tensor]:
        """Gradients by parameter, the weights and the Gramian, from one backward pass per task."""
        inputs = _distinct([*active, *compared])
        rows = [
            torch.autograd.grad(loss, inputs, retain_graph=i < self.tasks - 1, allow_unused=True)
            for i, loss in enumerate(losses)
        ]
        columns = dict(zip(map(id, inputs), zip(*rows, strict=True), strict=True))
        gramian = _gramian([columns[id(p)] for p in compared], losses)
        weights = self._weights(losses, gramian)
        return {id(p): _weighted_sum(weights, columns[id(p)]) for p in active}, weights, gramian

    def _checked(
        self, losses: Tensor, parameters: Iterable[Tensor], shared: Iterable[Tensor] | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        if not isinstance(losses, Tensor) or losses.shape != (self.tasks,):
            found = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise AuxiliaryError(
                f"losses must be a tensor of shape ({self.tasks},), one loss per task; got {found}. Put them together "
                "with torch.stack, and do not add them up: that is the weighting's part."
            )
        if not losses.requires_grad:
            raise AuxiliaryError(
                "losses must have a graph that leads to the parameters; these require no grad. Compute them outside "
                "torch.no_grad(), and stack the losses themselves, not their .item() or .detach()."
            )
        wanted = _as_list("parameters", parameters)
        return wanted, _distinct(wanted if shared is None else _as_list("shared", shared))

    def extra_repr(self) -> str:
        return f"tasks={self.tasks}, main_task={self.main_task}"


def _as_list(what: str, tensors: Iterable[Tensor]) -> list[Tensor]:
    """What a generator holds, read once."""
    rule = f"{what} must be an iterable of tensors of which at least one requires grad"
    if isinstance(tensors, Tensor):
        raise AuxiliaryError(f"{rule}; got a single tensor. Put it in a list.")
    given = list(tensors)
    for each in given:
        if not isinstance(each, Tensor):
            raise AuxiliaryError(f"{rule}; got a {type(each).__name__} among them. Pass model.parameters().")
    if not any(p.requires_grad for p in given):
        found = f"{len(given)}, all frozen. Unfreeze one" if given else "none. Pass model.parameters(), not yet read"
        raise AuxiliaryError(f"{rule}; got {found}.")
    return given


def _distinct(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those that require grad, each once, in order."""
    return list({id(p): p for p in tensors if p.requires_grad}.values())


def _gramian(columns: Sequence[tuple[Tensor | None, ...]], losses: Tensor) -> Tensor:
    """G Gᵀ [tasks, tasks], added up over parameters, so that no second copy of all gradients is made."""
    tasks = len(losses)
    total = losses.new_zeros((tasks, tasks), dtype=torch.promote_types(losses.dtype, torch.float32))
    for column in columns:
        used = next((grad for grad in column if grad is not None), None)
        if used is not None:
            dense = [(torch.zeros_like(used) if grad is None else grad).to_dense().reshape(-1) for grad in column]
            matrix = torch.stack(dense).to(total.dtype)
            total += (matrix @ matrix.T).to(total.device)
    return total


def _weighted_sum(weights: Tensor, column: tuple[Tensor | None, ...]) -> Tensor | None:
    """Σᵢ wᵢ ∂Lᵢ/∂p; None where no task uses p."""
    terms = [weight.to(grad) * grad for weight, grad in zip(weights, column, strict=True) if grad is not None]
    return cast(Tensor, sum(terms[1:], start=terms[0])) if terms else None


@torch.no_grad()
def _accumulate(parameter: Tensor, grad: Tensor | None) -> None:
    if grad is not None and parameter.grad is not None:
        parameter.grad += grad
    elif grad is not None:
        parameter.grad = grad


def torchjd_module(name: str, needed_by: str) -> Any:
    """A part of torchjd, imported when a method needs it.

    Raises:
        AuxiliaryError: torchjd is not installed.
    """
    try:
        return importlib.import_module(f"torchjd.{name}")
    except ImportError as error:
        raise AuxiliaryError(
            f"the weighting {needed_by!r} needs torchjd, which cannot be imported ({error}). Install it with "
            "pip install 'hyperopt-implicit[auxiliary]'."
        ) from error


# ------------------------------------------------------------------------------------------------------ finding by name


def _methods() -> dict[str, tuple[type[Weighting], dict[str, Any]]]:
    """Each name's class, and the options that the name stands for."""
    from hyperopt_implicit.auxiliary import gradient_weighting, loss_weighting

    return {
        "cosine": (gradient_weighting.GradientCosine, {"weighted": True}),
        "cosine-unweighted": (gradient_weighting.GradientCosine, {"weighted": False}),
        "dwa": (loss_weighting.DynamicWeightAverage, {}),
        "equal": (loss_weighting.EqualWeights, {}),
        "fixed": (loss_weighting.FixedWeights, {}),
        "gradnorm": (gradient_weighting.GradNorm, {}),
        "pcgrad": (gradient_weighting.PCGrad, {}),
        "single": (loss_weighting.SingleTask, {}),
        "uncertainty": (loss_weighting.UncertaintyWeighting, {}),
    }


def list_weightings() -> list[str]:
    """The names of all weighting methods, sorted.

    Example:
        >>> list_weightings()[:4]
        ['cosine', 'cosine-unweighted', 'dwa', 'equal']
    """
    return sorted(_methods())


def get_weighting(name: str, tasks: int, *, main_task: int = 0, **options: Any) -> Weighting:
    """The weighting method of that name.

    Args:
        name: one of :func:`list_weightings`.
        tasks: the number of losses.
        main_task: which loss is the main task's.
        **options: the method's own, such as ``temperature`` of ``"dwa"``.

    Raises:
        AuxiliaryError: the name or an option is unknown, an option that has no default is missing, or a value breaks
            its rule.

    Example:
        >>> get_weighting("dwa", tasks=3, temperature=1.0)
        DynamicWeightAverage(tasks=3, main_task=0, temperature=1.0)
    """
    methods = _methods()
    if name not in methods:
        raise AuxiliaryError(
            f"there is no weighting {name!r}; known are {', '.join(sorted(methods))}.{nearest(str(name), methods)}"
        )
    method, meant = methods[name]
    parameters = inspect.signature(method).parameters
    known = [each for each in parameters if each not in {"tasks", "main_task", *meant}]
    for option in options:
        if option not in known:
            has = f"its options are {', '.join(known)}" if known else "it has none"
            raise AuxiliaryError(f"weighting {name!r} has no option {option!r}; {has}.{nearest(option, known)}")
    for option in known:
        if option not in options and parameters[option].default is inspect.Parameter.empty:
            raise AuxiliaryError(f"weighting {name!r} needs the option {option!r}; got none. Pass {option}=….")
    return method(tasks, main_task=main_task, **meant, **options)
