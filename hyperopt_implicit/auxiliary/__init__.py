"""Auxiliary learning: combining the losses of several tasks so that the main one generalises."""

from hyperopt_implicit.auxiliary.combiners import (
    ConvolutionalCombiner,
    LinearCombiner,
    LossCombiner,
    NonlinearCombiner,
)
from hyperopt_implicit.auxiliary.context import Context
from hyperopt_implicit.auxiliary.meta_optimizer import MetaOptimizer
from hyperopt_implicit.auxiliary.task_report import TaskReading, TaskReport, TaskVerdict

__all__ = [
    "Context",
    "ConvolutionalCombiner",
    "LinearCombiner",
    "LossCombiner",
    "MetaOptimizer",
    "NonlinearCombiner",
    "TaskReading",
    "TaskReport",
    "TaskVerdict",
]
