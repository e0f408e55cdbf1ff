"""``forward``: tangents of the weights carried along with training, one for each scalar hyperparameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from hyperopt_implicit.backend import Backend, Card, Hypergradient, State, Status
from hyperopt_implicit.errors import BackendError
from hyperopt_implicit.forward_mode import basis, number_of_entries, push_forward
from hyperopt_implicit.operators import validation_gradients
from hyperopt_implicit.optimizers import check_tunable
from hyperopt_implicit.vectors import dot, is_finite

if TYPE_CHECKING:
    from hyperopt_implicit.problem import BilevelProblem


@dataclass(frozen=True)
class Forward(Backend):
    """Forward-mode differentiation through the inner optimizer's steps: the memory does not grow with them.

    With w_{t+1} = Φ_t(w_t, λ) and Z_t = ∂w_t/∂λ, one column for each scalar hyperparameter,

        Z_{t+1} = (∂Φ_t/∂w) Z_t + ∂Φ_t/∂λ,   Z_0 = 0,   dF/dλ = ∂F/∂λ + Z_Tᵀ ∂F/∂w.

    w stands for the weights and all that the optimizer keeps for them. The result is that of ``unrolled``, to rounding:
    exact for the steps taken, with the weights at their beginning as given, and it sees hyperparameters of the
    optimizer. Φ is the update of torch.optim's own functional forms: SGD (momentum, Nesterov, weight decay), Adam,
    AdamW, RMSprop, Adagrad, NAdam, RAdam, Adadelta.

    The tangent of the gradient, (∂²L/∂w²)δw + (∂²L/∂w∂λ)δλ, is taken backward through the graph of ∂L/∂(w, λ), which
    is the same by the symmetry of second derivatives and covers the operators that forward-mode automatic
    differentiation does not. (Where a ``torch.autograd.Function`` makes up a gradient that is not one, as
    straight-through estimators do, there is no such symmetry, and the result differs from that of ``unrolled``.)
    Running statistics of normalisation layers move as in training and are not differentiated.

    Take it for few hyperparameters and long training: learning rates, decays, loss weights. ``unrolled`` takes one
    product a step whatever the number of hyperparameters, and memory for every step.

    Cost: for each step the gradient with its graph and m Hessian-vector products, m being the number of scalar
    hyperparameters; memory for m + 1 times the parameters and the optimizer's state, whatever the number of steps.

    References:
        Williams, Zipser, "A Learning Algorithm for Continually Running Fully Recurrent Neural Networks", Neural
            Computation 1989.
        Franceschi et al., "Forward and Reverse Gradient-Based Hyperparameter Optimization", ICML 2017, section 3.2.

    Example:
        >>> import hyperopt_implicit as hi
        >>> hi.get_backend("forward")
        Forward(max_directions=32)
    """

    max_directions: Annotated[
        int, Field(ge=1, description="refuse more scalar hyperparameters than this; each costs a product a step")
    ] = 32

    differentiates: ClassVar[Literal["solution", "trajectory"]] = "trajectory"
    takes_complex_weights: ClassVar[bool] = False

    card: ClassVar[Card] = Card(
        family="unrolled",
        gives="the derivative of the steps taken, to rounding",
        cost="m products and 1 gradient a step",
        memory="(m + 1) × (1 and the optimizer's state), however many steps",
        conditions="none; a step's second derivative, few hyperparameters",
        use="few hyperparameters and many steps, learning-rate schedules",
        paper="Franceschi et al. 2017",
    )

    def check(self, problem: BilevelProblem) -> None:
        super().check(problem)
        check_tunable(problem.optimizer, problem.hyperparameters.names("optimizer"))
        found = number_of_entries(problem.hparams)
        if found > self.max_directions:
            raise BackendError(
                f"forward mode takes a product a step for each scalar hyperparameter, of which there may be at most "
                f"max_directions={self.max_directions}; the problem has {found}. Use 'unrolled', whose cost does not "
                "grow with them, or 'forward_gradient', which takes random directions, or raise max_directions."
            )

    def hypergradient(
        self,
        problem: BilevelProblem,
        training_batches: Sequence[Any],
        validation_batch: Any,
        state: State,
        /,
    ) -> Hypergradient:
        directions = basis(problem.hparams)
        sweep = push_forward(problem, training_batches, directions)
        end, steps = sweep.endpoint, len(sweep.losses)
        validation_loss, vector, direct = validation_gradients(problem, validation_batch, end.params, end.buffers)
        gradients, status = direct, Status.NON_FINITE
        if sweep.is_finite and is_finite(vector):
            slopes = torch.tensor([dot(vector, tangent) for tangent in sweep.tangents], dtype=torch.float64)
            pieces = slopes.split([x.numel() for x in direct.values()])
            gradients = {
                name: x + piece.reshape(x.shape).to(x) for (name, x), piece in zip(direct.items(), pieces, strict=True)
            }
            if is_finite(gradients):
                status = Status.CONVERGED
        return Hypergradient(
            gradients=gradients,
            status=status,
            iterations=steps,
            residual=None,
            hvps=steps * len(directions),
            validation_loss=validation_loss,
            training_loss=sum(sweep.losses) / steps,
            state=state,
            endpoint=end,
        )
