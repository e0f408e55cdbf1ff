"""Reversing a long chain of steps while only a few of its iterates are held: which to keep, and when to go back.

Pure arithmetic on step numbers; what an iterate is, and where it is kept, is ``trajectory.py``'s.

A chain of l steps is reversed from the iterate it begins with, with s slots for iterates, that one included, by going
forward to some iterate in the middle, keeping it, reversing what comes after it with s − 1 slots, and then what comes
before it with s. Where no step is taken forward more than r times, l ≤ C(s + r, s), and the fewest forward steps are
r·l − C(s + r, r − 1) (Griewank, Walther, "Algorithm 799: revolve", ACM TOMS 2000).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import comb
from typing import Literal


@dataclass(frozen=True)
class Action:
    """One thing to do while a chain is reversed.

    Attributes:
        kind: ``"advance"`` from the present iterate to that of step ``at``; ``"keep"`` the present one; ``"restore"``
            the one kept at ``at``; ``"reverse"`` the step that begins at ``at``, which is the present iterate or, where
            ``kept``, one that was kept and is given up.
        at: the number of a step.
        kept: see above.
    """

    kind: Literal["advance", "keep", "restore", "reverse"]
    at: int
    kept: bool = False


def reversal(length: int, slots: int) -> Iterator[Action]:
    """What to do to reverse the steps 0, …, length − 1, last to first, with the fewest forward steps.

    It begins at the iterate of step 0, which is present and is kept first.

    Args:
        length: l, at least 1.
        slots: s, how many iterates may be kept at a time, at least 1.
    """
    kept, present, end = [0], 0, length
    yield Action("keep", 0)
    while kept:
        top = kept[-1]
        if end - top == 1:
            kept.pop()
            yield Action("reverse", top, kept=True)
            end = top
            continue
        if present != top:
            yield Action("restore", top)
        free = slots - len(kept)
        present = top + split(end - top, free + 1)
        yield Action("advance", present)
        if present < end - 1:
            kept.append(present)
            yield Action("keep", present)
        else:
            yield Action("reverse", present)
            end = present


def split(length: int, slots: int) -> int:
    """Which iterate of a chain to go forward to, the first being present and kept in one of the slots."""
    if slots == 1:
        return length - 1
    r = repeats(length, slots)
    return max(1, comb(slots + r - 2, slots) if r >= 2 else 0, length - comb(slots - 1 + r, slots - 1))


def repeats(length: int, slots: int) -> int:
    """r, the least number of times that the most repeated step is taken forward."""
    r = 0
    while comb(slots + r, slots) < length:
        r += 1
    return r


def forward_steps(length: int, slots: int) -> int:
    """The fewest forward steps with which a chain is reversed, those of the first sweep included."""
    r = repeats(length, slots)
    return r * length - comb(slots + r, r - 1) if r else 0


@dataclass(frozen=True)
class Plan:
    """How many iterates of a trajectory are kept, and what that costs.

    Attributes:
        steps: T, how many steps are differentiated.
        slots: s, how many iterates may be kept at a time. The first of them is the model as it stands, and takes no
            memory, unless steps before it are left out.
        replayed: how many plain steps are taken again, beside the first sweep.
    """

    steps: int
    slots: int

    @property
    def replayed(self) -> int:
        # the validation loss is one more link of the chain: it is reversed first, from the last iterate
        return forward_steps(self.steps + 1, self.slots) - self.steps

    @property
    def actions(self) -> Iterator[Action]:
        """What to do, as for a chain of one more link than there are steps: the last is the validation loss."""
        return reversal(self.steps + 1, self.slots)


def fewest_slots(steps: int) -> int:
    """The smallest s with which no step is taken forward more than twice: C(s + 2, 2) > T, about √(2T)."""
    slots = 1
    while comb(slots + 2, 2) <= steps:
        slots += 1
    return slots
