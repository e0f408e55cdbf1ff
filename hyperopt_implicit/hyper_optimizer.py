"""The outer step: a hypergradient, the policy for failed ones, and a ``torch.optim`` step on the hyperparameters.

``HyperOptimizer`` is that step for a training loop of one's own, and ``hypergradient`` is the number alone. The loop
that calls it, with inner steps around it, is in ``optimize.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hyperopt_implicit.argument_checks import check_list, is_number, shown
from hyperopt_implicit.backend import Hypergradient, Spec, State, get_backend
from hyperopt_implicit.carried import brought_back, fitting
from hyperopt_implicit.data import to_device
from hyperopt_implicit.errors import CheckpointError, HyperoptError, ProblemError
from hyperopt_implicit.guarded_step import GuardedStep, OnFailure, check_policy, honest
from hyperopt_implicit.hyperparameters import Value
from hyperopt_implicit.messages import first_line
from hyperopt_implicit.mixed_precision import check_autocast, training_in
from hyperopt_implicit.mixed_precision import inner_precision as precision_of
from hyperopt_implicit.out_of_memory import FittingBatches
from hyperopt_implicit.preflight import preflight
from hyperopt_implicit.problem import BilevelProblem, check_problem
from hyperopt_implicit.replicas import check_alike, refuse_differences, sync_buffers
from hyperopt_implicit.saved_state import load_optimizer_state, load_state_apart, state_apart


def hypergradient(
    problem: BilevelProblem,
    backend: Spec = "neumann",
    *,
    training_batches: Sequence[Any],
    validation_batch: Any,
    state: State | None = None,
) -> Hypergradient:
    """dF/dλ of a problem as it stands; nothing is changed (among several processes, buffers that differ are averaged).

    An implicit backend differentiates at the model's present weights, with the Hessian of the training loss averaged
    over ``training_batches``; an unrolled one through as many inner steps as there are batches, starting from the
    present weights.

    Args:
        problem: the bilevel problem.
        backend: a name, a dict of a name and options, or an instance.
        training_batches: at least one.
        validation_batch: where F is taken.
        state: ``Hypergradient.state`` of an earlier call, to warm-start from.

    Raises:
        HyperoptError: what :func:`hyperopt_implicit.preflight.preflight` refuses.

    Example:
        >>> import torch, hyperopt_implicit as hi
        >>> @hi.hyperparameter("decay", init=1.0)
        ... def training_loss(model, batch, *, decay):      # ½(w − 1)² + ½·decay·w², so w* = 1/(1 + decay)
        ...     return 0.5 * ((model.weight - 1) ** 2 + decay * model.weight**2).sum()
        >>> model = torch.nn.Linear(1, 1, bias=False).double()
        >>> _ = model.weight.data.fill_(0.5)
        >>> problem = hi.BilevelProblem(model, training_loss, lambda model, batch: model.weight.sum(),
        ...                             optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
        >>> hi.hypergradient(problem, "cg", training_batches=[None], validation_batch=None).gradients
        {'decay': tensor(-0.2500, dtype=torch.float64)}
    """
    _check_tunes_something(problem)
    if state is not None and not isinstance(state, Mapping):
        raise HyperoptError(f"state must be that of an earlier Hypergradient, or None; got {shown(state)}.")
    chosen = get_backend(backend).for_problem(problem)
    training, validation = _batches(problem, training_batches, validation_batch)
    chosen.check_steps(len(training))
    refuse_differences(problem, chosen)
    sync_buffers(problem.model)
    preflight(problem, chosen, training[0], validation)
    return chosen.hypergradient(problem, training, validation, fitting(state or {}, problem))


class HyperOptimizer:
    """Outer steps for a training loop of one's own.

    Args:
        problem: the bilevel problem; needs no data.
        optimizer: a ``torch.optim`` class, or a callable that makes an optimizer from the hyperparameters' tensors.
        backend: a name, a dict of a name and options, or an instance.
        clip: the largest norm of the hypergradient over all hyperparameters; longer ones are scaled down to it.
        on_failure: what to do when the backend reports a failure (divergence, negative curvature): ``"warn"`` once for
            each kind and use what was returned, ``"skip"`` the step, or ``"raise"``. A hypergradient that is not
            finite is never applied: it is skipped, or raises.
        inner_precision: ``"bfloat16"`` or ``"float16"``: in which a backend that differentiates through training takes
            its steps, as for :func:`optimize`. Steps of the model are those of one's own loop.
        **options: for the optimizer, such as ``lr``.

    Raises:
        HyperoptError: the backend or its options are unknown, or there is nothing to optimize.

    Example:
        >>> import torch, hyperopt_implicit as hi
        >>> @hi.hyperparameter("decay", init=0.1)
        ... def training_loss(model, batch, *, decay):
        ...     return ((model(batch) - 1) ** 2).mean() + decay * model.weight.square().sum()
        >>> model = torch.nn.Linear(1, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> batch = torch.ones(4, 1)
        >>> def validation_loss(model, batch):
        ...     return (model(batch) ** 2).mean()
        >>> problem = hi.BilevelProblem(model, training_loss, validation_loss, optimizer=optimizer)
        >>> outer = hi.HyperOptimizer(problem, torch.optim.Adam, lr=1e-2, backend="cg")
        >>> for step in range(3):
        ...     problem.training_loss(batch).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     report = outer.step(batch, batch)
        >>> report.status.value
        'converged'
    """

    def __init__(
        self,
        problem: BilevelProblem,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
        *,
        backend: Spec = "neumann",
        clip: float | None = None,
        on_failure: OnFailure = "warn",
        inner_precision: str | None = None,
        **options: Any,
    ) -> None:
        check_policy(clip, on_failure)
        _check_tunes_something(problem)
        self.inner_precision = precision_of(inner_precision, problem)
        if isinstance(optimizer, torch.optim.Optimizer) or not callable(optimizer):
            raise HyperoptError(
                "the outer optimizer must be a torch.optim class, or a callable that makes an optimizer from the "
                f"hyperparameters' tensors; got an instance of {type(optimizer).__name__}. Pass the class, such as "
                "torch.optim.Adam, and its options by keyword."
            )
        self.problem = problem
        self.backend = get_backend(backend).for_problem(problem)
        self.backend.check(problem)
        check_alike(problem, self.backend)
        self.optimizer = _made(optimizer, list(problem.hparams.values()), options)
        self.state: State = {}
        self.checked = False
        self._fitting = FittingBatches()
        self._tunes_the_optimizer = bool(problem.hyperparameters.names("optimizer"))
        self.guard = GuardedStep(
            self.optimizer, clip=clip, on_failure=on_failure, is_inside=problem.hyperparameters.is_inside
        )

    @property
    def hyperparameters(self) -> dict[str, Value]:
        """The present constrained values by name, detached."""
        return self.problem.hyperparameters.values()

    def check(self, training_batch: Any, validation_batch: Any) -> None:
        """Try the losses and their derivatives on one batch each; the first outer step does it where this was not
        called.

        Raises:
            HyperoptError: what :func:`hyperopt_implicit.preflight.preflight` refuses.
        """
        preflight(self.problem, self.backend, training_batch, validation_batch)
        check_autocast(self.problem, self.inner_precision, training_batch)
        self.checked = True

    def step(self, training_batch: Any, validation_batch: Any) -> Hypergradient:
        """One outer step from one training and one validation batch; see :meth:`step_through`."""
        return self.step_through([training_batch], validation_batch)

    def step_through(self, training_batches: Sequence[Any], validation_batch: Any) -> Hypergradient:
        """One outer step: the hypergradient, clipped, given to the outer optimizer.

        The model is not trained. Implicit backends average the training loss over the batches; unrolled ones look ahead
        through as many inner steps.

        Raises:
            HypergradientError: it failed, and ``on_failure="raise"``.
        """
        result = self.compute(training_batches, validation_batch)
        self.apply(result)
        return result

    def compute(self, training_batches: Sequence[Any], validation_batch: Any) -> Hypergradient:
        """The hypergradient alone, with the state carried from the last one; checks the problem at its first call.

        Where memory runs out, a backend that averages over batches is given fewer of them, from then on.
        """
        training, validation = _batches(self.problem, training_batches, validation_batch)
        self.backend.check_steps(len(training))
        sync_buffers(self.problem.model)
        if not self.checked:
            self.check(training[0], validation)
        with training_in(self.problem, self.inner_precision):
            found = self._fitting.hypergradient(self.backend, self.problem, training, validation, self.state)
        result = honest(found)
        self.carry(result)
        return result

    def carry(self, result: Hypergradient) -> None:
        """Keep what the backend wants to be given at its next call."""
        self.state = result.state if result.status.usable else {}
        if result.endpoint is not None:
            self.inner_precision.keep(result.endpoint.scaling)

    def apply(self, result: Hypergradient, size: float | None = None) -> bool:
        """Move the hyperparameters by a hypergradient, as the policy for failures allows; says whether they moved.

        Args:
            result: the hypergradient.
            size: its norm, from a caller who has computed it.

        Raises:
            HypergradientError: it failed, and ``on_failure="raise"``.
        """
        moved = self.guard.apply(result, self.problem.hparams, size)
        self.problem.hyperparameters.project_()
        if self._tunes_the_optimizer:
            self.problem.sync_optimizer()
        return moved

    def state_dict(self) -> dict[str, Any]:
        """Hyperparameters, outer optimizer, the backend's carried state, how many batches fit, and a loss's scale."""
        return {
            "hyperparameters": self.problem.hyperparameters.state_dict(),
            "other_buffers": state_apart(self.problem.hyperparameters),
            "optimizer": self.optimizer.state_dict(),
            "backend_state": self.state,
            "most_batches": self._fitting.most,
            "inner_precision": self.inner_precision.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        A backend's state that does not fit the model is dropped, with a warning.

        Raises:
            CheckpointError: it is of other hyperparameters, or of another kind of optimizer.
        """
        found = state.keys() if isinstance(state, Mapping) else set()
        missing = {"hyperparameters", "optimizer", "backend_state"} - found
        if missing:
            raise CheckpointError(
                "the state of a HyperOptimizer is a dict, as its state_dict() gives it; this one is without "
                f"{', '.join(sorted(missing))}."
            )
        try:
            self.problem.hyperparameters.load_state_dict(state["hyperparameters"])
            load_state_apart(self.problem.hyperparameters, state.get("other_buffers", {}))
            load_optimizer_state(self.optimizer, state["optimizer"])
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:  # torch's
            raise CheckpointError(
                "the state must be that of a HyperOptimizer with the same hyperparameters and the same kind of "
                f"optimizer; it is not: {' '.join(str(error).split())[:300]}"
            ) from error
        self.state = fitting(brought_back(state["backend_state"], self.problem), self.problem)
        self._fitting.most = state.get("most_batches")
        self.inner_precision.load_state_dict(state.get("inner_precision", {}))
        self.problem.sync_optimizer()


def _made(
    optimizer: Callable[..., torch.optim.Optimizer], tensors: list[Tensor], options: dict[str, Any]
) -> torch.optim.Optimizer:
    try:
        made = optimizer(tensors, **options)
    except (TypeError, ValueError, RuntimeError) as error:  # what torch.optim raises for options
        given = ", ".join(f"{name}={shown(value)}" for name, value in options.items())
        raise HyperoptError(
            f"the outer optimizer must be made from the hyperparameters' tensors{f' and {given}' if given else ''}; it "
            f"raised {type(error).__name__}: {first_line(error)}. Change its options, or pass a callable that takes "
            "the tensors alone."
        ) from error
    if not isinstance(made, torch.optim.Optimizer):
        raise HyperoptError(
            f"the outer optimizer must be a torch.optim.Optimizer; the callable made {shown(made)}. For instance "
            "lambda tensors: torch.optim.SGD(tensors, lr=0.1)."
        )
    if isinstance(made, torch.optim.LBFGS):
        raise HyperoptError(
            "the outer optimizer must step by one gradient; LBFGS evaluates the loss again, by a closure. Take "
            "another, such as torch.optim.Adam."
        )
    for group in made.param_groups:
        lr = group.get("lr", 0.0)
        if not is_number(float(lr) if isinstance(lr, Tensor) and lr.is_floating_point() else lr):
            raise HyperoptError(f"the learning rate of the outer optimizer must be a finite number; got {shown(lr)}.")
    return made


def _check_tunes_something(problem: BilevelProblem) -> None:
    check_problem(problem)
    if not problem.hparams:
        raise ProblemError(
            "there must be at least one hyperparameter to optimize; none is declared. Put @hyperparameter(name, "
            "init=…) on the training loss."
        )


def _batches(problem: BilevelProblem, training_batches: Sequence[Any], validation_batch: Any) -> tuple[list[Any], Any]:
    check_list("training_batches", training_batches, "batches", ProblemError, sized=False)
    training = [to_device(batch, problem.device) for batch in training_batches]
    if not training:
        raise ProblemError(
            "training_batches must hold at least one batch; it is empty. Pass [batch], or one batch for each inner "
            "step to differentiate."
        )
    return training, to_device(validation_batch, problem.device)
