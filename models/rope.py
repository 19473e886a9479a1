"""Rotary position embedding (arXiv:2104.09864), pairing the halves of a head as Llama does, and the
stretching of its wavelengths for longer contexts. Shapes are as in model.py."""

import torch
from torch import Tensor

from config import ModelConfig, RopeScaling
from models.precision import autocast_to


def rope_cos_sin(position_T: Tensor, config: ModelConfig, like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cosine and sine (..., T, K) of the rotation angles at positions (..., T), with
    `like`'s device, in the dtype that products are computed in."""
    exact = torch.promote_types(like.dtype, torch.float32)  # bf16 cannot count to a context's end
    pair = torch.arange(0, config.head_size, 2, device=like.device, dtype=exact)
    frequency = config.rope_theta ** (-pair / config.head_size)
    frequency = scale_rope_frequencies(frequency, config.rope_scaling)
    angle_TK = position_T.to(exact)[..., None] * frequency
    angle_TK = torch.cat([angle_TK, angle_TK], -1)
    return autocast_to(angle_TK.cos().to(like.dtype)), autocast_to(angle_TK.sin().to(like.dtype))


def scale_rope_frequencies(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    """Returns angular frequencies divided by `scaling.factor`: all of them (linear), or those whose
    wavelengths are long against the original context, blended towards the short ones (llama3)."""
    if scaling.rope_type == "default":
        return frequency
    if scaling.rope_type == "linear":
        return frequency / scaling.factor
    cycles = scaling.original_max_position_embeddings * frequency / (2 * torch.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    unscaled_share = ((cycles - scaling.low_freq_factor) / span).clamp(0, 1)
    return frequency * (unscaled_share + (1 - unscaled_share) / scaling.factor)


def apply_rope(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotates each pair (k, k + K/2) of a head by its angle."""
    first, second = x_BHTK.chunk(2, -1)
    return x_BHTK * cos_TK + torch.cat([-second, first], -1) * sin_TK
