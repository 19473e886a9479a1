"""Means of what training steps measure, their speed, and an estimate of the time to come, without
holding the device up."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from utils.metrics.console import estimate_line
from utils.runtime.device import peak_memory_gb, synchronize
from utils.runtime.errors import NotFinite
from utils.schedule.phases import ResolvedPhase

STEP_METRICS: tuple[str, ...] = ("loss", "load_balance_loss", "z_loss", "grad_norm")
"""What a training step returns, in order."""
TIMED_STEPS = 3


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


class EtaEstimator:
    """Times the first steps of a run and says how long its training will take."""

    def __init__(self, phases: list[ResolvedPhase], device: torch.device):
        self.phases, self.device = phases, device
        self.skipped_steps = 1 if device.type == "cpu" else 5
        """Steps that warm up, or are captured, and so do not count."""
        self.started = 0.0

    def line_after(self, step: int) -> str | None:
        """Returns the estimate as a line of text, once, after TIMED_STEPS."""
        if step not in (self.skipped_steps, self.skipped_steps + TIMED_STEPS):
            return None
        synchronize(self.device)
        if step == self.skipped_steps:
            self.started = time.perf_counter()
            return None
        flops = TIMED_STEPS * self.phases[0].flops / self.phases[0].steps
        return estimate_line(self.phases, (time.perf_counter() - self.started) / flops)
