"""Hyperparameters that have a gradient: their declaration, and the module that holds their values.

A declaration says what a hyperparameter starts from and what values it may take. The values themselves live in one
:class:`Hyperparameters` module per problem, unconstrained, so that any ``torch.optim`` optimizer can move them; the
map to the constrained side is ``torch.distributions.biject_to``, or ``transform_to`` where torch has no bijection.
Knobs without a gradient live in ``knobs.py``.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.distributions import biject_to, constraints, transform_to
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import CorrCholeskyTransform, SigmoidTransform, StickBreakingTransform, Transform

from hyperopt_implicit.argument_checks import check_function, shown
from hyperopt_implicit.errors import DeclarationError

Target = Literal["loss", "optimizer"]
Value = Tensor | nn.Module
Initial = float | Tensor | nn.Module | Callable[[nn.Module], Any]

_CLIPPED = 0.2  # by which an unconstrained value comes back another; rounding alone makes less, in bfloat16 too


@dataclass(frozen=True, eq=False)
class Declaration:
    """What :func:`hyperparameter` was told: a name, a start, a constraint and who uses the value."""

    name: str
    init: Initial
    constraint: Constraint
    target: Target
    elements: tuple[str, ...] | None = None

    @property
    def transform(self) -> Transform:
        """The map from unconstrained to constrained values."""
        try:
            return cast(Transform, biject_to(self.constraint))
        except NotImplementedError:  # lower_cholesky, positive_definite: the map ignores the upper triangle
            return cast(Transform, transform_to(self.constraint))

    def initial_value(self, model: nn.Module) -> Value:
        """The constrained start: a tensor in the model's dtype on the model's device, or a fresh copy of a module."""
        init = self.init
        if callable(init) and not isinstance(init, nn.Module):
            init = init(model)
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(()))
        if isinstance(init, nn.Module):
            if self.elements is not None:
                raise DeclarationError(f"hyperparameter {self.name!r} is an nn.Module; only a tensor takes elements=.")
            self._check_module(init)
            return copy.deepcopy(init).to(device=like.device, dtype=like.dtype)
        try:
            given = torch.as_tensor(init).detach()
            given = given if given.is_floating_point() else given.to(torch.get_default_dtype())
        except (TypeError, ValueError, RuntimeError) as error:
            raise DeclarationError(
                f"hyperparameter {self.name!r}: init must be a number, a tensor, an nn.Module or a callable of the "
                f"model that returns one of them; got {type(init).__name__}."
            ) from error
        value = given.to(device=like.device, dtype=like.dtype, copy=True)
        if self.elements is not None and len(self.elements) != value.numel():
            raise DeclarationError(
                f"hyperparameter {self.name!r}: elements must name each of its {value.numel()} elements; got "
                f"{len(self.elements)} names."
            )
        self._check(given, value)
        return value

    def _check_module(self, module: nn.Module) -> None:
        if self.constraint is not constraints.real:
            raise DeclarationError(
                f"hyperparameter {self.name!r} is an nn.Module and cannot take constraint={self.constraint}; constrain "
                f"its parameters with torch.nn.utils.parametrize instead."
            )
        if not any(p.requires_grad for p in module.parameters()):
            raise DeclarationError(
                f"hyperparameter {self.name!r} is an nn.Module in which no parameter requires grad, so there is "
                f"nothing to tune; unfreeze one or drop the declaration."
            )

    def _check(self, given: Tensor, value: Tensor) -> None:
        """Refuse a start outside the constraint, as given: rounded to the model's dtype it may miss it by a hair."""
        rule = f"hyperparameter {self.name!r}: the initial value must lie strictly inside {self.constraint}"
        shown = value.flatten()[:5].tolist()
        try:
            inside = bool(self.constraint.check(given).all())
            raw = self.transform.inv(value) if inside else value
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:
            raise DeclarationError(f"{rule}; shape {tuple(value.shape)} does not fit it ({error}).") from error
        if not inside:
            raise DeclarationError(f"{rule}; got {shown}. Move the start inside, or change the constraint.")
        if _on_edge(value, self.constraint) or not bool(torch.isfinite(raw).all()):
            raise DeclarationError(
                f"{rule}; got {shown}, which is on its edge: no finite unconstrained value maps there, and gradient "
                f"descent could never leave it. Start a little inside."
            )


def marked_where_lost(transform: Transform, raw: Tensor, back: Tensor) -> Tensor:
    """What came back through a map, with infinity where the map had clipped it short of the edge of its range.

    The derivative is zero there, so that no gradient would ever lead out again.
    """
    return torch.where((back - raw).abs() > _CLIPPED, math.inf, back) if _clips(transform) else back


def _clips(transform: Transform) -> bool:
    """Whether one of torch's maps that clip what they give is among those that a map is made of."""
    parts = [*getattr(transform, "parts", ()), *getattr(transform, "transforms", ())]
    base = getattr(transform, "base_transform", None)
    clipping = isinstance(transform, SigmoidTransform | StickBreakingTransform | CorrCholeskyTransform)
    return clipping or any(_clips(each) for each in (*parts, base) if each is not None)


def _on_edge(value: Tensor, constraint: Constraint) -> bool:
    """Whether an element sits on a closed bound, where torch's maps clamp to a finite number."""
    base = getattr(constraint, "base_constraint", constraint)
    bounds = [getattr(base, side, None) for side in ("lower_bound", "upper_bound")]
    if base is constraints.simplex:
        bounds.append(0.0)
    return any(bool((value == bound).any()) for bound in bounds if bound is not None)


def hyperparameter(
    name: str,
    *,
    init: Initial,
    constraint: Constraint = constraints.real,
    target: Target = "loss",
    elements: Sequence[str] | None = None,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Declare a hyperparameter that is trained by its gradient; put it on the training loss, one line for each.

    The decorated loss stays an ordinary function: called without a hyperparameter, it uses the initial value.

    Args:
        name: the keyword by which the loss takes the value. With ``target="optimizer"``, the option of the inner
            optimizer that it replaces (``"lr"``, ``"weight_decay"``, ``"momentum"``, ``"beta1"``, …).
        init: where it starts: a number, a tensor of any shape, an ``nn.Module`` (an auxiliary network is a
            hyperparameter like any other), or a callable ``init(model)`` that returns one of them, for shapes that
            follow the model. Numbers and tensors take the model's dtype and device.
        constraint: any object of ``torch.distributions.constraints`` for which ``biject_to`` or ``transform_to`` has a
            map (``positive``, ``interval(0, 1)``, ``simplex``, ``lower_cholesky``, …).
        target: ``"loss"``, or ``"optimizer"`` for a hyperparameter of the inner optimizer. Only backends that
            differentiate through the training steps can see the latter.
        elements: a name for each element of a tensor, such as those of the tasks that are weighted; records and figures
            show them in the place of numbers.

    Raises:
        DeclarationError: the name is taken, or the constraint has no map from unconstrained values.

    Example:
        >>> import torch, hyperopt_implicit as hi
        >>> from torch.distributions import constraints
        >>> @hi.hyperparameter("weight_decay", init=0.1, constraint=constraints.positive)
        ... def training_loss(model, batch, *, weight_decay):
        ...     x, y = batch
        ...     return ((model(x) - y) ** 2).mean() + weight_decay * model.weight.square().sum()
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = model.weight.data.fill_(2.0)
        >>> training_loss(model, (torch.ones(1, 1), torch.zeros(1, 1))).item()
        4.4...
    """
    declaration = _declaration(name, init, constraint, target, elements)

    def decorate(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        rule = f"@hyperparameter({name!r}) stands on a loss, a function of (model, batch, *, {name})"
        check_function(function, rule, DeclarationError)
        below = declarations_of(function)
        if any(other.name == name for other in below):
            raise DeclarationError(
                f"each hyperparameter is declared once; {name!r} is declared twice on {function.__name__}. "
                f"Remove one of the two."
            )
        plain = undecorated(function)
        declared = (declaration, *below)
        signature = inspect.signature(plain)

        @functools.wraps(plain)
        def loss(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
            given = signature.bind_partial(model, *args, **kwargs).arguments
            for each in declared:
                if (
                    each.target == "loss"
                    and each.name in accepted_names(plain, [each.name])
                    and each.name not in given
                    and each.name not in kwargs
                ):
                    kwargs[each.name] = each.initial_value(model)
            return plain(model, *args, **kwargs)

        loss.__hyperparameters__ = declared  # type: ignore[attr-defined]
        return loss

    return decorate


def _declaration(
    name: str, init: Initial, constraint: Constraint, target: Target, elements: Sequence[str] | None
) -> Declaration:
    if not isinstance(name, str) or not name.isidentifier():
        raise DeclarationError(f"a hyperparameter's name must be a Python identifier; got {name!r}.")
    if hasattr(Hyperparameters((), nn.Module()), name):
        raise DeclarationError(
            f"a hyperparameter's name must not be an attribute of the torch.nn.Module that holds it; {name!r} is one. "
            f"Choose another."
        )
    if target not in get_args(Target):
        raise DeclarationError(f"hyperparameter {name!r}: target must be 'loss' or 'optimizer'; got {target!r}.")
    declaration = Declaration(name, init, constraint, target, _element_names(name, elements))
    try:
        _ = declaration.transform
    except (NotImplementedError, TypeError, AttributeError) as error:
        raise DeclarationError(
            f"hyperparameter {name!r}: constraint must be an object of torch.distributions.constraints with a map from "
            f"unconstrained values (positive, interval(0, 1), simplex, …); got {constraint!r}."
        ) from error
    return declaration


def _element_names(name: str, elements: Any) -> tuple[str, ...] | None:
    if elements is None:
        return None
    given = list(elements) if isinstance(elements, Iterable) and not isinstance(elements, str | Tensor) else []
    names = tuple(map(str, given))
    if not names or len(set(names)) < len(names):
        raise DeclarationError(
            f"hyperparameter {name!r}: elements must be a sequence of names, all different; got {shown(elements)}."
        )
    return names


def declarations_of(function: Callable[..., Any]) -> tuple[Declaration, ...]:
    """The declarations on a function, from the top decorator down; empty where there is none."""
    return getattr(function, "__hyperparameters__", ())


def undecorated(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss as its author wrote it."""
    return cast(Callable[..., Tensor], function.__wrapped__) if declarations_of(function) else function  # type: ignore[attr-defined]


def accepted_names(function: Callable[..., Any], names: list[str]) -> list[str]:
    """Those of ``names`` that the function takes as keywords, beyond its model and its batch."""
    parameters = list(inspect.signature(function).parameters.values())
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return list(names)
    keywords = {p.name for p in parameters[2:] if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    keywords |= {p.name for p in parameters[:2] if p.kind is p.KEYWORD_ONLY}
    return [name for name in names if name in keywords]


class Hyperparameters(nn.Module):
    """The values of a problem's hyperparameters, unconstrained, as one module.

    ``.to()``, ``.state_dict()`` and ``torch.optim`` work as on any module: ``parameters()`` are the unconstrained
    values λ in which the outer optimizer moves. Calling the module gives the constrained values by name, with their
    graph to λ; a hyperparameter that is an ``nn.Module`` is given as itself.
    """

    def __init__(self, declarations: tuple[Declaration, ...], model: nn.Module) -> None:
        super().__init__()
        self._declarations = {each.name: each for each in declarations}
        self._transforms: dict[str, Transform] = {}
        for declaration in declarations:
            value = declaration.initial_value(model)
            if isinstance(value, nn.Module):
                self.add_module(declaration.name, value)
            else:
                self._transforms[declaration.name] = declaration.transform
                raw = declaration.transform.inv(value).detach().clone()
                self.register_parameter(declaration.name, nn.Parameter(raw))

    @property
    def declarations(self) -> dict[str, Declaration]:
        """The declarations by name, in the order in which they stand on the losses."""
        return self._declarations

    @property
    def element_names(self) -> dict[str, tuple[str, ...]]:
        """The names of the elements of those tensors that were declared with ``elements``."""
        return {name: each.elements for name, each in self._declarations.items() if each.elements is not None}

    def names(self, target: Target) -> list[str]:
        """The names of the hyperparameters that a loss, or the inner optimizer, uses."""
        return [name for name, each in self._declarations.items() if each.target == target]

    def forward(self, target: Target | None = None) -> dict[str, Value]:
        values: dict[str, Value] = {}
        for name, declaration in self._declarations.items():
            if target is None or declaration.target == target:
                transform = self._transforms.get(name)
                values[name] = getattr(self, name) if transform is None else transform(getattr(self, name))
        return values

    def unconstrained(self) -> dict[str, Tensor]:
        """λ: the unconstrained values that are tuned, by their name in ``state_dict()``; live, not copies."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def values(self) -> dict[str, Value]:
        """A snapshot of the constrained values: detached tensors, and copies of modules."""
        return {
            name: copy.deepcopy(value) if isinstance(value, nn.Module) else value.detach().clone()
            for name, value in self().items()
        }

    @torch.no_grad()
    def load_values(self, values: Mapping[str, Value | Mapping[str, Tensor]]) -> None:
        """Set constrained values, as :meth:`values` gives them; those of a module may be given as its state dict.

        Raises:
            DeclarationError: a name is unknown, or a value has another shape; nothing is changed then.
        """
        raw: dict[str, Tensor] = {}
        for name, value in values.items():
            if name not in self._declarations:
                raise DeclarationError(
                    f"there is no hyperparameter {name!r} to set; there are {', '.join(self._declarations) or 'none'}."
                )
            live = getattr(self, name)
            if isinstance(live, Tensor):
                wanted = {name: live}
                given = {name: self._transforms[name].inv(value.to(live))} if isinstance(value, Tensor) else {}
            else:
                state = value.state_dict() if isinstance(value, nn.Module) else value
                wanted = {f"{name}.{key}": x for key, x in live.state_dict().items()}
                given = {f"{name}.{key}": x for key, x in state.items()} if isinstance(state, Mapping) else {}
            if _shapes(wanted) != _shapes(given):
                raise DeclarationError(
                    f"hyperparameter {name!r} can only be set to what has its shape, {_shapes(wanted)}; got "
                    f"{_shapes(given) or type(value).__name__}."
                )
            raw.update(given)
        self.load_state_dict(raw, strict=False)

    @torch.no_grad()
    def is_inside(self) -> bool:
        """Whether all values are finite, and none was rounded onto the edge of its constraint."""
        values, back = [], []
        try:
            for name, transform in self._transforms.items():
                raw = getattr(self, name)
                values.append(transform(raw))
                back.append(marked_where_lost(transform, raw, transform.inv(values[-1])))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # a matrix that was positive definite before it was rounded
            return False
        tensors = [x for x in [*self.parameters(), *values, *back] if x.numel()]
        # the largest element of each, NaN where there is one, and all of them read at once
        largest = torch.stack(torch._foreach_norm(tensors, math.inf)).tolist() if tensors else []
        return all(map(math.isfinite, largest))

    @torch.no_grad()
    def project_(self) -> None:
        """Call ``project_()`` of every module among the hyperparameters that has one; outer steps do it after a move.

        A module that can only keep a rule by correcting its parameters (weights clamped at zero) does it there.
        """
        for module in self.modules():
            project = getattr(module, "project_", None)
            if module is not self and callable(project):
                project()


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in tensors.items()}
