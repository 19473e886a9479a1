"""x + delta and its RMSNorm in one pass. The plain definition is models.ops.Ops.add_norm.

The stream is kept in bf16, as all that is added to it is, so that their gradients are one tensor.
What is normed is the rounded sum: a block that adds nothing then changes nothing, to the last bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from models.fused.deferred_grads import DeferredWeights, NormSlots, column_sums, norm_slots

MAX_PROGRAMS = 1024
"""Programs of the backward pass; each adds up the gain's gradient over its rows."""


@triton.jit
def add_norm_kernel(
    x_ptr, delta_ptr, gain_ptr, sum_ptr, h_ptr, scale_ptr, width, eps,
    HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds and norms one row."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < width
    at = row * width + cols
    x = tl.load(x_ptr + at, mask, other=0.0).to(tl.float32)
    if HAS_DELTA:
        x += tl.load(delta_ptr + at, mask, other=0.0).to(tl.float32)
        total = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, total, mask)
        x = total.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x) / width + eps)
    tl.store(scale_ptr + row, scale)
    gain = tl.load(gain_ptr + cols, mask, other=0.0)
    tl.store(h_ptr + at, (x * scale * gain).to(h_ptr.dtype.element_ty), mask)


@triton.jit
def add_norm_backward_kernel(
    grad_h_ptr, grad_sum_ptr, sum_ptr, scale_ptr, gain_ptr, grad_ptr, grad_gain_ptr, rows, width,
    HAS_GRAD_SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Computes the gradients of some rows, and what they add to the gain's gradient."""
    cols = tl.arange(0, BLOCK)
    mask = cols < width
    gain = tl.load(gain_ptr + cols, mask, other=0.0)
    grad_gain = tl.zeros([BLOCK], tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64) * width + cols
        scale = tl.load(scale_ptr + row)
        unit = tl.load(sum_ptr + at, mask, other=0.0).to(tl.float32) * scale
        grad_h = tl.load(grad_h_ptr + at, mask, other=0.0).to(tl.float32)
        grad_gain += grad_h * unit
        grad_h *= gain
        grad = scale * (grad_h - unit * (tl.sum(grad_h * unit) / width))
        if HAS_GRAD_SUM:
            grad += tl.load(grad_sum_ptr + at, mask, other=0.0).to(tl.float32)
        tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask)
    tl.store(grad_gain_ptr + tl.program_id(0) * width + cols, grad_gain, mask)


class AddNorm(torch.autograd.Function):
    """x (..., D) and delta (..., D), bf16, delta may be None, gain (D,) -> x + delta and its norm,
    in bf16. The gradient of both summands is one tensor."""

    @staticmethod
    def forward(
        ctx, x: Tensor, delta: Tensor | None, gain: Tensor, eps: float, slots: NormSlots
    ) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        total = x if delta is None else torch.empty_like(x)
        h = slots.after.inputs(rows, width) if slots.after else x.new_empty(rows, width)
        scale = gain.new_empty(rows)
        add_norm_kernel[(rows,)](
            x, None if delta is None else delta.contiguous(), gain, total, h, scale, width, eps,
            HAS_DELTA=delta is not None, BLOCK=triton.next_power_of_2(width),
        )  # fmt: skip
        ctx.save_for_backward(total, scale, gain)
        ctx.has_delta, ctx.slots = delta is not None, slots
        ctx.set_materialize_grads(False)
        return total, h.view(x.shape)

    @staticmethod
    def backward(ctx, grad_sum: Tensor | None, grad_h: Tensor):
        total, scale, gain = ctx.saved_tensors
        own, before, _ = ctx.slots
        rows, width = len(scale), len(gain)
        programs, block = min(rows, MAX_PROGRAMS), triton.next_power_of_2(width)
        if before:
            grad = before.output_grads(rows, width)
        else:
            grad = gain.new_empty(rows, width, dtype=torch.bfloat16)
        parts = own.partial_sums(programs, width) if own else gain.new_empty(programs, width)
        add_norm_backward_kernel[(programs,)](
            grad_h.contiguous(), None if grad_sum is None else grad_sum.contiguous(),
            total, scale, gain, grad, parts, rows, width,
            HAS_GRAD_SUM=grad_sum is not None, BLOCK=block, num_warps=max(1, min(block // 256, 8)),
        )  # fmt: skip
        grad_gain = None if own else column_sums(parts[None])[0]
        grad = grad.view(total.shape)
        return grad, grad if ctx.has_delta else None, grad_gain, None, None


def fused_add_norm(
    x_BTD: Tensor, delta_BTD: Tensor | None, norm: nn.RMSNorm, deferred: DeferredWeights | None
) -> tuple[Tensor, Tensor]:
    """Returns `x + delta` and the norm of that, both (B, T, D) in bf16."""
    gain, slots = norm_slots(norm.weight, deferred)
    return AddNorm.apply(x_BTD.to(torch.bfloat16), delta_BTD, gain, norm.eps, slots)
