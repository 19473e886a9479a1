"""The head's product and its cross-entropy, the gradient written over the logits. The plain
definition is models.loss.CrossEntropy."""

import torch
import triton
import triton.language as tl
from torch import Tensor

PAD_MULTIPLE = 64
"""The logits' rows are padded to whole 128 bytes: with the 50,257 columns of GPT-2's vocabulary as
they are, cuBLAS falls back to slow kernels."""


@triton.jit
def load_last(logits_ptr, at, vocab, stride):
    """Loads the last block of a row of logits, minus infinity beyond the vocabulary."""
    x = tl.load(logits_ptr + at, at < stride, other=float("-inf")).to(tl.float32)
    return tl.where(at < vocab, x, float("-inf"))


@triton.jit
def cross_entropy_kernel(
    logits_ptr, target_ptr, loss_ptr, vocab, stride, share,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Computes one row. All blocks but the last are whole, which spares them the masks. The
    gradient is computed from the back, where what was read last is still in the L2; what is written
    may leave it."""
    log2_e: tl.constexpr = 1.4426950408889634
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    target = tl.load(target_ptr + row)
    target_logit = tl.load(logits_ptr + target).to(tl.float32) * log2_e
    whole = vocab // BLOCK * BLOCK
    cols = tl.arange(0, BLOCK)
    last = whole + cols
    x = load_last(logits_ptr, last, vocab, stride) * log2_e
    top = tl.maximum(x, -1e30)
    total = tl.exp2(x - top)
    for start in range(0, whole, BLOCK):
        x = tl.load(logits_ptr + start + cols).to(tl.float32) * log2_e
        less = tl.exp2(-tl.abs(x - top))  # the factor of the lower one, whichever it is
        total = tl.where(x > top, total * less + 1.0, total + less)
        top = tl.maximum(top, x)
    highest = tl.max(top)
    log_sum = highest + tl.log2(tl.sum(total * tl.exp2(top - highest)))
    tl.store(loss_ptr + row, (log_sum - target_logit) * (share / log2_e))
    if GRADIENT:
        dtype = logits_ptr.dtype.element_ty
        tl.debug_barrier()  # the target logit has been read
        x = load_last(logits_ptr, last, vocab, stride) * log2_e
        grad = (tl.exp2(x - log_sum) * share).to(dtype)
        tl.store(logits_ptr + last, grad, last < stride, cache_modifier=".cs")
        for done in range(0, whole, BLOCK):
            at = whole - BLOCK - done + cols
            x = tl.load(logits_ptr + at).to(tl.float32) * log2_e
            grad = (tl.exp2(x - log_sum) * share).to(dtype)
            tl.store(logits_ptr + at, grad, cache_modifier=".cs")
        tl.debug_barrier()  # the target's gradient overwrites what the loop wrote there
        tl.store(logits_ptr + target, ((tl.exp2(target_logit - log_sum) - 1.0) * share).to(dtype))


class FusedHeadLoss(torch.autograd.Function):
    """x (N, D), head (V or padded V, D), targets (N,) -> mean cross-entropy, float32. `needs_grad`
    says whether the gradient will be asked for, which a Function cannot see for itself."""

    @staticmethod
    def forward(
        ctx, x_ND: Tensor, head_VD: Tensor, target_N: Tensor, vocab: int, needs_grad: bool
    ) -> Tensor:
        padded, target_N = pad_rows(head_VD), target_N.contiguous()
        logits_NV = x_ND @ padded.T  # the padding's columns are zero, and stay it
        loss_N = x_ND.new_empty(len(x_ND), dtype=torch.float32)
        cross_entropy_kernel[(len(x_ND),)](
            logits_NV, target_N, loss_N, vocab, logits_NV.stride(0), 1 / len(x_ND),
            GRADIENT=needs_grad, BLOCK=4096, num_warps=16,
        )  # fmt: skip
        ctx.save_for_backward(x_ND, padded, logits_NV)
        ctx.rows = len(head_VD)
        return loss_N.sum()

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        x_ND, padded, grad_NV = ctx.saved_tensors
        grad_head = grad_NV.T @ (x_ND * grad_loss)
        return (grad_NV @ padded) * grad_loss, grad_head[: ctx.rows], None, None, None


def pad_rows(head_VD: Tensor) -> Tensor:
    """Returns the head with rows of zeros up to a multiple of PAD_MULTIPLE, itself if it has
    them."""
    missing = -len(head_VD) % PAD_MULTIPLE
    return torch.nn.functional.pad(head_VD, (0, 0, 0, missing)) if missing else head_VD
