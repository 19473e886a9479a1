"""What a training loop reports of itself without holding the device up."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from utils.device import peak_memory_gb, wait_for
from utils.errors import RunStopped
from utils.header import estimate
from utils.schedule import Stage

MEASURES: tuple[str, ...] = ("loss", "balance_loss", "z_loss", "grad_norm")
TIMED_STEPS = 3


class Reading(NamedTuple):
    sums: Tensor
    """Of each of MEASURES, on the device."""
    steps: int
    seconds: float

    @classmethod
    def nothing(cls) -> "Reading":
        return cls(torch.zeros(len(MEASURES)), 0, 0.0)


class Meter:
    """Means of MEASURES, and the speed, since the last reading. Only that waits for the device."""

    def __init__(self, device: torch.device, tokens_per_step: int, reading: Reading):
        """Goes on from `reading`."""
        self.device, self.tokens_per_step = device, tokens_per_step
        self.sums, self.steps = reading.sums.to(device), reading.steps
        self.started = time.perf_counter() - reading.seconds

    def check(self, where: str) -> None:
        """Raises RunStopped, saying `where`, when a measure is no longer finite."""
        check_finite(dict(zip(MEASURES, self.sums.tolist(), strict=True)), where)

    def reading(self) -> Reading:
        """What it has added up so far, to go on from there."""
        return Reading(self.sums, self.steps, time.perf_counter() - self.started)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens meanwhile does not count as training time."""
        wait_for(self.device)
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began

    def add(self, measures: Tensor) -> None:
        self.sums = self.sums + measures
        self.steps += 1

    def read(self, where: str) -> dict[str, float]:
        """Raises RunStopped, saying `where`, when a measure is no longer finite."""
        means = (self.sums / self.steps).tolist()
        seconds = time.perf_counter() - self.started
        values: dict[str, float] = dict(zip(MEASURES, means, strict=True))
        check_finite(values, where)
        values["tokens_per_s"] = self.steps * self.tokens_per_step / seconds
        if (peak := peak_memory_gb(self.device)) is not None:
            values["peak_memory_gb"] = peak
        self.sums, self.steps = torch.zeros_like(self.sums), 0
        self.started = time.perf_counter()
        return values


def check_finite(values: dict[str, float], where: str) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise RunStopped(f"{where}: {name} is {value}; a lower learning rate may help")


class Forecast:
    """Times the first steps of a run and says how long all of it will take."""

    def __init__(self, stages: list[Stage], device: torch.device):
        self.stages, self.device = stages, device
        self.cold = 1 if device.type == "cpu" else 5
        """Steps that warm up, or are captured, and so do not count."""
        self.started = 0.0

    def after(self, step: int) -> str | None:
        """The estimate, once after TIMED_STEPS."""
        if step not in (self.cold, self.cold + TIMED_STEPS):
            return None
        wait_for(self.device)
        if step == self.cold:
            self.started = time.perf_counter()
            return None
        flops = TIMED_STEPS * self.stages[0].flops / self.stages[0].phase.steps
        return estimate(self.stages, (time.perf_counter() - self.started) / flops)
