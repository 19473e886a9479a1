"""How fast each parameter of a grown model must learn, and how much its gradient counts where
gradients are clipped, to go where the small model would have gone."""

from collections.abc import Iterable, Sequence
from functools import partial
from math import prod
from typing import NamedTuple

from torch import Tensor

from config import Growth, TrainingConfig, Upcycle
from models import axes
from transfer.growth import axis_repeats
from transfer.plan import make_tile


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
    norm_weight: float = 1.0
    """Weight of its squared gradient in the norm by which all gradients are clipped."""

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
    that of one of its copies of the outputs, and eps, which is compared with the root of its square
    (`Tile.grad_sq_share`), shrinks alike. The squared gradients of all copies, times `norm_weight`,
    add up to the old one: exactly after widening without noise, and as expected after upcycling. A
    parameter that came later has the same axes as those that were copied, and the same factors.
    """
    repeats: dict[str, int] = {}
    experts, sparsity = 1, 1.0
    for growth in growth_history:
        if isinstance(growth, Upcycle):
            experts, sparsity = growth.num_experts, growth.sparsity
        else:
            repeats |= {axis: repeats.get(axis, 1) * n for axis, n in axis_repeats(growth).items()}
    scales, copied = {}, partial(make_tile, **repeats)
    for name in names:
        outputs, _ = axes(name)
        if outputs[0] == "expert" and len(outputs) > 1:
            row = copied(name, sparsity=sparsity, expert=experts)
        else:  # a router has a row for each expert, but they are no copies
            row = copied(name)
        scales[name] = AdamWScale(
            lr=row.scale,
            weight_decay=1 / row.scale,
            eps=row.grad_sq_share**0.5,
            norm_weight=1 / (prod(row.repeats) * row.grad_sq_share),
        )
    return scales
