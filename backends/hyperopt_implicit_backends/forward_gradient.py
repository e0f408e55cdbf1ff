"""``forward_gradient``: the hypergradient's slopes along random directions, carried forward with training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from hyperopt_implicit.backend import Backend, Card, Hypergradient, State, Status
from hyperopt_implicit.forward_mode import push_forward, random_directions, seeded_generator
from hyperopt_implicit.operators import validation_gradients
from hyperopt_implicit.optimizers import check_tunable
from hyperopt_implicit.vectors import add_, dot, is_finite, zeros_like

if TYPE_CHECKING:
    from hyperopt_implicit.problem import BilevelProblem


@dataclass(frozen=True)
class ForwardGradient(Backend):
    """Forward mode along random directions in λ-space: unbiased, for any number of hyperparameters.

    With m scalar hyperparameters, g = dF/dλ of the steps taken and k directions d_i,

        ĝ = (m/k) Σ_i ⟨g, d_i⟩ d_i  (orthonormal),   ĝ = (1/k) Σ_i ⟨g, d_i⟩ d_i  (independent Gaussian).

    Each slope ⟨g, d⟩ = ⟨∂F/∂w, ∂w_T/∂λ·d⟩ + ⟨∂F/∂λ, d⟩ is exact and comes from one tangent carried along with
    training, as in ``forward``. Both estimates have the mean g. Their variance E‖ĝ − g‖² is (m/k − 1)‖g‖² for
    orthonormal directions, which are exact from k = m on, and ((m + 1)/k)‖g‖² for Gaussian ones. The expected squared
    cosine between ĝ and g is k/m for orthonormal directions: with many more hyperparameters than directions an
    estimate says little about where g points, and many outer steps with a small learning rate have to average it.

    The directions come from a generator of its own, seeded by ``seed`` and the number of the call. Take it where
    ``forward`` has too many hyperparameters and ``unrolled`` too many steps for the memory.

    Cost: for each step the gradient with its graph and k Hessian-vector products; memory for k + 1 times the parameters
    and the optimizer's state, whatever the number of steps. Of orthonormal directions no more than m are taken.

    Departs from the papers: Baydin et al. take one Gaussian direction at a time, through a forward pass of a network;
    orthonormal directions, and tangents through the optimizer's steps, are ours.

    References:
        Baydin et al., "Gradients without Backpropagation", 2022, arXiv:2202.08587, definition 1.
        Silver et al., "Learning by Directional Gradient Descent", ICLR 2022.

    Example:
        >>> import hyperopt_implicit as hi
        >>> hi.get_backend("forward_gradient", directions=4)
        ForwardGradient(directions=4, orthogonal=True, seed=0)
    """

    directions: Annotated[int, Field(ge=1, description="number of random directions k")] = 16
    orthogonal: Annotated[
        bool, Field(description="orthonormal directions, exact from k = m on; otherwise independent Gaussian ones")
    ] = True
    seed: Annotated[int, Field(ge=0, description="of the generator of the directions")] = 0

    differentiates: ClassVar[Literal["solution", "trajectory"]] = "trajectory"
    takes_complex_weights: ClassVar[bool] = False

    card: ClassVar[Card] = Card(
        family="unrolled",
        gives="an unbiased estimate of the derivative of the steps taken; variance (m/k − 1)‖g‖² with k directions",
        cost="k products and 1 gradient a step",
        memory="(k + 1) × (1 and the optimizer's state), however many steps",
        conditions="none; a step's second derivative, m/k not too large",
        use="many steps and too many hyperparameters for forward",
        paper="Baydin et al. 2022, Silver et al. 2022",
    )

    def check(self, problem: BilevelProblem) -> None:
        super().check(problem)
        check_tunable(problem.optimizer, problem.hyperparameters.names("optimizer"))

    def hypergradient(
        self,
        problem: BilevelProblem,
        training_batches: Sequence[Any],
        validation_batch: Any,
        state: State,
        /,
    ) -> Hypergradient:
        call = int(state.get("calls", 0))
        generator = seeded_generator(self.seed, call)
        drawn = random_directions(problem.hparams, self.directions, orthogonal=self.orthogonal, generator=generator)
        sweep = push_forward(problem, training_batches, drawn.directions)
        end, steps = sweep.endpoint, len(sweep.losses)
        validation_loss, vector, direct = validation_gradients(problem, validation_batch, end.params, end.buffers)
        gradients, status = direct, Status.NON_FINITE
        if sweep.is_finite and is_finite(vector):
            gradients = zeros_like(direct)
            for direction, tangent in zip(drawn.directions, sweep.tangents, strict=True):
                add_(gradients, direction, drawn.scale * (dot(vector, tangent) + dot(direct, direction)))
            if is_finite(gradients):
                status = Status.CONVERGED if drawn.complete else Status.TRUNCATED
        return Hypergradient(
            gradients=gradients,
            status=status,
            iterations=steps,
            residual=None,
            hvps=steps * len(drawn.directions),
            validation_loss=validation_loss,
            training_loss=sum(sweep.losses) / steps,
            state={"calls": call + 1},
            endpoint=end,
        )
