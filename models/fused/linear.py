"""A product with a weight, whose gradient is computed beside the backward pass; plain: F.linear."""

import torch
from torch import Tensor

from models.fused.beside import beside


class Linear(torch.autograd.Function):
    """x (..., I) and weight (O, I) -> (..., O)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return x @ weight_OI.T

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight_OI = ctx.saved_tensors
        grad_weight = weight_gradient(weight_OI, grad, x)
        return grad @ weight_OI, grad_weight


def weight_gradient(weight_OI: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    return beside(weight_OI, torch.mm, grad.flatten(0, -2).T, x.flatten(0, -2))
