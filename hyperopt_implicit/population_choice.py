"""Whether one computation for many members is faster than one after another: measured, for it depends on the sizes.

Small models gain, since what they cost is mostly that of starting operators; large ones keep the processor busy alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hyperopt_implicit.members import Members
from hyperopt_implicit.members_batches import put_together
from hyperopt_implicit.members_curvature import MembersHessian
from hyperopt_implicit.operators import Hessian
from hyperopt_implicit.randomness import random_states, set_random_states

ROUNDS = 3
_UNCLEAR = (0.7, 1.4)  # outside of that, one round tells enough
_SHARE = 0.01  # of the run, after which no further round is begun
_PRODUCTS = 10  # of a hypergradient, as a guess: what matters is how steps and products weigh against each other


def measured_speedup(members: Members, batches: Sequence[Any], inner_steps: int, outer_steps: int = 100) -> float:
    """How many times faster an outer step is for all members together; the time of training steps and products.

    Neither members nor generators are changed.

    Args:
        members: who would be trained.
        batches: a training batch of each.
        inner_steps: between two hypergradients.
        outer_steps: of the whole run, of which measuring is to take a small share.
    """
    problem, parts = members.problems[0], put_together(batches)
    hparams = {name: x.detach() for name, x in members.hparams.items()}
    states = random_states(members.device)

    def step_together() -> None:
        losses = members.training_losses(members.params, hparams, parts)
        torch.autograd.grad(losses.sum(), list(members.params.values()), allow_unused=True)

    own = {name: p.detach().requires_grad_() for name, p in problem.params.items()}
    still = {name: p.detach() for name, p in problem.hparams.items()}

    def step_alone() -> None:
        loss = problem.functional_training_loss(own, still, batches[0])
        torch.autograd.grad(loss, list(own.values()), allow_unused=True)

    together, alone = MembersHessian(members, [parts]), Hessian(problem, [batches[0]])
    ones = {name: torch.ones_like(p) for name, p in members.params.items()}
    one = {name: x[0] for name, x in ones.items()}
    calls: list[Callable[[], object]] = [
        step_together,
        step_alone,
        lambda: together @ ones,
        lambda: alone @ one,
        lambda: MembersHessian(members, [parts]),
        lambda: Hessian(problem, [batches[0]]),
    ]
    least, found, spent = [math.inf] * len(calls), math.nan, 0.0
    try:
        for _ in range(ROUNDS):
            times = _times(calls, members.device)
            spent += sum(times)
            least = [min(x, y) for x, y in zip(least, times, strict=True)]
            many = inner_steps * least[0] + _PRODUCTS * least[2] + least[4]
            single = inner_steps * least[1] + _PRODUCTS * least[3] + least[5]
            found = len(members) * single / max(many, 1e-9)
            whole = outer_steps * len(members) * single
            if not _UNCLEAR[0] < found < _UNCLEAR[1] or spent > _SHARE * whole:
                break
    finally:
        set_random_states(states, members.device)
    return found


def _times(calls: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Seconds of each call."""
    cuda = device.type == "cuda"
    # processor time is not disturbed by others, but with several threads it is not what a caller waits for
    clock = time.thread_time if not cuda and torch.get_num_threads() == 1 else time.perf_counter
    found = []
    for call in calls:
        if cuda:
            torch.cuda.synchronize(device)
        started = clock()
        call()
        if cuda:
            torch.cuda.synchronize(device)
        found.append(clock() - started)
    return found
