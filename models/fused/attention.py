"""Causal attention from queries, keys and values side by side as one product leaves them: turned in
place by their rotary angles, whose gradients are turned back on the way out.

Plain: models.model.Attention with `models.rotary.rotate`. The backward pass computes the scores
twice, for the gradients of a block of queries and for those of a block of keys and values, so that
nothing has to be added up in memory (FlashAttention-2, 2307.08691).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.fused.late import Row, linear, row_of, stand_in
from models.fused.turn import turn
from models.precision import Packs, side_by_side

LONGEST = 1024
"""Tokens of context up to which torch's own attention is no faster."""
SIZES = (16, 32, 64)
"""Of heads: wider ones do not fit the registers."""
TILE = 64
"""Queries, and keys, in a block."""
LOG2_E = 1.4426950408889634


def serves(length: int, size: int) -> bool:
    """Whether the kernels are the better ones for contexts of `length` and heads of `size`."""
    return length <= LONGEST and size in SIZES


@triton.jit
def load(from_ptr, place, stride, length, SIZE: tl.constexpr, EVEN: tl.constexpr):
    """A head of some tokens. EVEN: all are there."""
    at = from_ptr + place[:, None] * stride + tl.arange(0, SIZE)[None, :]
    if EVEN:
        return tl.load(at)
    return tl.load(at, (place < length)[:, None], other=0.0)


@triton.jit
def store(to_ptr, x, place, stride, length, SIZE: tl.constexpr):
    at = to_ptr + place[:, None] * stride + tl.arange(0, SIZE)[None, :]
    tl.store(at, x.to(to_ptr.dtype.element_ty), (place < length)[:, None])


@triton.jit
def store_back(
    to_ptr, x, place, stride, cos_ptr, sin_ptr, length,
    TURN: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Turned back."""
    if TURN:
        first, second = tl.split(tl.permute(tl.reshape(x, (TILE, 2, SIZE // 2)), (0, 2, 1)))
        pair, here = tl.arange(0, SIZE // 2)[None, :], (place < length)[:, None]
        angle = place[:, None] * SIZE + pair
        cos = tl.load(cos_ptr + angle, here, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + angle, here, other=0.0).to(tl.float32)
        at = to_ptr + place[:, None] * stride + pair
        kind = to_ptr.dtype.element_ty
        tl.store(at, (first * cos + second * sin).to(kind), here)
        tl.store(at + SIZE // 2, (second * cos - first * sin).to(kind), here)
    else:
        store(to_ptr, x, place, stride, length, SIZE)


@triton.jit
def attend_kernel(
    packed_ptr, out_ptr, log_sum_ptr, length, heads, kv_heads, scale,
    SIZE: tl.constexpr, EVEN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head, those with the most keys first."""
    stride, tiles = (heads + 2 * kv_heads) * SIZE, tl.cdiv(length, TILE)
    tile, head_of = tiles - 1 - tl.program_id(0) % tiles, tl.program_id(0) // tiles
    head, row = head_of % heads, (head_of // heads).to(tl.int64) * length
    key_ptr = packed_ptr + row * stride + (heads + head // (heads // kv_heads)) * SIZE
    m = tile * TILE + tl.arange(0, TILE)
    q = load(packed_ptr + row * stride + head * SIZE, m, stride, length, SIZE, EVEN)
    top = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    out = tl.zeros([TILE, SIZE], tl.float32)
    for start in range(0, (tile + 1) * TILE, TILE):
        n = start + tl.arange(0, TILE)
        k = load(key_ptr, n, stride, length, SIZE, EVEN)
        v = load(key_ptr + kv_heads * SIZE, n, stride, length, SIZE, EVEN)
        score = tl.where(m[:, None] >= n[None, :], tl.dot(q, k.T) * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        chance = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(chance, 1)
        out = tl.dot(chance.to(v.dtype), v, out * shrink[:, None])
        top = higher
    to_ptr = out_ptr + row * heads * SIZE + head * SIZE
    store(to_ptr, out / total[:, None], m, heads * SIZE, length, SIZE)
    tl.store(log_sum_ptr + head_of * length + m, top + tl.log2(total), m < length)


@triton.jit
def queries_kernel(
    packed_ptr, cos_ptr, sin_ptr, out_ptr, grad_ptr, log_sum_ptr, mean_ptr, to_ptr,
    length, heads, kv_heads, scale, factor,
    TURN: tl.constexpr, SIZE: tl.constexpr, EVEN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of queries of one head, and of each the mean slope of its scores.
    `factor` is `scale` without log2(e)."""
    stride, along, tiles = (heads + 2 * kv_heads) * SIZE, heads * SIZE, tl.cdiv(length, TILE)
    tile, head_of = tiles - 1 - tl.program_id(0) % tiles, tl.program_id(0) // tiles
    head, row = head_of % heads, (head_of // heads).to(tl.int64) * length
    query, at = row * stride + head * SIZE, row * along + head * SIZE
    key_ptr = packed_ptr + row * stride + (heads + head // (heads // kv_heads)) * SIZE
    m = tile * TILE + tl.arange(0, TILE)
    q = load(packed_ptr + query, m, stride, length, SIZE, EVEN)
    grad = load(grad_ptr + at, m, along, length, SIZE, EVEN)
    out = load(out_ptr + at, m, along, length, SIZE, EVEN)
    mean = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(mean_ptr + head_of * length + m, mean, m < length)
    log_sum = tl.load(log_sum_ptr + head_of * length + m, m < length, other=float("inf"))
    grad_q = tl.zeros([TILE, SIZE], tl.float32)
    for start in range(0, (tile + 1) * TILE, TILE):
        n = start + tl.arange(0, TILE)
        k = load(key_ptr, n, stride, length, SIZE, EVEN)
        v = load(key_ptr + kv_heads * SIZE, n, stride, length, SIZE, EVEN)
        chance = tl.exp2(tl.dot(q, k.T) * scale - log_sum[:, None])
        chance = tl.where(m[:, None] >= n[None, :], chance, 0.0)
        slope = chance * (tl.dot(grad, v.T) - mean[:, None])
        grad_q = tl.dot(slope.to(k.dtype), k, grad_q)
    store_back(
        to_ptr + query, grad_q * factor, m, stride, cos_ptr, sin_ptr, length, TURN, SIZE, TILE
    )  # fmt: skip


@triton.jit
def keys_kernel(
    packed_ptr, cos_ptr, sin_ptr, grad_ptr, log_sum_ptr, mean_ptr, to_ptr,
    length, heads, kv_heads, scale, factor,
    TURN: tl.constexpr, SIZE: tl.constexpr, EVEN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of keys and values, for all heads that they serve."""
    stride, along, tiles = (heads + 2 * kv_heads) * SIZE, heads * SIZE, tl.cdiv(length, TILE)
    tile, group_of, each = tl.program_id(0) % tiles, tl.program_id(0) // tiles, heads // kv_heads
    group, row = group_of % kv_heads, (group_of // kv_heads).to(tl.int64) * length
    key = row * stride + (heads + group) * SIZE
    value = key + kv_heads * SIZE
    n = tile * TILE + tl.arange(0, TILE)
    k = load(packed_ptr + key, n, stride, length, SIZE, EVEN)
    v = load(packed_ptr + value, n, stride, length, SIZE, EVEN)
    grad_k = tl.zeros([TILE, SIZE], tl.float32)
    grad_v = tl.zeros([TILE, SIZE], tl.float32)
    for head in range(group * each, (group + 1) * each):
        query_ptr, by_query = packed_ptr + row * stride + head * SIZE, row * heads + head * length
        for start in range(tile * TILE, length, TILE):
            m = start + tl.arange(0, TILE)
            q = load(query_ptr, m, stride, length, SIZE, EVEN)
            grad = load(grad_ptr + row * along + head * SIZE, m, along, length, SIZE, EVEN)
            if EVEN:
                log_sum = tl.load(log_sum_ptr + by_query + m)
                mean = tl.load(mean_ptr + by_query + m)
            else:
                log_sum = tl.load(log_sum_ptr + by_query + m, m < length, other=float("inf"))
                mean = tl.load(mean_ptr + by_query + m, m < length, other=0.0)
            chance = tl.exp2(tl.dot(k, q.T) * scale - log_sum[None, :])
            chance = tl.where(m[None, :] >= n[:, None], chance, 0.0)
            grad_v = tl.dot(chance.to(grad.dtype), grad, grad_v)
            slope = chance * (tl.dot(v, grad.T) - mean[None, :])
            grad_k = tl.dot(slope.to(q.dtype), q, grad_k)
    store_back(
        to_ptr + key, grad_k * factor, n, stride, cos_ptr, sin_ptr, length, TURN, SIZE, TILE
    )  # fmt: skip
    store(to_ptr + value, grad_v, n, stride, length, SIZE)


class Attend(torch.autograd.Function):
    """Queries, keys and values side by side (B, T, (H + 2G) K), which are turned in place ->
    (B, T, H K). `rotation` is cosine and sine (T, K), or None; `before` and `after` are the rows of
    the products around it."""

    @staticmethod
    def forward(
        ctx,
        packed: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        heads: int,
        kv_heads: int,
        before: Row | None = None,
        after: Row | None = None,
    ) -> Tensor:
        batch, length, width = packed.shape
        size = width // (heads + 2 * kv_heads)
        if rotation is not None:
            turn(packed, *rotation, heads + kv_heads, size)
        shape = batch * length, heads * size
        out = after.inputs(*shape) if after else packed.new_empty(shape)
        log_sum = packed.new_empty(batch, heads, length, dtype=torch.float32)
        tiles, even = triton.cdiv(length, TILE), length % TILE == 0
        attend_kernel[(tiles * batch * heads,)](
            packed, out, log_sum, length, heads, kv_heads, LOG2_E * size**-0.5,
            SIZE=size, EVEN=even, TILE=TILE, num_warps=4, num_stages=3,
        )  # fmt: skip
        ctx.save_for_backward(packed, out, log_sum, *(rotation or ()))
        ctx.heads, ctx.kv_heads, ctx.before = heads, kv_heads, before
        return out.view(batch, length, -1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        packed, out, log_sum, *rotation = ctx.saved_tensors
        grad, mean = grad.contiguous(), torch.empty_like(log_sum)
        cos, sin = rotation or (None, None)
        (batch, length, width), heads, kv_heads = packed.shape, ctx.heads, ctx.kv_heads
        size, tiles = width // (heads + 2 * kv_heads), triton.cdiv(length, TILE)
        shape = batch * length, width
        to = ctx.before.slopes(*shape) if ctx.before else packed.new_empty(shape)
        sizes = length, heads, kv_heads, LOG2_E * size**-0.5, size**-0.5
        how = {"TURN": bool(rotation), "SIZE": size, "EVEN": length % TILE == 0, "TILE": TILE}
        queries_kernel[(tiles * batch * heads,)](
            packed, cos, sin, out, grad, log_sum, mean, to, *sizes, **how, num_warps=4, num_stages=3
        )
        keys_kernel[(tiles * batch * kv_heads,)](
            packed, cos, sin, grad, log_sum, mean, to, *sizes, **how, num_warps=4, num_stages=2
        )
        return to.view(packed.shape), None, None, None, None, None


def attend(layer: Packs, x_BTD: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
    """(B, T, D) -> (B, T, D); plain: models.model.Attention."""
    qkv, out = stand_in(side_by_side(layer)), stand_in(layer.o_proj.weight)
    heads = layer.n_heads, layer.kv_heads
    y = Attend.apply(linear(x_BTD, qkv), rotation, *heads, row_of(qkv), row_of(out))
    return linear(y, out)
