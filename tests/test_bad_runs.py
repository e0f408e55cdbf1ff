"""Runs that cannot work: backends, losses and options are refused before any training, with the whole message."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution
from torch import Tensor, nn
from torch.utils.data import IterableDataset

import hyperopt_implicit as hi
from hyperopt_implicit.backends import Neumann

from .cases import INSTALLED
from .refusals import Loss, build, good, plain

Refusal = tuple[Callable[[nn.Module], Any], type[Exception], str]


def run(model: nn.Module, training: Loss = good, validation: Loss = plain, **options: Any) -> hi.Result:
    return hi.optimize(build(model, training, validation), **options)


def tuned(init: Any = 1.0) -> Callable[[Loss], Loss]:
    return hi.hyperparameter("value", init=init)


@tuned()
def per_sample(model: nn.Module, batch: Tensor, *, value: Tensor) -> Tensor:
    return (model(batch) * value).square()


@tuned(torch.ones(2))
def weighted(model: nn.Module, batch: Tensor, *, value: Tensor) -> Tensor:
    losses = torch.stack([model(batch).square().mean() for _ in range(3)])
    return (value * losses).sum()


@tuned()
def without_graph(model: nn.Module, batch: Tensor, *, value: Tensor) -> Tensor:
    return model(batch).detach().square().mean() * value


@tuned()
def a_number(model: nn.Module, batch: Tensor, *, value: Tensor) -> Any:
    return model(batch).mean().item()


@tuned()
def whole_numbers(model: nn.Module, batch: Tensor, *, value: Tensor) -> Tensor:
    return model(batch).argmax()


@tuned()
def logarithm(model: nn.Module, batch: Tensor, *, value: Tensor) -> Tensor:
    return (model(batch) * 0.0 - value).log().mean()


def infinite(model: nn.Module, batch: Tensor) -> Tensor:
    return plain(model, batch) / 0.0


def broken(model: nn.Module, batch: Tensor) -> Tensor:
    return batch["labels"]  # type: ignore[call-overload,no-any-return]


def with_lr(model: nn.Module) -> hi.BilevelProblem:
    return build(model, hi.hyperparameter("lr", init=0.1, target="optimizer")(good))


OTHER = nn.Linear(2, 1)


class Bag(nn.Module):
    """A model with an operator that has no second derivative."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(5, 2)
        self.rest = model

    def forward(self, batch: Tensor) -> Tensor:
        return self.rest(self.table((batch > 0).long()))  # type: ignore[no-any-return]


class EmptyStream(IterableDataset[Tensor]):
    """Data that cannot say that it is empty."""

    def __iter__(self) -> Any:
        return iter(())


BACKENDS: dict[str, Refusal] = {
    "unknown": (
        lambda model: run(model, backend="neuman"),
        hi.BackendError,
        f"there is no backend 'neuman'; installed are {INSTALLED}. Did you mean 'neumann'?",
    ),
    "unknown option": (
        lambda model: run(model, backend={"name": "neumann", "trems": 3}),
        hi.BackendError,
        "Neumann has no option 'trems'; it has terms, step_size, tolerance, measure_residual, damping, curvature, "
        "precision, refinements, compile. Did you mean 'terms'?",
    ),
    "option out of range": (
        lambda model: hi.get_backend("neumann", terms=0),
        hi.BackendError,
        "Neumann option 'terms': input should be greater than or equal to 1; got 0.",
    ),
    "option of the wrong type": (
        lambda model: Neumann(terms="many"),  # type: ignore[arg-type]
        hi.BackendError,
        "Neumann option 'terms': input should be a valid integer, unable to parse string as an integer; got 'many'.",
    ),
    "option of neither type": (
        lambda model: hi.get_backend(Neumann(), step_size="big"),
        hi.BackendError,
        "Neumann option 'step_size': input should be 'auto'; input should be a valid number, unable to parse string "
        "as a number; got 'big'.",
    ),
    "no backend at all": (
        lambda model: run(model, backend=3),
        hi.BackendError,
        "a backend is given by name, as a dict with 'name' and its options, or as an instance; got 3.",
    ),
    "optimizer hyperparameter with an implicit one": (
        lambda model: hi.optimize(with_lr(model), backend="cg"),
        hi.BackendError,
        "'lr' is a hyperparameter of the inner optimizer, and a stationary point does not depend on how it was "
        "reached: backend ConjugateGradient would see a zero gradient. Use a backend that differentiates through "
        "training ('evolution', 'forward', 'forward_gradient', 'unrolled'), or make it a knob.",
    ),
    "too many parameters for the dense one": (
        lambda model: run(model, backend={"name": "exact", "max_parameters": 10}),
        hi.BackendError,
        "backend 'exact' forms a dense Hessian and takes models of up to max_parameters=10 parameters; this one has "
        "13. Use 'cg', or raise max_parameters if 13² numbers fit in memory.",
    ),
}

LOSSES: dict[str, Refusal] = {
    "no scalar": (
        lambda model: run(model, per_sample),
        hi.LossError,
        "training_loss must return a scalar; got shape (3, 1). Take its mean or its sum.",
    ),
    "no tensor": (
        lambda model: run(model, a_number),
        hi.LossError,
        "training_loss must return a scalar tensor; got float.",
    ),
    "no floating-point number": (
        lambda model: run(model, whole_numbers),
        hi.LossError,
        "training_loss must return a floating-point scalar; got dtype torch.int64.",
    ),
    "not finite": (
        lambda model: run(model, logarithm),
        hi.LossError,
        "training_loss must be finite at the start; it is nan on the first batch. Look for logarithms or divisions by "
        "zero, and for values outside the range that the loss expects.",
    ),
    "validation loss not finite": (
        lambda model: run(model, good, infinite),
        hi.LossError,
        "validation_loss must be finite at the start; it is inf on the first batch. Look for logarithms or divisions "
        "by zero, and for values outside the range that the loss expects.",
    ),
    "without a graph": (
        lambda model: run(model, without_graph),
        hi.LossError,
        "training_loss must depend on the parameters that the inner optimizer holds; its result has no graph to any "
        "of them. Look for .detach(), .item() or torch.no_grad() in it, and use the model that the loss is given, not "
        "another.",
    ),
    "of another model": (
        lambda model: run(nn.Linear(2, 1), tuned()(lambda ignored, batch, *, value: value * OTHER(batch).sum())),
        hi.LossError,
        "training_loss must depend on the parameters that the inner optimizer holds; its result has no graph to any "
        "of them. Look for .detach(), .item() or torch.no_grad() in it, and use the model that the loss is given, not "
        "another.",
    ),
    "shapes that do not fit": (
        lambda model: run(model, weighted),
        hi.ProblemError,
        "training_loss must run on the first batch; it raised RuntimeError: The size of tensor a (2) must match the "
        "size of tensor b (3) at non-singleton dimension 0 (line N of test_bad_runs.py). It was given a batch of "
        "shape (3, 2), value of shape (2,).",
    ),
    "validation loss that raises": (
        lambda model: run(model, good, broken),
        hi.ProblemError,
        "validation_loss must run on the first batch; it raised IndexError: too many indices for tensor of dimension 2 "
        "(line N of test_bad_runs.py). It was given a batch of shape (3, 2), decay of shape ().",
    ),
    "no second derivative": (
        lambda model: run(Bag(model)),
        hi.SecondDerivativeError,
        "this backend differentiates the training loss twice, and operator 'embedding_bag' in module 'table' "
        "(EmbeddingBag), line N of test_bad_runs.py, has no second derivative. Replace it by an equivalent that has "
        "one, or use a backend that does without ('bome', 'evolution', 'f2sa', 'finite_difference', 'sama'). (torch "
        "says: the derivative for '_embedding_bag_backward' is not implemented.)",
    ),
}

OPTIONS: dict[str, Refusal] = {
    **{
        name: (
            lambda model, name=name, value=value: run(model, **{name: value}),
            hi.HyperoptError,
            f"{name} must be a whole number of at least {least}; got {value!r}.",
        )
        for name, least, value in [
            ("outer_steps", 1, 0),
            ("inner_steps", 1, 2.5),
            ("warmup_steps", 0, -1),
            ("hessian_batches", 1, True),
            ("max_failures", 1, None),
            ("patience", 1, 0),
        ]
    },
    "min_delta": (
        lambda model: run(model, min_delta=-0.1),
        hi.HyperoptError,
        "min_delta must be a number of at least 0; got -0.1.",
    ),
    "outer_lr": (
        lambda model: run(model, outer_lr=0.0),
        hi.HyperoptError,
        "outer_lr must be a positive number; got 0.0.",
    ),
    "outer_lr as text": (
        lambda model: run(model, outer_lr="fast"),
        hi.HyperoptError,
        "outer_lr must be a positive number; got 'fast'.",
    ),
    "seed": (lambda model: run(model, seed="s"), hi.HyperoptError, "seed must be a whole number, or None; got 's'."),
    "clip": (
        lambda model: run(model, clip=0.0),
        hi.HyperoptError,
        "clip must be a positive norm, or None for no clipping; got 0.0.",
    ),
    "on_failure": (
        lambda model: run(model, on_failure="ignore"),
        hi.HyperoptError,
        "on_failure must be 'warn', 'raise' or 'skip'; got 'ignore'.",
    ),
    "outer optimizer that exists already": (
        lambda model: run(model, outer_optimizer=torch.optim.Adam(model.parameters())),
        hi.HyperoptError,
        "the outer optimizer must be a torch.optim class, or a callable that makes an optimizer from the "
        "hyperparameters' tensors; got an instance of Adam. Pass the class, such as torch.optim.Adam, and its options "
        "by keyword.",
    ),
    "tracking by address": (
        lambda model: run(model, tracking="http://127.0.0.1:5000"),
        hi.HyperoptError,
        "tracking must be True, False or a Tracking(uri=…, experiment=…, …); got 'http://127.0.0.1:5000'.",
    ),
    "nothing to optimize": (
        lambda model: run(model, plain),
        hi.ProblemError,
        "there must be at least one hyperparameter to optimize; none is declared. Put @hyperparameter(name, init=…) "
        "on the training loss.",
    ),
    "no data": (
        lambda model: hi.optimize(build(model, training_data=None)),
        hi.ProblemError,
        "this needs the problem's training_data, and BilevelProblem was built without; pass training_data=, a list of "
        "batches or a DataLoader, or hand over the batches yourself through HyperOptimizer.step.",
    ),
    "data that turns out empty": (
        lambda model: hi.optimize(build(model, validation_data=EmptyStream())),
        hi.DataError,
        "validation_data must have at least one batch; it is empty. Check the split, the batch size and drop_last of "
        "its loader.",
    ),
    "no training batch": (
        lambda model: hi.hypergradient(build(model), training_batches=[], validation_batch=torch.ones(3, 2)),
        hi.ProblemError,
        "training_batches must hold at least one batch; it is empty. Pass [batch], or one batch for each inner step to "
        "differentiate.",
    ),
}


@hi.knob("lr", FloatDistribution(0.01, 1.0))
def builder(*, lr: float) -> hi.BilevelProblem:
    raise AssertionError("nothing may be built")


def without_knobs() -> hi.BilevelProblem:
    raise AssertionError("nothing may be built")


SEARCHES: dict[str, Refusal] = {
    "no knobs": (
        lambda model: hi.search(without_knobs),
        hi.SearchError,
        "a search needs at least one knob; 'without_knobs' has none. Put @knob(name, distribution) on it, or call "
        "optimize, which needs none.",
    ),
    "no trials": (
        lambda model: hi.search(builder, n_trials=0),
        hi.SearchError,
        "n_trials must be a whole number of at least 1; got 0.",
    ),
    "unknown backend": (
        lambda model: hi.search(builder, "unroled"),
        hi.BackendError,
        f"there is no backend 'unroled'; installed are {INSTALLED}. Did you mean 'unrolled'?",
    ),
    "unknown option of the backend": (
        lambda model: hi.search(builder, {"name": "cg", "steps": 3}),
        hi.BackendError,
        "ConjugateGradient has no option 'steps'; it has tolerance, max_iterations, warm_start, damping, curvature, "
        "precision, refinements, compile, preconditioner.",
    ),
    "unknown backend among the choices": (
        lambda model: hi.search(builder, CategoricalDistribution(["cg", "newman"])),
        hi.BackendError,
        f"there is no backend 'newman'; installed are {INSTALLED}. Did you mean 'neumann'?",
    ),
    "unknown option of the choices": (
        lambda model: hi.search(builder, {"name": "cg", "dampign": FloatDistribution(0.0, 1.0)}),
        hi.BackendError,
        "none of the backends cg has an option 'dampign'. Did you mean 'damping'?",
    ),
    "backend as a number": (
        lambda model: hi.search(builder, FloatDistribution(0.0, 1.0)),
        hi.BackendError,
        "a backend as a knob needs a CategoricalDistribution of names; got FloatDistribution(high=1.0, log=False, "
        "low=0.0, step=None).",
    ),
    "option of the loop": (
        lambda model: hi.search(builder, outer_steps=0),
        hi.HyperoptError,
        "outer_steps must be a whole number of at least 1; got 0.",
    ),
    "misspelt option of the loop": (
        lambda model: hi.search(builder, outer_step=3),
        TypeError,
        "got an unexpected keyword argument 'outer_step'",
    ),
}

ALL = {**BACKENDS, **LOSSES, **OPTIONS, **{f"search: {name}": case for name, case in SEARCHES.items()}}


@pytest.mark.parametrize(("action", "error", "message"), ALL.values(), ids=ALL)
def test_refused(
    untouched_model: nn.Module, action: Callable[[nn.Module], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        action(untouched_model)
    assert type(caught.value) is error
    assert re.sub(r"line \d+", "line N", str(caught.value)) == message


# ------------------------------------------------------------------------------------------- what is only warned of


def test_hyperparameter_that_no_loss_uses_is_warned_of_and_stays(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)

    @hi.hyperparameter("decay", init=0.1)
    @hi.hyperparameter("forgotten", init=3.0)
    def training_loss(model: nn.Module, batch: Tensor, *, decay: Tensor, forgotten: Tensor) -> Tensor:
        return good(model, batch, decay=decay) + forgotten

    problem = build(nn.Linear(2, 1), training_loss)
    with pytest.warns(hi.errors.HyperoptWarning) as caught:
        result = hi.optimize(problem, "cg", outer_steps=3, tracking=False)
    assert [str(each.message) for each in caught] == [
        "hyperparameter 'forgotten' influences neither the training gradient nor the validation loss: its gradient is "
        "zero and it will stay at its initial value. Use it in a loss, or remove its declaration."
    ]
    assert result.hyperparameters["forgotten"].item() == 3.0
    assert result.hyperparameters["decay"].item() != pytest.approx(0.1)


def test_original_error_of_a_loss_is_its_cause(untouched_model: nn.Module) -> None:
    with pytest.raises(hi.ProblemError) as caught:
        run(untouched_model, good, broken)
    assert isinstance(caught.value.__cause__, IndexError)
    assert f"(line {broken.__code__.co_firstlineno + 1} of test_bad_runs.py)" in str(caught.value)
