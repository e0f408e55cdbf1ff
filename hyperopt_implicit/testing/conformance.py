"""A conformance suite for backends, ours or a stranger's: derive :class:`BackendConformance` in a file for pytest.

Each test computes a hypergradient in float64 on a small problem (``specimens.py``) and compares it with a closed form,
a dense solve, one long graph or finite differences (``oracles.py``), or checks a promise of the contract in
``backend.py``. Nothing here imports pytest: the tests are ordinary methods that raise AssertionError
(``assertions.py``).
"""

from __future__ import annotations

import copy
import math
import warnings

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from hyperopt_implicit.backend import State, Status
from hyperopt_implicit.errors import BackendError, HyperoptWarning
from hyperopt_implicit.hyperparameters import hyperparameter
from hyperopt_implicit.implicit import ImplicitBackend
from hyperopt_implicit.inner_loop import train_step
from hyperopt_implicit.problem import BilevelProblem
from hyperopt_implicit.testing.assertions import (
    assert_close,
    assert_finite,
    assert_unchanged,
    cosine,
    relative_error,
    same,
    saved_and_loaded,
)
from hyperopt_implicit.testing.comparison import Comparison
from hyperopt_implicit.testing.oracles import (
    DenseOperator,
    finite_differences,
    retrained_differences,
    train_to_minimum,
    unrolled_hypergradient,
)
from hyperopt_implicit.testing.specimens import (
    TRAINING,
    VALIDATION,
    Batch,
    Linear,
    Twice,
    gradient_descent,
    half_mean_square,
    logistic_problem,
    network_problem,
    quadratic_problem,
    regression_data,
    ridge_problem,
    ridge_truth,
    seeded,
)
from hyperopt_implicit.vectors import clone


class BackendConformance(Comparison):
    """Tests that any backend must pass; derive a class whose name pytest collects, and say what is tested.

    Attributes:
        backend: the instance under test, with options that allow it the accuracy stated. The problems have up to 13
            parameters, and Hessians of condition number up to a hundred.
        accuracy: relative error, in norm, that its hypergradients keep to.
        cosine: for a method that is biased whatever its options: the least cosine with the truth that it keeps to, in
            the place of the accuracy.
        calls: how many calls, each with the state that the last one left, it takes to get there.

    A backend that differentiates the solution is compared with the implicit function theorem solved densely, and one
    that differentiates the trajectory with one graph over the same steps of gradient descent; both with closed forms
    and finite differences at a minimum, where a trajectory gets as many steps as its accuracy needs.

    Example:
        >>> import hyperopt_implicit as hi
        >>> from hyperopt_implicit.testing import BackendConformance
        >>> class TestMyBackend(BackendConformance):       # in test_my_backend.py; pytest runs all its tests
        ...     backend = hi.get_backend("cg", tolerance=1e-12, max_iterations=100)
        ...     accuracy = 1e-8
        >>> TestMyBackend().test_ridge()                   # or one by hand
    """

    # ---------------------------------------------------------------------------------------------- closed forms

    def test_ridge(self) -> None:
        """One decay for all features."""
        problem = ridge_problem()
        self.check_at_minimum(problem, TRAINING, VALIDATION, ridge_truth(problem, TRAINING, VALIDATION))

    def test_ridge_with_a_decay_per_feature(self) -> None:
        """A hyperparameter that is a vector."""
        problem = ridge_problem(decay=torch.tensor([0.1, 0.3, 1.0, 2.0]))
        self.check_at_minimum(problem, TRAINING, VALIDATION, ridge_truth(problem, TRAINING, VALIDATION))

    def test_scale_of_the_training_loss(self) -> None:
        """c·L has the minima of L, so its hypergradient too: no factor of a step size is left over."""
        for scale in (0.05, 20.0):
            problem = ridge_problem(scale=scale)
            self.check_at_minimum(problem, TRAINING, VALIDATION, ridge_truth(problem, TRAINING, VALIDATION))

    def test_one_parameter(self) -> None:
        """A one-dimensional problem is solved in one step, which must not be lost."""
        training, validation = regression_data(0, features=1), regression_data(1, features=1)
        for decay in (0.3, 2.0):
            problem = ridge_problem(Linear(1), decay=decay)
            self.check_at_minimum(problem, training, validation, ridge_truth(problem, training, validation))

    def test_hyperparameter_in_the_validation_loss(self) -> None:
        """F depends on λ directly, and through w: the direct term counts."""

        def validation_loss(model: nn.Module, batch: Batch, *, decay: Tensor) -> Tensor:
            return half_mean_square(model, batch) + decay * next(model.parameters()).square().sum() + decay**2

        def outer(w: Tensor, decay: Tensor, batch: Batch) -> Tensor:
            return 0.5 * (batch[0] @ w - batch[1]).square().mean() + decay * w.square().sum() + decay**2

        problem = ridge_problem(validation_loss=validation_loss)
        expected = ridge_truth(problem, TRAINING, VALIDATION, outer=outer)
        self.check_at_minimum(problem, TRAINING, VALIDATION, expected)

    def test_validation_loss_without_the_weights(self) -> None:
        """∂F/∂w = 0: nothing to solve, and only the direct term is left."""

        def validation_loss(model: nn.Module, batch: Batch, *, decay: Tensor) -> Tensor:
            return decay**2

        problem = ridge_problem(validation_loss=validation_loss)
        expected = ridge_truth(problem, TRAINING, VALIDATION, outer=lambda w, decay, batch: decay**2)
        self.check_at_minimum(problem, TRAINING, VALIDATION, expected)

    # -------------------------------------------------------------------------------------- dense solves, differences

    def test_logistic_regression(self) -> None:
        """A loss that is not quadratic, at its converged optimum."""
        x, y = regression_data(0, rows=40)
        problem = logistic_problem()
        self.check_at_minimum(problem, (x, y.sign()), (x[:10].flip(1), y[:10].sign()))

    def test_network_against_finite_differences(self) -> None:
        """F(w*(λ)) itself, differenced through training that converged: what a hypergradient is meant to be."""
        training, validation = regression_data(0, features=2), regression_data(1, features=2)
        problem = network_problem(seeded(lambda: nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))), decay=0.3)
        result = self.at_minimum(problem, training, validation)

        def minimum() -> float:
            train_to_minimum(problem, [training])
            return float(problem.validation_loss(validation))

        expected = finite_differences(minimum, problem.hparams)
        self.agree(result.gradients, expected, least=1e-8)

    def test_indefinite_hessian(self) -> None:
        """At a saddle point, a result that claims to have converged is right, and no result is silently not finite."""
        matrix = torch.diag(torch.tensor([2.0, 1.0, 0.5, -0.7], dtype=torch.float64))
        problem = quadratic_problem(matrix)
        result = self.compute(problem, [None] * 5, None)
        error = relative_error(result.gradients, self.truth(problem, [None] * 5, None))
        if result.status is Status.CONVERGED and not error <= self.accuracy:
            raise AssertionError(f"the Hessian is indefinite, the status 'converged' and the result off by {error:.3g}")
        if result.status is not Status.NON_FINITE:
            assert_finite(result.gradients)

    def test_several_training_batches(self) -> None:
        """The training loss is averaged over them, or they are stepped through in order."""
        batches = [regression_data(seed, rows=10) for seed in (0, 1, 2)]
        validation = regression_data(3)
        problem = ridge_problem(decay=torch.tensor([0.1, 0.3, 1.0, 2.0]))
        train_to_minimum(problem, batches)
        expected = self.truth(problem, batches, validation)
        result = self.compute(problem, batches, validation)
        if self.backend.batches == "averaged":
            self.agree(result.gradients, expected)
        elif not cosine(result.gradients, expected) > 0.5:  # right for the average in expectation only
            raise AssertionError(f"it must point where the average does: {result.gradients}, {expected}")

    # ---------------------------------------------------------------------------------------- shapes that models take

    def test_unused_parameter(self) -> None:
        """A parameter that no loss uses has no part in it."""
        problem = ridge_problem(Linear(4, unused=nn.Parameter(torch.ones(3, dtype=torch.float64))))
        self.check_at_minimum(problem, TRAINING, VALIDATION, ridge_truth(problem, TRAINING, VALIDATION))

    def test_frozen_parameter(self) -> None:
        """A parameter without requires_grad is a constant."""
        frozen = nn.Parameter(torch.full((), 2.0, dtype=torch.float64), requires_grad=False)
        problem = ridge_problem(Linear(4, frozen=frozen), extra=lambda model: model.frozen * model.weight.sum())
        self.check_at_minimum(problem, TRAINING, VALIDATION)
        if frozen.item() != 2.0:
            raise AssertionError("a frozen parameter has moved")

    def test_tied_weights(self) -> None:
        """One parameter under two names counts once, with both of its uses."""
        problem = ridge_problem(Twice(4))
        self.check_at_minimum(problem, TRAINING, VALIDATION, ridge_truth(problem, TRAINING, VALIDATION, factor=2.0))

    def test_linear_parameter(self) -> None:
        """Where L depends linearly on a parameter, H has a row of zeros; if F ignores it, nothing else changes."""
        problem = ridge_problem()
        train_to_minimum(problem, [TRAINING])
        slope = nn.Parameter(torch.ones(2, dtype=torch.float64))
        linear = ridge_problem(Linear(4, slope=slope), extra=lambda model: 3.0 * model.slope.sum())
        linear.model.load_state_dict({**problem.model.state_dict(), "slope": slope.detach()})
        batches = self.repeated(TRAINING)
        expected = self.truth(problem, batches, VALIDATION)
        self.agree(self.compute(linear, batches, VALIDATION).gradients, expected)

    def test_parameters_from_a_generator(self) -> None:
        """The inner optimizer may have been built from a generator, and have read it to its end."""
        model = Linear(4)
        problem = ridge_problem(model, optimizer=lambda _: torch.optim.SGD((p for p in model.parameters()), lr=0.1))
        self.check_at_minimum(problem, TRAINING, VALIDATION, ridge_truth(problem, TRAINING, VALIDATION))

    # ------------------------------------------------------------------------------ shapes that hyperparameters take

    def test_unused_hyperparameter(self) -> None:
        """A hyperparameter without influence has gradient zero, and its user is warned."""
        problem = ridge_problem(also=hyperparameter("unused", init=1.0))
        expected = ridge_truth(problem, TRAINING, VALIDATION)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = self.at_minimum(problem, TRAINING, VALIDATION)
        self.agree(result.gradients, expected)
        about = [w for w in caught if issubclass(w.category, HyperoptWarning) and "'unused'" in str(w.message)]
        if self.backend.needs_second_derivative and not about:
            raise AssertionError("a hyperparameter that no loss uses must be named in a HyperoptWarning")

    def test_hyperparameters_that_enter_as_a_sum(self) -> None:
        """Their gradients are equal; autograd gives both in the same memory."""
        problem = ridge_problem(also=hyperparameter("second", init=0.3, constraint=constraints.positive))
        result = self.check_at_minimum(problem, TRAINING, VALIDATION)
        allowed = 1e-12 if self.backend.needs_validation_gradient else self.accuracy
        assert_close({"decay": result.gradients["decay"]}, {"decay": result.gradients["second"]}, allowed)

    def test_hyperparameter_that_is_a_module(self) -> None:
        """An auxiliary network weighs the rows; its frozen parameters are not among the gradients."""
        auxiliary = seeded(lambda: nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 1)))
        auxiliary.get_parameter("0.bias").requires_grad_(False)

        @hyperparameter("auxiliary", init=auxiliary)
        def training_loss(model: nn.Module, batch: Batch, *, auxiliary: nn.Module) -> Tensor:
            x, y = batch
            loss: Tensor = 0.5 * (auxiliary(x)[:, 0].exp() * (model(x) - y).square()).mean()
            return loss + 0.1 * next(model.parameters()).square().sum()

        problem = BilevelProblem(Linear(4), training_loss, half_mean_square, optimizer=gradient_descent)
        result = self.check_at_minimum(problem, TRAINING, VALIDATION)
        if result.gradients.keys() != {f"auxiliary.{name}" for name in ("0.weight", "2.weight", "2.bias")}:
            raise AssertionError(
                f"one gradient for each parameter that requires it; there are {list(result.gradients)}"
            )

    def test_hyperparameter_of_the_optimizer(self) -> None:
        """Differentiated along a trajectory; refused by name where only the solution is seen."""
        rate = hyperparameter("lr", init=0.1, constraint=constraints.positive, target="optimizer")
        problem = ridge_problem(also=rate)
        if self.backend.for_problem(problem).differentiates == "trajectory":
            batches = [TRAINING] * 5
            expected = unrolled_hypergradient(problem, batches, VALIDATION)
            self.agree(self.compute(problem, batches, VALIDATION).gradients, expected)
            return
        try:
            self.compute(problem, [TRAINING], VALIDATION)
        except BackendError as error:
            if "'lr'" not in str(error):
                raise AssertionError(f"the message must name the hyperparameter 'lr'; it is: {error}") from error
        else:
            raise AssertionError("a backend that cannot see the learning rate must refuse it in check()")

    # ------------------------------------------------------------------------------------------ layers that hold state

    def test_batch_norm_in_training_mode(self) -> None:
        """Batch statistics are differentiated, and running statistics stay as they were.

        A backend that only evaluates F sees as well what training leaves in the running statistics.
        """
        training, validation = regression_data(0, features=2), regression_data(1, features=2)
        problem = network_problem(
            seeded(lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Tanh(), nn.Linear(2, 1))), decay=1.0
        )
        train_to_minimum(problem, [training])
        batches = self.repeated(training)
        oracle = self.truth if self.backend.needs_validation_gradient else retrained_differences
        expected = oracle(problem, batches, validation)
        with assert_unchanged(problem):
            result = self.compute(problem, batches, validation)
        self.agree(result.gradients, expected)

    def test_dropout(self) -> None:
        """One draw of masks for each look at a batch: all products are of one matrix, and a seed fixes the result."""
        problem = ridge_problem(nn.Sequential(Linear(4), nn.Dropout(0.5)))
        train_to_minimum(problem, [TRAINING], max_steps=1)
        results = []
        with torch.random.fork_rng(devices=[]):
            for _ in range(2):
                torch.manual_seed(0)
                results.append(self.compute(problem, self.repeated(TRAINING), VALIDATION))
        assert_finite(results[0].gradients)
        if results[0].status.failed:
            raise AssertionError(f"masks that change between products? The status is {results[0].status.value!r}")
        assert_close(results[0].gradients, results[1].gradients, 0.0, "a second hypergradient under the same seed")

    # ----------------------------------------------------------------------------------------------- promises it makes

    def test_changes_nothing(self) -> None:
        """Neither the model, nor λ, the optimizer, any .grad or, where nothing draws, the global random state."""
        problem = ridge_problem()
        for p in (*problem.params.values(), *problem.hparams.values()):
            p.grad = torch.ones_like(p)
        with assert_unchanged(problem):
            self.compute(problem, [TRAINING, TRAINING], VALIDATION)

    def test_inside_no_grad(self) -> None:
        """The caller's grad mode makes no difference."""
        problem = ridge_problem()
        train_to_minimum(problem, [TRAINING])
        expected = self.truth(problem, [TRAINING], VALIDATION)
        with torch.no_grad():
            result = self.compute(problem, [TRAINING], VALIDATION)
        self.agree(result.gradients, expected)

    def test_report(self) -> None:
        """What comes with the gradients means what the contract says."""
        problem = ridge_problem(decay=torch.tensor([0.1, 0.3, 1.0, 2.0]))
        result = self.compute(problem, [TRAINING], VALIDATION)
        if self.through_training != (result.endpoint is not None):
            raise AssertionError("endpoint must be where a trajectory arrived, and None for a solution")
        training_loss = float(problem.training_loss(TRAINING).detach())
        if result.endpoint is not None:
            train_step(problem, TRAINING, problem.hyperparameters.values())
            assert_close(result.endpoint.params, problem.params, 1e-12, "the endpoint")
        for name, value in (("training", training_loss), ("validation", float(problem.validation_loss(VALIDATION)))):
            found = getattr(result, f"{name}_loss")
            if not math.isclose(found, value, rel_tol=1e-9):
                raise AssertionError(f"{name}_loss must be {value}; it is {found}")
        for name, count in (("iterations", result.iterations), ("hvps", result.hvps)):
            if not isinstance(count, int) or count < 0:
                raise AssertionError(f"{name} must be a whole number of at least 0; it is {count!r}")
        if not isinstance(result.status, Status):
            raise AssertionError(f"status must be a Status; it is {result.status!r}")
        if result.residual is not None and not 0.0 <= result.residual < 1.0:
            raise AssertionError(f"residual must be ‖Hu − v‖/‖v‖ of a sound solution; it is {result.residual!r}")

    def test_residual_is_the_true_one(self) -> None:
        """‖Hu − v‖/‖v‖, worked out again from u and a matrix; the right-hand side is not changed."""
        if not isinstance(self.backend, ImplicitBackend):
            return
        generator = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
        matrix = basis @ torch.diag(torch.linspace(0.5, 5.0, 8, dtype=torch.float64)) @ basis.T
        vector = {"weight": torch.randn(8, generator=generator, dtype=torch.float64)}
        given = clone(vector)
        problem = BilevelProblem(Linear(8), half_mean_square, half_mean_square, optimizer=gradient_descent)
        with torch.no_grad():
            solution = self.backend.solver(problem)(DenseOperator(matrix), vector, {})
        if solution.residual is None:
            return
        assert_close(vector, given, 0.0, "the right-hand side")
        residual = relative_error({"weight": matrix @ solution.value["weight"]}, vector)
        if abs(residual - solution.residual) > 1e-6 * residual + 1e-12:
            raise AssertionError(f"the residual is {residual:.6g}, and {solution.residual:.6g} was reported")

    def test_state_carries_and_survives(self) -> None:
        """What one call leaves can be saved, loaded and handed to the next, which is no worse for it, or dropped."""
        problem = ridge_problem(decay=torch.tensor([0.1, 0.3, 1.0, 2.0]))
        first = self.at_minimum(problem, TRAINING, VALIDATION)
        state = saved_and_loaded(first.state)
        batches = self.repeated(TRAINING)
        expected = self.truth(problem, batches, VALIDATION)
        carried: State
        for carried in (state, {}):
            given = copy.deepcopy(carried)
            result = self.compute(problem, batches, VALIDATION, carried)
            self.agree(result.gradients, expected)
            if not same(carried, given):
                raise AssertionError("a backend must not change the state that it is given")
