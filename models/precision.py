"""Autocast, where a product is not torch's own to cast or would be cast more than once."""

import torch
from torch import Tensor, nn


def lowered(x: Tensor) -> Tensor:
    """`x` in the type that autocast computes products in; without autocast `x` itself."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def side_by_side(module: nn.Module, names: tuple[str, ...]) -> Tensor:
    """Weights that take the same input as one, outputs after outputs; ready made in a copy of the
    model that is kept for training (utils/masters.py)."""
    if module.packed is not None:
        return module.packed
    return torch.cat([lowered(module.get_parameter(name)) for name in names], -2)
