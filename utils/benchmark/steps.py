"""The speed of a phase's training step: this project's own, and that of the baselines."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import product
from statistics import median

import torch
from torch import Tensor

from utils.benchmark.baselines import baseline_label, make_baseline_step
from utils.benchmark.components import make_component_works
from utils.benchmark.options import CompileMode
from utils.benchmark.results import Measurement, ResultRow, catch_out_of_memory
from utils.benchmark.roofline import DeviceRates
from utils.benchmark.setup import BenchmarkSetup
from utils.benchmark.timing import Work, release_memory
from utils.metrics.throughput import AccumulatorState, MetricAccumulator
from utils.optim.adamw import Optimizer, build_optimizer
from utils.runtime.device import free_memory_gb, peak_memory_gb
from utils.runtime.formatting import format_gb
from utils.schedule.lr import lr_at
from utils.schedule.memory import has_room, phase_memory_gb
from utils.schedule.phases import ResolvedPhase, flops_per_token, resolve_phases
from utils.training.init_from import InitSource
from utils.training.step import batches, make_train_step

RANDOM_TOKENS = 1 << 20
"""Length of the text from which batches are drawn."""
EXPECTED_OF_LIMIT = 0.3
"""Share of the machine's limit that steps are expected to reach, to tell how long they will take:
the presets full and tiny reach 0.23 to 0.4 on a CPU, and more on a GPU."""


def measure_rates(setup: BenchmarkSetup) -> DeviceRates | None:
    """Returns what the device does at best, which steps are compared with; None where the options
    ask for no step."""
    options = setup.options
    if not (options.steps or options.baseline_modes):
        return None
    return DeviceRates.measure(setup.device, setup.dtype, options.repeats, options.warm_up)


def plan_steps(setup: BenchmarkSetup, rates: DeviceRates) -> Iterator[Measurement]:
    """Yields what to measure for each phase at each batch: our step with its components, and each
    baseline."""
    options = setup.options
    chosen = filter(setup.has_phase, resolve_phases(setup.run))
    sized = (
        replace(phase, batch_size=phase.batch_size if size == "default" else size)
        for phase, size in product(chosen, options.batches)
    )
    for phase in dict.fromkeys(sized):
        where = f"phase {phase.number}, batch {phase.batch_size}"
        limit_s = rates.step_limit_s(phase.config, phase.tokens_per_step)
        runs = 0 if memory_error(phase, setup) else options.warm_up + options.repeats
        runs_s = runs * limit_s / EXPECTED_OF_LIMIT
        if options.steps:
            own = partial(measure_own_step, phase, rates, setup)
            # With data, without, and the components, which make up about one more.
            yield Measurement(f"{where}: this project", own, 3 * runs_s)
        for mode, dtype in product(options.baseline_modes, (torch.float32, torch.bfloat16)):
            label = baseline_label(phase.config, setup.dtype, dtype, mode)
            baseline = partial(measure_baseline, label, phase, rates, setup, dtype, mode)
            yield Measurement(f"{where}: {label}", baseline, runs_s)


def measure_baseline(
    label: str,
    phase: ResolvedPhase,
    rates: DeviceRates,
    setup: BenchmarkSetup,
    dtype: torch.dtype,
    mode: CompileMode | None,
) -> Iterator[tuple[str, ResultRow]]:
    """Yields the speed of a baseline's step."""
    make_step = partial(make_baseline_step, phase, setup, dtype, mode)
    yield "steps", measure_step(label, make_step, phase, rates, setup)


def measure_own_step(
    phase: ResolvedPhase, rates: DeviceRates, setup: BenchmarkSetup
) -> Iterator[tuple[str, ResultRow]]:
    """Yields the speed of our step and, where there was memory for it, that of its components."""
    make_once = cache(partial(make_training, phase, setup))
    row = measure_step("this project", lambda: make_once()[1:], phase, rates, setup)
    yield "steps", row
    if "ms" in row:
        components: ResultRow = {name: row[name] for name in ("phase", "name", "batch")}
        with catch_out_of_memory(components):
            components |= time_components(make_once()[0], phase, row["ms"], rates, setup)
        yield "components", components


def make_training(phase: ResolvedPhase, setup: BenchmarkSetup) -> tuple[Optimizer, Work, Work]:
    """Makes a fresh model of a phase, to be trained on random tokens as train.py trains it, the
    learning rate and the metrics included.

    Returns:
        Its optimizer, its step on the next batch, and a step on a batch that is on the device.
    """
    run, device = setup.run, setup.device
    with torch.device(device):
        state = InitSource(run).initial_state(phase.config)
    optimizer = build_optimizer(state, run.training, setup.dtype, phase.growth_history)
    step = make_train_step(optimizer, run.training, setup.dtype, sys.maxsize)
    text = torch.randint(phase.config.vocab_size, (RANDOM_TOKENS,), dtype=torch.int32)
    stream = batches(text.numpy(), replace(phase, steps=sys.maxsize), run.seed, device)
    first_batch_BS = next(stream)
    metrics = MetricAccumulator(device, phase.tokens_per_step, AccumulatorState.empty())

    def train_on(tokens_BS: Tensor) -> None:
        optimizer.set_lr(lr_at(0, phase, run.training))
        metrics.add(step(tokens_BS))

    return optimizer, lambda: train_on(next(stream)), lambda: train_on(first_batch_BS)


def measure_step(
    model: str,
    make_works: Callable[[], tuple[Work, ...]],
    phase: ResolvedPhase,
    rates: DeviceRates,
    setup: BenchmarkSetup,
) -> ResultRow:
    """Returns the time and memory of a model's step, or that there was no memory for it.
    `make_works` makes the step and, if it can, the same step without making a batch."""
    config, tokens = phase.config, phase.tokens_per_step
    limit_s = rates.step_limit_s(config, tokens)
    row: ResultRow = {
        "model": model,
        "phase": phase.number,
        "name": phase.name,
        "batch": phase.batch_size,
        "context": config.seq_len,
        "params": config.num_params,
        "active_params": config.num_active_params,
        "limit_tokens_per_s": tokens / limit_s,
    }
    if (error := memory_error(phase, setup)) is not None:
        return row | {"error": error}
    release_memory(setup.device)
    with catch_out_of_memory(row):
        step_s, *without_data_s = setup.time(*make_works())
        seconds = median(step_s)
        row |= {"ms": 1e3 * seconds, "ms_min": 1e3 * min(step_s), "ms_max": 1e3 * max(step_s)}
        if without_data_s:
            row["ms_without_data"] = 1e3 * median(*without_data_s)
        row |= {
            "tokens_per_s": tokens / seconds,
            **rates.utilization(tokens * flops_per_token(config) / seconds),
            "of_limit": limit_s / seconds,
            "peak_memory_gb": peak_memory_gb(setup.device),
        }
    return row


def memory_error(phase: ResolvedPhase, setup: BenchmarkSetup) -> str | None:
    """Returns what a phase needs where a CPU's memory is too small for it: the system would end the
    process, where a GPU raises an error."""
    need, free = phase_memory_gb(phase, setup.run, setup.device), free_memory_gb(setup.device)
    is_too_large = setup.device.type == "cpu" and not has_room(need, free)
    return f"needs {format_gb(need)}" if is_too_large else None


def time_components(
    optimizer: Optimizer,
    phase: ResolvedPhase,
    step_ms: float,
    rates: DeviceRates,
    setup: BenchmarkSetup,
) -> ResultRow:
    """Returns the time of each component, its part of the limit, both in ms, and its share of the
    step. Each is timed alone, so they may add up to more than the step, though norms, embedding and
    data are in none of them."""
    works = make_component_works(optimizer, phase.batch_size, setup.dtype)
    row: ResultRow = {}
    for name, limit_s in rates.component_limits_s(phase.config, phase.tokens_per_step).items():
        ms = 1e3 * median(setup.time(works[name])[0])
        row |= {f"{name}_ms": ms, f"{name}_limit_ms": 1e3 * limit_s, f"{name}_share": ms / step_ms}
    return row
