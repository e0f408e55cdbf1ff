"""Whatever is given at the public edge: it works, or an error of the library says why not; nothing comes from inside.

Shapes, dtypes, constraints and starts are drawn at random where they make sense, and any object in the place of any
argument. What the functions of a user raise is theirs, and goes through.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

import hyperopt_implicit as hi
from hyperopt_implicit.backend import get_backend_class, options_of

from .cases import CASES
from .commands import Command
from .refusals import build, good, plain, sgd

pytestmark = pytest.mark.filterwarnings("ignore")

FEW = settings(deadline=None, derandomize=True, max_examples=40, database=None, suppress_health_check=list(HealthCheck))
MANY = settings(FEW, max_examples=1500)

BATCH = torch.tensor([[1.0, 2.0], [3.0, -4.0], [0.5, 0.0]])
ONCE = {"outer_steps": 2, "inner_steps": 1, "tracking": False, "progress": False}


class Hostile:
    """What can be asked for nothing."""

    def __len__(self) -> int:
        raise ValueError("no length")

    def __repr__(self) -> str:
        raise ValueError("no words")


def one_number(value: float) -> Any:
    return torch.tensor(value)


def junk() -> st.SearchStrategy[Any]:
    """Objects of all kinds, most of them of no use."""
    fixed: list[Callable[[], Any]] = [
        lambda: None, lambda: True, lambda: False, lambda: float("nan"), lambda: float("inf"), lambda: -float("inf"),
        lambda: 10**400, lambda: -(10**400), lambda: "", lambda: "abc", lambda: "cg", lambda: "é\x00\n", lambda: b"x",
        list, lambda: [1], lambda: [None], dict, lambda: {"a": 1}, lambda: {"name": 1}, lambda: {"name": "cg", "x": 1},
        tuple, set, object, lambda: len, lambda: 1j, lambda: range(3), lambda: iter([1]), lambda: torch.float32,
        lambda: one_number(1.0), lambda: one_number(float("nan")), lambda: torch.tensor([]), lambda: torch.ones(2, 2),
        lambda: torch.tensor(1j), lambda: torch.tensor(True), lambda: nn.Linear(1, 1), lambda: nn.Linear,
        Hostile, lambda: Hostile, lambda: Exception, lambda: constraints.positive, lambda: hi.Tracking,
        lambda: FloatDistribution(0.0, 1.0),
    ]  # fmt: skip
    drawn = st.one_of(st.integers(-3, 3), st.floats(), st.text(max_size=4), st.lists(st.integers(-2, 2), max_size=2))
    return st.one_of(st.sampled_from(fixed).map(lambda make: make()), drawn)


def is_huge(value: Any) -> bool:
    """A count that would take for ever."""
    return isinstance(value, int) and abs(value) > 100


def works_or_says_why(call: Callable[[], Any]) -> Any:
    """What a call returns; None where the library has refused, in words."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call()
        except hi.HyperoptError as error:
            said = str(error)
    assert len(said) > 20
    return None


def assert_sound(result: hi.Result | None) -> None:
    """Every value is inside its constraint and finite, and so is what was recorded where a step was taken."""
    if result is None:
        return
    declarations = result.problem.hyperparameters.declarations
    for name, value in result.hyperparameters.items():
        if isinstance(value, Tensor):
            assert bool(value.isfinite().all())
            if value.dtype.itemsize > 2:  # else rows that sum to one do so to three digits
                assert bool(declarations[name].constraint.check(value).all())
    for each in result.history:
        assert all(map(math.isfinite, each.hyperparameters.values()))
        assert each.applied or each.status.failed or not math.isfinite(each.hypergradient_norm) or result.failed_steps


# ------------------------------------------------------------------------------------- sensible problems, at random

INSIDE: dict[str, tuple[Constraint, Callable[[Tensor], Tensor]]] = {
    "real": (constraints.real, lambda x: x),
    "positive": (constraints.positive, torch.exp),
    "nonnegative": (constraints.nonnegative, torch.exp),
    "greater_than": (constraints.greater_than(-1.0), torch.exp),
    "less_than": (constraints.less_than(3.0), lambda x: 2.0 - x.exp()),
    "interval": (constraints.interval(-1.0, 1.0), torch.tanh),
    "unit_interval": (constraints.unit_interval, torch.sigmoid),
    "half_open_interval": (constraints.half_open_interval(0.0, 1.0), torch.sigmoid),
    "simplex": (constraints.simplex, lambda x: x.reshape(*x.shape, 1).expand(*x.shape, 3).softmax(-1)),
    "independent": (constraints.independent(constraints.positive, 0), torch.exp),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
shapes = st.lists(st.integers(1, 3), max_size=3).map(tuple)


@st.composite
def starts(draw: st.DrawFn) -> tuple[Any, Constraint]:
    """A start inside a constraint: a number, a tensor of any shape and dtype, a module, or a function of the model."""
    constraint, inside = INSIDE[draw(st.sampled_from(sorted(INSIDE)))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 100)))
    value = inside(0.5 * torch.randn(draw(shapes), generator=generator))
    kind = draw(st.sampled_from(["number", "tensor", "function", "module"]))
    if kind == "module":
        return nn.Linear(2, draw(st.integers(1, 2))), constraints.real
    if kind == "number" and constraint is not constraints.simplex:
        return float(value.flatten()[0]), constraint
    value = value.to(draw(st.sampled_from([torch.float32, torch.float64])))
    return (value if kind == "tensor" else (lambda model: value)), constraint


def problem_with(init: Any, constraint: Constraint, dtype: torch.dtype, shift: float) -> hi.BilevelProblem:
    @hi.hyperparameter("value", init=init, constraint=constraint)
    def training_loss(model: nn.Module, batch: Tensor, *, value: Any) -> Tensor:
        used = value(batch).mean() if isinstance(value, nn.Module) else value.mean()
        decay = sum(p.square().sum() for p in model.parameters())
        return (model(batch) - used).square().mean() + 0.1 * decay

    def validation_loss(model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) - shift).square().mean()

    torch.manual_seed(0)
    model = nn.Linear(2, 1).to(dtype)
    data = [BATCH.to(dtype)]
    return hi.BilevelProblem(
        model, training_loss, validation_loss, training_data=data, validation_data=data, optimizer=sgd
    )


def check_run(start: tuple[Any, Constraint], dtype: torch.dtype, name: str, lr: float, shift: float) -> None:
    problem = works_or_says_why(lambda: problem_with(*start, dtype, shift))
    if problem is None:  # half precision may round a start onto the edge
        assert dtype.itemsize == 2
        return
    options = {**ONCE, "outer_steps": 3, "inner_steps": 2, "outer_lr": lr, "seed": 0}
    assert_sound(works_or_says_why(lambda: hi.optimize(problem, name, **options)))


SENSIBLE = st.tuples(
    starts(),
    st.sampled_from(DTYPES),
    st.sampled_from([case.name for case in CASES]),
    st.sampled_from([1e-3, 1.0, 1e3, 1e30]),
    st.sampled_from([0.0, 1.0, -1e3, 1e20]),
)


@FEW
@given(SENSIBLE)
def test_any_start_dtype_and_backend(drawn: Any) -> None:
    check_run(*drawn)


@pytest.mark.slow
@MANY
@given(SENSIBLE)
def test_any_start_dtype_and_backend_at_length(drawn: Any) -> None:
    check_run(*drawn)


@pytest.mark.parametrize("kind", ["complex", "whole numbers"])
def test_parameters_that_are_no_real_numbers(kind: str) -> None:
    """Complex weights are trained as torch.optim trains them; whole ones cannot be."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.real = nn.Parameter(torch.ones(2))
            if kind == "complex":
                self.other = nn.Parameter(torch.ones(2, dtype=torch.complex64))
            else:
                self.other = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.real * self.other.abs()).sum(-1, keepdim=True)

    @hi.hyperparameter("decay", init=0.1, constraint=constraints.positive)
    def loss(model: nn.Module, batch: Tensor, *, decay: Tensor) -> Tensor:
        return plain(model, batch) + decay * sum(p.abs().float().square().sum() for p in model.parameters())

    for case in CASES:
        assert_sound(works_or_says_why(lambda: hi.optimize(build(Model(), loss), case.name, **ONCE)))  # noqa: B023


# ------------------------------------------------------------------------------ any object in the place of any argument


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))


def run(problem: hi.BilevelProblem, backend: Any = "cg", **options: Any) -> hi.Result:
    return hi.optimize(problem, backend, **{**ONCE, **options})


def declared(**changes: Any) -> hi.Result:
    declaration = {"name": "decay", "init": 0.1, **changes}

    @hi.hyperparameter(declaration.pop("name"), **declaration)
    def loss(model: nn.Module, batch: Tensor, *, decay: Any) -> Tensor:
        return plain(model, batch) + decay * sum(p.square().sum() for p in model.parameters())

    return run(build(model(), loss))


def problem(**changes: Any) -> hi.Result:
    given = {"model": model(), "training_loss": good, "validation_loss": plain, **changes}
    data = {"training_data": [BATCH], "validation_data": [BATCH], "optimizer": sgd}
    data |= {name: given.pop(name) for name in list(given) if name in data}
    return run(hi.BilevelProblem(given.pop("model"), given.pop("training_loss"), given.pop("validation_loss"), **data))


def declared_knob(**changes: Any) -> Any:
    given = {"name": "lr", "distribution": FloatDistribution(0.0, 1.0), "builder": lambda *, lr: None, **changes}
    return hi.knob(given["name"], given["distribution"])(given["builder"])


def optimized(**changes: Any) -> hi.Result:
    return hi.optimize(**{"problem": build(model()), "backend": "cg", **ONCE, **changes})


def differentiated(**changes: Any) -> Any:
    given = {"problem": build(model()), "backend": "cg", "training_batches": [BATCH], "validation_batch": BATCH}
    return hi.hypergradient(**{**given, **changes})


def stepped(**changes: Any) -> Any:
    given = {"problem": build(model()), "optimizer": torch.optim.SGD, "lr": 0.1, "backend": "cg", **changes}
    batches = {name: given.pop(name, BATCH) for name in ("training_batch", "validation_batch")}
    state = given.pop("state", None)
    outer = hi.HyperOptimizer(**given)
    if "state" in changes:
        outer.load_state_dict(state)
    return outer.step(**batches)


def checked(**changes: Any) -> Any:
    return hi.check(**{"problem": build(model()), "backend": "exact", "inner_steps": 1, "seconds": 0.1, **changes})


def compared(**changes: Any) -> Any:
    given = {"problem": build(model()), "backends": ["cg"], "inner_steps": 1, "repeats": 1, "seconds_to_minimise": 0.1}
    return hi.compare(**{**given, "tracking": False, **changes})


@hi.knob("lr", FloatDistribution(0.01, 0.1))
def builder(*, lr: float) -> hi.BilevelProblem:
    return build(model(), optimizer=lambda params: torch.optim.SGD(params, lr=lr))


def searched(**changes: Any) -> Any:
    given = {"builder": builder, "backend": "cg", "n_trials": 1, "storage": None, **ONCE, "outer_steps": 1}
    return hi.search(**{**given, **changes})


def together(**changes: Any) -> Any:
    given = {"problems": [build(model()), build(model())], "backend": "cg", "tracking": False, "inner_steps": 1}
    return hi.optimize_population(**{**given, "outer_steps": 1, **changes})


def minimized(**changes: Any) -> Any:
    given = {"problem": build(model()), "values": {"decay": torch.tensor(0.1)}, "training_batches": [BATCH]}
    return hi.minimizer(**{**given, **changes})


def names_of(function: Callable[..., Any], *without: str) -> list[str]:
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in without and parameter.kind is not parameter.VAR_KEYWORD
    ]


# those left out run for long, or write where the test does not look
EDGE: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "hyperparameter": (declared, names_of(hi.hyperparameter)),
    "knob": (declared_knob, ["name", "distribution", "builder"]),
    "BilevelProblem": (problem, names_of(hi.BilevelProblem)),
    "optimize": (optimized, names_of(hi.optimize, "checkpoint", "tracking")),
    "hypergradient": (differentiated, names_of(hi.hypergradient)),
    "HyperOptimizer": (
        stepped, [*names_of(hi.HyperOptimizer), "lr", "training_batch", "validation_batch", "state"],
    ),
    "check": (checked, names_of(hi.check, "training_batches", "validation_batches")),
    "compare": (compared, names_of(hi.compare, "training_batches", "validation_batch", "backends", "tracking")),
    "search": (searched, [*names_of(hi.search, "tracking", "artifacts", "compile"), "outer_lr", "keep_best_model"]),
    "optimize_population": (together, names_of(hi.optimize_population, "tracking", "compile")),
    "minimizer": (minimized, names_of(hi.minimizer, "training_batches")),
}  # fmt: skip


def is_users(error: BaseException) -> bool:
    """Whether an error was raised by a function of this file, where they are given."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__") == __name__


def given_anything(name: str, argument: str, value: Any) -> None:
    function, _ = EDGE[name]
    if is_huge(value) and argument not in ("outer_lr", "clip", "min_delta", "lr", "tolerance", "seed", "init"):
        return
    if callable(value) and argument in (
        "callbacks",
        "on_trial",
        "objectives",
        "optimizer",
        "outer_optimizer",
        "builder",
    ):
        return  # a function that is not of the kind raises what it likes
    if inspect.isbuiltin(value) or (isinstance(value, type) and argument == "init"):
        return
    try:
        found = works_or_says_why(lambda: function(**{argument: value}))
    except BaseException as error:
        if is_users(error):
            return
        raise AssertionError(f"{name}({argument}={type(value).__name__}): {type(error).__name__}: {error}") from error
    if isinstance(found, hi.Result):
        assert_sound(found)


@pytest.mark.parametrize("name", EDGE)
def test_any_object_in_the_place_of_any_argument(name: str) -> None:
    @settings(FEW, max_examples=25 if name in ("check", "compare", "search") else 60)
    @given(st.sampled_from(EDGE[name][1]), junk())
    def check(argument: str, value: Any) -> None:
        given_anything(name, argument, value)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("name", EDGE)
def test_any_object_in_the_place_of_any_argument_at_length(name: str) -> None:
    @MANY
    @given(st.sampled_from(EDGE[name][1]), junk())
    def check(argument: str, value: Any) -> None:
        given_anything(name, argument, value)

    check()


OPTIONS = [(case.name, option.name) for case in CASES for option in options_of(get_backend_class(case.name))]


def check_option(option: tuple[str, str], value: Any) -> None:
    """A backend with any value of any option: refused, or it differentiates and says how that ended."""
    name, key = option
    if is_huge(value) or (key == "compile" and value is True):
        return
    backend = works_or_says_why(lambda: hi.get_backend(name, **{key: value}))
    if backend is None:
        return
    found = works_or_says_why(lambda: differentiated(backend=backend, training_batches=[BATCH] * 3))
    if found is not None and found.status.usable:
        assert all(bool(g.isfinite().all()) for g in found.gradients.values())


@settings(FEW, max_examples=150)
@given(st.sampled_from(OPTIONS), junk())
@example(("unrolled", "folder"), "")
def test_any_option_of_any_backend(option: tuple[str, str], value: Any) -> None:
    check_option(option, value)


@pytest.mark.slow
@settings(FEW, max_examples=3000)
@given(st.sampled_from(OPTIONS), junk())
def test_any_option_of_any_backend_at_length(option: tuple[str, str], value: Any) -> None:
    check_option(option, value)


specs = st.one_of(
    junk(), st.fixed_dictionaries({"name": junk()}), st.dictionaries(st.sampled_from(["name", "terms", ""]), junk())
)


@settings(FEW, max_examples=100)
@given(specs)
def test_any_specification_of_a_backend(spec: Any) -> None:
    found = works_or_says_why(lambda: hi.get_backend(spec))
    assert found is None or isinstance(found, hi.Backend)


DISTRIBUTIONS = [FloatDistribution(0.0, 1.0), IntDistribution(1, 2), CategoricalDistribution(["a", 1])]


@FEW
@given(st.dictionaries(st.text(max_size=3), st.sampled_from(DISTRIBUTIONS), max_size=3))
def test_any_names_of_knobs(knobs: dict[str, Any]) -> None:
    def builder(**values: Any) -> None:
        return None

    decorated: Any = builder
    for name, distribution in knobs.items():
        decorated = works_or_says_why(lambda: hi.knob(name, distribution)(decorated)) or decorated  # noqa: B023
    assert {each.name for each in hi.knobs_of(decorated)} == {name for name in knobs if name.isidentifier()}


@pytest.mark.parametrize("tracking", [None, 1, "sqlite:///x", {}, 0.5, hi.Tracking], ids=str)
def test_any_object_in_the_place_of_tracking(tracking: Any) -> None:
    for call in (optimized, searched, compared):
        with pytest.raises(hi.HyperoptError, match="tracking must be True, False or a Tracking"):
            call(tracking=tracking)


@pytest.fixture
def words(command: Command) -> Callable[..., str]:
    """A command of the command line, with what it has said; it may succeed or fail, but not with a traceback."""
    import sys

    from hyperopt_implicit import cli

    def run(*arguments: str) -> str:
        sys.modules.pop("train", None)
        command._monkeypatch.setattr(sys, "argv", ["hyperopt-implicit", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = "".join(command._capsys.readouterr())
        assert end.value.code in (0, 1, 2, None)
        assert "Traceback" not in said
        assert "Run it again with --debug" not in said, said  # an error of ours says what to do
        return said

    return run


FLAGS = [
    "--backend", "--option", "--knob", "--outer-steps", "--inner-steps", "--outer-lr", "--clip", "--hessian-batches",
    "--patience", "--seed", "--device", "--threads", "--problem", "--warmup-steps",
]  # fmt: skip
VALUES = [
    "",
    "abc",
    "-1",
    "0",
    "nan",
    "inf",
    "1e400",
    "terms=",
    "=",
    "terms=[1]",
    "damping={}",
    "cg",
    "cpu",
    "meta",
    "é",
]


def test_any_word_on_the_command_line(words: Callable[..., str]) -> None:
    @settings(FEW, max_examples=60)
    @given(st.sampled_from(FLAGS), st.sampled_from(VALUES))
    def check(flag: str, value: str) -> None:
        words(
            "run", "train.py", "--no-tracking", "--outer-steps", "1", "--inner-steps", "1", "-k", "lr=0.1", flag, value
        )

    check()
