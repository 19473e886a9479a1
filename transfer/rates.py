"""How fast each parameter of a grown model must learn to go where the old one would have gone."""

from collections.abc import Iterable, Sequence
from math import prod
from typing import NamedTuple

from torch import Tensor

from config import Growth, TrainingConfig
from models import axes
from transfer.growth import copied_axes


class Own(NamedTuple):
    """One parameter's settings of AdamW; its learning rate is `pace` times everyone's."""

    pace: float
    weight_decay: float
    eps: float


class Rate(NamedTuple):
    """Factors on the settings of AdamW."""

    lr: float = 1.0
    decay: float = 1.0
    eps: float = 1.0

    def own(self, settings: TrainingConfig, weight: Tensor) -> Own:
        """What has one dimension, the gains, does not decay."""
        decay = settings.weight_decay * self.decay * (weight.dim() > 1)
        return Own(self.lr, decay, settings.eps * self.eps)


Rates = dict[str, Rate]
"""By parameter."""


def rates(names: Iterable[str], growth: Sequence[Growth]) -> Rates:
    """For parameters of a model that has been through `growth`: Adam's step does not shrink with
    a weight, so it must be told by how much a sum's terms have multiplied (muP does, 2203.03466).

    A matrix whose input axis was copied r times is 1/r as large: so is its learning rate, and its
    decoupled decay is r times as strong. Its gradient is that of one of its copies of the outputs,
    and eps, which is compared with the gradient, is as much smaller. A parameter that came later
    has the same axes as those that were copied, and the same factors.
    """
    copies: dict[str, int] = {}
    for how in growth:
        for axis, times in copied_axes(how).items():
            copies[axis] = copies.get(axis, 1) * times
    found = {}
    for name in names:
        outputs, summed = axes(name)
        terms = copies.get(summed, 1) if summed else 1
        shares = prod(copies.get(axis, 1) for axis in outputs)
        found[name] = Rate(lr=1 / terms, decay=float(terms), eps=1 / shares)
    return found
