"""Products in bfloat16: refinement to the system in full precision, what it leaves alone, and what it refuses.

The arithmetic of refinement is proven in float64, on matrices with a known error in the place of rounding; that the
products are in bfloat16, and what follows from it, on processors that have it.
"""

from __future__ import annotations

import warnings
from types import MappingProxyType

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints

import hyperopt_implicit as hi
from hyperopt_implicit import low_precision
from hyperopt_implicit.backend import Status
from hyperopt_implicit.carried import fitting
from hyperopt_implicit.gauss_newton import GaussNewton
from hyperopt_implicit.implicit import ImplicitBackend, Solution
from hyperopt_implicit.low_precision import LowPrecision, Refinement, bfloat16_speedup, has_bfloat16, refined
from hyperopt_implicit.operators import Hessian, LossHessian
from hyperopt_implicit.randomness import random_states
from hyperopt_implicit.testing.assertions import assert_close, assert_unchanged, saved_and_loaded
from hyperopt_implicit.testing.oracles import DenseOperator
from hyperopt_implicit.testing.specimens import ridge_problem
from hyperopt_implicit.vectors import Params, add, norm

from . import kinds_of_layers
from .cases import CASES
from .matrices import flat, right_hand_side, solve, spread, with_spectrum

on_bfloat16 = pytest.mark.skipif(not has_bfloat16(torch.device("cpu")), reason="this processor has no bfloat16")
PROCESSOR = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if bfloat16 were twice as fast: on models of this size it is not."""
    monkeypatch.setattr(low_precision, "product_seconds", lambda problem, batch, kind: (2e-3, 1e-3))


# ------------------------------------------------------------------------------------- refinement, with known errors

A = with_spectrum(spread(1.0, 4.0, 12))
ERROR = 0.01 * with_spectrum([(-1.0) ** i for i in range(12)], seed=3)  # symmetric, of norm 0.01
V = right_hand_side(12)


class Dense(LossHessian):
    """A matrix as curvature, with a multiple of the identity for a mixed derivative."""

    def __init__(self, matrix: Tensor, scale: float = 1.0) -> None:
        self._operator, self.loss, self.gradient, self._scale = DenseOperator(matrix), 0.0, {}, scale

    def __matmul__(self, vector: Params) -> Params:
        self.products += 1
        return self._operator @ vector

    def multiply_and_mix(self, vector: Params) -> Params:
        return self @ vector

    def mixed(self, vector: Params) -> Params:
        return {name: self._scale * x for name, x in vector.items()}


class Pair:
    """Two matrices as the two precisions of one curvature, and a solver for them."""

    def __init__(self, spec: object, error: Tensor = ERROR, damping: float = 0.0, matrix: Tensor = A) -> None:
        self.matrix, self.damping = matrix, damping
        self.low, self.full = Dense(matrix + error, 1.01), Dense(matrix)
        self.hessian = LowPrecision(ridge_problem(), lambda dtype: self.full if dtype is None else self.low)
        self.backend = hi.get_backend(spec)  # type: ignore[arg-type]

    def solve(self, refinements: int, state: dict | None = None, tolerance: float = 0.0) -> Solution:
        assert isinstance(self.backend, ImplicitBackend)
        how = Refinement(self.damping, refinements, tolerance, 2.0)
        operator = hi.get_backend("cg", damping=self.damping).damped(self.hessian)
        return refined(self.backend.solve, self.hessian, how)(operator, V, state or {})

    def error(self, solution: Solution) -> float:
        truth = torch.linalg.solve(self.matrix + self.damping * torch.eye(len(self.matrix)).double(), flat(V))
        return float((flat(solution.value) - truth).norm() / truth.norm())

    def residual(self, solution: Solution) -> float:
        return float(
            ((self.matrix @ flat(solution.value)) + self.damping * flat(solution.value) - flat(V)).norm()
            / flat(V).norm()
        )


EXACT = {"name": "exact"}
CG = {"name": "cg", "tolerance": 1e-10, "max_iterations": 100}
COLD = {"name": "neumann", "tolerance": 1e-10, "terms": 500}


@pytest.mark.parametrize("damping", [0.0, 0.7])
@pytest.mark.parametrize("spec", [EXACT, CG, COLD], ids=lambda spec: spec["name"])
def test_each_refinement_shrinks_the_error_as_theory_says(spec, damping):
    """By ‖(A + E)⁻¹E‖ each, with the residual of A, not of A + E."""
    pair_of = lambda: Pair(spec, damping=damping)  # noqa: E731
    rate = float(torch.linalg.matrix_norm(torch.linalg.solve(A + ERROR + damping * torch.eye(12).double(), ERROR), 2))
    errors = []
    for refinements in (1, 2, 3):
        pair = pair_of()
        solution = pair.solve(refinements)
        errors.append(pair.error(solution))
        assert solution.residual == pytest.approx(pair.residual(solution), rel=1e-6, abs=1e-14)
    unrefined = pair_of()
    before = unrefined.error(unrefined.solve(0))
    assert 1e-4 < before < 2 * rate
    for error in errors:
        assert error <= 1.5 * rate * before + 1e-9
        before = error
    assert errors[-1] < 1e-7


def test_without_refinement_the_solver_is_left_alone():
    pair = Pair(CG)
    solution = pair.solve(0)
    alone = solve(pair.backend, A + ERROR, V)[0]
    torch.testing.assert_close(flat(solution.value), flat(alone.value), rtol=0, atol=0)
    assert solution.residual == alone.residual and pair.full.products == 0
    assert pair.hessian.products == pair.low.products
    assert_close(pair.hessian.mixed(solution.value), pair.low.mixed(solution.value), 0.0)


def test_the_mixed_derivative_of_a_refined_solution_is_in_full_precision():
    pair = Pair(CG)
    solution = pair.solve(1)
    assert_close(pair.hessian.mixed(solution.value), solution.value, 0.0)


def test_residuals_above_the_tolerance_are_not_called_converged():
    """The solver of A + E says converged; the residual of A decides."""
    kept = Pair(CG).solve(1, tolerance=1e-10)
    assert kept.status is Status.TRUNCATED and kept.residual > 1e-10
    assert Pair(CG).solve(9, tolerance=1e-9).status is Status.CONVERGED


def test_truncation_is_not_refined():
    """Where the solver itself leaves as much, another solve would not be about rounding."""
    pair = Pair({"name": "neumann", "terms": 3, "step_size": 0.05})
    solution = pair.solve(5)
    assert pair.full.products == 1 and solution.iterations == 3
    assert solution.residual == pytest.approx(pair.residual(solution))


def test_a_residual_that_was_not_measured_is_not_measured_in_float32_either():
    """The method is one term by design: a second solve would make another method of it."""
    pair = Pair({"name": "identity", "step_size": 0.1})
    solution = pair.solve(3)
    assert pair.full.products == 0 and solution.residual is None
    torch.testing.assert_close(flat(solution.value), 0.1 * flat(V), rtol=1e-15, atol=0)


def test_a_carried_solution_is_corrected_from_the_start():
    """One float32 product at the carried u and one at the end; no second solve, and no drift to the other system."""
    pair = Pair(CG)
    first = pair.solve(4)
    state = saved_and_loaded(first.state)
    again = Pair(CG)
    solution = again.solve(4, state)
    assert again.full.products == 2 and solution.iterations == 0
    assert again.error(solution) < 1e-8
    assert again.hessian.products == again.low.products + again.full.products
    assert again.low.products == 1  # the solver's own first product is the one that the correction took


def test_state_holds_the_speed_up_apart_from_what_the_solver_carries():
    pair = Pair(CG)
    state = pair.solve(1).state
    assert set(state) == {"solution", "bfloat16"} and state["bfloat16"] == {"speedup": 2.0}
    problem = ridge_problem()
    assert fitting({"bfloat16": {"speedup": 2.0}}, problem) == {"bfloat16": {"speedup": 2.0}}


def test_products_too_coarse_to_correct_with_are_reported_once():
    pair = Pair(CG, error=1.5 * torch.eye(12).double())
    text = (
        r"products in bfloat16 must be near those in float32 for the solution to be corrected; here they differ by "
        r"\d+% of ‖∂F/∂w‖, and it was not. The Hessian is badly conditioned, or random layers draw other masks in "
        r"bfloat16. Use precision='full', or more damping."
    )
    with pytest.warns(hi.HyperoptWarning, match=text):
        solution = pair.solve(2)
    assert solution.residual == pytest.approx(pair.residual(solution))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Pair(CG, error=1.5 * torch.eye(12).double()).solve(2, solution.state)


def test_a_refinement_that_makes_it_worse_is_taken_back():
    """A + E turns the sign of one eigenvalue, so that refinement diverges there; what was better is returned."""
    matrix, wrong = with_spectrum([0.02, 1.0, 2.0]), with_spectrum([-0.015, 0.0, 0.0])
    v = {"a": 1e-3 * torch.linalg.eigh(wrong).eigenvectors[:, 0] + torch.linalg.eigh(wrong).eigenvectors[:, 2]}
    hessian = LowPrecision(ridge_problem(), lambda dtype: Dense(matrix if dtype is None else matrix + wrong))
    backend = hi.get_backend("exact")
    solution = refined(backend.solve, hessian, Refinement(0.0, 5, 0.0, 2.0))(hessian, v, {})
    once = refined(backend.solve, hessian, Refinement(0.0, 0, 0.0, 2.0))(hessian, v, {})
    size = [float((matrix @ flat(each.value) - flat(v)).norm() / flat(v).norm()) for each in (solution, once)]
    assert size[0] <= size[1] and solution.residual == pytest.approx(size[0])


def test_failures_are_passed_on():
    pair = Pair(CG, matrix=-A)
    solution = pair.solve(3)
    assert solution.status is Status.NEGATIVE_CURVATURE and pair.full.products == 0


# ------------------------------------------------------------------------------------------------ products in bfloat16


def network(*layers: nn.Module) -> hi.BilevelProblem:
    """A float32 network with a decay, large enough for its rounding to average out."""
    torch.manual_seed(0)

    @hi.hyperparameter("decay", init=0.3, constraint=constraints.positive)
    def training_loss(model, batch, *, decay):
        x, y = batch
        return nn.functional.cross_entropy(model(x), y) + decay * sum(p.square().sum() for p in model.parameters())

    def validation_loss(model, batch):
        x, y = batch
        return nn.functional.cross_entropy(model(x), y)

    model = nn.Sequential(nn.Linear(30, 40), *layers, nn.Tanh(), nn.Linear(40, 5))
    return hi.BilevelProblem(
        model, training_loss, validation_loss, optimizer=lambda params: torch.optim.SGD(params, lr=0.1)
    )


def data(seed: int, rows: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 30, generator=generator), torch.randint(0, 5, (rows,), generator=generator)


def hypergradient(problem: hi.BilevelProblem, spec: object, state: dict | None = None, batches: int = 1):
    torch.manual_seed(4)
    training = [data(seed) for seed in range(batches)]
    return hi.hypergradient(problem, spec, training_batches=training, validation_batch=data(9), state=state)


def relative(x: Params, y: Params) -> float:
    return norm(add(x, y, -1.0)) / norm(y)


@on_bfloat16
def test_products_are_in_bfloat16_and_the_rest_is_not():
    problem = network()
    low, full = Hessian(problem, [data(0)], torch.bfloat16), Hessian(problem, [data(0)])
    vector = full.gradient
    assert 1e-5 < relative(low @ vector, full @ vector) < 2e-2
    assert {x.dtype for x in (low @ vector).values()} == {torch.float32}
    assert {x.dtype for x in low.mixed(vector).values()} == {torch.float32}


@on_bfloat16
def test_a_refined_hypergradient_is_the_float32_one():
    truth = hypergradient(network(), {"name": "cg", "tolerance": 1e-6, "max_iterations": 200})
    options = {"tolerance": 1e-4, "max_iterations": 200, "precision": "bfloat16"}
    plain = hypergradient(network(), {"name": "cg", "refinements": 0, **options})
    fine = hypergradient(network(), {"name": "cg", "refinements": 2, **options})
    assert relative(plain.gradients, truth.gradients) > 3 * relative(fine.gradients, truth.gradients)
    assert relative(fine.gradients, truth.gradients) < 3e-4
    assert fine.status is Status.CONVERGED and fine.residual < 1e-4
    assert fine.training_loss == pytest.approx(truth.training_loss, rel=1e-6)
    assert fine.validation_loss == truth.validation_loss == plain.validation_loss


@on_bfloat16
def test_throughout_lowers_the_validation_loss_too():
    full = hypergradient(network(), "cg")
    products = hypergradient(network(), {"name": "cg", "precision": "bfloat16"})
    throughout = hypergradient(network(), {"name": "cg", "precision": "bfloat16_throughout"})
    assert products.validation_loss == full.validation_loss != throughout.validation_loss
    assert throughout.validation_loss == pytest.approx(full.validation_loss, rel=5e-3)
    assert 0.0 < relative(throughout.gradients, full.gradients) < 3e-2


IMPLICIT = [case for case in CASES if isinstance(case.backend, ImplicitBackend) and case.name != "exact"]
"""``exact`` takes a product for each weight; it is tried on matrices above."""


@on_bfloat16
@pytest.mark.parametrize("case", IMPLICIT, ids=lambda case: case.name)
def test_every_implicit_backend_takes_it(case):
    """Alone, on several batches, and with the state of the call before; damped, so that few products are enough."""
    problem = network()
    problem.training_data, problem.validation_data = [data(0), data(1)], [data(9)]
    training, validation = problem.training_data, problem.validation_data[0]

    def calls(precision: str) -> list[hi.Hypergradient]:
        backend = hi.get_backend(case.name, precision=precision, damping=2.0)
        results = [backend.hypergradient(problem, training, validation, {})]
        results.append(backend.hypergradient(problem, training, validation, saved_and_loaded(results[0].state)))
        return results

    with assert_unchanged(problem):
        low = calls("bfloat16")
    for ours, full in zip(low, calls("full"), strict=True):
        assert not ours.status.failed and fitting(ours.state, problem) == ours.state
        assert relative(ours.gradients, full.gradients) < 2e-2, case.name


@on_bfloat16
def test_one_loop_backends_take_no_float32_product_by_themselves(monkeypatch):
    built = []
    monkeypatch.setattr(LowPrecision, "full_product", lambda self, vector: built.append(1) or self._low @ vector)
    for name in ("heavy_ball", "soba", "amigo"):
        hypergradient(network(), {"name": name, "precision": "bfloat16"})
    assert built == []
    hypergradient(network(), {"name": "heavy_ball", "precision": "bfloat16", "refinements": 1})
    hypergradient(network(), {"name": "cg", "precision": "bfloat16"})
    assert len(built) >= 2


@on_bfloat16
def test_masks_are_the_same_in_both_precisions_and_drawn_once():
    problem = network(nn.Dropout(0.5))
    torch.manual_seed(1)
    Hessian(problem, [data(0)])
    expected = random_states(PROCESSOR)
    torch.manual_seed(1)
    pair = LowPrecision(problem, lambda dtype: Hessian(problem, [data(0)], dtype))
    vector = {
        name: torch.randn(p.shape, generator=torch.Generator().manual_seed(2)) for name, p in problem.params.items()
    }
    full, low = pair.full_product(vector), pair @ vector
    assert all(torch.equal(x, y) for x, y in zip(random_states(PROCESSOR), expected, strict=True))
    other = Hessian(problem, [data(0)]) @ vector
    assert relative(low, full) < 2e-2 < relative(other, full)


@on_bfloat16
def test_batch_norm_is_left_as_it_was():
    problem = network(nn.BatchNorm1d(40))
    with assert_unchanged(problem, random_state=False):
        low = hypergradient(problem, {"name": "cg", "precision": "bfloat16", "refinements": 2, "damping": 1.0})
        full = hypergradient(problem, {"name": "cg", "damping": 1.0})
    assert relative(low.gradients, full.gradients) < 5e-3


@on_bfloat16
def test_gauss_newton():
    options = {"curvature": "gauss_newton", "tolerance": 1e-5, "max_iterations": 100}
    low = hypergradient(network(), {"name": "cg", "precision": "bfloat16", "refinements": 3, **options})
    full = hypergradient(network(), {"name": "cg", **options})
    assert relative(low.gradients, full.gradients) < 2e-4


@on_bfloat16
@pytest.mark.parametrize("kind", [name for name in kinds_of_layers.NETWORKS if "Dropout" not in name])
def test_layers_in_bfloat16(kind):
    """Each product is near that in float32: no layer in use breaks under autocast."""
    problem = kinds_of_layers.problem(kind, "cross entropy").copy(torch.float32)
    batch = (kinds_of_layers.batch(1)[0].float(), kinds_of_layers.batch(1)[1])
    full = Hessian(problem, [batch])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # torch's own, in its rms_norm
        low = low_precision.lowered(lambda dtype: Hessian(problem, [batch], dtype))
    vector = {name: torch.ones_like(p) for name, p in problem.params.items()}
    assert relative(low @ vector, full @ vector) < 0.1


@on_bfloat16
def test_a_loss_with_parts_in_float64():
    @hi.hyperparameter("decay", init=0.3, constraint=constraints.positive)
    def training_loss(model, batch, *, decay):
        x, y = batch
        return (model(x).double() - y[:, None]).square().mean().float() + decay * model.weight.square().sum()

    problem = hi.BilevelProblem(
        nn.Linear(30, 1),
        training_loss,
        lambda model, batch: (model(batch[0]) - batch[1][:, None]).square().mean(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
    )
    options = {"max_iterations": 60, "tolerance": 1e-5}
    low = hypergradient(problem, {"name": "cg", "precision": "bfloat16", "refinements": 3, **options})
    assert relative(low.gradients, hypergradient(problem, {"name": "cg", **options}).gradients) < 1e-3


# ------------------------------------------------------------------------------------------------ refusals and warnings


def test_a_device_without_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: MappingProxyType({"avx512_f": True}))
    assert bfloat16_speedup(network(), [data(0)]) == 0.0
    with pytest.raises(hi.BackendError) as caught:
        hypergradient(network(), {"name": "cg", "precision": "bfloat16"})
    with pytest.raises(hi.BackendError) as unchecked:
        hi.get_backend("cg", precision="bfloat16").hypergradient(network(), [data(0)], data(9), {})
    assert str(unchecked.value) == str(caught.value)
    assert str(caught.value) == (
        "precision='bfloat16' needs a device that multiplies in bfloat16; this processor (cpu) has no units for it, "
        "and would convert back and forth at every operation. Leave the option out."
    )


@pytest.mark.parametrize("units", ["avx512_bf16", "amx_bf16", "bf16", "sve_bf16"])
def test_units_go_by_many_names(monkeypatch, units):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: MappingProxyType({units: True}))
    assert has_bfloat16(PROCESSOR)


def test_a_model_in_float64_warns_and_is_never_lowered():
    problem = ridge_problem()
    assert bfloat16_speedup(problem, [None]) == 0.0
    backend = hi.get_backend("cg", precision="bfloat16")
    with pytest.warns(hi.HyperoptWarning) as caught:
        backend.check(problem)
    assert str(caught[0].message) == (
        "precision='bfloat16' lowers products of a float32 model by autocast, which leaves other types as they are; "
        "the trained parameters are in torch.float64, and products stay in it. Leave the option out, or "
        "train in float32."
    )
    batch = (torch.randn(20, 4).double(), torch.randn(20).double())
    assert type(backend.linearise(problem, [batch])) is Hessian


@on_bfloat16
def test_a_device_that_is_slower_with_it_warns_once(monkeypatch):
    measured = []

    def slower(problem, batch, kind):
        measured.append(batch)
        return 1e-3, 1.5e-3

    monkeypatch.setattr(low_precision, "product_seconds", slower)
    problem = network()
    with pytest.warns(hi.HyperoptWarning) as caught:  # noqa: PT031  (both calls, one warning)
        first = hypergradient(problem, {"name": "cg", "precision": "bfloat16"})
        hypergradient(problem, {"name": "cg", "precision": "bfloat16"})
    assert [str(each.message) for each in caught] == [
        "precision='bfloat16' is slower on this problem: a Hessian-vector product takes 1.50 times as long as in "
        "torch.float32 (measured on the first training batch). Leave the option out; it pays where most of the work is "
        "in large matrix products."
    ]
    assert first.state["bfloat16"]["speedup"] == pytest.approx(1 / 1.5)
    hypergradient(network(), {"name": "cg", "precision": "bfloat16"}, saved_and_loaded(first.state))
    assert len(measured) == 1


@on_bfloat16
def test_measuring_changes_nothing(monkeypatch):
    monkeypatch.undo()
    problem = network(nn.Dropout(0.5), nn.BatchNorm1d(40))
    with assert_unchanged(problem):
        speedup = bfloat16_speedup(problem, [data(0)])
    assert speedup > 0.0 and bfloat16_speedup(problem, []) == speedup  # known by now


@on_bfloat16
def test_a_loss_that_does_not_run_under_autocast():
    @hi.hyperparameter("decay", init=0.3, constraint=constraints.positive)
    def training_loss(model, batch, *, decay):
        x, _ = batch
        outputs = torch.zeros(len(x), 1)
        outputs[torch.arange(len(x))] = model(x)
        return outputs.square().mean() + decay * model.weight.square().sum()

    problem = hi.BilevelProblem(
        nn.Linear(30, 1),
        training_loss,
        lambda m, b: m(b[0]).square().mean(),
        optimizer=lambda p: torch.optim.SGD(p, 0.1),
    )
    text = (
        r"precision='bfloat16' runs the training loss under torch.autocast, and the loss must allow for results in "
        r"bfloat16; this one does not \(torch says: Index put requires .*\). Convert with .float\(\) or "
        r".to\(other.dtype\) where that happens, or leave the option out."
    )
    with pytest.raises(hi.BackendError, match=text):
        hypergradient(problem, {"name": "cg", "precision": "bfloat16"})


@on_bfloat16
def test_an_error_of_the_loss_itself_is_not_laid_on_bfloat16():
    @hi.hyperparameter("decay", init=0.3, constraint=constraints.positive)
    def training_loss(model, batch, *, decay):
        x, _ = batch
        return (model(x).float() @ torch.ones(1, 1).double()).mean() + decay * model.weight.square().sum()

    problem = hi.BilevelProblem(
        nn.Linear(30, 1),
        training_loss,
        lambda m, b: m(b[0]).square().mean(),
        optimizer=lambda p: torch.optim.SGD(p, 0.1),
    )
    with torch.autocast("cpu", enabled=False), pytest.raises(RuntimeError, match="dtype") as expected:
        training_loss(problem.model, data(0), decay=1.0)
    with pytest.raises(RuntimeError) as caught:
        hi.get_backend("cg", precision="bfloat16").hypergradient(problem, [data(0)], data(9), {})
    assert str(caught.value) == str(expected.value)


@on_bfloat16
def test_each_kind_of_curvature_is_measured(monkeypatch):
    measured = []
    monkeypatch.setattr(
        low_precision, "product_seconds", lambda problem, batch, kind: measured.append(kind) or (2e-3, 1e-3)
    )
    problem = network()
    for curvature in ("hessian", "gauss_newton", "hessian"):
        hypergradient(problem, {"name": "cg", "precision": "bfloat16", "curvature": curvature})
    assert measured == [Hessian, GaussNewton]


# ---------------------------------------------------------------------------------------------------------- what it is


def test_options_that_are_not_at_their_default_are_shown():
    plain, chosen = hi.get_backend("heavy_ball"), hi.get_backend("heavy_ball", precision="bfloat16", compile=True)
    assert "precision" not in repr(plain) and "compile" not in repr(plain) and "refinements" not in repr(plain)
    assert repr(chosen) == repr(plain).replace(
        "curvature='hessian', ", "curvature='hessian', precision='bfloat16', compile=True, "
    )
