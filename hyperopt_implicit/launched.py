"""The group of processes that ``torchrun`` has started for one run of the command line: joined, and left.

A program of one's own makes its group itself, with ``torch.distributed.init_process_group``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed

from hyperopt_implicit.errors import CommandError


@contextmanager
def launched_group(device: str | None) -> Iterator[str | None]:
    """Inside, this process is one of those that a launcher has started, where it has started several.

    Messages go by gloo from memory, and by NCCL from GPUs. A process whose body raises leaves without a word to the
    others: its end is what they notice.

    Args:
        device: the one asked for; ``cuda`` stands for the GPU whose number is that of the process on its machine.

    Yields:
        The device of this process.

    Raises:
        CommandError: the processes do not find each other.
    """
    said = os.environ
    starts = said.get("WORLD_SIZE", "1").isdigit() and int(said.get("WORLD_SIZE", "1")) > 1
    if not starts or "RANK" not in said or "MASTER_ADDR" not in said or distributed.is_initialized():
        yield device
        return
    gpu = torch.cuda.is_available() and distributed.is_nccl_available()
    if device == "cuda":
        device = f"cuda:{said.get('LOCAL_RANK', '0')}"
    if gpu and device is not None and device.startswith("cuda:"):
        torch.cuda.set_device(device)
    try:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    except (RuntimeError, ValueError) as error:
        raise CommandError(
            f"the {said['WORLD_SIZE']} processes that were started must find each other at "
            f"{said['MASTER_ADDR']}:{said.get('MASTER_PORT')}; they do not (torch says: {str(error).splitlines()[0]}). "
            "Start them with torchrun, or unset WORLD_SIZE for a run in one process."
        ) from error
    yield device
    distributed.barrier()  # one that leaves while another still talks can abort it
    distributed.destroy_process_group()
