"""The comparison with other libraries is fair and its page says what was measured.

The references agree with closed forms, every adapter that can be imported gives what its library's formula gives on a
quadratic, and the sentences of the page follow from the rows.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import constraints

import hyperopt_implicit as hi

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import adapters
import peers_page
from adapters import Method, ours
from closed_form import Quadratic
from problems import Case
from races import Race, Row, _kept, _Samples
from reference import Reference, through_training

pytestmark = [  # two libraries use functorch by its old name, whose import needs what torch is about to drop
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
]


@pytest.fixture(params=[0.0, 0.3], ids=["plain", "damped"])
def quadratic(request):
    return Quadratic(request.param)


def reference(quadratic, damping=None):
    s = quadratic.setting
    return Reference(s.losses, s.raw, quadratic.damping if damping is None else damping)


# ------------------------------------------------------------------------------------------------------- references


def test_reference_is_the_closed_form(quadratic):
    found = reference(quadratic)
    torch.testing.assert_close(found.dense(), quadratic.A + quadratic.damping * torch.eye(5).double())
    torch.testing.assert_close(found.hypergradient(found.solve()), quadratic.answer("cg"), rtol=1e-9, atol=0)


def test_reference_begins_anywhere(quadratic):
    found = reference(quadratic)
    start = torch.full((5,), 7.0, dtype=torch.float64)
    torch.testing.assert_close(found.solve(start), found.solve(), rtol=1e-8, atol=1e-10)


def test_largest_eigenvalue_by_lanczos(quadratic):
    assert reference(quadratic).largest_eigenvalue() == pytest.approx(4.0 + quadratic.damping, rel=1e-10)


def test_reference_of_the_steps_is_the_closed_form(quadratic):
    s = quadratic.setting
    found = through_training(s.losses, s.raw, s.learning_rate, s.steps)
    torch.testing.assert_close(found, quadratic.answer("unrolled"), rtol=1e-12, atol=0)


def test_reference_refuses_an_indefinite_matrix(quadratic):
    with pytest.raises(ArithmeticError, match="not positive definite"):
        reference(quadratic, damping=-1.0).solve()


def test_reference_refuses_an_answer_that_is_not_there_yet(quadratic):
    with pytest.raises(ArithmeticError, match="residual"):
        reference(quadratic).solve(most=2)


# --------------------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("library", ["ours", *adapters.LIBRARIES])
def test_adapter_gives_what_its_library_promises(library, quadratic):
    found, missing = adapters.installed()
    if library != "ours" and library not in found:
        pytest.skip(missing[adapters.LIBRARIES[library]])
    others = [] if library == "ours" else [found[library]]
    methods = [m for m in quadratic.methods(others) if (m.library == ours.OURS) == (library == "ours")]
    assert methods
    before = [p.detach().clone() for p in [*quadratic.setting.params, *quadratic.setting.raw.values()]]
    for method in methods:
        error = quadratic.error(method)
        if (method.library, method.name) in peers_page.WRONG:
            assert error > 1e-2, f"{method.name} is right: the page must not say otherwise"
        else:
            assert error < 1e-12, method.name
    after = [*quadratic.setting.params, *quadratic.setting.raw.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.is_leaf and p.grad is None for p in after)


def stale_conjugate_gradients(A, v, iterations):
    """With each direction from the residual before the last update, as the page says of two libraries."""
    x, r, p = torch.zeros_like(v), v.clone(), v.clone()
    for _ in range(iterations):
        step = r.dot(r) / p.dot(A @ p)
        x, new = x + step * p, r - step * A @ p
        p, r = r + new.dot(new) / r.dot(r) * p, new
    return x


@pytest.mark.parametrize(("library", "name"), list(peers_page.WRONG))
def test_what_the_page_says_is_wrong_is_what_is_wrong(library, name, quadratic):
    found, missing = adapters.installed()
    if library not in found:
        pytest.skip(missing[adapters.LIBRARIES[library]])
    (method,) = [m for m in found[library].implicit(quadratic.setting) if m.name == name]
    curvature = quadratic.A + quadratic.damping * torch.eye(5).double()
    solution = stale_conjugate_gradients(curvature, quadratic.start - quadratic.t, 5)
    torch.testing.assert_close(method.call()[0], quadratic.B.T @ solution, rtol=1e-10, atol=0)


def test_methods_with_a_state_arrive(quadratic):
    found, _ = adapters.installed()
    modules = [ours, *(module for module in found.values() if hasattr(module, "steady"))]
    for method in [m for module in modules for m in module.steady(quadratic.setting)]:
        for _ in range(60):
            gradient = method.call()[0]
        expected = quadratic.answer("cg")
        assert float((gradient - expected).norm() / expected.norm()) < 1e-3, method.name


def test_an_absent_library_is_named(monkeypatch):
    monkeypatch.setitem(adapters.LIBRARIES, "nowhere", "nowhere-torch")
    _, missing = adapters.installed()
    assert "ModuleNotFoundError" in missing["nowhere-torch"]


# ------------------------------------------------------------------------------------------------------------ races


@pytest.fixture
def case():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(40, 4, generator=draw)
    batch = (x, (x[:, 0] > 0).long())

    @hi.hyperparameter("decay", init=torch.full((4,), 1e-1), constraint=constraints.positive)
    def training_loss(model, batch, *, decay):
        return F.cross_entropy(model(batch[0]), batch[1]) + (decay * model.weight.square()).sum()

    def validation_loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    def make():
        torch.manual_seed(0)
        return hi.BilevelProblem(
            nn.Linear(4, 2), training_loss, validation_loss,
            optimizer=lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.9),
        )  # fmt: skip

    return Case("P0 tiny", make, training_loss, validation_loss, batch, batch, {"decay": torch.exp}, damping=0.1)


def test_race(case):
    race = Race(case, torch.device("cpu"), 0.0, [])
    before = race.problem.inner_state().params
    rows = race.at_one_point() + race.along_a_loop(6, points=2)
    errors = {(row.kind, row.name, row.work): row.error for row in rows}
    assert errors["implicit", "`cg`", "10 products"] < 1e-4
    assert errors["implicit", "`exact`", "10 products"] < 1e-5
    assert 1.0 > errors["implicit", "`neumann`", "5 products"] > errors["implicit", "`neumann`", "10 products"] > 1e-5
    assert errors["unrolled", "`unrolled`", "10 steps"] < 1e-4
    assert errors["steady", "`cg`", "3 products"] < 1e-1
    assert errors["steady", "`cg`", "10 products"] < 1e-4
    assert all(row.cost > 0 and row.megabytes > 0 and -1 <= row.cosine <= 1 + 1e-6 for row in rows)
    after = race.problem.params
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_medians_are_of_the_second_half_and_the_mean_of_all():
    seconds = iter([0.0, 8.0, 0.0, 1.0, 0.0, 2.0, 0.0, 5.0])
    method = Method("x", "cg", "`x`", "", lambda: [torch.tensor([1.0, 1.0])], carries=True, spent=[9, 9, 9])
    samples = _Samples(method)
    samples.take(lambda: next(seconds), None)
    samples.begin_to_count()
    method.spent += [2, 2]
    for _ in range(3):
        samples.take(lambda: next(seconds), torch.tensor([1.0, 0.0], dtype=torch.float64))
    found = samples.row("P0", "steady", 2.0)
    assert (found.cost, found.mean, found.work) == (1.0, 2.0, "2 products")
    assert found.error == pytest.approx(1.0)
    assert found.cosine == pytest.approx(0.5**0.5)


def test_a_loop_leaves_the_hyperparameters(case):
    problem = case.make()
    before = problem.hparams["decay"].detach().clone()
    with _kept(problem):
        problem.hparams["decay"].data += 1.0
        problem.params["weight"].data += 1.0
    assert torch.equal(problem.hparams["decay"], before)
    assert torch.equal(problem.params["weight"], case.make().params["weight"])


# ------------------------------------------------------------------------------------------------------------- page


def row(library, cost=10.0, error=0.1, megabytes=1.0, **others):
    given = {"problem": "P1 x", "kind": "implicit", "family": "cg", "name": f"`{library}_cg`", "work": "5 products"}
    return Row(library=library, cost=cost, error=error, megabytes=megabytes, **{**given, **others})


def test_where_another_is_ahead():
    rows = [
        row(ours.OURS, cost=10.0, error=0.1, megabytes=1.0),
        row("quick", cost=5.0, error=0.2, megabytes=2.0),
        row("near", cost=9.9, error=0.0999, megabytes=0.99),
        row("small", cost=20.0, error=0.05, megabytes=0.5),
        row("elsewhere", cost=1.0, work="10 products"),
    ]
    lines = "\n".join(peers_page.ahead(rows))
    cheaper, exact, memory = (
        lines.split("**Cheaper**")[1].split("**More exact**")[0],
        *lines.split("**More exact**")[1].split("**Less memory**"),
    )
    assert "quick `quick_cg` (P1, 5 products: 5.0 g against 10.0 g)" in cheaper
    assert "small" not in cheaper
    assert "small `small_cg` (P1, 5 products: 5 % against 10 %)" in exact
    assert "quick" not in exact
    assert "small `small_cg` (P1, 5 products: 0.50 MB against 1.00 MB)" in memory
    assert "near" not in lines
    assert "elsewhere" not in lines
    assert "Of 3 such pairs, ours is cheaper in 1, more exact in 1, and takes less memory in 1." in lines


def test_nobody_is_ahead():
    lines = peers_page.ahead([row(ours.OURS), row("other", cost=11.0, error=0.2, megabytes=2.0)])
    assert sum("none." in line for line in lines) == 3


def test_rounding_is_not_exactness():
    lines = peers_page.ahead([row(ours.OURS, error=9e-6), row("other", error=1e-7)])
    assert "- **More exact** than ours: none." in lines


def test_least_cost_at_one_percent():
    rows = [row(ours.OURS, cost=3.0, error=0.02), row(ours.OURS, cost=9.0, error=0.01), row("other", cost=1.0)]
    line = peers_page.cheapest(rows, ["P1 x"])[0]
    assert line == f"- P1, at one point: ours 9.0 g (`{ours.OURS}_cg`, 5 products, 1 %); others none."


def test_page_is_complete():
    rows = [row(ours.OURS), row("boat", name="`CG`")]
    checked = {("boat", "`CG`"): 1e-15, ("betty", "`cg`"): 0.14, ("betty", "`new`"): 0.5}
    dampings = {"P1 x": 0.0, "P2 y": 0.2}
    text = peers_page.page(rows, checked, {"gone": "ModuleNotFoundError: no"}, dampings, torch.device("cpu"), 40, 9.0)
    assert "is met; δ = 0.2 on P2, zero elsewhere" in text
    assert "gone could not be imported (ModuleNotFoundError: no)" in text
    assert "1 of 3 methods agree to 1e-15" in text
    assert "betty `cg` is off by 14 %" in text
    assert "betty `new` is off by 50 % there, after as many iterations as weights: it disagrees" in text
    assert "| **ours** | `hyperopt_implicit_cg` | 5 products | 10.0 g | 10 % | 0.0000 | 1.00 MB |" in text
