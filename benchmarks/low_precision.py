"""What bfloat16 and compiling do to the cost of a product and of a hypergradient: one thread, interleaved, medians.

python benchmarks/low_precision.py                                      print the tables
python benchmarks/low_precision.py --write docs/benchmarks-precision.md     and write the docs page
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from problems import ALL, Case, data_cleaning, perceptron
from timing import keep_freed_memory
from torch._inductor.utils import fresh_cache
from versions import versions_line

import hyperopt_implicit as hi
from hyperopt_implicit.compiled import CompiledHessian
from hyperopt_implicit.operators import Hessian, LossHessian
from hyperopt_implicit.tracing import Call, program
from hyperopt_implicit.vectors import Params, add, clone, norm

WARM_UP = 200
OUTER, INNER = 40, 10
LOWERED = {"float32": None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Product:
    """The cost of curvature in one form; times in seconds.

    Attributes:
        form: precision, and whether compiled.
        begin: what is done once for a hypergradient.
        multiply: a product.
        error: of the product with ∂F/∂w, against float32 by autograd.
        compiling: what had to be compiled for it.
    """

    form: str
    begin: float
    multiply: float
    error: float
    compiling: float = 0.0


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median processor time of each, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 2):
        for name, call in calls.items():
            started = time.thread_time()
            call()
            if i >= 2:
                times[name].append(time.thread_time() - started)
    return {name: statistics.median(each) for name, each in times.items()}


def processor_seconds() -> float:
    """Of this process and of the compilers that it has run."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def trained(case: Case) -> hi.BilevelProblem:
    problem = case.make()
    values = problem.hyperparameters.values()
    for _ in range(WARM_UP):
        hi.inner_loop.train_step(problem, case.training_batch, values)
    return problem


def gradient_of(case: Case, problem: hi.BilevelProblem) -> Callable[[], object]:
    """One forward and backward of the training loss, the unit g."""
    params = list(problem.params.values())

    def gradient() -> object:
        loss = case.training_loss(problem.model, case.training_batch, **problem.hyperparameters.values())
        return torch.autograd.grad(loss, params, allow_unused=True)

    return gradient


def relative(x: Params, y: Params) -> float:
    return norm(add(x, y, -1.0)) / norm(y)


def products(case: Case, rounds: int) -> tuple[float, list[Product]]:
    """g in seconds, and all four forms of the product."""
    problem, batches = trained(case), [case.training_batch]
    vector = clone(hi.operators.validation_gradients(problem, case.validation_batch)[1])
    made: dict[str, Callable[[], LossHessian]] = {}
    compiling: dict[str, float] = {}
    for name, lowered in LOWERED.items():
        made[name] = partial(Hessian, problem, batches, lowered)
        started = processor_seconds()
        halves = program(problem, Call.of(problem, batches, lowered, False))

        def run(halves: Any = halves, lowered: torch.dtype | None = lowered) -> LossHessian:
            return CompiledHessian(problem, halves, Call.of(problem, batches, lowered, False))

        run() @ vector
        compiling[f"{name}, compiled"] = processor_seconds() - started
        made[f"{name}, compiled"] = run
    held = {name: make() for name, make in made.items()}
    truth = held["float32"] @ vector
    times = medians(
        {
            "g": gradient_of(case, problem),
            **{f"begin {name}": make for name, make in made.items()},
            **{f"multiply {name}": partial(hessian.__matmul__, vector) for name, hessian in held.items()},
        },
        rounds,
    )
    rows = [
        Product(
            name,
            times[f"begin {name}"],
            times[f"multiply {name}"],
            relative(held[name] @ vector, truth),
            compiling.get(name, 0.0),
        )
        for name in made
    ]
    return times["g"], rows


@dataclass(frozen=True)
class Steady:
    """A hypergradient in the second half of a run: cost in g, and error against the exact one."""

    what: str
    cost: float
    error: float
    largest: float
    products: float


BF16, THROUGHOUT, COMPILED = {"precision": "bfloat16"}, {"precision": "bfloat16_throughout"}, {"compile": True}
FORMS: list[dict[str, Any]] = [
    {"name": "heavy_ball"},
    {"name": "heavy_ball", **COMPILED},
    {"name": "heavy_ball", **BF16},
    {"name": "heavy_ball", **BF16, **COMPILED},
    {"name": "heavy_ball", **THROUGHOUT, **COMPILED},
    {"name": "cg"},
    {"name": "cg", **BF16, "refinements": 0},
    {"name": "cg", **BF16},
    {"name": "neumann"},
    {"name": "neumann", **BF16},
]


def label(spec: dict[str, Any]) -> str:
    """A backend and its options, as they are written."""
    options = ", ".join(f"{name}={value!r}".replace("'", '"') for name, value in spec.items() if name != "name")
    return f"`{spec['name']}`" + (f", `{options}`" if options else "")


def steady(case: Case) -> tuple[float, list[Steady]]:
    """Ten inner steps, a hypergradient in each form with its state carried, and a step of Adam on the exact one."""
    problem = trained(case)
    outer = torch.optim.Adam(list(problem.hparams.values()), lr=1e-2)
    forms = {label(spec): hi.get_backend(spec, damping=case.damping) for spec in FORMS}
    exact = hi.get_backend("cg", tolerance=1e-7, max_iterations=300, damping=case.damping)
    states: dict[str, Any] = {name: {} for name in forms}
    carried: dict[str, Any] = {}
    gradient, unit = gradient_of(case, problem), []
    seen: dict[str, list[tuple[float, float, int]]] = {name: [] for name in forms}
    for _ in range(OUTER):
        values = problem.hyperparameters.values()
        for _ in range(INNER):
            hi.inner_loop.train_step(problem, case.training_batch, values)
        truth = exact.hypergradient(problem, [case.training_batch], case.validation_batch, carried)
        carried = truth.state
        for _ in range(2):
            started = time.thread_time()
            gradient()
            unit.append(time.thread_time() - started)
        for name, backend in forms.items():
            started = time.thread_time()
            result = backend.hypergradient(problem, [case.training_batch], case.validation_batch, states[name])
            seconds = time.thread_time() - started
            states[name] = result.state
            seen[name].append((seconds, relative(result.gradients, truth.gradients), result.hvps))
        for name, p in problem.hparams.items():
            p.grad = truth.gradients[name].clone()
        outer.step()
    g = statistics.median(unit)
    rows = []
    for name, each in seen.items():
        half = each[OUTER // 2 :]
        seconds, errors, hvps = zip(*half, strict=True)
        rows.append(
            Steady(
                name,
                statistics.median(seconds) / g,
                statistics.median(errors),
                max(errors),
                statistics.mean(hvps),
            )
        )
    return g, rows


def product_table(found: dict[str, tuple[float, list[Product]]]) -> list[str]:
    lines = [
        "| problem | product | once a hypergradient | a product | error of the product | compiling | pays after |",
        "|---|---|---|---|---|---|---|",
    ]
    for problem, (g, rows) in found.items():
        eager = {row.form: row for row in rows}
        for row in rows:
            pays, compiling = "", ""
            if row.compiling:
                gained = eager[row.form.split(",")[0]].multiply - row.multiply
                pays = f"{row.compiling / gained:,.0f} products" if gained > 0.0 else "never"
                compiling = f"{row.compiling:.0f} s"
            error = f"{row.error:.1e}" if row.form != "float32" else ""
            lines.append(
                f"| {problem} | {row.form} | {row.begin / g:.2f} g | {row.multiply / g:.2f} g | {error} | "
                f"{compiling} | {pays} |"
            )
            problem = ""
    return lines


def steady_table(found: dict[str, tuple[float, list[Steady]]]) -> list[str]:
    lines = [
        "| problem | backend | a hypergradient | median error | largest error | products |",
        "|---|---|---|---|---|---|",
    ]
    for problem, (_, rows) in found.items():
        for row in rows:
            lines.append(
                f"| {problem} | {row.what} | {row.cost:.2f} g | {row.error:.2%} | {row.largest:.2%} | "
                f"{row.products:.1f} |"
            )
            problem = ""
    return lines


def page(by_product: dict[str, tuple[float, list[Product]]], by_run: dict[str, tuple[float, list[Steady]]]) -> str:
    units = ", ".join(f"{name.split()[0]} {g * 1e3:.2f} ms" for name, (g, _) in by_product.items())
    table = product_table(by_product)
    never = ": here, where the last column says never" if any(line.endswith("| never |") for line in table) else ""
    return "\n".join(
        [
            "# Benchmarks: bfloat16 and compiled products",
            "",
            "`python benchmarks/low_precision.py --write docs/benchmarks-precision.md` writes this page. "
            + versions_line(),
            "",
            "g is one forward and backward of the training loss on a warm model, in the same process: " + units + ".",
            "",
            "## A Hessian-vector product",
            "",
            *table,
            "",
            "What is done once a hypergradient is the forward and the backward that keeps its graph, or the first of "
            "the compiled halves. The error is that of A·∂F/∂w in that form beside float32 by autograd. Compiling is "
            "tracing and torch's inductor for both halves, from an empty cache, in processor time; a backend that "
            "takes the mixed derivative with a product has a third part compiled when it is first used. `compile=True` "
            f"falls back to autograd, with a warning, where its products are not faster{never}.",
            "",
            "## A hypergradient, with the state carried",
            "",
            f"{INNER} inner steps, a hypergradient, a step of Adam (0.01) on the exact one; the second half of {OUTER} "
            "outer steps. Everything counts: ∂F/∂w, the graph, the products, the mixed derivative, and the work on "
            "vectors. The error is that against conjugate gradients to 10⁻⁷.",
            "",
            *steady_table(by_run),
            "",
            "Refinement in float32 costs a second graph and two float32 products a call. It pays where a call takes "
            "many products; with the state carried it takes a few, and `refinements=0` or no bfloat16 is the better "
            "choice.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="write the docs page")
    parser.add_argument("--rounds", type=int, default=15, help="turns in which products are timed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1  # the compilers are children then, and their time is known
    keep_freed_memory()
    logging.getLogger("hyperopt_implicit.compiled").setLevel(logging.WARNING)
    with fresh_cache(), warnings.catch_warnings():
        warnings.simplefilter("ignore", hi.HyperoptWarning)  # what is slower is in the table
        by_product, by_run = {}, {}
        for case in (make() for make in ALL):
            by_product[case.name] = products(case, arguments.rounds)
            print("\n".join(product_table({case.name: by_product[case.name]})), flush=True)
        for case in (perceptron(), data_cleaning()):
            by_run[case.name] = steady(case)
            print("\n".join(steady_table({case.name: by_run[case.name]})), flush=True)
    if arguments.write:
        arguments.write.write_text(page(by_product, by_run))


if __name__ == "__main__":
    main()
