"""The docs page of the comparison with other libraries; every sentence with a number in it is made from the rows."""

from __future__ import annotations

from collections.abc import Callable

import adapters
import torch
from adapters.ours import OURS
from races import Row
from versions import versions_line

MARGIN = 0.03
"""Differences of less than this are not called differences."""

ROUNDING = 1e-5
"""Errors below this are those of float32, and not compared."""

WRONG = {
    ("hypergrad", "`conjugate_gradient`"): (
        "takes each new direction from the residual before the last update (`_ps = foreach(rs, ps, …)`), so that the "
        "directions are not conjugate and more iterations do not help"
    ),
    ("betty", "`cg`"): (
        "does the same (`p_new` from `r` instead of `r_new`); with any `cg_alpha` but 1 its step lengths are off as "
        "well"
    ),
}
"""What methods do that fail on the quadratic, as read in their source; shown where they do fail."""

LIBRARY_NOTES = (
    "hypergrad: functions of objectives on `torch.func`'s predecessor, as they are. Its products are forward over "
    "reverse and linearise anew each time. `lr=1` in `conjugate_gradient`, where any other value scales the residual "
    "wrongly.",
    "boat-torch: operations `NS` (the fixed-point iteration of one step of gradient descent, which is the Neumann "
    "series), `CG` and `RAD`, called as `Problem.run_iter` calls them, without the two further losses that it "
    "evaluates and logs to a file at each iteration. Step size by the lower optimizer's learning rate; iterations in "
    "`CG.k`, for `NS` too; `CG.tolerance` 0, since `CG` returns the iterate before the last where it stops by "
    "tolerance.",
    "torchopt: `custom_root` with `solve_inv(ns=True)` or `solve_cg`, damping by its `ridge`; `MetaSGD`, with the "
    "weights put back by `recover_state_dict`. In the loop, `solve_cg` is given its last solution as `init`, by a "
    "wrapper of three lines.",
    "betty-ml: two `ImplicitProblem`s under an `Engine`; what is measured is the upper problem's loss and backward, as "
    "in its own step. It raises where the validation loss leaves a weight unused (P3), so zero times their sum is "
    "added there. Its `darts` needs no products and is another kind of method, and is left out. Releases after 0.1.1 "
    "ask for a Python below 3.11; the code of both methods is the same in them.",
    "higher: `innerloop_ctx` around the losses and a `torch.optim.SGD`.",
)

NOT_INSTALLABLE = (
    "The bilevel `hypertorch` is not on PyPI: the package of that name there is about hypergraphs. Libraries for JAX "
    "are not compared here."
)


def page(
    rows: list[Row],
    checked: dict[tuple[str, str], float],
    missing: dict[str, str],
    dampings: dict[str, float],
    device: torch.device,
    outer_steps: int,
    seconds: float,
) -> str:
    """The whole page.

    Args:
        rows: what was measured.
        checked: the error of each method on the quadratic, by library and name.
        missing: libraries that could not be imported, and why.
        dampings: δ by problem.
        device: where it was measured.
        outer_steps: of the loop.
        seconds: of processor time that all of it took.
    """
    where = "" if device.type == "cpu" else f" on {torch.cuda.get_device_name(device)}"
    problems = list(dict.fromkeys(row.problem for row in rows))
    lines = [
        f"# Beside other libraries{where}",
        "",
        "Written by `make benchmark-peers` (`python benchmarks/peers.py --write docs/benchmarks-peers.md`).",
        "",
        f"{versions_line()} Others: {adapters.versions()}."
        + "".join(f" {name} could not be imported ({why})." for name, why in missing.items()),
        "",
        "All methods take turns in one process, at the same weights (after 200 training steps) and hyperparameters, "
        "after a warm-up; medians"
        + (" of processor time" if device.type == "cpu" else " of time, synchronised with the card")
        + ". **g** is one forward and backward of the training loss, measured in the same turns. The error is "
        "‖difference‖/‖exact‖, the cosine is with the exact hypergradient, memory is the peak beyond model and data. "
        "Exact is, for implicit methods, the theorem's value by conjugate gradients on a float64 copy to a residual of "
        "1e-10; for unrolled ones, autograd through the same steps in float64.",
        "",
        f"{damped(dampings)}Neumann series take α = 1/λ_max of the matrix, which is given to all alike and costs "
        "nothing here. With K products, every Neumann sum has K + 1 terms. Nyström's approximation has δ as its ρ, and "
        "0.01 where that is zero; with few columns its size goes like 1/ρ, so that its cosine says more than its "
        "error. `exact` forms the matrix, and is run where that has at most 2,000 rows. All of it took "
        f"{seconds:.0f} s of processor time.",
        "",
        "## Where others are ahead",
        "",
        *ahead(rows),
        "",
        "## At most 1 % error",
        "",
        *cheapest(rows, problems),
        "",
    ]
    for problem in problems:
        stateful = sum(row.carries for row in rows if row.problem == problem)
        lines += [f"## {problem}", ""]
        for kind, heading in (
            ("implicit", "One hypergradient from nothing, implicit:"),
            ("unrolled", "Ten steps of SGD, differentiated:"),
            (
                "steady",
                f"Along a loop of {outer_steps} outer steps (10 training steps; hypergradient; Adam with 0.01 on λ), "
                f"medians of the second half. The first {stateful} carry a state from step to step, and the mean of "
                "their cost counts its building up, from the first step on:",
            ),
        ):
            lines += [heading, "", *table([r for r in rows if r.problem == problem and r.kind == kind]), ""]
    lines += ["## Are the adapters to blame?", "", *blame(checked), "", "## How each library is used", ""]
    lines += [f"- {note}" for note in LIBRARY_NOTES] + ["", NOT_INSTALLABLE, ""]
    return "\n".join(lines)


def damped(dampings: dict[str, float]) -> str:
    """What everybody solves with."""
    found = [f"δ = {damping:g} on {problem[:2]}" for problem, damping in dampings.items() if damping]
    if not found:
        return ""
    return (
        f"Everybody solves with H + δ·I, in which no negative curvature is met; {', '.join(found)}, zero elsewhere: "
        "by an option where there is one (ours, torchopt), else by a proximal term ½·δ·‖w − w₀‖² in the training loss. "
    )


def table(rows: list[Row]) -> list[str]:
    """One table, ours in bold."""
    looped = any(row.kind == "steady" for row in rows)
    lines = [
        f"| library | method | work | cost | {'mean of all steps | ' if looped else ''}error | cosine | memory |",
        "|---" * (8 if looped else 7) + "|",
    ]
    for row in rows:
        library = "**ours**" if row.library == OURS else row.library
        mean = f"{row.mean:.1f} g | " if looped else ""
        lines.append(
            f"| {library} | {row.name} | {row.work} | {row.cost:.1f} g | {mean}{percent(row.error)} | "
            f"{row.cosine:.4f} | {row.megabytes:.2f} MB |"
        )
    return lines


def percent(error: float) -> str:
    """Two digits, and none below float32's rounding."""
    return "< 0.001 %" if error < ROUNDING else f"{100 * error:.2g} %" if error < 1 else f"{100 * error:.0f} %"


def ahead(rows: list[Row]) -> list[str]:
    """Where others are cheaper, more exact or smaller than ours of the same family with the same work."""
    criteria: tuple[tuple[str, Callable[[Row], float], Callable[[Row], str]], ...] = (
        ("Cheaper", lambda row: row.cost, lambda row: f"{row.cost:.1f} g"),
        ("More exact", lambda row: max(row.error, ROUNDING), lambda row: percent(row.error)),
        ("Less memory", lambda row: row.megabytes, lambda row: f"{row.megabytes:.2f} MB"),
    )
    lines = [
        "Each method of another library beside ours of the same family with the same number of products or steps; "
        f"differences of less than {100 * MARGIN:.0f} % are left out, and so are errors of float32's rounding. "
        "Nyström's columns are drawn at random, and its errors differ by the draw.",
        "",
    ]
    for word, value, shown in criteria:
        found: dict[str, list[str]] = {}
        for theirs, mine in pairs(rows):
            if value(theirs) < (1 - MARGIN) * value(mine):
                where = (
                    f"{theirs.problem[:2]}{', ' + KINDS[theirs.kind] if theirs.kind in KINDS else ''}, {theirs.work}"
                )
                found.setdefault(f"{theirs.library} {theirs.name}", []).append(
                    f"{where}: {shown(theirs)} against {shown(mine)}"
                )
        lines.append(f"- **{word}** than ours: {'none.' if not found else ''}")
        lines += [f"    - {name} ({'; '.join(each)})" for name, each in found.items()]
    worse = [theirs for theirs, mine in pairs(rows) if mine.cost < (1 - MARGIN) * theirs.cost]
    lines.append(
        f"- Of {len(pairs(rows))} such pairs, ours is cheaper in {len(worse)}, more exact in "
        f"{sum(max(m.error, ROUNDING) < (1 - MARGIN) * max(t.error, ROUNDING) for t, m in pairs(rows))}, and takes "
        f"less memory in {sum(m.megabytes < (1 - MARGIN) * t.megabytes for t, m in pairs(rows))}."
    )
    return lines


KINDS = {"steady": "loop"}


def pairs(rows: list[Row]) -> list[tuple[Row, Row]]:
    """Others' rows with the one of ours that does the same."""
    mine = {(r.problem, r.kind, r.family, r.work): r for r in rows if r.library == OURS}
    keys = [(r, (r.problem, r.kind, r.family, r.work)) for r in rows if r.library != OURS]
    return [(row, mine[key]) for row, key in keys if key in mine]


def cheapest(rows: list[Row], problems: list[str]) -> list[str]:
    """The least cost at an error of at most 1 %, ours and others', one line for each problem and kind."""
    lines = []
    for problem in problems:
        for kind, words in (("implicit", "at one point"), ("steady", "along the loop")):
            good = [r for r in rows if (r.problem, r.kind) == (problem, kind) and r.error <= 0.01]
            parts = []
            for who, some in (
                ("ours", [r for r in good if r.library == OURS]),
                ("others", [r for r in good if r.library != OURS]),
            ):
                best = min(some, key=lambda r: r.cost, default=None)
                name = "" if best is None else f"{best.name if who == 'ours' else best.library + ' ' + best.name}"
                parts.append(
                    f"{who} none"
                    if best is None
                    else f"{who} {best.cost:.1f} g ({name}, {best.work}, {percent(best.error)})"
                )
            lines.append(f"- {problem[:2]}, {words}: {'; '.join(parts)}.")
    return lines


def blame(checked: dict[tuple[str, str], float]) -> list[str]:
    """What the quadratic with a closed form says."""
    wrong = {key: error for key, error in checked.items() if not error < 1e-8}
    worst = max((error for key, error in checked.items() if key not in wrong), default=0.0)
    lines = [
        "Every adapter is run on a quadratic of five weights and three hyperparameters in float64, damped and not, and "
        "compared with the closed form of what the method promises (`benchmarks/closed_form.py`): "
        f"{len(checked) - len(wrong)} of {len(checked)} methods agree to {worst:.0e}.",
    ]
    for (library, name), error in wrong.items():
        cause = WRONG.get((library, name), "disagrees, for a reason that is not known")
        lines += [
            "",
            f"- {library} {name} is off by {percent(error)} there, after as many iterations as weights: it {cause}.",
        ]
    return lines
