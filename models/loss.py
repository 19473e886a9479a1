"""Cross-entropy without the float32 copies of the logits that autograd keeps."""

import torch
from torch import Tensor

MAX_FLOAT32_LOGITS = 1 << 26
"""Float32 logits that exist at a time."""


class CrossEntropy(torch.autograd.Function):
    """Mean of -log softmax(logits)[target], in float32 or better whatever the logits' dtype.

    The gradient, (softmax - onehot) / N, is computed in the forward pass and kept in the logits'
    own dtype: one copy of them, where autograd keeps three, two of those in float32.
    """

    @staticmethod
    def forward(ctx, logits_NV: Tensor, target_N: Tensor) -> Tensor:
        exact = torch.promote_types(logits_NV.dtype, torch.float32)
        loss, grads = torch.zeros((), device=logits_NV.device, dtype=exact), []
        rows = max(1, MAX_FLOAT32_LOGITS // logits_NV.shape[1])
        for logits, target in zip(logits_NV.split(rows), target_N.split(rows), strict=True):
            log_p, target = logits.to(exact).log_softmax(-1), target[:, None]
            loss -= log_p.gather(1, target).sum()
            if ctx.needs_input_grad[0]:
                grad = log_p.exp_().scatter_add_(1, target, -torch.ones_like(target, dtype=exact))
                grads.append(grad.div_(len(logits_NV)).to(logits.dtype))
        if grads:
            ctx.save_for_backward(torch.cat(grads) if len(grads) > 1 else grads[0])
        return loss / len(logits_NV)

    @staticmethod
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor, None]:
        (grad_NV,) = ctx.saved_tensors
        return grad_NV.mul_(grad_loss.to(grad_NV.dtype)), None  # a second backward is an error
