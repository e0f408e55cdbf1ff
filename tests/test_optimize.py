"""The loop: it reaches the answer that is known, and each of its options does what it says."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.utils.data import DataLoader, TensorDataset

import hyperopt_implicit as hi
from hyperopt_implicit.vectors import norm

from .ridge import TRAINING, VALIDATION, Weights, best_decay, loss_at, minimum, ridge, training_loss, validation_loss

ACCURATE: dict[str, dict[str, Any]] = {
    "cg": {"tolerance": 1e-10},
    "exact": {},
    "neumann": {"terms": 60},
    "unrolled": {},
}


def optimize(problem: hi.BilevelProblem, backend: Any = "exact", **options: Any) -> hi.Result:
    return hi.optimize(problem, backend, tracking=False, **{"outer_steps": 5, **options})


def constant(lr: float) -> Any:
    """Gradient descent on λ, whose first move can be checked by hand."""
    return {"outer_optimizer": torch.optim.SGD, "outer_lr": lr}


# ----------------------------------------------------------------------------------------------- the right answer


@pytest.mark.parametrize("backend", ACCURATE)
def test_reaches_the_best_decay(backend: str) -> None:
    result = optimize(ridge(), {"name": backend, **ACCURATE[backend]}, outer_steps=30, inner_steps=20, **constant(6.0))
    assert result.hyperparameters["decay"].item() == pytest.approx(best_decay(), rel=1e-4)
    assert result.validation_loss == pytest.approx(loss_at(best_decay()), rel=1e-6)
    torch.testing.assert_close(result.problem.model.weight.detach(), minimum(best_decay()), rtol=1e-4, atol=1e-4)
    assert result.stop_reason == "all outer steps done"
    assert len(result.history) == 30


def test_every_backend_takes_the_same_path_where_training_converges() -> None:
    paths = {}
    for backend, options in ACCURATE.items():
        result = optimize(ridge(), {"name": backend, **options}, inner_steps=120, **constant(6.0))
        paths[backend] = torch.tensor([each.hyperparameters["decay"] for each in result.history], dtype=torch.float64)
    for path in paths.values():
        torch.testing.assert_close(path, paths["exact"], rtol=1e-8, atol=0)


# ------------------------------------------------------------------------------------------------- single options


def test_warmup_trains_before_the_first_step() -> None:
    seen: list[Tensor] = []

    def first(step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        seen.append(problem.model.weight.detach().clone())

    warm = optimize(ridge(), warmup_steps=200, outer_steps=1, inner_steps=1, callbacks=[first])
    torch.testing.assert_close(seen[0], minimum(1.0), rtol=1e-10, atol=1e-10)
    assert warm.history[0].hyperparameters["decay"] == 1.0


def test_clip_bounds_the_norm_over_all_hyperparameters() -> None:
    def path(**options: Any) -> tuple[hi.OuterStep, float]:
        problem = ridge()
        result = optimize(problem, outer_steps=1, inner_steps=50, **constant(1.0), **options)
        return result.history[0], abs(float(problem.hparams["decay"].detach()))

    record, free = path()
    assert free == pytest.approx(record.hypergradient_norm)
    record, clipped = path(clip=1e-3)
    assert record.hypergradient_norm > 1e-2  # recorded as it was
    assert clipped == pytest.approx(1e-3)
    assert path(clip=1e3)[1] == pytest.approx(free)


def test_hessian_is_averaged_over_several_training_batches() -> None:
    x, y = TRAINING
    halves = [(x[:8], y[:8]), (x[8:], y[8:])]
    problem = ridge(training_data=halves)
    result = optimize(problem, outer_steps=1, inner_steps=2, hessian_batches=2)
    whole = ridge()
    whole.load_inner_state(problem.inner_state())
    expected = hi.hypergradient(whole, "exact", training_batches=[TRAINING], validation_batch=VALIDATION)
    assert result.history[0].hypergradient_norm == pytest.approx(norm(expected.gradients), rel=1e-10)


def test_inner_optimizer_may_be_an_instance() -> None:
    model = Weights()
    adam = torch.optim.Adam(model.parameters(), lr=0.1)
    result = optimize(ridge(model=model, optimizer=adam), outer_steps=3, inner_steps=100)
    assert result.problem.optimizer is adam
    torch.testing.assert_close(
        model.weight.detach(), minimum(result.history[-1].hyperparameters["decay"]), rtol=1e-2, atol=1e-2
    )


def test_any_callable_makes_the_outer_optimizer() -> None:
    made: list[torch.optim.Optimizer] = []

    def factory(params: list[Tensor]) -> torch.optim.Optimizer:
        made.append(torch.optim.RMSprop(params, lr=0.02))
        return made[0]

    result = optimize(ridge(), outer_optimizer=factory, outer_lr=99.0)
    assert made[0].param_groups[0]["lr"] == 0.02
    assert result.hyperparameters["decay"].item() != 1.0


# ------------------------------------------------------------------------- restarting, and tuning the learning rate


def with_learning_rate(start: float) -> hi.BilevelProblem:
    tuned = hi.hyperparameter("lr", init=start, constraint=constraints.interval(0.0, 0.9), target="optimizer")
    return ridge(training_loss=tuned(training_loss))


def test_restart_begins_every_outer_step_at_the_initial_weights() -> None:
    result = optimize(ridge(), "unrolled", restart=True, inner_steps=3, outer_steps=4, outer_lr=1e-9)
    losses = [each.validation_loss for each in result.history]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)
    without = optimize(ridge(), "unrolled", inner_steps=3, outer_steps=4, outer_lr=1e-9).history
    assert without[3].training_loss < without[0].training_loss


def test_learning_rate_is_tuned_through_restarted_training() -> None:
    """From far too small: the tuned rate reaches in five steps what the initial one does not."""
    result = optimize(with_learning_rate(0.01), "unrolled", restart=True, inner_steps=5, outer_steps=60, outer_lr=0.1)
    tuned = result.hyperparameters["lr"].item()
    assert 0.2 < tuned < 0.9
    assert result.problem.optimizer.param_groups[0]["lr"] == pytest.approx(tuned)
    assert result.validation_loss < result.history[0].validation_loss - 0.1


# ------------------------------------------------------------------------------------------------------- schedulers


@pytest.mark.parametrize("backend", ["cg", "unrolled"])
def test_schedulers_advance_once_an_outer_step(backend: str) -> None:
    made: list[torch.optim.lr_scheduler.LRScheduler] = []

    def halving(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        made.append(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
        return made[-1]

    problem = ridge()
    optimize(problem, backend, outer_lr=0.8, inner_scheduler=halving, outer_scheduler=halving, outer_steps=3)
    assert problem.optimizer.param_groups[0]["lr"] == pytest.approx(0.5 / 8)
    assert made[1].get_last_lr() == pytest.approx([0.8 / 8])


def test_scheduler_that_watches_a_loss_is_given_the_validation_loss() -> None:
    made: list[torch.optim.lr_scheduler.ReduceLROnPlateau] = []

    def plateau(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        made.append(torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=100))
        return made[0]

    result = optimize(ridge(), outer_scheduler=plateau)
    assert made[0].best == pytest.approx(min(each.validation_loss for each in result.history))


def test_tuned_learning_rate_wins_over_a_scheduler() -> None:
    problem = with_learning_rate(0.3)
    result = optimize(
        problem, "unrolled", inner_scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)
    )
    assert problem.optimizer.param_groups[0]["lr"] == pytest.approx(result.hyperparameters["lr"].item())


# --------------------------------------------------------------------------------------------- stopping and keeping


def scripted(losses: list[float], batches: int = 1) -> hi.BilevelProblem:
    """A problem whose validation losses are given; the value moves by −1 an outer step under ``constant(1.0)``."""

    @hi.hyperparameter("value", init=0.0)
    def inner(model: nn.Linear, batch: Any, *, value: Tensor) -> Tensor:
        return (model.weight - value).square().sum()

    def outer(model: nn.Linear, batch: int, *, value: Tensor) -> Tensor:
        return losses[min(batch, len(losses) - 1)] + value - value.detach()

    class Counting:
        count = -2  # the first batch is drawn once to be looked at

        def __len__(self) -> int:
            return batches

        def __iter__(self) -> Any:
            for _ in range(batches):
                Counting.count += 1
                yield max(Counting.count, 0)

    Counting.count = -1
    model = nn.Linear(1, 1, bias=False)
    return hi.BilevelProblem(
        model,
        inner,
        outer,
        training_data=[0],
        validation_data=Counting(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
    )


def test_patience_counts_steps_without_a_lower_loss() -> None:
    result = optimize(scripted([5, 4, 3, 3, 3.5, 3, 9]), outer_steps=50, patience=3, **constant(1.0))
    assert result.stop_reason == "no improvement"
    assert [each.validation_loss for each in result.history] == [5, 4, 3, 3, 3.5, 3]
    assert result.best_step == 2


def test_patience_forgets_after_an_improvement() -> None:
    result = optimize(scripted([5, 6, 4, 6, 3, 6, 6]), outer_steps=50, patience=2, **constant(1.0))
    assert len(result.history) == 7


def test_improvements_below_min_delta_do_not_count_for_patience_but_are_kept() -> None:
    losses = [5.0, 4.9, 4.85, 4.8]
    result = optimize(scripted(losses), outer_steps=50, patience=3, min_delta=0.5, **constant(1.0))
    assert len(result.history) == 4
    assert result.best_validation_loss == pytest.approx(4.8)
    assert result.best_step == 3
    slow = [5.0 - 0.2 * i for i in range(9)]  # together, three of them count
    assert len(optimize(scripted(slow), outer_steps=9, patience=3, min_delta=0.5, **constant(1.0)).history) == 9


def test_best_is_kept_beside_the_last() -> None:
    result = optimize(scripted([5, 2, 4, 3]), outer_steps=4, **constant(1.0))
    assert result.best_step == 1
    assert result.best_validation_loss == 2.0
    assert result.best_hyperparameters["value"].item() == -1.0
    assert result.validation_loss == 3.0
    assert result.hyperparameters["value"].item() == -4.0


@pytest.mark.parametrize("backend", ["cg", "unrolled"])
def test_model_at_the_lowest_loss_is_kept_where_asked_for(backend: str) -> None:
    states: list[Tensor] = []
    losses: list[float] = []

    def note(step: hi.OuterStep, problem: hi.BilevelProblem) -> None:
        states.append(problem.model.weight.detach().clone())
        losses.append(step.validation_loss)

    result = optimize(ridge(), backend, keep_best_model=True, callbacks=[note], inner_steps=8, outer_lr=0.5)
    assert result.best_step == losses.index(min(losses)) < 4
    assert result.best_model_state is not None
    assert torch.equal(result.best_model_state["weight"], states[result.best_step])
    assert not torch.equal(result.best_model_state["weight"], states[-1])
    assert optimize(ridge(), backend).best_model_state is None


def test_validation_loss_is_averaged_over_the_last_pass() -> None:
    result = optimize(scripted([4, 8, 0, 2, 1, 1], batches=3), outer_steps=6, **constant(1.0))
    means = [each.validation_loss_sweep for each in result.history]
    assert means == pytest.approx([4, 6, 4, 10 / 3, 1, 4 / 3])
    assert result.best_step == 4
    assert result.best_validation_loss == pytest.approx(1.0)
    early = optimize(scripted([0, 8, 8, 8], batches=3), outer_steps=4, **constant(1.0))
    assert early.best_step == 2  # a batch alone says nothing


def test_run_shorter_than_a_pass_takes_its_last_values_for_the_best() -> None:
    result = optimize(scripted([4, 2, 6], batches=10), outer_steps=3, **constant(1.0))
    assert result.best_step == 2
    assert result.best_validation_loss == pytest.approx(4.0)
    assert result.best_hyperparameters["value"].item() == -2.0


def test_callback_sees_every_step_and_can_stop() -> None:
    seen = []

    def stop(step: hi.OuterStep, problem: hi.BilevelProblem) -> bool:
        seen.append(step.step)
        return step.step == 2

    result = optimize(ridge(), outer_steps=50, callbacks=[stop])
    assert seen == [0, 1, 2]
    assert result.stop_reason == "stopped by a callback"
    assert len(result.history) == 3


# -------------------------------------------------------------------------------------------------- random numbers


def random_problem() -> hi.BilevelProblem:
    """Shuffled batches, and dropout on the inputs."""

    def loader(batch: Any) -> DataLoader[Any]:
        return DataLoader(TensorDataset(*batch), batch_size=4, shuffle=True)

    return ridge(
        model=nn.Sequential(nn.Dropout(0.5), Weights()),
        training_data=loader(TRAINING),
        validation_data=loader(VALIDATION),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
    )


@pytest.mark.parametrize("backend", ["neumann", "unrolled"])
def test_seed_repeats_a_run_to_the_bit_and_leaves_the_generator_alone(backend: str) -> None:
    def history(seed: int, stir: int) -> list[dict[str, Any]]:
        problem = random_problem()
        torch.manual_seed(stir)
        before = torch.get_rng_state()
        result = optimize(problem, backend, seed=seed, inner_steps=3, outer_steps=4)
        assert torch.equal(torch.get_rng_state(), before)
        frame = result.history.to_dataframe().drop(columns=["inner_seconds", "outer_seconds"])
        return frame.to_dict("records")  # type: ignore[no-any-return]

    assert history(seed=1, stir=10) == history(seed=1, stir=20)
    assert history(seed=1, stir=10) != history(seed=2, stir=10)


def test_without_a_seed_the_global_generator_is_used() -> None:
    problem = random_problem()
    before = torch.get_rng_state()
    optimize(problem, outer_steps=1)
    assert not torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------------------------------- progress bar


def test_progress_bar_is_drawn_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, progress, drawn in [
        (io.StringIO(), None, False),
        (Terminal(), None, True),
        (Terminal(), False, False),
        (io.StringIO(), True, True),
    ]:
        monkeypatch.setattr(sys, "stderr", stream)
        optimize(ridge(), outer_steps=2, progress=progress)
        assert bool(stream.getvalue()) == drawn
        assert ("validation" in stream.getvalue()) == drawn


def test_losses_may_be_called_on_the_problem() -> None:
    problem = ridge()
    torch.testing.assert_close(problem.validation_loss(VALIDATION), validation_loss(problem.model, VALIDATION).detach())


@pytest.mark.parametrize("backend", ["exact", "unrolled"])
def test_best_model_is_the_one_whose_loss_was_lowest(backend: str) -> None:
    """λ runs past its best value here, so that the best step is not the last."""
    problem = ridge()
    result = optimize(problem, backend, outer_steps=30, inner_steps=20, outer_lr=0.5, keep_best_model=True)
    assert result.best_step is not None and result.best_step < 29
    assert result.best_model_state is not None
    problem.model.load_state_dict(result.best_model_state)
    loss = problem.validation_loss(VALIDATION)
    torch.testing.assert_close(float(loss), result.best_validation_loss, rtol=1e-12, atol=0.0)


def test_best_model_is_not_kept_unless_asked_for() -> None:
    assert optimize(ridge()).best_model_state is None


@pytest.mark.parametrize(
    ("batches", "steps", "warmup", "seen"),
    [
        (4, {"inner_steps": 1}, 0, (2, 2)),
        (2, {"inner_steps": 1}, 3, (1, 1)),
        (4, {"inner_steps": 3}, 0, (3, 1)),
        (6, {"inner_steps": 2, "hessian_batches": 2}, 1, None),  # two in common, and two of each
        (4, {"inner_steps": 2}, 0, None),
        (1, {"inner_steps": 3}, 0, None),
    ],
)
def test_batches_that_are_never_met(batches, steps, warmup, seen):
    """A list is read in turn by inner steps and hypergradients: what the warning says is what is really met."""
    data = [(TRAINING[0].clone(), TRAINING[1].clone()) for _ in range(batches)]
    met: dict[str, set[int]] = {"train": set(), "differentiate": set()}
    problem = ridge(training_data=data)
    options = {"outer_steps": 12, "warmup_steps": warmup, "tracking": False, **steps}
    real_training, real_functional = problem.share_of_training_loss, problem.functional_training_loss

    def place(batch):
        return next(i for i, each in enumerate(data) if each[0] is batch[0])

    def training_loss(batch, values=None):
        met["train"].add(place(batch))
        return real_training(batch, values)

    def functional(params, hparams, batch, buffers=None):
        met["differentiate"].add(place(batch))
        return real_functional(params, hparams, batch, buffers)

    problem.share_of_training_loss, problem.functional_training_loss = training_loss, functional
    if seen is None:
        hi.optimize(problem, "exact", **options)
        assert met["train"] == set(range(batches))
        return
    with pytest.warns(hi.HyperoptWarning) as caught:
        hi.optimize(problem, "exact", **options)
    (said,) = [str(w.message) for w in caught if "training_data is a list" in str(w.message)]
    assert f"of {batches} different batches, training only ever sees {seen[0]} and the hypergradient {seen[1]}." in said
    late = len(met["differentiate"]) - seen[1]  # the check before training looks at one batch as well
    assert late in (0, 1)
    assert len(met["train"]) - seen[0] in (0, 1, 2)  # so does the warm-up


def test_batches_that_stand_several_times_in_a_list_are_one():
    one, other = [(TRAINING[0].clone(), TRAINING[1].clone()) for _ in range(2)]
    problem = ridge(training_data=[one, one, other, other])
    options = {"outer_steps": 1, "inner_steps": 2, "hessian_batches": 2, "tracking": False}
    with pytest.warns(hi.HyperoptWarning, match="of 2 different batches, training only ever sees 1 and the hyper.* 1"):
        hi.optimize(problem, "exact", **options)
    with pytest.warns(hi.HyperoptWarning, match="training only ever sees 2 and the hypergradient 1"):
        hi.optimize(problem, "exact", **{**options, "warmup_steps": 1, "inner_steps": 3, "hessian_batches": 1})


class Backwards(list[Any]):
    """A list that is read from its end."""

    def __iter__(self) -> Any:
        return iter(self[::-1])


def test_nothing_is_foretold_of_a_list_that_iterates_otherwise() -> None:
    data = Backwards([TRAINING, VALIDATION])
    optimize(ridge(training_data=data), outer_steps=1, inner_steps=1)  # with a plain list it would warn
