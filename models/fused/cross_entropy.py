"""The head's product and the cross-entropy of it, the gradient written over the logits.

Plain: models.loss.CrossEntropy.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 64
"""The logits' rows are padded to whole 128 bytes: with the 50,257 columns of GPT-2's vocabulary as
they are, cuBLAS falls back to slow kernels."""


@triton.jit
def cross_entropy_kernel(
    logits_ptr, target_ptr, loss_ptr, vocab, stride, share,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    target = tl.load(target_ptr + row)
    cols = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        at = start + cols
        x = tl.load(logits_ptr + at, at < vocab, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, x)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - shift) + tl.exp(x - shift)
        top = higher
    highest = tl.max(top)
    log_sum = highest + tl.log(tl.sum(total * tl.exp(top - highest)))
    wanted = tl.load(logits_ptr + target).to(tl.float32)
    tl.store(loss_ptr + row, (log_sum - wanted) * share)
    if GRADIENT:
        tl.debug_barrier()  # the wanted logit is read before it is written over
        for start in range(0, vocab, BLOCK):
            at = start + cols
            x = tl.load(logits_ptr + at, at < vocab, other=float("-inf")).to(tl.float32)
            grad = (tl.exp(x - log_sum) - tl.where(at == target, 1.0, 0.0)) * share
            tl.store(logits_ptr + at, grad.to(logits_ptr.dtype.element_ty), at < vocab)


class HeadLoss(torch.autograd.Function):
    """x (N, D), head (V or padded V, D), targets (N,) -> mean cross-entropy, float32."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, head_VD: Tensor, target_N: Tensor, vocab: int) -> Tensor:
        padded = pad_rows(head_VD)
        logits_NV = x_ND @ padded.T  # the padding's columns are zero, and stay it
        loss_N = x_ND.new_empty(len(x_ND), dtype=torch.float32)
        cross_entropy_kernel[(len(x_ND),)](
            logits_NV, target_N, loss_N, vocab, logits_NV.stride(0), 1 / len(x_ND),
            GRADIENT=any(ctx.needs_input_grad), BLOCK=4096, num_warps=8,
        )  # fmt: skip
        ctx.save_for_backward(x_ND, padded, logits_NV)
        ctx.rows = len(head_VD)
        return loss_N.sum()

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        x_ND, padded, grad_NV = ctx.saved_tensors
        grad_head = grad_NV.T @ (x_ND * grad_loss)
        return (grad_NV @ padded) * grad_loss, grad_head[: ctx.rows], None, None


def pad_rows(head_VD: Tensor) -> Tensor:
    """With rows of zeros, up to a multiple of ROWS; as it is where it has as many."""
    missing = -len(head_VD) % ROWS
    return torch.nn.functional.pad(head_VD, (0, 0, 0, missing)) if missing else head_VD
