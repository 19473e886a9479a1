"""Causal attention as two matrix products with a softmax between them: for short contexts in bf16 a
CPU computes this faster than torch.nn.functional.scaled_dot_product_attention, which defines it."""

from functools import lru_cache

import torch
from torch import Tensor

MAX_CPU_CONTEXT = 512
"""Longest context in tokens; the scores' memory grows with its square."""


def is_faster_on_cpu(q_BHTK: Tensor) -> bool:
    """Whether `attend_on_cpu` is faster than torch's own attention for these queries."""
    is_short = q_BHTK.shape[2] <= MAX_CPU_CONTEXT
    return is_short and q_BHTK.device.type == "cpu" and q_BHTK.dtype == torch.bfloat16


def attend_on_cpu(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
    """Returns causal attention (B, H, T, K); G key/value heads serve H query heads in groups."""
    group = q_BHTK.shape[1] // k_BGTK.shape[1]
    if group > 1:
        k_BGTK, v_BGTK = (x.repeat_interleave(group, 1) for x in (k_BGTK, v_BGTK))
    scores_BHTT = q_BHTK @ k_BGTK.transpose(-2, -1) * q_BHTK.shape[-1] ** -0.5
    return (scores_BHTT + causal_mask(q_BHTK.shape[2], q_BHTK.dtype)).softmax(-1) @ v_BGTK


@lru_cache(maxsize=8)
def causal_mask(length: int, dtype: torch.dtype) -> Tensor:
    """Returns (T, T): minus infinity where a token would see a later one, else zero."""
    return torch.full((length, length), float("-inf"), dtype=dtype).triu(1)
