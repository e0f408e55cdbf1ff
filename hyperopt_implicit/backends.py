"""The backends by class, for users: ``hyperopt_implicit.backends.Neumann(terms=20)``.

The core never imports this file: it finds backends through their entry points.
"""

from hyperopt_implicit_backends import ConjugateGradient, Exact, Neumann, Unrolled

__all__ = ["ConjugateGradient", "Exact", "Neumann", "Unrolled"]
