"""How fast each parameter of a grown model must learn to go where the small model would have
gone."""

from collections.abc import Iterable, Sequence
from math import prod
from typing import NamedTuple

from torch import Tensor

from config import Growth, TrainingConfig
from models import axes
from transfer.growth import axis_repeats


class ParamSettings(NamedTuple):
    """AdamW's settings of one parameter."""

    lr_scale: float
    """Factor on the schedule's learning rate."""
    weight_decay: float
    eps: float


class AdamWScale(NamedTuple):
    """Factors on AdamW's settings of one parameter."""

    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0

    def settings(self, training: TrainingConfig, weight: Tensor) -> ParamSettings:
        """Returns the parameter's settings. Weights of one dimension, the gains, do not decay."""
        decay = training.weight_decay * self.weight_decay * (weight.dim() > 1)
        return ParamSettings(self.lr, decay, training.eps * self.eps)


AdamWScales = dict[str, AdamWScale]
"""Factors by parameter."""


def adamw_scales(names: Iterable[str], growth_history: Sequence[Growth]) -> AdamWScales:
    """Returns the factors for parameters of a model that has been through `growth_history`.

    Adam's step does not shrink with a weight, so it must be told how the terms of a sum have
    multiplied (as in muP, arXiv:2203.03466). A matrix whose input axis was repeated r times is 1/r
    as large: so is its learning rate, and its decoupled decay is r times as strong. Its gradient is
    that of one of its copies of the outputs, and eps, which is compared with the gradient, shrinks
    alike. A parameter that came later has the same axes as those that were copied, and the same
    factors.
    """
    repeats: dict[str, int] = {}
    for growth in growth_history:
        for axis, times in axis_repeats(growth).items():
            repeats[axis] = repeats.get(axis, 1) * times
    scales = {}
    for name in names:
        outputs, input_axis = axes(name)
        terms = repeats.get(input_axis, 1) if input_axis else 1
        output_copies = prod(repeats.get(axis, 1) for axis in outputs)
        scales[name] = AdamWScale(lr=1 / terms, weight_decay=float(terms), eps=1 / output_copies)
    return scales
