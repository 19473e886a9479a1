"""How long work takes on a device."""

import gc
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from utils.runtime.device import reset_peak_memory, synchronize

Work = Callable[[], object]


def time_in_turn(
    works: Sequence[Work], device: torch.device, repeats: int, warm_up: int
) -> list[list[float]]:
    """Returns the seconds of `repeats` runs of each of `works`, run in turn after `warm_up` runs
    that do not count. On CUDA the device's own clock measures them."""
    for work in warm_up * [*works]:
        work()
    synchronize(device)
    turns, seconds = repeats * [*works], []
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(turns) + 1)]
        events[0].record()
        for work, event in zip(turns, events[1:], strict=True):
            work()
            event.record()
        synchronize(device)
        seconds = [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)]
    else:
        for work in turns:
            started = time.perf_counter()
            work()
            synchronize(device)
            seconds.append(time.perf_counter() - started)
    return [seconds[i :: len(works)] for i in range(len(works))]


def release_memory(device: torch.device) -> None:
    """Gives back what the last measurement held, so that the next one's peak is its own."""
    if "torch._dynamo" in sys.modules:  # what was compiled may hold a pool of captured graphs
        torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where CUDA is not in use
    reset_peak_memory(device)
