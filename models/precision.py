"""Casts that autocast does not do by itself, or would do more than once."""

from typing import Protocol

import torch
from torch import Tensor, nn


def autocast_to(x: Tensor) -> Tensor:
    """Returns `x` in the dtype in which autocast computes products; without autocast, `x`
    itself."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class PackedProjections(Protocol):
    """A module in which several weights multiply the same input."""

    PACKED: tuple[str, ...]
    """Names of those weights."""
    packed: nn.Parameter | None
    """All of them as one weight, in a working copy of the model (utils/optim/master_weights.py)."""

    def get_parameter(self, target: str) -> nn.Parameter:
        """Returns a parameter by name, as nn.Module does."""
        ...


def packed_weight(module: PackedProjections) -> Tensor:
    """Returns the module's `PACKED` weights as one, concatenated along their outputs (dim -2)."""
    if module.packed is not None:
        return module.packed
    return torch.cat([autocast_to(module.get_parameter(name)) for name in module.PACKED], -2)
