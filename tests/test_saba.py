"""``saba``: SAGA by hand, no noise floor where ``soba`` has one, ``soba`` itself on one batch, and refusals."""

from __future__ import annotations

import pytest
import torch

import hyperopt_implicit as hi
from hyperopt_implicit.backend import Status
from hyperopt_implicit.errors import BackendError
from hyperopt_implicit.problem import BilevelProblem
from hyperopt_implicit.testing.assertions import same, saved_and_loaded
from hyperopt_implicit.testing.specimens import regression_data, ridge_problem
from hyperopt_implicit_backends.saba import Saba, reduced
from hyperopt_implicit_backends.soba import Soba

from .quadratics import mixture


def distance(data, state) -> float:
    return float((state["solution"]["weight"] - data.truth).norm() / data.truth.norm())


def test_goes_to_zero_where_soba_stops_at_its_noise():
    """The same stream of random batches, the same ρ."""
    data = mixture(batches=6, noise=0.5)
    order = torch.randint(6, (700,), generator=torch.Generator().manual_seed(1)).tolist()
    saba, soba, floor = {}, {}, []
    for i in order:
        result = data.hypergradient(Saba(step_size=0.12), [i], saba)
        saba = result.state
        soba = data.hypergradient(Soba(step_size=0.12), [i], soba).state
        floor.append(distance(data, soba))
    assert distance(data, saba) < 1e-6
    assert min(floor) > 1e-3
    mean = torch.stack(data.scales).mean()
    torch.testing.assert_close(result.gradients["shift"], mean * data.truth, rtol=1e-5, atol=1e-6)
    assert result.residual < 1e-5


def test_auto_step_size_converges_as_well():
    data, state = mixture(batches=6, noise=0.5), {}
    for i in torch.randint(6, (1200,), generator=torch.Generator().manual_seed(2)).tolist():
        state = data.hypergradient(Saba(), [i], state).state
    assert distance(data, state) < 1e-6


def test_steps_are_those_of_saga():
    """The recursion by hand, averages over the batches visited so far."""
    data, state, rho = mixture(batches=3, noise=0.5), {}, 0.1
    u, table = rho * data.v, {}
    for i in (0, 1, 1, 2, 0, 2, 1):
        result = data.hypergradient(Saba(step_size=rho), [i], state)
        fresh = data.hessians[i] @ u
        table.setdefault(i, fresh)
        estimate = fresh - table[i] + torch.stack(list(table.values())).mean(0)
        table[i] = fresh
        u = u - rho * (estimate - data.v)
        state = saved_and_loaded(result.state)
        torch.testing.assert_close(state["solution"]["weight"], u, rtol=1e-11, atol=1e-13)


def test_validation_batches_are_remembered():
    """Their last gradients, averaged."""
    memory = None
    for place, value, expected in [("0", 1.0, 1.0), ("1", 3.0, 2.0), ("0", 5.0, 6.0), ("1", 3.0, 4.0)]:
        estimate, memory = reduced(memory, {place: {"w": torch.tensor([value])}}, 2)
        assert float(estimate["w"]) == expected
    assert float(memory["mean"]["w"]) == 4.0
    estimate, _ = reduced(memory, {"0": {"w": torch.tensor([1.0])}}, 3)  # of other data
    assert float(estimate["w"]) == 1.0


@pytest.mark.parametrize("step_size", [0.1, "auto"])
def test_is_soba_on_one_batch(step_size):
    data, saba, soba = mixture(batches=1, noise=0.5), {}, {}
    for _ in range(30):
        one, other = (
            data.hypergradient(Saba(step_size=step_size), [0], saba),
            data.hypergradient(Soba(step_size=step_size), [0], soba),
        )
        saba, soba = one.state, other.state
        torch.testing.assert_close(one.gradients["shift"], other.gradients["shift"], rtol=1e-12, atol=1e-14)
        assert (one.status, one.hvps, one.iterations) == (other.status, other.hvps, other.iterations)
        assert one.residual == pytest.approx(other.residual, rel=1e-9)


def test_state_given_is_not_changed_and_holds_what_is_promised():
    data = mixture(batches=3, noise=0.5)
    first = data.hypergradient(Saba(step_size=0.1), [0, 1], {})
    kept = saved_and_loaded(first.state)
    second = data.hypergradient(Saba(step_size=0.1), [2], first.state)
    assert same(first.state, kept)
    assert sorted(second.state["products"]["last"]) == sorted(second.state["mixeds"]["last"]) == ["0", "1", "2"]
    assert list(second.state["slopes"]["last"]) == list(second.state["directs"]["last"]) == ["0"]


def test_divergence_empties_the_memory():
    data, state = mixture(batches=2, noise=0.5), {}
    for call in range(50):
        result = data.hypergradient(Saba(step_size=4.0), [call % 2], state)
        state = result.state
        if result.status.failed:
            break
    assert result.status is Status.DIVERGED
    assert result.residual == 1.0
    assert result.gradients["shift"].abs().max() == 0.0
    assert sorted(state) == ["directs", "slopes"]


# ------------------------------------------------------------------------------------------------- what it refuses


def refusal(training, validation=None, backend="saba") -> str:
    problem = ridge_problem()
    problem.training_data, problem.validation_data = training, validation
    with pytest.raises(BackendError) as caught:
        hi.get_backend(backend).check(problem)
    return str(caught.value)


def test_refuses_data_without_an_index():
    batch = regression_data(0)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batch), batch_size=5)
    rule = "backend 'saba' remembers what each batch gave at its last visit, so "
    remedy = "Make it a list (list(loader), if every pass may see the same batches), or use 'soba'."
    assert refusal(loader, [batch]) == f"{rule}training_data must be a list of batches; it is a DataLoader. {remedy}"
    assert refusal(None, [batch]) == f"{rule}training_data must be a list of batches; there is none. {remedy}"
    assert refusal([batch], loader) == f"{rule}validation_data must be a list of batches; it is a DataLoader. {remedy}"


def test_refuses_a_batch_twice():
    batch = regression_data(0)
    assert refusal([batch, regression_data(1), tuple(batch)], [batch]) == (
        "backend 'saba' knows a batch by its tensors, so training_data must hold each batch once; batches 0 and 2 are "
        "the same. Remove one, or use 'soba'."
    )


def test_refuses_a_batch_on_another_device(monkeypatch):
    monkeypatch.setattr(BilevelProblem, "device", torch.device("meta"))
    batch = regression_data(0)
    assert refusal([batch], [batch]) == (
        "backend 'saba' knows a batch by its tensors, so those of training_data must be on the model's device, meta; "
        "batch 0 has one on cpu. Move them there before the problem is built, or use 'soba'."
    )


@pytest.mark.parametrize("role", ["training", "validation"])
def test_refuses_a_foreign_batch(role):
    data = mixture(batches=3, noise=0.5)
    own, foreign = data.batch(0), tuple(x.clone() for x in data.batch(0))
    given = ([foreign], data.v) if role == "training" else ([own], data.v.clone())
    with pytest.raises(BackendError) as caught:
        Saba().hypergradient(data.problem, *given, {})
    assert str(caught.value) == (
        f"backend 'saba' knows a batch by its tensors, and the {role} batch given is none of the "
        f"{3 if role == 'training' else 1} in {role}_data. Hand over the batches of that list themselves, or use "
        "'soba'."
    )
