"""The full runs measure what their page says: values, gradient calls, and where a run crosses a level."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hyperopt_implicit as hi

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import runs
import runs_page
import runs_problems
from runs import Choice, Point, Results, Trace
from runs_problems import ValueFunction, build

DIGITS, BATCHES, MNIST, _ = runs_problems.TASKS


def small(task, samples=40, held_out=30):
    """The same loss on fewer digits, of twelve pixels each."""
    whole = runs_problems.digits_split(0)
    split = runs_problems.Split(
        *[
            (x[:n, 20:32], y[:n])
            for (x, y), n in ((whole.training, samples), (whole.validation, held_out), (whole.test, 50))
        ]
    )
    return replace(task, split=lambda seed: split, batch=None)


@pytest.mark.parametrize("task", [DIGITS, MNIST], ids=["decays", "cleaning"])
def test_the_value_function_is_f_at_the_minimum_of_l(task):
    task = small(task)
    function = ValueFunction(task, 0)
    found = function(function.initial)
    problem = build(task, 0, dtype=torch.float64, whole=True)
    training, fixed = problem.training_data[0], {name: p.detach() for name, p in problem.hparams.items()}
    sizes = {name: (p.shape, p.numel()) for name, p in problem.params.items()}

    def loss(flat):
        parts = flat.split([numel for _, numel in sizes.values()])
        params = {name: part.reshape(shape) for part, (name, (shape, _)) in zip(parts, sizes.items(), strict=True)}
        return problem.functional_training_loss(params, fixed, training)

    w = torch.cat([p.detach().flatten() for p in problem.params.values()])
    for _ in range(12):  # Newton's method; the biases share a direction in which L is flat
        gradient = torch.autograd.functional.jacobian(loss, w)
        w = w - torch.linalg.lstsq(torch.autograd.functional.hessian(loss, w), gradient, driver="gelsd").solution
    assert gradient.norm() < 1e-12
    torch.nn.utils.vector_to_parameters(w, problem.params.values())
    assert found.value == pytest.approx(float(problem.validation_loss(problem.validation_data[0])), abs=1e-6)
    assert found.slope < 1e-5


def test_polishing_ends_lower_and_at_a_value_that_is_taken():
    function = ValueFunction(small(DIGITS), 0)
    start = function(function.initial).value
    assert function.polished(function.initial, 5).value < start


def test_values_do_not_depend_on_the_order_in_which_they_are_taken():
    function = ValueFunction(small(DIGITS), 0)
    far = {name: p + 1.0 for name, p in function.initial.items()}
    first, second = function(function.initial), function(far)
    again = ValueFunction(small(DIGITS), 0)
    assert again(far).value == pytest.approx(second.value, abs=1e-6)
    assert again(function.initial).value == pytest.approx(first.value, abs=1e-6)


def test_half_of_the_training_labels_are_wrong_and_no_other():
    torch.manual_seed(0)
    x, y = torch.arange(500.0)[:, None], torch.arange(500) % 10
    split = runs_problems._divided(x, y, (200, 100), 0.5, seed=3)
    shift = 499.0 - max(float(part[0].max()) for part in (split.training, split.validation, split.test))
    for (features, labels), wrong in ((split.training, 100), (split.validation, 0), (split.test, 0)):
        original = (features[:, 0] + shift).round().long() % 10  # the feature is the sample's number, less a mean
        assert int((original != labels).sum()) == wrong


BACKENDS = [  # gradient of F, graph of L, and what each method adds
    ({"name": "soba", "step_size": 0.1}, lambda found: 2 + found.hvps),
    ({"name": "cg", "max_iterations": 3}, lambda found: 3 + found.hvps),
    ({"name": "neumann", "terms": 4, "step_size": 0.1}, lambda found: 3 + found.hvps),
    ({"name": "f2sa", "steps": 4}, lambda found: 1 + 2 * (found.iterations + 1)),
]


@pytest.mark.parametrize(("spec", "expected"), BACKENDS, ids=[spec["name"] for spec, _ in BACKENDS])
def test_calls_are_those_that_a_hypergradient_makes(spec, expected):
    problem = build(small(DIGITS), 0)
    outer = hi.HyperOptimizer(problem, torch.optim.Adam, backend=spec, lr=0.1)
    batch, held_out = problem.training_data[0], problem.validation_data[0]
    outer.check(batch, held_out)
    calls = runs.Calls()
    with calls.counting():
        problem.training_loss(batch).backward(inputs=list(problem.params.values()))
    assert calls.count == 1
    with calls.counting():
        found = outer.compute([batch], held_out)
    assert calls.count == 1 + expected(found)


def test_counting_ends_with_its_context():
    before = torch.autograd.grad, torch.Tensor.backward
    with pytest.raises(ZeroDivisionError), runs.Calls().counting():
        raise ZeroDivisionError
    assert (torch.autograd.grad, torch.Tensor.backward) == before


def test_a_run_ends_with_its_budget_and_looks_on_the_way():
    method = next(m for m in runs.METHODS if m.name == "soba")
    _, recorder = runs.optimize(small(DIGITS), method, Choice(0.1, 1.0, 1), 0, budget=0.2)
    seconds = [each[0] for each in recorder.found]
    calls = [each[1] for each in recorder.found]
    assert seconds == sorted(seconds) and calls == sorted(calls)
    assert 2 <= len(seconds) <= runs.CHECKPOINTS
    assert seconds[-1] >= 0.2
    assert not torch.equal(recorder.found[0][2]["decay"], recorder.found[-1][2]["decay"])


def test_the_recorder_leaves_its_own_time_out(monkeypatch):
    ticks = iter([0.0, 1.0, 5.0, 6.0, 9.0])  # start, look (1 s spent, 4 s of its own), look
    monkeypatch.setattr(time, "thread_time", lambda: next(ticks))
    recorder = runs.Recorder(runs.Calls(), budget=2.0)
    problem = SimpleNamespace(hparams={"x": torch.zeros(1)})
    assert not recorder(None, problem)
    assert recorder(None, problem)
    assert [each[0] for each in recorder.found] == [1.0, 2.0]


def trace(values, method="auto", task="decays", seed=0):
    points = [Point(float(i), 10 * i, value, 0.1) for i, value in enumerate(values)]
    return Trace(task, method, seed, Choice(0.1, 1.0, 1), 5, points, 1e-8, {"decay": [0.0]})


def results(*traces, best=0.0):
    return Results(list(traces), {"decays": {t.seed: best for t in traces}}, [], 1.0, [Choice(0.1, 1.0, 1)], 2, 1.0)


def test_a_crossing_lies_between_two_looks_by_the_logarithm():
    seconds = runs_page.AXES["seconds"]
    found = results(trace([2.0, 0.2, 0.002], seed=0))
    assert runs_page.reached(found, found.traces, 0.1, seconds) == pytest.approx(1.0)
    assert runs_page.reached(found, found.traces, 0.01, seconds) == pytest.approx(1.5)
    assert runs_page.reached(found, found.traces, 0.01, runs_page.AXES["gradient calls"]) == pytest.approx(15.0)


def test_a_level_that_most_seeds_do_not_reach_is_not_reached():
    found = results(trace([1.0, 0.05], seed=0), trace([1.0, 0.5], seed=1), trace([1.0, float("nan")], seed=2))
    assert runs_page.reached(found, found.traces, 0.1, runs_page.AXES["seconds"]) == float("inf")


def test_the_verdict_says_where_a_watched_method_is_behind():
    found = results(
        *[trace([1.0, 0.05, 0.01], "soba", seed=s) for s in (0, 1)],
        *[trace([1.0, 0.3, 0.04], "auto", seed=s) for s in (0, 1)],
        *[trace([1.0, 1.2, 1.5], "bome", seed=s) for s in (0, 1)],
    )
    (text,) = runs_page.verdict(found, DIGITS)
    assert "`soba` comes nearest to the best value known (0.0100 above it)" in text
    assert "`auto` is not the best here: 0.0400 above the best value known at the end, against 0.0100" in text
    assert "No better than the initial λ at the end: `bome`." in text
    rows = runs_page.table(found, DIGITS)
    assert [row.split("`")[1] for row in rows[2:-1]] == ["soba", "auto", "bome"]


def test_results_survive_a_file(tmp_path):
    found = results(trace([2.0, 0.2]))
    found.save(tmp_path / "runs.json")
    assert Results.load(tmp_path / "runs.json") == found
