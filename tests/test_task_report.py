"""What a run says of its tasks: weights, cosines and verdicts against hand-made cases, and their place in MLflow."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints

import hyperopt_implicit as hi
from hyperopt_implicit.auxiliary import (
    Context,
    ConvolutionalCombiner,
    LinearCombiner,
    NonlinearCombiner,
    TaskReport,
    TaskVerdict,
)

TASKS = ["main", "same", "opposed", "elsewhere"]


class Points(nn.Module):
    """Two parameters: the tasks pull the first towards 1, 1 and −1; the last task pulls the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(()))
        self.second = nn.Parameter(torch.zeros(()))


def losses(model: Any, batch: Tensor) -> Tensor:
    a, b = model.first, model.second
    one = torch.stack([(a - 1) ** 2, 2 * (a - 1) ** 2, (a + 1) ** 2, (b - 3) ** 2])
    return one.expand(len(batch), 4) * batch[:, None]  # the samples' losses differ by a factor


def make(init: Any, loss: Any = None, **options: Any) -> hi.BilevelProblem:
    @hi.hyperparameter("combiner", init=init, **options)
    def weighted(model: nn.Module, batch: Tensor, *, combiner: Any) -> Tensor:
        return combiner(losses(model, batch))

    def validation_loss(model: Any, batch: Tensor) -> Tensor:
        return (model.first - 1) ** 2 + 0.0 * batch.sum()

    return hi.BilevelProblem(
        Points(),
        loss or weighted,
        validation_loss,
        training_data=[torch.tensor([0.5, 1.5])],
        validation_data=[torch.ones(1)],
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.02),
    )


def weights_only(init: Tensor) -> hi.BilevelProblem:
    @hi.hyperparameter("weights", init=init, constraint=constraints.positive)
    def loss(model: nn.Module, batch: Tensor, *, weights: Tensor) -> Tensor:
        each = losses(model, batch).mean(dim=0)
        return (weights * (each if len(weights) == 4 else each[1:])).sum() + (0.0 if len(weights) == 4 else each[0])

    return make(LinearCombiner(4), loss)


def test_reading_by_hand() -> None:
    reading = TaskReport(losses, TASKS).read(make(LinearCombiner(4, init=[2.0, 3.0, 4.0])), step=7)
    assert reading.step == 7
    assert reading.losses == pytest.approx([1.0, 2.0, 1.0, 9.0])
    assert reading.weights == pytest.approx([1.0, 2.0, 3.0, 4.0])
    assert reading.cosines[:3] == pytest.approx([1.0, 1.0, -1.0])
    assert math.isnan(reading.cosines[3])  # it touches nothing that the validation loss uses


@pytest.mark.parametrize(
    ("init", "expected"),
    [(torch.tensor([0.5, 2.0, 3.0, 4.0]), [0.5, 2.0, 3.0, 4.0]), (torch.tensor([2.0, 3.0, 4.0]), [1.0, 2.0, 3.0, 4.0])],
    ids=["a weight for each task", "for each auxiliary task"],
)
def test_weights_of_a_tensor(init: Tensor, expected: list[float]) -> None:
    assert TaskReport(losses, TASKS).read(weights_only(init), 0).weights == pytest.approx(expected)


def test_weight_through_a_network_is_the_derivative_of_the_combined_loss() -> None:
    problem = make(NonlinearCombiner(4, hidden_sizes=(3,)))
    combiner, batch, h = problem.hyperparameters.values()["combiner"], torch.tensor([0.5, 1.5]), 1e-3
    reading = TaskReport(losses, TASKS).read(problem, 0)
    each = losses(problem.model, batch).detach()
    for i, weight in enumerate(reading.weights):
        shift = h * torch.eye(4)[i]
        difference = (combiner(each + shift) - combiner(each - shift)).detach() / (2 * h)  # type: ignore[operator]
        assert weight == pytest.approx(float(difference), rel=1e-3)


def test_weights_of_loss_images_add_up_over_pixels() -> None:
    combiner = ConvolutionalCombiner(4, channels=(2,), kernel_size=1)

    def images(model: Any, batch: Tensor) -> Tensor:
        return losses(model, batch)[:, :, None, None].expand(-1, -1, 3, 3)

    weighted = hi.hyperparameter("combiner", init=combiner)
    problem = make(None, weighted(lambda model, batch, *, combiner: combiner(images(model, batch))))
    report = TaskReport(images, TASKS)
    found = report.read(problem, 0).weights
    leaf = images(problem.model, torch.tensor([0.5, 1.5])).detach().requires_grad_()
    combiner(leaf).backward()
    assert leaf.grad is not None
    assert found == pytest.approx(leaf.grad.sum(dim=(0, 2, 3)).tolist())
    assert set(report.figures()) == {"tasks", "loss_surface", "loss_gradients"}


def test_conditioned_combiner_is_given_its_context() -> None:
    combiner = LinearCombiner(4, context=Context(classes=2))
    loss = hi.hyperparameter("combiner", init=combiner)(
        lambda model, batch, *, combiner: combiner(losses(model, batch), labels=batch.long() % 2)
    )
    report = TaskReport(losses, TASKS, context=lambda batch: {"labels": batch.long() % 2})
    assert report.read(make(None, loss), 0).weights == pytest.approx([1.0] * 4)
    assert set(report.figures()) == {"tasks"}  # a surface would need a sample to be conditioned on


@pytest.mark.parametrize("backend", ["cg", "neumann"])
def test_run_finds_out_which_task_is_which(backend: str) -> None:
    report = TaskReport(losses, TASKS)
    hi.optimize(
        make(LinearCombiner(4)),
        backend,
        outer_steps=60,
        outer_lr=0.1,
        inner_steps=20,
        callbacks=[report],
        tracking=False,
    )
    verdicts = {each.task: each for each in report.verdicts()}
    assert list(verdicts) == TASKS[1:]
    assert verdicts["same"].verdict == "helps"
    assert verdicts["opposed"].verdict == "harmful"
    assert verdicts["opposed"].end < 0.2
    assert verdicts["same"].cosine > 0 > verdicts["opposed"].cosine


@pytest.mark.parametrize(
    ("weights", "cosine", "verdict"),
    [
        ((1.0, 2.0), 0.0, "helps"),
        ((1.0, 0.6), 0.3, "helps"),
        ((1.0, 1.0), 0.0, "ignored"),
        ((1.0, 0.6), 0.0, "ignored"),
        ((1.0, 0.1), 0.2, "ignored"),
        ((1.0, 0.1), -0.01, "harmful"),
        ((1.0, 2.0), -0.3, "harmful"),
        ((0.0, 0.0), 0.0, "ignored"),
    ],
)
def test_verdict(weights: tuple[float, float], cosine: float, verdict: str) -> None:
    report = TaskReport(losses, ["main", "other"])
    report.readings = [
        hi.auxiliary.TaskReading(step, [1.0, 1.0], [2.0, 2.0 * weight], [1.0, cosine])
        for step, weight in enumerate(weights)
    ]
    assert [each.verdict for each in report.verdicts()] == [verdict]


def test_verdict_in_a_sentence() -> None:
    verdict = TaskVerdict("rotation", "harmful", start=1.0, end=0.034, cosine=-0.21)
    assert str(verdict) == "rotation: harmful; weight 1 → 0.034, gradient against the main task's (cosine -0.21)"


def test_nothing_was_read() -> None:
    report = TaskReport(losses, TASKS)
    assert (report.verdicts(), report.metrics(), report.figures(), report.lines()) == ([], {}, {}, [])


def test_readings_are_as_far_apart_as_asked_for() -> None:
    report = TaskReport(losses, TASKS, every=4)
    hi.optimize(make(LinearCombiner(4)), "cg", outer_steps=10, callbacks=[report], tracking=False)
    assert [each.step for each in report.readings] == [0, 4, 8]


@pytest.mark.parametrize("own_generator", [False, True])
def test_watching_changes_nothing(own_generator: bool) -> None:
    """Shuffled loaders, dropout and running statistics: bitwise the same run with a report and without."""

    def trained(callbacks: list[Any]) -> list[Tensor]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2))
        data = torch.utils.data.TensorDataset(torch.randn(24, 3), torch.randn(24, 2))
        generator = torch.Generator().manual_seed(0) if own_generator else None
        loaders = [torch.utils.data.DataLoader(data, 8, shuffle=True, generator=generator) for _ in range(2)]

        @hi.hyperparameter("combiner", init=LinearCombiner(2))
        def training_loss(model: nn.Module, batch: Any, *, combiner: Any) -> Tensor:
            return combiner(squares(model, batch))

        problem = hi.BilevelProblem(
            model,
            training_loss,
            lambda model, batch: squares(model, batch)[:, 0].mean(),
            training_data=loaders[0],
            validation_data=loaders[1],
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05),
        )
        hi.optimize(problem, "unrolled", outer_steps=5, inner_steps=2, callbacks=callbacks, tracking=False, seed=1)
        return [*problem.model.state_dict().values(), *problem.hyperparameters.state_dict().values()]

    def squares(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) - batch[1]) ** 2

    without = trained([])
    report = TaskReport(squares, ["main", "other"])
    for mine, expected in zip(trained([report]), without, strict=True):
        assert torch.equal(mine, expected)
    assert len(report.readings) == 5


def test_report_of_a_run_that_was_resumed_is_that_of_one_that_was_not(tmp_path: Path) -> None:
    """It goes on reading on the batch on which it began."""

    def train(report: TaskReport, steps: int, **options: Any) -> None:
        torch.manual_seed(4)
        problem = make(LinearCombiner(4))
        problem.training_data = torch.utils.data.DataLoader(torch.rand(12), 3, shuffle=True)
        hi.optimize(problem, "cg", outer_steps=steps, callbacks=[report], seed=1, tracking=False, **options)

    whole, before, between, after = (TaskReport(losses, TASKS) for _ in range(4))
    train(whole, 6)
    train(before, 2, checkpoint=tmp_path)
    train(between, 4, checkpoint=tmp_path, resume=True)
    train(after, 6, checkpoint=tmp_path, resume=True)
    assert [each.step for each in after.readings] == list(range(6))
    assert repr(after.readings) == repr(whole.readings)  # some cosines are NaN
    assert after.verdicts() == whole.verdicts()


def test_mlflow_run_shows_weights_figures_and_verdicts(workplace: Path) -> None:
    from mlflow import MlflowClient

    report = TaskReport(losses, TASKS)
    result = hi.optimize(make(NonlinearCombiner(4)), "cg", outer_steps=4, callbacks=[report], progress=False)
    client = MlflowClient(tracking_uri=f"sqlite:///{workplace}/mlflow.db")
    run = client.get_run(result.run_id)
    assert run.data.metrics["task/same/weight"] == pytest.approx(report.readings[-1].weights[1])
    assert len(client.get_metric_history(result.run_id, "task/opposed/cosine")) == 4
    assert run.data.tags["mlflow.note.content"].splitlines() == [f"- {verdict}" for verdict in report.verdicts()]
    names = {each.path for each in client.list_artifacts(result.run_id)}
    assert {"tasks.png", "loss_surface.png", "loss_gradients.png"} <= names


BAD = {
    "one task": (lambda: TaskReport(losses, ["main"]), "at least two tasks, all different; got ['main']"),
    "a name twice": (lambda: TaskReport(losses, ["a", "a"]), "all different; got ['a', 'a']"),
    "main task": (
        lambda: TaskReport(losses, TASKS, main_task=4),
        "main_task must be the place of the main task among 4, from 0 to 3; got 4",
    ),
    "every": (lambda: TaskReport(losses, TASKS, every=0), "every must be a whole number of at least 1; got 0"),
    "reduced": (
        lambda: TaskReport(lambda model, batch: losses(model, batch).mean(dim=0), TASKS).read(
            make(LinearCombiner(4)), 0
        ),
        "must have shape [batch, tasks] with 4 tasks (main, same, opposed, elsewhere); got (4,). Give one row of means",
    ),
    "other number": (
        lambda: TaskReport(losses, TASKS[:3]).read(make(LinearCombiner(4)), 0),
        "must have shape [batch, tasks] with 3 tasks (main, same, opposed); got (2, 4)",
    ),
    "a model": (
        lambda: TaskReport(losses, TASKS).read(Points(), 0),  # type: ignore[arg-type]
        "TaskReport reads a BilevelProblem, with its data and hyperparameters; got Points. Build one around the model.",
    ),
    "misspelt": (
        lambda: TaskReport(losses, TASKS, hyperparameter="combinor").read(make(LinearCombiner(4)), 0),
        "TaskReport reads hyperparameter 'combinor', and the problem has combiner. Did you mean 'combiner'?",
    ),
    "no weights": (
        lambda: TaskReport(losses, TASKS).read(make(None, _decayed), 0),
        "TaskReport needs one hyperparameter that weighs the tasks, a LossCombiner or a tensor with a weight for each "
        "of 4 tasks or of the 3 auxiliary ones; found none among decay. Name it with hyperparameter=.",
    ),
}


def _reduced(model: Any, batch: Tensor) -> Tensor:
    return losses(model, batch).mean(dim=0)


@hi.hyperparameter("decay", init=0.1)
def _decayed(model: Any, batch: Tensor, *, decay: Tensor) -> Tensor:
    return losses(model, batch).mean() + decay * model.first**2


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(hi.AuxiliaryError) as caught:
        call()
    assert message in str(caught.value)
