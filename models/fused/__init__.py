"""Triton kernels of the training step in bf16 on a GPU.

Each file fuses what the plain code beside the call defines; tests/test_fused.py holds the two
together. Shapes as in models/model.py and models/moe.py.
"""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


def fuses(x: Tensor) -> bool:
    """Whether the fused kernels do this: on CUDA, under autocast to bf16, where Triton is there."""
    return x.is_cuda and torch.is_autocast_enabled("cuda") and is_bf16() and has_triton()


def is_bf16() -> bool:
    return torch.get_autocast_dtype("cuda") == torch.bfloat16
