"""Declarations and problems that cannot hold: the whole message that a person sees, and nothing trained or written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from optuna.distributions import IntDistribution
from torch import Tensor, nn
from torch.distributions import constraints

import hyperopt_implicit as hi

from .refusals import Loss, build, frozen, good, plain, sgd


def declare(name: Any = "value", init: Any = 1.0, **options: Any) -> Loss:
    @hi.hyperparameter(name, init=init, **options)
    def training_loss(model: nn.Module, batch: Tensor, *, value: Tensor) -> Tensor:
        return model(batch).square().mean() * value

    return training_loss


def twice_declared(model: nn.Module) -> None:
    hi.hyperparameter("decay", init=0.2)(good)


def declared_on_both(model: nn.Module) -> None:
    @hi.hyperparameter("decay", init=0.2)
    def validation_loss(model: nn.Module, batch: Tensor, *, decay: Tensor) -> Tensor:
        return plain(model, batch)

    build(model, good, validation_loss)


def not_taken(model: nn.Module) -> None:
    build(model, hi.hyperparameter("wait_decay", init=0.1)(good))


def optimizer_option(name: str, init: Any = 0.1) -> Loss:
    return hi.hyperparameter(name, init=init, target="optimizer")(good)


def other(model: nn.Module, batch: Tensor, *, decay: Any) -> Tensor:
    return plain(model, batch) * decay.sum()


def undeclared(model: nn.Module, batch: Tensor, *, temperature: float) -> Tensor:
    return plain(model, batch) * temperature


DECLARATIONS: dict[str, tuple[Callable[[nn.Module], Any], type[Exception], str]] = {
    "declared twice": (
        twice_declared,
        hi.DeclarationError,
        "each hyperparameter is declared once; 'decay' is declared twice on good. Remove one of the two.",
    ),
    "declared on both losses": (
        declared_on_both,
        hi.DeclarationError,
        "each hyperparameter is declared once; 'decay' is declared on both losses. Keep one declaration: each loss "
        "that takes 'decay' as a keyword gets the value.",
    ),
    "taken by no loss": (
        not_taken,
        hi.DeclarationError,
        "a hyperparameter must be a keyword of a loss; neither training_loss nor validation_loss takes 'wait_decay'. "
        "Add it to the signature, or declare it with target='optimizer' if the inner optimizer uses it.",
    ),
    "one name for two elements": (
        lambda model: build(model, hi.hyperparameter("decay", init=torch.ones(2), elements=["first"])(other)),
        hi.DeclarationError,
        "hyperparameter 'decay': elements must name each of its 2 elements; got 1 names.",
    ),
    "one name twice": (
        lambda model: hi.hyperparameter("decay", init=torch.ones(2), elements=["first", "first"])(good),
        hi.DeclarationError,
        "hyperparameter 'decay': elements must be a sequence of names, all different; got ['first', 'first'].",
    ),
    "names for the elements of a module": (
        lambda model: build(model, hi.hyperparameter("decay", init=nn.Linear(1, 1), elements=["w", "b"])(other)),
        hi.DeclarationError,
        "hyperparameter 'decay' is an nn.Module; only a tensor takes elements=.",
    ),
    "never declared": (
        lambda model: build(model, undeclared),
        hi.DeclarationError,
        "every keyword of a loss needs a declaration or a default; training_loss takes 'temperature', which has "
        "neither. Add "
        '@hyperparameter("temperature", init=…) to it, or give it a default.',
    ),
    "never declared, on the validation loss": (
        lambda model: build(model, good, undeclared),
        hi.DeclarationError,
        "every keyword of a loss needs a declaration or a default; validation_loss takes 'temperature', which has "
        "neither. Add "
        '@hyperparameter("temperature", init=…) to it, or give it a default.',
    ),
    "name no identifier": (
        lambda model: declare("weight decay"),
        hi.DeclarationError,
        "a hyperparameter's name must be a Python identifier; got 'weight decay'.",
    ),
    "name of a module's attribute": (
        lambda model: declare("training"),
        hi.DeclarationError,
        "a hyperparameter's name must not be an attribute of the torch.nn.Module that holds it; 'training' is one. "
        "Choose another.",
    ),
    "name of our module's attribute": (
        lambda model: declare("values"),
        hi.DeclarationError,
        "a hyperparameter's name must not be an attribute of the torch.nn.Module that holds it; 'values' is one. "
        "Choose another.",
    ),
    "unknown target": (
        lambda model: declare(target="model"),
        hi.DeclarationError,
        "hyperparameter 'value': target must be 'loss' or 'optimizer'; got 'model'.",
    ),
    "constraint without a map": (
        lambda model: declare(constraint=constraints.boolean),
        hi.DeclarationError,
        "hyperparameter 'value': constraint must be an object of torch.distributions.constraints with a map from "
        "unconstrained values (positive, interval(0, 1), simplex, …); got Boolean().",
    ),
    "outside the constraint": (
        lambda model: build(model, declare(init=torch.tensor([1.0, -2.0]), constraint=constraints.positive)),
        hi.DeclarationError,
        "hyperparameter 'value': the initial value must lie strictly inside GreaterThan(lower_bound=0.0); got [1.0, "
        "-2.0]. Move the start inside, or change the constraint.",
    ),
    "on the edge of an open bound": (
        lambda model: build(model, declare(init=0.0, constraint=constraints.nonnegative)),
        hi.DeclarationError,
        "hyperparameter 'value': the initial value must lie strictly inside GreaterThanEq(lower_bound=0.0); got "
        "[0.0], which is on its edge: no finite unconstrained value maps there, and gradient descent could never "
        "leave it. Start a little inside.",
    ),
    "on the edge of an interval": (
        lambda model: build(model, declare(init=1.0, constraint=constraints.unit_interval)),
        hi.DeclarationError,
        "hyperparameter 'value': the initial value must lie strictly inside Interval(lower_bound=0.0, "
        "upper_bound=1.0); got [1.0], which is on its edge: no finite unconstrained value maps there, and gradient "
        "descent could never leave it. Start a little inside.",
    ),
    "on the edge of the simplex": (
        lambda model: build(model, declare(init=torch.tensor([0.5, 0.5, 0.0]), constraint=constraints.simplex)),
        hi.DeclarationError,
        "hyperparameter 'value': the initial value must lie strictly inside Simplex(); got [0.5, 0.5, 0.0], which is "
        "on its edge: no finite unconstrained value maps there, and gradient descent could never leave it. Start a "
        "little inside.",
    ),
    "shape that the constraint cannot have": (
        lambda model: build(model, declare(init=torch.ones(3), constraint=constraints.lower_cholesky)),
        hi.DeclarationError,
        "hyperparameter 'value': the initial value must lie strictly inside LowerCholesky(); shape (3,) does not fit "
        "it (tril: input tensor must have at least 2 dimensions).",
    ),
    "start of no usable type": (
        lambda model: build(model, declare(init="large")),
        hi.DeclarationError,
        "hyperparameter 'value': init must be a number, a tensor, an nn.Module or a callable of the model that "
        "returns one of them; got str.",
    ),
    "module with a constraint": (
        lambda model: build(model, declare(init=nn.Linear(1, 1), constraint=constraints.positive)),
        hi.DeclarationError,
        "hyperparameter 'value' is an nn.Module and cannot take constraint=GreaterThan(lower_bound=0.0); constrain its "
        "parameters with torch.nn.utils.parametrize instead.",
    ),
    "frozen module": (
        lambda model: build(model, declare(init=frozen(nn.Linear(1, 1)))),
        hi.DeclarationError,
        "hyperparameter 'value' is an nn.Module in which no parameter requires grad, so there is nothing to tune; "
        "unfreeze one or drop the declaration.",
    ),
    "no option of the inner optimizer": (
        lambda model: build(model, optimizer_option("momentun")),
        hi.DeclarationError,
        "a hyperparameter with target='optimizer' must be a numeric option of the inner optimizer; SGD has dampening, "
        "lr, momentum, weight_decay, not 'momentun'. Did you mean 'momentum'?",
    ),
    "matrix for an option of the inner optimizer": (
        lambda model: build(model, optimizer_option("lr", torch.ones(2, 2))),
        hi.DeclarationError,
        "a hyperparameter of the optimizer must be one number, or a 1-D tensor with a value for each inner step; 'lr' "
        "is of shape (2, 2). Give it init=0.1, say, or init=torch.full((steps,), 0.1).",
    ),
    "knob that is no keyword": (
        lambda model: hi.knob("wdith", IntDistribution(1, 8))(builder_with_width),
        hi.DeclarationError,
        "a knob must be a keyword of the function it stands on; builder_with_width takes width, not 'wdith'. Did you "
        "mean 'width'?",
    ),
    "knob declared twice": (
        lambda model: hi.knob("width", IntDistribution(1, 8))(
            hi.knob("width", IntDistribution(1, 4))(lambda *, width: None)
        ),
        hi.DeclarationError,
        "each knob is declared once; 'width' stands twice on <lambda>.",
    ),
    "knob without a distribution": (
        lambda model: hi.knob("width", [1, 2]),  # type: ignore[arg-type]
        hi.DeclarationError,
        "knob 'width': the distribution must come from optuna.distributions (FloatDistribution, IntDistribution, "
        "CategoricalDistribution); got list.",
    ),
}


def builder_with_width(*, width: int) -> hi.BilevelProblem:
    raise NotImplementedError


def generator() -> Iterator[int]:
    yield 1


PROBLEMS: dict[str, tuple[Callable[[nn.Module], Any], type[Exception], str]] = {
    "model of the wrong type": (
        lambda model: build(torch.relu),  # type: ignore[arg-type]
        hi.ProblemError,
        "model must be a torch.nn.Module; got builtin_function_or_method.",
    ),
    "nothing requires grad": (
        lambda model: build(frozen(nn.Linear(2, 1))),
        hi.ProblemError,
        "the model must have at least one parameter with requires_grad=True; it has none, so there is nothing to "
        "train. Unfreeze the part that should be trained.",
    ),
    "optimizer over another model": (
        lambda model: build(model, optimizer=sgd([*model.parameters(), *nn.Linear(3, 1).parameters()])),
        hi.ProblemError,
        "the inner optimizer must hold parameters of the model only; 2 of its 8 tensors (the first of shape (1, 3)) "
        "are not among them. Build it from the parameters that the factory is given, or from those of the model "
        "passed to BilevelProblem.",
    ),
    "optimizer over frozen parameters": (
        lambda model: build(
            nn.Sequential(frozen(each := nn.Linear(2, 1)), nn.Linear(1, 1)), optimizer=sgd(each.parameters())
        ),
        hi.ProblemError,
        "the inner optimizer must hold a parameter with requires_grad=True; it holds none.",
    ),
    "factory that returns no optimizer": (
        lambda model: build(model, optimizer=lambda params: None),
        hi.ProblemError,
        "optimizer must be a torch.optim.Optimizer or a factory that returns one from a list of parameters; got "
        "NoneType. For instance optimizer=lambda params: torch.optim.SGD(params, lr=0.1).",
    ),
    "empty data": (
        lambda model: build(model, training_data=[]),
        hi.DataError,
        "training_data must have at least one batch; it is empty. Check the split, the batch size and drop_last of "
        "its loader.",
    ),
    "generator": (
        lambda model: build(model, validation_data=generator()),
        hi.DataError,
        "validation_data must be iterable more than once; got generator, which is spent after one pass. Pass a list "
        "of batches, a DataLoader, or an object whose __iter__ starts anew.",
    ),
    "tuple of tensors": (
        lambda model: build(model, training_data=(torch.ones(3, 2), torch.ones(3))),
        hi.DataError,
        "training_data must be a re-iterable of batches; got a single tuple, which would be iterated row by row. Wrap "
        "it in a list, [batch], to use it as one full batch.",
    ),
    "one tensor": (
        lambda model: build(model, training_data=torch.ones(3, 2)),
        hi.DataError,
        "training_data must be a re-iterable of batches; got a single Tensor, which would be iterated row by row. "
        "Wrap it in a list, [batch], to use it as one full batch.",
    ),
    "a number": (
        lambda model: build(model, training_data=3),
        hi.DataError,
        "training_data must be a re-iterable of batches (a DataLoader, a list); got int.",
    ),
}


@pytest.mark.parametrize(
    ("action", "error", "message"), [*DECLARATIONS.values(), *PROBLEMS.values()], ids=[*DECLARATIONS, *PROBLEMS]
)
def test_refused(
    untouched_model: nn.Module, action: Callable[[nn.Module], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        action(untouched_model)
    assert type(caught.value) is error
    assert str(caught.value) == message
