"""Queries, keys and values in one product, turned by rotary angles on the way out.

Plain: models.model.Attention with `models.rotary.rotate`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rotate_kernel(
    packed_ptr, cos_ptr, sin_ptr, length, heads, stride,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turns the first `heads` heads of each token, in place."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, BLOCK)[None, :]
    mask = (head < heads) & (pair < HALF)
    angle = (row % length) * 2 * HALF + pair
    cos = tl.load(cos_ptr + angle, pair < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, pair < HALF, other=0.0).to(tl.float32)
    at = packed_ptr + row * stride + head * 2 * HALF + pair
    first = tl.load(at, mask, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask, other=0.0).to(tl.float32)
    kind = packed_ptr.dtype.element_ty
    tl.store(at, (first * cos - second * sin).to(kind), mask)
    tl.store(at + HALF, (second * cos + first * sin).to(kind), mask)


@triton.jit
def turn_back(
    grad_ptr, packed_ptr, cos, sin, heads, batch, place, row,
    s_b, s_h, s_t, offset, stride,
    TURN: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, BLOCK)[None, :]
    mask = (head < heads) & (pair < HALF)
    at = grad_ptr + batch * s_b + place * s_t + head * s_h + pair
    first = tl.load(at, mask, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask, other=0.0).to(tl.float32)
    to = packed_ptr + row * stride + offset + head * 2 * HALF + pair
    kind = packed_ptr.dtype.element_ty
    if TURN:
        tl.store(to, (first * cos + second * sin).to(kind), mask)
        tl.store(to + HALF, (second * cos - first * sin).to(kind), mask)
    else:
        tl.store(to, first.to(kind), mask)
        tl.store(to + HALF, second.to(kind), mask)


@triton.jit
def rotate_backward_kernel(
    q_ptr, k_ptr, v_ptr, packed_ptr, cos_ptr, sin_ptr, length, heads, kv_heads, stride,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    TURN: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Packs the three gradients of each token side by side, queries' and keys' turned back."""
    row = tl.program_id(0).to(tl.int64)
    batch, place = row // length, row % length
    pair = tl.arange(0, BLOCK)[None, :]
    cos, sin = 1.0, 0.0
    if TURN:
        angle = place * 2 * HALF + pair
        cos = tl.load(cos_ptr + angle, pair < HALF, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + angle, pair < HALF, other=0.0).to(tl.float32)
    turn_back(
        q_ptr, packed_ptr, cos, sin, heads, batch, place, row, q_b, q_h, q_t,
        0, stride, TURN, HEADS, HALF, BLOCK,
    )  # fmt: skip
    turn_back(
        k_ptr, packed_ptr, cos, sin, kv_heads, batch, place, row, k_b, k_h, k_t,
        heads * 2 * HALF, stride, TURN, KV_HEADS, HALF, BLOCK,
    )  # fmt: skip
    turn_back(
        v_ptr, packed_ptr, cos, sin, kv_heads, batch, place, row, v_b, v_h, v_t,
        (heads + kv_heads) * 2 * HALF, stride, False, KV_HEADS, HALF, BLOCK,
    )  # fmt: skip


class Project(torch.autograd.Function):
    """x (B, T, D) and the three weights side by side ((H + 2G) K, D) -> q (B, H, T, K), k and v
    (B, G, T, K). `rotation` is cosine and sine (T, K), or None."""

    @staticmethod
    def forward(
        ctx,
        x_BTD: Tensor,
        weight: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        heads: int,
        kv_heads: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        packed = x_BTD @ weight.T
        batch, length, width = packed.shape
        size = width // (heads + 2 * kv_heads)
        if rotation is not None:
            turned = heads + kv_heads
            rotate_kernel[(batch * length,)](
                packed, *rotation, length, turned, width,
                HEADS=triton.next_power_of_2(turned), HALF=size // 2,
                BLOCK=triton.next_power_of_2(size // 2),
            )  # fmt: skip
        ctx.save_for_backward(x_BTD, weight, *(rotation or ()))
        ctx.heads, ctx.kv_heads = heads, kv_heads
        parts = packed.view(batch, length, -1, size).transpose(1, 2)
        q, k, v = parts.split([heads, kv_heads, kv_heads], 1)
        return q, k, v

    @staticmethod
    def backward(ctx, q: Tensor, k: Tensor, v: Tensor):
        x_BTD, weight, *rotation = ctx.saved_tensors
        q, k, v = (grad if grad.stride(-1) == 1 else grad.contiguous() for grad in (q, k, v))
        batch, heads, length, size = q.shape
        packed = x_BTD.new_empty(batch, length, len(weight))
        cos, sin = rotation or (None, None)
        rotate_backward_kernel[(batch * length,)](
            q, k, v, packed, cos, sin, length, heads, ctx.kv_heads, len(weight),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            TURN=bool(rotation), HEADS=triton.next_power_of_2(heads),
            KV_HEADS=triton.next_power_of_2(ctx.kv_heads), HALF=size // 2,
            BLOCK=triton.next_power_of_2(size // 2),
        )  # fmt: skip
        grad_weight = packed.flatten(0, 1).T @ x_BTD.flatten(0, 1)
        return packed @ weight, grad_weight, None, None, None
