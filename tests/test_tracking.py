"""What a run leaves in MLflow: in a real store, each number where it belongs and exactly once."""

from __future__ import annotations

import math
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from torch import Tensor, nn

import hyperopt_implicit as hi
from hyperopt_implicit.errors import HyperoptWarning
from hyperopt_implicit.tracking import Tracker

from .ridge import Batch, ridge, training_loss

QUIET = hi.Tracking(system_metrics=False)


@pytest.fixture
def client(workplace: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{workplace}/mlflow.db")


def optimize(problem: hi.BilevelProblem | None = None, backend: Any = "cg", **options: Any) -> hi.Result:
    defaults: dict[str, Any] = {"outer_steps": 5, "inner_steps": 2, "tracking": QUIET}
    return hi.optimize(ridge() if problem is None else problem, backend, **{**defaults, **options})


def run_of(client: MlflowClient, result: hi.Result) -> Run:
    assert result.run_id is not None
    return client.get_run(result.run_id)


def only_run(client: MlflowClient, experiment: str = "hyperopt_implicit") -> Run:
    found = client.get_experiment_by_name(experiment)
    (run,) = client.search_runs([found.experiment_id])
    return run


def series(client: MlflowClient, run_id: str | None, name: str) -> list[tuple[int, float]]:
    return [(each.step, each.value) for each in client.get_metric_history(run_id, name)]


def artifacts(client: MlflowClient, run_id: str | None, folder: str | None = None) -> list[str]:
    found = client.list_artifacts(run_id, folder)
    return sorted(
        path for each in found for path in (artifacts(client, run_id, each.path) if each.is_dir else [each.path])
    )


# ---------------------------------------------------------------------------------------------------- what is logged


def test_params_are_the_options_the_problem_and_the_versions(client: MlflowClient) -> None:
    result = optimize(backend={"name": "cg", "max_iterations": 7}, clip=2.5, seed=3, patience=4)
    params = run_of(client, result).data.params
    assert params["backend"] == "ConjugateGradient"
    assert params["backend.max_iterations"] == "7"
    assert params["backend.damping"] == "0.0"
    expected = {
        "outer_steps": "5",
        "inner_steps": "2",
        "warmup_steps": "0",
        "outer_optimizer": "Adam",
        "outer_lr": "0.01",
        "clip": "2.5",
        "hessian_batches": "1",
        "restart": "False",
        "patience": "4",
        "min_delta": "0.0",
        "on_failure": "warn",
        "max_failures": "10",
        "seed": "3",
        "model": "Weights",
        "model.parameters": "3",
        "inner_optimizer": "SGD",
        "hyperparameters": "1",
        "hyperparameter.decay": "GreaterThan(lower_bound=0.0)",
        "device": "cpu",
        "version.torch": torch.__version__,
    }
    assert {name: params.get(name) for name in expected} == expected
    assert {name for name in params if name.startswith("version.")} == {
        f"version.{name}" for name in ("hyperopt-implicit", "torch", "mlflow", "optuna", "python")
    }


def test_every_step_is_there_exactly_once(client: MlflowClient) -> None:
    result = optimize(outer_steps=30)
    recorded = {
        "loss/training": "training_loss",
        "loss/validation": "validation_loss",
        "loss/validation_sweep": "validation_loss_sweep",
        "solver/hypergradient_norm": "hypergradient_norm",
        "solver/iterations": "iterations",
        "solver/residual": "residual",
        "solver/products": "hvps",
        "solver/failed_inner_steps": "failed_inner_steps",
        "time/inner_seconds": "inner_seconds",
        "time/outer_seconds": "outer_seconds",
    }
    for metric, field in recorded.items():
        assert series(client, result.run_id, metric) == [(s.step, getattr(s, field)) for s in result.history], metric
    decays = [(each.step, each.hyperparameters["decay"]) for each in result.history]
    assert series(client, result.run_id, "hyperparameter/decay") == decays
    assert series(client, result.run_id, "solver/not_applied") == [(step, 0.0) for step in range(30)]
    metrics = run_of(client, result).data.metrics
    assert {name.split("/")[0] for name in metrics} == {"loss", "hyperparameter", "solver", "time", "summary"}
    assert metrics["summary/best_validation_loss"] == result.best_validation_loss
    assert metrics["summary/best_step"] == result.best_step
    assert metrics["summary/seconds"] == result.seconds


def test_large_hyperparameters_are_summarised_and_stored_whole(client: MlflowClient) -> None:
    @hi.hyperparameter("small", init=torch.full((20,), 0.1))
    @hi.hyperparameter("large", init=torch.linspace(0.1, 0.3, 21))
    @hi.hyperparameter("network", init=nn.Linear(3, 1))
    def loss(model: nn.Module, batch: Batch, *, small: Tensor, large: Tensor, network: nn.Module) -> Tensor:
        return (
            training_loss(model, batch, decay=small.sum() + large.sum())
            + network(batch[0]).mean() * model(batch[0]).mean()
        )

    result = optimize(
        ridge(training_loss=loss, optimizer=lambda params: torch.optim.SGD(params, lr=0.1)), outer_steps=2
    )
    names = {name for name in run_of(client, result).data.metrics if name.startswith("hyperparameter/")}
    assert names == {
        *(f"hyperparameter/small/{i}" for i in range(20)),
        *(f"hyperparameter/{name}/{part}" for name in ("large", "network") for part in ("min", "mean", "max")),
    }
    found = artifacts(client, result.run_id)
    assert "hyperparameters.png" in found
    for kind, values in (("last", result.hyperparameters), ("best", result.best_hyperparameters)):
        path = client.download_artifacts(result.run_id, f"hyperparameters/{kind}.pt")
        stored = torch.load(path, weights_only=True)
        assert torch.equal(stored["large"], values["large"])
        assert torch.equal(stored["network"]["weight"], values["network"].weight)


def test_artifacts_are_figures_history_source_and_states(client: MlflowClient) -> None:
    result = optimize()
    assert artifacts(client, result.run_id) == [
        "history.csv",
        "hyperparameters/best.pt",
        "hyperparameters/last.pt",
        "source/ridge.py",
        "state/hyperparameters.pt",
        "state/model.pt",
        "trajectories.png",
    ]
    for name, module in (("model", result.problem.model), ("hyperparameters", result.problem.hyperparameters)):
        state = torch.load(client.download_artifacts(result.run_id, f"state/{name}.pt"), weights_only=True)
        module.load_state_dict(state)
        assert all(torch.equal(state[key], value) for key, value in module.state_dict().items())
    source = Path(client.download_artifacts(result.run_id, "source/ridge.py")).read_text()
    assert source == Path(__file__).with_name("ridge.py").read_text()
    picture = Path(client.download_artifacts(result.run_id, "trajectories.png")).read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_figures_of_a_report_stay_in_their_folder(workplace: Path, client: MlflowClient) -> None:
    names = ["../../evil", "/tmp/evil", "..", "a/b", "a_b", "plain name"]

    class Drawn(hi.Report):
        def __call__(self, step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
            return None

        def figures(self) -> dict[str, Any]:
            from matplotlib.figure import Figure

            return {name: Figure() for name in names}

    result = optimize(callbacks=[Drawn()])
    drawn = {path for path in artifacts(client, result.run_id) if path.endswith(".png")}
    assert drawn - {"trajectories.png"} == {
        "______evil.png", "_tmp_evil.png", "__.png", "a_b.png", "a_b_.png", "plain name.png"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("../../evil", "__/__/evil"),
        ("/etc/passwd", "_/etc/passwd"),
        ("a/./b//c/", "a/_/b/_/c/_"),
        ("..b/c..d", "__b/c..d"),
        ("per cent %", "per cent _"),
        ("x" * 300, None),
    ],
    ids=lambda value: str(value)[:20].replace("/", "|"),
)
def test_names_of_metrics_and_params_lead_nowhere(client: MlflowClient, name: str, stored: str | None) -> None:
    tracker = Tracker(QUIET, {name: 1})
    tracker.log_metrics({name: 2.0}, 0)
    tracker.end()
    data = client.get_run(str(tracker.run_id)).data
    assert list(data.metrics.values()) == [2.0]
    assert list(data.params.values()) == ["1"]
    assert list(data.metrics) == list(data.params)
    if stored is not None:
        assert list(data.metrics) == [stored]
    else:
        assert len(next(iter(data.metrics))) == 250


def test_states_can_be_left_out(client: MlflowClient) -> None:
    result = optimize(tracking=hi.Tracking(system_metrics=False, save_state=False))
    assert not any(path.startswith("state") for path in artifacts(client, result.run_id))


def test_tags_name_source_commit_and_reason(client: MlflowClient) -> None:
    tags = run_of(client, optimize(tracking=hi.Tracking(system_metrics=False, tags={"data": "ridge"}))).data.tags
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    assert tags["mlflow.source.name"] == "ridge.py"
    assert tags.get("mlflow.source.git.commit", "") == commit
    assert tags["stop_reason"] == "all outer steps done"
    assert tags["data"] == "ridge"


def test_infinities_are_never_stored(client: MlflowClient) -> None:
    def endless(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch[0]).square().mean() + (0.0 if broken is False else math.inf)

    broken: bool = False

    def turn(step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        nonlocal broken
        broken = step.step == 0

    with pytest.warns(HyperoptWarning, match="non-finite"):
        result = optimize(ridge(validation_loss=endless), outer_steps=3, callbacks=[turn])
    values = [value for _, value in series(client, result.run_id, "loss/validation")]
    assert [math.isnan(value) for value in values] == [False, True, False]
    assert series(client, result.run_id, "solver/not_applied") == [(0, 0.0), (1, 1.0), (2, 0.0)]
    assert run_of(client, result).data.metrics["summary/steps_not_applied"] == 1.0


# ------------------------------------------------------------------------------------------------- how a run ends


def stop_at(step: int, error: BaseException) -> Any:
    def callback(record: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        if record.step == step:
            raise error

    return callback


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("disk on fire"), "FAILED"), (KeyboardInterrupt(), "KILLED")], ids=str
)
def test_run_that_ends_in_an_error_is_closed_with_what_it_had(
    client: MlflowClient, error: BaseException, status: str
) -> None:
    with pytest.raises(type(error)):
        optimize(callbacks=[stop_at(2, error)])
    run = only_run(client)
    assert run.info.status == status
    assert run.data.tags["error"] == f"{type(error).__name__}: {error}"
    assert [step for step, _ in series(client, run.info.run_id, "loss/training")] == [0, 1]
    assert "trajectories.png" in artifacts(client, run.info.run_id)


def test_run_is_finished(client: MlflowClient) -> None:
    result = optimize()
    assert run_of(client, result).info.status == "FINISHED"
    assert result.run_link == (
        f"http://127.0.0.1:5000/#/experiments/{run_of(client, result).info.experiment_id}/runs/{result.run_id}"
        "?workflowType=machine_learning"
    )
    assert not [each for each in threading.enumerate() if each.name.startswith("hyperopt-implicit")]


def test_system_metrics_leave_no_thread_behind(client: MlflowClient) -> None:
    before = set(threading.enumerate())
    result = optimize(tracking=True)
    assert run_of(client, result).info.status == "FINISHED"
    assert set(threading.enumerate()) <= before


# ---------------------------------------------------------------------------------------------------- where it goes


def test_default_store_is_in_the_working_folder(workplace: Path, client: MlflowClient) -> None:
    optimize()
    assert sorted(path.name for path in workplace.iterdir()) == ["mlflow.db", "mlruns"]
    only_run(client)


def test_environment_chooses_store_and_experiment(
    workplace: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workplace / "mlflow.db").rename(workplace / "other.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "from the environment")
    optimize()
    assert not (workplace / "mlflow.db").exists()
    only_run(MlflowClient(tracking_uri=f"sqlite:///{workplace}/other.db"), "from the environment")


def test_settings_win_over_the_environment(
    workplace: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "from the environment")
    optimize(
        tracking=hi.Tracking("sqlite:///mlflow.db", "mine", run_name="first", params={"fold": 2}, system_metrics=False)
    )
    run = only_run(client, "mine")
    assert run.info.run_name == "first"
    assert run.data.params["fold"] == "2"


def test_no_tracking_writes_nothing(workplace: Path) -> None:
    before = (workplace / "mlflow.db").read_bytes()
    optimize(tracking=False)
    assert [path.name for path in workplace.iterdir()] == ["mlflow.db"]
    assert (workplace / "mlflow.db").read_bytes() == before


def test_mlflows_own_active_run_is_left_alone(client: MlflowClient) -> None:
    import mlflow

    assert mlflow.active_run() is None
    result = optimize()
    assert mlflow.active_run() is None
    assert result.run_id is not None


def test_problem_of_a_notebook_has_no_source(client: MlflowClient) -> None:
    scope: dict[str, Any] = {"inner": training_loss.__wrapped__}  # type: ignore[attr-defined]
    exec("def loss(model, batch, *, decay): return inner(model, batch, decay=decay)", scope)
    loss = hi.hyperparameter("decay", init=1.0)(scope["loss"])
    result = optimize(ridge(training_loss=loss))
    assert run_of(client, result).info.status == "FINISHED"
    assert not any(path.startswith("source") for path in artifacts(client, result.run_id))


def test_learning_rate_of_an_optimizer_of_ones_own_is_the_one_logged(workplace: Path) -> None:
    result = hi.optimize(
        ridge(), "cg", outer_steps=1, outer_optimizer=lambda hparams: torch.optim.SGD(hparams, lr=0.25), progress=False
    )
    run = MlflowClient(tracking_uri=f"sqlite:///{workplace}/mlflow.db").get_run(result.run_id)
    assert run.data.params["outer_lr"] == "0.25"


def test_run_is_found_again_by_its_token(client: MlflowClient) -> None:
    """A process that was killed before it knew the id of its run leaves what it has tagged it with."""
    first = Tracker(QUIET, {"lr": 0.1})
    first.log_metrics({"loss/validation": 1.0}, 0)
    first.interrupt()
    again = Tracker(QUIET, {"lr": 0.1}, token=first.token)
    again.log_metrics({"loss/validation": 1.0}, 0)
    again.log_metrics({"loss/validation": 0.5}, 1)
    again.end()
    assert (again.run_id, again.token) == (first.run_id, first.token)
    run = only_run(client)
    assert run.info.status == "FINISHED"
    assert series(client, run.info.run_id, "loss/validation") == [(0, 1.0), (1, 0.5)]
    other = Tracker(QUIET)
    other.end()
    assert other.run_id != first.run_id and other.token != first.token
