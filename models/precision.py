"""Autocast, where a product is not torch's own to cast or would be cast more than once."""

import torch
from torch import Tensor


def lowered(x: Tensor) -> Tensor:
    """`x` in the type that autocast computes products in; without autocast `x` itself."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
