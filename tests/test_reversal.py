"""The schedule by which a chain is reversed from a few of its iterates: valid, and the best there is."""

from __future__ import annotations

from functools import cache
from math import comb

import pytest

from hyperopt_implicit.reversal import Plan, fewest_slots, forward_steps, repeats, reversal


@cache
def least(length: int, slots: int) -> int:
    """The fewest forward steps, by trying every first iterate to go to."""
    if length <= 1:
        return 0
    if slots == 1:
        return length * (length - 1) // 2
    return min(middle + least(length - middle, slots - 1) + least(middle, slots) for middle in range(1, length))


def followed(length: int, slots: int) -> tuple[list[int], int, int, dict[int, int]]:
    """The steps in the order they are reversed, the forward steps, the most iterates kept, and how often each is taken.

    Each action must be possible when its turn comes.
    """
    present, kept, forward, most = 0, set(), 0, 0
    order: list[int] = []
    taken = dict.fromkeys(range(length), 0)
    for action in reversal(length, slots):
        if action.kind == "keep":
            assert action.at == present
            kept.add(present)
            most = max(most, len(kept))
        elif action.kind == "restore":
            assert action.at in kept
            present = action.at
        elif action.kind == "advance":
            assert action.at > present
            for t in range(present, action.at):
                taken[t] += 1
            forward += action.at - present
            present = action.at
        elif action.kept:
            kept.remove(action.at)
            order.append(action.at)
        else:
            assert action.at == present
            order.append(action.at)
    assert not kept
    return order, forward, most, taken


@pytest.mark.parametrize("slots", range(1, 12))
def test_every_step_is_reversed_once_with_the_fewest_steps_forward(slots):
    """Against dynamic programming over all schedules."""
    for length in range(1, 61):
        order, forward, most, _ = followed(length, slots)
        assert order == list(range(length))[::-1]
        assert forward == forward_steps(length, slots) == least(length, slots)
        assert most <= slots


@pytest.mark.parametrize("slots", [2, 3, 5])
def test_no_step_is_taken_more_often_than_the_formula_says(slots):
    for length in range(2, 200, 7):
        *_, taken = followed(length, slots)
        assert max(taken.values()) <= repeats(length, slots)
        assert comb(slots + repeats(length, slots) - 1, slots) < length <= comb(slots + repeats(length, slots), slots)


def test_a_long_chain_goes_through_no_recursion():
    order, forward, most, _ = followed(20_000, 20_000)
    assert (order[0], order[-1], forward, most) == (19_999, 0, 19_999, 19_999)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 100, 104, 105, 106, 1000])
def test_the_fewest_slots_take_no_step_more_than_twice(steps):
    """Twice with the first sweep; one slot less does not do, and the sum is below one more a step."""
    slots = fewest_slots(steps)
    assert repeats(steps + 1, slots) <= 2
    assert slots == 1 or repeats(steps + 1, slots - 1) > 2
    assert Plan(steps, slots).replayed < steps
    assert Plan(steps, slots).replayed == (steps - slots if steps > slots else 0)
    assert slots**2 <= 2 * steps + 2


@pytest.mark.parametrize(
    ("steps", "slots", "replayed"), [(100, 100, 0), (100, 13, 87), (100, 1, 5000 - 50), (7, 7, 0), (1, 1, 0), (3, 2, 1)]
)
def test_steps_taken_again(steps, slots, replayed):
    """Where all are kept, none; with one slot, all before each; beside the sweep that every trajectory takes."""
    assert Plan(steps, slots).replayed == replayed
    order, forward, _, _ = followed(steps + 1, slots)
    assert forward == steps + replayed
    assert order[0] == steps  # the validation loss
