"""Our hypergradients beside those of other libraries, on the four problems: cost, error and memory, in one process.

python benchmarks/peers.py                                     print the tables
python benchmarks/peers.py --write docs/benchmarks-peers.md    and write the docs page
python benchmarks/peers.py --problems 1 --seconds 1 --outer-steps 10    a quick look

The other libraries are those of benchmarks/peers.txt; the tables leave out what is not installed, and say so.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

import adapters
import torch
from closed_form import Quadratic
from peers_page import page
from problems import ALL
from races import Race, Row
from timing import keep_freed_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="write the docs page")
    parser.add_argument("--seconds", type=float, default=8.0, help="for each table of single hypergradients")
    parser.add_argument("--outer-steps", type=int, default=40, help="of the loop in which states are carried")
    parser.add_argument("--problems", type=int, nargs="*", default=[1, 2, 3, 4], help="by number")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)  # one library draws from the global generator
    keep_freed_memory()
    warnings.simplefilter("ignore", FutureWarning)  # two libraries use functorch by its old name
    started = time.perf_counter()
    found, missing = adapters.installed()
    checked = check(list(found.values()))
    rows: list[Row] = []
    dampings: dict[str, float] = {}
    for number in arguments.problems:
        case = ALL[number - 1]()
        dampings[case.name] = case.damping
        race = Race(case, torch.device(arguments.device), arguments.seconds, list(found.values()))
        for part in (race.at_one_point(), race.along_a_loop(arguments.outer_steps)):
            rows += part
            for row in part:
                print(row)
        print(f"{time.perf_counter() - started:.0f} s so far", file=sys.stderr)
    text = page(
        rows, checked, missing, dampings, torch.device(arguments.device), arguments.outer_steps, time.process_time()
    )
    if arguments.write is not None:
        arguments.write.write_text(text)
    else:
        print(text)


def check(modules: list[object]) -> dict[tuple[str, str], float]:
    """The error of every method on a quadratic with a closed form: the worst, undamped and damped."""
    worst: dict[tuple[str, str], float] = {}
    for damping in (0.0, 0.3):
        quadratic = Quadratic(damping)
        for method in quadratic.methods(modules):
            key = method.library, method.name
            worst[key] = max(worst.get(key, 0.0), quadratic.error(method))
    return worst


if __name__ == "__main__":
    main()
