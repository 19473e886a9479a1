"""Means of what training steps measure, and their speed, without holding the device up."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from utils.runtime.device import peak_memory_gb, synchronize
from utils.runtime.errors import NotFinite
from utils.runtime.stopwatch import Stopwatch

STEP_METRICS: tuple[str, ...] = ("loss", "load_balance_loss", "z_loss", "grad_norm")
"""What a training step returns, in order."""
TIMED_STEPS = 6
"""Steps that a StepTimer times."""


class AccumulatorState(NamedTuple):
    """What a MetricAccumulator has added up so far, to be kept with a resume point."""

    sums: Tensor
    """Sum of each of STEP_METRICS, on the device."""
    steps: int
    tokens: int
    seconds: float

    @classmethod
    def empty(cls) -> "AccumulatorState":
        """Returns the state before any step."""
        return cls(torch.zeros(len(STEP_METRICS)), 0, 0, 0.0)


class MetricAccumulator:
    """Means of STEP_METRICS and the speed since the last reading. Only a reading waits for the
    device."""

    def __init__(self, device: torch.device, tokens_per_step: int, state: AccumulatorState):
        self.device, self.tokens_per_step = device, tokens_per_step
        self.sums, self.steps, self.tokens = state.sums.to(device), state.steps, state.tokens
        self.started = time.perf_counter() - state.seconds

    def state(self) -> AccumulatorState:
        """Returns what has been added up so far."""
        seconds = time.perf_counter() - self.started
        return AccumulatorState(self.sums, self.steps, self.tokens, seconds)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count the time within as training time."""
        synchronize(self.device)
        began = time.perf_counter()
        try:
            yield
        finally:  # a run that is stopped within keeps its time as well
            self.started += time.perf_counter() - began

    def add(self, metrics: Tensor) -> None:
        """Adds one step's STEP_METRICS."""
        self.sums = self.sums + metrics
        self.steps += 1
        self.tokens += self.tokens_per_step

    def check(self, where: str) -> None:
        """Raises NotFinite, saying `where`, when a metric is no longer finite."""
        check_finite(dict(zip(STEP_METRICS, self.sums.tolist(), strict=True)), where)

    def read(self, where: str) -> dict[str, float]:
        """Returns the means and the speed, and starts anew.

        Raises:
            NotFinite: saying `where`, when a metric is no longer finite.
        """
        means = (self.sums / self.steps).tolist()
        seconds = time.perf_counter() - self.started
        values: dict[str, float] = dict(zip(STEP_METRICS, means, strict=True))
        check_finite(values, where)
        values["tokens_per_s"] = self.tokens / seconds
        if (peak := peak_memory_gb(self.device)) is not None:
            values["peak_memory_gb"] = peak
        self.sums, self.steps, self.tokens = torch.zeros_like(self.sums), 0, 0
        self.started = time.perf_counter()
        return values


def check_finite(values: dict[str, float], where: str) -> None:
    """Raises NotFinite, saying `where`, for the first value that is not finite."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise NotFinite(f"{where}: {name} is {value}")


class StepTimer:
    """Times some of a phase's first steps, without what is done between them."""

    def __init__(self, device: torch.device, stopwatch: Stopwatch):
        self.device, self.stopwatch, self.started_s, self.steps = device, stopwatch, 0.0, 0
        self.skipped_steps = 2 if device.type == "cpu" else 5
        """Steps that warm up, or are captured, and so do not count."""

    def count(self) -> float | None:
        """Counts a step. Returns the seconds of one, once, after TIMED_STEPS."""
        self.steps += 1
        if self.steps not in (self.skipped_steps, self.skipped_steps + TIMED_STEPS):
            return None
        synchronize(self.device)
        started_s, self.started_s = self.started_s, self.stopwatch.seconds()["steps"]
        if self.steps == self.skipped_steps:
            return None
        return (self.started_s - started_s) / TIMED_STEPS
