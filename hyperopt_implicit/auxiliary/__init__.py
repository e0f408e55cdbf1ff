"""Auxiliary learning: combining the losses of several tasks so that the main one generalises."""

from hyperopt_implicit.auxiliary.combiners import (
    ConvolutionalCombiner,
    LinearCombiner,
    LossCombiner,
    NonlinearCombiner,
)
from hyperopt_implicit.auxiliary.context import Context

__all__ = ["Context", "ConvolutionalCombiner", "LinearCombiner", "LossCombiner", "NonlinearCombiner"]
