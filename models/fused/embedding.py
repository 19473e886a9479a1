"""Embedding lookup, and the gradient of a table that is also the head: what reaches the table
through the tokens is added in place to what reaches it as the head. The plain definition is
models.ops.Ops.embed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.fused.moe import gather_rows


@triton.jit
def claim_kernel(token_ptr, owner_ptr, tokens, BLOCK: tl.constexpr):
    """Elects one position of each token, whichever writes last, where its gradients are summed."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(owner_ptr + tl.load(token_ptr + at, at < tokens, other=0), at, at < tokens)


@triton.jit
def sum_kernel(grad_ptr, token_ptr, owner_ptr, sum_ptr, width, BLOCK: tl.constexpr):
    """Adds one position's gradient to the sum of its token."""
    position = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < width
    owner = tl.load(owner_ptr + tl.load(token_ptr + position)).to(tl.int64)
    grad = tl.load(grad_ptr + position * width + cols, mask, other=0.0).to(tl.float32)
    tl.atomic_add(sum_ptr + owner * width + cols, grad, mask, sem="relaxed")


@triton.jit
def add_kernel(sum_ptr, token_ptr, owner_ptr, table_ptr, width, BLOCK: tl.constexpr):
    """Adds a token's summed gradient to the table's gradient."""
    position = tl.program_id(0).to(tl.int64)
    token = tl.load(token_ptr + position)
    if tl.load(owner_ptr + token) == position:
        cols = tl.arange(0, BLOCK)
        mask = cols < width
        row_ptr = table_ptr + token * width + cols
        total = tl.load(row_ptr, mask, other=0.0).to(tl.float32)
        total += tl.load(sum_ptr + position * width + cols, mask, other=0.0)
        tl.store(row_ptr, total.to(table_ptr.dtype.element_ty), mask)


class Embedding(torch.autograd.Function):
    """tokens (B, T), table (V, D) -> their rows (B, T, D) in bf16, and the table. The gradients
    of a token that occurs more than once are summed in float32, in no fixed order."""

    @staticmethod
    def forward(ctx, tokens_BT: Tensor, table_VD: Tensor) -> tuple[Tensor, Tensor]:
        tokens_BT = tokens_BT.contiguous()
        x_ND = gather_rows(table_VD, tokens_BT.flatten(), torch.bfloat16)
        ctx.save_for_backward(tokens_BT, table_VD)
        ctx.set_materialize_grads(False)
        return x_ND.view(*tokens_BT.shape, -1), table_VD.view_as(table_VD)

    @staticmethod
    def backward(ctx, grad_BTD: Tensor | None, grad_VD: Tensor | None):
        tokens_BT, table_VD = ctx.saved_tensors
        if grad_VD is None:
            grad_VD = torch.zeros_like(table_VD)
        if grad_BTD is not None:
            grad_BTD = grad_BTD.contiguous()
            tokens, width = tokens_BT.numel(), table_VD.shape[1]
            owner_V = tokens_BT.new_empty(len(table_VD), dtype=torch.int32)
            sum_ND = torch.zeros_like(grad_BTD, dtype=torch.float32)
            claim_kernel[(triton.cdiv(tokens, 256),)](tokens_BT, owner_V, tokens, BLOCK=256)
            block = triton.next_power_of_2(width)
            sum_kernel[(tokens,)](grad_BTD, tokens_BT, owner_V, sum_ND, width, BLOCK=block)
            # In place, because nothing else holds the gradient that reaches the table as the head.
            add_kernel[(tokens,)](sum_ND, tokens_BT, owner_V, grad_VD, width, BLOCK=block)
        return None, grad_VD
