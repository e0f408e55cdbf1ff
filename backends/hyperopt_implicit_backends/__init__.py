"""The backends that come with hyperopt_implicit, one a file, registered as anybody's would be."""

from hyperopt_implicit_backends.amigo import Amigo
from hyperopt_implicit_backends.auto import Auto
from hyperopt_implicit_backends.bome import Bome
from hyperopt_implicit_backends.cg import ConjugateGradient
from hyperopt_implicit_backends.evolution import Evolution
from hyperopt_implicit_backends.exact import Exact
from hyperopt_implicit_backends.f2sa import F2SA
from hyperopt_implicit_backends.finite_difference import FiniteDifference
from hyperopt_implicit_backends.fixed_point import FixedPoint
from hyperopt_implicit_backends.forward import Forward
from hyperopt_implicit_backends.forward_gradient import ForwardGradient
from hyperopt_implicit_backends.heavy_ball import HeavyBall
from hyperopt_implicit_backends.identity import Identity
from hyperopt_implicit_backends.minres import MinimalResidual
from hyperopt_implicit_backends.neumann import Neumann
from hyperopt_implicit_backends.nystrom import Nystrom
from hyperopt_implicit_backends.saba import Saba
from hyperopt_implicit_backends.sama import Sama
from hyperopt_implicit_backends.soba import Soba
from hyperopt_implicit_backends.stocbio import StocBio
from hyperopt_implicit_backends.unrolled import Unrolled

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
