"""The norm by which gradients are clipped."""

from collections.abc import Sequence

import torch
from torch import Tensor


def global_norm(grads: Sequence[Tensor]) -> Tensor:
    """Returns the Euclidean norm of all gradients together, in float32 or better. It goes by rows
    first, because torch sums up a whole tensor on one core."""
    norms = [
        torch.linalg.vector_norm(
            grad.reshape(-1, grad.shape[-1]),
            dim=-1,
            dtype=torch.promote_types(grad.dtype, torch.float32),
        )
        for grad in grads
    ]
    return torch.linalg.vector_norm(torch.cat(norms))
