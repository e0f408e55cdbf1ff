"""A problem made fit for exact questions: a copy in float64, its losses averages over fixed batches with fixed masks.

On a :class:`Twin` the inner problem is one deterministic function of (w, λ), which can be minimised to rounding, and
training is one deterministic map, which can be run again for other λ. What is done with either is in ``truth.py``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hyperopt_implicit.backend import Backend, Hypergradient
from hyperopt_implicit.errors import HyperoptWarning
from hyperopt_implicit.hyper_optimizer import hypergradient
from hyperopt_implicit.inner_loop import train_step
from hyperopt_implicit.messages import first_line
from hyperopt_implicit.operators import (
    Hessian,
    gradients,
    mean_training_loss,
    undifferentiable_operator,
    validation_gradients,
)
from hyperopt_implicit.problem import BilevelProblem, write_option
from hyperopt_implicit.vectors import Params, add_, norm

_SETTLED = 1e-3  # change of a hypergradient from call to call below which carried state has settled


class Twin:
    """A copy of a problem, bound to batches.

    Args:
        problem: is copied, and not changed.
        training_batches: L is their average; a trajectory steps through them in order.
        validation_batches: F is their average.
        dtype: in which the copy computes; the problem's own where None.
        seed: of the random numbers that every evaluation of a loss draws anew.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        training_batches: Sequence[Any],
        validation_batches: Sequence[Any],
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        self.training = [_cast(batch, dtype) for batch in training_batches]
        self.validation = [_cast(batch, dtype) for batch in validation_batches]
        self.problem = problem.copy(dtype, {"validation_loss": _average(problem.loss_source("validation_loss"))})
        self.problem.training_data, self.problem.validation_data = self.training, [self.validation]
        self._seed = seed
        self._warned = dtype is not None  # the copy in the problem's own precision is the one that warns

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Inside, random layers draw what they always draw."""
        device = self.problem.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self._seed)
            yield

    # -------------------------------------------------------------------------------------------- what backends give

    def hypergradient(
        self,
        backend: Backend,
        training_batches: Sequence[Any] | None = None,
        validation_batches: Sequence[Any] | None = None,
        *,
        calls: int = 1,
    ) -> tuple[Hypergradient, int]:
        """The backend's number at the twin's weights, and how many calls were made.

        A backend that carries state is called until its gradient has settled, at most ``calls`` times.
        """
        batches = self.training if training_batches is None else list(training_batches)
        validation = self.validation if validation_batches is None else list(validation_batches)
        with self.seeded(), warnings.catch_warnings():
            if self._warned:  # what preflight has to say, it has said
                warnings.simplefilter("ignore", HyperoptWarning)
            self._warned = True
            result = hypergradient(
                self.problem, backend, training_batches=batches, validation_batch=validation, state={}
            )
        done = 1
        while done < calls and result.state and not result.status.failed:
            with self.seeded():
                again = backend.hypergradient(self.problem, batches, validation, result.state)
            change = norm({name: again.gradients[name] - g for name, g in result.gradients.items()})
            settled = change <= _SETTLED * norm(again.gradients)
            result, done = again, done + 1
            if settled:
                break
        return result, done

    # ------------------------------------------------------------------------------------------- F, L and their values

    def validation_loss(self) -> float:
        """F at the twin's weights and hyperparameters."""
        with self.seeded():
            return float(self.problem.validation_loss(self.validation))

    def validation_gradients(self) -> tuple[Params, Params]:
        """∂F/∂w and ∂F/∂λ."""
        with self.seeded():
            _, vector, direct = validation_gradients(self.problem, self.validation)
        return vector, direct

    def hessian(self) -> Hessian:
        """H at the twin's weights, with ∂L/∂w."""
        with self.seeded():
            return Hessian(self.problem, self.training)

    def gradient(self) -> Params:
        """∂L/∂w, with what the inner optimizer's own decay adds."""
        params = {name: p.detach().requires_grad_() for name, p in self.problem.params.items()}
        with self.seeded(), torch.enable_grad():
            loss = mean_training_loss(self.problem, params, self.problem.hparams, self.training)
            return self.whole_gradient(gradients(loss, params, create_graph=False))

    def whole_gradient(self, gradient: Params) -> Params:
        """The same from the derivative of the training loss alone."""
        decays = self.problem.weight_decays
        return {
            name: g + decays[name] * self.problem.params[name].detach() if name in decays else g
            for name, g in gradient.items()
        }

    def training_loss(self) -> float:
        """L, with the inner optimizer's own decay as a term of it."""
        with self.seeded(), torch.no_grad():
            loss = mean_training_loss(self.problem, self.problem.params, self.problem.hparams, self.training)
        decays = self.problem.weight_decays
        return float(loss) + sum(
            0.5 * d * float(self.problem.params[name].detach().square().sum()) for name, d in decays.items()
        )

    def is_twice_differentiable(self) -> bool:
        """Whether torch can multiply by H."""
        try:
            _ = self.hessian() @ {name: torch.ones_like(p) for name, p in self.problem.params.items()}
        except (RuntimeError, NotImplementedError) as error:
            if undifferentiable_operator(error) is None:
                raise
            return False
        return True

    # ------------------------------------------------------------------------------------------- being left untouched

    def everything(self) -> dict[str, Any]:
        """A copy of all that a backend must leave alone."""
        state = self.problem.inner_state()
        found: dict[str, Any] = {f"parameter {name}": x for name, x in state.params.items()}
        found |= {f"buffer {name}": x for name, x in state.buffers.items()}
        found |= {f"hyperparameter {name}": x.detach().clone() for name, x in self.problem.hparams.items()}
        found |= {
            f"{key} of {name}": x
            for name, slots in state.optimizer.items()
            for key, x in slots.items()
            if isinstance(x, Tensor)
        }
        return found

    def changed_since(self, before: dict[str, Any]) -> list[str]:
        """What is not any more as :meth:`everything` found it."""
        after = self.everything()
        return [name for name, x in before.items() if name not in after or not torch.equal(x, after[name])]

    @torch.no_grad()
    def move_weights(self, step: Params, scale: float = 1.0) -> None:
        """w ← w + scale·step."""
        add_({name: p.data for name, p in self.problem.params.items()}, step, scale)

    @torch.no_grad()
    def move_hyperparameters(self, direction: Params, scale: float) -> None:
        """λ ← λ + scale·direction."""
        for name, p in self.problem.hparams.items():
            p.add_(direction[name], alpha=scale)
        self.problem.sync_optimizer()

    @contextmanager
    def displaced(self, direction: Params, scale: float) -> Iterator[None]:
        """Inside, λ is elsewhere; afterwards λ, weights and optimizer are as before."""
        state = self.problem.inner_state()
        hparams = {name: p.detach().clone() for name, p in self.problem.hparams.items()}
        self.move_hyperparameters(direction, scale)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in self.problem.hparams.items():
                    p.copy_(hparams[name])
            self.problem.sync_optimizer()
            self.problem.load_inner_state(state)

    # ------------------------------------------------------------------------------------------------------- training

    def train(self) -> None:
        """One plain step of torch's own optimizer on each training batch, schedules being followed."""
        values = self.problem.hyperparameters.values()
        options = {
            name: cast(Tensor, values[name]).reshape(-1) for name in self.problem.hyperparameters.names("optimizer")
        }
        with self.seeded():
            for t, batch in enumerate(self.training):
                for name, schedule in options.items():
                    for group in self.problem.optimizer.param_groups:
                        write_option(group, name, float(schedule[min(t, len(schedule) - 1)]))
                train_step(self.problem, batch, values)


def float64_twin(
    problem: BilevelProblem, training: Sequence[Any], validation: Sequence[Any], seed: int, notes: list[str]
) -> Twin:
    """A twin in float64, or in the problem's own precision, with a note, where its losses do not run in float64."""
    twin = Twin(problem, training, validation, torch.float64, seed)
    try:
        twin.gradient(), twin.validation_loss()
    except (RuntimeError, NotImplementedError) as error:
        notes.append(
            f"The losses do not run in float64 ({first_line(error)}), so all was computed in the problem's own "
            "precision. A tensor that a loss takes from outside its arguments may be float32."
        )
        return Twin(problem, training, validation, seed=seed)
    return twin


def _cast(batch: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None:
        return batch
    return pytree.tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, batch)


def _average(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def average(model: Any, batches: Sequence[Any], **values: Any) -> Tensor:
        losses = [loss(model, batch, **values) for batch in batches]
        return losses[0] if len(losses) == 1 else sum(losses) / len(losses)  # type: ignore[return-value]

    return average
