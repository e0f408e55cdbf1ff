"""What our backends and our loop cost, against the same thing written by hand: one thread, interleaved, medians.

python benchmarks/hypergradient.py                          print the tables
python benchmarks/hypergradient.py --write docs/benchmarks.md   and write the docs page
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import auxiliary
import by_hand
import loop
import torch
from problems import ALL, Case
from timing import interleaved, keep_freed_memory
from versions import versions_line

import hyperopt_implicit as hi
from hyperopt_implicit.diagnostics.measuring import peak_bytes
from hyperopt_implicit.tracking import Tracker

TERMS = 10
STEP_SIZE = 0.01  # small enough for every problem, so that the series takes all its terms


@dataclass(frozen=True)
class Row:
    """One comparison."""

    problem: str
    what: str
    by_hand_ms: float
    ratio: float
    allowed: float
    difference: float
    memory_ratio: float


def compare_backend(case: Case, what: str, spec: dict[str, object], solve: by_hand.Solver, seconds: float) -> Row:
    problem = case.make()
    values = problem.hyperparameters.values()
    for _ in range(200):
        hi.inner_loop.train_step(problem, case.training_batch, values)
    backend = hi.get_backend(spec)
    raw = {name: p.detach().clone().requires_grad_() for name, p in problem.hparams.items()}

    def ours() -> hi.Hypergradient:
        return backend.hypergradient(problem, [case.training_batch], case.validation_batch, {})

    def theirs() -> list[torch.Tensor]:
        return by_hand.hypergradient(case, problem.model, raw, solve)

    result, expected = ours(), theirs()
    assert result.hvps == TERMS, (result.hvps, result.status)
    error = max(
        float((g - e).norm() / e.norm().clamp_min(1e-30))
        for g, e in zip(result.gradients.values(), expected, strict=True)
    )
    mine, hand = interleaved(ours, theirs, seconds)
    memory = peak_bytes(ours) / peak_bytes(theirs)
    gradient_ms = _gradient_milliseconds(case, problem)
    return Row(case.name, what, hand * 1e3, mine / hand, 1.15 if gradient_ms < 0.5 else 1.05, error, memory)


def _gradient_milliseconds(case: Case, problem: hi.BilevelProblem) -> float:
    values = problem.hyperparameters.values()

    def gradient() -> None:
        loss = case.training_loss(problem.model, case.training_batch, **values)
        torch.autograd.grad(loss, list(problem.params.values()))

    return interleaved(gradient, lambda: None, 0.3)[0] * 1e3


def memory_by_terms(case: Case) -> dict[int, float]:
    """Peak memory in MB for several numbers of terms."""
    problem = case.make()
    found = {}
    for terms in (1, 10, 50):
        backend = hi.get_backend("neumann", terms=terms, step_size=STEP_SIZE)
        found[terms] = (
            peak_bytes(lambda b=backend: b.hypergradient(problem, [case.training_batch], case.validation_batch, {}))
            / 1e6
        )
    return found


def tracking_costs(calls: int = 200) -> dict[str, float]:
    """Milliseconds for which a caller is held up: by our tracker for one outer step, and by one bare ``log_metric``."""
    from mlflow import MlflowClient

    metrics = {f"group/metric_{i}": float(i) for i in range(15)}
    with tempfile.TemporaryDirectory() as folder:
        uri = f"sqlite:///{folder}/mlflow.db"
        previous = Path.cwd()
        os.chdir(folder)
        try:
            tracker = Tracker(hi.Tracking(uri=uri, local_copy=folder))
            ours = [_milliseconds(lambda step=step: tracker.log_metrics(metrics, step)) for step in range(calls)]
            client, run_id = MlflowClient(tracking_uri=uri), tracker.run_id
            tracker.end()
            bare = [_milliseconds(lambda i=i: client.log_metric(run_id, "bare", 1.0, step=i)) for i in range(calls)]
        finally:
            os.chdir(previous)
    return {"our tracker, 15 metrics": statistics.median(ours), "a bare log_metric, 1 metric": statistics.median(bare)}


def _milliseconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="write the docs page")
    parser.add_argument("--seconds", type=float, default=6.0, help="time for each comparison")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = []
    for make in ALL:
        case = make()
        for what, spec, solve in (
            ("neumann", {"name": "neumann", "terms": TERMS, "step_size": STEP_SIZE}, by_hand.neumann(TERMS, STEP_SIZE)),
            (
                "cg",
                {"name": "cg", "max_iterations": TERMS, "tolerance": 0.0, "damping": case.damping},
                by_hand.conjugate_gradient(TERMS, case.damping),
            ),
        ):
            rows.append(compare_backend(case, what, spec, solve, arguments.seconds))
            print(rows[-1])
    memory = memory_by_terms(ALL[1]())
    print(memory)
    costs = tracking_costs()
    print(costs)
    loop_rows = loop.rows(arguments.seconds)
    print(*loop_rows, sep="\n")
    auxiliary_rows = auxiliary.rows(arguments.seconds)
    print(*auxiliary_rows, sep="\n")
    if arguments.write is not None:
        sections = [page(rows, memory), *loop.section(loop_rows), *_tracking(costs), *auxiliary.section(auxiliary_rows)]
        arguments.write.write_text("\n".join(sections))


def page(rows: list[Row], memory: dict[int, float]) -> str:
    """The docs page."""
    lines = [
        "# Benchmarks",
        "",
        "Written by `make benchmark` (`python benchmarks/hypergradient.py --write docs/benchmarks.md`).",
        "",
        f"{versions_line()} Medians of runs that take turns in one process; processor time for single hypergradients, "
        "with an allocator that keeps freed memory.",
        "",
        "## A hypergradient, against the same loop written by hand",
        "",
        f"{TERMS} Hessian-vector products on a retained graph in both. The loop by hand has no checks, no functional "
        "view of the losses, and reports nothing; ours swaps parameters functionally, computes the residual and the "
        "direct term.",
        "",
        "| problem | backend | by hand | ours / by hand | allowed | memory, ours / by hand | difference of the "
        "result |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.problem} | `{row.what}` | {row.by_hand_ms:.1f} ms | {row.ratio:.3f} | {row.allowed:.2f} | "
            f"{row.memory_ratio:.3f} | {row.difference:.0e} |"
        )
    lines += [
        "",
        "Allowed is 1.05, or 1.15 where a training gradient takes under 0.5 ms; memory may be 1.1 times the loop's.",
        "",
        "Peak memory of `neumann` on P2, beyond model and data: "
        + ", ".join(f"{mb:.2f} MB with {terms} terms" for terms, mb in memory.items())
        + ".",
        "",
    ]
    return "\n".join(lines)


def _tracking(costs: dict[str, float]) -> list[str]:
    return [
        "",
        "For one outer step, tracking holds up its caller for "
        + ", against ".join(f"{ms:.3f} ms ({what})" for what, ms in costs.items())
        + ".",
        "",
    ]


if __name__ == "__main__":
    main()
