"""The device and the precision of a run."""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from config import InputError
from utils.cpu import has_bf16


def choose_device(name: str) -> torch.device:
    """`auto` is the first of CUDA, MPS and the CPU. Raises InputError for a device not there."""
    present = devices()
    if name == "auto":
        return torch.device(present[0])
    if name not in present:
        raise InputError(f"device = {name} is not there; this machine has {', '.join(present)}")
    return torch.device(name)


def devices() -> list[str]:
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return (["cuda"] if cuda else []) + cuda + mps + ["cpu"]


def small_workspaces() -> None:
    """cuBLAS works in 8 MB in place of 32 on each stream, and cublasLt likewise: 50 MB less at the
    peak of a lean run. What is set by hand stays. To be called before the first product."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
    os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "8192")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def training_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What matrix products of a training step are computed in."""
    if precision == "auto":
        native = device.type == "cuda" or (device.type == "cpu" and has_bf16())
        precision = "bf16" if native else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def wait_for(device: torch.device) -> None:
    """Returns once all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies; of what lies there already, the very ones."""
    return {name: fetched(tensor) for name, tensor in tensors.items()}


def fetched(tensor: Tensor) -> Tensor:
    """On the CPU. Pages that are new to a process are cleared as they are first written to, which
    all cores do faster than the one that copies from a GPU."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.zeros_like(tensor, device="cpu").copy_(tensor)


def peak_memory_gb(device: torch.device) -> float | None:
    """Most memory allocated since the last reset, in 10^9 bytes; None where it is not counted."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


def is_out_of_memory(error: RuntimeError) -> bool:
    """On a GPU a class of its own, on the CPU one message among those of RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def free_memory_gb(device: torch.device) -> float | None:
    """What of the GPU's memory nobody has taken yet, or all of the machine's, whose caches give
    way; None where it cannot be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 1e9
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    return None
