"""Gradient-based hyperparameter optimization for PyTorch."""

from hyperopt_implicit import auxiliary
from hyperopt_implicit.backend import (
    Backend,
    Hypergradient,
    Spec,
    State,
    Status,
    get_backend,
    list_backends,
)
from hyperopt_implicit.best_trial import BestTrial, load_best
from hyperopt_implicit.diagnostics import CheckReport, Comparison, check, compare
from hyperopt_implicit.errors import (
    AuxiliaryError,
    BackendError,
    CheckpointError,
    CommandError,
    DataError,
    DeclarationError,
    DistributedError,
    HypergradientError,
    HyperoptError,
    HyperoptWarning,
    LossError,
    ProblemError,
    SearchError,
    SecondDerivativeError,
)
from hyperopt_implicit.history import History, OuterStep, Result
from hyperopt_implicit.hyper_optimizer import HyperOptimizer, hypergradient
from hyperopt_implicit.hyperparameters import Hyperparameters, hyperparameter
from hyperopt_implicit.implicit import ImplicitBackend, Solution
from hyperopt_implicit.knobs import knob, knobs_of
from hyperopt_implicit.micro_batches import MicroBatches
from hyperopt_implicit.minimizer import minimizer
from hyperopt_implicit.operators import Hessian, LinearOperator
from hyperopt_implicit.optimize import optimize
from hyperopt_implicit.population import Population, optimize_population
from hyperopt_implicit.problem import BilevelProblem
from hyperopt_implicit.report import Report
from hyperopt_implicit.search import SearchResult, search
from hyperopt_implicit.tracking import Tracking
from hyperopt_implicit.vectors import Params

__all__ = [
    "AuxiliaryError",
    "Backend",
    "BackendError",
    "BestTrial",
    "BilevelProblem",
    "CheckReport",
    "CheckpointError",
    "CommandError",
    "Comparison",
    "DataError",
    "DeclarationError",
    "DistributedError",
    "Hessian",
    "History",
    "HyperOptimizer",
    "Hypergradient",
    "HypergradientError",
    "HyperoptError",
    "HyperoptWarning",
    "Hyperparameters",
    "ImplicitBackend",
    "LinearOperator",
    "LossError",
    "MicroBatches",
    "OuterStep",
    "Params",
    "Population",
    "ProblemError",
    "Report",
    "Result",
    "SearchError",
    "SearchResult",
    "SecondDerivativeError",
    "Solution",
    "Spec",
    "State",
    "Status",
    "Tracking",
    "auxiliary",
    "check",
    "compare",
    "get_backend",
    "hypergradient",
    "hyperparameter",
    "knob",
    "knobs_of",
    "list_backends",
    "load_best",
    "minimizer",
    "optimize",
    "optimize_population",
    "search",
]
