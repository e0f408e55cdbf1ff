"""The bilevel problem: a model, two losses, data and an inner optimizer, bound together.

``BilevelProblem`` offers both losses in two forms: on the real model, for training, and as pure functions of
(params, hparams, batch), for differentiation. How a problem is trained or differentiated is not decided here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from hyperopt_implicit.argument_checks import check_function, shown
from hyperopt_implicit.binding import (
    OptimizerFactory,
    check_bare,
    check_options,
    has_weight_norm,
    inner_optimizer,
    match,
    trained_parameters,
)
from hyperopt_implicit.data import BatchStream, Data, check_data
from hyperopt_implicit.distributed import mean, several
from hyperopt_implicit.errors import LossError, ProblemError
from hyperopt_implicit.functional import Places
from hyperopt_implicit.hyperparameters import Hyperparameters, Value, declarations_of, undecorated
from hyperopt_implicit.inner_state import InnerState, copied
from hyperopt_implicit.micro_batches import parts_of
from hyperopt_implicit.mixed_precision import FULL, InnerPrecision
from hyperopt_implicit.shares import mean_of_shares, replicated
from hyperopt_implicit.vectors import Params


class _Bound(nn.Module):
    """Model and hyperparameters under one roof, so that tensors of both are swapped at once."""

    def __init__(self, model: nn.Module, hyperparameters: Hyperparameters) -> None:
        super().__init__()
        self.model = model
        self.hyperparameters = hyperparameters


class BilevelProblem:
    """Choose hyperparameters λ to minimise F(w*(λ), λ), where w*(λ) minimises L(w, λ).

    Args:
        model: the module whose parameters w are trained. It is used and changed in place, as in any training loop.
        training_loss: ``L(model, batch, *, name=…)``, a scalar, with its ``@hyperparameter`` declarations on it. It
            runs in the modes (train or eval, module by module) in which the model was handed over.
        validation_loss: ``F(model, batch)``, a scalar; it may take hyperparameters by keyword as well, and its direct
            dependence on them is part of every hypergradient. It runs with the model in eval mode.
        training_data: a re-iterable of batches (a DataLoader, a list of tensors); only
            :func:`hyperopt_implicit.optimize` needs it. Batches are moved to the model's device, whatever their
            nesting.
        validation_data: the same, for the validation loss.
        optimizer: a factory of the inner optimizer, called with the list of the model's trainable parameters, or an
            optimizer that exists already. The parameters that it holds are w; others stay as they are.

    Attributes:
        model: the model given.
        hyperparameters: the :class:`Hyperparameters` module that holds λ.
        optimizer: the inner optimizer.
        has_weight_norm: whether a weight of the model or of a hyperparameter is normalised by ``weight_norm``.
        inner_precision: in which inner steps are computed; a run or a :class:`HyperOptimizer` sets it for their time.

    Raises:
        ProblemError: nothing in the model requires grad, the optimizer holds foreign parameters, or a loss takes a
            keyword that nobody declared.
        DataError: data is empty, spent after one pass, or a single batch.
        DeclarationError: a hyperparameter is declared twice, taken by no loss, or starts outside its constraint.

    Example:
        >>> import torch, hyperopt_implicit as hi
        >>> @hi.hyperparameter("decay", init=0.1)
        ... def training_loss(model, batch, *, decay):
        ...     x, y = batch
        ...     return ((model(x) - y) ** 2).mean() + decay * model.weight.square().sum()
        >>> def validation_loss(model, batch):
        ...     x, y = batch
        ...     return ((model(x) - y) ** 2).mean()
        >>> batch = (torch.ones(4, 2), torch.ones(4, 1))
        >>> problem = hi.BilevelProblem(
        ...     torch.nn.Linear(2, 1), training_loss, validation_loss, training_data=[batch], validation_data=[batch],
        ...     optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
        >>> sorted(problem.params)
        ['bias', 'weight']
    """

    inner_precision: InnerPrecision = FULL

    def __init__(
        self,
        model: nn.Module,
        training_loss: Callable[..., Tensor],
        validation_loss: Callable[..., Tensor],
        *,
        training_data: Data | None = None,
        validation_data: Data | None = None,
        optimizer: OptimizerFactory | torch.optim.Optimizer,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ProblemError(f"model must be a torch.nn.Module; got {type(model).__name__}.")
        check_bare(model)
        for data, role in ((training_data, "training_data"), (validation_data, "validation_data")):
            if data is not None:
                check_data(data, role)
        self.model = model
        self.training_data = training_data
        self.validation_data = validation_data
        for loss, role in ((training_loss, "training_loss"), (validation_loss, "validation_loss")):
            check_function(loss, f"{role} must be a function of (model, batch, …)", ProblemError)
        self._losses = {
            "training_loss": undecorated(training_loss),
            "validation_loss": undecorated(validation_loss),
        }
        declarations = declarations_of(training_loss) + declarations_of(validation_loss)
        self._taken = match(declarations, self._losses)
        self.optimizer = inner_optimizer(optimizer, model)
        self._params = trained_parameters(self.optimizer, model)
        self.hyperparameters = Hyperparameters(declarations, model)
        check_options(self.hyperparameters, self.optimizer)
        bound = _Bound(model, self.hyperparameters)
        self._places = Places(bound)
        self.has_weight_norm = has_weight_norm(bound)
        self.sync_optimizer()

    # ------------------------------------------------------------------------------------------------ what it is

    @property
    def params(self) -> Params:
        """w: the model's parameters that the inner optimizer trains, by name; live, not copies."""
        return dict(self._params)

    @property
    def hparams(self) -> Params:
        """λ: the unconstrained values of the hyperparameters; live, not copies."""
        return self.hyperparameters.unconstrained()

    @property
    def parameter_groups(self) -> list[tuple[dict[str, Any], list[str]]]:
        """The inner optimizer's groups, each with the names of the parameters of w that it holds."""
        names = {id(p): name for name, p in self._params.items()}
        return [
            (group, [names[id(p)] for p in group["params"] if id(p) in names]) for group in self.optimizer.param_groups
        ]

    @property
    def weight_decays(self) -> dict[str, float]:
        """What the inner optimizer adds to ∂L/∂w, by parameter, as a multiple of w; those without are left out.

        A decay that is coupled to the gradient (all of torch.optim's but AdamW's) moves the minimum as a term of L
        would.
        """
        return {
            name: float(group["weight_decay"]) * (-1.0 if group.get("maximize") else 1.0)
            for group, names in self.parameter_groups
            if group.get("weight_decay") and not group.get("decoupled_weight_decay")
            for name in names
        }

    @property
    def device(self) -> torch.device:
        """Where the trained parameters live, and where batches are moved to."""
        return next(iter(self._params.values())).device

    def to(self, device: torch.device | str) -> BilevelProblem:
        """Move model, hyperparameters and the inner optimizer's state to a device."""
        self.model.to(device)
        self.hyperparameters.to(device)
        self.optimizer.load_state_dict(self.optimizer.state_dict())
        return self

    def copy(
        self, dtype: torch.dtype | None = None, losses: Mapping[str, Callable[..., Tensor]] | None = None
    ) -> BilevelProblem:
        """An independent copy of model, hyperparameters and inner optimizer; the data is shared, and so are the losses.

        Args:
            dtype: of the copy's floating-point parameters, buffers and optimizer state; unchanged where None.
            losses: ``"training_loss"`` or ``"validation_loss"``, to be used in the place of the problem's own; it must
                take the same keywords.
        """
        memo: dict[int, Any] = {}
        other = copy.copy(self)
        other.model = copy.deepcopy(self.model, memo)
        other.hyperparameters = copy.deepcopy(self.hyperparameters, memo)
        other.optimizer = copy.deepcopy(self.optimizer, memo)
        if dtype is not None:
            other.model.to(dtype)
            other.hyperparameters.to(dtype)
            other.optimizer.load_state_dict(other.optimizer.state_dict())
        named = dict(other.model.named_parameters())
        other._params = {name: named[name] for name in self._params}
        other._places = Places(_Bound(other.model, other.hyperparameters))
        other._losses = {**self._losses, **(losses or {})}
        return other

    def loss_source(self, role: str = "training_loss") -> Callable[..., Tensor]:
        """The undecorated function behind ``training_loss`` or ``validation_loss``."""
        return self._losses[role]

    def stream(self, role: str) -> BatchStream:
        """An endless stream over ``training_data`` or ``validation_data``.

        Raises:
            ProblemError: the problem was built without that data.
        """
        data = self.training_data if role == "training_data" else self.validation_data
        if data is None:
            raise ProblemError(
                f"this needs the problem's {role}, and BilevelProblem was built without; pass {role}=, a list of "
                "batches or a DataLoader, or hand over the batches yourself through HyperOptimizer.step."
            )
        return BatchStream(data, self.device, role)

    def __repr__(self) -> str:
        sizes = {"parameters": self.params, "unconstrained hyperparameters": self.hparams}
        counts = ", ".join(f"{sum(p.numel() for p in each.values()):,} {name}" for name, each in sizes.items())
        names = ", ".join(self.hyperparameters.declarations)
        return f"BilevelProblem({type(self.model).__name__}, {type(self.optimizer).__name__}, {counts}: {names})"

    # ------------------------------------------------------------------------------------- losses on the real model

    def training_loss(self, batch: Any, values: dict[str, Value] | None = None) -> Tensor:
        """L on the model as it stands, with the present hyperparameters (or the constrained ``values`` given).

        This is the loss to call in a training loop of one's own; buffers such as running statistics move. Among several
        processes it is the mean over their shares of the batch, and so are its derivatives.
        """
        if not several():
            return self._evaluate("training_loss", batch, values)
        hparams = self.hparams if values is None else {}
        (params, hparams), ties = replicated(self.params, hparams)
        with self._places.parameters_swapped(_prefixed(params, hparams)):
            return mean_of_shares(self._evaluate("training_loss", batch, values), ties)

    def share_of_training_loss(self, batch: Any, values: dict[str, Value] | None = None) -> Tensor:
        """The same, of this process's share of the batch alone; that of :meth:`training_loss` for one process."""
        return self._evaluate("training_loss", batch, values)

    @torch.no_grad()
    def validation_loss(self, batch: Any) -> Tensor:
        """F on the model as it stands, in eval mode, without a graph; among several processes, the mean of theirs."""
        with evaluating(self.model):
            return mean(self._evaluate("validation_loss", batch))

    # ---------------------------------------------------------------------------- losses as functions of (w, λ, batch)

    def functional_training_loss(
        self, params: Params, hparams: Params, batch: Any, buffers: Params | None = None
    ) -> Tensor:
        """L(w, λ) as a pure function. ``buffers`` are changed in place where given; the model's own never are."""
        return self._call("training_loss", params, hparams, batch, buffers)

    def functional_validation_loss(
        self, params: Params, hparams: Params, batch: Any, buffers: Params | None = None
    ) -> Tensor:
        """F(w, λ) as a pure function, in eval mode."""
        with evaluating(self.model):
            return self._call("validation_loss", params, hparams, batch, buffers)

    def _call(self, role: str, params: Params, hparams: Params, batch: Any, buffers: Params | None) -> Tensor:
        among_several = several()
        ties: list[Tensor] = []
        if among_several:
            (params, hparams), ties = replicated(params, hparams)
        given = {} if buffers is None else {f"model.{name}": tensor for name, tensor in buffers.items()}
        loss, held = self.evaluate_with(role, _prefixed(params, hparams), given, batch)
        for name, tensor in given.items():  # a module may have put another in the place of a buffer
            if buffers is not None and held[name] is not tensor:
                buffers[name.removeprefix("model.")] = held[name].detach()
        return mean_of_shares(loss, ties) if among_several else loss

    def evaluate_with(
        self, role: str, parameters: Params, buffers: Params, batch: Any, values: dict[str, Value] | None = None
    ) -> tuple[Tensor, Params]:
        """A loss with other tensors in the place of the model's and the hyperparameters' own; in the modes they are in.

        Args:
            role: ``"training_loss"`` or ``"validation_loss"``.
            parameters: by name, after ``model.`` or ``hyperparameters.``; others stay.
            buffers: the same; those given are changed in place, and the others never are.
            batch: one batch.
            values: the constrained hyperparameters, where they are known.

        Returns:
            The loss, and the buffers with which the modules were left: one may have been replaced.
        """
        with self._places.swapped(parameters, buffers) as held:
            loss = self._evaluate(role, batch, values)
        return loss, held

    def _evaluate(self, role: str, batch: Any, values: dict[str, Value] | None = None) -> Tensor:
        taken = self._taken[role]
        if values is None:
            values = self.hyperparameters("loss") if taken else {}
        given = {name: values[name] for name in taken}
        losses = [_scalar(self._losses[role](self.model, part, **given), role) for part in parts_of(batch)]
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean()

    # --------------------------------------------------------------------------------------------- the inner state

    def inner_state(self) -> InnerState:
        """A copy of parameters, buffers and the optimizer's state."""
        optimizer = {
            name: {key: copied(value) for key, value in self.optimizer.state.get(p, {}).items()}
            for name, p in self._params.items()
        }
        return InnerState(
            params={name: p.detach().clone() for name, p in self._params.items()},
            buffers={name: b.detach().clone() for name, b in self.model.named_buffers()},
            optimizer=optimizer,
        )

    @torch.no_grad()
    def load_inner_state(self, state: InnerState) -> None:
        """Put a state back that :meth:`inner_state` copied, or that a backend arrived at."""
        for name, p in self._params.items():
            p.copy_(state.params[name])
            self.optimizer.state.pop(p, None)
            if state.optimizer[name]:
                self.optimizer.state[p] = {key: copied(value) for key, value in state.optimizer[name].items()}
        for name, buffer in list(self.model.named_buffers()):
            before = state.buffers.get(name, buffer)  # it may have been registered since
            if before.shape == buffer.shape:
                buffer.copy_(before)
                continue
            replacement = before.clone()
            for owner, key in self._places.buffers()[f"model.{name}"]:
                owner[key] = replacement

    @torch.no_grad()
    def sync_optimizer(self) -> None:
        """Write the present values of the optimizer's hyperparameters into its options; of a schedule, the first."""
        for name, value in self.hyperparameters("optimizer").items():
            for group in self.optimizer.param_groups:
                write_option(group, name, float(cast(Tensor, value).flatten()[0]))


def check_problem(problem: Any) -> None:
    """Refuse what is no problem.

    Raises:
        ProblemError: with what it is.
    """
    if not isinstance(problem, BilevelProblem):
        raise ProblemError(f"problem must be a BilevelProblem; got {shown(problem)}.")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module is in the mode it had before."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def write_option(group: dict[str, Any], name: str, value: Any) -> None:
    """Set an option of a parameter group; ``beta1`` and ``beta2`` are the two places of ``betas``."""
    if name in ("beta1", "beta2") and "betas" in group:
        first, second = group["betas"]
        group["betas"] = (value, second) if name == "beta1" else (first, value)
    elif isinstance(group.get(name), Tensor):  # it may be in a compiled step, which reads it from this memory
        group[name].fill_(value)
    else:
        group[name] = value


def _prefixed(params: Params, hparams: Params) -> Params:
    parameters = {f"model.{name}": tensor for name, tensor in params.items()}
    parameters.update((f"hyperparameters.{name}", tensor) for name, tensor in hparams.items())
    return parameters


def _scalar(loss: Any, role: str) -> Tensor:
    if not isinstance(loss, Tensor):
        raise LossError(f"{role} must return a scalar tensor; got {type(loss).__name__}.")
    if loss.numel() != 1:
        raise LossError(f"{role} must return a scalar; got shape {tuple(loss.shape)}. Take its mean or its sum.")
    return loss.reshape(())
