"""Rotary positions (2104.09864), halves paired as Llama does; how a longer context stretches them.

Shapes as in model.py.
"""

import torch
from torch import Tensor

from config import ModelConfig, RopeScaling
from models.precision import lowered


def rotary(place_T: Tensor, config: ModelConfig, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine (T, K) of the angles at places of any shape T."""
    exact = torch.promote_types(like.dtype, torch.float32)  # bf16 cannot count to a context's end
    pair = torch.arange(0, config.head_size, 2, device=like.device, dtype=exact)
    frequency = stretched(config.rope_theta ** (-pair / config.head_size), config.rope_scaling)
    angle_TK = place_T.to(exact)[..., None] * frequency
    angle_TK = torch.cat([angle_TK, angle_TK], -1)
    return lowered(angle_TK.cos().to(like.dtype)), lowered(angle_TK.sin().to(like.dtype))


def stretched(frequency: Tensor, how: RopeScaling) -> Tensor:
    """Angular frequencies, divided by `how.factor`: all of them, or those of long wavelengths."""
    if how.rope_type == "default":
        return frequency
    if how.rope_type == "linear":
        return frequency / how.factor
    turns = how.original_max_position_embeddings * frequency / (2 * torch.pi)
    span = how.high_freq_factor - how.low_freq_factor
    kept = ((turns - how.low_freq_factor) / span).clamp(0, 1)
    return frequency * (kept + (1 - kept) / how.factor)


def rotate(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Each pair of a head's halves turned by its angle."""
    first, second = x_BHTK.chunk(2, -1)
    return x_BHTK * cos_TK + torch.cat([-second, first], -1) * sin_TK
