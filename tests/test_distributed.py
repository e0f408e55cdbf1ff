"""Several processes, each with its share of every batch, find what one process finds on the whole."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from filelock import FileLock

from hyperopt_implicit import distributed
from hyperopt_implicit.replicas import sync_buffers

from .distributed_tasks import assert_all_same, assert_same, found_by, shared_tasks, whole

TASKS = shared_tasks()
Group = Callable[[str, int], list[Any]]


@pytest.fixture(scope="session")
def group(tmp_path_factory: pytest.TempPathFactory) -> Group:
    """What a group of processes finds with a task; all tests, on whatever worker, share one run of it."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder

    def found(task: str, count: int = 2) -> list[Any]:
        place = folder / f"group-{task}-{count}"
        with FileLock(f"{place}.lock"):
            if not (place / "all").exists():
                everybody = found_by(task, place, count)
                (place / "all").write_bytes(pickle.dumps(everybody))
            return list(pickle.loads((place / "all").read_bytes()))

    return found


def check(everybody: list[Any], expected: Any, relative: float = 1e-10) -> None:
    assert_all_same(everybody)
    for each in everybody:
        assert_same(each, expected, relative)


# ------------------------------------------------------------------------------------------------- hypergradients


@pytest.mark.parametrize("name", TASKS)
def test_two_processes_find_the_hypergradient_of_one(name: str, group: Group) -> None:
    check([each[name] for each in group("shared", 2)], TASKS[name](whole))


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_three_processes_find_the_hypergradient_of_one(name: str, group: Group) -> None:
    check([each[name] for each in group("shared", 3)], TASKS[name](whole))


def test_a_step_that_is_not_finite_in_one_share_is_left_out_by_all(group: Group) -> None:
    assert [each["not_finite"]["left out"] for each in group("shared", 2)] == [[2, 5], [2, 5]]


# ------------------------------------------------------------------------------------- what processes tell each other


@pytest.fixture
def agreements(group: Group) -> list[dict[str, Any]]:
    return group("agreements", 2)


def test_what_is_agreed_upon_is_the_same_in_both(agreements: list[Any]) -> None:
    for each in agreements:
        assert each["agreed"] == {
            "agree": [True, False, True, False],
            "first decides": False,
            "numbers": [0.0, 2.0],
            "summed": [1.0, 4.0],
            "largest": 1.0,
            "seed": 7,
            "object": {"from": 0},
            "everybody": [0, 1],
            "mean of whole numbers": 0.5,
            "narrow": [1.0, 2.5],
            "row": [[0.5, 0.5], [0.5], None, [1 + 0.5j]],
        }


def test_only_the_first_process_gathers(agreements: list[Any]) -> None:
    assert [each["gathered"] for each in agreements] == [["from 0", "from 1"], None]


def test_alone_nothing_is_sent() -> None:
    assert distributed.agree(any_=[True, False], first=[True]) == [True, False, True]
    assert distributed.gathered("mine") == ["mine"] == distributed.exchanged("mine")
    assert (distributed.rank(), distributed.world_size(), distributed.several()) == (0, 1, False)
    x = torch.ones(2)
    assert distributed.mean(x) is x
    model = torch.nn.BatchNorm1d(2)
    before = model.running_mean
    sync_buffers(model)
    assert model.running_mean is before


def test_running_statistics_become_their_mean_and_what_is_the_same_stays(agreements: list[Any]) -> None:
    check(
        [each["buffers"] for each in agreements],
        {
            "running_mean": torch.tensor([0.5, 0.5]),
            "running_var": torch.ones(2),
            "num_batches_tracked": torch.tensor(5),
            "constant": torch.tensor([0.1, 0.7], dtype=torch.float64),
            "empty": torch.empty(0),
        },
    )


def test_all_begin_with_the_first_ones_values(agreements: list[Any]) -> None:
    """Those that it would have alone."""
    check([each["handed_out"] for each in agreements], agreements[0]["handed_out"], 0.0)
    assert float(agreements[0]["handed_out"]["decay"].exp()) == pytest.approx(0.2)


def test_decisions_by_time_are_the_first_ones(agreements: list[Any]) -> None:
    assert_all_same([each["times"] for each in agreements])
    assert "'seconds': 1.0," in agreements[0]["times"]["costs"]


def test_a_batch_that_changes_in_one_share_has_changed(agreements: list[Any]) -> None:
    assert_all_same([each["other_batches"] for each in agreements])
    notes = agreements[0]["other_batches"]["notes"]
    assert ["mini-batches" in each for each in notes] == [False, False, True, True]


def test_products_are_not_compiled_and_one_process_says_so(agreements: list[Any]) -> None:
    first, second = (each["compiled"] for each in agreements)
    assert_same(first["gradients"], second["gradients"], 0.0)
    assert second["warnings"] == []
    assert first["warnings"] == [
        "compile=True compiles what happens within one process; among several, the processes answer each other in the "
        "middle of each product. Products are not compiled. Leave the option out."
    ]


def test_rows_of_steps_end_together_where_batches_are_of_other_sizes(agreements: list[Any]) -> None:
    assert len(agreements[0]["large_batches"]["losses"]) == 20
    assert_all_same([each["large_batches"] for each in agreements])
