"""x + delta and its RMSNorm in one pass; plain: models.model.add_norm."""

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 1024
"""At most, of the backward pass; each adds up the gain's gradient over its rows."""


@triton.jit
def add_norm_kernel(
    x_ptr, delta_ptr, gain_ptr, sum_ptr, h_ptr, scale_ptr, width, eps,
    HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < width
    at = row * width + cols
    x = tl.load(x_ptr + at, mask, other=0.0).to(tl.float32)
    if HAS_DELTA:
        x += tl.load(delta_ptr + at, mask, other=0.0).to(tl.float32)
        tl.store(sum_ptr + at, x, mask)
    scale = 1.0 / tl.sqrt(tl.sum(x * x) / width + eps)
    tl.store(scale_ptr + row, scale)
    gain = tl.load(gain_ptr + cols, mask, other=0.0)
    tl.store(h_ptr + at, (x * scale * gain).to(h_ptr.dtype.element_ty), mask)


@triton.jit
def add_norm_backward_kernel(
    grad_h_ptr, grad_sum_ptr, sum_ptr, scale_ptr, gain_ptr,
    grad_x_ptr, grad_delta_ptr, grad_gain_ptr, rows, width,
    HAS_GRAD_SUM: tl.constexpr, HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
        tl.store(grad_x_ptr + at, grad, mask)
        if HAS_DELTA:
            tl.store(grad_delta_ptr + at, grad.to(grad_delta_ptr.dtype.element_ty), mask)
    tl.store(grad_gain_ptr + tl.program_id(0) * width + cols, grad_gain, mask)


@triton.jit
def column_sum_kernel(x_ptr, sum_ptr, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Torch's own takes three times as long for tables this small."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (cols < width)[None, :]
        total += tl.load(x_ptr + row[:, None] * width + cols[None, :], mask, other=0.0)
    tl.store(sum_ptr + cols, tl.sum(total, 0), cols < width)


class AddNorm(torch.autograd.Function):
    """x (..., D) float32, delta (..., D) bf16 or None, gain (D,) -> x + delta, its norm in bf16."""

    @staticmethod
    def forward(
        ctx, x: Tensor, delta: Tensor | None, gain: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        total = x if delta is None else torch.empty_like(x)
        h = torch.empty_like(x, dtype=torch.bfloat16)
        scale = gain.new_empty(rows)
        add_norm_kernel[(rows,)](
            x, None if delta is None else delta.contiguous(), gain, total, h, scale, width, eps,
            HAS_DELTA=delta is not None, BLOCK=triton.next_power_of_2(width),
        )  # fmt: skip
        ctx.save_for_backward(total, scale, gain)
        ctx.has_delta = delta is not None
        ctx.set_materialize_grads(False)
        # An input must not be handed back as it is, or autograd takes it for changed in place.
        return (total.view_as(total) if delta is None else total), h

    @staticmethod
    def backward(ctx, grad_sum: Tensor | None, grad_h: Tensor):
        total, scale, gain = ctx.saved_tensors
        rows, width = len(scale), len(gain)
        grad_x = torch.empty_like(total)
        grad_delta = torch.empty_like(total, dtype=torch.bfloat16) if ctx.has_delta else None
        programs = min(triton.cdiv(rows, 4), PROGRAMS)
        parts, grad_gain = gain.new_empty(programs, width), torch.empty_like(gain)
        add_norm_backward_kernel[(programs,)](
            grad_h.contiguous(), None if grad_sum is None else grad_sum.contiguous(),
            total, scale, gain, grad_x, grad_delta, parts, rows, width,
            HAS_GRAD_SUM=grad_sum is not None, HAS_DELTA=ctx.has_delta,
            BLOCK=triton.next_power_of_2(width),
        )  # fmt: skip
        column_sum_kernel[(triton.cdiv(width, 8),)](
            parts, grad_gain, programs, width, ROWS=256, BLOCK=8
        )
        return grad_x, grad_delta, grad_gain, None
