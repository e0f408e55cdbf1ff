"""Several processes: the time of an outer step in one and in two, what of it is spent on messages, and what follows.

    python benchmarks/distributed.py --write docs/benchmarks-distributed.md

What two processes take is measured here, by gloo between two cores. What 8, 64 and 512 would take is calculated, from
the bytes and messages that were counted and from bandwidths that are stated, and is marked as calculated.
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
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributions import constraints

sys.path.insert(0, str(Path(__file__).parents[1]))

import hyperopt_implicit as hi
from benchmarks.versions import versions_line

BATCH = 512
TERMS = 5
INNER = 5
STEPS = 9  # outer steps that are timed, after one that is not
SIZES = {"small": [32, 32, 1], "medium": [256, 256, 256, 1], "larger": [512, 1024, 1024, 1]}
PROCESSES = (8, 64, 512)


@dataclass
class Measured:
    """Of the quickest of some outer steps, in one of the processes."""

    parameters: int
    seconds: float
    waiting: float
    messages: float
    sent: float


@dataclass(frozen=True)
class Link:
    """A way to send: its name, bytes a second, seconds for a message without contents."""

    name: str
    bandwidth: float
    latency: float

    def all_reduce(self, count: int, size: float) -> float:
        """Seconds of a ring all-reduce among ``count`` processes."""
        return 2 * (count - 1) / count * size / self.bandwidth + 2 * (count - 1) * self.latency


# ------------------------------------------------------------------------------------------------------- in a process


def network(sizes: list[int]) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def problem(sizes: list[int], rank: int, count: int) -> hi.BilevelProblem:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, sizes[0], generator=generator)
    batch = (x[rank::count], torch.tanh(x.sum(1, keepdim=True))[rank::count])

    @hi.hyperparameter("decay", init=3.0, constraint=constraints.positive)
    def training_loss(model: nn.Module, batch: tuple[Tensor, Tensor], *, decay: Tensor) -> Tensor:
        penalty = torch.stack([p.square().sum() for p in model.parameters()]).sum()
        return (model(batch[0]) - batch[1]).square().mean() + 0.5 * decay * penalty

    def validation_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    return hi.BilevelProblem(
        network(sizes),
        training_loss,
        validation_loss,
        training_data=[batch],
        validation_data=[batch],
        optimizer=lambda params: torch.optim.SGD(params, lr=0.01),
    )


class Meter:
    """Counts messages and their bytes, and the time until they were answered."""

    def __init__(self) -> None:
        self.seconds, self.messages, self.sent = 0.0, 0, 0
        send = distributed.all_reduce

        def metered(message: Tensor, *args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            result = send(message, *args, **options)
            self.seconds += time.perf_counter() - started
            self.messages += 1
            self.sent += message.numel() * message.element_size()
            return result

        distributed.all_reduce = metered

    def take(self) -> tuple[float, int, int]:
        found = self.seconds, self.messages, self.sent
        self.seconds, self.messages, self.sent = 0.0, 0, 0
        return found


def outer_steps(sizes: list[int], rank: int, count: int) -> Measured:
    meter = Meter() if count > 1 else None
    seconds, metered = [], []
    last = time.perf_counter()

    def callback(record: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds.append(now - last)
        metered.append(meter.take() if meter is not None else (0.0, 0, 0))
        last = now

    made = problem(sizes, rank, count)
    backend = {"name": "neumann", "terms": TERMS, "step_size": 0.01, "measure_residual": False}
    hi.optimize(
        made, backend, outer_steps=STEPS + 1, inner_steps=INNER, callbacks=[callback], tracking=False, progress=False
    )
    quickest = min(range(1, STEPS + 1), key=lambda step: seconds[step])
    parameters = sum(p.numel() for p in made.params.values())
    return Measured(parameters, seconds[quickest], *metered[quickest])


def median_time(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats + 2):
        distributed.barrier()
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def overlap(sizes: list[int], rank: int, count: int) -> tuple[float, float]:
    """Seconds of a backward and the mean of its gradients: one message after it, or one for each in its midst."""
    made = problem(sizes, rank, count)
    params = list(made.params.values())
    (batch,) = made.training_data  # type: ignore[misc]
    values = made.hyperparameters.values()

    def after() -> None:
        made.share_of_training_loss(batch, values).backward(inputs=params)
        row = torch.cat([p.grad.reshape(-1) for p in params if p.grad is not None])
        distributed.all_reduce(row)
        row.div_(count)
        for p, piece in zip(params, row.split([p.numel() for p in params]), strict=True):
            p.grad = piece.view_as(p)
        for p in params:
            p.grad = None

    one = median_time(after, 15)
    waiting: list[Any] = []
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p: waiting.append(distributed.all_reduce(p.grad, async_op=True)))
        for p in params
    ]

    def amid() -> None:
        waiting.clear()
        made.share_of_training_loss(batch, values).backward(inputs=params)
        for each in waiting:
            each.wait()
        for p in params:
            p.grad.div_(count)  # type: ignore[union-attr]
            p.grad = None

    many = median_time(amid, 15)
    for hook in hooks:
        hook.remove()
    return one, many


def worker(rank: int, count: int, folder: Path) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    if count > 1:
        distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=count)
        found["latency"] = median_time(lambda: distributed.all_reduce(torch.ones(1)), 200)
        large = torch.ones(2**22)
        found["large"] = median_time(lambda: distributed.all_reduce(large), 15)
        found["large_bytes"] = 4 * large.numel()
        found["overlap"] = {name: overlap(sizes, rank, count) for name, sizes in SIZES.items()}
    found["steps"] = {name: asdict(outer_steps(sizes, rank, count)) for name, sizes in SIZES.items()}
    if count > 1:
        distributed.destroy_process_group()
    (folder / f"{count}-{rank}.json").write_text(json.dumps(found))


# ----------------------------------------------------------------------------------------------------------- the page


def measure() -> tuple[dict[str, Any], dict[str, Any]]:
    """What one process finds, and what the first of two does."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in (1, 2):
            command = [sys.executable, __file__, "--worker"]
            processes = [subprocess.Popen([*command, str(rank), str(count), name]) for rank in range(count)]
            if any(each.wait() for each in processes):
                raise RuntimeError(f"a process of {count} failed")
        return json.loads((folder / "1-0.json").read_text()), json.loads((folder / "2-0.json").read_text())


def page(one: dict[str, Any], two: dict[str, Any], load: float) -> str:
    # of a ring of two: every byte goes once, and a message without contents takes two hops
    bandwidth, latency = two["large_bytes"] / two["large"], two["latency"] / 2
    links = [
        Link("gloo, as measured here", bandwidth, latency),
        Link("100 Gb/s network (assumed: 12.5 GB/s, 5 µs a hop)", 12.5e9, 5e-6),
        Link("NVLink (assumed: 300 GB/s, 2 µs a hop)", 300e9, 2e-6),
    ]
    lines = [
        "# Several processes",
        "",
        f"An outer step is {INNER} inner steps and a hypergradient by `neumann` with {TERMS} terms, on a batch "
        f"of {BATCH} rows in float32: all of it in one process, or half of it in each of two, on two cores. The "
        f"quickest of {STEPS} steps, by the clock on the wall: other work on the same cores is in it, and numbers of "
        f"another day differ by tens of percent. Before the measurement {load:.1f} other processes were running on "
        f"{os.cpu_count()} cores, on average over a minute. What is sent is counted, and exact.",
        "",
        f"{versions_line()} Command: `make benchmark-distributed`",
        "(`python benchmarks/distributed.py --write docs/benchmarks-distributed.md`).",
        "",
        "## Measured: one process and two",
        "",
        "| network | parameters | one process, ms | two processes, ms | of that on messages | messages | MB sent |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in SIZES:
        alone, both = Measured(**one["steps"][name]), Measured(**two["steps"][name])
        lines.append(
            f"| {name} | {both.parameters:,} | {1e3 * alone.seconds:.1f} | {1e3 * both.seconds:.1f} | "
            f"{both.waiting / both.seconds:.0%} | {both.messages:.0f} | {both.sent / 1e6:.2f} |"
        )
    lines += [
        "",
        "“On messages” is the time inside all-reduce, which includes waiting for the other process to arrive there. "
        "A hypergradient sends a row of the size of w once for ∂F/∂w, once for ∂L/∂w and once for each product; the "
        "mixed derivative sends a row of the size of λ, and each loss one number. An inner step sends its gradient "
        "once.",
        "",
        f"gloo between two processes here: {1e6 * two['latency']:.0f} µs for one number, and "
        f"{two['large_bytes'] / 1e6:.0f} MB in {1e3 * two['large']:.1f} ms, which is {bandwidth / 1e9:.2f} GB/s.",
        "",
        "## Measured: sending in the midst of the backward",
        "",
        "One message after the backward, which is what is done here, beside a message for each parameter as soon as "
        "its gradient is there, which the backward then overlaps. Forward, backward and mean, medians, ms:",
        "",
        "| network | one message after it | a message each, overlapped |",
        "|---|---|---|",
    ]
    ratios = []
    for name in SIZES:
        after, amid = two["overlap"][name]
        ratios.append(amid / after)
        lines.append(f"| {name} | {1e3 * after:.2f} | {1e3 * amid:.2f} |")
    lines += [
        "",
        f"Overlapped, it takes {min(ratios):.2f} to {max(ratios):.2f} times as long: many messages cost their latency "
        "each, and while both cores compute there is none left to send. With NCCL on GPUs, which send while they "
        "compute, that may be otherwise; it was not measured.",
        "",
        "## Calculated: 8, 64 and 512 processes",
        "",
        "**Not measured.** Time on messages in one outer step, from the messages and bytes counted above, by "
        "the formula of a ring: 2(N − 1)/N · bytes/bandwidth + 2(N − 1) · latency for each all-reduce. Nothing is "
        "overlapped, nobody waits for anybody, and the network is the same between any two.",
        "",
        "| network | link | " + " | ".join(f"{count} processes, ms" for count in PROCESSES) + " |",
        "|---|---|" + "---|" * len(PROCESSES),
    ]
    for name in SIZES:
        both = Measured(**two["steps"][name])
        for link in links:
            each = [both.messages * link.all_reduce(count, both.sent / both.messages) for count in PROCESSES]
            lines.append(f"| {name} | {link.name} | " + " | ".join(f"{1e3 * t:.2f}" for t in each) + " |")
    lines += [
        "",
        "Small models are bound by the latency of each message, which grows with the ring; large ones by bytes, of "
        "which each process sends hardly more for more processes. For small messages NCCL uses trees, whose latency "
        "grows with log N: the ring is the pessimistic case.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", type=Path)
    parser.add_argument("--worker", nargs=3, metavar=("RANK", "COUNT", "FOLDER"))
    arguments = parser.parse_args()
    if arguments.worker is not None:
        worker(int(arguments.worker[0]), int(arguments.worker[1]), Path(arguments.worker[2]))
        return
    load = os.getloadavg()[0]
    text = page(*measure(), load)
    print(text)
    if arguments.write is not None:
        arguments.write.write_text(text)


if __name__ == "__main__":
    main()
