"""Memory that runs out while a hypergradient is computed: fewer batches, then the policy for failures."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints

import hyperopt_implicit as hi
from hyperopt_implicit.backend import Backend, Hypergradient, State
from hyperopt_implicit.backends import ConjugateGradient, Neumann, Unrolled
from hyperopt_implicit.errors import HyperoptWarning
from hyperopt_implicit.out_of_memory import is_out_of_memory

from .ridge import TRAINING, VALIDATION, Batch, ridge, training_loss, validation_loss

BATCHES = [(x.flip(0)[i:], y.flip(0)[i:]) for i in range(13) for x, y in [TRAINING]]  # whose Hessians all differ


def allocate_too_much() -> None:
    torch.empty(10**15)


def cuda() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def windows() -> None:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried …")


def python() -> None:
    raise MemoryError


WAYS: dict[str, Callable[[], None]] = {
    "cpu": allocate_too_much,
    "cuda": cuda,
    "windows": windows,
    "python": python,
}


@dataclass(frozen=True)
class Full(ConjugateGradient):
    """Conjugate gradients on a machine on which so many batches fit into memory; notes how many were tried."""

    room: int = 3
    way: str = "cuda"
    tried: ClassVar[list[int]] = []

    def hypergradient(
        self, problem: hi.BilevelProblem, training_batches: Sequence[Any], validation_batch: Any, state: State, /
    ) -> Hypergradient:
        self.tried.append(len(training_batches))
        if len(training_batches) > self.room:
            WAYS[self.way]()
        return super().hypergradient(problem, training_batches, validation_batch, state)


@dataclass(frozen=True)
class FullUnrolled(Unrolled):
    """The same, through training."""

    def hypergradient(self, *arguments: Any) -> Hypergradient:
        Full.tried.append(len(arguments[1]))
        raise torch.OutOfMemoryError


@pytest.fixture(autouse=True)
def _fresh() -> None:
    Full.tried.clear()


def run(backend: Backend, problem: hi.BilevelProblem | None = None, **options: Any) -> hi.Result:
    settings = {"outer_steps": 4, "inner_steps": 3, "hessian_batches": 8, "outer_lr": 0.1, **options}
    return hi.optimize(problem or ridge(training_data=BATCHES), backend, tracking=False, **settings)


LOWERED = (
    "the training batches of a hypergradient must fit into memory at once; 8 did not, and {0} did. So many are taken "
    "from now on: the Hessian is averaged over fewer samples, and is noisier. Pass hessian_batches={0}, or smaller "
    "batches, to have it so from the start."
)


@pytest.mark.parametrize("way", WAYS)
def test_fewer_batches_are_taken_from_then_on(way: str) -> None:
    with pytest.warns(HyperoptWarning) as caught:
        result = run(Full(room=3, way=way))
    assert [str(each.message) for each in caught] == [LOWERED.format(2)]
    assert Full.tried == [8, 4, 2, 2, 2, 2]
    assert [each.status for each in result.history] == [hi.Status.CONVERGED] * 4
    assert all(each.applied for each in result.history)


def test_the_number_is_that_of_the_first_batches() -> None:
    problem = ridge()
    problem.model.weight.data.fill_(1.0)
    outer = hi.HyperOptimizer(problem, torch.optim.SGD, lr=0.1, backend=Full(room=3))
    with pytest.warns(HyperoptWarning, match="8 did not, and 2 did"):
        found = outer.compute(BATCHES[:8], VALIDATION)
    expected = hi.hypergradient(problem, "cg", training_batches=BATCHES[:2], validation_batch=VALIDATION)
    torch.testing.assert_close(found.gradients, expected.gradients, rtol=1e-12, atol=0)
    all_of_them = hi.hypergradient(problem, "cg", training_batches=BATCHES[:8], validation_batch=VALIDATION)
    assert abs(found.gradients["decay"] - all_of_them.gradients["decay"]) > 1e-3


def test_less_memory_later_lowers_the_number_again() -> None:
    outer = hi.HyperOptimizer(ridge(), torch.optim.SGD, lr=0.1, backend=Full(room=5))
    with pytest.warns(HyperoptWarning, match="8 did not, and 4 did"):
        outer.step_through(BATCHES[:8], VALIDATION)
    object.__setattr__(outer.backend, "room", 1)
    with pytest.warns(HyperoptWarning, match="4 did not, and 1 did"):
        outer.step_through(BATCHES[:8], VALIDATION)
    assert Full.tried == [8, 4, 4, 2, 1]


def test_the_number_is_saved_and_restored() -> None:
    outer, other = (hi.HyperOptimizer(ridge(), torch.optim.SGD, lr=0.1, backend=Full()) for _ in range(2))
    with pytest.warns(HyperoptWarning, match="8 did not, and 2 did"):
        outer.step_through(BATCHES[:8], VALIDATION)
    other.load_state_dict(outer.state_dict())
    Full.tried.clear()
    other.step_through(BATCHES[:8], VALIDATION)
    assert Full.tried == [2]


# ------------------------------------------------------------------------------------------------- not even one fits

SAID = (
    "hypergradient: out of memory after 0 iterations. Memory ran out, and there was nothing left to do without. Use "
    "smaller training batches, or a backend that holds less; `hyperopt-implicit backends NAME` says what each holds."
)
STOPPED = (
    "stopped at outer step 2: 3 outer steps in a row ran out of memory. Model and hyperparameters are at their last "
    "good state. Memory ran out, and there was nothing left to do without. Use smaller training batches, or a backend "
    "that holds less; `hyperopt-implicit backends NAME` says what each holds."
)


@pytest.mark.parametrize("on_failure", ["warn", "skip"])
def test_steps_are_skipped_and_a_run_stops_after_many(on_failure: Literal["warn", "skip"]) -> None:
    with pytest.warns(HyperoptWarning) as caught:
        result = run(Full(room=0), outer_steps=20, max_failures=3, on_failure=on_failure)
    assert [str(each.message) for each in caught] == [
        f"{SAID} It was not applied; the next ones of this kind are only counted.",
        STOPPED,
    ]
    assert result.stop_reason == "too many failed steps"
    assert [each.status for each in result.history] == [hi.Status.OUT_OF_MEMORY] * 3
    assert not any(each.applied for each in result.history)
    assert result.failed_steps == 3
    assert Full.tried == [8, 4, 2, 1] * 3
    assert result.hyperparameters["decay"].item() == 1.0
    assert all(math.isfinite(each.hyperparameters["decay"]) for each in result.history)


def test_raise_raises() -> None:
    problem = ridge(training_data=BATCHES)
    with pytest.raises(hi.HypergradientError) as caught:
        run(Full(room=0), problem, on_failure="raise")
    assert str(caught.value) == SAID
    assert problem.hparams["decay"].item() == 0.0


def test_memory_that_comes_back_is_used() -> None:
    backend = Full(room=0)

    def free(step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        object.__setattr__(backend, "room", 10)

    with pytest.warns(HyperoptWarning, match=r"out of memory .* It was not applied"):
        result = run(backend, callbacks=[free])
    assert [each.applied for each in result.history] == [False, True, True, True]
    assert Full.tried == [8, 4, 2, 1, 8, 8, 8]


def test_through_training_nothing_is_halved() -> None:
    with pytest.warns(HyperoptWarning, match=r"out of memory .* It was not applied"):
        result = run(FullUnrolled(), hessian_batches=1)
    assert Full.tried == [3] * 4
    assert not any(each.applied for each in result.history)
    assert result.hyperparameters["decay"].item() == 1.0


def test_a_trial_says_that_memory_ran_out() -> None:
    from hyperopt_implicit.telling import OBJECTIVES, _values

    with pytest.warns(HyperoptWarning):
        result = run(Full(room=0), max_failures=2)
    with pytest.raises(hi.LossError, match="training ended at outer step 1: memory ran out, too many times"):
        _values(OBJECTIVES, result)


# ------------------------------------------------------------------------------------------------ what is not ours


def test_other_errors_are_not_taken_for_it() -> None:
    assert not is_out_of_memory(ValueError("out of memory"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_an_inner_step_that_does_not_fit_is_the_users() -> None:
    @hi.hyperparameter("decay", init=1.0, constraint=constraints.positive)
    def loss(model: nn.Module, batch: Batch, *, decay: Tensor) -> Tensor:
        if len(batch[0]) < 10:
            cuda()
        return training_loss(model, batch, decay=decay)

    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory\. Tried to allocate 2\.00 GiB\.$"):
        run(ConjugateGradient(), ridge(training_loss=loss, training_data=BATCHES), hessian_batches=2, inner_steps=9)


def test_a_second_derivative_that_does_not_fit_is_not_called_impossible() -> None:
    class Heavy(torch.autograd.Function):
        """x², with a second derivative that takes all memory."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            return Once.apply(2.0 * ctx.saved_tensors[0] * gradients[0])  # type: ignore[no-any-return]

    class Once(torch.autograd.Function):
        """The identity; its derivative takes all memory."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            allocate_too_much()
            return gradients[0]

    @hi.hyperparameter("decay", init=1.0, constraint=constraints.positive)
    def loss(model: nn.Module, batch: Batch, *, decay: Tensor) -> Tensor:
        return training_loss(model, batch, decay=decay) + Heavy.apply(model.weight).sum()

    said = "^the second derivative of the training loss must fit into memory on the first batch; it does not"
    with pytest.raises(hi.ProblemError, match=said) as caught:
        run(ConjugateGradient(), ridge(training_loss=loss))
    assert type(caught.value) is hi.ProblemError
    assert "'f2sa'" in str(caught.value)


def test_what_has_failed_is_given_back_before_the_next_attempt() -> None:
    """The error holds the frames, and these the graph: both must be gone, or half the batches would not fit either."""
    held: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    @dataclass(frozen=True)
    class Holding(Neumann):
        def hypergradient(
            self, problem: hi.BilevelProblem, training_batches: Sequence[Any], validation_batch: Any, state: State, /
        ) -> Hypergradient:
            alive.append(sum(each() is not None for each in held))
            large = torch.zeros(1000)
            held.append(weakref.ref(large))
            if len(training_batches) > 1:
                cuda()
            return super().hypergradient(problem, training_batches, validation_batch, state)

    outer = hi.HyperOptimizer(ridge(), torch.optim.SGD, lr=0.1, backend=Holding())
    gc.disable()
    try:
        with pytest.warns(HyperoptWarning, match="4 did not, and 1 did"):
            outer.compute(BATCHES[:4], VALIDATION)
    finally:
        gc.enable()
    assert alive == [0, 0, 0]


def test_on_a_validation_batch_that_does_not_fit() -> None:
    """Fewer training batches are of no help; the step fails as any other that does not fit."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        if torch.is_grad_enabled() and not model.training and len(seen) > 1:
            cuda()
        seen.append(1)
        return validation_loss(model, batch)

    seen: list[int] = []
    with pytest.warns(HyperoptWarning, match="out of memory"):
        result = run(ConjugateGradient(), ridge(training_data=BATCHES, validation_loss=loss), max_failures=2)
    assert result.history[-1].status is hi.Status.OUT_OF_MEMORY
