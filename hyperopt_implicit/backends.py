"""The backends by class, for users: ``hyperopt_implicit.backends.Neumann(terms=20)``.

The core never imports this file: it finds backends through their entry points.
"""

from hyperopt_implicit_backends import (
    F2SA,
    Amigo,
    Auto,
    Bome,
    ConjugateGradient,
    Evolution,
    Exact,
    FiniteDifference,
    FixedPoint,
    Forward,
    ForwardGradient,
    HeavyBall,
    Identity,
    MinimalResidual,
    Neumann,
    Nystrom,
    Saba,
    Sama,
    Soba,
    StocBio,
    Unrolled,
)

__all__ = [
    "F2SA",
    "Amigo",
    "Auto",
    "Bome",
    "ConjugateGradient",
    "Evolution",
    "Exact",
    "FiniteDifference",
    "FixedPoint",
    "Forward",
    "ForwardGradient",
    "HeavyBall",
    "Identity",
    "MinimalResidual",
    "Neumann",
    "Nystrom",
    "Saba",
    "Sama",
    "Soba",
    "StocBio",
    "Unrolled",
]
