"""Three levels: how strongly to believe a prior of 60 weight decays, tuned by its gradient through both levels below.

The problem. Tell malignant from benign tumours with 60 labelled cases (scikit-learn's breast cancer data). Each is
described by 30 measurements, beside which stand 30 more that belong to another case, drawn at random. A weight decay
for each feature can switch the irrelevant ones off, and the decays can be tuned by their gradient on a validation set;
but 60 decays overfit 60 validation cases, as weights overfit training cases. What keeps weights in order is a prior,
and decays can have one as well: a term that pulls log μ to a common centre. How strong, and to which centre? These are
hyperparameters of a problem whose own "weights" are the decays:

    top      F(w*(μ*))                                           λ = (strength, centre), on cases of its own
    middle   G(w*(μ)) + strength · mean (log μᵢ − centre)²       the decays μ, on validation cases
    bottom   L(w) + ½ Σ μᵢwᵢ²                                    the weights w, on training cases

``hi.minimizer`` gives w*(μ) as a function that can be differentiated: twice in the middle, since the hypergradient of
the top needs second derivatives of it, and once at the top. The rest is an ordinary problem for ``hi.optimize``: the
middle's gradient descent on log μ are its inner steps.

The methods:

    one decay        the same for all features: the best of a grid
    no prior         a decay per feature, by gradient descent on the validation loss
    fixed prior      the same with the prior that three levels begin with: strength 0.1, centre at the best single decay
    grid of priors   the same with the best of 9 pairs of strength and centre
    three levels     the same with strength and centre tuned by their gradient

Why the comparison is fair. All see the same three times 60 cases, and are tested on the other 389. "grid of priors"
chooses by the top's cases, as "three levels" does; "no prior" has no use for them there and gets them as validation
cases beside the middle's. The centre of all priors starts at the best single decay, which "one decay" finds by both.
Decays are tuned from there by the same number of steps, and for the decays found, the bottom is solved to its minimum.
Settings were chosen on seeds 100 to 104; those reported are 0 to 4.

What came of it, in test loss: three levels 0.131, fixed prior 0.124, grid of priors 0.137, one decay 0.152, no prior
0.362. That there is a prior is what counts. Tuning it by its gradient beats the grid, which spends the same cases; it
does NOT beat the fixed prior that it starts from: the difference is within two standard errors, and in the latter's
favour. Two numbers chosen by 60 cases are not worth more than a good guess here. The middle's loss is not convex
either: where its descent has not arrived at a minimum, the run warns of negative curvature.

    python examples/three_levels.py [--seeds 5] [--first-seed 0] [--quick] [--no-tracking]
    hyperopt-implicit run examples/three_levels.py --backend cg
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
import typer
from over_seeds import compare
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.distributions import constraints

import hyperopt_implicit as hi

Batch = tuple[Tensor, Tensor]

CASES, FEATURES = 60, 60
GRID = torch.logspace(-3, 1, 13, dtype=torch.float64)
STRENGTH, STRENGTHS, OFFSETS = 0.1, (0.01, 0.1, 1.0), (-1.5, 0.0, 1.5)
MIDDLE_STEPS, MIDDLE_LR, OUTER_STEPS = 200, 0.1, 60


def case_loss(weight: Tensor, batch: Batch) -> Tensor:
    x, y = batch
    return F.binary_cross_entropy_with_logits(x @ weight, y)


# -------------------------------------------------------------------------------------------------- the bottom problem


class Linear(nn.Module):
    """w, from zero."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(FEATURES, dtype=torch.float64))


@hi.hyperparameter("decay", init=torch.full((FEATURES,), 0.1), constraint=constraints.positive)
def bottom_training_loss(model: Linear, batch: Batch, *, decay: Tensor) -> Tensor:
    return case_loss(model.weight, batch) + 0.5 * (decay * model.weight.square()).sum()


def bottom() -> hi.BilevelProblem:
    return hi.BilevelProblem(
        Linear(),
        bottom_training_loss,
        lambda model, batch: case_loss(model.weight, batch),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
    )


# --------------------------------------------------------------------------------------------- the middle, and the top


class Decays(nn.Module):
    """The middle's weights, log μ, from ``start``; called, it gives w*(μ) with so many derivatives right."""

    def __init__(self, training: Batch, start: float) -> None:
        super().__init__()
        self.log_decay = nn.Parameter(torch.full((FEATURES,), start, dtype=torch.float64))
        self.start, self.training_batch, self.bottom = start, training, bottom()
        self.last: dict[str, Tensor] | None = None  # where the next search for the minimum begins

    def forward(self, order: int) -> Tensor:
        decay = self.log_decay.exp()
        w = hi.minimizer(self.bottom, {"decay": decay}, [self.training_batch], order=order, start=self.last)
        self.last = {name: p.detach() for name, p in w.items()}
        return w["weight"]


@hi.hyperparameter("strength", init=STRENGTH, constraint=constraints.positive)
@hi.hyperparameter("centre", init=lambda model: model.start)
def training_loss(model: Decays, batch: Batch, *, strength: Tensor | float, centre: Tensor | float) -> Tensor:
    return case_loss(model(order=2), batch) + strength * (model.log_decay - centre).square().mean()


def validation_loss(model: Decays, batch: Batch) -> Tensor:
    return case_loss(model(order=1), batch)


def problem(*, seed: int = 0) -> hi.BilevelProblem:
    training, middle, top, _ = load(seed)
    return hi.BilevelProblem(
        Decays(training, best_of_grid(training, joined(middle, top), GRID)),
        training_loss,
        validation_loss,
        training_data=[middle],
        validation_data=[top],
        optimizer=lambda params: torch.optim.Adam(params, lr=MIDDLE_LR),
    )


# ----------------------------------------------------------------------------------------------------- data and decays


def load(seed: int) -> tuple[Batch, Batch, Batch, Batch]:
    """Cases for the bottom, the middle, the top and the test, standardised by the first; labels 0 and 1."""
    x, labels = load_breast_cancer(return_X_y=True)
    other = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).numpy()
    data = torch.hstack([torch.tensor(x), torch.tensor(x[other])])
    rest, parts = list(range(len(x))), []
    for _ in range(3):
        part, rest = train_test_split(rest, train_size=CASES, stratify=labels[rest], random_state=seed)
        parts.append(part)
    scaler = StandardScaler().fit(data[parts[0]].numpy())
    data, targets = torch.tensor(scaler.transform(data.numpy())), torch.tensor(labels, dtype=torch.float64)
    training, middle, top, test = ((data[part], targets[part]) for part in [*parts, rest])
    return training, middle, top, test


def joined(first: Batch, second: Batch) -> Batch:
    return torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])


@torch.no_grad()
def loss_with(log_decay: Tensor, training: Batch, batch: Batch) -> float:
    """Loss on a batch of the weights at the bottom's minimum for these decays."""
    decay = log_decay.exp().expand(FEATURES)
    return case_loss(hi.minimizer(bottom(), {"decay": decay}, [training])["weight"], batch).item()


def best_of_grid(training: Batch, validation: Batch, grid: Tensor) -> float:
    """Logarithm of the best single decay."""
    return min(grid.log().tolist(), key=lambda log: loss_with(torch.tensor(log).double(), training, validation))


def tuned(training: Batch, validation: Batch, start: float, strength: float, centre: float, steps: int) -> Tensor:
    """log μ after the middle's gradient descent, for a prior that is given."""
    model = Decays(training, start)
    optimizer = torch.optim.Adam(model.parameters(), lr=MIDDLE_LR)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = case_loss(model(order=1), validation) + strength * (model.log_decay - centre).square().mean()
        loss.backward()
        optimizer.step()
    return model.log_decay.detach()


# ------------------------------------------------------------------------------------------------------ the comparison


def learned_prior(seed: int, quick: bool, tracking: bool) -> tuple[float, float]:
    """Strength and centre."""
    result = hi.optimize(
        problem(seed=seed),
        backend={"name": "cg", "max_iterations": 30},
        outer_steps=2 if quick else OUTER_STEPS,
        inner_steps=5,
        warmup_steps=120 if quick else MIDDLE_STEPS,
        outer_lr=0.1,
        progress=False,
        tracking=tracking and hi.Tracking(run_name=f"three levels, seed {seed}", params={"seed": seed}),
    )
    return float(result.hyperparameters["strength"]), float(result.hyperparameters["centre"])


def scores(seed: int, quick: bool, tracking: bool, found: list[tuple[float, float]]) -> dict[str, float]:
    training, middle, top, test = load(seed)
    steps = 5 if quick else MIDDLE_STEPS
    grid = GRID[::4] if quick else GRID
    start = best_of_grid(training, joined(middle, top), grid)
    priors = [(strength, start + offset) for strength in STRENGTHS for offset in OFFSETS][:: 4 if quick else 1]
    candidates = [tuned(training, middle, start, *prior, steps) for prior in priors]
    found.append(learned_prior(seed, quick, tracking))
    decays = {
        "one decay": torch.tensor(start).double(),
        "no prior": tuned(training, joined(middle, top), start, 0.0, start, steps),
        "fixed prior": tuned(training, middle, start, STRENGTH, start, steps),
        "grid of priors": min(candidates, key=lambda log_decay: loss_with(log_decay, training, top)),
        "three levels": tuned(training, middle, start, *found[-1], steps),
    }
    return {method: loss_with(log_decay, training, test) for method, log_decay in decays.items()}


def main(seeds: int = 5, first_seed: int = 0, quick: bool = False, tracking: bool = True) -> None:
    """Compare the methods over the seeds 0, 1, … of the split."""
    found: list[tuple[float, float]] = []

    def notes() -> list[str]:
        strength, centre = torch.tensor([[math.log(s), c] for s, c in found]).mean(dim=0).exp().tolist()
        return [f"Learned priors, geometric mean: strength {strength:.2g}, centre {centre:.2g}"]

    compare(
        functools.partial(scores, quick=quick, tracking=tracking, found=found),
        range(first_seed, first_seed + (1 if quick else seeds)),
        title=f"Breast cancer, {CASES} cases a level, half of {FEATURES} features irrelevant",
        measure="test loss",
        ours=["three levels"],
        lower_is_better=True,
        digits=4,
        notes=notes,
    )


if __name__ == "__main__":
    typer.run(main)
