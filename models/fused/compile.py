"""Compiles kernels beside each other instead of launching them, and says which ones they are."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton import knobs
from triton.runtime._async_compile import active_mode
from triton.runtime.cache import triton_key
from triton.runtime.jit import JITFunction


def load_compiler(device: torch.device) -> None:
    """Loads what the first launch of a kernel needs: the device's context, and what Triton knows
    compiled kernels by."""
    torch.empty(1, device=device)
    triton_key()


@cache
def kernel_sources() -> str:
    """Returns a hash of all sources that kernels are made from, and of Triton's version."""
    sources = (path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.py")))
    return hashlib.sha256(b"".join(sources) + triton.__version__.encode()).hexdigest()


def cache_stamp(*key: object) -> Path:
    """Returns a file in Triton's cache that is there once the kernels of `key`, which is told apart
    by its `repr`, have been compiled."""
    digest = hashlib.sha256(repr((kernel_sources(), *key)).encode()).hexdigest()
    return Path(knobs.cache.dir, f"growth-{digest[:32]}")


@contextmanager
def compile_launches() -> Iterator[None]:
    """Within it, and in this thread alone, tensors have no memory, and a kernel that is launched is
    compiled instead. It ends once all of them are."""
    launch, address = JITFunction.run, FakeTensor.data_ptr

    def compile_or_launch(self, *args, grid, warmup, **kwargs):
        is_ahead = active_mode.get() is not None  # of this thread
        return launch(self, *args, grid=grid, warmup=warmup or is_ahead, **kwargs)

    JITFunction.run = compile_or_launch
    # Kernels ask whether it is a multiple of 16 bytes, at which memory begins.
    FakeTensor.data_ptr = lambda self: self.storage_offset() * self.element_size()
    try:
        with (
            ThreadPoolExecutor() as executor,
            triton.AsyncCompileMode(executor),
            torch.autograd.set_multithreading_enabled(False),  # backward in this thread, too
            FakeTensorMode(allow_non_fake_inputs=True),
        ):
            yield
    finally:
        JITFunction.run, FakeTensor.data_ptr = launch, address
