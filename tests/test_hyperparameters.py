"""Declarations: where a hyperparameter starts, the values it may take, and the module that holds it."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

import hyperopt_implicit as hi
from hyperopt_implicit.hyperparameters import Hyperparameters, declarations_of


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


CONSTRAINTS: dict[str, tuple[Constraint, Tensor]] = {
    "real": (constraints.real, tensor([-1.5, 0.0, 2.0])),
    "real_vector": (constraints.real_vector, tensor([-1.5, 0.0, 2.0])),
    "positive": (constraints.positive, tensor([1e-4, 1.0, 30.0])),
    "nonnegative": (constraints.nonnegative, tensor([1e-4, 1.0, 30.0])),
    "greater_than": (constraints.greater_than(2.0), tensor([2.01, 3.0])),
    "greater_than_eq": (constraints.greater_than_eq(-1.0), tensor([-0.9, 3.0])),
    "less_than": (constraints.less_than(0.5), tensor([-4.0, 0.4])),
    "interval": (constraints.interval(-1.0, 3.0), tensor([-0.9, 0.0, 2.9])),
    "unit_interval": (constraints.unit_interval, tensor([0.01, 0.5, 0.99])),
    "half_open_interval": (constraints.half_open_interval(0.0, 2.0), tensor([0.1, 1.9])),
    "simplex": (constraints.simplex, tensor([0.1, 0.2, 0.7])),
    "simplex_rows": (constraints.simplex, tensor([[0.1, 0.2, 0.7], [0.3, 0.3, 0.4]])),
    "independent": (constraints.independent(constraints.positive, 1), tensor([0.5, 2.0])),
    "lower_cholesky": (constraints.lower_cholesky, tensor([[1.0, 0.0], [-0.5, 2.0]])),
    "positive_definite": (constraints.positive_definite, tensor([[2.0, 0.5], [0.5, 1.0]])),
    "corr_cholesky": (constraints.corr_cholesky, tensor([[1.0, 0.0], [0.6, 0.8]])),
}


@pytest.fixture(params=CONSTRAINTS.values(), ids=CONSTRAINTS.keys())
def constrained(request: pytest.FixtureRequest) -> tuple[Constraint, Tensor]:
    return request.param  # type: ignore[no-any-return]


def model(dtype: torch.dtype = torch.float64) -> nn.Linear:
    return nn.Linear(2, 1, bias=False, dtype=dtype)


def holding(init: object, constraint: Constraint = constraints.real, of: nn.Module | None = None) -> Hyperparameters:
    """The module for one hyperparameter called ``value``."""

    @hi.hyperparameter("value", init=init, constraint=constraint)  # type: ignore[arg-type]
    def training_loss(model: nn.Module, batch: object, *, value: Tensor) -> Tensor:
        raise NotImplementedError

    return Hyperparameters(declarations_of(training_loss), model() if of is None else of)


def problem_with(init: object, constraint: Constraint = constraints.real) -> hi.BilevelProblem:
    """L = ½‖w − sin(value)·[1, 2]‖², so that w* follows from the value in closed form; F = Σ cos(w + value)."""
    target = tensor([1.0, 2.0])

    @hi.hyperparameter("value", init=init, constraint=constraint)  # type: ignore[arg-type]
    def training_loss(model: nn.Linear, batch: object, *, value: Tensor) -> Tensor:
        return 0.5 * (model.weight[0] - value.sin().sum() * target).square().sum()

    def validation_loss(model: nn.Linear, batch: object, *, value: Tensor) -> Tensor:
        return (model.weight[0] ** 2).cos().sum() + value.square().sum()

    return hi.BilevelProblem(
        model(), training_loss, validation_loss, optimizer=lambda params: torch.optim.SGD(params, lr=0.1)
    )


# ------------------------------------------------------------------------------------------------- constraints


def test_value_survives_the_way_to_unconstrained_space_and_back(constrained: tuple[Constraint, Tensor]) -> None:
    constraint, value = constrained
    held = holding(value, constraint)
    torch.testing.assert_close(held()["value"], value, rtol=1e-12, atol=1e-12)
    assert all(p.isfinite().all() for p in held.unconstrained().values())


def test_value_stays_inside_however_far_the_unconstrained_one_moves(constrained: tuple[Constraint, Tensor]) -> None:
    constraint, value = constrained
    held = holding(value, constraint)
    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 5.0):
        with torch.no_grad():
            for p in held.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * scale)
        assert constraint.check(held()["value"]).all()


def test_gradient_is_that_of_the_unconstrained_values(constrained: tuple[Constraint, Tensor]) -> None:
    """Against central differences of F(w*(λ), λ) with w* in closed form, moved in unconstrained space."""
    problem = problem_with(constrained[1], constrained[0])
    raw = problem.hparams["value"]
    target = tensor([1.0, 2.0])

    @torch.no_grad()
    def outer_loss() -> float:
        value = problem.hyperparameters()["value"]
        problem.model.weight[0] = value.sin().sum() * target
        return float(problem.validation_loss(None))

    expected = torch.zeros_like(raw)
    for i in range(raw.numel()):
        sides = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                raw.view(-1)[i] += step
                sides.append(outer_loss())
                raw.view(-1)[i] -= step
        expected.view(-1)[i] = (sides[0] - sides[1]) / 2e-5
    outer_loss()
    found = hi.hypergradient(problem, "exact", training_batches=[None], validation_batch=None)
    torch.testing.assert_close(found.gradients["value"], expected.detach(), rtol=1e-6, atol=1e-7)


def test_every_constraint_can_be_optimized(constrained: tuple[Constraint, Tensor]) -> None:
    problem = problem_with(constrained[1], constrained[0])
    before = problem.hyperparameters.values()["value"]
    outer = hi.HyperOptimizer(problem, torch.optim.Adam, lr=0.05, backend="cg")
    for _ in range(5):
        outer.step(None, None)
    after = problem.hyperparameters.values()["value"]
    assert constrained[0].check(after).all()
    assert not torch.equal(after, before)


# ------------------------------------------------------------------------------------------------------ starts


@pytest.mark.parametrize(
    ("init", "expected"),
    [
        (0.25, torch.tensor(0.25)),
        (2, torch.tensor(2.0)),
        ([1.0, 2.0], torch.tensor([1.0, 2.0])),
        (torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])),
        (lambda model: torch.full_like(model.weight, 0.5), torch.full((1, 2), 0.5)),
        (lambda model: model.in_features, torch.tensor(2.0)),
    ],
    ids=["float", "int", "list", "integer tensor", "callable to tensor", "callable to number"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_start_takes_the_models_dtype(init: object, expected: Tensor, dtype: torch.dtype) -> None:
    value = holding(init, of=model(dtype))()["value"]
    assert value.dtype == dtype
    torch.testing.assert_close(value, expected.to(dtype))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_start_takes_the_models_device() -> None:
    held = holding(torch.ones(3), constraints.positive, of=nn.Linear(1, 1, device="cuda"))
    assert held()["value"].device.type == "cuda"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("constraint", "start"),
    [(constraints.simplex, [0.1, 0.2, 0.7]), (constraints.corr_cholesky, [[1.0, 0.0], [0.6, 0.8]])],
    ids=["simplex", "corr_cholesky"],
)
def test_rounding_to_the_models_dtype_does_not_put_a_start_outside(
    constraint: Constraint, start: list[float], dtype: torch.dtype
) -> None:
    value = holding(torch.tensor(start), constraint, of=model(dtype))()["value"]
    torch.testing.assert_close(value, torch.tensor(start, dtype=dtype), rtol=2e-2, atol=1e-6)


def test_start_tensor_is_copied_and_cut_from_its_graph() -> None:
    source = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    held = holding(source * 1.0)
    with torch.no_grad():
        held.unconstrained()["value"].add_(1.0)
    assert held.unconstrained()["value"].is_leaf
    assert source.tolist() == [1.0, 2.0]


def test_model_without_floating_parameters_leaves_the_default_dtype() -> None:
    assert holding(1.0, of=nn.Identity())()["value"].dtype == torch.get_default_dtype()


# ----------------------------------------------------------------------------------------------------- modules


def network_problem(network: nn.Module) -> hi.BilevelProblem:
    @hi.hyperparameter("network", init=network)
    def training_loss(model: nn.Linear, batch: Tensor, *, network: nn.Module) -> Tensor:
        return (model(batch) - network(batch)).square().mean()

    def validation_loss(model: nn.Linear, batch: Tensor) -> Tensor:
        return (model(batch) - batch.sum(1, keepdim=True)).square().mean()

    return hi.BilevelProblem(
        model(), training_loss, validation_loss, optimizer=lambda params: torch.optim.SGD(params, lr=0.3)
    )


def test_module_is_copied_trained_and_its_original_untouched() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    original = {name: p.detach().clone() for name, p in network.named_parameters()}
    problem = network_problem(network)
    assert problem.hyperparameters()["network"][0].weight.dtype == torch.float64
    assert sorted(problem.hparams) == sorted(f"network.{name}" for name in original)
    outer = hi.HyperOptimizer(problem, torch.optim.Adam, lr=0.01, backend="cg")
    outer.step(torch.randn(8, 2, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64))
    for name, p in network.named_parameters():
        torch.testing.assert_close(p, original[name], rtol=0, atol=0)
        assert p.dtype == torch.float32
        assert p.grad is None
        assert not torch.equal(problem.hparams[f"network.{name}"].float(), p)


def test_frozen_part_of_a_module_stays() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    network[0].requires_grad_(False)
    problem = network_problem(network)
    assert sorted(problem.hparams) == ["network.1.bias", "network.1.weight"]


def test_values_are_snapshots() -> None:
    problem = network_problem(nn.Linear(2, 1))
    snapshot = problem.hyperparameters.values()["network"]
    before = snapshot.weight.detach().clone()
    with torch.no_grad():
        problem.hparams["network.weight"].add_(1.0)
    torch.testing.assert_close(snapshot.weight.detach(), before, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------- the decorated loss


@hi.hyperparameter("scale", init=torch.tensor([2.0, 3.0]), constraint=constraints.positive)
@hi.hyperparameter("shift", init=lambda model: model.weight.detach().sum())
def decorated(model: nn.Linear, batch: Tensor, *, scale: Tensor, shift: Tensor, exponent: int = 2) -> Tensor:
    """A loss of somebody's own."""
    return (scale * batch).sum() ** exponent + shift


def test_decorated_loss_alone_uses_initial_values() -> None:
    linear, batch = model(), torch.ones(2, dtype=torch.float64)
    start = float(linear.weight.detach().sum())
    assert decorated(linear, batch).item() == pytest.approx(25.0 + start)
    assert decorated(linear, batch, shift=1.0).item() == pytest.approx(26.0)
    assert decorated(linear, batch, scale=torch.zeros(2), shift=1.0, exponent=3).item() == pytest.approx(1.0)


def test_decorated_loss_keeps_its_name_and_docstring() -> None:
    assert decorated.__name__ == "decorated"
    assert decorated.__doc__ == "A loss of somebody's own."
    assert [each.name for each in declarations_of(decorated)] == ["scale", "shift"]


def test_loss_that_takes_any_keyword_gets_all_values() -> None:
    @hi.hyperparameter("a", init=1.0)
    @hi.hyperparameter("b", init=2.0)
    @hi.hyperparameter("lr", init=0.1, target="optimizer")
    def training_loss(model: nn.Linear, batch: object, **values: Tensor) -> Tensor:
        assert sorted(values) == ["a", "b"]
        return model.weight.square().sum() * values["a"] + values["b"]

    problem = hi.BilevelProblem(
        model(), training_loss, lambda model, batch: model.weight.sum(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1)
    )
    expected = problem.model.weight.square().sum() + 2.0
    torch.testing.assert_close(problem.training_loss(None), expected)
    torch.testing.assert_close(training_loss(problem.model, None), expected)


def test_declaration_may_stand_on_the_validation_loss() -> None:
    def training_loss(model: nn.Linear, batch: object, *, a: Tensor) -> Tensor:
        return (model.weight - a).square().sum()

    @hi.hyperparameter("a", init=0.5)
    def validation_loss(model: nn.Linear, batch: object) -> Tensor:
        return model.weight.sum()

    problem = hi.BilevelProblem(model(), training_loss, validation_loss, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    found = hi.hypergradient(problem, "exact", training_batches=[None], validation_batch=None)
    assert found.gradients["a"].item() == pytest.approx(2.0)


# ---------------------------------------------------------------------------------------------- the module itself


def test_state_dict_holds_unconstrained_values_and_restores_them() -> None:
    held = holding(torch.tensor([0.5, 2.0]), constraints.positive)
    state = held.state_dict()
    assert list(state) == ["value"]
    torch.testing.assert_close(state["value"], tensor([math.log(0.5), math.log(2.0)]))
    other = holding(torch.tensor([7.0, 7.0]), constraints.positive)
    other.load_state_dict(state)
    torch.testing.assert_close(other()["value"], tensor([0.5, 2.0]))


def test_values_follow_to_another_dtype() -> None:
    held = holding(torch.ones(2), constraints.positive).to(torch.float32)
    assert held()["value"].dtype == torch.float32


def test_names_by_target() -> None:
    @hi.hyperparameter("lr", init=0.1, constraint=constraints.positive, target="optimizer")
    @hi.hyperparameter("decay", init=0.2)
    @hi.hyperparameter("network", init=nn.Linear(1, 1))
    def training_loss(model: nn.Linear, batch: object, *, decay: Tensor, network: nn.Module) -> Tensor:
        return decay * model.weight.square().sum()

    held = Hyperparameters(declarations_of(training_loss), model())
    assert held.names("loss") == ["decay", "network"]
    assert held.names("optimizer") == ["lr"]
    assert list(held.declarations) == ["lr", "decay", "network"]
    assert list(held("loss")) == ["decay", "network"]
    assert list(held.unconstrained()) == ["lr", "decay", "network.weight", "network.bias"]


def test_optimizer_hyperparameter_is_written_into_the_inner_optimizer() -> None:
    @hi.hyperparameter("lr", init=0.25, constraint=constraints.positive, target="optimizer")
    @hi.hyperparameter("beta1", init=0.5, constraint=constraints.unit_interval, target="optimizer")
    def training_loss(model: nn.Linear, batch: object) -> Tensor:
        return model.weight.square().sum()

    problem = hi.BilevelProblem(
        model(), training_loss, lambda model, batch: model.weight.sum(), optimizer=lambda p: torch.optim.Adam(p, lr=9.0)
    )
    (group,) = problem.optimizer.param_groups
    assert group["lr"] == pytest.approx(0.25)
    assert group["betas"] == pytest.approx((0.5, 0.999))


# -------------------------------------------------------------------------------------------------------- projection


class NonNegative(nn.Linear):
    """A layer that keeps its weights non-negative by correcting them."""

    corrections = 0

    @torch.no_grad()
    def project_(self) -> None:
        self.corrections += 1
        self.weight.clamp_(min=0.0)


def test_outer_steps_project_each_module_that_asks_for_it() -> None:
    """However deep, once a step; other modules, and attributes of that name that are no method, are left alone."""
    network = nn.Sequential(nn.Sequential(NonNegative(2, 3), nn.Tanh()), nn.Linear(3, 1))
    network[1].project_ = 3.0
    problem = network_problem(network)
    held = problem.hyperparameters()["network"]
    outer = hi.HyperOptimizer(problem, torch.optim.SGD, lr=0.1, backend="cg")
    batch = torch.randn(8, 2, dtype=torch.float64)
    for step in range(1, 4):
        outer.step(batch, batch - 1.0)
        assert held[0][0].corrections == step
        assert held[0][0].weight.min() == 0.0 < held[0][0].weight.max()
    assert held[0][0].bias.min() < 0.0
    assert held[1].weight.min() < 0.0
    assert network[0][0].corrections == 0


# ------------------------------------------------------------------------------------------------------ values are set


def test_values_that_are_set_come_back(constrained: tuple[Constraint, Tensor]) -> None:
    constraint, value = constrained
    hyperparameters = holding(value, constraint)
    start = hyperparameters.values()["value"].clone()
    other = holding(value, constraint)
    with torch.no_grad():
        for each in other.parameters():
            each.add_(0.3)
    wanted = other.values()
    assert not torch.allclose(wanted["value"], start)
    hyperparameters.load_values(wanted)
    torch.testing.assert_close(hyperparameters.values()["value"], wanted["value"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("as_state_dict", [True, False])
def test_module_is_set_from_a_module_or_its_state_dict(as_state_dict: bool) -> None:
    hyperparameters, given = holding(nn.Linear(2, 3)), nn.Linear(2, 3)
    hyperparameters.load_values({"value": given.state_dict() if as_state_dict else given})
    live = hyperparameters.values()["value"]
    assert live is not given
    for name, tensor_set in live.state_dict().items():
        assert torch.equal(tensor_set, given.state_dict()[name])


def test_values_are_set_in_the_dtype_that_is_there() -> None:
    hyperparameters = holding(1.0, constraints.positive)
    hyperparameters.load_values({"value": torch.tensor(0.5, dtype=torch.float32)})
    value = hyperparameters.values()["value"]
    assert (value.dtype, float(value)) == (torch.float64, pytest.approx(0.5, rel=1e-15))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"decay": tensor(0.1)}, "there is no hyperparameter 'decay' to set; there are first, second."),
        ({"second": tensor([1.0])}, "hyperparameter 'second' can only be set to what has its shape, "),
        ({"second": {"weight": tensor(1.0)}}, "hyperparameter 'second' can only be set to what has its shape, "),
    ],
)
def test_values_that_do_not_fit_change_nothing(given: dict[str, object], message: str) -> None:
    @hi.hyperparameter("first", init=1.0, constraint=constraints.positive)
    @hi.hyperparameter("second", init=tensor([1.0, 2.0]))
    def training_loss(model: nn.Module, batch: object, *, first: Tensor, second: Tensor) -> Tensor:
        raise NotImplementedError

    hyperparameters = Hyperparameters(declarations_of(training_loss), model())
    before = {name: each.clone() for name, each in hyperparameters.state_dict().items()}
    with pytest.raises(hi.DeclarationError) as caught:
        hyperparameters.load_values({"first": tensor(3.0), **given})  # type: ignore[dict-item]
    assert str(caught.value).startswith(message)
    assert all(torch.equal(each, before[name]) for name, each in hyperparameters.state_dict().items())
