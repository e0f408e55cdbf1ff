"""What is kept of the best trials: it comes back as it was, goes with its trial, and costs a search nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.artifacts import FileSystemArtifactStore
from torch import Tensor, nn

import hyperopt_implicit as hi
from hyperopt_implicit.errors import HyperoptWarning
from hyperopt_implicit.history import Result
from hyperopt_implicit.kept_trials import KeptTrials, TrialState

from .ridge import ridge

STATE = TrialState(
    model={"weight": torch.tensor([1.0, 2.0 / 3.0], dtype=torch.float64), "steps": torch.tensor(7)},
    hyperparameters={"decay": torch.tensor(0.1), "labels": {"weight": torch.tensor([0.25, 0.75])}},
    seed=7,
)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def kept_one(*where: Any) -> tuple[optuna.Study, KeptTrials]:
    """A study with one complete trial, whose state was kept."""
    study = optuna.create_study()
    kept = KeptTrials(study, *where)
    trial = study.ask()
    kept.keep(trial, STATE)
    study.tell(trial, 1.0)
    return study, kept


def same(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return left.dtype == right.dtype and torch.equal(left, right)


@pytest.mark.parametrize(
    ("artifacts", "storage", "folder"),
    [
        (None, None, None),
        (None, "sqlite:///deep/optuna.db", "deep/optuna.artifacts"),
        (None, "journal:///trials.log", "trials.artifacts"),
        (None, "postgresql://anna@db/studies", "optuna_artifacts"),
        ("models", "sqlite:///optuna.db", "models"),
        (Path("models"), None, "models"),
    ],
)
def test_state_comes_back_from_where_it_belongs(artifacts: Any, storage: Any, folder: str | None) -> None:
    study, kept = kept_one(artifacts, storage)
    files = [each for each in Path().rglob("*") if each.is_file()]
    assert [str(each.parent) for each in files] == ([] if folder is None else [folder])
    for reader in [kept] if folder is None else [kept, KeptTrials(study, artifacts, storage)]:
        state = reader.load(study.trials[0])
        assert state is not None
        assert same(state.model, STATE.model)
        assert same(state.hyperparameters, STATE.hyperparameters)
        assert state.seed == STATE.seed
    kept.forget(study.trials)
    assert not [each for each in Path().rglob("*") if each.is_file()]
    kept.forget(study.trials)  # another worker was faster
    if folder is None:
        assert kept.load(study.trials[0]) is None


def test_store_of_the_users_own(tmp_path: Path) -> None:
    study, kept = kept_one(FileSystemArtifactStore(tmp_path), "sqlite:///optuna.db")
    assert len(list(tmp_path.iterdir())) == 1
    assert kept.load(study.trials[0]) is not None


def test_trial_without_a_state_has_none() -> None:
    study, kept = kept_one("models", None)
    study.tell(study.ask(), 2.0)
    assert kept.load(study.trials[1]) is None


def test_folder_that_cannot_be_written_costs_a_warning() -> None:
    Path("models").write_text("a file")
    with pytest.warns(HyperoptWarning) as caught:
        study, kept = kept_one("models", None)
    (said,) = (str(each.message) for each in caught)
    assert re.fullmatch(r"the model of trial 0 could not be kept: .+\. The search goes on\.", said)
    assert kept.load(study.trials[0]) is None


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(b"PK\x03\x04 no more")])
def test_state_that_is_gone_or_damaged_is_an_error_that_says_which(damage: Any) -> None:
    study, kept = kept_one("models", None)
    damage(next(Path("models").iterdir()))
    with pytest.raises(hi.SearchError) as caught:
        kept.load(study.trials[0])
    message = f"the model of trial 0 of study {study.study_name!r} cannot be read: "
    assert str(caught.value).startswith(message)
    assert str(caught.value).endswith("name the folder or store that the search had with artifacts=.")


def test_state_cannot_run_code() -> None:
    """A pickle that does something when it is loaded does not."""

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (Path("exploded"),))

    study, kept = kept_one("models", None)
    torch.save({"model": Bomb(), "hyperparameters": {}, "seed": 0}, next(Path("models").iterdir()))
    with pytest.raises(hi.SearchError, match="cannot be read"):
        kept.load(study.trials[0])
    assert not Path("exploded").exists()


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))

    def forward(self, loss: Tensor) -> Tensor:
        return loss * self.logits.exp().sum()


def test_state_of_a_result_is_that_of_its_best_step() -> None:
    @hi.hyperparameter("mixing", init=lambda model: Mixing())
    def training_loss(model: nn.Module, batch: Any, *, mixing: Mixing) -> Tensor:
        x, y = batch
        return mixing((model(x) - y).square().mean())

    result: Result = hi.optimize(
        ridge(training_loss=training_loss), "cg", outer_steps=3, inner_steps=2, tracking=False, keep_best_model=True
    )
    state = TrialState.of(result, seed=3)
    assert result.best_model_state is not None
    assert same(state.model, result.best_model_state)
    best = result.best_hyperparameters["mixing"]
    assert isinstance(best, nn.Module)
    assert state.seed == 3
    assert same(state.hyperparameters, {"mixing": dict(best.state_dict())})
