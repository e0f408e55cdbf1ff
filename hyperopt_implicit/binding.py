"""How the parts of a problem are bound together, and refused where they do not fit.

Which loss takes which hyperparameter, which parameters the inner optimizer trains, which of its options are
hyperparameters: found once, when a problem is made. What a problem then does is in ``problem.py``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hyperopt_implicit.errors import DeclarationError, ProblemError
from hyperopt_implicit.hyperparameters import Declaration, Hyperparameters, accepted_names
from hyperopt_implicit.messages import nearest

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def check_bare(model: nn.Module) -> None:
    """Refuse a model that divides itself over devices or processes: second derivatives do not pass through that.

    Raises:
        ProblemError: with what to pass instead.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            kind, where = type(module).__name__, f", at {name!r}" if name else ""
            raise ProblemError(
                f"the model must be the bare module; got a {kind}{where}. Pass what it wraps (its .module): among "
                "several processes, losses and gradients of every order are averaged here."
            )
    for name, p in model.named_parameters():
        if hasattr(p, "placements") and hasattr(p, "full_tensor"):
            raise ProblemError(
                f"each process must hold the whole of every parameter; {name!r} is a {type(p).__name__}, of which this "
                "one holds a shard (fully_shard, tensor parallelism). Leave the model whole: hypergradients take "
                "replicated models over several processes only."
            )


def check_options(hyperparameters: Hyperparameters, optimizer: torch.optim.Optimizer) -> None:
    """Refuse hyperparameters of the optimizer that are no numeric options of it.

    Raises:
        DeclarationError: with the options that there are.
    """
    for name in hyperparameters.names("optimizer"):
        value = getattr(hyperparameters, name)
        if not isinstance(value, Tensor) or (value.numel() != 1 and (value.dim() != 1 or not len(value))):
            found = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise DeclarationError(
                "a hyperparameter of the optimizer must be one number, or a 1-D tensor with a value for each inner "
                f"step; {name!r} is {found}. Give it init=0.1, say, or init=torch.full((steps,), 0.1)."
            )
        for group in optimizer.param_groups:
            options = [
                key for key, x in group.items() if isinstance(x, float | int | Tensor) and not isinstance(x, bool)
            ]
            options += ["beta1", "beta2"] if "betas" in group else []
            if name not in options:
                raise DeclarationError(
                    "a hyperparameter with target='optimizer' must be a numeric option of the inner optimizer; "
                    f"{type(optimizer).__name__} has {', '.join(sorted(options))}, not "
                    f"{name!r}.{nearest(name, options)}"
                )


def match(declarations: tuple[Declaration, ...], losses: dict[str, Callable[..., Tensor]]) -> dict[str, list[str]]:
    """Which loss takes which declared name; refuses names that are declared twice, taken by none, or never declared."""
    names = [each.name for each in declarations]
    for name in names:
        if names.count(name) > 1:
            raise DeclarationError(
                f"each hyperparameter is declared once; {name!r} is declared on both losses. Keep one declaration: "
                f"each loss that takes {name!r} as a keyword gets the value."
            )
    for_losses = [each.name for each in declarations if each.target == "loss"]
    taken = {role: accepted_names(loss, for_losses) for role, loss in losses.items()}
    for name in for_losses:
        if not any(name in each for each in taken.values()):
            raise DeclarationError(
                "a hyperparameter must be a keyword of a loss; neither training_loss nor validation_loss takes "
                f"{name!r}. Add it to the signature, or declare it with target='optimizer' if the inner optimizer "
                "uses it."
            )
    for role, loss in losses.items():
        required = [
            p.name
            for p in list(inspect.signature(loss).parameters.values())[2:]
            if p.default is p.empty and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        missing = [name for name in required if name not in for_losses]
        if missing:
            raise DeclarationError(
                f"every keyword of a loss needs a declaration or a default; {role} takes {missing[0]!r}, which has "
                "neither. "
                f'Add @hyperparameter("{missing[0]}", init=…) to it, or give it a default.'
            )
    return taken


def inner_optimizer(optimizer: OptimizerFactory | torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer given, or the one that a factory makes.

    Raises:
        ProblemError: there is nothing to train, or no optimizer.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ProblemError(
            "the model must have at least one parameter with requires_grad=True; it has none, so there is nothing to "
            "train. Unfreeze the part that should be trained."
        )
    made: object = optimizer(trainable) if callable(optimizer) else optimizer
    if not isinstance(made, torch.optim.Optimizer):
        raise ProblemError(
            f"optimizer must be a torch.optim.Optimizer or a factory that returns one from a list of parameters; got "
            f"{type(made).__name__}. For instance optimizer=lambda params: torch.optim.SGD(params, lr=0.1)."
        )
    return made


def trained_parameters(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, nn.Parameter]:
    """w: the model's parameters that the optimizer holds, by name.

    Raises:
        ProblemError: it holds others, or none.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    foreign = [p for p in held if id(p) not in names]
    if foreign:
        raise ProblemError(
            f"the inner optimizer must hold parameters of the model only; {len(foreign)} of its {len(held)} tensors "
            f"(the first of shape {tuple(foreign[0].shape)}) are not among them. Build it from the parameters that the "
            f"factory is given, or from those of the model passed to BilevelProblem."
        )
    chosen = {id(p) for p in held if p.requires_grad}
    params = {name: p for name, p in model.named_parameters() if id(p) in chosen}
    if not params:
        raise ProblemError("the inner optimizer must hold a parameter with requires_grad=True; it holds none.")
    return params


def has_weight_norm(module: nn.Module) -> bool:
    """Whether a weight anywhere in a module is normalised by ``weight_norm``."""
    parts = [part for each in module.modules() for part in (each, *each._forward_pre_hooks.values())]
    return any(type(part).__name__ in ("_WeightNorm", "WeightNorm") for part in parts)
