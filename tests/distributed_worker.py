"""One process of a group, run by the tests of several processes.

    python distributed_worker.py TASK RANK COUNT FOLDER SECONDS

What a task has found is left in FOLDER, and an error of this project is printed as one line.
"""

from __future__ import annotations

import datetime
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed

sys.path.insert(0, str(Path(__file__).parents[1]))

import hyperopt_implicit as hi
from tests import distributed_scripts, distributed_tasks


def main(task: str, rank: str, count: str, folder: str, seconds: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(100 + int(rank))  # as processes are seeded that were not told to be alike
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/group-{task}".replace(" ", "_"),
        rank=int(rank),
        world_size=int(count),
        timeout=datetime.timedelta(seconds=float(seconds)),
    )
    share = distributed_tasks.share_of(int(rank), int(count))
    found: Any
    if task == "shared":
        found = {name: run(share) for name, run in distributed_tasks.shared_tasks().items()}
    else:
        try:
            found = getattr(distributed_scripts, task)(share)
        except hi.HyperoptError as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            leave(3)
    (Path(folder) / f"{task}-{rank}").write_bytes(pickle.dumps(found))
    torch.distributed.destroy_process_group()
    leave(0)


def leave(code: int) -> None:
    """End here and now: a thread of gloo's that still waits may abort a process in the course of an ordinary end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
