"""What differentiating long training costs, by how many iterates are kept: one thread, a process for each row.

python benchmarks/unrolled.py                                    print the table
python benchmarks/unrolled.py --write docs/benchmarks-unrolled.md    and write the docs page
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from problems import Case, _case, _cross_entropy, _labelled, perceptron
from timing import keep_freed_memory
from torch import Tensor, nn
from torch.distributions import constraints
from versions import versions_line

import hyperopt_implicit as hi
from hyperopt_implicit.diagnostics.measuring import peak_bytes
from hyperopt_implicit.inner_loop import train_step

P2, TINY = "P2", "tiny"


@dataclass(frozen=True)
class Setting:
    """One row: what is differentiated, and what is kept meanwhile.

    Attributes:
        what: a problem's short name.
        optimizer: ``"SGD"``, with momentum, or ``"Adam"``.
        steps: T.
        options: of ``unrolled``; None for the library ``higher``.
        repeats: how often training and differentiating take turns.
        targets: upper bounds by the name of a figure.
    """

    what: str
    optimizer: str
    steps: int
    options: dict[str, Any] | None
    repeats: int
    targets: dict[str, float]


SETTINGS = [
    Setting(P2, "SGD", 100, {}, 2, {"g_a_step": 4.2}),
    Setting(P2, "Adam", 100, {}, 2, {"g_a_step": 4.6}),
    Setting(P2, "SGD", 100, {"memory": "auto"}, 2, {"times_plain": 4.5, "megabytes": 50}),
    Setting(P2, "SGD", 100, {"folder": "disk"}, 2, {}),
    Setting(P2, "SGD", 100, None, 2, {}),
    Setting(P2, "SGD", 1000, {"folder": "disk"}, 1, {}),
    Setting(P2, "SGD", 1000, {"memory": "60 MB"}, 1, {"times_plain": 5.5, "megabytes": 100}),
    Setting(TINY, "SGD", 10000, {}, 1, {}),
    Setting(TINY, "SGD", 10000, {"memory": "500 kB"}, 1, {"megabytes": 1}),
]


@dataclass(frozen=True)
class Row:
    """What was measured; memory in MB beyond what the process held before, of the process and of its tensors."""

    slots: int | None
    replayed: int | None
    g_a_step: float
    times_plain: float
    megabytes: float
    tensors: float | None
    gradient: dict[str, list[float]]


# ------------------------------------------------------------------------------------------------- in a process each


def tiny() -> Case:
    @hi.hyperparameter("decay", init=1e-2, constraint=constraints.positive)
    def training_loss(model: nn.Module, batch: tuple[Tensor, Tensor], *, decay: Tensor) -> Tensor:
        return _cross_entropy(model, batch) + decay * model[0].weight.square().sum()

    return _case(
        "tiny",
        lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)),
        training_loss,
        _labelled(16, (8,), 3, seed=1),
        _labelled(16, (8,), 3, seed=2),
        {"decay": torch.exp},
        lr=0.05,
    )


def problem_of(case: Case, optimizer: str) -> hi.BilevelProblem:
    problem = case.make()
    if optimizer == "Adam":
        problem = hi.BilevelProblem(
            problem.model, case.training_loss, case.validation_loss, optimizer=lambda p: torch.optim.Adam(p, lr=1e-3)
        )
    return problem


def by_higher(case: Case, problem: hi.BilevelProblem, steps: int) -> dict[str, Tensor]:
    """The same hypergradient by the library ``higher``: one graph over all steps."""
    import higher

    raw = {name: p.detach().clone().requires_grad_() for name, p in problem.hparams.items()}
    with higher.innerloop_ctx(problem.model, problem.optimizer, copy_initial_weights=True) as (model, optimizer):
        for _ in range(steps):
            values = {name: case.constrain[name](value) for name, value in raw.items()}
            optimizer.step(case.training_loss(model, case.training_batch, **values))
        loss = case.validation_loss(model, case.validation_batch)
        return dict(zip(raw, torch.autograd.grad(loss, list(raw.values())), strict=True))


def differentiating(setting: Setting, case: Case, folder: str, steps: int) -> Callable[[], dict[str, Tensor]]:
    problem = problem_of(case, setting.optimizer)
    if setting.options is None:
        return lambda: by_higher(case, problem, steps)
    options = {**setting.options, **({"folder": folder} if "folder" in setting.options else {})}
    backend = hi.get_backend("unrolled", **options)
    batches = [case.training_batch] * steps
    return lambda: backend.hypergradient(problem, batches, case.validation_batch, {}).gradients


def measure(setting: Setting, folder: str) -> Row:
    """The figures of one row, in the present process."""
    torch.set_num_threads(1)
    warm = differentiating(replace(setting, options=setting.options and {}), tiny(), folder, 20)
    warm(), warm()  # code and small objects, on a model of no size, so that they are not counted
    case = {P2: perceptron, TINY: tiny}[setting.what]()
    differentiate, kept = differentiating(setting, case, folder, setting.steps), []

    def run() -> None:
        kept[:] = [differentiate()]

    twin = problem_of(case, setting.optimizer)
    values = twin.hyperparameters.values()

    def plain() -> None:
        for _ in range(setting.steps):
            train_step(twin, case.training_batch, values)

    def gradient() -> None:
        torch.autograd.grad(case.training_loss(twin.model, case.training_batch, **values), list(twin.params.values()))

    gradient()
    times: dict[Callable[[], object], list[float]] = {plain: [], run: [], gradient: []}
    megabytes = None
    if setting.repeats > 1:
        held = reset_peak()
        run()
        megabytes = (peak() - held) / 1e6
    keep_freed_memory()
    for _ in range(setting.repeats):
        for call in (plain, run, plain):
            times[gradient] += [seconds(gradient) for _ in range(5)]
            held = reset_peak()
            times[call].append(seconds(call))
            if megabytes is None and call is run:  # too long to be run twice
                megabytes = (peak() - held) / 1e6
    g, p, r = (statistics.median(times[call]) for call in (gradient, plain, run))
    plan = None
    if setting.options is not None:
        options = {**setting.options, **({"folder": folder} if "folder" in setting.options else {})}
        plan = hi.get_backend("unrolled", **options).plan(twin, setting.steps)
    return Row(
        slots=plan and plan.slots,
        replayed=plan and plan.replayed,
        g_a_step=r / setting.steps / g,
        times_plain=r / p,
        megabytes=megabytes,
        tensors=peak_bytes(run) / 1e6 if setting.steps <= 100 else None,
        gradient={name: x.reshape(-1).tolist() for name, x in kept[0].items()},
    )


def seconds(call: Callable[[], object]) -> float:
    started = time.thread_time()  # on shared cores, wall-clock time measures the neighbours
    call()
    return time.thread_time() - started


def reset_peak() -> int:
    """Forget the largest memory that this process held so far; returns what it holds now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """The largest memory that this process held, in bytes, as Linux counts it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


# --------------------------------------------------------------------------------------------------------- the table


def measured(setting: Setting, folder: str) -> Row:
    """The row, measured in a process of its own, in which large tensors go back to the system when they are freed."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, __file__, "--row", json.dumps(asdict(setting)), "--folder", folder],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return Row(**json.loads(done.stdout))


def difference(row: Row, other: Row) -> str:
    """Of two hypergradients, relative in norm; or that there is none."""
    x, y = (torch.tensor([*chain(*each.gradient.values())], dtype=torch.float64) for each in (row, other))
    return "bitwise" if torch.equal(x, y) else f"{float((x - y).norm() / y.norm()):.0e}"


def schedule(setting: Setting, row: Row) -> str:
    if setting.options is None:
        return "`higher`, one graph"
    if not setting.options:
        return "all"
    if "folder" in setting.options:
        return "all, on disk"
    return f'`memory="{setting.options["memory"]}"`'


def table(rows: dict[int, Row]) -> list[str]:
    lines = [
        "| problem | steps | kept | slots | steps taken again | MB | MB of tensors | × plain training | g a step | "
        "against all kept | target |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for i, row in rows.items():
        setting = SETTINGS[i]
        reference = next((j for j in rows if keeps_all(SETTINGS[j]) and same_training(SETTINGS[j], setting)), None)
        against = "–" if reference in (None, i) else difference(row, rows[reference])
        words = {"g_a_step": "g a step", "times_plain": "×", "megabytes": "MB"}
        targets = [
            f"≤ {bound:g} {words[name]}: {'met' if getattr(row, name) <= bound else '**missed**'}"
            for name, bound in setting.targets.items()
        ]
        tensors = "" if row.tensors is None else f"{row.tensors:.0f}"
        mb = f"{row.megabytes:.0f}" if row.megabytes >= 10 else f"{row.megabytes:.2f}"
        lines.append(
            f"| {setting.what}, {setting.optimizer} | {setting.steps:,} | {schedule(setting, row)} | "
            f"{row.slots or ''} | {'' if row.replayed is None else row.replayed} | {mb} | {tensors} | "
            f"{row.times_plain:.2f} | {row.g_a_step:.2f} | {against} | {'; '.join(targets)} |"
        )
    return lines


def keeps_all(setting: Setting) -> bool:
    return setting.options is not None and "memory" not in setting.options


def same_training(one: Setting, other: Setting) -> bool:
    return (one.what, one.optimizer, one.steps) == (other.what, other.optimizer, other.steps)


def against_higher(rows: dict[int, Row]) -> str:
    theirs = next((row for i, row in rows.items() if SETTINGS[i].options is None), None)
    ours = next((row for i, row in rows.items() if SETTINGS[i].options == {"memory": "auto"}), None)
    if theirs is None or ours is None:
        return "The library `higher` was not measured when this page was written."
    ratio = min(theirs.megabytes / ours.megabytes, (theirs.tensors or 0.0) / (ours.tensors or 1.0))
    return (
        f'At 100 steps of P2, `memory="auto"` takes {ratio:.1f} times less memory than `higher`, by the less '
        f"favourable of both memory columns (target: at least 8 times, {'met' if ratio >= 8 else '**missed**'}), "
        f"and {ours.g_a_step / theirs.g_a_step:.2f} times its processor time."
    )


def page(rows: dict[int, Row]) -> str:
    return "\n".join(
        [
            "# Benchmarks: unrolled training",
            "",
            "Written by `python benchmarks/unrolled.py --write docs/benchmarks-unrolled.md`.",
            "",
            f"{versions_line()} Each row in a process of its own, in which plain training and differentiating it take "
            "turns; medians of processor time.",
            "",
            "What it costs to differentiate the validation loss through T training steps with [`unrolled`]"
            "(backends/unrolled.md), by what is kept of them. P2 is a perceptron 784-256-256-10, batch 256, with a "
            "decay per layer, whose iterates take 2.2 MB with SGD and momentum and 3.2 MB with Adam; the tiny model "
            "has 99 weights. All in float32.",
            "",
            *table(rows),
            "",
            "- **kept**: everything, on disk or in memory, or as many iterates as the budget holds; **slots**: how "
            "many those are. Steps between them are taken again.",
            "- **MB**: the largest memory of the process during the first call, beyond what it held with model and "
            "data; the graph of one step, the endpoint and the adjoint are in it. **MB of tensors**: the same as "
            "torch's allocator counts it. The budget is for the iterates alone.",
            "- **g** is one forward and backward of the training loss. A plain training step takes about one. "
            "Differentiating one takes a gradient forward, and backward a gradient with its graph and a product.",
            "- **against all kept**: the largest difference that keeping less makes to the hypergradient.",
            "",
            against_higher(rows),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="write the docs page")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of rows")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row is not None:
        print(json.dumps(asdict(measure(Setting(**json.loads(arguments.row)), arguments.folder))))
        return
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, setting in enumerate(SETTINGS):
            if arguments.only is not None and i not in arguments.only:
                continue
            if setting.options is None and find_spec("higher") is None:
                print("The library 'higher' is not installed; its row is left out. `pip install --no-deps higher`.")
                continue
            started = time.perf_counter()
            rows[i] = measured(setting, folder)
            print(table({i: rows[i]})[-1], f"[{time.perf_counter() - started:.0f} s]", flush=True)
            if arguments.write is not None:  # as far as it got
                arguments.write.write_text(page(rows))
    print(*table(rows), against_higher(rows), sep="\n")


if __name__ == "__main__":
    main()
