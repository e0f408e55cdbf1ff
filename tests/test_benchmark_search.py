"""The competition of searches is fair: equal time, no test data before its end, sentences that follow from numbers."""

from __future__ import annotations

import collections
import itertools
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hyperopt_implicit as hi

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import search
import search_methods
import search_page
import search_problems
from search import Job, Part, Point, Results, Run
from search_methods import METHODS, Deadline, Log, prepare
from search_problems import TASKS, Trial

CANCER, DIGITS, MNIST, AUXILIARY = TASKS
SHORT = Trial(outer_steps=3, inner_steps=2, outer_lr=0.3, steps=6, look=2)


def no_test_data(task):
    """The same task with nothing where its test data was."""
    return replace(task, parts=lambda seed: (*task.parts(seed)[:2], None), trial=SHORT)


# ------------------------------------------------------------------------------------------------------------ problems


@pytest.mark.parametrize("size", [1, 2, 5, 10, 30])
def test_tied_decays_have_as_many_dimensions_as_they_claim(size):
    training, _, _ = CANCER.parts(0)
    model, loss = CANCER.model(0), CANCER.loss(size)
    torch.nn.init.ones_(model.weight)
    weights = torch.full((size,), 0.1, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(model, training, weights=weights), weights)
    # d/dλ_g of Σ_j λ_g(j) ‖w_j‖² counts the features of a group; each w_j is (1, 1)
    assert gradient.shape == (size,) and gradient.min() > 0
    assert gradient.sum() == pytest.approx(2 * 30)
    assert len(search_methods.distributions(CANCER, size)) == size + 1
    assert CANCER.problem(0, weights.detach(), 0.1).hyperparameters.values()["weights"].shape == (size,)


@pytest.mark.parametrize("task", TASKS, ids=[task.name for task in TASKS])
def test_the_default_configuration_is_inside_the_ranges_and_trains(task, monkeypatch):
    some = torch.rand(5000, 784, generator=torch.Generator().manual_seed(0)), torch.arange(5000) % 10
    monkeypatch.setattr(search_problems, "pictures", lambda: some)  # the real ones take seconds to read
    if task is MNIST:
        task = replace(task, parts=search_problems.mnist.__wrapped__)
    size = task.sizes[-1]
    searched = search_methods.distributions(task, size)
    default = search_methods.default(task, size)
    assert searched.keys() == default.keys()
    assert all(searched[name]._contains(value) for name, value in default.items())
    inside = task.weights.inside()
    assert task.weights.low < inside.low < task.weights.default < inside.high < task.weights.high
    drawn = inside.draw(1000, torch.Generator().manual_seed(0))
    assert inside.low <= drawn.min() and drawn.max() <= inside.high
    (_, loss, _), *_ = search_methods.looks(
        replace(task, trial=SHORT), 0, torch.full((size,), task.weights.default), task.inner_lr.default
    )
    assert math.isfinite(loss)


def test_parts_have_no_sample_in_common_and_the_same_share_of_every_class():
    x, y = torch.arange(200.0)[:, None], torch.arange(200) % 4
    parts = search_problems.divided(x, y, (40, 100), 0, scaled=False)
    numbers = torch.cat([features[:, 0] for features, _ in parts])
    assert sorted((numbers - numbers.min()).round().tolist()) == list(range(200))
    assert [labels.bincount().tolist() for _, labels in parts] == [[10] * 4, [25] * 4, [15] * 4]
    assert not torch.equal(parts[1][0], search_problems.divided(x, y, (40, 100), 1, scaled=False)[1][0])


def test_annotators_are_wrong_at_their_own_rates_and_nobody_else_is(monkeypatch):
    numbers = torch.arange(5000.0)
    monkeypatch.setattr(search_problems, "pictures", lambda: (numbers[:, None], torch.arange(5000) % 10))
    (inputs, labels, annotator), *held_out = search_problems.mnist.__wrapped__(0)
    shift = min(float(part[0].min()) for part in ((inputs,), *held_out))
    wrong = ((inputs[:, 0] - shift).round().long() % 10 != labels).float()
    rates = torch.stack([wrong[annotator == a].mean() for a in range(40)]).sort().values
    # 0, 0.023, … 0.9 over 25 images each: a standard deviation of at most 0.1 for one, of 0.014 for the mean
    assert wrong.mean() == pytest.approx(0.45, abs=0.06)
    assert (rates - torch.linspace(0, 0.9, 40)).abs().max() < 0.3
    for x, y in held_out:
        assert torch.equal((x[:, 0] - shift).round().long() % 10, y)


# ------------------------------------------------------------------------------------------------------------- methods


@pytest.fixture
def clock_of_looks(monkeypatch):
    """A clock that advances by 10 ms whenever it is looked at: no machine is too slow for it."""
    looked = collections.defaultdict(itertools.count)
    monkeypatch.setattr(Deadline, "now", lambda self: 0.01 * next(looked[self]))


@pytest.mark.parametrize("method", METHODS)
def test_methods_are_given_no_test_data_and_keep_to_their_time(method, tmp_path, clock_of_looks):
    task = no_test_data(CANCER)
    log = search.compete(prepare(task, 2, method, 0, 0, tmp_path), method, 0.6)
    assert log.found and sum(log.trials.values()) > 0
    assert all(each.seconds <= 0.6 for each in log.found)
    if method != "ours":  # in which no trial is begun after the same seconds on the wall
        assert 0.6 < log.last_look < 0.7
    validations = [each.validation for each in log.found]
    assert validations == sorted(validations, reverse=True)
    # the value is that of the model which is judged
    model = task.model(0)
    model.load_state_dict(log.found[-1].state)
    with torch.no_grad():
        assert float(search_problems.validation_loss(model, task.parts(0)[1])) == pytest.approx(validations[-1])
    with pytest.raises(TypeError):  # only now is the test data asked for, which is not there
        search.judged(task, 0, log.found)


def test_our_search_begins_no_trial_after_its_time(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(hi, "search", lambda *_, **options: given.update(options))
    search.compete(prepare(CANCER, 2, "ours", 0, 0, tmp_path), "ours", 5.0)
    assert 4.0 < given["timeout"] < 5.0
    assert not given["tracking"] and given["n_trials"] > 10**6


def test_a_study_begins_with_the_default_configuration(tmp_path):
    import optuna

    for worker in (0, 1):
        setting = prepare(CANCER, 5, "tpe", 0, worker, tmp_path)
    study = optuna.load_study(study_name=search_methods.STUDY, storage=setting.storage)
    assert len(study.trials) == 1  # and not once a worker
    trial = study.ask(search_methods.distributions(CANCER, 5))
    assert trial.params == search_methods.default(CANCER, 5)


def test_what_ends_after_the_deadline_does_not_count(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    log = Log(Deadline(1.0))
    clock[0] = 0.9
    assert log.ended("complete")
    log.add(0.5, {})
    log.add(0.6, {})  # no better
    clock[0] = 1.1
    assert not log.ended("complete")
    log.add(0.1, {})
    assert log.over
    assert [each.validation for each in log.found] == [0.5]
    assert log.trials == {"complete": 1}


def test_a_model_trained_anew_is_the_end_of_plain_training():
    task = replace(CANCER, trial=SHORT)
    weights = torch.full((2,), 0.1)
    *_, (step, loss, _) = search_methods.looks(task, 0, weights, 0.1)
    found, _ = search_methods.retrained(task, 0, 0.1, [weights, torch.full((2,), math.nan)])
    assert (step, found) == (6, pytest.approx(loss))
    # and that is what optimize trains with hyperparameters at rest
    problem = task.problem(0, weights, 0.1)
    seen = []
    hi.optimize(
        problem, outer_steps=1, inner_steps=6, progress=False, tracking=False,
        callbacks=[lambda record, _: seen.append(record.validation_loss)],
    )  # fmt: skip
    assert seen[0] == pytest.approx(loss, rel=1e-4)


# ------------------------------------------------------------------------------------------------------------ the runs


def test_the_best_so_far_of_two_workers_is_in_order_of_time():
    first = Part([Point(1.0, 0.5, 0.6, 0.1), Point(3.0, 0.3, 0.9, 0.2)], {}, 1.0, 4.0)
    second = Part([Point(2.0, 0.4, 0.5, 0.1), Point(3.5, 0.35, 0.1, 0.0)], {}, 1.0, 4.0)
    found = search.best_so_far([first, second])
    # the last point of the second worker has the lower test loss; it is not chosen for that
    assert [(each.seconds, each.test) for each in found] == [(1.0, 0.6), (2.0, 0.5), (3.0, 0.9)]


def test_all_methods_are_given_the_same_seconds_and_seeds():
    jobs = search.jobs_of(TASKS, 3, 0.5, sizes=True)
    for task in TASKS:
        mine = [job for job in jobs if job.task == task.name]
        assert {job.seconds for job in mine} == {task.seconds * 0.5}
        for size in task.sizes:
            methods = METHODS if size == task.sizes[-1] else search.ALONG_SIZES
            assert {(j.method, j.seed) for j in mine if j.size == size} == {(m, s) for m in methods for s in range(3)}
    assert len(jobs) == len(set(jobs))
    assert search.plan(jobs)[-1].startswith(f"{len(jobs)} runs, {sum(job.seconds for job in jobs) / 60:.1f} minutes")


def test_workers_share_a_study(tmp_path, monkeypatch, clock_of_looks):
    import optuna

    job = Job("cancer", 2, "tpe", 0, 1.0)
    monkeypatch.setattr(search, "_warm", {(job.task, job.method)})
    monkeypatch.setattr(search, "_together", SimpleNamespace(wait=lambda seconds: None))
    parts = [search.work(job, worker, str(tmp_path)) for worker in (0, 1)]
    assert all(part.points and 0 <= part.points[-1].error <= 1 for part in parts)
    study = optuna.load_study(
        study_name=search_methods.STUDY, storage=prepare(CANCER, 2, "tpe", 0, 0, tmp_path).storage
    )
    counted = sum(sum(part.trials.values()) for part in parts)
    assert 0 < counted <= len(study.trials) <= counted + 2  # each may have left one at the deadline


@pytest.mark.slow
def test_a_run_is_made_by_two_processes():
    (run,) = search.measure([Job("cancer", 2, "tpe", 0, 2.0)]).runs
    assert run.points and run.points[-1].seconds <= 2.0
    assert 0 < run.share <= 1.1


def test_results_survive_a_file(tmp_path):
    found = results({30: UP})
    found.save(tmp_path / "search.json")
    assert Results.load(tmp_path / "search.json") == found


# ------------------------------------------------------------------------------------------------------------ the page


def run(method, size, seed, validation, test, task="cancer"):
    points = [] if test is None else [Point(1.0, 0.9, 0.9, 0.2), Point(2.0, validation, test, 0.1)]
    return Run(Job(task, size, method, seed, 8.0), points, {"complete": 7}, 0.9, 8.1)


def results(gains, task=CANCER):
    """Ours at 0.5, and the others above it by a gain for each seed, by size."""
    runs = []
    for size, by_seed in gains.items():
        for seed, gain in enumerate(by_seed):
            base = 0.1 * seed  # seeds differ by far more than methods do
            runs.append(run("ours", size, seed, 0.4 + base, 0.5 + base))
            theirs = None if gain is None else 0.5 + base + gain
            for method in ("tpe", "random", "gradients") if size == task.sizes[-1] else ("tpe",):
                runs.append(run(method, size, seed, 0.4 + base + (gain or 0.0), theirs))
    return Results(runs, 1.0)


UP, FLAT, DOWN = [0.02, 0.03, 0.025], [0.02, -0.02, 0.001], [-0.02, -0.03, -0.025]


@pytest.mark.parametrize(
    ("gains", "first", "sentence"),
    [
        ({1: FLAT, 2: FLAT, 5: UP, 10: UP, 30: UP}, 5, "the lower test loss from 5 hyperparameters on"),
        ({1: UP, 2: UP, 5: UP, 10: UP, 30: UP}, 1, "the lower test loss at every number that was tried"),
        ({1: UP, 2: UP, 5: UP, 10: DOWN, 30: UP}, 30, "the lower test loss from 30 hyperparameters on"),
        ({1: UP, 2: UP, 5: UP, 10: UP, 30: FLAT}, None, "the lower test loss at no number that was tried"),
        ({1: UP, 2: UP, 5: UP, 10: UP, 30: [None, 0.1, 0.1]}, 1, "the lower test loss at every number"),
    ],
)
def test_the_page_says_from_which_dimension_on_ours_wins(gains, first, sentence):
    found = results(gains)
    assert search_page.first_size(found, CANCER) == first
    text = search_page.from_which_size(found, CANCER)
    assert sentence in text
    missed = [size for size in (10, 30) if gains[size] in (FLAT, DOWN)]
    assert ("Its test loss is not the lower one with" in text) == bool(missed)
    assert all(str(size) in text.rpartition("Its test loss")[2] for size in missed)


def test_ours_has_not_won_where_it_found_nothing():
    found = results({1: UP, 2: UP, 5: UP, 10: UP, 30: UP})
    lost = replace(found, runs=[replace(r, points=[]) if r.job.method == "ours" else r for r in found.runs])
    assert search_page.first_size(lost, CANCER) is None
    assert "the lower test loss at no number" in search_page.from_which_size(lost, CANCER)
    assert search_page.verdict(lost, CANCER) == "Ours found nothing in time."
    neither = replace(found, runs=[replace(r, points=[]) for r in found.runs])
    assert search_page.first_size(neither, CANCER) is None


def test_differences_are_paired_by_seed():
    mean, error = search_page.difference(results({30: UP}), "cancer", "tpe", 30)
    assert mean == pytest.approx(0.025)
    assert error == pytest.approx(0.005 / math.sqrt(3))  # not that of seeds which differ by 0.1


@pytest.mark.parametrize(("gains", "word"), [(UP, "lower than"), (FLAT, "no different from"), (DOWN, "higher than")])
def test_the_verdict_follows_from_the_numbers(gains, word):
    text = search_page.verdict(results({30: gains}), CANCER)
    assert text.startswith("The test loss of ours is 0.6000 ± 0.0577.")
    assert all(
        (f"It is {each}" in text) == (each == word) for each in ("lower than", "no different from", "higher than")
    )


def test_a_curve_is_a_staircase_from_where_every_seed_has_something():
    runs = [run("ours", 30, 0, 0.4, 0.5), run("ours", 30, 1, 0.6, 0.7)]
    found = search_page.curve(runs, lambda point: point.test, [0.5, 1.0, 1.9, 2.0, 8.0])
    assert [(place, mean) for place, mean, _ in found] == [
        (1.0, 0.9), (1.9, 0.9), (2.0, pytest.approx(0.6)), (8.0, pytest.approx(0.6)),
    ]  # fmt: skip


def test_the_page_is_written_even_where_a_method_found_nothing(tmp_path):
    found = results({1: UP, 2: UP, 5: UP, 10: UP, 30: [None, None, None]})
    search_page.write(found, [CANCER], tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert search_page.from_which_size(found, CANCER) in text and search_page.verdict(found, CANCER) in text
    for image in ("search-sizes.png", "search-cancer.png"):
        assert f"images/{image}" in text and (tmp_path / "images" / image).stat().st_size > 0
