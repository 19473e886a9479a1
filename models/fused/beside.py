"""Products whose result is not needed until the optimizer's step, on a stream of their own: what
small batches leave idle of the GPU computes them."""

from collections import deque
from functools import cache

import torch
from torch import Tensor

WAITING = 2
"""Products at most that the backward pass runs ahead of."""


@cache
def stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


class Beside:
    """Keeps the operands from being freed, and their memory from being used again, too early."""

    def __init__(self):
        self.open: deque[tuple[torch.cuda.Event, tuple[Tensor, ...]]] = deque()

    def __call__(self, weight: Tensor, product, *operands: Tensor) -> Tensor:
        """`product(*operands)`, the gradient of `weight`."""
        if not (weight.is_cuda and weight.is_leaf and weight.grad is None):
            return product(*operands)  # something is going to be done with it at once
        side = stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            gradient = product(*operands)
        self.open.append((side.record_event(), operands))
        self.wait(WAITING)
        return gradient

    def wait(self, most: int = 0) -> None:
        """Until no more than so many are open."""
        while len(self.open) > most:
            event, _ = self.open.popleft()
            torch.cuda.current_stream().wait_event(event)


beside = Beside()
