"""``auto`` where the Hessian is not positive definite: it is damped, that is said, and looked at again."""

from __future__ import annotations

import warnings

import pytest
import torch

from hyperopt_implicit.backend import Status
from hyperopt_implicit.errors import HyperoptWarning
from hyperopt_implicit.testing.assertions import relative_error
from hyperopt_implicit_backends import Auto

from .auto_runs import (
    DEFINITE,
    IDENTITY,
    INDEFINITE,
    SIZE,
    Moving,
)
from .matrices import spread, with_spectrum

DAMPED = (
    "auto met an indefinite Hessian (eigenvalues from -0.4 to 5), damped by 0.6. The hypergradient is that of the "
    "damped system: its direction can be trusted more than its size. Train longer before the first outer step, put a "
    "weight decay into the training loss, or choose the damping yourself with damping=."
)


def test_an_indefinite_hessian_is_damped_and_that_is_said():
    run = Moving(INDEFINITE, Auto())
    with pytest.warns(HyperoptWarning) as caught:
        first = run.step()
    assert [str(w.message) for w in caught] == [DAMPED]
    assert "an indefinite Hessian (eigenvalues from -0.4 to 5), damped by 0.6;" in first.note
    damped = torch.linalg.solve(INDEFINITE + 0.6 * IDENTITY, run.problem.model.weight.detach() - 1.0)
    assert relative_error(first.gradients, {"shift": damped}) < 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {r.hvps for r in run.steps(8)} == {1}
    assert first.status is Status.TRUNCATED, "never converged: it is another system"


def test_a_damped_system_that_is_solved_to_rounding_is_not_called_converged():
    run = Moving(INDEFINITE, Auto(tolerance=1e-13))
    with pytest.warns(HyperoptWarning):
        results = run.steps(6)
    assert {r.status for r in results} == {Status.TRUNCATED}
    assert Moving(DEFINITE, Auto(tolerance=1e-13)).step().status is Status.CONVERGED


def test_the_error_of_a_damped_system_is_measured_on_that_system():
    run = Moving(INDEFINITE, Auto(), turn=0.001)
    with pytest.warns(HyperoptWarning):
        result = run.steps(10)[-1]
    v = run.problem.model.weight.detach() - 1.0
    damped = torch.linalg.solve(INDEFINITE + run.state["plan"]["damping"] * IDENTITY, v)
    error = relative_error(result.gradients, {"shift": damped})
    assert run.state["plan"]["error"] == pytest.approx(error, rel=0.3)


def test_a_singular_hessian_is_damped():
    run = Moving(with_spectrum([0.0, *spread(0.5, 5.0, SIZE - 1)]), Auto())
    with pytest.warns(HyperoptWarning, match=r"^auto met an? (singular|indefinite) Hessian .* damped by 0\.5\. "):
        first = run.step()
    assert first.state["plan"]["damping"] == pytest.approx(0.5, rel=1e-3)
    assert not first.status.failed


def test_damping_that_was_asked_for_is_kept():
    """It is part of A: enough of it needs no more, and what is missing comes on top."""
    run = Moving(INDEFINITE, Auto(damping=0.7))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = run.step()
    assert first.state["plan"]["damping"] == 0.7
    v = run.problem.model.weight.detach() - 1.0
    assert relative_error(first.gradients, {"shift": torch.linalg.solve(INDEFINITE + 0.7 * IDENTITY, v)}) < 1e-3
    with pytest.warns(HyperoptWarning, match="damped by"):
        result = Moving(INDEFINITE, Auto(damping=0.1)).step()
    assert result.state["plan"]["damping"] == pytest.approx(0.1 + max(1.5 * 0.3, 0.1 * 5.1), rel=1e-3)


def test_curvature_that_becomes_negative_on_the_way():
    """One call says so, the next one looks at the problem anew and damps it, and from there on it is well."""
    run = Moving(DEFINITE, Auto(), turn=0.005)
    assert not any(r.status.failed for r in run.steps(15))
    run.matrix.copy_(INDEFINITE)
    with pytest.warns(HyperoptWarning, match="auto met an indefinite Hessian") as caught:
        results = run.steps(30)
    failed = [t for t, r in enumerate(results) if r.status.failed]
    assert failed and results[failed[0]].status is Status.NEGATIVE_CURVATURE
    assert "plan" not in results[failed[0]].state
    assert len(failed) == len(caught) == 1
    assert "an indefinite Hessian" in results[failed[0] + 1].note
    v = run.problem.model.weight.detach() - 1.0
    damped = torch.linalg.solve(INDEFINITE + 0.6 * IDENTITY, v)
    assert relative_error(results[-1].gradients, {"shift": damped}) < 0.03


def test_damping_is_given_up_when_it_is_no_longer_needed():
    """After 50 calls; where it is still needed, that is not warned of again, and looked at less and less often."""
    run = Moving(INDEFINITE, Auto())
    with pytest.warns(HyperoptWarning) as caught:
        results = run.steps(252)
    assert len(caught) == 1
    looked = [t for t, r in enumerate(results) if r.hvps > 20]
    assert looked == [0, 50, 250]
    assert results[-1].state["plan"]["again"] == 800
    run = Moving(INDEFINITE, Auto())
    with pytest.warns(HyperoptWarning):
        run.steps(20)
    run.matrix.copy_(DEFINITE)
    results = run.steps(40)
    assert "damped" in results[29].note and "damped" not in results[31].note
    assert results[31].state["plan"]["damping"] == 0.0 and run.error < 0.01
