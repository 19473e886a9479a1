"""Rotation of heads by their rotary angles, in place. The plain definition is
models.rope.apply_rope."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from models.precision import PackedProjections, packed_weight


@triton.jit
def rope_kernel(
    packed_ptr, cos_ptr, sin_ptr, length, heads, stride,
    INVERSE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotates the first `heads` heads of one token, in place."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, BLOCK)[None, :]
    mask = (head < heads) & (pair < HALF)
    angle = (row % length) * 2 * HALF + pair
    cos = tl.load(cos_ptr + angle, pair < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, pair < HALF, other=0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    at = packed_ptr + row * stride + head * 2 * HALF + pair
    first = tl.load(at, mask, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask, other=0.0).to(tl.float32)
    kind = packed_ptr.dtype.element_ty
    tl.store(at, (first * cos - second * sin).to(kind), mask)
    tl.store(at + HALF, (second * cos + first * sin).to(kind), mask)


def rope(
    packed: Tensor, cos: Tensor, sin: Tensor, heads: int, size: int, inverse: bool = False
) -> None:
    """Rotates the first `heads` heads of `size` in packed (B, T, W), in place, by the angles whose
    cosine and sine are (T, K)."""
    batch, length, width = packed.shape
    rope_kernel[(batch * length,)](
        packed, cos, sin, length, heads, width, INVERSE=inverse,
        HEADS=triton.next_power_of_2(heads), HALF=size // 2,
        BLOCK=triton.next_power_of_2(size // 2),
    )  # fmt: skip


class FusedRope(torch.autograd.Function):
    """`rope` of packed (B, T, W), which is returned."""

    @staticmethod
    def forward(ctx, packed: Tensor, cos_sin: tuple[Tensor, Tensor], heads: int, size: int):
        rope(packed, *cos_sin, heads, size)
        ctx.save_for_backward(*cos_sin)
        ctx.heads = heads, size
        ctx.mark_dirty(packed)
        return packed

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = grad.clone(memory_format=torch.contiguous_format)
        rope(grad, *ctx.saved_tensors, *ctx.heads, inverse=True)
        return grad, None, None, None


def fused_project_qkv(
    layer: PackedProjections, x_BTD: Tensor, cos_sin: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns rotated queries (B, H, T, K) and keys, and values (B, G, T, K). The plain definition
    is models.model.Attention.project_qkv."""
    packed = F.linear(x_BTD, packed_weight(layer))
    if cos_sin is not None:
        packed = FusedRope.apply(packed, cos_sin, layer.n_heads + layer.kv_heads, layer.head_dim)
    heads = packed.unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)
    q_BHTK, k_BGTK, v_BGTK = heads.split([layer.n_heads, layer.kv_heads, layer.kv_heads], 1)
    return q_BHTK, k_BGTK, v_BGTK
