"""An initialisation as a hyperparameter: weights from which ten examples are enough (MAML and iMAML).

The problem. A task is a sine of unknown amplitude (0.1 to 5) and phase (0 to π), of which 10 points are known; another
10 are to be predicted. Ten points are few for a network with 1,761 weights, unless it starts from weights that know
already what a sine is. Such a start is a hyperparameter: training leads from it to the weights of a task, and the error
of these on the task's other points is what it is judged by (Finn et al., ICML 2017).

25 tasks are trained at once. The model holds a set of weights for each, as the difference δ from the common start, so
that L, the sum over the tasks, has each task's own training loss as its part, and a step on L is a step of each.
Before every outer step δ goes back to zero (``restart=True``). Two ways to the gradient:
    MAML   3 steps of SGD, differentiated to the start through every step: backend ``unrolled``.
    iMAML  L has the term ρ/2·‖δ‖² in addition, which ties a task to the start. Then the minimum depends on the start,
           and its derivative is to be had from the minimum alone, without the steps that led to it: backend ``cg``.
           The memory it takes does not depend on the number of steps, here 8 (Rajeswaran et al., NeurIPS 2019).

F depends on the start directly too, since the prediction uses start + δ; the library adds that part.

The rows. Each start is adapted to 100 fresh tasks by 10 steps of SGD on their 10 points, and the number is the mean
squared error on their other points. "joint" is trained on the same tasks as one big data set: the mean of all sines.

Why the comparison is fair. Tasks, points and number of outer steps are the same for all that learn, and joint training
takes its steps on the points of both kinds. The step size of the adaptation is the best of a grid on the fresh tasks
for "random start" and "joint"; MAML and iMAML have the one that they were learned with. Settings were chosen on
seed 100; those reported are 0 to 4. The papers train for up to 70,000 outer steps; here are 400 and 200.

What came of it: MAML 0.32, iMAML 1.58, joint 1.92, random start 4.11. iMAML is barely ahead of joint training: its 8
inner steps end far from the minimum that its gradient is about, and it needs small outer steps for that reason.

    python examples/meta_learning.py [--seeds 5] [--first-seed 0] [--quick] [--no-tracking]
    hyperopt-implicit run examples/meta_learning.py --backend unrolled --inner-steps 3
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import typer
from over_seeds import compare
from torch import Tensor, nn

import hyperopt_implicit as hi

Batch = tuple[Tensor, Tensor]  # x and y of all tasks: [tasks, points, 1]

TASKS, SHOTS, RHO = 25, 10, 5.0
GRID = (0.003, 0.01, 0.03, 0.1)
# the curvature of squared error plus ρ is positive with the Gauss-Newton matrix; other tasks, so no warm start
IMAML_BACKEND = {"name": "cg", "curvature": "gauss_newton", "max_iterations": 5, "warm_start": False}
STEPS = {"MAML": 3, "iMAML": 8}
RATE = {"MAML": 0.01, "iMAML": 0.01}
OUTER_LR = {"MAML": 5e-3, "iMAML": 1e-3}
OUTER_STEPS = {"MAML": 400, "iMAML": 200}


class Adapted(nn.Module):
    """A network 1-40-40-1 for each task, its weights δ away from a start that all tasks have in common."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        shapes = [(1, 40), (1, 40), (40, 40), (1, 40), (40, 1), (1, 1)]
        self.delta = nn.ParameterList([torch.zeros(tasks, *shape) for shape in shapes])

    def forward(self, x: Tensor, initial: nn.ParameterList) -> Tensor:
        w = [start + delta for start, delta in zip(initial, self.delta, strict=True)]
        hidden = (x @ w[0] + w[1]).relu()
        return (hidden @ w[2] + w[3]).relu() @ w[4] + w[5]


# ------------------------------------------------------------------------------------------------- the bilevel problem


def errors(model: Adapted, batch: Batch, initial: nn.ParameterList) -> Tensor:
    """Mean squared error of each task."""
    x, y = batch
    return (model(x, initial) - y).square().mean(dim=(1, 2))


def maml_loss(model: Adapted, batch: Batch, *, initial: nn.ParameterList) -> Tensor:
    return errors(model, batch, initial).sum()


def imaml_loss(model: Adapted, batch: Batch, *, initial: nn.ParameterList) -> Tensor:
    return errors(model, batch, initial).sum() + RHO / 2 * sum(d.square().sum() for d in model.delta)


def query_loss(model: Adapted, batch: Batch, *, initial: nn.ParameterList) -> Tensor:
    return errors(model, batch, initial).mean()


def problem(*, seed: int = 0, method: str = "MAML", outer_steps: int = 100) -> hi.BilevelProblem:
    meta_batches = [
        tasks(TASKS, random) for random in [torch.Generator().manual_seed(seed)] for _ in range(outer_steps)
    ]
    # An outer step takes one batch of validation data, and one of training data for each inner step, so a support set
    # is repeated; an implicit backend takes one batch more, for the Hessian.
    repeats = STEPS[method] + (method == "iMAML")
    return hi.BilevelProblem(
        Adapted(TASKS),
        hi.hyperparameter("initial", init=random_start(seed))(maml_loss if method == "MAML" else imaml_loss),
        query_loss,
        training_data=[support for support, _ in meta_batches for _ in range(repeats)],
        validation_data=[query for _, query in meta_batches],
        optimizer=lambda params: torch.optim.SGD(params, lr=RATE[method]),
    )


def tasks(count: int, random: torch.Generator) -> tuple[Batch, Batch]:
    """Points of sines to learn from, and others of the same sines to be judged by."""
    amplitude = 0.1 + 4.9 * torch.rand(count, 1, 1, generator=random)
    phase = math.pi * torch.rand(count, 1, 1, generator=random)
    x = 10 * torch.rand(count, 2 * SHOTS, 1, generator=random) - 5
    y = amplitude * (x - phase).sin()
    return (x[:, :SHOTS], y[:, :SHOTS]), (x[:, SHOTS:], y[:, SHOTS:])


def random_start(seed: int) -> nn.ParameterList:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(1, 40), nn.Linear(40, 40), nn.Linear(40, 1)]
    return nn.ParameterList([p.detach().clone() for layer in layers for p in (layer.weight.mT, layer.bias)])


# ------------------------------------------------------------------------------------------------------ the comparison


def learned(method: str, seed: int, quick: bool, tracking: bool) -> nn.ParameterList:
    outer_steps = 20 if quick else OUTER_STEPS[method]
    return hi.optimize(
        problem(seed=seed, method=method, outer_steps=outer_steps),
        backend="unrolled" if method == "MAML" else IMAML_BACKEND,
        outer_steps=outer_steps,
        inner_steps=STEPS[method],
        restart=True,
        outer_lr=OUTER_LR[method],
        clip=10.0,
        on_failure="skip",
        progress=False,
        tracking=tracking and hi.Tracking(run_name=f"{method}, seed {seed}", params={"seed": seed}),
    ).hyperparameters["initial"]


def joint(seed: int, steps: int) -> nn.ParameterList:
    start, none = random_start(seed), Adapted(TASKS).requires_grad_(False)
    optimizer = torch.optim.Adam(start.parameters(), lr=3e-3)
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        support, query = tasks(TASKS, random)
        optimizer.zero_grad()
        (query_loss(none, support, initial=start) + query_loss(none, query, initial=start)).backward()
        optimizer.step()
    return start


def adapted(
    start: nn.ParameterList, seed: int, rates: tuple[float, ...], training_loss: Callable[..., Tensor] = maml_loss
) -> float:
    """Mean squared error on fresh tasks after 10 steps from a start; with the best of the step sizes."""
    support, query = tasks(100, torch.Generator().manual_seed(10_000 + seed))
    results = []
    for rate in rates:
        model = Adapted(100)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        for _ in range(10):
            optimizer.zero_grad()
            training_loss(model, support, initial=start).backward()
            optimizer.step()
        with torch.no_grad():
            results.append(query_loss(model, query, initial=start).item())
    return min((result for result in results if math.isfinite(result)), default=math.inf)


def scores(seed: int, quick: bool, tracking: bool) -> dict[str, float]:
    starts = {method: learned(method, seed, quick, tracking) for method in STEPS}
    return {
        "random start": adapted(random_start(seed), seed, GRID),
        "joint": adapted(joint(seed, 20 if quick else OUTER_STEPS["MAML"]), seed, GRID),
        "MAML": adapted(starts["MAML"], seed, (RATE["MAML"],)),
        "iMAML": adapted(starts["iMAML"], seed, (RATE["iMAML"],), imaml_loss),
    }


def main(seeds: int = 5, first_seed: int = 0, quick: bool = False, tracking: bool = True) -> None:
    """Compare the starts over the seeds 0, 1, … of the tasks and the network."""
    compare(
        partial(scores, quick=quick, tracking=tracking),
        range(first_seed, first_seed + (1 if quick else seeds)),
        title="Sines from 10 points, 10 steps of adaptation",
        measure="squared error",
        ours=["MAML", "iMAML"],
        lower_is_better=True,
        digits=2,
    )


if __name__ == "__main__":
    typer.run(main)
