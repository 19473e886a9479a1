"""The device and the precision of a run, and its memory."""

import os
from collections import deque
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from config import InputError
from utils.runtime.cpu import has_native_bf16

PINNED_BYTES = 1 << 25
"""Size of a chunk of pinned memory."""
MIN_PINNED_BYTES = 1 << 18
"""Size of a tensor from which it pays to go by way of pinned memory."""


def choose_device(name: str) -> torch.device:
    """Returns the device of that name; `auto` is the first of CUDA, MPS and the CPU.

    Raises:
        InputError: for a device that the machine does not have.
    """
    available = available_devices()
    if name == "auto":
        return torch.device(available[0])
    if name not in available:
        raise InputError(f"device = {name} is not there; this machine has {', '.join(available)}")
    return torch.device(name)


def use_device(device: torch.device) -> None:
    """Makes a GPU that is named by its number the one of this thread."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def available_devices() -> list[str]:
    """Returns the names of the machine's devices, the fastest first."""
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return (["cuda"] if cuda else []) + cuda + mps + ["cpu"]


def shrink_cublas_workspaces() -> None:
    """Lets cuBLAS and cublasLt work in 8 MB in place of 32 on each stream: 50 MB less at the peak
    of a low-memory run. Values set by hand stay. Call it before the first product."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
    os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "8192")


def device_name(device: torch.device) -> str:
    """Returns the GPU's name, or the kind of another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def dtype_name(dtype: torch.dtype) -> str:
    """Returns a dtype's name without torch's: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def training_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Returns the dtype in which the training step computes products."""
    if precision == "auto":
        is_native = device.type == "cuda" or (device.type == "cpu" and has_native_bf16())
        precision = "bf16" if is_native else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Returns a context in which products are computed in `dtype`."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def synchronize(device: torch.device) -> None:
    """Returns once all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors on the CPU: copies, but the very tensors that lie there already."""
    return {name: to_cpu(tensor) for name, tensor in tensors.items()}


def to_cpu(tensor: Tensor) -> Tensor:
    """Returns a tensor on the CPU. A large one comes from a GPU by way of pinned memory, which the
    link fills at its full speed while all cores empty what came before."""
    if tensor.device.type == "cpu":
        return tensor
    if tensor.device.type != "cuda" or tensor.nbytes < MIN_PINNED_BYTES:
        return tensor.cpu()
    copy = torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)
    source, target = (x.view(-1).view(torch.uint8) for x in (tensor.contiguous(), copy))
    pinned, waiting = pinned_chunks(), deque[tuple[torch.cuda.Event, Tensor, Tensor]]()

    def empty_chunk() -> None:
        copied, chunk, part = waiting.popleft()
        copied.synchronize()
        part.copy_(chunk)

    parts = zip(source.split(PINNED_BYTES), target.split(PINNED_BYTES), strict=True)
    for number, (part, into) in enumerate(parts):
        if len(waiting) == len(pinned):
            empty_chunk()
        chunk = pinned[number % len(pinned)][: len(part)]
        chunk.copy_(part, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(tensor.device))
        waiting.append((copied, chunk, into))
    while waiting:
        empty_chunk()
    return copy


def total_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Returns the bytes that tensors take together."""
    return sum(tensor.nbytes for tensor in tensors.values())


@cache
def pinned_chunks() -> list[Tensor]:
    """Returns the pinned memory through which tensors come from a GPU, one chunk after another."""
    return [torch.empty(PINNED_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]


def peak_memory_gb(device: torch.device) -> float | None:
    """Returns the most memory allocated since the last reset, in 10^9 bytes; None where it is not
    counted."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


def reset_peak_memory(device: torch.device) -> None:
    """Starts to measure the peak memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out: on a GPU that is a class of its own, on the CPU one message among
    those of RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def free_memory_gb(device: torch.device) -> float | None:
    """Returns, in 10^9 bytes, the GPU's memory that nobody has taken, or all of the machine's,
    whose caches give way; None where it cannot be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 1e9
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    return None
