"""A training step as one CUDA graph: launched at once, it does not wait for Python."""

from collections.abc import Callable
from functools import cache
from typing import Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from config import TrainingConfig
from utils.optim.adamw import Optimizer

WARM_UP_STEPS = 3
"""Steps before the capture; they choose kernels and compile them."""
MIN_CAPTURED_STEPS = 10
"""Steps of a phase from which a capture pays: it takes as long as two steps that are launched one
by one, and saves each 14 to 40 ms on an H100 (`python -m utils.benchmark --cuda-graph off`)."""


@runtime_checkable
class CapturableOptimizer(Optimizer, Protocol):
    """An optimizer whose step asks the host nothing, if it may look around after the capture."""

    def locate_grads(self) -> None:
        """Tells the device where the captured step's gradients lie."""
        ...


def wants_cuda_graph(training: TrainingConfig, steps: int) -> bool:
    """Whether a phase of so many steps is to be captured, if it can be."""
    return training.cuda_graph == "on" or (
        training.cuda_graph == "auto" and steps >= MIN_CAPTURED_STEPS
    )


def is_capturable(optimizer: Optimizer) -> TypeGuard[CapturableOptimizer]:
    """Whether the optimizer's step can be captured."""
    return isinstance(optimizer, CapturableOptimizer)


@cache
def capture_stream(device: int) -> torch.cuda.Stream:
    """Returns the stream on which work is captured: one for all of it, since cuBLAS keeps 67 MB of
    workspace for each stream that it has worked on."""
    return torch.cuda.Stream(device)


def capture_graph(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> torch.cuda.graph:
    """Returns a context that captures into `graph` what is done on `stream`. Other threads may use
    the GPU meanwhile, as the one that compiles kernels ahead does."""
    return torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")


class CapturedStep:
    """A step that trains `optimizer` on tokens of one shape, replayed as a graph after a warm-up.
    The tensor that it returns is overwritten by the next call."""

    def __init__(self, step: Callable[[Tensor], Tensor], optimizer: CapturableOptimizer):
        self.step, self.optimizer, self.calls = step, optimizer, 0
        self.stream = capture_stream(torch.cuda.current_device())
        self.graph = torch.cuda.CUDAGraph()

    @property
    def is_captured(self) -> bool:
        """Whether the next call replays the graph, without a warm-up or a capture."""
        return self.calls > WARM_UP_STEPS

    def __call__(self, tokens_BS: Tensor) -> Tensor:
        self.calls += 1
        if self.calls <= WARM_UP_STEPS:
            return self.warm_up(tokens_BS)
        if self.calls == WARM_UP_STEPS + 1:
            self.tokens_BS = tokens_BS.clone()
            with capture_graph(self.graph, self.stream):
                self.result = self.step(self.tokens_BS)
            self.optimizer.locate_grads()
        self.tokens_BS.copy_(tokens_BS)
        self.graph.replay()
        return self.result

    def warm_up(self, tokens_BS: Tensor) -> Tensor:
        """Takes an ordinary step on the stream that will be captured, which nothing may tie to
        another stream."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = self.step(tokens_BS)
        torch.cuda.current_stream().wait_stream(self.stream)
        return result
