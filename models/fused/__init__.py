"""Triton kernels of the training step in bf16 on a GPU.

Each file fuses, or puts together for all blocks, what the plain code beside the call defines;
tests/test_fused.py and tests/test_masters.py hold the two together. Shapes as in models/model.py
and models/moe.py.
"""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from config import ModelConfig

enabled = True
"""Whether the kernels are used where they can be, like torch.backends' flags."""


@cache
def has_triton() -> bool:
    """Whether it is installed; it is not where torch came without CUDA."""
    return find_spec("triton") is not None


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels may compute products of this type on this device."""
    return enabled and device.type == "cuda" and dtype == torch.bfloat16 and has_triton()


def fuses(x: Tensor) -> bool:
    """Whether the kernels compute this: under autocast to bf16 on CUDA."""
    lowers = x.is_cuda and torch.is_autocast_enabled("cuda")
    return lowers and available(x.device, torch.get_autocast_dtype("cuda"))


def serves(config: ModelConfig) -> bool:
    """Whether they can compute its products: those of experts take rows and columns of whole 16
    bytes."""
    return not config.num_experts or config.d_model % 8 == config.d_ff % 8 == 0
