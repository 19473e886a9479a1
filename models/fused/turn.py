"""Heads turned by their rotary angles; plain: models.rotary.rotate."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from models.precision import Packs, side_by_side


@triton.jit
def turn_kernel(
    packed_ptr, cos_ptr, sin_ptr, length, heads, stride,
    BACK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first `heads` heads of each token, in place."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, BLOCK)[None, :]
    mask = (head < heads) & (pair < HALF)
    angle = (row % length) * 2 * HALF + pair
    cos = tl.load(cos_ptr + angle, pair < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, pair < HALF, other=0.0).to(tl.float32)
    if BACK:
        sin = -sin
    at = packed_ptr + row * stride + head * 2 * HALF + pair
    first = tl.load(at, mask, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask, other=0.0).to(tl.float32)
    kind = packed_ptr.dtype.element_ty
    tl.store(at, (first * cos - second * sin).to(kind), mask)
    tl.store(at + HALF, (second * cos + first * sin).to(kind), mask)


def turn(
    packed: Tensor, cos: Tensor, sin: Tensor, heads: int, size: int, back: bool = False
) -> None:
    """The first `heads` heads of `size` in packed (B, T, W), in place, by angles (T, K)."""
    batch, length, width = packed.shape
    turn_kernel[(batch * length,)](
        packed, cos, sin, length, heads, width, BACK=back,
        HEADS=triton.next_power_of_2(heads), HALF=size // 2,
        BLOCK=triton.next_power_of_2(size // 2),
    )  # fmt: skip


class Turn(torch.autograd.Function):
    """`turn` of packed (B, T, W), which is handed on."""

    @staticmethod
    def forward(ctx, packed: Tensor, rotation: tuple[Tensor, Tensor], heads: int, size: int):
        turn(packed, *rotation, heads, size)
        ctx.save_for_backward(*rotation)
        ctx.heads = heads, size
        ctx.mark_dirty(packed)
        return packed

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = grad.clone(memory_format=torch.contiguous_format)
        turn(grad, *ctx.saved_tensors, *ctx.heads, back=True)
        return grad, None, None, None


def project(
    layer: Packs, x_BTD: Tensor, rotation: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, ...]:
    """Queries (B, H, T, K), keys and values (B, G, T, K); plain: models.model.Attention.project."""
    packed = F.linear(x_BTD, side_by_side(layer))
    if rotation is not None:
        packed = Turn.apply(packed, rotation, layer.n_heads + layer.kv_heads, layer.head_dim)
    heads = packed.unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)
    return heads.split([layer.n_heads, layer.kv_heads, layer.kv_heads], 1)
