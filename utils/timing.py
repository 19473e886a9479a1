"""How long work takes on a device, and how fast the device could be."""

import gc
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median
from typing import NamedTuple

import torch

from config import ModelConfig
from models import axes
from transfer.plan import shapes
from utils.capture import side_stream
from utils.device import reset_peak_memory, wait_for
from utils.schedule import attended, flops_per_token

Work = Callable[[], object]

PARTS: tuple[str, ...] = ("head", "attention", "ffn", "optimizer")
"""Of a step, as utils.pieces times them."""
BYTES_PER_STEP = 38
"""Of memory traffic per parameter in a step all in float32 but the products: Adam reads and writes
weight and moments (24), the gradient is written and read (8), and a bf16 copy of the weight is
written once and read forward and backward (6)."""
BYTES_PER_PASS = 8
"""Of those, what forward and backward move: the copy is read twice, the gradient written."""
LAUNCHES = 3
"""Runs of some work before it is captured."""
RATE_CALLS = 10
"""Products or copies in one measurement: a single one is over before the clocks have settled."""


class Rates(NamedTuple):
    """What the device does at best, measured."""

    flops_per_s: float
    """Large matrix products in the training step's precision."""
    bytes_per_s: float
    """A large copy, what is read and what is written."""

    def limit_s(self, config: ModelConfig, tokens: int) -> float:
        """Seconds of a step: its products, then its traffic, at these rates."""
        compute = tokens * flops_per_token(config) / self.flops_per_s
        return compute + BYTES_PER_STEP * config.num_params / self.bytes_per_s

    def parts_s(self, config: ModelConfig, tokens: int) -> dict[str, float]:
        """The same by part: each its products and the traffic of its weights in forward and
        backward, the optimizer all other traffic."""
        flops, moved = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0.0)
        for name, shape in shapes(config).items():
            if part := part_of(name, config):
                by_expert = axes(name)[0][0] == "expert" and not name.endswith("router.weight")
                chosen = config.top_k / config.num_experts if by_expert else 1
                flops[part] += 6 * tokens * chosen * shape.numel()
                moved[part] += BYTES_PER_PASS * shape.numel()
        flops["attention"] += 6 * tokens * attended(config)
        moved["optimizer"] = BYTES_PER_STEP * config.num_params - sum(moved.values())
        return {p: flops[p] / self.flops_per_s + moved[p] / self.bytes_per_s for p in PARTS}


def part_of(name: str, config: ModelConfig) -> str | None:
    """The part of a step that multiplies by the parameter of that name, if one does."""
    if name == ("embed.weight" if config.tied else "head.weight"):
        return "head"
    within = {".attn.": "attention", ".mlp.": "ffn", ".moe.": "ffn"}
    return next((part for path, part in within.items() if path in name), None)


def timed(
    works: Sequence[Work], device: torch.device, repeats: int, warm_up: int
) -> list[list[float]]:
    """Seconds of `repeats` runs of each of these, in turn, after `warm_up` that do not count."""
    for work in warm_up * [*works]:
        work()
    wait_for(device)
    turns, seconds = repeats * [*works], []
    if device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(turns) + 1)]
        marks[0].record()
        for work, mark in zip(turns, marks[1:], strict=True):
            work()
            mark.record()
        wait_for(device)
        seconds = [start.elapsed_time(end) / 1e3 for start, end in pairwise(marks)]
    else:
        for work in turns:
            began = time.perf_counter()
            work()
            wait_for(device)
            seconds.append(time.perf_counter() - began)
    return [seconds[i :: len(works)] for i in range(len(works))]


def measure_rates(
    device: torch.device, dtype: torch.dtype, repeats: int, warm_up: int, small: bool
) -> Rates:
    """`small`: on less than a GPU needs to get up to speed."""
    size, numbers = (1024, 1 << 24) if small else (8192, 1 << 28)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)

    def multiply() -> None:
        for _ in range(RATE_CALLS):
            torch.mm(a, b, out=product)

    (multiplied,) = timed([multiply], device, repeats, warm_up)
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(RATE_CALLS):
            target.copy_(source)

    (copied,) = timed([copy], device, repeats, warm_up)
    flops, moved = RATE_CALLS * 2 * size**3, RATE_CALLS * 2 * source.nbytes
    return Rates(flops / median(multiplied), moved / median(copied))


def captured(work: Work, device: torch.device) -> Work:
    """`work` without the time that the host takes to launch it: as a captured CUDA graph."""
    stream = side_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(LAUNCHES):
            work()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    return graph.replay


def clean_slate(device: torch.device) -> None:
    """Gives back what the last measurement held, so that the next one's peak is its own."""
    if "torch._dynamo" in sys.modules:  # what was compiled may hold a pool of captured graphs
        torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    reset_peak_memory(device)
