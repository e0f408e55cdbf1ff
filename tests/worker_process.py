"""A worker of a study as a process of its own, which claims trials and tells them. Run by the tests of several workers.

    python worker_process.py work|hang URL STUDY TRIALS START

``work`` prints the number of each trial that it has run; ``hang`` claims one, prints its number and never ends it.
Both wait until the file START is there.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution

from hyperopt_implicit.heartbeats import Heartbeat
from hyperopt_implicit.storages import open_storage
from hyperopt_implicit.workers import claim, reclaim

KNOBS = {"lr": FloatDistribution(0.01, 1.0, log=True), "width": CategoricalDistribution([64, 128])}


def main(task: str, url: str, name: str, n_trials: str, start: str) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    open_storage("sqlite://")  # what it imports takes a while, and not the same one everywhere
    print("ready", flush=True)
    while not Path(start).exists():
        time.sleep(0.001)
    study = optuna.create_study(storage=open_storage(url), study_name=name, load_if_exists=True)
    reclaim(study)
    while (trial := claim(study, KNOBS, int(n_trials))) is not None:
        with Heartbeat(study, trial):
            print(trial.number, flush=True)
            if task == "hang":
                time.sleep(3600)
            time.sleep(0.005)  # so that others are there before all is done
            study.tell(trial, trial.params["lr"])


if __name__ == "__main__":
    main(*sys.argv[1:])
