"""A training step as one CUDA graph: launched at once, it does not wait for Python."""

from collections.abc import Callable
from functools import cache
from typing import Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from config import TrainingConfig
from utils.optimizer import Optimizer

WARM_UP = 3
"""Steps before the capture; they choose kernels and compile them."""
WORTH = 10
"""Steps of a phase from which a capture pays: it takes as long as two that are launched one by one,
and spares each 14 to 40 ms on an H100 (`python -m utils.benchmark --capture off`)."""


@runtime_checkable
class Capturable(Optimizer, Protocol):
    """One whose step asks the host nothing, if it may look around after the capture."""

    def locate(self) -> None: ...


def wants_capture(settings: TrainingConfig, steps: int) -> bool:
    """Whether so many steps are to be captured, if they can be."""
    return settings.capture == "on" or (settings.capture == "auto" and steps >= WORTH)


def is_capturable(optimizer: Optimizer) -> TypeGuard[Capturable]:
    return isinstance(optimizer, Capturable)


@cache
def side_stream(device: int) -> torch.cuda.Stream:
    """Where work is captured. One for all of it, since cuBLAS keeps 67 MB of workspace for each
    stream that it has worked on."""
    return torch.cuda.Stream(device)


class Captured:
    """`step`, which trains `optimizer` on tokens of one shape and returns a tensor. That tensor is
    written over by the next call."""

    def __init__(self, step: Callable[[Tensor], Tensor], optimizer: Capturable):
        self.step, self.optimizer, self.steps = step, optimizer, 0
        self.stream = side_stream(torch.cuda.current_device())
        self.graph = torch.cuda.CUDAGraph()

    def __call__(self, tokens_BS: Tensor) -> Tensor:
        self.steps += 1
        if self.steps <= WARM_UP:
            return self.warm_up(tokens_BS)
        if self.steps == WARM_UP + 1:
            self.tokens_BS = tokens_BS.clone()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.result = self.step(self.tokens_BS)
            self.optimizer.locate()
        self.tokens_BS.copy_(tokens_BS)
        self.graph.replay()
        return self.result

    def warm_up(self, tokens_BS: Tensor) -> Tensor:
        """On the stream that will be captured, which nothing must tie to another."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = self.step(tokens_BS)
        torch.cuda.current_stream().wait_stream(self.stream)
        return result
