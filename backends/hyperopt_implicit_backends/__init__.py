"""The backends that come with hyperopt_implicit, one a file, registered as anybody's would be."""

from hyperopt_implicit_backends.cg import ConjugateGradient
from hyperopt_implicit_backends.exact import Exact
from hyperopt_implicit_backends.neumann import Neumann
from hyperopt_implicit_backends.unrolled import Unrolled

__all__ = ["ConjugateGradient", "Exact", "Neumann", "Unrolled"]
