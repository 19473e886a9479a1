"""What a CPU can compute in, how its memory is kept, and how much of it was used."""

import ctypes
import os
from pathlib import Path

import torch

NATIVE_BF16 = ("avx512_bf16", "amx_bf16")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Of glibc's malloc.h."""
LARGE = 1 << 20
KERNELS = 2048
"""4096 hold 4 GB more in phase 2 of the full preset at 8 sequences, this many 1 GB."""


def has_bf16() -> bool:
    """Whether products of bf16 are instructions. Torch emulates them elsewhere, slower than it
    computes float32, and its own tests for bf16 count that as well."""
    able = getattr(torch.cpu, "get_capabilities", dict)()
    return any(able.get(name, False) for name in NATIVE_BF16)


def keep_for_next_step() -> None:
    """What one step has made serves the next. To be called before the first product."""
    keep_freed_memory()
    keep_kernels()


def keep_kernels() -> None:
    """OneDNN keeps its kernels for twice as many shapes of products as it would: experts have other
    numbers of rows in each step, and a kernel takes longer to make than to run. What is set by hand
    stays."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))


def keep_freed_memory() -> None:
    """Freed buffers are used again and not given back: else the system maps and clears the pages of
    the largest ones anew in every step. Does nothing where malloc is not glibc's. (Huge pages, for
    which torch aligns buffers, leave holes: half as much memory again, for 0 to 4 % of a step.)"""
    set_malloc(M_MMAP_MAX, 0)
    set_malloc(M_TRIM_THRESHOLD, -1)


def return_freed_memory() -> None:
    """Every large buffer goes back to the system as soon as it is freed: else those of a model that
    becomes another lie about as holes into which the larger ones don't fit. Does nothing where
    malloc is not glibc's."""
    set_malloc(M_MMAP_THRESHOLD, LARGE)


def set_malloc(option: int, value: int) -> None:
    try:
        ctypes.CDLL(None).mallopt(option, value)
    except (OSError, AttributeError, TypeError):  # Windows, macOS, a static or another libc
        return


def peak_resident_gb() -> float | None:
    """Most memory that this process has held, in 10^9 bytes; None where it is not counted."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(s.split()[1]) / 1e9 for s in lines if s.startswith("VmHWM:")), None)
