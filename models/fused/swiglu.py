"""silu(gate) * up, from the product of an input with both projections side by side."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.fused.late import Row, linear, row_of, stand_in
from models.precision import Packs, side_by_side


@triton.jit
def swiglu_kernel(gate_up_ptr, out_ptr, width, BLOCK: tl.constexpr):
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
    WEIGHED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    weight = 1.0
    if WEIGHED:
        weight = tl.load(weight_ptr + row)
    kind = grad_gate_up_ptr.dtype.element_ty
    along = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < width
        at = row * 2 * width + cols
        gate = tl.load(gate_up_ptr + at, mask, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + at + width, mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * width + cols, mask, other=0.0).to(tl.float32)
        open = tl.sigmoid(gate)
        silu = gate * open
        along += grad * silu * up
        grad *= weight
        grad_gate = grad * up * open * (1.0 + gate * (1.0 - open))
        tl.store(grad_gate_up_ptr + at, grad_gate.to(kind), mask)
        tl.store(grad_gate_up_ptr + at + width, (grad * silu).to(kind), mask)
    if WEIGHED:
        tl.store(grad_weight_ptr + row, tl.sum(along))


def swiglu(gate_up_MF: Tensor, to: Tensor | None = None) -> Tensor:
    """(M, 2F) -> (M, F), made in `to`; with weights of the rows: models.fused.products.gate_up."""
    rows, width = gate_up_MF.shape[0], gate_up_MF.shape[1] // 2
    out_MF = gate_up_MF.new_empty(rows, width) if to is None else to
    swiglu_kernel[(rows,)](gate_up_MF, out_MF, width, BLOCK=triton.next_power_of_2(width))
    return out_MF


def swiglu_backward(
    grad_MF: Tensor,
    gate_up_MF: Tensor,
    weight_M: Tensor | None = None,
    to: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of gate_up (M, 2F), made in `to`, and, where there are any, of the weights (M,)."""
    rows, width = grad_MF.shape
    grad_gate_up = torch.empty_like(gate_up_MF) if to is None else to
    grad_weight = None if weight_M is None else torch.empty_like(weight_M)
    swiglu_backward_kernel[(rows,)](
        grad_MF, gate_up_MF, weight_M, grad_gate_up, grad_weight, width,
        WEIGHED=weight_M is not None, BLOCK=512,
    )  # fmt: skip
    return grad_gate_up, grad_weight


class SwiGLU(torch.autograd.Function):
    """gate and up side by side (N, 2F) -> silu(gate) * up (N, F); `before` and `after` are the rows
    of the products that make the one and take the other."""

    @staticmethod
    def forward(ctx, gate_up_NF: Tensor, before: Row | None, after: Row | None) -> Tensor:
        ctx.save_for_backward(gate_up_NF)
        ctx.before = before
        rows, width = gate_up_NF.shape[0], gate_up_NF.shape[1] // 2
        return swiglu(gate_up_NF, after.inputs(rows, width) if after else None)

    @staticmethod
    def backward(ctx, grad_NF: Tensor) -> tuple[Tensor, None, None]:
        (gate_up_NF,) = ctx.saved_tensors
        to = ctx.before.slopes(*gate_up_NF.shape) if ctx.before else None
        grad, _ = swiglu_backward(grad_NF.contiguous(), gate_up_NF, to=to)
        return grad, None, None


def feed_forward(layer: Packs, x_BTD: Tensor) -> Tensor:
    """(B, T, D) -> (B, T, D); plain: models.model.MLP."""
    up, down = stand_in(side_by_side(layer)), stand_in(layer.down_proj.weight)
    gate_up_NF = linear(x_BTD.flatten(0, 1), up)
    h_NF = SwiGLU.apply(gate_up_NF, row_of(up), row_of(down))
    return linear(h_NF, down).view(x_BTD.shape)
