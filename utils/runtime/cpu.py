"""What a CPU computes in, how its memory is reused, and how much of it was used."""

import ctypes
import os
from pathlib import Path

import torch

NATIVE_BF16 = ("avx512_bf16", "amx_bf16")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Options of mallopt, from glibc's malloc.h."""
LARGE_BUFFER = 1 << 20
ONEDNN_KERNELS = 2048
"""4096 hold 4 GB more in phase 2 of the full preset at 8 sequences, this many 1 GB."""


def has_native_bf16() -> bool:
    """Whether products of bf16 are instructions. Elsewhere torch emulates them, slower than it
    computes float32, and its own tests for bf16 count that as well."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in NATIVE_BF16)


def reuse_memory_and_kernels() -> None:
    """Keeps what one training step has made for the next. Call it before the first product.

    Freed buffers stay with the process: otherwise the system maps and clears the pages of the
    largest ones anew in every step. (Huge pages, for which torch aligns buffers, leave holes: half
    as much memory again, for 0 to 4 % of a step.) Nothing is done where malloc is not glibc's.

    oneDNN keeps its kernels for twice as many shapes of products as by default: experts have other
    numbers of rows in each step, and a kernel takes longer to make than to run. A value set by hand
    stays.
    """
    set_malloc_option(M_MMAP_MAX, 0)
    set_malloc_option(M_TRIM_THRESHOLD, -1)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(ONEDNN_KERNELS))


def return_freed_memory() -> None:
    """Gives every large buffer back to the system as soon as it is freed: otherwise those of a
    model that becomes another leave holes into which the larger ones do not fit. Nothing is done
    where malloc is not glibc's."""
    set_malloc_option(M_MMAP_THRESHOLD, LARGE_BUFFER)


def set_malloc_option(option: int, value: int) -> None:
    """Calls mallopt where there is one."""
    try:
        ctypes.CDLL(None).mallopt(option, value)
    except (OSError, AttributeError, TypeError):  # Windows, macOS, a static or another libc
        return


def peak_resident_gb() -> float | None:
    """Returns the most memory that this process has held, in 10^9 bytes; None where it is not
    counted."""
    return read_kilobytes(Path("/proc/self/status"), "VmHWM:")


def available_memory_gb() -> float | None:
    """Returns the memory that programs may still take, in 10^9 bytes; None where it is not
    told."""
    return read_kilobytes(Path("/proc/meminfo"), "MemAvailable:")


def read_kilobytes(path: Path, label: str) -> float | None:
    """Returns what a line of one of Linux's files says in kB, in 10^9 bytes; None without it."""
    lines = path.read_text().splitlines() if path.exists() else []
    return next((1024 * int(s.split()[1]) / 1e9 for s in lines if s.startswith(label)), None)
