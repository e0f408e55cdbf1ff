"""Is a hypergradient right, and which backend is the best on a problem? Measured on copies of the problem itself."""

from hyperopt_implicit.diagnostics.check import check
from hyperopt_implicit.diagnostics.compare import compare
from hyperopt_implicit.diagnostics.comparison import Comparison, Row
from hyperopt_implicit.diagnostics.measurements import CheckReport, Measurements

__all__ = ["CheckReport", "Comparison", "Measurements", "Row", "check", "compare"]
