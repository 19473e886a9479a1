"""silu(gate) * up, from one product of an input with both projections. The plain definition is
models.model.MLP."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.fused.deferred_grads import DeferredWeights, GradSlot, deferred_linear, linear_slot
from models.precision import PackedProjections, packed_weight


@triton.jit
def swiglu_kernel(gate_up_ptr, out_ptr, width, BLOCK: tl.constexpr):
    """Computes silu(gate) * up of one row."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < width
    gate = tl.load(gate_up_ptr + row * 2 * width + cols, mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * width + width + cols, mask, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * width + cols, out.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def swiglu_backward_kernel(
    grad_ptr, gate_up_ptr, weight_ptr, grad_gate_up_ptr, grad_weight_ptr, width,
    WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Computes the gradients of gate and up for one row, and of the row's weight if it has one."""
    row = tl.program_id(0).to(tl.int64)
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(weight_ptr + row)
    dtype = grad_gate_up_ptr.dtype.element_ty
    grad_weight = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < width
        at = row * 2 * width + cols
        gate = tl.load(gate_up_ptr + at, mask, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + at + width, mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * width + cols, mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        grad_weight += grad * silu * up
        grad *= weight
        grad_gate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        tl.store(grad_gate_up_ptr + at, grad_gate.to(dtype), mask)
        tl.store(grad_gate_up_ptr + at + width, (grad * silu).to(dtype), mask)
    if WEIGHTED:
        tl.store(grad_weight_ptr + row, tl.sum(grad_weight))


def swiglu(gate_up_MF: Tensor, out: Tensor | None = None) -> Tensor:
    """Returns silu(gate) * up (M, F) of (M, 2F), written to `out` where that is given. Rows with
    weights are models.fused.grouped_gemm.gate_up's."""
    rows, width = gate_up_MF.shape[0], gate_up_MF.shape[1] // 2
    out_MF = gate_up_MF.new_empty(rows, width) if out is None else out
    swiglu_kernel[(rows,)](gate_up_MF, out_MF, width, BLOCK=triton.next_power_of_2(width))
    return out_MF


def swiglu_backward(
    grad_MF: Tensor,
    gate_up_MF: Tensor,
    weight_M: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Returns the gradients of gate_up (M, 2F), written to `out` where that is given, and of the
    rows' weights (M,), None without any."""
    rows, width = grad_MF.shape
    grad_gate_up = torch.empty_like(gate_up_MF) if out is None else out
    grad_weight = None if weight_M is None else torch.empty_like(weight_M)
    swiglu_backward_kernel[(rows,)](
        grad_MF, gate_up_MF, weight_M, grad_gate_up, grad_weight, width,
        WEIGHTED=weight_M is not None, BLOCK=512,
    )  # fmt: skip
    return grad_gate_up, grad_weight


class SwiGLU(torch.autograd.Function):
    """gate and up side by side (N, 2F) -> silu(gate) * up (N, F). `before` and `after` are the
    slots of the products that make the one and take the other."""

    @staticmethod
    def forward(ctx, gate_up_NF: Tensor, before: GradSlot | None, after: GradSlot | None) -> Tensor:
        ctx.save_for_backward(gate_up_NF)
        ctx.before = before
        rows, width = gate_up_NF.shape[0], gate_up_NF.shape[1] // 2
        return swiglu(gate_up_NF, after.inputs(rows, width) if after else None)

    @staticmethod
    def backward(ctx, grad_NF: Tensor) -> tuple[Tensor, None, None]:
        (gate_up_NF,) = ctx.saved_tensors
        out = ctx.before.output_grads(*gate_up_NF.shape) if ctx.before else None
        grad, _ = swiglu_backward(grad_NF.contiguous(), gate_up_NF, out=out)
        return grad, None, None


def fused_mlp(layer: PackedProjections, x_BTD: Tensor, deferred: DeferredWeights | None) -> Tensor:
    """Returns the feed-forward (B, T, D) of `x` (B, T, D)."""
    gate_up, gate_up_slot = linear_slot(packed_weight(layer), deferred)
    down, down_slot = linear_slot(layer.down_proj.weight, deferred)
    gate_up_NF = deferred_linear(x_BTD.flatten(0, 1), gate_up, gate_up_slot)
    h_NF = SwiGLU.apply(gate_up_NF, gate_up_slot, down_slot)
    return deferred_linear(h_NF, down, down_slot).view(x_BTD.shape)
