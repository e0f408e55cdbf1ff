"""The networks, losses and engines of the coverage table; each product is compared with finite differences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import hyperopt_implicit as hi
from hyperopt_implicit.gauss_newton import GaussNewton
from hyperopt_implicit.inner_loop import train_step
from hyperopt_implicit.testing.assertions import relative_error
from hyperopt_implicit.testing.oracles import finite_differences
from hyperopt_implicit.testing.specimens import seeded
from hyperopt_implicit.vectors import Params

ROWS, FEATURES, CLASSES = 5, 8, 3


class Last(nn.Module):
    """The outputs of a recurrent layer or of attention, without what else it returns."""

    def __init__(self, layer: nn.Module, *, attention: bool = False) -> None:
        super().__init__()
        self.layer, self.attention = layer, attention

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.layer(x, x, x)[0] if self.attention else self.layer(x)[0]
        return outputs


class Tied(nn.Module):
    """One weight, used forwards and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(x))))


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.transpose(-1, -2)


def _parametrized() -> nn.Module:
    layer = nn.Linear(FEATURES, FEATURES)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def _dense(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, FEATURES), layer, nn.Tanh(), nn.Linear(FEATURES, CLASSES))


def _images(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(-1, (1, 2, FEATURES // 2)), *layers, nn.Tanh(), nn.Flatten(), nn.LazyLinear(CLASSES)
    )


def _sequence(layer: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(-1, (2, FEATURES // 2)), nn.Linear(FEATURES // 2, 4), layer, nn.Flatten(), nn.Linear(8, CLASSES)
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "Linear": (lambda: _dense(nn.Linear(FEATURES, FEATURES)), True),
    "Conv1d": (lambda: _sequence(nn.Conv1d(2, 2, 3, padding=1)), True),
    "Conv2d": (lambda: _images(nn.Conv2d(1, 2, 3, padding=1)), True),
    "BatchNorm1d, training": (lambda: _dense(nn.BatchNorm1d(FEATURES)), True),
    "BatchNorm1d, evaluating": (lambda: _dense(nn.BatchNorm1d(FEATURES)), False),
    "BatchNorm2d, training": (lambda: _images(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2)), True),
    "LayerNorm": (lambda: _dense(nn.LayerNorm(FEATURES)), True),
    "GroupNorm": (lambda: _dense(nn.GroupNorm(2, FEATURES)), True),
    "RMSNorm": (lambda: _dense(nn.RMSNorm(FEATURES)), True),
    "Dropout, training": (lambda: _dense(nn.Dropout(0.3)), True),
    "Dropout, evaluating": (lambda: _dense(nn.Dropout(0.3)), False),
    "LSTM": (lambda: _sequence(Last(nn.LSTM(4, 4, batch_first=True))), True),
    "GRU": (lambda: _sequence(Last(nn.GRU(4, 4, batch_first=True))), True),
    "RNN": (lambda: _sequence(Last(nn.RNN(4, 4, batch_first=True))), True),
    "MultiheadAttention": (
        lambda: _sequence(Last(nn.MultiheadAttention(4, 2, batch_first=True), attention=True)),
        True,
    ),
    "TransformerEncoderLayer": (
        lambda: _sequence(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, activation="gelu", batch_first=True)),
        True,
    ),
    "TransformerEncoderLayer, evaluating": (
        lambda: _sequence(nn.TransformerEncoderLayer(4, 2, 8, activation="gelu", batch_first=True)),
        False,
    ),
    "Embedding": (lambda: nn.Sequential(Tokens(), nn.Tanh(), nn.Linear(FEATURES, CLASSES)), True),
    "weight_norm": (lambda: _dense(weight_norm(nn.Linear(FEATURES, FEATURES))), True),
    "spectral_norm, training": (lambda: _dense(spectral_norm(nn.Linear(FEATURES, FEATURES))), True),
    "spectral_norm, evaluating": (lambda: _dense(spectral_norm(nn.Linear(FEATURES, FEATURES))), False),
    "orthogonal": (lambda: _dense(orthogonal(nn.Linear(FEATURES, FEATURES))), True),
    "parametrized": (lambda: _dense(_parametrized()), True),
    "tied weights": (lambda: _dense(Tied()), True),
}
"""How each is built, and whether it is in training mode."""


class Tokens(nn.Module):
    """Features rounded to tokens, and embedded."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x * 2.0).round().long().clamp(-2, 2) + 2
        return self.embedding(tokens).mean(1)


def _one_hot(y: Tensor) -> Tensor:
    return F.one_hot(y, CLASSES).double()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross entropy": F.cross_entropy,
    "BCE with logits": lambda z, y: F.binary_cross_entropy_with_logits(z, _one_hot(y)),
    "MSE": lambda z, y: F.mse_loss(z, _one_hot(y)),
    "Huber": lambda z, y: F.huber_loss(z, _one_hot(y), delta=0.35),
    "KL divergence": lambda z, y: F.kl_div(z.log_softmax(-1), 0.9 * _one_hot(y) + 0.1 / CLASSES, reduction="batchmean"),
    "NLL": lambda z, y: F.nll_loss(z.log_softmax(-1), y),
}


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, CLASSES, (ROWS,), generator=generator)


def problem(network: str, loss: str) -> hi.BilevelProblem:
    """L = exp(λ₀)·loss + λ₁·Σ tanh(outputs)²: a hyperparameter that multiplies, and one that regularises."""
    build, training = NETWORKS[network]
    with torch.random.fork_rng(devices=[]):
        model = seeded(build)
        model(batch(0)[0])  # lazy layers, and running statistics that are not the initial ones
    model.train(training)
    measured = LOSSES[loss]

    @hi.hyperparameter("scale", init=torch.tensor([0.1, 0.3]))
    def training_loss(model: nn.Module, batch: tuple[Tensor, Tensor], *, scale: Tensor) -> Tensor:
        z = model(batch[0])
        return scale[0].exp() * measured(z, batch[1]) + scale[1] * z.tanh().square().mean()

    def validation_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return measured(model(batch[0]), batch[1])

    return hi.BilevelProblem(
        model,
        training_loss,
        validation_loss,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    )


def hessian_error(made: hi.BilevelProblem) -> float:
    """H·v and (∂²L/∂λ∂w)·v against differences of first derivatives along v; the worst of three calls."""
    torch.manual_seed(0)
    hessian = hi.Hessian(made, [batch(1)])
    vector = _random(made)
    expected = _difference(lambda step: _first_derivatives(made, vector, step))
    worst = 0.0
    for _ in range(3):
        product = {**hessian @ vector, **{f"λ {name}": x for name, x in hessian.mixed(vector).items()}}
        worst = max(worst, relative_error(product, expected))
    return worst


def gauss_newton_error(made: hi.BilevelProblem) -> float:
    """Jᵀ(∂²c/∂z²)J·v, with J·v and the curvature of c by differences; the worst of three calls."""
    torch.manual_seed(0)
    matrix = GaussNewton(made, [batch(1)])
    vector = _random(made)
    pushed = _difference(lambda step: {"z": _outputs(made, vector, step)})["z"]
    here = _outputs(made, vector, 0.0)
    curved = _difference(lambda step: {"z": _slope(made, here + step * pushed)})["z"]
    params = {name: p.detach().requires_grad_() for name, p in made.params.items()}
    z = _call(made, params)
    pulled = torch.autograd.grad(z, list(params.values()), curved, allow_unused=True, materialize_grads=True)
    expected = dict(zip(params, pulled, strict=True))
    return max(relative_error(matrix @ vector, expected) for _ in range(3))


def _through_training(backend: str) -> Callable[[hi.BilevelProblem], float]:
    def error(made: hi.BilevelProblem) -> float:
        """Two steps with momentum, differentiated, against training by torch.optim with other hyperparameters."""
        batches = [batch(1), batch(2)]
        found = []
        for _ in range(2):
            torch.manual_seed(0)
            found.append(hi.hypergradient(made, backend, training_batches=batches, validation_batch=batch(3)).gradients)
        twin = made.copy()
        start = twin.inner_state()

        def trained() -> float:
            twin.load_inner_state(start)
            torch.manual_seed(0)
            for each in batches:
                train_step(twin, each, twin.hyperparameters.values())
            end = twin.inner_state()
            params = {name: p.detach() for name, p in end.params.items()}
            # what training leaves in buffers has no derivative: it is held where the hyperparameters are
            return float(made.functional_validation_loss(params, made.hparams, batch(3), dict(buffers)))

        for each in batches:
            torch.manual_seed(0) if each is batches[0] else None
            train_step(twin, each, twin.hyperparameters.values())
        buffers = twin.inner_state().buffers
        expected = finite_differences(trained, twin.hparams, step=2e-4)
        return max(relative_error(each, expected) for each in found)

    return error


ENGINES: dict[str, Callable[[hi.BilevelProblem], float]] = {
    "Hessian and mixed term": hessian_error,
    "Gauss-Newton": gauss_newton_error,
    "through training, reverse": _through_training("unrolled"),
    "through training, forward": _through_training("forward"),
}

ALLOWED = 1e-6


def _random(made: hi.BilevelProblem) -> Params:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in made.params.items()}


def _difference(function: Callable[[float], Params], step: float = 2e-4) -> Params:
    weights = ((-2, 1.0), (-1, -8.0), (1, 8.0), (2, -1.0))
    values = [(weight, function(offset * step)) for offset, weight in weights]
    return {name: sum(weight * value[name] for weight, value in values) / (12.0 * step) for name in values[0][1]}


def _moved(made: hi.BilevelProblem, vector: Params, step: float) -> Params:
    return {name: p.detach() + step * vector[name] for name, p in made.params.items()}


def _first_derivatives(made: hi.BilevelProblem, vector: Params, step: float) -> Params:
    params = {name: p.requires_grad_() for name, p in _moved(made, vector, step).items()}
    hparams = {name: p.detach().requires_grad_() for name, p in made.hparams.items()}
    torch.manual_seed(0)
    loss = made.functional_training_loss(params, hparams, batch(1))
    inputs = [*params.values(), *hparams.values()]
    grads = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return dict(zip([*params, *(f"λ {name}" for name in hparams)], grads, strict=True))


def _call(made: hi.BilevelProblem, params: Params) -> Tensor:
    buffers = {name: b.clone() for name, b in made.model.named_buffers()}
    torch.manual_seed(0)
    outputs: Tensor = torch.func.functional_call(made.model, {**params, **buffers}, (batch(1)[0],))
    return outputs


def _outputs(made: hi.BilevelProblem, vector: Params, step: float) -> Tensor:
    with torch.no_grad():
        return _call(made, _moved(made, vector, step))


def _slope(made: hi.BilevelProblem, z: Tensor) -> Tensor:
    """∂c/∂z: the training loss of a model that returns z."""
    z = z.detach().requires_grad_()
    scale = next(iter(made.hyperparameters.values().values()))
    loss = made.loss_source()(lambda x: z, batch(1), scale=scale)
    return torch.autograd.grad(loss, z)[0]


EXCEPTIONS = {
    "spectral_norm, training": "power iteration moves its vectors at every call, outside autograd: torch's own first "
    "derivative is not that of the loss. Evaluating, or with n_power_iterations=0, it is right.",
}
"""Where products are of what autograd sees, and autograd does not see all; every other cell of the table is right."""
