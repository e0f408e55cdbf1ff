"""``compare``: each number in its table is worked out again by other means, and what it leaves out it says."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from torch import nn
from torch.distributions import constraints

import hyperopt_implicit as hi
from hyperopt_implicit.diagnostics.comparison import Comparison, Row
from hyperopt_implicit.diagnostics.measuring import peak_bytes, seconds
from hyperopt_implicit.inner_loop import train_step
from hyperopt_implicit.testing.assertions import assert_close, assert_unchanged, cosine, relative_error
from hyperopt_implicit.testing.oracles import implicit_hypergradient, unrolled_hypergradient
from hyperopt_implicit.testing.specimens import (
    TRAINING,
    VALIDATION,
    Linear,
    regression_data,
    ridge_problem,
    ridge_truth,
)
from hyperopt_implicit_backends import Neumann

SECOND = regression_data(2)
DECAY = torch.tensor([0.1, 0.3, 1.0, 2.0])
WARMUP, STEPS = 3, 4


def ridge(**options):
    problem = ridge_problem(**{"decay": DECAY, **options})
    problem.training_data, problem.validation_data = [TRAINING, SECOND], [VALIDATION]
    return problem


def trained(problem):
    """After the warm-up, by plain steps on the batches in turn."""
    for t in range(WARMUP):
        train_step(problem, [TRAINING, SECOND][t % 2], problem.hyperparameters.values())
    return problem


def compare(problem=None, backends=None, **options):
    defaults = {"inner_steps": STEPS, "hessian_batches": 2, "warmup_steps": WARMUP, "repeats": 1, "tracking": False}
    return hi.compare(ridge() if problem is None else problem, backends, **{**defaults, **options})


@pytest.fixture(scope="module")
def everything() -> Comparison:
    """All backends on ridge regression."""
    return compare(calls=100)


def rows(comparison: Comparison) -> dict[str, Row]:
    return {row.name: row for row in comparison.rows}


def learning_rate():
    return hi.hyperparameter("lr", init=0.1, constraint=constraints.positive, target="optimizer")


# ------------------------------------------------------------------------------------------------------- the numbers


def test_every_backend_has_a_row(everything):
    assert [row.name for row in everything.rows] == hi.list_backends()
    assert everything.left_out == {}
    for row in everything.rows:
        backend = hi.get_backend(row.name)
        assert (row.family, row.differentiates) == (backend.card.family, backend.differentiates)
        assert row.seconds > 0.0 and row.peak_bytes > 0


def test_errors_are_those_against_what_is_approximated(everything):
    """The theorem on both batches, or four steps through them in turn, from the oracles and after a warm-up by hand."""
    problem = trained(ridge())
    solution = implicit_hypergradient(problem, [TRAINING, SECOND], VALIDATION)
    training = unrolled_hypergradient(problem, [TRAINING, SECOND] * 2, VALIDATION)
    assert relative_error(solution, training) > 0.1
    for row in everything.rows:
        expected = solution if row.differentiates == "solution" else training
        assert row.error == pytest.approx(relative_error(row.gradients, expected), rel=1e-6, abs=1e-12), row
        assert row.cosine == pytest.approx(cosine(row.gradients, expected), rel=1e-9), row
    found = rows(everything)
    assert max(found[name].error for name in ("exact", "unrolled", "forward")) < 1e-12
    assert found["cg"].error < 0.01 < found["identity"].error


def test_columns_with_a_star_are_against_the_minimum_in_closed_form(everything):
    both = torch.cat([TRAINING[0], SECOND[0]]), torch.cat([TRAINING[1], SECOND[1]])
    expected = ridge_truth(ridge(), both, VALIDATION)
    assert everything.minimum_found
    for row in everything.rows:
        assert row.minimum_error == pytest.approx(relative_error(row.gradients, expected), rel=1e-6), row
        assert row.minimum_cosine == pytest.approx(cosine(row.gradients, expected), rel=1e-9), row


def test_products_and_calls(everything):
    found = rows(everything)
    assert found["exact"].products == 4
    assert found["unrolled"].products == STEPS
    assert found["finite_difference"].products == 0
    assert (found["exact"].calls, found["identity"].calls) == (1, 1)
    assert 5 < found["soba"].calls <= 100  # its state moves a little at each call


def test_calls_end_the_waiting_for_carried_state():
    (row,) = compare(backends=["soba"], calls=3).rows
    assert row.calls == 3


def test_a_minimum_out_of_reach_is_left_out():
    problem = ridge(extra=lambda model: -3.0 * model.weight[0].square())
    found = compare(problem, ["exact", "unrolled"], seconds_to_minimise=0.5)
    assert not found.minimum_found
    assert all(math.isnan(row.minimum_error) and math.isnan(row.minimum_cosine) for row in found.rows)
    assert "error*" not in str(found) and "cosine*" not in str(found)
    assert max(row.error for row in found.rows) < 1e-12


def test_float32_is_measured_against_float64():
    problem = ridge().copy(torch.float32)
    single = [tuple(x.float() for x in batch) for batch in (TRAINING, SECOND, VALIDATION)]
    problem.training_data, problem.validation_data = single[:2], single[2:]
    found = compare(problem, ["exact", "unrolled"])
    for row in found.rows:
        assert 1e-9 < row.error < 1e-5
        assert {g.dtype for g in row.gradients.values()} == {torch.float64}


def test_batches_can_be_given():
    """They replace the problem's data, and the counts of it."""
    problem = ridge()
    found = compare(
        problem, ["exact", "unrolled"], training_batches=[SECOND], validation_batch=TRAINING, warmup_steps=0
    )
    exact, unrolled = found.rows
    assert_close(exact.gradients, implicit_hypergradient(problem, [SECOND], TRAINING), 1e-12)
    assert unrolled.products == 1


def test_without_second_derivatives_errors_stay_open():
    """There is nothing to compare with then: dashes in the table, no point in the figure."""
    place = torch.ones(1, 4, dtype=torch.float64)
    problem = ridge(extra=lambda model: torch.cdist(model.weight[None], place).sum())
    found = compare(problem, ["finite_difference", "f2sa"])
    assert not found.minimum_found
    assert all(math.isnan(row.error) and math.isnan(row.cosine) for row in found.rows)
    for line in str(found).splitlines()[1:3]:
        assert line.split()[2:4] == ["–", "–"]
    assert "–: what it would be compared with could not be computed." in str(found)
    assert len(found.figure().axes[0].collections) == 0


# ----------------------------------------------------------------------------------------------------- what is left out


class Stream:
    """Batches that no list holds."""

    def __iter__(self):
        return iter([TRAINING, SECOND])


def test_backends_that_need_a_list_of_batches():
    problem = ridge()
    problem.training_data = Stream()
    found = compare(problem, calls=1)
    assert set(found.left_out) == {"saba"}
    assert "training_data must be a list of batches" in found.left_out["saba"]
    assert f"left out: saba: {found.left_out['saba']}" in str(found)
    assert {row.name for row in found.rows} == set(hi.list_backends()) - {"saba"}


def test_backends_that_are_left_out_for_one_reason_share_a_line():
    place = torch.ones(1, 4, dtype=torch.float64)
    found = compare(ridge(extra=lambda model: torch.cdist(model.weight[None], place).sum()), calls=1)
    assert {"cg", "exact", "unrolled"} <= set(found.left_out)
    lines = [line for line in found.legend().splitlines() if "has no second derivative" in line]
    assert len(lines) == 1
    assert lines[0].startswith("left out: amigo, auto, cg, exact, ")


def test_learning_rate_is_seen_by_trajectories_only():
    problem = ridge(also=learning_rate())
    found = compare(problem)
    chosen = {name: hi.get_backend(name).for_problem(problem) for name in hi.list_backends()}
    trajectory = {name for name, backend in chosen.items() if backend.differentiates == "trajectory"}
    assert "auto" in trajectory  # which leaves it to unrolled
    assert {row.name for row in found.rows} == trajectory
    assert set(found.left_out) == set(hi.list_backends()) - trajectory
    assert all("'lr'" in reason for reason in found.left_out.values())
    assert not found.minimum_found
    assert max(rows(found)[name].error for name in ("unrolled", "forward")) < 1e-12


def test_backend_that_was_asked_for_raises():
    with pytest.raises(hi.BackendError, match="'lr' is a hyperparameter of the inner optimizer"):
        compare(ridge(also=learning_rate()), ["unrolled", "cg"])


def test_no_backend_at_all(monkeypatch):
    module = sys.modules["hyperopt_implicit.diagnostics.compare"]
    monkeypatch.setattr(module, "list_backends", lambda: ["cg", "exact"])
    with pytest.raises(hi.HyperoptError, match=r"no installed backend can handle this problem: cg: .* exact: "):
        compare(ridge(also=learning_rate()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_steps": 0}, "inner_steps must be a whole number of at least 1; got 0."),
        ({"hessian_batches": 0}, "hessian_batches must be a whole number of at least 1; got 0."),
        ({"calls": 1.5}, "calls must be a whole number of at least 1; got 1.5."),
        ({"repeats": True}, "repeats must be a whole number of at least 1; got True."),
        ({"warmup_steps": -1}, "warmup_steps must be a whole number of at least 0; got -1."),
        ({"training_batches": []}, "training_batches must hold at least one batch; it is empty."),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(hi.HyperoptError) as caught:
        compare(**options)
    assert str(caught.value) == message


def test_problem_is_left_alone():
    problem = ridge()
    with assert_unchanged(problem):
        compare(problem, calls=2)


def test_random_layers_are_held_still():
    """The same masks for the backend and for what it is compared with; a second comparison gives the same."""
    problem = ridge(model=nn.Sequential(Linear(4), nn.Dropout(0.5)), decay=0.3)
    first, again = (compare(problem, ["unrolled"]).rows[0] for _ in range(2))
    assert first.error < 1e-12
    assert_close(first.gradients, again.gradients, 0.0)


# ---------------------------------------------------------------------------------------------------- how it is shown


def test_labels_name_the_options_given():
    specs = ["cg", {"name": "neumann", "terms": 3}, {"name": "exact"}, Neumann(terms=2, step_size=0.1)]
    found = compare(backends=specs)
    labels = ["cg", "neumann(terms=3)", "exact", "Neumann(terms=2, step_size=0.1)"]
    assert [row.name for row in found.rows] == labels
    text = str(found)
    assert all(word in text for label in labels for word in label.split())  # a long name goes on in the next line


def test_table_shows_every_row_sorted_by_error(everything):
    text = str(everything)
    order = [row.name for row in everything.sorted_rows()]
    shown = [line.split()[0] for line in text.splitlines()[1 : 1 + len(order)]]
    assert shown == order
    assert set(order) == set(hi.list_backends())
    errors = [(row.differentiates, row.error) for row in everything.sorted_rows()]
    assert errors == sorted(errors)
    assert "error*" in text and "*: against the gradient at a minimum of L." in text
    (cg,) = (line.split() for line in text.splitlines() if line.startswith("cg "))
    row = rows(everything)["cg"]
    assert cg[1:6] == [
        "theorem",
        f"{row.error:.2g}",
        f"{row.cosine:.3f}",
        f"{row.minimum_error:.2g}",
        f"{row.minimum_cosine:.3f}",
    ]
    assert cg[6:] == [
        f"{1e3 * row.seconds:.3g}",
        f"{row.seconds / everything.gradient_seconds:.1f}",
        str(row.products),
        f"{row.peak_bytes / 2**20:.2g}",
        str(row.calls),
        *row.status.value.split(),
    ]


def test_figure_names_every_row_where_it_is(everything):
    figure = everything.figure()
    (ax,) = (ax for ax in figure.axes if ax.get_visible())
    found = {dots.get_label(): tuple(dots.get_offsets()[0]) for dots in ax.collections}
    assert len(ax.collections) == len(everything.rows)
    assert found == {row.name: (1e3 * row.seconds, max(row.error, 1e-16)) for row in everything.rows}
    (legend,) = figure.legends
    assert sorted(text.get_text() for text in legend.get_texts()) == sorted(found)
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")


def test_csv_holds_every_number(everything, tmp_path):
    everything.write_csv(tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(everything.rows)
    for line, row in zip(read, everything.rows, strict=True):
        assert "gradients" not in line
        assert (line["name"], line["family"], line["status"]) == (row.name, row.family, row.status.value)
        assert line["residual"] == ("" if row.residual is None else repr(row.residual))
        for name in ("seconds", "error", "cosine", "minimum_error", "minimum_cosine"):
            assert float(line[name]) == getattr(row, name)
        for name in ("products", "calls", "peak_bytes"):
            assert int(line[name]) == getattr(row, name)


# ------------------------------------------------------------------------------------------------------ time and memory


def test_peak_bytes():
    """8 MB at a time count once, two at once twice, and what was held before not at all."""
    kept = torch.zeros(1_000_000, dtype=torch.float64)

    def once():
        return kept.add(1.0).sum()

    assert peak_bytes(lambda: once()) == pytest.approx(8e6, rel=0.01)
    assert peak_bytes(lambda: (once(), once())) == pytest.approx(8e6, rel=0.01)
    assert peak_bytes(lambda: (kept.add(1.0), kept.add(1.0))) == pytest.approx(16e6, rel=0.01)


def test_profiler_keeps_quiet(capfd):
    peak_bytes(lambda: torch.zeros(10).sum())
    assert capfd.readouterr() == ("", "")


def test_seconds_is_the_median_after_a_warm_up(monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 15.0, 20.0, 22.0])  # 1, 5 and 2 seconds
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    made = []
    assert seconds(lambda: made.append(None), 3) == 2.0
    assert len(made) == 4


# ------------------------------------------------------------------------------------------------------------- tracking


def test_a_run_in_mlflow(workplace: Path):
    found = compare(backends=["cg", "unrolled"], tracking=hi.Tracking(system_metrics=False))
    client = MlflowClient(tracking_uri=f"sqlite:///{workplace}/mlflow.db")
    run = client.get_run(found.run_id)
    assert run.info.status == "FINISHED"
    assert found.run_link is not None
    expected = {}
    for row in found.rows:
        expected |= {f"{row.name}/{key}": getattr(row, key) for key in ("error", "cosine", "minimum_error", "seconds")}
        expected |= {f"{row.name}/products": row.products, f"{row.name}/peak_megabytes": row.peak_bytes / 2**20}
    assert run.data.metrics == pytest.approx(expected, rel=1e-12)
    assert run.data.tags["kind"] == "comparison"
    assert run.data.tags["mlflow.note.content"] == f"```\n{found}\n```"
    counts = {
        "inner_steps": "4",
        "hessian_batches": "2",
        "calls": "50",
        "repeats": "1",
        "warmup_steps": "3",
        "seed": "0",
    }
    assert {name: run.data.params[name] for name in counts} == counts
    assert run.data.params["model"] == "Linear"
    assert {file.path for file in client.list_artifacts(found.run_id)} == {
        "comparison.csv",
        "comparison.txt",
        "error_against_time.png",
    }
    assert Path(client.download_artifacts(found.run_id, "comparison.txt")).read_text() == str(found)
    assert Path(client.download_artifacts(found.run_id, "error_against_time.png")).read_bytes().startswith(b"\x89PNG")


def test_no_tracking_leaves_nothing(workplace: Path):
    before = sorted(workplace.iterdir())
    found = compare(backends=["exact"])
    assert (found.run_id, found.run_link) == (None, None)
    assert sorted(workplace.iterdir()) == before
