"""What the tests of the command line share: files that define problems, and a way to run a command in this process."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest

from hyperopt_implicit import cli

FILE = """
import torch
import hyperopt_implicit as hi
from torch.distributions import constraints
from optuna.distributions import CategoricalDistribution, FloatDistribution

batch = (torch.linspace(-1, 1, 12).reshape(6, 2), torch.linspace(0, 1, 6).reshape(6, 1))

@hi.hyperparameter("decay", init=0.5, constraint=constraints.positive)
def training_loss(model, batch, *, decay):
    return (model(batch[0]) - batch[1]).square().mean() + decay * model.weight.square().sum()

def validation_loss(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()

@hi.knob("lr", FloatDistribution(0.01, 0.2))
@hi.knob("nesterov", CategoricalDistribution([True, False]))
def problem(*, lr, nesterov=False):
    assert isinstance(nesterov, bool)
    return hi.BilevelProblem(
        torch.nn.Linear(2, 1), training_loss, validation_loss, training_data=[batch], validation_data=[batch],
        optimizer=lambda params: torch.optim.SGD(params, lr=lr, momentum=0.5, nesterov=nesterov))
"""
FINISHED = FILE + "\nproblem = problem(lr=0.1)\n"


class Command:
    """Runs the entry point in this process; what it printed has its line breaks taken out."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: str, code: int = 0) -> str:
        self._monkeypatch.setattr(sys, "argv", ["hyperopt-implicit", *arguments])
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            with pytest.raises(SystemExit) as end:
                cli.main()
        out, err = self._capsys.readouterr()
        assert (end.value.code or 0) == code, out + err
        # errors go to stderr; that a check came out badly is its result
        assert bool(err) == (code != 0) or "Warning" in err or (code == 1 and "not right: " in out)
        return " ".join((out + err).split())
