"""How long each growth takes, and how much memory."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from transfer import TrainState, apply_plan, grow, make_plan
from utils.benchmark.results import Measurement, ResultRow, catch_out_of_memory
from utils.benchmark.setup import BenchmarkSetup
from utils.benchmark.steps import make_training, memory_error
from utils.benchmark.timing import release_memory, time_in_turn
from utils.runtime.device import peak_memory_gb
from utils.schedule.phases import ResolvedPhase, resolve_phases

MAX_REPEATS = 5
"""Largest number of timed runs: the model before the growth is made anew for each of them."""


def plan_transitions(setup: BenchmarkSetup) -> Iterator[Measurement]:
    """Yields what to measure of the growth into each phase, if the options ask for it."""
    for before, after in pairwise(resolve_phases(setup.run)):
        if setup.options.transitions and after.growth is not None and setup.has_phase(after):
            name = f"{before.name} -> {after.name}"
            yield Measurement(name, partial(measure_transition, name, before, after, setup))


def measure_transition(
    name: str, before: ResolvedPhase, after: ResolvedPhase, setup: BenchmarkSetup
) -> Iterator[tuple[str, ResultRow]]:
    """Yields the time and memory of a growth."""
    row: ResultRow = {"name": name}
    if (error := memory_error(after, setup)) is not None:
        row["error"] = error
    else:
        with catch_out_of_memory(row):
            row |= time_transition(before, after, setup)
    yield "transitions", row


def time_transition(
    before: ResolvedPhase, after: ResolvedPhase, setup: BenchmarkSetup
) -> ResultRow:
    """Returns the seconds and the peak memory of growing a model of the phase `before`, with Adam's
    moments, alone and with the checks that a run makes, and the seconds of a mere copy of all that
    this makes."""
    growth, seed = after.growth, setup.run.seed
    assert growth is not None, f"{after} does not grow"
    shape_BS = setup.run.training.probe_sequences, after.config.seq_len + 1
    probe_BS = torch.randint(after.config.vocab_size, shape_BS, device=setup.device)

    def trained_state() -> TrainState:
        optimizer, step, _ = make_training(before, setup)
        step()
        return optimizer.into_train_state()

    def grow_unchecked(state: TrainState) -> TrainState:
        return apply_plan(*make_plan(state.config, growth), state, seed, consume=True)

    bare_s, peak = time_on_fresh(trained_state, grow_unchecked, setup)
    grow_checked = partial(grow, growth=growth, probe_BS=probe_BS, seed=seed, consume=True)
    checked_s, checked_peak = time_on_fresh(trained_state, grow_checked, setup)
    grown = grow_unchecked(trained_state())
    moments = [tensor for moments in grown.adam.values() for tensor in moments.values()]
    tensors = [*grown.weights.values(), *moments]
    copy_s, _ = time_on_fresh(lambda: tensors, lambda old: [x.clone() for x in old], setup)
    return {
        "bare_s": bare_s,
        "checked_s": checked_s,
        "copy_s": copy_s,
        "made_gb": sum(tensor.nbytes for tensor in tensors) / 1e9,
        "peak_memory_gb": peak,
        "checked_peak_memory_gb": checked_peak,
    }


def time_on_fresh(
    make_input: Callable[[], Any], work: Callable[[Any], object], setup: BenchmarkSetup
) -> tuple[float, float | None]:
    """Times `work` on a new input in each run, in memory that is asked for anew.

    Returns:
        The median of the seconds, without the first run, and the peak memory of the last in 10^9
        bytes, None where it is not counted.
    """
    seconds = []
    for _ in range(1 + min(MAX_REPEATS, setup.options.repeats)):
        call = partial(work, make_input())
        release_memory(setup.device)
        seconds += time_in_turn([call], setup.device, repeats=1, warm_up=0)[0]
    return median(seconds[1:]), peak_memory_gb(setup.device)
