"""``MetaOptimizer``: a drop-in for AuxiLearn's, for training loops that hand over loss tensors with their graphs.

It forms the same hypergradient as the backends do for a ``BilevelProblem``, by the same code, from two losses that the
caller has computed. ``HyperOptimizer`` is the choice for new code: it knows the losses as functions and checks more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperopt_implicit.backend import Hypergradient, Spec, State, Status, get_backend
from hyperopt_implicit.distributed import several, world_size
from hyperopt_implicit.errors import AuxiliaryError, BackendError, DistributedError, SecondDerivativeError
from hyperopt_implicit.guarded_step import GuardedStep, OnFailure, honest
from hyperopt_implicit.implicit import ImplicitBackend, Solution
from hyperopt_implicit.messages import first_line
from hyperopt_implicit.operators import LinearOperator, LossHessian, gradients, undifferentiable_operator
from hyperopt_implicit.vectors import Params, add, norm


@dataclass(frozen=True)
class _AuxiLearnSeries(ImplicitBackend):
    """Σ_{k≤K} (I − αH)ᵏ v as AuxiLearn forms it: no factor α in front, and no look at whether it grows."""

    iterations: int
    step_size: float

    def solve(self, hessian: LinearOperator, vector: Params, state: State, /) -> Solution:
        total = term = vector
        before = norm(vector)
        for _ in range(self.iterations):
            term = add(term, hessian @ term, -self.step_size)
            total = add(total, term)
        return Solution(total, Status.TRUNCATED, self.iterations, norm(term) / before, state)


class MetaOptimizer:
    """Moves auxiliary parameters by the hypergradient of a held-out loss; a drop-in for ``auxilearn.optim``'s.

    With w the model's ``parameters`` and φ the ``aux_params``, one step moves φ by

        dF/dφ = ∂F/∂φ − (∂²L/∂φ∂w) u,   u = α Σ_{k≤K} (I − αH)ᵏ ∂F/∂w ≈ H⁻¹ ∂F/∂w

    where L is ``train_loss``, F is ``val_loss``, α is ``hpo_lr`` and K is ``truncate_iter``. AuxiLearn leaves out the
    factor α and the direct term ∂F/∂φ; the page on migrating from it says what follows from that.

    Args:
        base_optimizer: the optimizer of the auxiliary parameters.
        hpo_lr: α, the step size of the series. It converges where α is below 2 over the largest eigenvalue of H; where
            the series grows, it is cut short and the step is reported as failed.
        truncate_iter: K: Hessian-vector products a step; the series has one term more.
        max_grad_norm: the largest norm of the hypergradient; longer ones are scaled down to it. None clips nothing.
        backend: any implicit backend in the place of the series: a name, a dict of a name and options, or an instance.
            ``hpo_lr`` and ``truncate_iter`` then have no effect.
        auxilearn_scaling: reproduce AuxiLearn's numbers: the sum without α, and no direct term. For learning rates that
            were tuned with it; the gradient is about 1/α too long.
        on_failure: what to do with a failed hypergradient: ``"warn"`` once a kind and use it, ``"skip"``, or
            ``"raise"``. One that is not finite is never applied.
        meta_optimizer: AuxiLearn's name for ``base_optimizer``.

    Attributes:
        last: the last step's :class:`Hypergradient`, with its status and residual; None before the first.

    Raises:
        BackendError: the backend or an option is unknown, or the backend is not an implicit one.
        AuxiliaryError: there is no base optimizer, or an option cannot hold.
        DistributedError: this is one of several processes of a group.

    References:
        Navon et al., "Auxiliary Learning by Implicit Differentiation", ICLR 2021, algorithm 1.
        Lorraine, Vicol, Duvenaud, "Optimizing Millions of Hyperparameters by Implicit Differentiation", AISTATS 2020.

    Example:
        >>> import torch
        >>> from hyperopt_implicit.auxiliary import LinearCombiner, MetaOptimizer
        >>> x, y = torch.randn(20, 3), torch.randn(20, 2)
        >>> model, combiner = torch.nn.Linear(3, 2), LinearCombiner(2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> meta = MetaOptimizer(torch.optim.Adam(combiner.parameters(), lr=1e-2), hpo_lr=0.1)
        >>> def losses(rows):
        ...     return (model(x[rows]) - y[rows]) ** 2
        >>> for step in range(20):
        ...     optimizer.zero_grad()
        ...     combiner(losses(slice(10))).backward()
        ...     optimizer.step()
        ...     if step % 5 == 4:
        ...         meta.step(
        ...             train_loss=combiner(losses(slice(10))), val_loss=losses(slice(10, 20))[:, 0].mean(),
        ...             parameters=model.parameters(), aux_params=combiner.parameters())
        >>> meta.last.hvps
        3
    """

    def __init__(
        self,
        base_optimizer: torch.optim.Optimizer | None = None,
        hpo_lr: float = 1e-4,
        truncate_iter: int = 3,
        max_grad_norm: float | None = 10,
        *,
        backend: Spec | None = None,
        auxilearn_scaling: bool = False,
        on_failure: OnFailure = "warn",
        meta_optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        if several():
            raise DistributedError(
                "MetaOptimizer differentiates the losses that it is given, and each of the "
                f"{world_size()} processes of a torch.distributed group would give that of its own share. Use "
                "HyperOptimizer, whose problem averages the losses over processes."
            )
        if base_optimizer is not None and meta_optimizer is not None:
            raise AuxiliaryError("meta_optimizer is AuxiLearn's name for base_optimizer; give one of the two.")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise AuxiliaryError(
                f"max_grad_norm must be a positive norm, or None for no clipping; got {max_grad_norm!r}."
            )
        optimizer = base_optimizer if base_optimizer is not None else meta_optimizer
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise AuxiliaryError(
                "MetaOptimizer needs the torch.optim optimizer of the auxiliary parameters; got "
                f"{type(optimizer).__name__}."
            )
        self.backend = _implicit_backend(backend, hpo_lr, truncate_iter, auxilearn_scaling)
        self.base_optimizer = optimizer
        self.last: Hypergradient | None = None
        self._with_direct_term = not auxilearn_scaling
        self._state: State = {}
        self._held = [p for group in optimizer.param_groups for p in group["params"]]
        self._guard = GuardedStep(optimizer, clip=max_grad_norm, on_failure=on_failure, is_inside=self._is_finite)

    def step(
        self,
        train_loss: Tensor,
        val_loss: Tensor,
        parameters: Iterable[Tensor],
        aux_params: Iterable[Tensor],
        return_grads: bool = False,
    ) -> list[Tensor] | None:
        """Differentiate ``val_loss`` through the training that ``train_loss`` stands for, and move ``aux_params``.

        Both losses keep their graphs. Parameters on either side that a loss does not use have zero gradient, those that
        require none are left out; nobody's ``.grad`` but that of the auxiliary parameters is touched.

        Args:
            train_loss: L, a scalar with its graph to parameters and auxiliary parameters.
            val_loss: F, a scalar with its graph; it may depend on the auxiliary parameters too.
            parameters: w, as tensors; a generator such as ``model.parameters()`` will do.
            aux_params: φ, likewise, out of those that the base optimizer holds.
            return_grads: give back dF/dφ, before clipping, one for each of ``aux_params``.

        Raises:
            AuxiliaryError: a loss is no scalar with a graph, a list is empty, or a tensor stands in both.
            SecondDerivativeError: an operator behind ``train_loss`` cannot be differentiated twice.
            HypergradientError: it failed, and ``on_failure="raise"``.
        """
        given = list(aux_params)
        params = _named(parameters, "parameters")
        hparams = _named(given, "aux_params")
        _check_disjoint(params, hparams)
        self._check_held(hparams)
        _check_loss(train_loss, "train_loss")
        _check_loss(val_loss, "val_loss")
        if self.last is None:
            _check_weight_norm(train_loss, params)
        self.zero_grad()
        self.last = honest(self._hypergradient(train_loss, val_loss, params, hparams))
        self._state = self.last.state if self.last.status.usable else {}
        self._guard.apply(self.last, hparams)
        if not return_grads:
            return None
        found = {id(p): self.last.gradients[name] for name, p in hparams.items()}
        return [found[id(p)] if id(p) in found else torch.zeros_like(p) for p in given]

    def zero_grad(self) -> None:
        """Clear the ``.grad`` of the auxiliary parameters, which the training loss fills as well."""
        self.base_optimizer.zero_grad()

    def _hypergradient(self, train_loss: Tensor, val_loss: Tensor, params: Params, hparams: Params) -> Hypergradient:
        inputs = {("w", name): p for name, p in params.items()} | {("φ", name): p for name, p in hparams.items()}
        with torch.enable_grad():
            both = gradients(val_loss, inputs, create_graph=False, retain_graph=True)
            vector = {name: both["w", name] for name in params}
            direct = {name: both["φ", name] for name in hparams}
            if not self._with_direct_term:
                direct = {name: torch.zeros_like(p) for name, p in hparams.items()}
            try:
                hessian = LossHessian(train_loss, params, hparams)
                return self.backend.differentiate(hessian, vector, direct, float(val_loss.detach()), self._state)
            except (RuntimeError, NotImplementedError) as error:
                if "backward through the graph a second time" in str(error):
                    raise AuxiliaryError(
                        "both losses must come with graphs that were not used up; one was, by .backward() or "
                        "torch.autograd.grad. Compute the losses anew for the outer step."
                    ) from error
                if undifferentiable_operator(error) is None:
                    raise
                raise SecondDerivativeError(
                    "the training loss is differentiated twice, and an operator behind it has no second derivative "
                    f"(torch says: {first_line(error)}). Replace it by an equivalent that has one; fused attention has "
                    "one under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
                ) from error

    def _check_held(self, hparams: Params) -> None:
        held = {id(p) for p in self._held}
        foreign = [p for p in hparams.values() if id(p) not in held]
        if foreign:
            raise AuxiliaryError(
                f"aux_params must be among the tensors that the base optimizer holds; {len(foreign)} of {len(hparams)} "
                f"(the first of shape {tuple(foreign[0].shape)}) are not, and would never move. Make the base "
                "optimizer from the same parameters."
            )

    def _is_finite(self) -> bool:
        return all(bool(torch.isfinite(p).all()) for p in self._held)

    def state_dict(self) -> dict[str, object]:
        """The base optimizer's state and what the backend carries from step to step."""
        return {"base_optimizer": self.base_optimizer.state_dict(), "backend_state": self._state}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.base_optimizer.load_state_dict(state["base_optimizer"])  # type: ignore[arg-type]
        self._state = state["backend_state"]  # type: ignore[assignment]


def _implicit_backend(
    backend: Spec | None, hpo_lr: float, truncate_iter: int, auxilearn_scaling: bool
) -> ImplicitBackend:
    if isinstance(truncate_iter, bool) or not isinstance(truncate_iter, int) or truncate_iter < 0:
        raise AuxiliaryError(f"truncate_iter must be a whole number of at least 0; got {truncate_iter!r}.")
    if not isinstance(hpo_lr, int | float) or not 0.0 < hpo_lr < math.inf:
        raise AuxiliaryError(f"hpo_lr must be a positive number; got {hpo_lr!r}.")
    if backend is None:
        if auxilearn_scaling:
            return _AuxiLearnSeries(truncate_iter, hpo_lr)
        backend = {"name": "neumann", "terms": truncate_iter + 1, "step_size": hpo_lr, "measure_residual": False}
    elif auxilearn_scaling:
        raise AuxiliaryError(
            "auxilearn_scaling reproduces AuxiLearn's own series, and a backend replaces it; choose one of the two."
        )
    chosen = get_backend(backend)
    if not isinstance(chosen, ImplicitBackend):
        raise BackendError(
            f"MetaOptimizer is given losses that were computed already, and {type(chosen).__name__} must train the "
            "model itself: use an implicit backend, or HyperOptimizer."
        )
    return chosen


def _check_weight_norm(train_loss: Tensor, params: Params) -> None:
    """Refuse a fused weight norm of the model: its second derivative in torch is wrong, and silently so."""
    wanted = {id(p) for p in params.values()}
    for node in _below(train_loss.grad_fn):
        if node.name().startswith("WeightNormInterface") and any(
            id(getattr(each, "variable", None)) in wanted for each in _below(node)
        ):
            raise SecondDerivativeError(
                "the training loss is differentiated twice, and torch's second derivative of weight_norm is wrong. "
                "Write the normalised weight as g * v / v.norm() in the model, or use HyperOptimizer, which does so."
            )


def _below(start: Any) -> Iterator[Any]:
    """A node of the graph, and all those that it was computed from."""
    seen: set[object] = set()
    pending = [start]
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            pending += [each for each, _ in node.next_functions]


def _named(tensors: Iterable[Tensor], what: str) -> Params:
    """Those that require grad, by their place; a tensor that is given twice is taken once."""
    given = list(tensors)
    for each in given:
        if not isinstance(each, Tensor):
            raise AuxiliaryError(f"{what} must hold tensors; got {type(each).__name__}.")
    unique: dict[int, tuple[str, Tensor]] = {}
    for i, p in enumerate(given):
        if p.requires_grad:
            unique.setdefault(id(p), (str(i), p))
    if not unique:
        found = f"{len(given)} tensors, none of which requires grad" if given else "nothing"
        raise AuxiliaryError(
            f"{what} must hold at least one tensor that requires grad; got {found}. A generator is empty once it was "
            "read: call .parameters() anew for each step."
        )
    return dict(unique.values())


def _check_disjoint(params: Params, hparams: Params) -> None:
    places = {id(p): name for name, p in params.items()}
    for name, p in hparams.items():
        if id(p) in places:
            raise AuxiliaryError(
                "a tensor is either a parameter of the model or an auxiliary one; number "
                f"{places[id(p)]} of parameters, of shape {tuple(p.shape)}, is number {name} of aux_params too. Leave "
                "it out of one of them."
            )


def _check_loss(loss: Tensor, what: str) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise AuxiliaryError(f"{what} must be a scalar tensor; got {found}. Take its mean or its sum.")
    if not loss.requires_grad:
        raise AuxiliaryError(
            f"{what} must come with its graph; it has none. Compute it without torch.no_grad(), .detach() and .item()."
        )
