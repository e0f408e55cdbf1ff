"""Products with the Gauss-Newton matrix against the matrix itself, formed from dense Jacobians; what it refuses."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import hyperopt_implicit as hi
from hyperopt_implicit.gauss_newton import GaussNewton
from hyperopt_implicit.operators import Hessian
from hyperopt_implicit.testing.assertions import assert_close, assert_unchanged
from hyperopt_implicit.testing.oracles import dense_derivatives, flatten, unflatten
from hyperopt_implicit.testing.specimens import seeded

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(8, 3, generator=GENERATOR, dtype=torch.float64)
Y = torch.randn(8, 2, generator=GENERATOR, dtype=torch.float64)
LABELS = torch.randint(0, 2, (8,), generator=GENERATOR)
BATCH = (X, Y, LABELS)
OTHER = (X.flip(0) + 0.3, Y.flip(1), LABELS.flip(0))


def network(*between: nn.Module) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh(), *between, nn.Linear(3, 2)))


def problem_of(loss, model=None, **options) -> hi.BilevelProblem:
    """A loss of (model, batch, decay); F is the cross entropy."""

    @hi.hyperparameter("decay", init=0.3)
    def training_loss(model, batch, *, decay):
        return loss(model, batch, decay)

    def validation_loss(model, batch):
        out = model(batch[0])
        return F.cross_entropy(pytree.tree_leaves(out)[0], batch[2])

    return hi.BilevelProblem(
        network() if model is None else model,
        training_loss,
        validation_loss,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1, **options),
    )


def penalty(model, decay):
    return 0.5 * decay * sum(p.square().sum() for p in model.parameters())


def cross_entropy(model, batch, decay):
    return F.cross_entropy(model(batch[0]), batch[2])


def decayed(model, batch, decay):
    return cross_entropy(model, batch, decay) + penalty(model, decay)


def regularised(model, batch, decay):
    return (model(batch[0]) - batch[1]).square().mean() + penalty(model, decay)


def outputs_times_weights(model, batch, decay):
    scale = (1.0 + decay * next(model.parameters()).sum()).tanh()
    return (scale * model(batch[0]) - batch[1]).square().mean() + penalty(model, decay)


def twice(model, batch, decay):
    first, second = model(batch[0]), model(batch[0][:3] * 2.0)
    return F.cross_entropy(first, batch[2]) + (first[:3] * second).square().mean() + penalty(model, decay)


def in_place(model, batch, decay):
    z = model(batch[0])
    z.mul_(1.5).sub_(batch[1])
    return z.square().mean() * decay.exp()


def of_a_dict(model, batch, decay):
    out = model(batch[0])
    return F.cross_entropy(out["a"], batch[2]) + (out["both"][0] * out["both"][1]).mean() * decay


class Several(nn.Module):
    """Outputs in a dict and a tuple, one of them no number that depends on the weights."""

    def __init__(self):
        super().__init__()
        self.body = network()
        self.scale = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, x):
        z = self.body(x)
        return {"a": z, "both": (z.tanh() * self.scale, z.sigmoid(), x.detach(), torch.arange(3))}


def dense_gauss_newton(problem, batches, seed=3):
    """Jᵀ c_zz J + Jᵀ c_zw + c_wz J + c_ww with J and the derivatives of c formed whole, and the optimizer's decay."""
    w0 = flatten(problem.params)

    def run(w, replace):
        handle = problem.model.register_forward_hook(lambda module, inputs, out: pytree.tree_map(replace, out))
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                params = unflatten(w, problem.params)
                losses = [problem.functional_training_loss(params, problem.hparams, batch) for batch in batches]
        finally:
            handle.remove()
        return torch.stack(losses).mean()

    def outputs(w):
        found = []
        run(w, lambda z: found.append(z.clone()) or z if z.is_floating_point() else z)
        return torch.cat([z.reshape(-1) for z in found])

    def outer(z, w):
        place = 0

        def replace(x):
            nonlocal place
            if not x.is_floating_point():
                return x
            place += x.numel()
            return z[place - x.numel() : place].view_as(x).clone()

        return run(w, replace)

    J = torch.autograd.functional.jacobian(outputs, w0)
    (zz, zw), (wz, ww) = torch.autograd.functional.hessian(outer, (outputs(w0).detach(), w0))
    decay = torch.cat(
        [
            torch.full((p.numel(),), problem.weight_decays.get(name, 0.0), dtype=torch.float64)
            for name, p in problem.params.items()
        ]
    )
    return J.T @ zz @ J + J.T @ zw + wz @ J + ww + torch.diag(decay)


def formed(problem, batches, seed=3):
    """The matrix, from products with the basis."""
    torch.manual_seed(seed)
    operator = GaussNewton(problem, batches)
    size = sum(p.numel() for p in problem.params.values())
    rows = [flatten(operator @ unflatten(e, problem.params)) for e in torch.eye(size, dtype=torch.float64)]
    assert operator.products == size
    return torch.stack(rows)


CASES = {
    "cross entropy": lambda: problem_of(cross_entropy),
    "squares and decay": lambda: problem_of(regularised),
    "outputs times weights": lambda: problem_of(outputs_times_weights),
    "two calls": lambda: problem_of(twice),
    "outputs changed in place": lambda: problem_of(in_place),
    "dict and tuple": lambda: problem_of(of_a_dict, Several()),
    "dropout": lambda: problem_of(twice, network(nn.Dropout(0.4))),
    "batch norm": lambda: problem_of(regularised, network(nn.BatchNorm1d(3))),
    "decay of the optimizer": lambda: problem_of(cross_entropy, weight_decay=0.2),
}
every_case = pytest.mark.parametrize("make", CASES.values(), ids=list(CASES))


@every_case
@pytest.mark.parametrize("batches", [[BATCH], [BATCH, OTHER]], ids=["one batch", "two batches"])
def test_products_are_those_of_the_matrix(make, batches):
    problem = make()
    with assert_unchanged(problem, random_state=False):
        found = formed(problem, batches)
    torch.testing.assert_close(found, dense_gauss_newton(problem, batches), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(found, found.T, rtol=1e-11, atol=1e-13)


def test_cross_entropy_by_its_closed_form():
    """Jᵀ (diag(p) − ppᵀ) J, averaged over rows: no help from a hook."""
    problem = problem_of(cross_entropy)
    model = problem.model
    J = torch.autograd.functional.jacobian(
        lambda w: torch.func.functional_call(model, unflatten(w, problem.params), X), flatten(problem.params)
    )
    p = model(X).detach().softmax(1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = torch.einsum("nia,nij,njb->ab", J, curvature, J) / len(X)
    torch.testing.assert_close(formed(problem, [BATCH]), expected, rtol=1e-11, atol=1e-13)


@every_case
def test_repeated_products_are_equal_to_the_bit(make):
    problem = make()
    operator = GaussNewton(problem, [BATCH, OTHER])
    vector = {name: torch.randn(p.shape, generator=GENERATOR).double() for name, p in problem.params.items()}
    first, again = operator @ vector, operator @ vector
    assert all(torch.equal(first[name], again[name]) for name in vector)


def test_it_is_the_hessian_of_a_linear_model():
    problem = problem_of(regularised, seeded(lambda: nn.Linear(3, 2)))
    expected = dense_derivatives(problem, [BATCH, OTHER]).hessian
    torch.testing.assert_close(formed(problem, [BATCH, OTHER]), expected, rtol=1e-12, atol=1e-14)


def test_it_is_positive_where_the_hessian_is_not():
    """A classification net far from its minimum."""
    problem = problem_of(cross_entropy)
    with torch.no_grad():
        for p in problem.params.values():
            p.mul_(3.0)
    hessian = torch.linalg.eigvalsh(dense_derivatives(problem, [BATCH]).hessian)
    matrix = torch.linalg.eigvalsh(formed(problem, [BATCH]))
    assert hessian[0] < -1e-2 * hessian[-1]
    assert matrix[0] > -1e-13 * matrix[-1]


def test_batch_norm_keeps_its_buffers():
    problem = problem_of(regularised, network(nn.BatchNorm1d(3)))
    with assert_unchanged(problem):
        operator = GaussNewton(problem, [BATCH])
        operator @ problem.params


def test_the_mixed_term_is_that_of_the_whole_loss():
    problem = problem_of(outputs_times_weights, network(nn.Dropout(0.4)))
    u = {name: torch.randn(p.shape, generator=GENERATOR).double() for name, p in problem.params.items()}
    torch.manual_seed(3)
    gauss_newton = GaussNewton(problem, [BATCH, OTHER])
    torch.manual_seed(3)
    hessian = Hessian(problem, [BATCH, OTHER])
    gauss_newton @ u
    assert_close(gauss_newton.mixed(u), hessian.mixed(u), 1e-14)
    assert gauss_newton.loss == hessian.loss


@pytest.mark.parametrize("seed", [0, 1])
def test_dropout_masks_are_those_of_the_mixed_term(seed):
    """The random state at the time of building counts, and a product moves it no further than the build did."""
    problem = problem_of(regularised, network(nn.Dropout(0.4)))
    torch.manual_seed(seed)
    operator = GaussNewton(problem, [BATCH])
    after = torch.get_rng_state()
    torch.manual_seed(99)  # whatever happens between building and the first product
    moved = torch.get_rng_state()
    product = flatten(operator @ problem.params)
    assert torch.equal(torch.get_rng_state(), moved)
    assert not torch.equal(after, moved)
    expected = dense_gauss_newton(problem, [BATCH], seed) @ flatten(problem.params)
    torch.testing.assert_close(product, expected, rtol=1e-11, atol=1e-13)


THOROUGH = {
    "cg": {"tolerance": 1e-13, "max_iterations": 300},
    "minres": {"tolerance": 1e-13, "max_iterations": 300},
    "exact": {},
    "neumann": {"tolerance": 1e-12, "terms": 20000},
    "fixed_point": {"tolerance": 1e-12, "iterations": 20000},
    "nystrom": {"rank": 100},
}


@pytest.mark.parametrize("name", THOROUGH)
@pytest.mark.parametrize("damping", [0.1, 0.5])
def test_every_backend_solves_with_it(name, damping):
    """dF/dλ = ∂F/∂λ − (∂²L/∂λ∂w)(G + δI)⁻¹ ∂F/∂w, with everything formed densely."""
    problem = problem_of(decayed)
    batches = [BATCH, OTHER]
    backend = hi.get_backend(name, curvature="gauss_newton", damping=damping, **THOROUGH[name])
    result = hi.hypergradient(problem, backend, training_batches=batches, validation_batch=BATCH)
    loss = problem.functional_validation_loss(problem.params, problem.hparams, BATCH)
    v = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(problem.params.values()))])
    G = dense_gauss_newton(problem, batches)
    u = torch.linalg.solve(G + damping * torch.eye(len(G), dtype=torch.float64), v)
    expected = -dense_derivatives(problem, batches).mixed.T @ u
    assert_close(result.gradients, unflatten(expected, problem.hparams), 1e-9)
    assert result.status is hi.Status.CONVERGED


def test_a_loss_that_never_calls_the_model_is_refused():
    problem = problem_of(lambda model, batch, decay: (model[0](batch[0]).sum() ** 2) * decay)
    with pytest.raises(
        hi.BackendError,
        match="^"
        + re.escape(
            "curvature='gauss_newton' takes the model's outputs from its calls in the training loss, and the training "
            "loss makes none that depends on the weights. Call the model itself there, model(x), not only parts of it, "
            "or use curvature='hessian'."
        )
        + "$",
    ):
        GaussNewton(problem, [BATCH]) @ problem.params


def test_a_loss_that_feeds_the_model_with_its_output_is_refused():
    def fed_back(model, batch, decay):
        z = model(batch[0])
        return (decay * model(torch.cat([z, z[:, :1]], dim=1))).square().mean()

    with pytest.raises(
        hi.BackendError,
        match="^"
        + re.escape(
            "curvature='gauss_newton' needs the model's outputs to depend on the weights alone; the training loss "
            "feeds the model with what an earlier call of it returned. Use curvature='hessian'."
        )
        + "$",
    ):
        GaussNewton(problem_of(fed_back), [BATCH]) @ network().state_dict()
