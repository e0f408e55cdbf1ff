"""A backend of a stranger's: Richardson iteration with a fixed step, written with nothing but the public names."""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

import hyperopt_implicit as hi


@dataclass(frozen=True)
class Richardson(hi.ImplicitBackend):
    """Richardson iteration: u ← u + α (v − Hu), a fixed number of times."""

    sweeps: Annotated[int, Field(ge=1, description="number of iterations")] = 50
    step_size: Annotated[float, Field(gt=0, description="α")] = 0.3

    def solve(self, hessian: hi.LinearOperator, vector: dict[str, Any], state: dict[str, Any], /) -> hi.Solution:
        solution = {name: v * 0.0 for name, v in vector.items()}
        for _ in range(self.sweeps):
            product = hessian @ solution
            solution = {name: u + self.step_size * (vector[name] - product[name]) for name, u in solution.items()}
        return hi.Solution(solution, hi.Status.TRUNCATED, self.sweeps, float("nan"))
