"""What the backend ``auto`` has found out about a problem, and how the method that it took is going: its memory.

It is carried in the state as numbers and words. What is found out is measured in ``survey.py``; what follows from it
is decided by the backend.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hyperopt_implicit.backend import State
from hyperopt_implicit.survey import Costs, alike, contents, fingerprint

SAMPLED_STEPS = ((20, 1.0), (80, 0.5), (math.inf, 0.25))  # of 1/λ_max on mini-batches, up to so many calls
SURVEY_AGAIN = 100  # calls after which a mini-batch's largest eigenvalue is looked up again
DAMPED_AGAIN = 50  # calls after which it is looked whether damping is still needed, 4 times as many where it is
FIRST_AUDIT, NEXT_AUDIT = 10, 4  # after so many calls, and then after that many times as many
RECENT, LASTING = 10, 40  # calls over which the error may be twice the tolerance, and no more than it
REST = 25  # calls with conjugate gradients before heavy_ball is tried again, doubled each time that fails


@dataclass
class Plan:
    """What was found out about a problem, what follows from it, and how it is going.

    Attributes:
        rung: −1 for mini-batches; otherwise 0 for heavy_ball, and 1 for conjugate gradients.
        costs: of the parts of a hypergradient, in g.
        what: the problem, in words.
        random: whether the loss draws random numbers.
        damping: δ.
        damped: whether some of it was found to be needed.
        largest: the largest eigenvalue of A; 0 where it is not known.
        preconditioner: as the methods take it.
        ratio: the hypergradient's error over the residual, as last measured.
        error: the error when it was last measured.
        calls: since the survey.
        again: after how many of these there is another, where A was damped.
        since: calls since the present method was taken.
        audit: at how many of these the error is measured next.
        rest: after how many of these a cheaper method is tried.
        tried: whether the present method is such a trial.
        recent: what the errors of the last calls are thought to be.
        batches: a fingerprint of the last call's batches, where the problem has no data to ask.
        content: another one, which the order of their rows does not change.
        same: how often in a row they were the same.
        products: those of the last call.
        warned: whether it was said that the tolerance is missed.
        note: all this in a line.
    """

    rung: int
    costs: Costs
    what: str
    random: bool
    damping: float
    damped: bool
    largest: float
    preconditioner: Literal["adam"] | None = None
    ratio: float = 1.0
    error: float | None = None
    calls: int = 0
    again: int = DAMPED_AGAIN
    since: int = 0
    audit: int = FIRST_AUDIT
    rest: int = REST
    tried: bool = False
    recent: list[float] = field(default_factory=list)
    batches: list[float] = field(default_factory=list)
    content: list[float] = field(default_factory=list)
    same: int = 0
    products: int = 1
    warned: bool = False
    note: str = ""

    @property
    def step_size(self) -> float:
        """On mini-batches: large until the solution has come near, then small, to average over more of them."""
        share = next(share for calls, share in SAMPLED_STEPS if self.since < calls)
        return share / self.largest if self.largest > 0.0 else 1.0

    def take(self, rung: int) -> None:
        """Another method, of which nothing is known yet, but that the problem may have a ratio above 1."""
        self.rung, self.since, self.audit, self.error = rung, 0, FIRST_AUDIT, None
        self.ratio, self.recent = max(self.ratio, 1.0), []

    def is_outdated(self, batches: Sequence[Any] | None) -> bool:
        """Whether what was found out may no longer hold; counts how often in a row the batches were the same.

        Args:
            batches: where the problem has no data to ask; else None.
        """
        same = True
        if batches is not None:
            seen = fingerprint(batches)
            same = seen == self.batches
            if not same:  # or the same rows in another order
                content = contents(batches)
                same, self.content = alike(content, self.content), content
            self.batches = seen
        self.same = self.same + 1 if same else 0
        if self.rung < 0:
            settled = batches is not None and self.same >= RECENT and not self.random
            return settled or self.calls >= SURVEY_AGAIN or not self.largest > 0.0
        return self.same == 0 or (self.damped and self.calls >= self.again) or not self.largest > 0.0

    def state(self) -> State:
        """As numbers and words, to be carried."""
        return {**vars(self), "costs": self.costs.state()}

    @staticmethod
    def from_state(state: State) -> Plan | None:
        """The plan that a state holds."""
        known = {each.name for each in dataclasses.fields(Plan)}
        if not state or state.keys() != known:  # of another version
            return None
        return Plan(**{**state, "costs": Costs(**state["costs"])})
