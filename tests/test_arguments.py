"""Single arguments that are of no use: refused at once, with the whole message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optuna.distributions import FloatDistribution
from torch import Tensor, nn

import hyperopt_implicit as hi

from .refusals import build, good, plain, sgd

Refusal = tuple[Callable[[nn.Module], Any], type[Exception], str]
BATCH = torch.ones(3, 2)


def run(model: nn.Module, **options: Any) -> hi.Result:
    return hi.optimize(build(model), "cg", **{"outer_steps": 1, "tracking": False, **options})


def outer(model: nn.Module, **options: Any) -> hi.HyperOptimizer:
    return hi.HyperOptimizer(build(model), **{"optimizer": torch.optim.SGD, "lr": 0.1, "backend": "cg", **options})


@hi.knob("lr", FloatDistribution(0.01, 0.1))
def builder(*, lr: float) -> hi.BilevelProblem:
    return build(nn.Linear(2, 1))


def search(**options: Any) -> Any:
    settings = {"n_trials": 1, "storage": None, "tracking": False, "outer_steps": 1, "inner_steps": 1}
    return hi.search(builder, "cg", **{**settings, **options})


class Complex(nn.Module):
    """A model with a complex weight."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.phase.abs()


class Silent:
    """What cannot even be shown."""

    def __repr__(self) -> str:
        raise ValueError


REFUSED: dict[str, Refusal] = {
    "declaration on no function": (
        lambda model: hi.hyperparameter("decay", init=1.0)(3),  # type: ignore[arg-type]
        hi.DeclarationError,
        "@hyperparameter('decay') stands on a loss, a function of (model, batch, *, decay); got 3.",
    ),
    "declaration on a builtin": (
        lambda model: hi.hyperparameter("decay", init=1.0)(Exception),  # type: ignore[type-var]
        hi.DeclarationError,
        "@hyperparameter('decay') stands on a loss, a function of (model, batch, *, decay); got <class 'Exception'>, "
        "which does not say what it takes. Wrap it in a def.",
    ),
    "names that are none": (
        lambda model: hi.hyperparameter("decay", init=torch.ones(2), elements=3)(good),  # type: ignore[arg-type]
        hi.DeclarationError,
        "hyperparameter 'decay': elements must be a sequence of names, all different; got 3.",
    ),
    "knob on no function": (
        lambda model: hi.knob("lr", FloatDistribution(0.0, 1.0))(None),  # type: ignore[type-var]
        hi.DeclarationError,
        "@knob('lr', …) stands on a function that builds a problem; got None.",
    ),
    "knob without a name": (
        lambda model: hi.knob("the lr", FloatDistribution(0.0, 1.0)),
        hi.DeclarationError,
        "a knob's name must be a Python identifier; got 'the lr'.",
    ),
    "loss that is no function": (
        lambda model: hi.BilevelProblem(model, 0.5, plain, optimizer=sgd),  # type: ignore[arg-type]
        hi.ProblemError,
        "training_loss must be a function of (model, batch, …); got 0.5.",
    ),
    "optimizer that is no function": (
        lambda model: build(model, optimizer="sgd"),
        hi.ProblemError,
        "optimizer must be a torch.optim.Optimizer or a factory that returns one from a list of parameters; got str. "
        "For instance optimizer=lambda params: torch.optim.SGD(params, lr=0.1).",
    ),
    "no problem": (
        lambda model: hi.optimize(nn.Linear(2, 1)),  # type: ignore[arg-type]
        hi.ProblemError,
        "problem must be a BilevelProblem; got Linear(in_features=2, out_features=1, bias=True).",
    ),
    "a long one": (
        lambda model: hi.optimize("x" * 300),  # type: ignore[arg-type]
        hi.ProblemError,
        f"problem must be a BilevelProblem; got '{'x' * 199}….",
    ),
    "no problem to check": (
        lambda model: hi.check(Silent()),  # type: ignore[arg-type]
        hi.ProblemError,
        "problem must be a BilevelProblem; got a Silent.",
    ),
    "one batch for a list of them": (
        lambda model: hi.hypergradient(build(model), "cg", training_batches=BATCH, validation_batch=BATCH),  # type: ignore[arg-type]
        hi.ProblemError,
        "training_batches must be a list of batches; got tensor([[1., 1.], [1., 1.], [1., 1.]]). Put one into "
        "a list, too.",
    ),
    "state that is none": (
        lambda model: hi.hypergradient(build(model), training_batches=[BATCH], validation_batch=BATCH, state=3),  # type: ignore[arg-type]
        hi.HyperoptError,
        "state must be that of an earlier Hypergradient, or None; got 3.",
    ),
    "clip in words": (
        lambda model: run(model, clip="1"),
        hi.HyperoptError,
        "clip must be a positive norm, or None for no clipping; got '1'.",
    ),
    "rate beyond all numbers": (
        lambda model: run(model, outer_lr=10**400),
        hi.HyperoptError,
        f"outer_lr must be a positive number; got {10**400}.",
    ),
    "seed that is too long": (
        lambda model: run(model, seed=2**64),
        hi.HyperoptError,
        "seed must be a whole number that fits into 64 bits; got 18446744073709551616.",
    ),
    "switch in words": (
        lambda model: run(model, restart="False"),
        hi.HyperoptError,
        "restart must be True or False; got 'False'.",
    ),
    "progress in words": (
        lambda model: run(model, progress="no"),
        hi.HyperoptError,
        "progress must be True, False or None; got 'no'.",
    ),
    "one callback": (
        lambda model: run(model, callbacks=len),
        hi.HyperoptError,
        "callbacks must be a list of functions of an OuterStep and the problem; got <built-in function len>. Pass "
        "[callback].",
    ),
    "callback that is none": (
        lambda model: run(model, callbacks=[3]),
        hi.HyperoptError,
        "callbacks must be a list of functions of an OuterStep and the problem; one of them is 3.",
    ),
    "scheduler that is none": (
        lambda model: run(model, inner_scheduler=0.9),
        hi.HyperoptError,
        "inner_scheduler must be a function that makes a learning-rate scheduler from an optimizer; got 0.9. For "
        "instance lambda optimizer: ExponentialLR(optimizer, 0.9).",
    ),
    "scheduler that makes nothing": (
        lambda model: run(model, outer_scheduler=lambda optimizer: None),
        hi.HyperoptError,
        "outer_scheduler must be a function that makes a learning-rate scheduler from an optimizer; it made None.",
    ),
    "options that the outer optimizer does not take": (
        lambda model: outer(model, lr=-1.0),
        hi.HyperoptError,
        "the outer optimizer must be made from the hyperparameters' tensors and lr=-1.0; it raised ValueError: Invalid "
        "learning rate: -1.0. Change its options, or pass a callable that takes the tensors alone.",
    ),
    "outer optimizer that is none": (
        lambda model: outer(model, optimizer=lambda tensors, lr: None),
        hi.HyperoptError,
        "the outer optimizer must be a torch.optim.Optimizer; the callable made None. For instance lambda tensors: "
        "torch.optim.SGD(tensors, lr=0.1).",
    ),
    "rate that is no number": (
        lambda model: outer(model, lr=float("nan")),
        hi.HyperoptError,
        "the learning rate of the outer optimizer must be a finite number; got nan.",
    ),
    "state of something else": (
        lambda model: outer(model).load_state_dict({"optimizer": {}}),
        hi.CheckpointError,
        "the state of a HyperOptimizer is a dict, as its state_dict() gives it; this one is without backend_state, "
        "hyperparameters.",
    ),
    "state of other hyperparameters": (
        lambda model: outer(model).load_state_dict(
            {"hyperparameters": {"other": torch.ones(())}, "optimizer": {}, "backend_state": {}}
        ),
        hi.CheckpointError,
        "the state must be that of a HyperOptimizer with the same hyperparameters and the same kind of optimizer; it "
        'is not: Error(s) in loading state_dict for Hyperparameters: Missing key(s) in state_dict: "decay". Unexpected '
        'key(s) in state_dict: "other".',
    ),
    "complex weights": (
        lambda model: hi.optimize(build(Complex()), "cg", tracking=False),
        hi.BackendError,
        "backend ConjugateGradient needs real weights; 'phase' is torch.complex64. Hold real and imaginary part as two "
        "parameters and put them together with torch.complex, or use a backend that takes complex ones ('evolution', "
        "'f2sa', 'finite_difference', 'sama', 'unrolled').",
    ),
    "seconds in words": (
        lambda model: hi.check(build(model), seconds="3"),  # type: ignore[arg-type]
        hi.HyperoptError,
        "seconds must be a number of seconds; got '3'.",
    ),
    "one problem for a population": (
        lambda model: hi.optimize_population(build(model), "cg", tracking=False),  # type: ignore[arg-type]
        hi.HyperoptError,
        "problems must be a list of BilevelProblems; got BilevelProblem(Sequential, SGD, 13 parameters, 1 "
        "unconstrained hyperparameters: decay). Put one into a list, too.",
    ),
    "values that are no dict": (
        lambda model: hi.minimizer(build(model), 0.1, [BATCH]),  # type: ignore[arg-type]
        hi.ProblemError,
        "values must be a dict of tensors by name; got 0.1.",
    ),
    "study without a name": (
        lambda model: search(study_name=3),
        hi.SearchError,
        "study_name must be a text, or None; got 3.",
    ),
    "sampler that is none": (
        lambda model: search(sampler=3),
        hi.SearchError,
        "sampler must be a name, or an object of optuna.samplers; got 3.",
    ),
    "pruner that is none": (
        lambda model: search(pruner=3),
        hi.SearchError,
        "pruner must be a name, or an object of optuna.pruners; got 3.",
    ),
    "storage that is none": (
        lambda model: search(storage=3),
        hi.SearchError,
        "a storage must be a URL, an object of optuna.storages, or None; got 3.",
    ),
    "constraints that are no dict": (
        lambda model: search(constraints=[len]),
        hi.SearchError,
        "constraints must be a dict of functions of a trial's Result by name; got [<built-in function len>].",
    ),
    "constraint that is no function": (
        lambda model: search(constraints={"size": 3}),
        hi.SearchError,
        "constraints must be a dict of functions of a trial's Result by name; under 'size' it has 3.",
    ),
    "objective that is no function": (
        lambda model: search(objectives=[3]),
        hi.SearchError,
        "an objective must be a name, or a function of a trial's Result; got 3.",
    ),
    "objective that is no number": (
        lambda model: search(objectives=[lambda result: None]),
        hi.SearchError,
        "'<lambda>' must give one number for a trial's Result; it gave None.",
    ),
    "inner optimizer with a closure": (
        lambda model: hi.optimize(build(model, optimizer=torch.optim.LBFGS), "cg", tracking=False),
        hi.HyperoptError,
        "the inner optimizer of a run must step by one gradient; LBFGS evaluates the loss again, by a closure. Take "
        "another, or train in a loop of your own with HyperOptimizer.",
    ),
    "outer optimizer with a closure": (
        lambda model: run(model, outer_optimizer=torch.optim.LBFGS),
        hi.HyperoptError,
        "the outer optimizer must step by one gradient; LBFGS evaluates the loss again, by a closure. Take another, "
        "such as torch.optim.Adam.",
    ),
    "errors that are none": (
        lambda model: search(catch=["ValueError"]),
        hi.SearchError,
        "catch must be a list of exceptions' classes; got ['ValueError'].",
    ),
    "listener that is none": (
        lambda model: search(on_trial=3),
        hi.SearchError,
        "on_trial must be a function of a trial, or None; got 3.",
    ),
}


@pytest.mark.parametrize(("action", "error", "message"), REFUSED.values(), ids=list(REFUSED))
def test_refused(
    untouched_model: nn.Module, action: Callable[[nn.Module], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        action(untouched_model)
    assert type(caught.value) is error
    assert str(caught.value) == message


def test_a_search_with_a_negative_seed_is_a_search() -> None:
    first, again = (search(seed=-1, sampler="random").best_knobs for _ in range(2))
    assert first == again != search(seed=1, sampler="random").best_knobs
    search(seed=-1, sampler="qmc")
