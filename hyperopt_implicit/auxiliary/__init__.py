"""Auxiliary learning: combining the losses of several tasks so that the main one generalises.

What is learned through the validation loss is in ``combiners.py`` and ``labels.py``, what it is compared with in
``weighting.py`` and the files of methods beside it.
"""

from hyperopt_implicit.auxiliary.combiners import LinearCombiner, LossCombiner
from hyperopt_implicit.auxiliary.context import Context
from hyperopt_implicit.auxiliary.gradient_weighting import GradientCosine, GradNorm, PCGrad
from hyperopt_implicit.auxiliary.labels import LabelGenerator, entropy_penalty, focal_loss
from hyperopt_implicit.auxiliary.loss_weighting import (
    DynamicWeightAverage,
    EqualWeights,
    FixedWeights,
    SingleTask,
    UncertaintyWeighting,
)
from hyperopt_implicit.auxiliary.meta_optimizer import MetaOptimizer
from hyperopt_implicit.auxiliary.network_combiners import ConvolutionalCombiner, NonlinearCombiner
from hyperopt_implicit.auxiliary.task_report import TaskReading, TaskReport, TaskVerdict
from hyperopt_implicit.auxiliary.weighting import Weighting, get_weighting, list_weightings

__all__ = [
    "Context",
    "ConvolutionalCombiner",
    "DynamicWeightAverage",
    "EqualWeights",
    "FixedWeights",
    "GradNorm",
    "GradientCosine",
    "LabelGenerator",
    "LinearCombiner",
    "LossCombiner",
    "MetaOptimizer",
    "NonlinearCombiner",
    "PCGrad",
    "SingleTask",
    "TaskReading",
    "TaskReport",
    "TaskVerdict",
    "UncertaintyWeighting",
    "Weighting",
    "entropy_penalty",
    "focal_loss",
    "get_weighting",
    "list_weightings",
]
