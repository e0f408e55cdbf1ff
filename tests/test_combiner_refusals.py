"""What loss combiners refuse, in the words that a person sees."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import hyperopt_implicit as hi
from hyperopt_implicit.auxiliary import Context, ConvolutionalCombiner, LinearCombiner, NonlinearCombiner

pytestmark = pytest.mark.usefixtures("float64")

ONES = torch.ones(2, 3)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "one task": (
        lambda: LinearCombiner(1),
        "a combiner needs the main task and at least one auxiliary task; got tasks=1.",
    ),
    "tasks by name": (
        lambda: NonlinearCombiner(["main", "other"]),  # type: ignore[arg-type]
        "a combiner needs the main task and at least one auxiliary task; got tasks=['main', 'other'].",
    ),
    "main task beyond the last": (
        lambda: LinearCombiner(3, main_task=3),
        "main_task must be the place of the main task among 3, from 0 to 2; got 3.",
    ),
    "main task from the end": (
        lambda: ConvolutionalCombiner(3, main_task=-1),
        "main_task must be the place of the main task among 3, from 0 to 2; got -1.",
    ),
    "one start too many": (
        lambda: LinearCombiner(3, init=[1.0, 2.0, 3.0]),
        "init must be one number, or 2, one for each learned weight; got shape (3,).",
    ),
    "start without the main task's": (
        lambda: LinearCombiner(3, init=[1.0, 2.0], softmax=True),
        "init must be one number, or 3, one for each learned weight; got shape (2,).",
    ),
    "start at zero": (
        lambda: LinearCombiner(3, init=[1.0, 0.0]),
        "the weights must be positive at the start; got init=[1.0, 0.0].",
    ),
    "negative start": (
        lambda: LinearCombiner(3, init=-1.0, monotone="clamp"),
        "the weights must be at least 0 at the start; got init=[-1.0, -1.0].",
    ),
    "start that is no number": (
        lambda: LinearCombiner(3, init=math.nan, monotone=False),
        "the weights must be finite at the start; got init=[nan, nan].",
    ),
    "softmax and weight_norm": (
        lambda: LinearCombiner(3, softmax=True, weight_norm=True),
        "softmax weights are positive and normalised by themselves; leave monotone=True and weight_norm=False.",
    ),
    "softmax that is not monotone": (
        lambda: LinearCombiner(3, softmax=True, monotone=False),
        "softmax weights are positive and normalised by themselves; leave monotone=True and weight_norm=False.",
    ),
    "clamp with a context": (
        lambda: LinearCombiner(3, monotone="clamp", context=Context(features=2)),
        "weights that depend on a context cannot be clamped, since they are not parameters; use monotone=True.",
    ),
    "monotone, maybe": (
        lambda: LinearCombiner(3, monotone="maybe"),  # type: ignore[arg-type]
        "monotone must be True, False or 'clamp'; got 'maybe'.",
    ),
    "activation misspelt": (
        lambda: NonlinearCombiner(3, activation="sofplus"),
        "activation must be one of softplus, tanh, sigmoid, relu, leaky_relu, elu, identity, gelu, silu, mish, or an "
        "nn.Module; got 'sofplus'. Did you mean 'softplus'?",
    ),
    "activation that falls": (
        lambda: ConvolutionalCombiner(3, activation="gelu", monotone="clamp"),
        "a monotone combiner needs an activation that never falls (softplus, tanh, sigmoid, relu, leaky_relu, elu, "
        "identity); GELU is not known to be one. Choose one of these, or set monotone=False.",
    ),
    "module of an activation that may fall": (
        lambda: NonlinearCombiner(3, activation=nn.PReLU()),
        "a monotone combiner needs an activation that never falls (softplus, tanh, sigmoid, relu, leaky_relu, elu, "
        "identity); PReLU is not known to be one. Choose one of these, or set monotone=False.",
    ),
    "everything dropped": (
        lambda: NonlinearCombiner(3, dropout=1.0),
        "dropout must be a share of at least 0 and below 1; got 1.0.",
    ),
    "no hidden layer": (
        lambda: NonlinearCombiner(3, hidden_sizes=()),
        "hidden_sizes must hold at least one positive whole number; got ().",
    ),
    "layer of no channels": (
        lambda: ConvolutionalCombiner(3, channels=(4, 0)),
        "channels must hold at least one positive whole number; got (4, 0).",
    ),
    "even kernel": (
        lambda: ConvolutionalCombiner(3, kernel_size=2),
        "kernel_size must be odd, so that images keep their size; got 2.",
    ),
    "context of nothing": (
        lambda: Context(),
        "a Context needs features of the input, classes of the label, or both; got features=0, classes=0.",
    ),
    "a scalar for the losses": (
        lambda: LinearCombiner(3)(torch.tensor(1.0)),
        "LinearCombiner takes losses of shape [batch, tasks] with 3 tasks; got (). They are already reduced: compute "
        "them with reduction='none' and stack them along dimension 1, or give one row of means, losses[None].",
    ),
    "losses reduced over the batch": (
        lambda: NonlinearCombiner(3)(torch.ones(3)),
        "NonlinearCombiner takes losses of shape [batch, tasks] with 3 tasks; got (3,). They are already reduced: "
        "compute them with reduction='none' and stack them along dimension 1, or give one row of means, losses[None].",
    ),
    "losses of another number of tasks": (
        lambda: LinearCombiner(3)(torch.ones(8, 4)),
        "LinearCombiner takes losses of shape [batch, tasks] with 3 tasks; got (8, 4). Give it one column for each "
        "task, or make it with tasks=4.",
    ),
    "images for a linear combiner": (
        lambda: LinearCombiner(3)(torch.ones(8, 3, 5, 5)),
        "LinearCombiner takes losses of shape [batch, tasks] with 3 tasks; got (8, 3, 5, 5). Reduce each task's loss "
        "to that shape first, for instance by its mean over what is too much.",
    ),
    "numbers for a convolutional one": (
        lambda: ConvolutionalCombiner(3)(torch.ones(8, 3)),
        "ConvolutionalCombiner takes losses of shape [batch, tasks, height, width] with 3 tasks; got (8, 3). They are "
        "already reduced: compute them with reduction='none' and stack them along dimension 1, or give one row of "
        "means, losses[None].",
    ),
    "no inputs": (
        lambda: LinearCombiner(3, context=Context(features=2, classes=3))(ONES, labels=torch.tensor([2, 0])),
        "this combiner is conditioned on the inputs: call it with inputs=.",
    ),
    "no labels": (
        lambda: NonlinearCombiner(3, context=Context(features=2, classes=3))(ONES, inputs=torch.ones(2, 2)),
        "this combiner is conditioned on the labels: call it with labels=.",
    ),
    "inputs of another size": (
        lambda: LinearCombiner(3, context=Context(features=2))(ONES, inputs=torch.ones(2, 5)),
        "the encoded inputs must have shape [batch, 2]; got (2, 5). Set features= to what the encoder gives.",
    ),
    "labels out of range": (
        lambda: LinearCombiner(3, context=Context(classes=2))(ONES, labels=torch.tensor([2, 0])),
        "labels must be whole numbers from 0 to 1, one for each sample; got 0 to 2.",
    ),
    "labels below zero": (
        lambda: LinearCombiner(3, context=Context(classes=2))(ONES, labels=torch.tensor([-1, 0])),
        "labels must be whole numbers from 0 to 1, one for each sample; got -1 to 0.",
    ),
    "labels that are true or false": (
        lambda: LinearCombiner(3, context=Context(classes=2))(ONES, labels=torch.tensor([True, False])),
        "labels must be whole numbers from 0 to 1, one for each sample; got torch.bool of shape (2,).",
    ),
    "context of other samples": (
        lambda: LinearCombiner(3, context=Context(classes=2))(ONES, labels=torch.tensor([1, 0, 1])),
        "losses and context must have one row for each sample; got 2 rows of losses and 3 of inputs and labels.",
    ),
    "monotone as a number": (
        lambda: NonlinearCombiner(3, monotone=1),  # type: ignore[arg-type]
        "monotone must be True, False or 'clamp'; got 1.",
    ),
    "rising activation that was made to fall": (
        lambda: NonlinearCombiner(3, activation=nn.LeakyReLU(-0.5)),
        "a monotone combiner needs an activation that never falls (softplus, tanh, sigmoid, relu, leaky_relu, elu, "
        "identity); LeakyReLU is not known to be one. Choose one of these, or set monotone=False.",
    ),
    "list of losses": (
        lambda: LinearCombiner(2)([torch.ones(3), torch.ones(3)]),
        "LinearCombiner takes losses of shape [batch, tasks] with 2 tasks; got list. Stack them: torch.stack(losses, "
        "dim=1).",
    ),
    "empty batch": (
        lambda: LinearCombiner(2, weight_norm=True)(torch.ones(0, 2)),
        "LinearCombiner takes losses of shape [batch, tasks] with 2 tasks; got (0, 2), a batch without samples, which "
        "has no mean.",
    ),
    "one column": (
        lambda: LinearCombiner(2)(torch.ones(4, 1)),
        "LinearCombiner takes losses of shape [batch, tasks] with 2 tasks; got (4, 1). Give it one column for each "
        "task.",
    ),
    "labels as fractions": (
        lambda: LinearCombiner(3, context=Context(classes=2))(ONES, labels=torch.tensor([[0.5], [0.5]])),
        "labels must be whole numbers from 0 to 1, one for each sample; got torch.float64 of shape (2, 1).",
    ),
}


@pytest.mark.parametrize(("action", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(action: Callable[[], Any], message: str) -> None:
    with pytest.raises(hi.AuxiliaryError) as caught:
        action()
    assert str(caught.value) == message
