"""Autocast, where a product is not torch's own to cast or would be cast more than once."""

from typing import Protocol

import torch
from torch import Tensor, nn


def lowered(x: Tensor) -> Tensor:
    """`x` in the type that autocast computes products in; without autocast `x` itself."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class Packs(Protocol):
    """A module some of whose weights take the same input."""

    PACKED: tuple[str, ...]
    """Their names."""
    packed: nn.Parameter | None
    """In their place where a copy of the model is kept for training (utils/masters.py)."""

    def get_parameter(self, target: str) -> nn.Parameter:
        """As nn.Module's."""
        ...


def side_by_side(module: Packs) -> Tensor:
    """These weights as one, outputs after outputs."""
    if module.packed is not None:
        return module.packed
    return torch.cat([lowered(module.get_parameter(name)) for name in module.PACKED], -2)
