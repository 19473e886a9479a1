"""The norm by which gradients are clipped."""

from collections.abc import Sequence

import torch
from torch import Tensor


def global_norm(grads: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Returns the Euclidean norm of all gradients together, in float32 or better, in which the
    squares of each gradient count `weights` times (`AdamWScale.norm_weight`). It goes by rows
    first, because torch sums up a whole tensor on one core."""
    norms = [
        weight**0.5
        * torch.linalg.vector_norm(
            grad.reshape(-1, grad.shape[-1]),
            dim=-1,
            dtype=torch.promote_types(grad.dtype, torch.float32),
        )
        for grad, weight in zip(grads, weights, strict=True)
    ]
    return torch.linalg.vector_norm(torch.cat(norms))
