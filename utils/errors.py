"""What stops a run."""

import torch


class RunStopped(RuntimeError):
    """A run cannot go on. The message says where it stood and what is left of it."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """On a GPU a class of its own, on the CPU one message among those of RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
