"""The memory that a phase is expected to need, and what to change where there is not enough."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from config import InputError, ModelConfig, Run
from models.ops import fused_kernels_available
from utils.runtime.cpu import available_memory_gb
from utils.runtime.device import free_memory_gb, is_out_of_memory, training_dtype
from utils.runtime.errors import RunStopped
from utils.runtime.formatting import format_gb
from utils.schedule.phases import ResolvedPhase

BYTES_PER_PARAM = 16
"""Weight, gradient and Adam's two moments, all float32."""
FUSED_BYTES_PER_PARAM = 14
"""The weight in two halves of 2, the gradient in bf16, two moments in float32."""
MICRO_BATCH_BYTES_PER_PARAM = 2
"""What the fused step adds to that for gradients that add up in float32."""
LOW_MEMORY_BYTES_PER_PARAM = 7.125
"""Weight and gradient in bf16, 8 more bits of the weight, two moments of 8 bits with scales."""
CHECKPOINT_BYTES_PER_PARAM = 4
"""The float32 weight, as it is written."""
POINT_BYTES_PER_PARAM = 12
"""The float32 weight and two moments, as they are copied and written."""
SPLIT_BYTES_PER_PARAM = 8
"""What splitting the largest weight takes as a phase begins: there is no gradient yet, but all the
other weights are still whole."""
CPU_OVERHEAD = 1.75
"""A CPU keeps freed buffers and kernels, those of the phase before as well: the full preset's first
two phases held 1.5 to 1.75 times what they had in use."""
USABLE_SHARE = 0.95
"""Share of the free memory to plan with: the expected need may be off, and free memory lies in
pieces."""


def memory_gb(
    config: ModelConfig,
    sequences: int,
    dtype: torch.dtype,
    low_memory: bool = False,
    is_fused: bool = False,
    has_micro_batches: bool = False,
) -> float:
    """Returns the expected peak memory of a phase in 10^9 bytes, with `sequences` at a time.

    The multiples were fitted to peaks measured in bf16, plain on an H200 and fused on an H100, at 8
    (2, 1) and 64 sequences in the four phases of the full preset: within 10 % of all.
    """
    tokens = sequences * config.seq_len
    choices = config.top_k if config.num_experts else 0
    width, inner = config.d_model, (choices or 1) * config.d_ff
    if is_fused:
        block, head = 8 * width + 3 * inner, 1.25 * config.vocab_size
        # Once the logits are gone: what all weights' gradients are made of together.
        deferred = 4 * width if choices else 5 * width + 2 * inner
        head = max(head, config.n_layers * deferred)
    else:
        block, head = 11 * width + 4 * inner + 2 * choices * width, 3 * config.vocab_size
    activations = tokens * (config.n_layers * block + head) * dtype.itemsize
    per_param = FUSED_BYTES_PER_PARAM if is_fused else BYTES_PER_PARAM
    if low_memory:
        per_param = LOW_MEMORY_BYTES_PER_PARAM
    elif is_fused:
        per_param += MICRO_BATCH_BYTES_PER_PARAM * has_micro_batches
        largest = width * max(config.vocab_size, (config.num_experts or 1) * config.d_ff)
        activations = max(activations, SPLIT_BYTES_PER_PARAM * largest)
    return (config.num_params * per_param + activations) / 1e9


def phase_memory_gb(phase: ResolvedPhase, run: Run, device: torch.device) -> float:
    """Returns the expected peak memory of a phase as this run trains it, in 10^9 bytes."""
    training, dtype = run.training, training_dtype(run.precision, device)
    is_fused = training.fused_kernels and fused_kernels_available(phase.config, device, dtype)
    at_once = min(training.micro_batch_size or phase.batch_size, phase.batch_size)
    low_memory = training.fused_kernels and training.low_memory
    micro_batches = training.micro_batch_size is not None
    in_use = memory_gb(phase.config, at_once, dtype, low_memory, is_fused, micro_batches)
    return CPU_OVERHEAD * in_use if device.type == "cpu" else in_use


def has_room(need_gb: float, free_gb: float | None) -> bool:
    """Whether there is room for a need in the free memory; also where that is not known."""
    return free_gb is None or need_gb <= USABLE_SHARE * free_gb


def has_room_for_copy(phases: list[ResolvedPhase], run: Run, device: torch.device) -> bool:
    """Whether the host has room for a copy of the largest phase's weights and moments, beside what
    training takes there; also where that is not known."""
    copy = POINT_BYTES_PER_PARAM * max(phase.config.num_params for phase in phases) / 1e9
    is_on_host = device.type == "cpu"
    training = max(phase_memory_gb(p, run, device) for p in phases) if is_on_host else 0.0
    return has_room(copy + training, available_memory_gb())


def check_memory(phases: list[ResolvedPhase], run: Run, device: torch.device) -> None:
    """Raises InputError where a phase is expected to need more memory than there is, and names the
    settings with which all of them would fit."""

    def largest_need(**changes: object) -> tuple[float, ResolvedPhase]:
        changed = replace(run, training=replace(run.training, **changes))
        needs = [(phase_memory_gb(phase, changed, device), phase) for phase in phases]
        return max(needs, key=lambda need: need[0])

    (need, phase), free = largest_need(), free_memory_gb(device)
    if free is None or has_room(need, free):
        return
    options: dict[str, dict[str, object]] = {
        "--training.micro-batch-size 1": {"micro_batch_size": 1}
    }
    if fused_kernels_available(phase.config, device, training_dtype(run.precision, device)):
        options["--training.low-memory"] = {"low_memory": True}
        options[" ".join(options)] = {"low_memory": True, "micro_batch_size": 1}
    fits = [
        f"{flags} needs {format_gb(smaller)}"
        for flags, changes in options.items()
        if has_room(smaller := largest_need(**changes)[0], free)
    ]
    raise InputError(
        f"{phase} needs about {format_gb(need)}, {device} has {format_gb(free)}: "
        + (fits[0] if fits else "only a smaller model would fit")
    )


@contextmanager
def explain_out_of_memory(phase: ResolvedPhase, micro_batch_size: int | None) -> Iterator[None]:
    """Raises RunStopped, naming the setting that needs less, where memory runs out."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        size = phase.batch_size
        raise RunStopped(
            f"{phase}: out of memory with {min(micro_batch_size or size, size)} of its batch of "
            f"{size} sequences at a time; a smaller --training.micro-batch-size needs less"
        ) from error
