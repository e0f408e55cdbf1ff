"""The contract of a backend, what it returns, and finding one by name.

A backend is a frozen dataclass whose fields are its options and that turns a problem and batches into a
:class:`Hypergradient`. Those that rest on the implicit function theorem derive from ``ImplicitBackend`` in
``implicit.py`` and write nothing but a solver. The backends themselves are found through the entry-point group
``hyperopt_implicit.backends``; none is imported here.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_type_hints

from hyperopt_implicit.argument_checks import shown
from hyperopt_implicit.errors import BackendError
from hyperopt_implicit.messages import nearest
from hyperopt_implicit.vectors import Params

if TYPE_CHECKING:
    from hyperopt_implicit.inner_state import InnerState
    from hyperopt_implicit.problem import BilevelProblem

ENTRY_POINT_GROUP = "hyperopt_implicit.backends"

State = dict[str, Any]
"""What a backend carries from one call to the next: tensors, dicts of tensors and numbers, so that it can be saved.

A dict of tensors in it is a vector with the names and shapes of w or of λ; a state in which one no longer fits the
model is dropped as a whole (``carried.py``), and the backend starts as at its first call.
"""


class Status(StrEnum):
    """How a computation ended. Failing is data: what to do about it is the caller's decision."""

    CONVERGED = "converged"
    TRUNCATED = "truncated"
    NEGATIVE_CURVATURE = "negative curvature"
    DIVERGED = "diverged"
    SINGULAR = "singular"
    NON_FINITE = "non-finite"
    OUT_OF_MEMORY = "out of memory"

    @property
    def failed(self) -> bool:
        """Whether the number is not what the method promises."""
        return self not in (Status.CONVERGED, Status.TRUNCATED)

    @property
    def usable(self) -> bool:
        """Whether there is a number at all, right or wrong, that hyperparameters could be moved by."""
        return self not in (Status.NON_FINITE, Status.OUT_OF_MEMORY)

    @property
    def remedy(self) -> str:
        """What it means and what a user can do, in a sentence."""
        return _REMEDIES[self]


_REMEDIES = {
    Status.CONVERGED: "The result is as accurate as was asked for.",
    Status.TRUNCATED: (
        "The work allowed was used up; the residual says how much is missing. Allow more terms, iterations or steps "
        "where that is too much."
    ),
    Status.NEGATIVE_CURVATURE: (
        "The training loss curves downwards somewhere, so the model is not at a minimum of it; the result stops "
        "short of that direction. Train longer before each outer step, add weight decay to the training loss, or use "
        "the option damping."
    ),
    Status.DIVERGED: (
        "The iteration grew instead of shrinking, and the last sound iterate was returned. Use a smaller step size, or "
        "step_size='auto'."
    ),
    Status.SINGULAR: (
        "The Hessian has no inverse; the solution of least norm leaves a residual. Add weight decay to the training "
        "loss, or use the option damping."
    ),
    Status.NON_FINITE: (
        "A loss, a product or a gradient was NaN or infinite. Lower the inner learning rate, clip, or look for a "
        "division by zero in the losses."
    ),
    Status.OUT_OF_MEMORY: (
        "Memory ran out, and there was nothing left to do without. Use smaller training batches, or a backend that "
        "holds less; `hyperopt-implicit backends NAME` says what each holds."
    ),
}


@dataclass(frozen=True)
class Hypergradient:
    """dF/dλ, and how it was come by.

    Attributes:
        gradients: dF/dλ by name, with respect to the unconstrained values, shaped like them.
        status: how the computation ended.
        iterations: terms, iterations or steps, in the backend's own unit.
        residual: ‖Au − v‖/‖v‖ of the solution behind it, A being H with the damping asked for; None where no system
            was solved, or the residual was not measured.
        hvps: Hessian-vector products spent (a step differentiated by an unrolled backend counts as one).
        validation_loss: F where it was differentiated.
        training_loss: L there, averaged over the batches.
        state: what the backend wants to be given at its next call.
        endpoint: for a backend that differentiates through training, where that training arrived.
        note: for a backend that decides for itself, what it has decided and why, in a line; shown where it changes.
    """

    gradients: Params
    status: Status
    iterations: int
    residual: float | None
    hvps: int
    validation_loss: float
    training_loss: float
    state: State = field(default_factory=dict)
    endpoint: InnerState | None = None
    note: str | None = None


@dataclass(frozen=True)
class Card:
    """What a reader of a table of methods wants to know about a backend, in a few words each.

    Attributes:
        family: how it gets at the hypergradient.
        gives: what the number is an approximation of, and how it errs.
        cost: work for one hypergradient, beside one gradient of each loss; n weights, m hyperparameters.
        memory: what is held beside the model, in vectors as long as the weights unless told otherwise.
        conditions: when the number means what it should.
        use: the situation in which it is the one to take.
        paper: author and year of the source.
    """

    family: Literal["implicit", "unrolled", "one-loop", "first-order"]
    gives: str
    cost: str
    memory: str
    conditions: str
    use: str
    paper: str


class Backend(ABC):
    """A method that computes hypergradients; derive a frozen dataclass from it.

    The fields are the options. Annotate them for pydantic (``Annotated[int, Field(ge=1, description="…")]``): the types
    are checked and converted when an instance is made, and the command line shows the descriptions.

    Class attributes:
        differentiates: ``"solution"`` where F is differentiated at the model's present weights, whatever led there, or
            ``"trajectory"`` where it is differentiated through the training steps. Only the latter can see
            hyperparameters of the inner optimizer.
        needs_second_derivative: whether the training loss must be twice differentiable by autograd.
        needs_validation_gradient: whether the validation loss must be differentiable.
        takes_complex_weights: whether trained parameters may be complex.
        batches: whether the training batches are ``"averaged"`` into one loss (or stepped through), or ``"sampled"``:
            each product takes the next of them, and the result is right for the average in expectation only.
        card: what the tables of methods say about it.
    """

    differentiates: ClassVar[Literal["solution", "trajectory"]] = "solution"
    needs_second_derivative: ClassVar[bool] = True
    needs_validation_gradient: ClassVar[bool] = True
    takes_complex_weights: ClassVar[bool] = True
    batches: ClassVar[Literal["averaged", "sampled"]] = "averaged"
    card: ClassVar[Card | None] = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__repr__" not in vars(cls):  # or @dataclass would write one, which never shows a field with repr=False
            cls.__repr__ = Backend.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        options: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        shown = [f.name for f in options if f.repr or getattr(self, f.name) != f.default]
        return f"{type(self).__qualname__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    def __post_init__(self) -> None:
        for name, value in validated_options(
            type(self), {f.name: getattr(self, f.name) for f in options_of(type(self))}
        ).items():
            object.__setattr__(self, name, value)

    @abstractmethod
    def hypergradient(
        self,
        problem: BilevelProblem,
        training_batches: Sequence[Any],
        validation_batch: Any,
        state: State,
        /,
    ) -> Hypergradient:
        """dF/dλ on one validation batch; changes neither the model, nor λ, nor the optimizer.

        Args:
            problem: the bilevel problem, with the model at the weights to differentiate at or to train from.
            training_batches: for ``"solution"``, the batches over which L is averaged; for ``"trajectory"``, one batch
                for each inner step.
            validation_batch: the batch on which F is taken.
            state: what the last call returned in ``Hypergradient.state``; empty at first.
        """

    def check(self, problem: BilevelProblem) -> None:
        """Refuse, before any training, a problem that this backend cannot handle.

        Raises:
            BackendError: the problem has a hyperparameter that the backend cannot see, or is too large for it.
        """
        for name, p in problem.params.items():
            if p.is_complex() and not self.takes_complex_weights:
                raise BackendError(
                    f"backend {type(self).__name__} needs real weights; {name!r} is {p.dtype}. Hold real and imaginary "
                    "part as two parameters and put them together with torch.complex, or use a backend that takes "
                    f"complex ones ({_names_where(lambda b: b.takes_complex_weights)})."
                )
        hidden = problem.hyperparameters.names("optimizer")
        if hidden and self.differentiates == "solution":
            through = _names_where(lambda b: b.differentiates == "trajectory")
            if hidden[0] == "weight_decay":
                raise BackendError(
                    f"'weight_decay' is a hyperparameter of the inner optimizer, and backend {type(self).__name__} "
                    "differentiates the losses only: it would see a zero gradient. Put the decay into the training "
                    f"loss, as a term of it, or use a backend that differentiates through training ({through})."
                )
            raise BackendError(
                f"{hidden[0]!r} is a hyperparameter of the inner optimizer, and a stationary point does not depend on "
                f"how it was reached: backend {type(self).__name__} would see a zero gradient. Use a backend that "
                f"differentiates through training ({through}), or make it a knob."
            )

    def for_problem(self, problem: BilevelProblem) -> Backend:
        """The backend to use on a problem: this one, unless it leaves a whole family of problems to another."""
        return self

    def settled(self, state: State) -> Backend:
        """The method behind a state: this backend, unless it chooses among others as it goes."""
        return self

    def check_steps(self, steps: int) -> None:  # noqa: B027  (most methods take any number)
        """Refuse, before any training, a number of training batches that the method cannot work with.

        Raises:
            BackendError: with the option that does not fit.
        """


def options_of(backend: type[Backend]) -> list[dataclasses.Field[Any]]:
    """The options of a backend class: the fields of its dataclass, those that whole families share after its own."""
    fields = dataclasses.fields(backend) if dataclasses.is_dataclass(backend) else ()
    return sorted(fields, key=lambda option: option.kw_only)


def option_types(backend: type[Backend]) -> dict[str, Any]:
    """The declared type of each option, with its annotations."""
    from pydantic import Field  # not at the top: importing the package does not bring pydantic in

    hints = get_type_hints(backend, localns={"Field": Field}, include_extras=True)
    return {option.name: hints[option.name] for option in options_of(backend)}


@functools.cache
def _adapters(backend: type[Backend]) -> dict[str, Any]:
    from pydantic import TypeAdapter

    return {name: TypeAdapter(kind) for name, kind in option_types(backend).items()}


def validated_options(backend: type[Backend], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, converted to their declared types (the command line hands over strings).

    Raises:
        BackendError: an option is unknown, or its value breaks its rule.
    """
    from pydantic import ValidationError

    adapters = _adapters(backend)
    valid = {}
    for name, value in options.items():
        if name not in adapters:
            raise BackendError(
                f"{backend.__name__} has no option {name!r}; it has "
                f"{', '.join(adapters) or 'none'}.{nearest(name, list(adapters))}"
            )
        try:
            valid[name] = adapters[name].validate_python(value)
        except ValidationError as error:
            rules = "; ".join(dict.fromkeys(each["msg"][:1].lower() + each["msg"][1:] for each in error.errors()))
            raise BackendError(f"{backend.__name__} option {name!r}: {rules}; got {shown(value)}.") from error
    return valid


Spec = str | Mapping[str, Any] | Backend
"""A backend by name, by name with options (``{"name": "neumann", "terms": 20}``), or as an instance."""


def list_backends() -> list[str]:
    """The names of all backends that are installed, ours and others', sorted."""
    return sorted({each.name for each in entry_points(group=ENTRY_POINT_GROUP)})


def get_backend_class(name: str) -> type[Backend]:
    """The class behind a name.

    Raises:
        BackendError: there is none of that name, or what is registered is not a backend.
    """
    found = list(entry_points(group=ENTRY_POINT_GROUP, name=name))
    if not found:
        known = list_backends()
        raise BackendError(f"there is no backend {name!r}; installed are {', '.join(known)}.{nearest(name, known)}")
    backend = found[0].load()
    if not (isinstance(backend, type) and issubclass(backend, Backend)):
        raise BackendError(
            f"the entry point {name!r} must name a subclass of hyperopt_implicit.Backend; it is {backend!r}."
        )
    return backend


def get_backend(spec: Spec, **options: Any) -> Backend:
    """The backend that a name, a name with options, or an instance stands for.

    Raises:
        BackendError: the name or an option is unknown, or a value breaks its rule.

    Example:
        >>> import hyperopt_implicit as hi
        >>> hi.get_backend("neumann", terms=20).terms
        20
    """
    if isinstance(spec, Backend):
        if not options:
            return spec
        return dataclasses.replace(spec, **validated_options(type(spec), options))  # type: ignore[type-var]
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
        raise BackendError(
            f"a backend is given by name, as a dict with 'name' and its options, or as an instance; got {shown(spec)}."
        )
    backend = get_backend_class(spec["name"])
    given = {**{key: value for key, value in spec.items() if key != "name"}, **options}
    return backend(**validated_options(backend, given))


def _names_where(condition: Any) -> str:
    """The installed backends for which a condition on the class holds, as prose."""
    names = [repr(name) for name in list_backends() if condition(get_backend_class(name))]
    return ", ".join(names) or "none of those installed does"


def backends_without_second_derivative() -> str:
    """The names of installed backends that need no second derivative, as prose."""
    return _names_where(lambda backend: not backend.needs_second_derivative)


def backends_without_validation_gradient() -> str:
    """The names of installed backends that need no gradient of the validation loss, as prose."""
    return _names_where(lambda backend: not backend.needs_validation_gradient)
