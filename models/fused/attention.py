"""Causal attention on queries, keys and values side by side, as one product leaves them: rotated in
place by their rotary angles, the gradients rotated back as they are written.

The plain definition is models.model.Attention with models.rope.apply_rope. The backward pass
computes the scores twice, for the gradients of a block of queries and for those of a block of keys
and values, so that nothing has to be added up in memory (FlashAttention-2, arXiv:2307.08691).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.fused.deferred_grads import DeferredWeights, GradSlot, deferred_linear, linear_slot
from models.fused.rope import rope
from models.precision import PackedProjections, packed_weight

MAX_CONTEXT = 1024
"""Tokens of context up to which torch's own attention is no faster."""
HEAD_SIZES = (16, 32, 64)
"""Head sizes that the kernels serve; wider ones do not fit the registers."""
TILE = 64
"""Queries, and keys, in a block."""
LOG2_E = 1.4426950408889634


def is_faster(length: int, size: int) -> bool:
    """Whether the kernels beat torch's attention for contexts of `length` and heads of `size`."""
    return length <= MAX_CONTEXT and size in HEAD_SIZES


@triton.jit
def load_head(from_ptr, position, stride, length, SIZE: tl.constexpr, EVEN: tl.constexpr):
    """Loads one head of a block of tokens. EVEN says that all of them exist."""
    at = from_ptr + position[:, None] * stride + tl.arange(0, SIZE)[None, :]
    if EVEN:
        return tl.load(at)
    return tl.load(at, (position < length)[:, None], other=0.0)


@triton.jit
def store_head(to_ptr, x, position, stride, length, SIZE: tl.constexpr):
    """Stores one head of a block of tokens."""
    at = to_ptr + position[:, None] * stride + tl.arange(0, SIZE)[None, :]
    tl.store(at, x.to(to_ptr.dtype.element_ty), (position < length)[:, None])


@triton.jit
def store_grad(
    to_ptr, x, position, stride, cos_ptr, sin_ptr, length,
    ROPE: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Stores the gradient of one head of a block of tokens, rotated back if ROPE."""
    if ROPE:
        first, second = tl.split(tl.permute(tl.reshape(x, (TILE, 2, SIZE // 2)), (0, 2, 1)))
        pair, here = tl.arange(0, SIZE // 2)[None, :], (position < length)[:, None]
        angle = position[:, None] * SIZE + pair
        cos = tl.load(cos_ptr + angle, here, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + angle, here, other=0.0).to(tl.float32)
        at = to_ptr + position[:, None] * stride + pair
        dtype = to_ptr.dtype.element_ty
        tl.store(at, (first * cos + second * sin).to(dtype), here)
        tl.store(at + SIZE // 2, (second * cos - first * sin).to(dtype), here)
    else:
        store_head(to_ptr, x, position, stride, length, SIZE)


@triton.jit
def attend_kernel(
    packed_ptr, out_ptr, log_sum_ptr, length, heads, kv_heads, scale,
    SIZE: tl.constexpr, EVEN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Computes a block of queries of one head, those with the most keys first."""
    stride, tiles = (heads + 2 * kv_heads) * SIZE, tl.cdiv(length, TILE)
    tile, head_index = tiles - 1 - tl.program_id(0) % tiles, tl.program_id(0) // tiles
    head, row = head_index % heads, (head_index // heads).to(tl.int64) * length
    key_ptr = packed_ptr + row * stride + (heads + head // (heads // kv_heads)) * SIZE
    m = tile * TILE + tl.arange(0, TILE)
    q = load_head(packed_ptr + row * stride + head * SIZE, m, stride, length, SIZE, EVEN)
    top = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    out = tl.zeros([TILE, SIZE], tl.float32)
    for start in range(0, (tile + 1) * TILE, TILE):
        n = start + tl.arange(0, TILE)
        k = load_head(key_ptr, n, stride, length, SIZE, EVEN)
        v = load_head(key_ptr + kv_heads * SIZE, n, stride, length, SIZE, EVEN)
        score = tl.where(m[:, None] >= n[None, :], tl.dot(q, k.T) * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        prob = tl.exp2(score - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(prob, 1)
        out = tl.dot(prob.to(v.dtype), v, out * shrink[:, None])
        top = new_top
    to_ptr = out_ptr + row * heads * SIZE + head * SIZE
    store_head(to_ptr, out / total[:, None], m, heads * SIZE, length, SIZE)
    tl.store(log_sum_ptr + head_index * length + m, top + tl.log2(total), m < length)


@triton.jit
def queries_kernel(
    packed_ptr, cos_ptr, sin_ptr, out_ptr, grad_ptr, log_sum_ptr, mean_ptr, to_ptr,
    length, heads, kv_heads, scale, factor,
    ROPE: tl.constexpr, SIZE: tl.constexpr, EVEN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Computes the gradient of a block of queries of one head, and for each query the mean gradient
    of its scores. `factor` is `scale` without log2(e)."""
    stride, out_stride, tiles = (heads + 2 * kv_heads) * SIZE, heads * SIZE, tl.cdiv(length, TILE)
    tile, head_index = tiles - 1 - tl.program_id(0) % tiles, tl.program_id(0) // tiles
    head, row = head_index % heads, (head_index // heads).to(tl.int64) * length
    query, at = row * stride + head * SIZE, row * out_stride + head * SIZE
    key_ptr = packed_ptr + row * stride + (heads + head // (heads // kv_heads)) * SIZE
    m = tile * TILE + tl.arange(0, TILE)
    q = load_head(packed_ptr + query, m, stride, length, SIZE, EVEN)
    grad = load_head(grad_ptr + at, m, out_stride, length, SIZE, EVEN)
    out = load_head(out_ptr + at, m, out_stride, length, SIZE, EVEN)
    mean = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(mean_ptr + head_index * length + m, mean, m < length)
    log_sum = tl.load(log_sum_ptr + head_index * length + m, m < length, other=float("inf"))
    grad_q = tl.zeros([TILE, SIZE], tl.float32)
    for start in range(0, (tile + 1) * TILE, TILE):
        n = start + tl.arange(0, TILE)
        k = load_head(key_ptr, n, stride, length, SIZE, EVEN)
        v = load_head(key_ptr + kv_heads * SIZE, n, stride, length, SIZE, EVEN)
        prob = tl.exp2(tl.dot(q, k.T) * scale - log_sum[:, None])
        prob = tl.where(m[:, None] >= n[None, :], prob, 0.0)
        grad_score = prob * (tl.dot(grad, v.T) - mean[:, None])
        grad_q = tl.dot(grad_score.to(k.dtype), k, grad_q)
    store_grad(
        to_ptr + query, grad_q * factor, m, stride, cos_ptr, sin_ptr, length, ROPE, SIZE, TILE
    )  # fmt: skip


@triton.jit
def keys_kernel(
    packed_ptr, cos_ptr, sin_ptr, grad_ptr, log_sum_ptr, mean_ptr, to_ptr,
    length, heads, kv_heads, scale, factor,
    ROPE: tl.constexpr, SIZE: tl.constexpr, EVEN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Computes the gradients of a block of keys and values, over all heads that they serve."""
    stride, out_stride, tiles = (heads + 2 * kv_heads) * SIZE, heads * SIZE, tl.cdiv(length, TILE)
    tile, group_index, each = tl.program_id(0) % tiles, tl.program_id(0) // tiles, heads // kv_heads
    group, row = group_index % kv_heads, (group_index // kv_heads).to(tl.int64) * length
    key = row * stride + (heads + group) * SIZE
    value = key + kv_heads * SIZE
    n = tile * TILE + tl.arange(0, TILE)
    k = load_head(packed_ptr + key, n, stride, length, SIZE, EVEN)
    v = load_head(packed_ptr + value, n, stride, length, SIZE, EVEN)
    grad_k = tl.zeros([TILE, SIZE], tl.float32)
    grad_v = tl.zeros([TILE, SIZE], tl.float32)
    for head in range(group * each, (group + 1) * each):
        query_ptr, query_row = packed_ptr + row * stride + head * SIZE, row * heads + head * length
        for start in range(tile * TILE, length, TILE):
            m = start + tl.arange(0, TILE)
            q = load_head(query_ptr, m, stride, length, SIZE, EVEN)
            grad = load_head(
                grad_ptr + row * out_stride + head * SIZE, m, out_stride, length, SIZE, EVEN
            )
            if EVEN:
                log_sum = tl.load(log_sum_ptr + query_row + m)
                mean = tl.load(mean_ptr + query_row + m)
            else:
                log_sum = tl.load(log_sum_ptr + query_row + m, m < length, other=float("inf"))
                mean = tl.load(mean_ptr + query_row + m, m < length, other=0.0)
            prob = tl.exp2(tl.dot(k, q.T) * scale - log_sum[None, :])
            prob = tl.where(m[None, :] >= n[:, None], prob, 0.0)
            grad_v = tl.dot(prob.to(grad.dtype), grad, grad_v)
            grad_score = prob * (tl.dot(v, grad.T) - mean[None, :])
            grad_k = tl.dot(grad_score.to(q.dtype), q, grad_k)
    store_grad(
        to_ptr + key, grad_k * factor, n, stride, cos_ptr, sin_ptr, length, ROPE, SIZE, TILE
    )  # fmt: skip
    store_head(to_ptr + value, grad_v, n, stride, length, SIZE)


class Attend(torch.autograd.Function):
    """Queries, keys and values side by side (B, T, (H + 2G) K), which are rotated in place ->
    (B, T, H K). `cos_sin` is (T, K) each, or None; `before` and `after` are the slots of the
    products around it."""

    @staticmethod
    def forward(
        ctx,
        packed: Tensor,
        cos_sin: tuple[Tensor, Tensor] | None,
        heads: int,
        kv_heads: int,
        before: GradSlot | None = None,
        after: GradSlot | None = None,
    ) -> Tensor:
        batch, length, width = packed.shape
        size = width // (heads + 2 * kv_heads)
        if cos_sin is not None:
            rope(packed, *cos_sin, heads + kv_heads, size)
        shape = batch * length, heads * size
        out = after.inputs(*shape) if after else packed.new_empty(shape)
        log_sum = packed.new_empty(batch, heads, length, dtype=torch.float32)
        tiles, even = triton.cdiv(length, TILE), length % TILE == 0
        attend_kernel[(tiles * batch * heads,)](
            packed, out, log_sum, length, heads, kv_heads, LOG2_E * size**-0.5,
            SIZE=size, EVEN=even, TILE=TILE, num_warps=4, num_stages=3,
        )  # fmt: skip
        ctx.save_for_backward(packed, out, log_sum, *(cos_sin or ()))
        ctx.heads, ctx.kv_heads, ctx.before = heads, kv_heads, before
        return out.view(batch, length, -1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        packed, out, log_sum, *cos_sin = ctx.saved_tensors
        grad, mean = grad.contiguous(), torch.empty_like(log_sum)
        cos, sin = cos_sin or (None, None)
        (batch, length, width), heads, kv_heads = packed.shape, ctx.heads, ctx.kv_heads
        size, tiles = width // (heads + 2 * kv_heads), triton.cdiv(length, TILE)
        shape = batch * length, width
        packed_grad = ctx.before.output_grads(*shape) if ctx.before else packed.new_empty(shape)
        sizes = length, heads, kv_heads, LOG2_E * size**-0.5, size**-0.5
        options = {"ROPE": bool(cos_sin), "SIZE": size, "EVEN": length % TILE == 0, "TILE": TILE}
        queries_kernel[(tiles * batch * heads,)](
            packed, cos, sin, out, grad, log_sum, mean, packed_grad, *sizes, **options,
            num_warps=4, num_stages=3,
        )  # fmt: skip
        keys_kernel[(tiles * batch * kv_heads,)](
            packed, cos, sin, grad, log_sum, mean, packed_grad, *sizes, **options,
            num_warps=4, num_stages=2,
        )  # fmt: skip
        return packed_grad.view(packed.shape), None, None, None, None, None


def fused_attention(
    layer: PackedProjections,
    x_BTD: Tensor,
    cos_sin: tuple[Tensor, Tensor] | None,
    deferred: DeferredWeights | None,
) -> Tensor:
    """Returns the causal self-attention (B, T, D) of `x` (B, T, D)."""
    qkv, qkv_slot = linear_slot(packed_weight(layer), deferred)
    out, out_slot = linear_slot(layer.o_proj.weight, deferred)
    packed = deferred_linear(x_BTD, qkv, qkv_slot)
    y = Attend.apply(packed, cos_sin, layer.n_heads, layer.kv_heads, qkv_slot, out_slot)
    return deferred_linear(y, out, out_slot)
