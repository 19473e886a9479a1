"""Attention as two products with a softmax between: for short windows in bf16 a CPU computes that
faster than torch's own. Plain: torch.nn.functional.scaled_dot_product_attention."""

from functools import lru_cache

import torch
from torch import Tensor

LONGEST = 512
"""Tokens; what it holds grows with their square."""


def serves(q_BHTK: Tensor) -> bool:
    """Whether `attend` is the faster one."""
    short = q_BHTK.shape[2] <= LONGEST
    return short and q_BHTK.device.type == "cpu" and q_BHTK.dtype == torch.bfloat16


def attend(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
    """Causal, (B, H, T, K): G key/value heads serve H query heads in groups, in order."""
    group = q_BHTK.shape[1] // k_BGTK.shape[1]
    if group > 1:
        k_BGTK, v_BGTK = (x.repeat_interleave(group, 1) for x in (k_BGTK, v_BGTK))
    scores_BHTT = q_BHTK @ k_BGTK.transpose(-2, -1) * q_BHTK.shape[-1] ** -0.5
    return (scores_BHTT + future(q_BHTK.shape[2], q_BHTK.dtype)).softmax(-1) @ v_BGTK


@lru_cache(maxsize=8)
def future(length: int, dtype: torch.dtype) -> Tensor:
    """(T, T): minus infinity where a token would see one that comes after it, else zero."""
    return torch.full((length, length), float("-inf"), dtype=dtype).triu(1)
